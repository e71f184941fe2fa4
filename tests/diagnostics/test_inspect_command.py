"""`sparse-pretrain inspect` on small runs and on a Hugging Face folder."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse24.reference import magnitude_mask

from sparse_pretrain import cli, schema, train
from sparse_pretrain.checkpoint import store
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.tasks.trained import load_trained

OPTIONS = [
    "data=text", "data.vocab_size=300", "trainer.accelerator=cpu", "trainer.peak_tflops=1", "model.max_seq_len=16", "model.d_model=16",
    "model.n_layer=2", "trainer.steps=6", "trainer.batch_size=4", "trainer.eval_every=6", "trainer.eval_batches=2", "trainer.checkpoint_every=3",
    "trainer.log_every=3", "scheduler.warmup_steps=2", "data.num_workers=0", "recipe.adapter.start=0",
]  # fmt: skip
PROBE = ["sequences=8", "seq_len=16", "accelerator=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """A dense run, an ste run, and one with sparse weights and low-rank adapters, by recipe."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_PRETRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        grid = ["-m", "recipe=dense,ste,slope", *OPTIONS, f"data.train=[{corpus}]", f"runs_dir={folder}"]
        return {cfg.recipe.name: train.run(cfg) for cfg in cli._preflight("train", grid)}


def inspect(*arguments: str) -> None:
    cli.main(["inspect", *PROBE, *arguments])


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        inspect(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_dense_sparse_and_sparse_with_low_rank(trained, tmp_path, capsys):
    inspect(f"checkpoints=[{trained['dense']},{trained['ste']},{trained['slope']}]", f"out={tmp_path}/out")
    printed = capsys.readouterr().out
    rows = [line.split()[0] for line in printed.splitlines() if line.startswith(("dense ", "ste ", "slope "))]
    assert rows == ["dense", "ste", "slope"]
    assert "slope: 2:4 sparse in 4 layers, 4 adapters beside them." in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("inspect.json", "sinks.png", "outliers.png", "masks.png", "spectra.png")
    }
    found = json.loads((tmp_path / "out" / "inspect.json").read_text())
    _, ste, slope = found["checkpoints"]
    assert [checkpoint["step"] for checkpoint in found["checkpoints"]] == [6, 6, 6]
    assert [checkpoint["is_sparse"] for checkpoint in found["checkpoints"]] == [False, True, True]
    layers = [f"blocks.{i}.ffn.{part}" for i in range(2) for part in ("up", "down")]
    for checkpoint in found["checkpoints"]:
        assert list(checkpoint["layers"]) == layers
        assert all(len(layer["first_alpha"]) == 4 for layer in checkpoint["attention"].values())
        assert 0 < checkpoint["summary"]["residual_norm"] < 1
    assert all("residual_after_adapter" in layer["spectra"] for layer in slope["layers"].values())
    assert not any("residual_after_adapter" in layer["spectra"] for layer in ste["layers"].values())
    pairs = {(pair["a"], pair["b"]): pair for pair in found["mask_agreement"]}
    assert set(pairs) == {("dense", "ste"), ("dense", "slope"), ("ste", "slope")}

    model = load_trained(str(trained["slope"]), torch.device("cpu")).model
    ours = model.get_submodule(layers[0])
    assert isinstance(ours, SparseLinear)
    residual = torch.linalg.svdvals((ours.weight - ours.current_weight()).detach())
    assert slope["layers"][layers[0]]["spectra"]["residual"]["singular_values"] == pytest.approx(
        residual.tolist(), abs=1e-5
    )
    mask = load_trained(str(trained["ste"]), torch.device("cpu")).model.get_submodule(layers[0]).mask
    equal = (mask == ours.mask).float().mean().item()
    assert pairs["ste", "slope"]["layers"][layers[0]]["equal"] == pytest.approx(equal)


def test_two_checkpoints_of_a_run_and_a_reference(trained, tmp_path, capsys):
    first, last = (store.checkpoint_folder(trained["ste"] / "checkpoints", step) for step in (3, 6))
    inspect(f"checkpoints=[{first},{last},{last}]", f"reference={trained['dense']}", f"out={tmp_path}/out")
    found = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert [checkpoint["label"] for checkpoint in found["checkpoints"]] == [
        f"{trained['ste'].name} step-0000000{step}" for step in (3, 6)
    ]
    name = "blocks.1.ffn.down"
    dense = load_trained(str(trained["dense"]), torch.device("cpu")).model.get_submodule(name).weight
    ste = load_trained(str(trained["ste"]), torch.device("cpu")).model.get_submodule(name).current_weight()
    expected = torch.linalg.svdvals((dense - ste).detach())
    layer = found["checkpoints"][1]["layers"][name]
    spectra, mask = (
        layer["spectra"],
        load_trained(str(trained["ste"]), torch.device("cpu")).model.get_submodule(name).mask,
    )
    assert layer["magnitude_mask"]["equal"] == pytest.approx((magnitude_mask(dense) == mask).float().mean().item())
    assert spectra["residual"]["singular_values"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_text_of_ones_own(trained, tmp_path, corpus):
    inspect(f"checkpoints={trained['dense']}", f"text=[{corpus}]", f"out={tmp_path}/out")
    found = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert found["settings"]["text"] == str(corpus)
    assert found["mask_agreement"] == []


def test_what_cannot_be_inspected(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = f"checkpoints=[{trained['dense']}]"
    assert "checkpoints: found none; allowed: run, checkpoint or Hugging Face folders" in refused(capsys)
    assert "checkpoints: found /nowhere, which holds no whole" in refused(capsys, "checkpoints=[/nowhere]")
    assert "reference: found /nowhere, which holds no whole" in refused(capsys, dense, "reference=/nowhere", "out=out")
    assert "seq_len: found 17; allowed: at most 16" in refused(capsys, dense, "seq_len=17")
    assert "sequences: found 100000; allowed: at most" in refused(capsys, dense, "sequences=100000", "out=out")
    assert "text: found" in refused(capsys, dense, "text=[nowhere.txt]", "out=out")
    assert "out: found /proc/nowhere, which cannot be written" in refused(capsys, dense, "out=/proc/nowhere")
    other = tmp_path / "other"
    shutil.copytree(trained["dense"], other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    assert "which has another tokenizer than" in refused(capsys, f"checkpoints=[{trained['ste']},{other}]")
    (other / "tokenizer.json").unlink()
    assert "which has no tokenizer.json" in refused(capsys, f"checkpoints=[{other}]")


def test_the_module_has_no_name_of_pythons():
    """A script started inside the package's folder finds Python's own `inspect`."""
    module = cli.COMMANDS["inspect"].module
    assert module not in sys.stdlib_module_names
    assert set(schema.options(cli.COMMANDS["inspect"].schema)) >= {"checkpoints", "reference", "text"}


def test_a_hugging_face_folder(tmp_path, capsys, corpus):
    """The first token's attention is that which transformers computes."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    folder = tmp_path / "llama"
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    cfg = transformers.LlamaConfig(
        vocab_size=300, num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager", **options
    )
    theirs = transformers.LlamaForCausalLM(cfg).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(4.0)  # of one size with what is trained: heads differ
    theirs.save_pretrained(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(corpus)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))

    assert "text: found none" in refused(capsys, f"checkpoints=[{folder}]", f"out={tmp_path}/out")
    assert "seq_len: found 64; allowed: at most 32" in refused(
        capsys, f"checkpoints=[{folder}]", f"text=[{corpus}]", "seq_len=64", f"out={tmp_path}/no"
    )
    assert not (tmp_path / "no").exists()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert "broken, whose blocks.1.ffn.up.weight is not finite" in refused(
        capsys, f"checkpoints=[{broken}]", f"text=[{corpus}]", f"out={tmp_path}/out"
    )
    inspect(f"checkpoints=[{folder}]", f"text=[{corpus}]", f"out={tmp_path}/out")
    (found,) = json.loads((tmp_path / "out" / "inspect.json").read_text())["checkpoints"]
    assert (found["label"], found["step"], found["is_sparse"]) == ("llama", 0, False)

    documents = corpus.read_text().split("<|endoftext|>\n")
    ids = [id for document in documents for id in [*tokenizer.encode(document).ids, 0]]
    whole = len(ids) // 16
    rows = [round(i * (whole - 1) / 7) for i in range(8)]
    tokens = torch.tensor([ids[16 * row : 16 * row + 16] for row in rows])
    with torch.no_grad():
        output = theirs(tokens, output_attentions=True, output_hidden_states=True)
    for attention, ours in zip(output.attentions, found["attention"].values(), strict=True):
        alphas = attention[..., 0].mean(-1)
        assert ours["first_alpha"] == pytest.approx(alphas.mean(0).tolist(), abs=1e-5)
        assert ours["first_sink"] == (alphas > 0.3).float().mean(0).tolist()
    magnitude = output.hidden_states[1].abs().flatten(1)
    state = found["hidden"]["blocks.0"]
    assert state["largest"] == pytest.approx(magnitude.topk(3).values.mean(0).tolist(), rel=1e-4)
    assert state["median"] == pytest.approx(magnitude.median(1).values.mean().item(), rel=1e-4)
