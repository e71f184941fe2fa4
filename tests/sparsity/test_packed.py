"""Packed layers with any number of tokens, in every form, against the dense product with the same 2:4 weight."""

import copy

import pytest
import torch
from sparse24 import ops
from sparse24.backends import BACKENDS
from sparse24.backends.base import pad_rows
from sparse24.dispatch import choose
from torch import nn

from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.sparsity import load_recipe, packed, sparsify
from sparse_pretrain.sparsity.packed import ROW_MAJOR, PackedLinear, choose_backends, pack_model
from sparse_pretrain.sparsity.represent import represent, round_weights, weight_bytes
from tests.sparse24.reference_backend import Reference

CPU = torch.device("cpu")
TOKENS = (0, 1, 2, 3, 7, 8, 16, 33)


class Tiled(Reference):
    """Takes 8 tokens at a time, as the libraries do, and keeps one tensor, as cuSPARSELt does."""

    name = "tiled"

    def supports(self, product, device):
        return (True, "") if product.n % 8 == 0 else (False, f"needs n in multiples of 8, found {product.n}")

    def pack_weight(self, weight, mask, scale, dtype, forward, transpose):
        assert scale is None
        return [ops.sparse_weight(weight, mask, None, dtype)], []

    def linear(self, operand, x, bias, features, variant):
        return nn.functional.linear(pad_rows(x, 8), operand[0], bias)[: len(x)]


@pytest.fixture
def backends(monkeypatch):
    for backend in (Reference(), Tiled()):
        monkeypatch.setitem(BACKENDS, backend.name, backend)


def model(recipe="ste", bias=True) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential()
    net.ffn = nn.Linear(48, 32, bias=bias)
    sparsify(net, load_recipe(recipe), include=["ffn"])
    return net.eval()


@pytest.mark.parametrize("recipe", ["ste", "s_ste"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("choice", [ROW_MAJOR, "triton", "reference:b", "tiled"])
def test_any_number_of_tokens(backends, recipe, bias, choice):
    net = model(recipe, bias)
    packed_net = copy.deepcopy(net)
    assert pack_model(packed_net, {"ffn": choice}) == 1
    weight = net.ffn.current_weight().detach()
    assert ((weight != 0).view(32, -1, 4).sum(-1) <= 2).all()
    for tokens in TOKENS:
        x = torch.randn(tokens, 48)
        expected = nn.functional.linear(x, weight, net.ffn.bias)
        torch.testing.assert_close(packed_net(x), expected)
        torch.testing.assert_close(packed_net(x.view(1, tokens, 48)), expected[None])


@pytest.mark.parametrize("choice", [ROW_MAJOR, "reference:a", "tiled"])
def test_under_autocast_and_in_half_the_bytes(backends, choice):
    net = model()
    x = torch.randn(3, 48)
    expected = net(x)
    represent(net, "packed", torch.bfloat16, {"ffn": choice})
    round_weights(net, torch.bfloat16)
    assert net.ffn.values.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 1e-2 * expected.norm()


def test_few_tokens_are_multiplied_by_tritons_kernel(monkeypatch):
    """In Triton's interpreter, as if this were a GPU; with more tokens the weight is rebuilt."""
    pytest.importorskip("triton")
    from sparse24 import decompress, prune

    if torch.cuda.is_available():
        pytest.skip("for the interpreter; on a GPU the GPU suite's benchmark of inference checks it")
    calls = []

    def record(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or original(*args))

    record(decompress, "decompress_linear")
    record(prune, "unpack_dense")
    monkeypatch.setattr(
        BACKENDS["triton"], "supports", lambda product, device: (product.tokens <= 4, ""), raising=False
    )
    monkeypatch.setattr(ops, "use_kernels", lambda tensor: True)
    net = model()
    weight, bias = net.ffn.current_weight().detach(), net.ffn.bias.detach()
    represent(net, "packed")
    for tokens, kernel in ((1, "decompress_linear"), (4, "decompress_linear"), (5, "unpack_dense")):
        x = torch.randn(tokens, 48)
        torch.testing.assert_close(net(x), nn.functional.linear(x, weight, bias))
        assert calls == [kernel]
        calls.clear()


def test_the_weight_is_rounded_once_and_others_stay():
    torch.manual_seed(0)
    cfg = GPTConfig(name="t", n_layer=1, n_head=2, d_model=32, max_seq_len=16, position="rotary", bias=True)
    net = GPT(cfg, 64)
    sparsify(net, load_recipe("s_ste"))
    weight = net.blocks[0].ffn.up.current_weight().detach()
    for how in ("auto", "dense", "packed"):
        held = copy.deepcopy(net)
        represent(held, how, torch.bfloat16)
        round_weights(held, torch.bfloat16)
        up = held.blocks[0].ffn.up
        now = {"auto": lambda: up.sparse_weight, "dense": lambda: up.weight, "packed": lambda: up.unpacked()}[how]()  # noqa: B023
        assert torch.equal(now, weight.bfloat16()), how
        assert held.head.weight is held.tok_embed.weight
        assert held.tok_embed.weight.dtype == torch.bfloat16
        assert held.norm.weight.dtype == up.bias.dtype == held.blocks[0].attn.rotary.cos.dtype == torch.float32


def test_bytes():
    net = model()
    dense = copy.deepcopy(net)
    represent(dense, "dense", torch.bfloat16)
    round_weights(dense, torch.bfloat16)
    assert weight_bytes(dense) == (2 * 48 * 32 + 4 * 32, 2 * 48 * 32 + 4 * 32)
    represent(net, "packed", torch.bfloat16)
    assert weight_bytes(net) == (2 * 48 * 32 * 9 // 16 + 4 * 32, 2 * 48 * 32 + 4 * 32)


def test_the_backend_is_chosen_for_the_rows_that_there_will_be(backends, monkeypatch):
    asked = []
    monkeypatch.setattr(packed, "choose", lambda shape, *rest: asked.append(shape) or choose(shape, *rest))
    net = model("fst")  # of whose gradients nothing is asked
    for tokens, rounded in ((1, 8), (8, 8), (13, 16)):
        choices, table = choose_backends(net, tokens, torch.float32, CPU, "tiled")
        assert choices["ffn"] in ("tiled:a", "tiled:b")
        assert asked[-1].tokens == rounded
        assert asked[-1].sparse_kinds() == ["forward"]
        assert "tiled" in table
    assert choose_backends(net, 1, torch.float32, CPU) == ({"ffn": ROW_MAJOR}, "")
    with pytest.raises(UserError, match="backend: found cutlass, which cannot serve ffn: .* needs a CUDA device"):
        choose_backends(net, 1, torch.float32, CPU, "cutlass")
    represent(net, "packed")
    assert isinstance(net.ffn, PackedLinear)
    assert choose_backends(net, 1, torch.float32, CPU, "cutlass") == ({}, "")
