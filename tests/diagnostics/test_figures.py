"""The pictures of an inspection, on made-up findings."""

import pytest
import torch
from matplotlib.image import imread

from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.diagnostics.figures import lines, write_figures
from sparse_pretrain.diagnostics.findings import Findings, agreements, input_findings, layer_findings
from sparse_pretrain.diagnostics.masks import pruned_layers
from sparse_pretrain.diagnostics.probe import run_probe
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.sparsity import load_recipe, sparsify

PICTURES = ("sinks.png", "outliers.png", "masks.png", "spectra.png")


def findings(label: str, recipe: str, d_model: int = 16, n_layer: int = 2) -> Findings:
    torch.manual_seed(0)
    model = GPT(GPTConfig(name="x", n_layer=n_layer, n_head=2, d_model=d_model, max_seq_len=8), 40).eval()
    if recipe != "dense":
        sparsify(model, load_recipe(recipe))
    probe = run_probe(model, model.hidden, [(torch.randint(40, (4, 8)), None)], 0.3)
    pruned = pruned_layers(model, load_recipe("ste"))
    return Findings(
        label=label,
        path="runs/x",
        step=10,
        recipe=recipe,
        weights="",
        is_sparse=recipe != "dense",
        attention={name: meter.result() for name, meter in probe.heads.items()},
        hidden={name: meter.result() for name, meter in probe.hidden.items()},
        inputs=input_findings(probe),
        layers=layer_findings(pruned, probe, {}),
        masks={name: layer.mask for name, layer in pruned.items()},
    )


def test_the_same_findings_give_the_same_pictures(tmp_path):
    found = [findings("dense", "dense"), findings("slope", "slope")]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_figures(found, agreements(found), 0.3, tmp_path / name)
    for name in PICTURES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert imread(tmp_path / "a" / name).shape[1] > 400


def test_one_checkpoint_alone(tmp_path):
    write_figures([findings("ste", "ste")], [], 0.3, tmp_path)
    assert all((tmp_path / name).is_file() for name in PICTURES)


def test_models_of_different_shapes_stand_side_by_side(tmp_path):
    found = [findings("small", "ste"), findings("large", "ste", d_model=32, n_layer=3)]
    (pair,) = agreements(found)
    assert (pair.layers, pair.mean) == ({}, None)
    write_figures(found, [pair], 0.3, tmp_path)
    assert all((tmp_path / name).is_file() for name in PICTURES)


def test_no_two_are_drawn_alike():
    found = [findings(str(i), "dense") for i in range(5)] + [findings(str(i), "ste") for i in range(5, 20)]
    drawn = [(line.colour, line.style) for line in lines(found)]
    assert len(set(drawn)) == len(drawn)


def test_the_summary_is_of_what_was_found():
    found = findings("ste", "ste")
    values = found.summary()
    heads = [share for layer in found.attention.values() for share in layer["first_sink"]]
    assert values["first_sink"] == pytest.approx(sum(heads) / 4)
    assert values["equal_to_magnitude_mask"] == 1.0
    spectra = [layer["spectra"] for layer in found.layers.values()]
    shares = [row["residual"]["norm"] / row["weight"]["norm"] for row in spectra]
    assert values["residual_norm"] == pytest.approx(sum(shares) / 4)
    assert values["kurtosis"] == max(state["kurtosis"] for state in found.hidden.values())
    assert "masks" not in found.to_json()
