import pytest
import torch
from fake_cuda import FakeCuda, decode_map
from sparse24 import cubin, matmul
from sparse24.cubin import manifest
from sparse24.fragments import Fragments, fragment_shapes
from sparse24.packing import Packed

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
STREAM = 0x5EA


def fragments(m, k, dtype):
    values, metadata = fragment_shapes(m, k, dtype)
    return Fragments(torch.zeros(values, dtype=torch.int32), torch.zeros(metadata, dtype=torch.int32), m, k, dtype)


def x_of(rows, cols, dtype):
    return torch.zeros(rows, cols).to(dtype)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return FakeCuda(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def device(library, monkeypatch):
    """Pretend that CPU tensors are on a GPU with 4 multiprocessors; returns the fake driver."""
    monkeypatch.setattr(cubin, "driver", lambda: library.driver)
    monkeypatch.setattr(cubin, "_loaded", {})
    return library


def capability_of(entry):
    return divmod(entry.capability, 10)


def run(name, device, monkeypatch, call):
    """What the kernel of this name is launched with."""
    entry = manifest()[name]
    monkeypatch.setattr(matmul, "_place", lambda device: (0, capability_of(entry), STREAM))
    device.expect(entry)
    result = call()
    launched = device.launched(entry)
    assert launched["block"] == (entry.threads, 1, 1)
    assert launched["stream"] == STREAM
    arguments, left = {}, list(launched["parameters"])
    while left:
        argument, kind, value = left.pop(0)
        if kind == "tensor_map":
            (shape, strides) = [left.pop(0)[2] for _ in range(2)], [left.pop(0)[2] for _ in range(2)]
            decoded = decode_map(value)
            assert list(decoded["shape"]) == shape
            assert strides == [shape[1], 1]
            element_bytes = next(p.tensor_map.element_bytes for p in entry.parameters if p.argument == argument)
            assert decoded["pitch"] == shape[1] * element_bytes
            arguments[argument] = (decoded["address"], *shape)
        elif kind != "scratch":
            arguments[argument] = value
        else:
            assert value == 0
    return entry, result, launched, arguments


def cases(form):
    return [name for name, entry in manifest().items() if entry.form == form]


def dtype_of(entry):
    return {name: dtype for dtype, name in matmul.DTYPES.items()}[entry.dtype]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", cases("linear"))
def test_linear_launch(device, monkeypatch, name, with_bias):
    m, n, k = 384, 300, 256
    dtype = dtype_of(manifest()[name])
    result = BF16 if dtype == E4M3 else dtype
    a, x = fragments(m, k, dtype), x_of(n, k, dtype)
    bias = torch.zeros(m, dtype=result) if with_bias else None
    scale = torch.ones((), dtype=torch.float32) if dtype == E4M3 else None
    entry, y, launched, arguments = run(
        name, device, monkeypatch, lambda: matmul.linear(a, x, bias, variant=name, scale=scale)
    )
    assert (y.shape, y.dtype) == ((n, m), result)
    expected = {
        "x_ptr": x.data_ptr(), "x_desc": (x.data_ptr(), n, k), "out_ptr": y.data_ptr(), "y_ptr": y.data_ptr(), "y_desc": (y.data_ptr(), n, m),
        "values_ptr": a.values.data_ptr(), "metadata_ptr": a.metadata.data_ptr(), "m": m, "n": n, "k": k,
        "bias_ptr": bias.data_ptr() if with_bias else 0, "has_bias": int(with_bias), "scale_ptr": scale.data_ptr() if dtype == E4M3 else 0,
    }  # fmt: skip
    assert arguments == {name: expected[name] for name in arguments}
    assert {"values_ptr", "metadata_ptr", "bias_ptr", "has_bias", "m", "n", "k"} <= set(arguments)
    tiles = -(-m // (entry.block[0] * entry.cluster)) * -(-n // entry.block[1])
    resident = 12 // entry.cluster - 1 if entry.cluster > 1 else 4
    programs = min(tiles, resident) if entry.persistent else tiles
    assert launched["grid"] == (programs * entry.cluster, 1, 1)


@pytest.mark.parametrize("rows", [256, 250, 193])
@pytest.mark.parametrize("name", cases("outer"))
def test_outer_launch(device, monkeypatch, name, rows):
    m, n, k = 384, 296, 256
    dtype = dtype_of(manifest()[name])
    a, x = fragments(m, k, dtype), x_of(rows, n, dtype)
    out = torch.full((m, n), torch.nan)
    _, y, _, arguments = run(name, device, monkeypatch, lambda: matmul.outer(a, x, out=out, variant=name))
    assert y is out
    expected = {
        "x_ptr": x.data_ptr(), "x_desc": (x.data_ptr(), rows, n), "out_ptr": y.data_ptr(), "y_ptr": y.data_ptr(), "y_desc": (y.data_ptr(), m, n),
        "values_ptr": a.values.data_ptr(), "metadata_ptr": a.metadata.data_ptr(), "m": m, "n": n, "k": k, "x_rows": rows,
    }  # fmt: skip
    assert arguments == {name: expected[name] for name in arguments}
    assert "x_desc" in arguments or "x_rows" in arguments  # else nothing tells where x ends


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
@pytest.mark.parametrize(("form", "dtype"), [("linear", BF16), ("linear", FP16), ("outer", BF16), ("outer", FP16)])
def test_there_are_kernels(form, dtype, capability):
    names = matmul.variants(form, dtype, capability)
    assert names
    assert all(manifest()[name].runs_on(capability) for name in names)
    assert matmul.supports(form, 256, 256, 256, dtype, capability) == (True, "")


def test_fp8_is_linear_only_from_8_9_on():
    assert matmul.variants("linear", E4M3, (8, 9))
    assert matmul.variants("linear", E4M3, (9, 0))
    assert not matmul.variants("linear", E4M3, (8, 6))
    assert not matmul.variants("outer", E4M3, (9, 0))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("linear", 192, 1, 64, BF16, (9, 0)), "needs m in multiples of 128 and k of 64, found 192 and 64"),
        (("linear", 128, 1, 96, BF16, (9, 0)), "needs m in multiples of 128 and k of 64, found 128 and 96"),
        (("linear", 128, 1, 64, E4M3, (9, 0)), "needs m in multiples of 128 and k of 128, found 128 and 64"),
        (("outer", 128, 100, 64, BF16, (9, 0)), "needs n in multiples of 8, found 100"),
        (("outer", 128, 1 << 24, 64, FP16, (8, 0)), "needs rows shorter than 8388608"),
        (("linear", 128, 1 << 31, 64, FP16, (8, 0)), "needs rows shorter than 8388608"),
        (("linear", 128, 1, 64, torch.float32, (9, 0)), "no kernel for linear with float32 on compute capability 9.0"),
        (("linear", 128, 1, 64, BF16, (12, 0)), "no kernel for linear with bfloat16 on compute capability 12.0"),
        (("outer", 128, 128, 128, E4M3, (9, 0)), "no kernel for outer with float8_e4m3fn"),
    ],
)
def test_what_is_not_supported(arguments, reason):
    able, why = matmul.supports(*arguments)
    assert not able
    assert reason in why


def test_no_rows_no_launch(device, monkeypatch):
    monkeypatch.setattr(matmul, "_place", lambda device: (0, (8, 0), STREAM))
    device.calls()
    assert matmul.linear(fragments(128, 64, BF16), x_of(0, 64, BF16)).shape == (0, 128)
    assert device.calls() == []


def test_default_is_a_kernel_of_the_device(device, monkeypatch):
    for capability in ((8, 0), (9, 0)):
        names = matmul.variants("linear", BF16, capability)
        areas = {
            name: manifest()[name].block[0] * manifest()[name].block[1] * manifest()[name].cluster for name in names
        }
        entries = tuple(manifest()[name] for name in names)
        assert areas[matmul._default(entries, 0, 4096, 4096).name] == max(areas.values())
        assert areas[matmul._default(entries, 0, 128, 8).name] == min(areas.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 65, dtype=BF16)}, r"x must be \(n, k=64\); found \(8, 65\)"),
        ({"x": torch.zeros(8, 64)}, "x must be contiguous torch.bfloat16; found torch.float32"),
        ({"x": torch.zeros(64, 8, dtype=BF16).t()}, "x must be contiguous torch.bfloat16"),
        ({"x": torch.zeros(8 * 64 + 1, dtype=BF16)[1:].view(8, 64)}, "x must begin at a multiple of 16 bytes"),
        ({"bias": torch.zeros(64, dtype=BF16)}, r"bias must be contiguous torch.bfloat16 of shape \(128,\)"),
        ({"bias": torch.zeros(128)}, "bias must be contiguous torch.bfloat16"),
        ({"out": torch.zeros(128, 8, dtype=BF16)}, r"out must be contiguous torch.bfloat16 of shape \(8, 128\)"),
        ({"scale": torch.ones(())}, "scale must be given for float8_e4m3fn and for nothing else"),
        ({"variant": "nonsense"}, "variant must be one of .*; found 'nonsense'"),
        ({"a": fragments(128, 64, BF16)._replace(rows=256)}, "values must be 4096 contiguous int32"),
        ({"a": fragments(192, 64, BF16)}, "linear: needs m in multiples of 128"),
    ],
)
def test_errors_of_linear(device, monkeypatch, change, message):
    monkeypatch.setattr(matmul, "_place", lambda device: (0, (8, 0), STREAM))
    arguments = {"a": fragments(128, 64, BF16), "x": torch.zeros(8, 64, dtype=BF16), **change}
    with pytest.raises(ValueError, match=message):
        matmul.linear(**arguments)


def test_errors_of_outer(device, monkeypatch):
    monkeypatch.setattr(matmul, "_place", lambda device: (0, (8, 0), STREAM))
    a = fragments(128, 128, BF16)
    with pytest.raises(
        ValueError, match=r"x must be \(rows, n\) with rows rounded up to multiples of 64 128; found \(64, 8\)"
    ):
        matmul.outer(a, torch.zeros(64, 8, dtype=BF16))
    with pytest.raises(ValueError, match="outer: needs n in multiples of 8, found 12"):
        matmul.outer(a, torch.zeros(128, 12, dtype=BF16))
    with pytest.raises(ValueError, match="out must be contiguous torch.float32"):
        matmul.outer(a, torch.zeros(128, 8, dtype=BF16), out=torch.zeros(128, 8, dtype=BF16))


def test_cpu_tensors_are_refused():
    with pytest.raises(ValueError, match="x must be on a CUDA device; found cpu"):
        matmul.linear(fragments(128, 64, BF16), torch.zeros(8, 64, dtype=BF16))


# --- on a GPU ---


def random_packed(rows, cols, dtype, generator):
    """Packed without a search: two random places in each group."""
    position = torch.rand(rows, cols // 4, 4, generator=generator).argsort(dim=2)[..., :2].sort(dim=2).values
    words = (position.reshape(rows, -1, 8) << (2 * torch.arange(8))).sum(dim=2)
    values = torch.randn(rows, cols // 2, generator=generator).to(dtype)
    return Packed(values, (words - ((words & 0x8000) << 1)).to(torch.int16), cols)


def dense_of(packed):
    from sparse24.packing import unpack

    return unpack(packed._replace(values=packed.values.float()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(manifest()))
def test_products_on_a_gpu(name):
    from sparse24.fragments import to_fragments

    entry = manifest()[name]
    if not torch.cuda.is_available() or not entry.runs_on(torch.cuda.get_device_capability()):
        pytest.skip(f"needs a GPU that runs sm_{entry.capability}")
    generator, dtype = torch.Generator().manual_seed(0), dtype_of(entry)
    for m, n, k in ((128, 8, 128), (512, 1000, 640), (2048, 2048, 2048)):
        packed = random_packed(m, k, dtype, generator)
        a, dense = to_fragments(packed), dense_of(packed).cuda().double()
        a = a._replace(values=a.values.cuda(), metadata=a.metadata.cuda())
        if entry.form == "linear":
            x = torch.randn(n, k, generator=generator).to(dtype).cuda()
            result = BF16 if dtype == E4M3 else dtype
            bias = torch.randn(m, generator=generator).to(result).cuda()
            scale = torch.tensor(0.25, device="cuda") if dtype == E4M3 else None
            out = torch.full((n, m), torch.nan, dtype=result, device="cuda")
            expected = x.double() @ dense.t() * (0.25 if dtype == E4M3 else 1) + bias.double()
            y = matmul.linear(a, x, bias, out, name, scale)
            error = {BF16: 4e-3, FP16: 5e-4}[result]
        else:
            rows = k - 24
            x = torch.randn(rows, n, generator=generator).to(dtype).cuda()
            out = torch.full((m, n), torch.nan, device="cuda")
            y, error = matmul.outer(a, x, out, name), 1e-5
            expected = dense[:, :rows] @ x.double()
        assert (y.double() - expected).norm() <= error * expected.norm()


@pytest.mark.gpu
def test_cuda_graph_captures_a_product():
    if not torch.cuda.is_available() or not matmul.variants("linear", BF16, torch.cuda.get_device_capability()):
        pytest.skip("needs a GPU with kernels")
    from sparse24.fragments import to_fragments

    generator = torch.Generator().manual_seed(0)
    packed = random_packed(256, 256, BF16, generator)
    a = to_fragments(packed)
    a = a._replace(values=a.values.cuda(), metadata=a.metadata.cuda())
    x = torch.zeros(64, 256, dtype=BF16, device="cuda")
    out = matmul.linear(a, x)  # loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matmul.linear(a, x, out=out)
    x.copy_(torch.randn(64, 256, generator=generator))
    graph.replay()
    torch.testing.assert_close(out.float(), x.float() @ dense_of(packed).cuda().t(), rtol=2e-2, atol=2e-1)
