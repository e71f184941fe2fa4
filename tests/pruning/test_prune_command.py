"""`sparse-pretrain prune` as a user runs it, on small runs and Hugging Face folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_pretrain import cli, runs
from sparse_pretrain.calibration import calibration, windows
from sparse_pretrain.config import PruneConfig
from sparse_pretrain.data.tokenizer import load_tokenizer
from sparse_pretrain.errors import UserError
from sparse_pretrain.pruned import plain_task
from sparse_pretrain.pruning.oats import rank
from sparse_pretrain.sparsity.adapters import LoRA, adapters_of
from sparse_pretrain.tasks.trained import load_trained

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

OPTIONS = [
    "data=text", "data.vocab_size=300", "trainer.accelerator=cpu", "trainer.peak_tflops=1", "model.max_seq_len=16", "model.d_model=32",
    "model.n_layer=2", "trainer.steps=4", "trainer.batch_size=4", "trainer.eval_every=4", "trainer.eval_batches=2", "scheduler.warmup_steps=2",
    "data.num_workers=0", "data.seq_len=16",
]  # fmt: skip
CPU = torch.device("cpu")


def command(name: str, **options) -> None:
    cli.main([name, *(f"{option}={value}" for option, value in options.items())])


def prune(source: Path, out: Path, **options) -> dict:
    command("prune", **{"checkpoint": source, "out": out, "samples": 8, "accelerator": "cpu"} | options)
    return json.loads((out / "prune.json").read_text())


def printed(capsys, name: str, **options) -> dict[str, str]:
    """What `evaluate` says, by the first word of each line."""
    capsys.readouterr()
    command(name, **options)
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus) -> Path:
    """A dense run of a GPT."""
    folder = tmp_path_factory.mktemp("runs")
    os.environ["SPARSE_PRETRAIN_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    cli.main(["train", "recipe=dense", *OPTIONS, f"data.train=[{corpus}]", f"run_dir={folder}/gpt"])
    return folder / "gpt"


@pytest.fixture(scope="module")
def llama(run, tmp_path_factory) -> Path:
    """A folder of transformers with the run's tokenizer; q, k and v are one layer in our model of it."""
    torch.manual_seed(0)
    cfg = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=320,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hf") / "llama"
    transformers.LlamaForCausalLM(cfg).save_pretrained(folder)
    shutil.copy(run / runs.TOKENIZER_FILE, folder)
    (folder / "pytorch_model.bin").write_bytes(b"the weights of before")
    return folder


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("magnitude", "2:4"), ("wanda", "0.6"), ("sparsegpt", "4:8"), ("oats", "2:4"), ("oats", "0.5")],
)
def test_a_pruned_run_is_a_run(run, tmp_path, capsys, method, pattern):
    options = {"rank_ratio": 0.3, "iterations": 5} if method == "oats" else {}
    facts = prune(run, tmp_path / "out", method=method, pattern=pattern, **options)
    layers = {layer["name"]: layer for layer in facts["layers"]}
    assert set(layers) == {
        f"blocks.{n}.{name}" for n in (0, 1) for name in ("attn.qkv", "attn.out", "ffn.up", "ffn.down")
    }
    assert facts["calibration"] == {
        "samples": 8,
        "seq_len": 16,
        "data": "text, train split",
        "sha256": facts["calibration"]["sha256"],
    }
    assert runs.read_json(tmp_path / "out" / runs.RUN_FILE)["pruning"]["method"] == method
    assert not (tmp_path / "out" / "partial").exists()

    result, source = load_trained(str(tmp_path / "out"), CPU), load_trained(str(run), CPU)
    assert (result.step, result.cfg.model) == (source.step, source.cfg.model)
    adapters = adapters_of(result.model)
    tokens = torch.randint(300, (2, 16))
    for name, layer in layers.items():
        weight = result.model.get_submodule(name).weight
        if ":" in pattern:  # its mask is where the zeros are not
            assert torch.equal(result.model.get_submodule(name).current_weight(), weight)
        zeros = float((weight == 0).double().mean())
        assert zeros == pytest.approx(layer["sparsity"])
        assert zeros == pytest.approx({"2:4": 0.5, "4:8": 0.5, "0.6": 0.6, "0.5": 1 - 0.7 * 0.5}[pattern], abs=0.03)
        if method == "oats":
            assert layer["rank"] == adapters[name].rank == rank(*weight.shape, facts["rank_share"])
            assert adapters[name].a.norm(dim=1).tolist() == pytest.approx(
                adapters[name].b.norm(dim=0).tolist(), rel=1e-3
            )
        else:
            assert name not in adapters
    if method == "oats":  # the dense weights are near where zeros and adapters are together
        for name in layers:
            sparse, dense = result.model.get_submodule(name), source.model.get_submodule(name)
            assert (sparse.weight + adapters[name].delta() - dense.weight).norm() < 0.7 * (
                sparse.weight - dense.weight
            ).norm()
    outputs = result.model(tokens)
    assert outputs.isfinite().all()

    shown = printed(capsys, "evaluate", checkpoint=tmp_path / "out", accelerator="cpu")
    if ":" in pattern:
        assert shown["weights"].startswith(f"{pattern} sparse in 8 layers")
    if pattern == "2:4":
        packed = printed(capsys, "evaluate", checkpoint=tmp_path / "out", weights="packed", accelerator="cpu")
        assert "packed: values and 2-bit metadata in 8 layers" in packed["weights"]
        assert float(packed["loss"]) == pytest.approx(float(shown["loss"]), abs=1e-4)
    command("generate", checkpoint=tmp_path / "out", max_new_tokens=3, accelerator="cpu")


def test_the_result_feeds_retraining(run, corpus, tmp_path, capsys):
    prune(run, tmp_path / "out", method="oats", iterations=5)
    pruned = load_trained(str(tmp_path / "out"), CPU)
    options = [
        *OPTIONS,
        f"data.train=[{corpus}]",
        f"init_from={tmp_path / 'out'}",
        "recipe=ast",
        "recipe.schedule.dense_warmup=0",
    ]
    options += [
        "recipe.include=['blocks.*']",
        "recipe.adapter.kind=lora",
        f"recipe.adapter.path={tmp_path / 'out' / runs.ADAPTER_FILE}",
    ]
    cli.main(["train", *options, "optimizer.lr=0", f"run_dir={tmp_path / 'ast'}"])
    retrained = load_trained(str(tmp_path / "ast"), CPU)  # without a learning rate: what it began with
    for name, adapter in adapters_of(pruned.model).items():
        assert torch.equal(adapters_of(retrained.model)[name].delta(), adapter.delta())
        assert torch.equal(
            retrained.model.get_submodule(name).current_weight(), pruned.model.get_submodule(name).current_weight()
        )
    with pytest.raises(SystemExit):
        cli.main(
            ["train", *options, "recipe.adapter.rank=3", "recipe.adapter.alpha=7", f"run_dir={tmp_path / 'other'}"]
        )
    assert "alpha=16.0, kind=lora, rank_share=0.1666" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "oats"])
def test_a_pruned_hugging_face_folder_is_one(llama, corpus, tmp_path, method):
    options = {"iterations": 5, "svd": "randomized"} if method == "oats" else {}
    facts = prune(llama, tmp_path / "out", method=method, text=f"[{corpus}]", seq_len=24, **options)
    assert facts["calibration"]["seq_len"] == 24
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "prune.json"]
        + (["adapter.safetensors"] if method == "oats" else [])
    )
    assert (tmp_path / "out" / "config.json").read_bytes() == (llama / "config.json").read_bytes()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(llama)
    for name, tensor in theirs.state_dict().items():
        if name.endswith("_proj.weight"):
            assert ((tensor == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all(), name
        else:
            assert torch.equal(tensor, dense.state_dict()[name]), name
    ours = load_trained(str(tmp_path / "out"), CPU).model
    tokens = torch.randint(300, (2, 24))
    with torch.no_grad():
        if method == "oats":
            adapters = adapters_of(ours)
            assert len(adapters) == len(facts["layers"]) == 2 * 5
            assert not torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-2)
            for adapter in adapters.values():
                adapter.active = False
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-3, atol=1e-4)


def test_adapters_of_layers_that_stay_are_merged(llama, corpus, tmp_path):
    """The result has no adapters of before: what they added is in the weights, of layers not pruned again too."""
    options = {"text": f"[{corpus}]", "seq_len": 16, "samples": 4}
    prune(llama, tmp_path / "oats", method="oats", iterations=3, **options)
    prune(tmp_path / "oats", tmp_path / "again", method="wanda", exclude="['*.ffn.*', 'blocks.0.attn.qkv']", **options)
    assert not (tmp_path / "again" / runs.ADAPTER_FILE).exists()
    before, after = (load_trained(str(tmp_path / folder), CPU).model for folder in ("oats", "again"))
    for name in ("blocks.0.attn.qkv", "blocks.0.ffn.gate", "blocks.1.ffn.down"):
        expected = before.get_submodule(name).weight + adapters_of(before)[name].delta()
        torch.testing.assert_close(after.get_submodule(name).weight, expected, rtol=0, atol=1e-6)
    pruned = after.get_submodule("blocks.1.attn.qkv").weight
    assert (pruned == 0).double().mean() == 0.5


def test_exported_folders(llama, corpus, tmp_path, capsys):
    """What an export says of its zeros is not said of other ones; packed weights are refused before any work."""
    options = {"text": f"[{corpus}]", "seq_len": 16, "samples": 4}
    prune(llama, tmp_path / "wanda", method="wanda", **options)
    for form in ("dense", "packed"):
        command("export", checkpoint=tmp_path / "wanda", out=tmp_path / form, format=form)
    assert "sparsity_config" in json.loads((tmp_path / "dense" / "config.json").read_text())
    prune(tmp_path / "dense", tmp_path / "again", method="magnitude", pattern="0.3", **options)
    config = json.loads((llama / "config.json").read_text())
    assert "sparsity_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["hidden_size"] == json.loads((tmp_path / "again" / "config.json").read_text())["hidden_size"]
    with pytest.raises(SystemExit):
        prune(tmp_path / "packed", tmp_path / "no", method="wanda", **options)
    assert "whose files do not name model.layers.0." in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_other_architectures_are_pruned_as_transformers_has_them(run, corpus, tmp_path):
    torch.manual_seed(0)
    cfg = transformers.OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=320, max_position_embeddings=32, word_embed_proj_dim=32,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(cfg).half()
    model.save_pretrained(tmp_path / "opt", max_shard_size="20KB")
    shutil.copy(run / runs.TOKENIZER_FILE, tmp_path / "opt")
    assert len(list((tmp_path / "opt").glob("*.safetensors"))) > 1
    facts = prune(
        tmp_path / "opt",
        tmp_path / "out",
        method="oats",
        iterations=3,
        text=f"[{corpus}]",
        exclude="['*.fc1']",
        seq_len=16,
    )
    names = [layer["name"] for layer in facts["layers"]]
    assert names[:2] == [
        "model.model.decoder.layers.0.self_attn.k_proj",
        "model.model.decoder.layers.0.self_attn.v_proj",
    ]
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, tensor in pruned.state_dict().items():
        assert tensor.dtype == torch.float16
        chosen = f"model.{name}".removesuffix(".weight") in names
        assert ((tensor == 0).double().mean() == 0.5) == chosen, name
    assert len(adapters_of(load_trained(str(tmp_path / "out"), CPU).model)) == len(names)


def test_models_of_other_tasks_are_pruned_with_what_they_learned_from(corpus, tmp_path, capsys):
    lines = corpus.read_text().split()
    for name, step in (("a", 5), ("b", -5)):
        (tmp_path / f"{name}.txt").write_text(
            "\n".join(" ".join(lines[i : i + 6][:: step // 5]) for i in range(0, 600, 6))
        )
    shared = [
        option for option in OPTIONS if option.startswith(("trainer", "scheduler", "model", "data.vocab", "data.num"))
    ]
    runs_of = {
        "seq2seq": ["model=seq2seq_nano", "data=pairs", f"data.train=[{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}]", "data.max_source_len=16", "data.max_target_len=16"],
        "bert": ["model=bert_nano", "data=text", "data.tokenizer=wordpiece", "data.seq_len=16", f"data.train=[{corpus}]"],
    }  # fmt: skip
    for name, options in runs_of.items():
        cli.main(
            [
                "train",
                "recipe=dense",
                *shared,
                *options,
                "trainer.steps=1",
                "scheduler.warmup_steps=0",
                f"run_dir={tmp_path / name}",
            ]
        )
        facts = prune(tmp_path / name, tmp_path / f"{name}-pruned", method="sparsegpt", samples=10)
        assert facts["calibration"]["samples"] == 10
        assert len(facts["layers"]) == {"seq2seq": 2 * 4 + 2 * 7, "bert": 2 * 4}[name]
        assert facts["sparsity"] == pytest.approx(0.5, abs=0.01)
        shown = printed(capsys, "evaluate", checkpoint=tmp_path / f"{name}-pruned", weights="packed", accelerator="cpu")
        assert f"in {len(facts['layers'])} layers" in shown["weights"]
    facts = prune(tmp_path / "bert", tmp_path / "text", method="wanda", text=f"[{corpus}]", seq_len=12)
    assert facts["calibration"]["seq_len"] == 12
    with pytest.raises(SystemExit):
        prune(tmp_path / "seq2seq", tmp_path / "no", text=f"[{corpus}]")
    assert (
        "text: found set for a model of text_to_text; allowed: this only for a language model"
        in capsys.readouterr().err
    )


def test_a_killed_command_goes_on_where_it_was(run, corpus, tmp_path, monkeypatch):
    torch.manual_seed(0)
    cfg = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
    )
    source = tmp_path / "hf"
    transformers.LlamaForCausalLM(cfg).save_pretrained(source)
    shutil.copy(run / runs.TOKENIZER_FILE, source)
    options = {"method": "oats", "svd": "randomized", "text": f"[{corpus}]", "seq_len": 32}
    whole = prune(source, tmp_path / "whole", **options)

    out = tmp_path / "out"
    arguments = {"checkpoint": source, "out": out, "samples": 8, "accelerator": "cpu", "iterations": 80, **options}
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_pretrain.cli", "prune", *(f"{name}={value}" for name, value in arguments.items())],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while (
        len(list((out / "partial").glob("*.safetensors"))) < 2
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in sorted((out / "partial").glob("*.safetensors"))}
    assert 2 <= len(kept) < 6
    finished = {name: layer for path in kept for name, layer in reports_in(path).items()}

    with monkeypatch.context() as patch:  # an error leaves what is there, too
        patch.setattr("sparse_pretrain.pruned.write_folder", failing)
        with pytest.raises(SystemExit):
            prune(source, out, **options)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((out / "partial").glob("*.safetensors"))) == 6

    resumed = prune(source, out, **options)
    for layer in resumed["layers"]:
        if layer["name"] in finished:
            assert layer == finished[layer["name"]]  # with its seconds: it was not pruned again
    for name in ("model.safetensors", "adapter.safetensors"):
        mine, theirs = load_file(out / name), load_file(tmp_path / "whole" / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert [layer["error"] for layer in resumed["layers"]] == [layer["error"] for layer in whole["layers"]]


def failing(*_) -> None:
    raise UserError("out", "no room", "more")


def reports_in(path: Path) -> dict[str, dict]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["reports"])


def test_a_damaged_block_is_pruned_again(llama, corpus, tmp_path, monkeypatch):
    options = {"method": "wanda", "text": f"[{corpus}]", "seq_len": 16}
    with monkeypatch.context() as patch:
        patch.setattr("sparse_pretrain.pruned.write_folder", failing)
        with pytest.raises(SystemExit):
            prune(llama, tmp_path / "out", **options)
    damaged = tmp_path / "out" / "partial" / "blocks.0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    prune(llama, tmp_path / "out", **options)
    prune(llama, tmp_path / "again", **options)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_what_is_done_is_shown_and_not_done_again(llama, corpus, tmp_path, capsys):
    options = {"method": "wanda", "text": f"[{corpus}]", "seq_len": 16}
    prune(llama, tmp_path / "out", **options)
    table = capsys.readouterr().out
    assert "blocks.0.attn.qkv   64 x 32  50.0%" in table or "blocks.0.attn.qkv  64 x 32  50.0%" in table
    assert "wanda 2:4: 50.0% of 0.02M weights are zero; mean error" in table
    when = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    prune(llama, tmp_path / "out", **options)
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is done\n{table}"
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == when


def test_calibration_is_drawn_by_the_seed(run, corpus):
    tokenizer = load_tokenizer((run / runs.TOKENIZER_FILE).read_bytes(), "")
    documents = corpus.read_text().split("\n<|endoftext|>\n")
    first = windows(documents, tokenizer, 20, 50, seed=1)
    assert first.shape == (20, 50)
    assert torch.equal(first, windows(documents, tokenizer, 20, 50, seed=1))
    assert not torch.equal(first, windows(documents, tokenizer, 20, 50, seed=2))
    assert len({tuple(row) for row in first.tolist()}) == 20
    short = windows([document[:40] for document in documents], tokenizer, 3, 50, seed=1)  # of several documents each
    assert short.shape == (3, 50)
    assert len({tuple(row) for row in short.tolist()}) == 3
    with pytest.raises(UserError, match=r"samples: found 30; allowed: at most \d+ sequences of 500 tokens"):
        windows(documents[:3], tokenizer, 30, 500, seed=1)


def test_as_many_samples_as_asked_for(run, llama, corpus):
    """Of a run's own batches the last is cut; a language model reads `seq_len` tokens, and the row has the next one."""
    for source, options in ((run, {}), (llama, {"text": [str(corpus)], "seq_len": 12})):
        found = calibration(
            PruneConfig(str(source), samples=10, batch_size=4, **options), load_trained(str(source), CPU)
        )
        rows = torch.cat(found.batches)
        assert rows.shape == (10, options.get("seq_len", 16) + 1)
        assert [len(batch) for batch in found.batches] == [4, 4, 2]


def test_damaged_and_foreign_folders(llama, run, corpus, tmp_path, capsys):
    def error(**options) -> str:
        with pytest.raises(SystemExit) as stop:
            command("prune", **{"samples": 4, "accelerator": "cpu"} | options)
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "text: found nothing for a Hugging Face folder; allowed: text files" in error(checkpoint=llama)
    assert "seq_len: found 64; allowed: at most the 32" in error(checkpoint=llama, text=f"[{corpus}]", seq_len=64)
    assert "include: found *.mlp.*, which matches no layer" in error(
        checkpoint=llama, text=f"[{corpus}]", include="['*.mlp.*']"
    )
    assert "text: found /nowhere" in error(checkpoint=llama, text="[/nowhere]")
    assert "include: found no layer that can be pruned: in_features=32 is not a multiple of 5" in error(
        checkpoint=run, pattern="2:5"
    )
    assert "out: found /proc/nowhere, which cannot be written" in error(checkpoint=run, out="/proc/nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert f"out: found {tmp_path / 'full'}, which holds something else" in error(checkpoint=run, out=tmp_path / "full")
    prune(run, tmp_path / "out", method="wanda", samples=4)
    assert "which has method=wanda where this has magnitude" in error(
        checkpoint=run, out=tmp_path / "out", method="magnitude"
    )
    assert "which has calibration.samples=4 where this has 5" in error(
        checkpoint=run, out=tmp_path / "out", method="wanda", samples=5
    )
    shutil.copytree(llama, tmp_path / "silent", ignore=shutil.ignore_patterns("tokenizer.json"))
    assert "silent without a tokenizer" in error(checkpoint=tmp_path / "silent", text=f"[{corpus}]")
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert "blocks.1.ffn.up: found weights that are not finite" in error(
        checkpoint=broken, text=f"[{corpus}]", seq_len=16
    )
    assert not (tmp_path / "broken-sparsegpt-2of4" / "model.safetensors").exists()


def test_a_rank_by_share_of_the_weights():
    """Not the same code as OATS's, which the layers below do not know of each other: the same numbers."""
    for shape in ((576, 1536), (192, 576), (4, 4), (1000, 1000)):
        for share in (1 / 6, 1 / 3, 0.125, 0.03):
            adapter = LoRA(shape[1], shape[0], share=share)
            assert adapter.rank == rank(*shape, share)
            assert adapter.options() == {"rank_share": str(share), "alpha": "16.0"}
            assert adapter.rank == 1 or adapter.a.numel() + adapter.b.numel() <= share * shape[0] * shape[1] * (
                1 + 1e-9
            )


def test_what_is_sparse_or_has_adapters_is_pruned_as_it_computes(run, tmp_path):
    prune(run, tmp_path / "oats", method="oats", iterations=5)
    source = load_trained(str(tmp_path / "oats"), CPU)
    tokens = torch.randint(300, (2, 16))
    before = source.model(tokens)
    task = plain_task(source)
    assert not adapters_of(task.model)
    torch.testing.assert_close(task.model(tokens), before, rtol=1e-4, atol=1e-5)
    facts = prune(tmp_path / "oats", tmp_path / "again", method="magnitude", pattern="1:4")
    assert facts["sparsity"] == pytest.approx(0.75)
    result = load_trained(str(tmp_path / "again"), CPU)
    for name in (layer["name"] for layer in facts["layers"]):
        kept = result.model.get_submodule(name).weight
        assert torch.equal(kept[kept != 0], task.model.get_submodule(name).weight[kept != 0])
