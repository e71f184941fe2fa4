"""What each backend packs and calls: ours in Triton's interpreter, PyTorch's operators through stand-ins."""

import pytest
import torch
from sparse24 import ops
from sparse24.backends import BACKENDS, cutlass, gluon, split_choice
from sparse24.backends import dense as dense_backend
from sparse24.backends.base import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Product
from sparse24.fragments import Fragments, from_fragments
from sparse24.packing import Packed, pack, unpack
from sparse24.reference import (
    fp8_quantize,
    mvue24,
    soft_threshold,
    soft_threshold_scale,
    transposable_mask,
    uniform24,
)

POSITION = torch.tensor([3, 8, 2, 0])
E4M3 = torch.float8_e4m3fn


def weight_and_mask(rows, cols):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    return weight, transposable_mask(weight)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU of this compute capability, with cuSPARSELt."""

    def pretend(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
        return torch.device("cuda", 0)

    return pretend


def test_choices_name_a_backend_and_a_variant():
    assert split_choice("dense") == (BACKENDS["dense"], "")
    assert split_choice("cusparselt:3") == (BACKENDS["cusparselt"], "3")


@pytest.mark.parametrize("directions", [(True, False), (False, True), (True, True)])
def test_gluon_packs_fragments(directions, device):
    pytest.importorskip("triton")
    weight, mask = (t.to(device) for t in weight_and_mask(128, 192))
    expected = weight.half() * mask
    operands = BACKENDS["gluon"].pack_weight(weight, mask, None, torch.float16, *directions)
    for wanted, tensors, matrix in zip(directions, operands, (expected, expected.t()), strict=True):
        if not wanted:
            assert tensors == []
            continue
        fragments = Fragments(*tensors, *matrix.shape, torch.float16)
        assert torch.equal(unpack(from_fragments(fragments)), matrix)


@pytest.mark.parametrize("name", ["gluon", "triton", "dense"])
def test_a_soft_threshold_is_packed_with_its_scale(name, device):
    pytest.importorskip("triton")
    weight, mask = torch.randn(64, 128, device=device), torch.empty(0)
    scale = soft_threshold_scale(weight)
    operand, nothing = BACKENDS[name].pack_weight(weight, mask, scale, torch.float16, True, False)
    expected = (scale * soft_threshold(weight)).half()
    assert nothing == []
    found = {
        "dense": lambda: operand[0],
        "triton": lambda: unpack(Packed(*operand, 128)),
        "gluon": lambda: unpack(from_fragments(Fragments(*operand, 64, 128, torch.float16))),
    }[name]()
    assert torch.equal(found + 0.0, expected + 0.0)  # zeros of either sign


@pytest.mark.parametrize("directions", [(True, False), (False, True), (True, True)])
def test_triton_multiplies_what_it_packs(directions, runtime_loops, device):
    weight, mask = (t.to(device) for t in weight_and_mask(64, 48))
    backend = BACKENDS["triton"]
    operands = backend.pack_weight(weight, mask, None, torch.float16, *directions)
    matrix = (weight.half() * mask).float()
    for wanted, tensors, dense in zip(directions, operands, (matrix, matrix.t()), strict=True):
        if wanted:
            x = torch.randn(5, dense.shape[1], device=device).half()
            bias = torch.randn(dense.shape[0], device=device).half()
            y = backend.linear(tensors, x, bias, dense.shape[0], "")
            torch.testing.assert_close(y.float(), x.float() @ dense.t() + bias.float(), rtol=2e-3, atol=2e-3)


def test_what_gluon_serves(gpu):
    pytest.importorskip("triton")
    hopper = gpu(9, 0)
    backend = BACKENDS["gluon"]
    for kind in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT):
        product = Product(kind, 1000, 1024, 512, torch.bfloat16)
        assert backend.supports(product, hopper) == (True, "")
        assert all("wgmma" in name for name in backend.variants(product, hopper))
    able, reason = backend.supports(Product(FORWARD, 1000, 1000, 512, torch.bfloat16), hopper)
    assert not able
    assert "m in multiples of 128" in reason
    assert not backend.supports(Product(FORWARD, 1000, 1024, 512, torch.float32), hopper)[0]
    ada = gpu(8, 9)
    assert all("mma_sp" in name for name in backend.variants(Product(FORWARD, 64, 128, 128, torch.float16), ada))
    assert not backend.supports(Product(FORWARD, 64, 128, 128, torch.float16), gpu(7, 5))[0]


def test_operands_of_gluon_begin_at_a_multiple_of_16_bytes():
    part = torch.arange(65.0).half()[1:].reshape(8, 8)
    assert part.is_contiguous()
    found = gluon._aligned(part)
    assert found.data_ptr() % 16 == 0
    assert torch.equal(found, part)
    whole = torch.zeros(8, 8)
    assert gluon._aligned(whole) is whole


def test_what_the_libraries_serve(gpu):
    product = Product(FORWARD, 64, 128, 128, torch.bfloat16)
    assert BACKENDS["cusparselt"].supports(product, gpu(9, 0)) == (True, "")
    assert BACKENDS["cutlass"].supports(product, gpu(8, 0)) == (True, "")
    assert (
        BACKENDS["cutlass"].supports(product, gpu(9, 0))[1] == "PyTorch's CUTLASS operators run on sm_80 to sm_89 only"
    )
    odd = Product(FORWARD, 64, 24, 128, torch.bfloat16)
    for name in ("cusparselt", "cutlass"):
        able, reason = BACKENDS[name].supports(odd, gpu(8, 0))
        assert not able
        assert "found 24, 128, 64" in reason
        assert "float32" in BACKENDS[name].supports(Product(FORWARD, 64, 128, 128, torch.float32), gpu(8, 0))[1]


def test_cusparselt_by_its_documented_semantics(monkeypatch):
    """(m, k) compressed times dense_B (k, n); `transpose_result` gives (n, m); the bias is along m."""

    def compress(matrix):
        assert matrix.is_contiguous()
        return pack(matrix).values, pack(matrix).metadata, matrix.shape[1]

    def sparse_mm(compressed, dense, bias=None, transpose_result=False, alg_id=0):
        assert dense.is_contiguous() or dense.t().is_contiguous()  # it tells only these two layouts apart
        assert dense.shape[0] % 16 == 0
        assert dense.shape[1] % 8 == 0
        result = unpack(Packed(*compressed)) @ dense
        result = result if bias is None else result + bias[:, None]
        calls.append(alg_id)
        return result.t() if transpose_result else result

    calls = []
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    _check_library("cusparselt", "7")
    _check_library("cusparselt", "7", tokens=13)
    assert set(calls) == {7}


def test_cutlass_by_its_documented_semantics(monkeypatch):
    def tile(matrix, algorithm, use_cutlass):
        packed, packed_t = pack(matrix), pack(matrix.t())
        return *packed[:2], *packed_t[:2], None

    def mm(values, metadata, dense):
        assert dense.shape[0] % 64 == 0
        assert dense.shape[1] % 8 == 0
        return unpack(Packed(values, metadata, dense.shape[0])) @ dense

    monkeypatch.setattr(torch, "_sparse_semi_structured_tile", tile)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", lambda b, v, m, d: mm(v, m, d) + b[:, None])
    monkeypatch.setattr(cutlass, "sparse_semi_structured_from_dense_cutlass", lambda dense: pack(dense)[:2])
    _check_library("cutlass", "", weight_gradient=False)
    _check_library("cutlass", "", weight_gradient=False, tokens=13)


def _check_library(name, variant, weight_gradient=True, tokens=32):
    """tokens: of a last micro-batch or of validation, they may be other than `supports` was asked about."""
    backend = BACKENDS[name]
    weight, mask = weight_and_mask(64, 128)
    sparse = weight * mask
    x, dy, bias = torch.randn(tokens, 128), torch.randn(tokens, 64), torch.randn(64)
    for transpose in (False, True):
        operand, operand_t = backend.pack_weight(weight, mask, None, torch.float32, True, transpose)
        torch.testing.assert_close(backend.linear(operand, x, bias, 64, variant), x @ sparse.t() + bias)
        torch.testing.assert_close(backend.linear(operand, x, None, 64, variant), x @ sparse.t())
    torch.testing.assert_close(backend.linear(operand_t, dy, None, 128, variant), dy @ sparse)
    if weight_gradient:
        pruned = mvue24(dy, uniform24(1, 3, 2, tokens, 64, 8))
        found = backend.weight_gradient(dy, x, 1, POSITION, variant)
        torch.testing.assert_close(found, pruned.t() @ x)


# --- fp8 ---


def fp8_problem(tokens=32):
    """Ŵ in e4m3, x in e4m3, scale, bias, and the product in float32."""
    weight, mask = weight_and_mask(128, 192)
    (quantized, weight_scale), (x, scale) = (
        fp8_quantize(weight * mask, E4M3),
        fp8_quantize(torch.randn(tokens, 192), E4M3),
    )
    bias = torch.randn(128).bfloat16()
    scale = scale * weight_scale
    return quantized, x, scale, bias, x.float() @ quantized.float().t() * scale


def check_fp8(name, variant, tokens=32):
    quantized, x, scale, bias, expected = fp8_problem(tokens)
    operand = BACKENDS[name].pack_fp8(quantized)
    for dtype in (torch.bfloat16, torch.float32):
        y = BACKENDS[name].fp8_linear(operand, x, scale, None, 128, variant, dtype)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
        y = BACKENDS[name].fp8_linear(operand, x, scale, bias.to(dtype), 128, variant, dtype)
        torch.testing.assert_close(y.float(), expected + bias, rtol=1e-2, atol=2e-2)


def test_dense_in_fp8_is_exact_up_to_its_one_rounding():
    quantized, x, scale, bias, expected = fp8_problem()
    y = BACKENDS["dense"].fp8_linear([quantized], x, scale, bias, 128, "", torch.bfloat16)
    assert torch.equal(y, (expected + bias).bfloat16())


def test_dense_in_fp8_by_the_documented_semantics_of_scaled_mm(monkeypatch):
    def scaled_mm(a, b, scale_a, scale_b, bias=None, out_dtype=None):
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert scale_a.numel() == scale_b.numel() == 1
        assert bias is None or bias.dtype == out_dtype != torch.float32
        calls.append(out_dtype)
        y = a.float() @ b.float() * scale_a * scale_b
        return (y if bias is None else y + bias).to(out_dtype)

    calls = []
    monkeypatch.setattr(dense_backend, "_has_fp8", lambda x, features: True)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    check_fp8("dense", "")
    assert calls == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_gluon_in_fp8(monkeypatch):
    pytest.importorskip("triton")
    from sparse24 import matmul

    def linear(a, x, bias=None, variant=None, scale=None):
        assert scale.numel() == 1
        assert bias is None or bias.dtype == torch.bfloat16
        assert variant == "v"
        packed = from_fragments(a)
        weight = unpack(packed._replace(values=packed.values.view(torch.uint8))).view(E4M3)
        y = x.float() @ weight.float().t() * scale
        return (y if bias is None else y + bias).bfloat16()

    monkeypatch.setattr(matmul, "linear", linear)
    check_fp8("gluon", "v")


def test_cusparselt_in_fp8_by_its_documented_semantics(monkeypatch):
    """alpha of m numbers scales the rows of the result; the result is e4m3 unless another dtype is asked for."""

    def sparse_mm(compressed, dense, alpha=None, out_dtype=None, transpose_result=False, alg_id=0):
        assert alpha.shape == (128,)
        assert alpha.is_contiguous()
        assert out_dtype == torch.bfloat16
        assert transpose_result
        assert dense.t().is_contiguous()
        assert dense.shape[1] % 16 == 0
        return (compressed.float() @ dense.float() * alpha[:, None]).to(out_dtype).t()

    monkeypatch.setattr(torch, "_cslt_compress", lambda matrix: matrix)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    check_fp8("cusparselt", "7")
    check_fp8("cusparselt", "7", tokens=13)


def test_what_serves_fp8(gpu):
    pytest.importorskip("triton")
    product = Product(FORWARD, 64, 128, 256, E4M3)
    hopper = gpu(9, 0)
    for name in ("dense", "gluon", "cusparselt"):
        assert BACKENDS[name].supports(product, hopper) == (True, "")
    assert "float8_e4m3fn" in BACKENDS["triton"].supports(product, hopper)[1]
    assert not BACKENDS["cusparselt"].supports(Product(FORWARD, 64, 48, 256, E4M3), hopper)[0]
    assert not BACKENDS["cusparselt"].supports(Product(WEIGHT_GRADIENT, 64, 128, 256, E4M3), hopper)[0]
    ampere = gpu(8, 0)
    assert BACKENDS["dense"].supports(product, ampere) == (True, "")
    for name in ("gluon", "cusparselt", "cutlass"):
        assert "e4m3" in BACKENDS[name].supports(product, ampere)[1]


def test_the_pruned_gradient_of_the_operator_is_that_of_the_reference():
    dy = torch.randn(36, 12)
    assert torch.equal(ops.mvue_prune(dy, 1, POSITION), mvue24(dy, uniform24(1, 3, 2, 36, 12, 8)))


def test_masks_are_refreshed_in_place():
    weight, mask = torch.randn(8, 8), torch.zeros(8, 8, dtype=torch.bool)
    assert int(ops.refresh_mask_(weight, mask, "transposable")) == 32
    assert torch.equal(mask, transposable_mask(weight))
    assert int(ops.refresh_mask_(weight, mask, "transposable")) == 0
    assert ops.sparse_weight(weight.t(), mask.t(), None, torch.bfloat16).t().is_contiguous()
