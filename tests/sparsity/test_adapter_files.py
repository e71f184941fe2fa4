"""Adapters in files: what is written is read again, and what does not fit is told."""

import copy
import dataclasses
import errno
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sparse_pretrain.config_recipe import AdapterConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.sparsity.adapter_files import adapters_in, load_adapters, save_adapters, with_options_of_file
from sparse_pretrain.sparsity.adapters import (
    adapters_of,
    attach,
    make_adapter,
    merge_adapters,
)
from tests.sparsity.test_adapters import IN, KINDS, OUT, TOKENS, every_kind, fill, trained, two_layers


@every_kind
def test_saved_adapters_give_the_same_outputs(cfg, tmp_path):
    model, path, x = two_layers(cfg), tmp_path / "adapter.safetensors", torch.randn(TOKENS, IN)
    save_adapters(model, path)
    with safe_open(path, framework="pt") as file:
        assert {name.rpartition(".")[0] for name in file.keys()} == {"0.adapter", "2.adapter"}  # noqa: SIM118
        assert file.metadata()["kind"] == cfg.kind
    other = two_layers(cfg, seed=1)
    for layer, twin in zip(model, other, strict=True):
        twin.weight, twin.bias = layer.weight, layer.bias
    assert not torch.allclose(other(x), model(x))
    load_adapters(other, path)
    assert torch.equal(other(x), model(x))
    assert list(adapters_of(other)) == ["0", "2"]
    assert os.listdir(tmp_path) == [path.name]  # nothing left beside it


def test_a_failed_save_keeps_the_file_of_before(tmp_path, monkeypatch):
    model, path = two_layers(KINDS["lora"]), tmp_path / "adapter.safetensors"
    save_adapters(model, path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    fill(model[0].adapter)
    with pytest.raises(UserError, match=r"adapter.safetensors: found that it cannot be written \(No space left"):
        save_adapters(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_saving_into_no_folder_says_so(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        save_adapters(two_layers(KINDS["lora"]), tmp_path / "nowhere" / "adapter.safetensors")


def test_one_file_holds_adapters_that_agree(tmp_path):
    mixed = nn.Sequential(trained(KINDS["lora"]), nn.Linear(OUT, IN), trained(KINDS["slope"]))
    with pytest.raises(ValueError, match="differ in kind or options"):
        save_adapters(mixed, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapters(nn.Linear(4, 4), tmp_path / "adapter.safetensors")


def saved(path, cfg=KINDS["lora"]) -> nn.Sequential:
    model = two_layers(cfg)
    save_adapters(model, path)
    return model


def refused(path, model=None) -> str:
    """The message with which a file is refused; the model keeps its parameters."""
    model = two_layers(KINDS["lora"]) if model is None else model
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError) as error:
        load_adapters(model, path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert str(error.value).startswith(f"recipe.adapter.path: found {path}")
    return str(error.value)


def test_files_that_are_none_of_ours(tmp_path):
    path = tmp_path / "adapter.safetensors"
    assert "which does not exist; allowed: a file of adapters that a run or save_adapters wrote" in refused(path)
    assert "which is no file" in refused(tmp_path)
    path.write_text("no safetensors file at all")
    assert "which cannot be read" in refused(path)
    saved(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:4], whole[:60], whole[:-1], b"\xff" * 8 + whole[8:], whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        assert "which cannot be read" in refused(path)
    save_file({"0.adapter.a": torch.zeros(3, IN)}, path, metadata={"format": "pt"})
    assert "holds no adapters of this format" in refused(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "adapter.safetensors"
    saved(path)
    path.chmod(0)
    assert "which cannot be read" in refused(path)


def test_files_of_other_adapters(tmp_path):
    path = tmp_path / "adapter.safetensors"
    saved(path, KINDS["slorb"])
    message = refused(path)
    assert "with group=4, kind=slorb, train_groups=true; allowed: alpha=6.0, kind=lora, rank=3" in message
    saved(path, AdapterConfig(kind="lora", rank=3, alpha=1.0))
    assert "with alpha=1.0, kind=lora, rank=3; allowed: alpha=6.0, kind=lora, rank=3" in refused(path)


def test_a_file_decides_what_is_not_given(tmp_path):
    path = str(tmp_path / "adapter.safetensors")
    for cfg in (
        AdapterConfig("lora", rank=3, alpha=6.0),
        AdapterConfig("lora", rank_share=1 / 3),
        AdapterConfig("slorb", group=2, train_groups=False),
    ):
        saved(path, cfg)
        assert adapters_in(path) == (cfg, ["0", "2"])
        assert with_options_of_file(AdapterConfig(cfg.kind, path=path)) == dataclasses.replace(cfg, path=path)
    given = AdapterConfig("slorb", group=4, path=path)
    assert with_options_of_file(given) == dataclasses.replace(given, train_groups=False)  # and refused when it is read
    other = AdapterConfig("lora", path=path)
    assert with_options_of_file(other) == other
    assert with_options_of_file(AdapterConfig()) == AdapterConfig()


def test_rank_as_a_share_of_the_weights(tmp_path):
    model = saved(tmp_path / "adapter.safetensors", AdapterConfig("lora", rank_share=0.6))
    assert [adapter.rank for adapter in adapters_of(model).values()] == [2, 2]  # 0.6 · 48 / 14
    assert make_adapter(AdapterConfig("lora", rank_share=0.01), IN, OUT).rank == 1
    assert make_adapter(AdapterConfig("lora", rank_share=0.6), 100, 20).rank == 10
    load_adapters(two_layers(AdapterConfig("lora", rank_share=0.6)), tmp_path / "adapter.safetensors")


def test_files_of_other_models(tmp_path):
    path = tmp_path / "adapter.safetensors"
    saved(path)
    layer = nn.Sequential(trained(KINDS["lora"]))
    assert (
        "holds beside this model's 2.adapter.a, 2.adapter.b; allowed: adapters of exactly these layers: 0"
        in refused(path, layer)
    )
    save_adapters(layer, path)
    assert "which lacks 2.adapter.a, 2.adapter.b; allowed: adapters of exactly these layers: 0, 2" in refused(path)
    wide = nn.Sequential(nn.Linear(IN, 2 * OUT))
    attach(wide[0], make_adapter(KINDS["lora"], IN, 2 * OUT))
    assert "whose 0.adapter.b is (6, 3); allowed: (12, 3) for this model" in refused(path, wide)
    assert "for a model without adapters; allowed: null where recipe.adapter.kind=none" in refused(
        path, nn.Linear(4, 4)
    )


def test_merged_adapters_are_saved_but_not_loaded(tmp_path):
    model, path = two_layers(KINDS["lora"]), tmp_path / "adapter.safetensors"
    merge_adapters(model)
    save_adapters(model, path)
    with pytest.raises(ValueError, match="call unmerge_adapters"):
        load_adapters(model, path)
    load_adapters(two_layers(KINDS["lora"]), path)
