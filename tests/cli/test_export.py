"""`export`: what other libraries, in processes that never import ours, make of the folders."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparse24.packing import pack
from tokenizers import Tokenizer

from sparse_pretrain import runs, train
from sparse_pretrain.errors import UserError
from sparse_pretrain.models import huggingface
from sparse_pretrain.models.huggingface.folder import read_config_file
from sparse_pretrain.models.huggingface.packed import (
    damage,
    dense_tensors,
    read_packed,
    read_weights,
    semi_structured,
)
from sparse_pretrain.models.huggingface.sparsity_section import describe
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.sparsity.packed import PackedLinear, pack_model
from sparse_pretrain.tasks.trained import load_trained

transformers = pytest.importorskip("transformers")

SPARSE_TO_THE_END = {"recipe__schedule__dense_finetune": 0.0, "recipe__schedule__refresh_every": 1}
LLAMA = {
    "model__norm": "rms_norm", "model__activation": "swiglu", "model__position": "rotary", "model__n_kv_head": 1,
    "model__tied_embeddings": False, "recipe__include": ["blocks.*"],
}  # fmt: skip
LORA = {
    "recipe__adapter__kind": "lora",
    "recipe__adapter__rank": 3,
    "recipe__adapter__alpha": 5.0,
    "recipe__adapter__init": "kaiming",
}
SLORB = {"recipe__adapter__kind": "slorb", "recipe__adapter__group": 4}
CPU = torch.device("cpu")

ELSEWHERE = """
import json, os, sys, torch, transformers
found = []
for folder in sys.argv[2:]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    if os.path.isdir(f"{folder}/adapter"):
        import peft
        model = peft.PeftModel.from_pretrained(model, f"{folder}/adapter")
    ids = tokenizer(sys.argv[1], return_tensors="pt").input_ids[:, :16]
    with torch.no_grad():
        logits = model(ids).logits
        generated = model.generate(ids[:, :4], max_new_tokens=10, do_sample=False)
    found.append({
        "ids": ids.tolist(), "logits": logits.tolist(), "generated": generated.tolist(), "eos": tokenizer.eos_token,
        "length": tokenizer.model_max_length, "class": type(model).__name__,
    })
assert not {"sparse_pretrain", "sparse24", "lightning"} & {name.partition(".")[0] for name in sys.modules}
print(json.dumps(found))
"""


def elsewhere(code: str, *arguments: object, path: str = "") -> list[dict]:
    """What a process printed that has nothing of ours on its path."""
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@torch.no_grad()
def assert_same(run_dir: Path, folder: Path) -> None:
    """transformers computes as the run's checkpoint does."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
    model = load_trained(str(run_dir), CPU).model
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def is_2_4(weight: torch.Tensor) -> bool:
    return bool(((weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


@pytest.mark.parametrize(
    ("recipe", "changes", "cls", "layers", "transposed"),
    [
        ("ste", SPARSE_TO_THE_END, "GPT2LMHeadModel", 4, True),
        ("s_ste", SPARSE_TO_THE_END, "GPT2LMHeadModel", 4, True),
        ("fst", SPARSE_TO_THE_END | LLAMA, "LlamaForCausalLM", 14, False),
    ],
    ids=["gpt2", "scale", "llama"],
)
def test_dense_and_packed(tiny, export, recipe, changes, cls, layers, transposed):
    run_dir = train.run(tiny(recipe, **changes))
    dense, output = export("dense", run_dir)
    assert f"2:4 in {layers} layers" in output
    assert f'load        transformers.{cls}.from_pretrained("{dense}")' in output
    section = json.loads((dense / "config.json").read_text())["sparsity_config"]
    tensors = load_file(dense / "model.safetensors")
    assert section["format"] == "dense"
    assert section["sparsity_structure"] == "2:4"
    assert section["recipe"] == recipe
    assert len(section["targets"]) == layers
    zeros = 0
    for name in section["targets"]:
        weight = tensors[f"{name}.weight"].t() if transposed else tensors[f"{name}.weight"]
        assert is_2_4(weight)
        assert is_2_4(weight.t()) == (recipe == "fst")  # whose masks are transposable
        zeros += int((weight == 0).sum())
    total = sum(tensor.numel() for tensor in tensors.values())
    extra = sum(int((t == 0).sum()) for n, t in tensors.items() if n.removesuffix(".weight") not in section["targets"])
    assert section["global_sparsity"] == pytest.approx((zeros + extra) / total, abs=1e-6)
    assert_same(run_dir, dense)

    packed, output = export("packed", run_dir, "format=packed")
    assert "load " not in output
    stored = load_file(packed / "model.safetensors")
    for name in section["targets"]:
        out_features, in_features = tensors[f"{name}.weight"].shape[:: -1 if transposed else 1]
        assert stored[f"{name}.weight.values"].shape == (out_features, in_features // 2)
        assert stored[f"{name}.weight.metadata"].shape == (out_features, -(-in_features // 16))
        assert f"{name}.weight" not in stored
    again = dense_tensors(read_packed(packed, "checkpoint"), section)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name].view(torch.int32), tensors[name].view(torch.int32)) for name in tensors)
    loaded, other = huggingface.load(packed), huggingface.load(dense)
    assert all(torch.equal(loaded.state_dict[name], other.state_dict[name]) for name in other.state_dict)
    model = load_trained(str(run_dir), CPU).model
    mine = {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    assert set(loaded.sparse_layers) == set(other.sparse_layers) == mine
    # and a Hugging Face folder is exported as it is
    unpacked, _ = export("unpacked", packed, "format=dense")
    assert (unpacked / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()
    assert json.loads((unpacked / "config.json").read_text()) == json.loads((dense / "config.json").read_text())
    assert (unpacked / "tokenizer_config.json").is_file()


@pytest.mark.slow
def test_a_process_that_never_imports_ours(tiny, corpus, export):
    """Tokens, logits and greedy continuations of both kinds of decoders, and with adapters that PEFT puts on them."""
    kinds = [{}, LLAMA]
    if importlib.util.find_spec("peft") is not None:
        kinds += [LORA, LORA | LLAMA]
    run_dirs = [train.run(tiny("ste", run_dir=f"run{i}", **SPARSE_TO_THE_END, **kind)) for i, kind in enumerate(kinds)]
    folders = [export(f"out{i}", run_dir, "adapters=apart")[0] for i, run_dir in enumerate(run_dirs)]
    text = corpus.read_text()[:200]
    for run_dir, there in zip(run_dirs, elsewhere(ELSEWHERE, text, *folders), strict=True):
        assert (there["eos"], there["length"]) == ("<|endoftext|>", 16)
        own = Tokenizer.from_file(str(run_dir / runs.TOKENIZER_FILE))
        assert there["ids"] == [own.encode(text, add_special_tokens=False).ids[:16]]
        model, tokens = load_trained(str(run_dir), CPU).model, torch.tensor(there["ids"])
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), torch.tensor(there["logits"]), atol=1e-5, rtol=0)
        mine = model.generate(tokens[:, :4], 10, temperature=0, stop_token=own.token_to_id("<|endoftext|>"))
        assert mine.tolist() == there["generated"]


def test_half_precision_and_their_semi_structured(tiny, export):
    run_dir = train.run(tiny("ste", model__d_model=32, **SPARSE_TO_THE_END))
    dense, _ = export("dense", run_dir, "dtype=bf16")
    packed, _ = export("packed", run_dir, "dtype=bf16", "format=packed")
    assert json.loads((dense / "config.json").read_text())["torch_dtype"] == "bfloat16"
    tensors, found = load_file(dense / "model.safetensors"), read_packed(packed, "checkpoint")
    section = json.loads((packed / "config.json").read_text())["sparsity_config"]
    for name in section["targets"]:
        theirs = semi_structured(found[f"{name}.weight"])
        assert torch.equal(theirs.to_dense(), tensors[f"{name}.weight"].t())
    share = (packed / "model.safetensors").stat().st_size / (dense / "model.safetensors").stat().st_size
    assert share < 0.85
    with pytest.raises(ValueError, match="values must be float16 or bfloat16; found torch.float32"):
        semi_structured(found[f"{name}.weight"]._replace(values=found[f"{name}.weight"].values.float()))


def test_packed_files_hold_what_inference_holds(tiny, export):
    """What `evaluate weights=packed` makes of a run is in the file, bit for bit."""
    run_dir = train.run(tiny("s_ste", **SPARSE_TO_THE_END))
    folder, _ = export("packed", run_dir, "format=packed")
    found = read_packed(folder, "checkpoint")
    names = huggingface.layers(folder, found)
    model = load_trained(str(run_dir), CPU).model
    assert pack_model(model) == 4
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            (theirs,) = names[name].theirs
            assert torch.equal(found[theirs].values, layer.values)
            assert torch.equal(found[theirs].metadata, layer.metadata)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_their_semi_structured_multiplies():
    weight = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16)
    kept = weight.view(256, -1, 4).abs().topk(2).indices
    weight = weight * torch.zeros(256, 128, 4, device="cuda").scatter_(2, kept, 1.0).view_as(weight)
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    theirs = semi_structured(pack(weight))
    torch.testing.assert_close(torch.nn.functional.linear(x, theirs), x @ weight.t(), atol=0.5, rtol=2e-2)


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    """As the docs have it."""
    content = b"".join(
        f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes()
        for name, tensor in sorted(tensors.items())
    )
    return hashlib.sha256(content).hexdigest()


def test_which_layers_have_the_pattern():
    two, three = torch.tensor([[0.0, 1, 0, 2, 3, 0, 0, 0]]), torch.tensor([[0.0, 1, 4, 2, 3, 0, 0, 0]])
    tensors = {"a": two, "b": three, "c": torch.zeros(1, 8), "d": two[:, :6], "e": two.view(1, 2, 2, 2), "f": two[0]}
    tensors = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    assert describe(tensors, "bert", (2, 4), None, packed=False)["targets"] == ["a", "e"]
    assert describe(tensors, "bert", (2, 4), None, packed=True)["targets"] == ["a"]
    assert describe({"a.weight": two}, "gpt2", (2, 4), None, packed=False) is None
    assert describe({"a.weight": two.t()}, "gpt2", (2, 4), None, packed=False)["transposed"]
    assert describe({"b.weight": three}, "bert", (3, 8), None, packed=False) is None
    assert describe({"b.weight": three}, "bert", (4, 8), None, packed=False)["sparsity_structure"] == "4:8"


def test_damage_is_found(tiny, export, tmp_path):
    run_dir = train.run(tiny("ste", **SPARSE_TO_THE_END))
    folder, _ = export("packed", run_dir, "format=packed")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[-5] ^= 1
    path.write_bytes(broken)
    with pytest.raises(UserError, match=r"init_from: found .*model.safetensors with a wrong checksum"):
        huggingface.load(folder, "init_from")
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["sha256"] == sha256(load_file(path))
    name = "transformer.h.1.mlp.c_fc.weight"
    packed = read_packed(folder, "checkpoint")[name]
    assert damage(packed) is None
    metadata = packed.metadata.clone()
    metadata[3, 0] = (metadata[3, 0] & ~0xF0) | 0x50  # positions 0 and 0... of the second group: 01 01
    assert damage(packed._replace(metadata=metadata)) == "positions that do not ascend in group 1 of row 3"
    metadata[3, 0] = (packed.metadata[3, 0] & ~0xF) | (0b0011)  # 3, 0
    assert damage(packed._replace(metadata=metadata)) == "positions that do not ascend in group 0 of row 3"
    assert "metadata of shape (64, 1) and torch.int32" in damage(packed._replace(metadata=packed.metadata.int()))
    assert "metadata of shape (63, 1)" in damage(packed._replace(metadata=packed.metadata[1:]))
    assert "values of shape (64, 7)" in damage(packed._replace(values=packed.values[:, 1:], cols=14))
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(UserError, match="wrong checksum"):
        huggingface.load(folder)
    # What a file with the checksum of its own tensors may lack or hold
    for changes, message in (
        ({f"{name}.metadata": None}, f"where {name} has metadata of shape (0,)"),
        ({f"{name}.values": None}, f"where {name} has values of shape (0,)"),
        ({f"{name}.values": torch.tensor(1.0)}, f"where {name} has values of shape ()"),
        ({f"{name}.values": packed.values.int()}, f"where {name} has values of shape (64, 8) and torch.int32"),
        ({f"{name}.metadata": metadata}, f"where {name} has positions that do not ascend in group 0 of row 3"),
    ):
        changed = {key: value for key, value in (tensors | changes).items() if value is not None}
        save_file(changed, path, metadata={"sha256": sha256(changed)})
        for read in (huggingface.load, lambda there: read_weights(read_config_file(there, "checkpoint"))):
            with pytest.raises(UserError) as error:
                read(folder)
            assert message in str(error.value)


def test_sections_that_export_did_not_write(tiny, export, capsys):
    run_dir = train.run(tiny("ste", **SPARSE_TO_THE_END))
    folder, _ = export("packed", run_dir, "format=packed")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    section = config["sparsity_config"]
    for wrong, message in (
        ("2:4", "sparsity_config='2:4'"),
        (section | {"format_version": 2}, "format_version=2; allowed: 1"),
        (section | {"transposed": "no"}, "transposed=no; allowed: False or True"),
        (section | {"targets": [1]}, "targets=[1]; allowed: names of layers"),
        (section | {"sparsity_structure": 24}, "sparsity_structure=24"),
    ):
        path.write_text(json.dumps(config | {"sparsity_config": wrong}))
        with pytest.raises(UserError) as error:
            huggingface.load(folder)
        assert message in str(error.value)
    dense, _ = export("dense", run_dir)
    path = dense / "config.json"
    path.write_text(json.dumps(config | {"sparsity_config": None}))
    assert huggingface.load(dense).sparse_layers == ()
    path.write_text(json.dumps(config | {"sparsity_config": {"sparsity_structure": "unstructured"}}))
    with pytest.raises(SystemExit):
        export("again", dense)
    assert "with sparsity_structure=unstructured; allowed: N:M, as 2:4" in capsys.readouterr().err


def test_folders_whose_config_says_little(tiny, export, capsys):
    """Neither the class nor the dtype, which is that of the weights; and weights that fp16 cannot hold."""
    run_dir = train.run(tiny("dense"))
    folder, _ = export("first", run_dir, "dtype=bf16")
    path = folder / "config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("architectures", "torch_dtype")}
    path.write_text(json.dumps(kept))
    again, output = export("again", folder)
    assert f'transformers.AutoModel.from_pretrained("{again}")' in output
    assert json.loads((again / "config.json").read_text())["torch_dtype"] == "bfloat16"
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][3] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        export("half", folder, "dtype=fp16")
    assert "dtype: found float16, in which transformer.ln_f.weight overflows; allowed: fp32" in capsys.readouterr().err


def test_a_run_that_ended_dense(tiny, export, capsys):
    run_dir = train.run(tiny("fst", recipe__schedule__dense_finetune=0.5, recipe__schedule__refresh_every=2))
    folder, output = export("dense", run_dir)
    assert "weights     dense" in output
    assert "note        the checkpoint is of a dense phase of its run, so its weights are dense" in output
    assert "sparsity_config" not in json.loads((folder / "config.json").read_text())
    assert_same(run_dir, folder)
    with pytest.raises(SystemExit):
        export("packed", run_dir, "format=packed")
    assert "error: format: found packed, but the weights of" in capsys.readouterr().err
    assert not (folder.parent / "packed").exists()


@pytest.mark.parametrize("adapter", [LORA, SLORB], ids=["lora", "slorb"])
@pytest.mark.parametrize("recipe", ["ste", "dense"])
def test_adapters_merged(tiny, export, recipe, adapter):
    changes = (SPARSE_TO_THE_END if recipe == "ste" else {}) | adapter
    run_dir = train.run(tiny(recipe, **changes))
    folder, output = export("merged", run_dir, "adapters=merged")
    assert "weights     dense" in output
    assert_same(run_dir, folder)


@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["gpt2", "llama"])
def test_adapters_apart(tiny, export, changes):
    run_dir = train.run(tiny("ste", **SPARSE_TO_THE_END, **LORA, **changes))
    folder, output = export("apart", run_dir, "adapters=apart")
    assert f'adapters    apart: peft.PeftModel.from_pretrained(model, "{folder}/adapter")' in output
    assert "2:4 in" in output
    alone, output = export("alone", run_dir, "format=adapters")
    assert sorted(path.name for path in alone.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    mine, theirs = (
        load_file(folder / "adapter" / "adapter_model.safetensors"),
        load_file(alone / "adapter_model.safetensors"),
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    config = json.loads((alone / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (3, 5.0, not changes)
    sparse = json.loads((folder / "config.json").read_text())["sparsity_config"]["targets"]
    assert config["target_modules"] == sorted(sparse)
    # What PEFT computes (Hu et al. 2021), by hand
    weights = load_file(folder / "model.safetensors")
    for name in sparse:
        a, b = (mine[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        delta = b @ a * config["lora_alpha"] / config["r"]
        weights[f"{name}.weight"] += delta.t() if config["fan_in_fan_out"] else delta
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(run_dir, folder)


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        (LORA, [], "adapters: found nothing, but "),
        (LORA, ["format=packed", "adapters=merged"], "adapters: found merged with format=packed, where they would fill up the zeros; allowed: apart"),
        (SLORB, ["format=adapters"], "adapters: found apart for recipe.adapter.kind=slorb, which PEFT has no form for; allowed: merged. adapter.safetensors beside"),
        ({}, ["format=adapters"], "format: found adapters, but "),
        ({"model__norm": "rms_norm"}, [], "model.norm: found rms_norm; allowed: layer_norm. GPT-2 is the architecture"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(tiny, export, capsys, tmp_path, adapter, options, message):
    run_dir = train.run(tiny("ste", **SPARSE_TO_THE_END, **adapter))
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        export("out", run_dir, *options)
    assert message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_a_folder_that_is_there(export, capsys, tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(SystemExit):
        export("here", "nowhere")
    assert "out: found" in capsys.readouterr().err
