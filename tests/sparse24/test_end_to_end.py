"""From a weight to a product, through everything but the hardware: the packing kernels in Triton's interpreter, the
backend and the host side as they are, the driver's calls recorded, and the PTX emulated on what they were given."""

import pytest
import torch
from fake_cuda import FakeCuda, decode_map
from gemm_emulation import DTYPES, assert_rounded, compile_variants, to_numpy
from ptx_emulator import Emulator, TensorMap
from sparse24 import cubin, matmul
from sparse24.backends import BACKENDS
from sparse24.cubin import manifest
from sparse24.reference import fp8_quantize, mvue24, transposable_mask, uniform24

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the hardware itself is tested")
OUT, IN, TOKENS = 256, 128, 72
NAMES = [
    "mma_sp_linear_bf16",
    "mma_sp_outer_bf16",
    "mma_sp_linear_e4m3",
    "wgmma_sp_simple_fp16_128x128_c1",
    "wgmma_sp_linear_bf16_128x128_c1",
    "wgmma_sp_linear_bf16_128x256_c2",
    "wgmma_sp_linear_fp16_256x128_c4",
    "wgmma_sp_linear_e4m3_256x128_c2",
    "wgmma_sp_outer_bf16_128x128_c1",
    "wgmma_sp_outer_fp16_256x128_c2",
]
SWIZZLE = {0: 0, 3: 128}  # CUtensorMapSwizzle


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return FakeCuda(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def emulated(library, monkeypatch):
    """emulated(name, *tensors): launches of this kernel are emulated, on the memory of its operands and these tensors."""

    def use(name, *tensors):
        entry = manifest()[name]
        variant = compile_variants("gemm_mma_sp" if name.startswith("mma") else "gemm_wgmma_sp")[name]
        monkeypatch.setattr(cubin, "driver", lambda: library.driver)
        monkeypatch.setattr(cubin, "_loaded", {})
        monkeypatch.setattr(matmul, "_place", lambda device: (0, divmod(entry.capability, 10), 0x5EA))
        library.expect(entry)
        launch = matmul._launch

        def launch_and_emulate(form, variant_name, a, x, y, n, more):
            y.fill_(torch.nan)
            launch(form, variant_name, a, x, y, n, more)
            launched = library.launched(entry)
            memory = {t.data_ptr(): to_numpy(t.reshape(-1)) for t in (a.values, a.metadata, x, y, *tensors)}
            arguments = _arguments(launched["parameters"], memory)
            cluster, shared = entry.cluster, launched["shared"]
            Emulator(variant["ptx"]).launch(launched["grid"], arguments, cluster=cluster, shared=shared)

        monkeypatch.setattr(matmul, "_launch", launch_and_emulate)

    return use


def _arguments(parameters, memory):
    """What the driver was given, with the tensors' own memory for their addresses."""
    found = []
    for _, kind, value in parameters:
        if kind == "tensor_map":
            decoded = decode_map(value)
            swizzle = SWIZZLE[decoded["swizzle"]]
            found.append(TensorMap(memory[decoded["address"]], decoded["shape"], decoded["box"], swizzle))
        elif kind in ("pointer", "scratch"):
            found.append(memory[value] if value else 0)
        else:
            found.append(value)
    return found


def operands(dtype):
    generator = torch.Generator().manual_seed(0)
    weight, x, dy, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((OUT, IN), (TOKENS, IN), (TOKENS, OUT), (OUT,))
    )
    return weight, transposable_mask(weight), x, dy, bias


def of(form, *dtypes):
    return [n for n in NAMES if manifest()[n].form == form and manifest()[n].dtype in dtypes]


@pytest.mark.parametrize("name", of("linear", "bf16", "fp16"))
def test_forward_and_input_gradient(name, emulated):
    dtype, gluon = DTYPES[manifest()[name].dtype], BACKENDS["gluon"]
    weight, mask, x, dy, bias = operands(dtype)
    emulated(name, bias)
    operand, operand_t = gluon.pack_weight(weight, mask, None, dtype, True, True)
    sparse = (weight * mask).float()
    assert_rounded(gluon.linear(operand, x, bias, OUT, name).float(), x.float() @ sparse.t() + bias.float(), dtype)
    assert_rounded(gluon.linear(operand_t, dy, None, IN, name).float(), dy.float() @ sparse, dtype)


@pytest.mark.parametrize("name", of("outer", "bf16", "fp16"))
def test_weight_gradient(name, emulated):
    dtype = DTYPES[manifest()[name].dtype]
    _, _, x, dy, _ = operands(dtype)
    emulated(name)
    result = BACKENDS["gluon"].weight_gradient(dy, x, 1, torch.tensor([3, 8, 2, 0]), name)
    pruned = mvue24(dy.float(), uniform24(1, 3, 2, TOKENS, OUT, 8))
    expected = pruned.t() @ x.float()
    # the pruned values are rounded to 16 bits, by truncation in the interpreter
    assert (result - expected).norm() <= torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("name", of("linear", "e4m3"))
def test_forward_in_fp8(name, emulated):
    weight, mask, x, _, bias = operands(torch.bfloat16)
    quantized, weight_scale = fp8_quantize((weight * mask).float(), torch.float8_e4m3fn)
    x, x_scale = fp8_quantize(x.float(), torch.float8_e4m3fn)
    scale = x_scale * weight_scale
    emulated(name, bias, scale)
    gluon = BACKENDS["gluon"]
    result = gluon.fp8_linear(gluon.pack_fp8(quantized), x, scale, bias, OUT, name, torch.bfloat16)
    assert_rounded(result.float(), x.float() @ quantized.float().t() * scale + bias.float(), torch.bfloat16)
