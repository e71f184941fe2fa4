"""Agreement of masks against chance and counts, spectra against torch.linalg, on layers of every kind."""

import math

import pytest
import torch
from sparse24.reference import magnitude_mask as reference_mask
from torch import nn

from sparse_pretrain.config_recipe import AdapterConfig
from sparse_pretrain.diagnostics.masks import agreement, magnitude_mask, pruned_layers, pruned_mass
from sparse_pretrain.diagnostics.spectra import layer_spectra, spectrum
from sparse_pretrain.sparsity import load_recipe, sparsify
from sparse_pretrain.sparsity.adapters import adapters_of


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"ffn": nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)})})


def test_random_masks_agree_by_chance():
    torch.manual_seed(0)
    a, b = (magnitude_mask(torch.randn(256, 256), (2, 4)) for _ in range(2))
    found = agreement(a, b)
    # In a group of four 2:4 masks that are independent share 0, 1 or 2 kept entries with 1/6, 4/6 and 1/6: variance 1/3
    # of the count, 1/12 of the share; bound: 5 standard deviations over the 16,384 groups.
    bound = 5 * math.sqrt(1 / 12 / (256 * 256 / 4))
    assert abs(found.equal - 0.5) < bound
    assert found.overlap == pytest.approx(found.equal)  # for two 2:4 masks
    assert (found.equal_by_chance, found.overlap_by_chance) == (0.5, 0.5)


def test_agreement_by_count():
    a = torch.tensor([[True, True, False, False], [True, False, False, False]])
    b = torch.tensor([[True, False, True, False], [True, False, False, True]])
    found = agreement(a, b)
    assert found.equal == 5 / 8
    assert found.overlap == 2 / 3
    assert found.equal_by_chance == 3 / 8 * 4 / 8 + 5 / 8 * 4 / 8
    assert found.overlap_by_chance == 4 / 8
    assert agreement(a, a).equal == agreement(a, a).overlap == 1
    assert agreement(a, ~a).equal == agreement(a, ~a).overlap == 0
    # A 1:4 mask inside a 2:4 one overlaps fully, and half of the kept ones are expected to by chance.
    weight = torch.randn(8, 16)
    one, two = magnitude_mask(weight, (1, 4)), magnitude_mask(weight, (2, 4))
    assert (agreement(one, two).overlap, agreement(one, two).overlap_by_chance) == (1.0, 0.5)
    assert agreement(one, two).equal == 0.75


def test_pruned_mass_by_column():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [5.0, 6.0, -7.0, 8.0]])
    mask = torch.tensor([[True, False, False, True], [False, True, False, True]])
    moment = torch.tensor([1.0, 9.0, 2.0, 3.0])
    assert pruned_mass(weight, mask, moment, 0.01) == (2 / 17, 1 / 4)
    assert pruned_mass(weight, mask, moment, 0.75) == (12 / 17, 3 / 4)
    assert pruned_mass(weight, torch.ones_like(mask), moment, 0.5) == (0.0, 0.5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_spectrum_is_torchs(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(matrix)
    found = spectrum(matrix)
    assert torch.allclose(torch.tensor(found.singular_values), values, rtol=1e-5)
    assert found.norm == pytest.approx(float(torch.linalg.matrix_norm(matrix)), rel=1e-5)
    norms = torch.linalg.matrix_norm(matrix), torch.linalg.matrix_norm(matrix, ord=2)
    assert found.stable_rank == pytest.approx(float(norms[0] ** 2 / norms[1] ** 2), rel=1e-5)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(float(torch.distributions.Categorical(shares).perplexity()), rel=1e-4)


def test_known_ranks():
    assert spectrum(torch.eye(8)).effective_rank == pytest.approx(8)
    assert spectrum(torch.eye(8)).stable_rank == pytest.approx(8)
    one = spectrum(torch.outer(torch.arange(1.0, 5.0), torch.ones(6)))
    assert one.stable_rank == pytest.approx(1)
    assert one.effective_rank == pytest.approx(1, abs=1e-4)
    zero = spectrum(torch.zeros(3, 4))
    assert (zero.norm, zero.stable_rank, zero.effective_rank) == (0.0, 0.0, 0.0)


def test_a_dense_model_is_pruned_by_magnitude():
    dense = model()
    found = pruned_layers(dense, load_recipe("ste"))
    assert list(found) == ["ffn.up", "ffn.down"]
    for name, layer in found.items():
        weight = dense.get_submodule(name).weight
        assert not layer.is_sparse
        assert torch.equal(layer.mask, reference_mask(weight))
        assert torch.equal(layer.kept, weight * reference_mask(weight))


def test_a_plain_layer_with_the_zeros_is_sparse():
    dense = model()
    up = dense["ffn"]["up"].weight
    up.data.mul_(reference_mask(up))
    found = pruned_layers(dense, load_recipe("ste"))
    assert [layer.is_sparse for layer in found.values()] == [True, False]
    assert torch.equal(found["ffn.up"].kept, up)
    before = torch.randn_like(up)
    spectra = layer_spectra(found["ffn.up"], before)
    expected = torch.linalg.svdvals(before - up.detach())
    assert torch.allclose(torch.tensor(spectra["residual"].singular_values), expected, atol=1e-5)


@pytest.mark.parametrize("recipe", ["ste", "fst", "s_ste", "slope"])
def test_a_sparse_model_is_what_it_computes_with(recipe):
    sparse = model()
    method = load_recipe(recipe)
    method.adapter = AdapterConfig()
    sparsify(sparse, method)
    for name, found in pruned_layers(sparse, load_recipe("ste")).items():
        layer = sparse.get_submodule(name)
        assert found.is_sparse
        assert torch.equal(found.mask, layer.mask)
        identity = torch.eye(layer.in_features)
        with torch.no_grad():
            assert torch.allclose(layer(identity) - layer.bias, found.kept.t(), atol=1e-6)
        spectra = layer_spectra(found, found.weight)
        assert set(spectra) == {"weight", "residual"}
        expected = torch.linalg.svdvals(layer.weight.detach() - found.kept)
        assert torch.allclose(torch.tensor(spectra["residual"].singular_values), expected, atol=1e-5)


def test_a_layer_in_a_dense_phase_is_pruned_by_magnitude():
    sparse = model()
    sparsify(sparse, load_recipe("slope"))
    for layer in (sparse["ffn"]["up"], sparse["ffn"]["down"]):
        layer.weight.data.mul_(torch.rand_like(layer.weight))  # its own mask is of the weights before
        layer.go_dense()
    for name, found in pruned_layers(sparse, load_recipe("ste")).items():
        assert not found.is_sparse
        assert torch.equal(found.mask, reference_mask(sparse.get_submodule(name).weight))
        assert set(layer_spectra(found, found.weight)) == {"weight", "residual"}


def test_what_an_adapter_gives_back():
    """One made of the leading singular vectors of what is pruned leaves the others."""
    sparse = model()
    method = load_recipe("ste")
    method.adapter = AdapterConfig(kind="lora", rank=4, alpha=4.0)
    sparsify(sparse, method)
    for name, adapter in adapters_of(sparse).items():
        layer = sparse.get_submodule(name)
        u, s, v = torch.linalg.svd(layer.weight.detach() - layer.current_weight(), full_matrices=False)
        adapter.b.data, adapter.a.data = u[:, :4] * s[:4], v[:4]
        found = pruned_layers(sparse, method)[name]
        spectra = layer_spectra(found, found.weight)
        left = torch.tensor(spectra["residual_after_adapter"].singular_values)
        assert torch.allclose(left[: len(s) - 4], s[4:], atol=1e-5)
        assert (left[len(s) - 4 :] < 1e-5).all()
        adapter.active = False
        assert "residual_after_adapter" not in layer_spectra(found, found.weight)
