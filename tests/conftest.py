"""A tiny run to test with: a few thousand words, a model of a few thousand parameters, a few steps."""

import os
import random
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models run fastest so; before torch is imported

import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU; it reads this when a kernel is defined
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sparse_pretrain.config import OptimizerConfig, SchedulerConfig, TrainConfig, TrainerConfig
from sparse_pretrain.config_data import TextConfig
from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.sparsity import load_recipe


def pytest_collection_modifyitems(items):
    """Files with slow tests first: processes that share the files out then end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Tests share one cache of tokenizers and tokens, which is not the user's."""
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """40 documents of random words with some structure (each word foretells the next), about 60 kB."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 6))) for _ in range(60)]
    documents = []
    for _ in range(40):
        position, text = draw.randrange(60), []
        for _ in range(300):
            text.append(words[position])
            position = (position * 7 + draw.choice((1, 2))) % 60
        documents.append(" ".join(text))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture
def tiny(corpus, tmp_path):
    """tiny(recipe="fst", steps=12, …) -> a TrainConfig of about a second, whose run folder is in tmp_path."""

    def make(recipe: str = "fst", run_dir: str = "run", **changes) -> TrainConfig:
        method = load_recipe(recipe)
        cfg = TrainConfig(
            model=GPTConfig(name="tiny", n_layer=2, n_head=2, d_model=16, max_seq_len=16),
            data=TextConfig(
                name="tiny", source="text", train=[str(corpus)], validation_share=0.1, vocab_size=320, seq_len=16, num_workers=0
            ),
            recipe=method,
            optimizer=OptimizerConfig(lr=3e-3),
            scheduler=SchedulerConfig(warmup_steps=2),
            trainer=TrainerConfig(
                steps=12, batch_size=8, accelerator="cpu", log_every=1, eval_every=4, eval_batches=2, checkpoint_every=4,
                peak_tflops=1.0,
            ),
            run_dir=str(tmp_path / run_dir),
        )  # fmt: skip
        for option, value in changes.items():
            group, _, name = option.rpartition("__")
            target = cfg
            for part in filter(None, group.split("__")):
                target = getattr(target, part)
            assert hasattr(target, name), option
            setattr(target, name, value)
        return cfg

    return make


@pytest.fixture
def train_together(monkeypatch):
    """train_together(configs, ranks): these runs, by the same processes."""
    from sparse_pretrain import launch, train
    from tests.ranks import run_ranks, train_runs

    def run(configs, ranks: int) -> None:
        folders: list[Path] = []
        with monkeypatch.context() as patch:
            patch.setattr(launch, "launch", lambda cfg, run_dir: folders.append(run_dir))
            for cfg in configs:
                train.run(cfg)
        run_ranks(ranks, train_runs, folders)

    return run
