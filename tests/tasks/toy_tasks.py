"""Tiny data of every task, in the public formats, that can be learned in a few steps; and runs on them."""

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from sparse_pretrain.config import OptimizerConfig, SchedulerConfig, TrainConfig, TrainerConfig
from sparse_pretrain.config_data import ImagesConfig, PairsConfig, QuestionsConfig, SentencesConfig, TextConfig
from sparse_pretrain.config_models import BertConfig, GPTConfig, Seq2SeqConfig, ViTConfig
from sparse_pretrain.sparsity import load_recipe

WORDS = ["red", "blue", "green", "dog", "cat", "bird", "runs", "sleeps", "eats", "now", "here", "there"]
SIZES = {"n_layer": 2, "n_head": 2, "d_model": 16}
TASKS = [
    "masked_lm",
    "seq2seq",
    "conditional_lm",
    "image_classification",
    "text_classification",
    "regression",
    "question_answering",
    "gpt_text_classification",
]


def sentence(draw: random.Random, words: int = 5) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def write_text(folder: Path) -> Path:
    draw = random.Random(0)
    path = folder / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(" ".join(sentence(draw) for _ in range(60)) for _ in range(12)))
    return path


def write_pairs(folder: Path) -> list[Path]:
    """The target is the source in capitals: a copy, in other tokens."""
    draw = random.Random(1)
    sources = [sentence(draw) for _ in range(80)]
    files = [folder / "a.txt", folder / "b.txt"]
    files[0].write_text("\n".join(sources) + "\n")
    files[1].write_text("\n".join(source.upper() for source in sources) + "\n")
    return files


def write_images(folder: Path) -> Path:
    """Two classes, dark and bright."""
    draw = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 150)):
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        for i in range(24):
            pixels = draw.integers(low, low + 100, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    return folder / "images"


def write_sst2(folder: Path) -> Path:
    """Positive if there is a bird in it."""
    draw = random.Random(2)
    path = folder / "sst2.tsv"
    rows = [sentence(draw) for _ in range(80)]
    path.write_text("sentence\tlabel\n" + "".join(f"{row}\t{int('bird' in row)}\n" for row in rows))
    return path


def write_stsb(folder: Path) -> Path:
    """The score is high for the same sentence twice."""
    draw = random.Random(3)
    path = folder / "stsb.tsv"
    rows = []
    for _ in range(80):
        first = sentence(draw)
        same = draw.random() < 0.5
        rows.append(f"{first}\t{first if same else sentence(draw)}\t{5.0 if same else 0.0}\n")
    path.write_text("sentence1\tsentence2\tscore\n" + "".join(rows))
    return path


def write_squad(folder: Path) -> Path:
    """The answer is the animal of the context and the word after it."""
    draw = random.Random(4)
    paragraphs = []
    for i in range(60):
        words = draw.choices(["red", "blue", "green", "runs", "now", "here"], k=6)
        animal = draw.choice(["dog", "cat", "bird"])
        place = draw.randrange(6)
        words.insert(place, animal)
        context = " ".join(words)
        answer = {"text": " ".join(words[place : place + 2]), "answer_start": context.index(animal)}
        paragraphs.append(
            {"context": context, "qas": [{"id": str(i), "question": "which animal", "answers": [answer]}]}
        )
    path = folder / "squad.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "a", "paragraphs": paragraphs}]}))
    return path


def write_vocabulary(folder: Path) -> Path:
    """BERT's, of whole words."""
    path = folder / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "which", "animal"]) + "\n")
    return path


def task_config(task: str, folder: Path, run_dir: str = "run", **changes) -> TrainConfig:
    """A run of about two seconds whose data and folder are in `folder`; changes as `trainer__steps=3`."""
    folder.mkdir(parents=True, exist_ok=True)
    bert = BertConfig(name="bert", max_seq_len=24, **SIZES)
    gpt = GPTConfig(name="gpt", max_seq_len=48, **SIZES)
    common = {"name": task, "validation_share": 0.2, "num_workers": 0}
    if task == "masked_lm":
        model = bert
        data = TextConfig(
            source="text", train=[str(write_text(folder))], tokenizer="wordpiece", vocab_size=300, seq_len=16, **common
        )
    elif task in ("seq2seq", "conditional_lm"):
        model = Seq2SeqConfig(name="seq2seq", max_seq_len=24, norm_place="pre", **SIZES) if task == "seq2seq" else gpt
        files = [str(path) for path in write_pairs(folder)]
        lengths = {"max_source_len": 16, "max_target_len": 16}
        data = PairsConfig(format="lines", train=files, vocab_size=300, label_smoothing=0.1, **lengths, **common)
    elif task == "image_classification":
        model = ViTConfig(name="vit", image_size=8, patch_size=4, **SIZES)
        data = ImagesConfig(train=[str(write_images(folder))], image_size=8, crop_padding=1, **common)
    else:
        model = gpt if task.startswith("gpt") else bert
        if task == "question_answering":
            options = {"train": [str(write_squad(folder))], "seq_len": 24, "stride": 4, "max_query_len": 6}
            data = QuestionsConfig(tokenizer=str(write_vocabulary(folder)), **options, **common)
        else:
            write, glue_task = (write_stsb, "stsb") if task == "regression" else (write_sst2, "sst2")
            tokenizer = str(write_vocabulary(folder))
            data = SentencesConfig(
                train=[str(write(folder))], glue_task=glue_task, tokenizer=tokenizer, seq_len=24, **common
            )
    cfg = TrainConfig(
        model=model,
        data=data,
        recipe=load_recipe("ste"),
        optimizer=OptimizerConfig(lr=5e-3),
        scheduler=SchedulerConfig(warmup_steps=2),
        trainer=TrainerConfig(
            steps=12, batch_size=8, accelerator="cpu", log_every=1, eval_every=6, eval_batches=20, checkpoint_every=6, peak_tflops=1.0
        ),
        run_dir=str(folder / run_dir),
    )  # fmt: skip
    for option, value in changes.items():
        group, _, name = option.rpartition("__")
        target = cfg
        for part in filter(None, group.split("__")):
            target = getattr(target, part)
        assert hasattr(target, name), option
        setattr(target, name, value)
    return cfg
