import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_cuda import FakeCuda, decode_map
from sparse24 import cubin
from sparse24.cubin import FOLDER, KINDS, Driver, Entry, Kernel, Matrix, Parameter, TensorMapFormat, manifest

CODE = b"\x7fELF and so on"
MAP = TensorMapFormat(box=(128, 64), element=9, element_bytes=2, swizzle=3)
ENTRY = Entry(
    name="k", file="k.cubin", sha256=hashlib.sha256(CODE).hexdigest(), symbol="gemm", form="linear", dtype="bf16",
    capability=90, block=(128, 256, 64), threads=384, cluster=2, shared=200_000, registers=168, persistent=True,
    parameters=(
        Parameter("x_desc", "tensor_map", 128, 48, tensor_map=MAP), Parameter("x_desc", "i32", 4, 176), Parameter("x_desc", "i32", 4, 180),
        Parameter("x_desc", "i64", 8, 184), Parameter("x_desc", "i64", 8, 192), Parameter("values_ptr", "pointer", 8, 200, divisor=16),
        Parameter("m", "i32", 4, 208, divisor=16), Parameter("alpha", "fp32", 4, 212), Parameter("", "scratch", 8, 216), Parameter("", "scratch", 8, 224),
    ),
    triton="3.9.0", ptxas="12.9",
)  # fmt: skip
X = Matrix(0xABC00000000, (300, 512), (512, 1))
ARGUMENTS = {"x_desc": X, "values_ptr": 2**47 + 16, "m": 128, "alpha": 0.5, "unused": 1}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return FakeCuda(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def fake(library):
    library.fail("", 0)
    for name in ("current", "pushed"):
        library.get(name, ctypes.c_uint64).value = 0
    library.calls()
    yield library
    library.fail("", 0)


@pytest.fixture
def kernel(fake, tmp_path):
    (tmp_path / "k.cubin").write_bytes(CODE)
    fake.expect(ENTRY)
    return Kernel(ENTRY, 1, fake.driver, tmp_path)


def test_structures_have_the_layout_of_cuda_h():
    # sizeof and offsetof as gcc gives them with the cuda.h of CUDA 13.0 and of Triton 3.9
    config, attribute = cubin._LaunchConfig, cubin._LaunchAttribute
    assert ctypes.sizeof(config) == 56
    assert [getattr(config, name).offset for name, _ in config._fields_] == [0, 12, 24, 32, 40, 48]
    assert ctypes.sizeof(attribute) == 72
    assert [getattr(attribute, name).offset for name in ("id", "x", "y", "z")] == [0, 8, 12, 16]


def test_header_of_cuda_agrees(tmp_path):
    header = Path("/usr/local/cuda/include/cuda.h")
    if not header.exists():
        pytest.skip("needs cuda.h")
    numbers = {
        "sizeof(CUlaunchConfig)": 56,
        "offsetof(CUlaunchConfig, sharedMemBytes)": 24,
        "offsetof(CUlaunchConfig, hStream)": 32,
        "offsetof(CUlaunchConfig, attrs)": 40,
        "offsetof(CUlaunchConfig, numAttrs)": 48,
        "sizeof(CUlaunchAttribute)": 72,
        "offsetof(CUlaunchAttribute, value.clusterDim)": 8,
        "sizeof(CUtensorMap)": KINDS["tensor_map"][1],
        "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION": cubin.CLUSTER_DIMENSION,
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": cubin.MAX_DYNAMIC_SHARED_SIZE_BYTES,
        "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": cubin.MULTIPROCESSOR_COUNT,
        "CU_TENSOR_MAP_L2_PROMOTION_L2_128B": cubin.L2_PROMOTION_128B,
        "CU_TENSOR_MAP_DATA_TYPE_UINT8": 0,
        "CU_TENSOR_MAP_DATA_TYPE_FLOAT16": 6,
        "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16": 9,
        "CU_TENSOR_MAP_SWIZZLE_128B": 3,
    }
    source = "#include <cuda.h>\n#include <stddef.h>\n" + "".join(
        f'_Static_assert((long)({what}) == {number}, "{what}");\n' for what, number in numbers.items()
    )
    (tmp_path / "layout.c").write_text(source)
    command = ["cc", "-fsyntax-only", f"-I{header.parent}", str(tmp_path / "layout.c")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("needs a C compiler")
    assert done.returncode == 0, done.stderr


def test_loading(fake, kernel):
    assert fake.calls() == [
        "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuModuleLoadData",
        "cuModuleGetFunction", "cuFuncSetAttribute", "cuCtxPopCurrent_v2", "cuCtxGetCurrent", "cuCtxPushCurrent_v2",
        "cuDeviceGetAttribute", "cuOccupancyMaxActiveClusters", "cuCtxPopCurrent_v2",
    ]  # fmt: skip
    assert bytes(fake.get("image", ctypes.c_char * 4)) == b"\x7fELF"
    assert fake.get("symbol", ctypes.c_char * 128).value == b"gemm"
    assert fake.get("max_shared", ctypes.c_int).value == 200_000
    assert kernel.resident == 5  # as the driver says


def test_what_a_launch_passes(fake, kernel):
    kernel.launch((5, 3, 1), 0xFEDCBA9876, ARGUMENTS)
    launched = fake.launched(ENTRY)
    first, *rest = launched.pop("parameters")
    assert launched == {
        "grid": (10, 3, 1), "block": (384, 1, 1), "shared": 200_000, "cluster": [2, 1], "stream": 0xFEDCBA9876,
    }  # fmt: skip
    assert first[:2] == ("x_desc", "tensor_map")
    assert decode_map(first[2]) == {
        "address": 0xABC00000000, "shape": (300, 512), "pitch": 1024, "element": 9, "box": (128, 64), "swizzle": 3,
    }  # fmt: skip
    assert [value for _, _, value in rest] == [300, 512, 512, 1, 2**47 + 16, 128, 0.5, 0, 0]


def test_no_cluster_and_little_shared_memory(fake, tmp_path):
    entry = replace(ENTRY, cluster=1, shared=48 * 1024)
    (tmp_path / "k.cubin").write_bytes(CODE)
    fake.expect(entry)
    kernel = Kernel(entry, 0, fake.driver, tmp_path)
    assert "cuFuncSetAttribute" not in fake.calls()
    assert kernel.resident == 4  # multiprocessors, with one block each
    kernel.launch((5, 1, 1), 0, ARGUMENTS)
    launched = fake.launched(entry)
    assert (launched["grid"], launched["cluster"], launched["stream"]) == ((5, 1, 1), None, 0)


def test_tensor_maps_are_kept(fake, kernel):
    kernel.launch((1, 1, 1), 0, ARGUMENTS)
    kernel.launch((1, 1, 1), 0, ARGUMENTS)
    assert fake.calls().count("cuTensorMapEncodeTiled") == 1
    kernel.launch((1, 1, 1), 0, {**ARGUMENTS, "x_desc": X._replace(address=0xABC00000400)})
    assert fake.calls().count("cuTensorMapEncodeTiled") == 1
    assert decode_map(fake.launched(ENTRY)["parameters"][0][2])["address"] == 0xABC00000400


def test_context_of_the_device_is_current_during_a_launch(fake, kernel):
    current = fake.get("current", ctypes.c_uint64)
    fake.calls()
    current.value = 5  # another GPU's
    kernel.launch((1, 1, 1), 0, ARGUMENTS)
    assert [name for name in fake.calls() if "Ctx" in name] == [
        "cuCtxGetCurrent",
        "cuCtxPushCurrent_v2",
        "cuCtxPopCurrent_v2",
    ]
    assert current.value == 5
    current.value = 7101
    kernel.launch((1, 1, 1), 0, ARGUMENTS)
    assert [name for name in fake.calls() if "Ctx" in name] == ["cuCtxGetCurrent"]


def test_launches_of_several_threads_do_not_mix(fake, kernel):
    wrong = []

    def work(number):
        for i in range(50):
            kernel.launch((1, 1, 1), number, {**ARGUMENTS, "m": 16 * number, "alpha": float(i)})

    threads = [threading.Thread(target=work, args=(number,), name=str(number)) for number in range(4)]
    original = kernel._driver.call

    def call(function, *arguments):
        if function == "cuLaunchKernelEx":
            time.sleep(1e-5)  # let the others overwrite what they can
        original(function, *arguments)
        if function == "cuLaunchKernelEx":
            launched = fake.launched(ENTRY)
            own = int(threading.current_thread().name)
            if (launched["stream"], launched["parameters"][6][2]) != (own, 16 * own):
                wrong.append(launched)

    kernel._driver.call = call
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        kernel._driver.call = original
    assert not wrong


@pytest.mark.parametrize(
    "function",
    [
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuCtxPushCurrent_v2",
    ],
)
def test_every_return_code_is_checked_when_loading(fake, tmp_path, function):
    (tmp_path / "k.cubin").write_bytes(CODE)
    fake.fail(function, 209)
    with pytest.raises(RuntimeError, match=f"{function.removesuffix('_v2')} failed with 209: what went wrong"):
        Kernel(ENTRY, 0, fake.driver, tmp_path)


def test_errors_of_a_launch(fake, kernel):
    with pytest.raises(ValueError, match="values_ptr must be a multiple of 16 for k; found 8"):
        kernel.launch((1, 1, 1), 0, {**ARGUMENTS, "values_ptr": 8})
    with pytest.raises(ValueError, match="do not fit their types"):
        kernel.launch((1, 1, 1), 0, {**ARGUMENTS, "m": 2**31})
    fake.fail("cuTensorMapEncodeTiled", 1)
    with pytest.raises(
        RuntimeError, match=r"cuTensorMapEncodeTiled failed with 1: .*shape=\(300, 500\).* with box \(128, 64\)"
    ):
        kernel.launch((1, 1, 1), 0, {**ARGUMENTS, "x_desc": X._replace(shape=(300, 500))})
    fake.fail("cuLaunchKernelEx", 999)
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx failed with 999: unknown error"):
        kernel.launch((1, 1, 1), 0, ARGUMENTS)
    fake.fail("", 0)
    kernel.launch((1, 1, 1), 0, ARGUMENTS)  # an error leaves neither the lock nor the context behind
    assert fake.get("current", ctypes.c_uint64).value == 0


def test_a_file_that_is_not_the_manifests(fake, tmp_path):
    (tmp_path / "k.cubin").write_bytes(CODE + b".")
    with pytest.raises(RuntimeError, match=r"k\.cubin is not the file that manifest\.json describes"):
        Kernel(ENTRY, 0, fake.driver, tmp_path)


def test_no_driver():
    with pytest.raises(RuntimeError, match="a CUDA driver of version 12 or newer is needed"):
        Driver("libnothing-of-this-name.so.1")


def test_load_is_once_a_device(fake, monkeypatch, tmp_path):
    (tmp_path / "k.cubin").write_bytes(CODE)
    monkeypatch.setattr(cubin, "manifest", lambda: {"k": ENTRY})
    monkeypatch.setattr(cubin, "driver", lambda: fake.driver)
    monkeypatch.setattr(cubin, "Kernel", lambda entry, device, driver: Kernel(entry, device, driver, tmp_path))
    monkeypatch.setattr(cubin, "_loaded", {})
    assert cubin.load("k", 0) is cubin.load("k", 0)
    assert cubin.load("k", 0) is not cubin.load("k", 1)
    with pytest.raises(ValueError, match="name must be one of k; found 'j'"):
        cubin.load("j", 0)


@pytest.mark.parametrize(
    ("built_for", "runs"),
    [(80, [(8, 0), (8, 6), (8, 7), (8, 9)]), (89, [(8, 9)]), (90, [(9, 0)])],
)
def test_which_device_runs_what(built_for, runs):
    devices = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    entry = replace(ENTRY, capability=built_for)
    assert [device for device in devices if entry.runs_on(device)] == runs


# --- the cubins that are shipped ---

ELF_ABI_OF_CUDA_12 = 7


@pytest.mark.parametrize("name", list(manifest()))
def test_shipped_cubin(name):
    entry = manifest()[name]
    code = (FOLDER / entry.file).read_bytes()
    assert hashlib.sha256(code).hexdigest() == entry.sha256
    assert code[:4] == b"\x7fELF"
    assert code[8] == ELF_ABI_OF_CUDA_12
    assert entry.symbol.encode() + b"\0" in code
    assert re.search(rb"(?:/[\w.-]{3,}){2,}", code) is None  # no path of the machine that built it
    assert entry.threads % 128 == 0
    assert entry.threads <= 1024
    assert entry.shared <= 227 * 1024 if entry.capability == 90 else entry.shared <= 99 * 1024
    assert entry.registers * entry.threads <= 65536
    assert [p.kind for p in entry.parameters][-2:] == ["scratch", "scratch"]
    for p in entry.parameters:
        if p.tensor_map is not None:
            assert p.tensor_map.box[1] * p.tensor_map.element_bytes <= 128  # what a swizzle of 128 bytes allows
            assert all(side <= 256 for side in p.tensor_map.box)


@pytest.mark.parametrize("name", list(manifest()))
def test_what_a_launch_of_a_shipped_cubin_passes(fake, name):
    entry = manifest()[name]
    fake.expect(entry)
    kernel = Kernel(entry, 0, fake.driver)
    arguments = {}
    for number, p in enumerate(entry.parameters):
        if p.kind == "tensor_map":
            arguments[p.argument] = Matrix(4096 * (number + 1), (1000 + number, 2048), (2048, 1))
        elif p.kind != "scratch":
            arguments.setdefault(p.argument, 16 * (number + 1))
    kernel.launch((3, 1, 1), 1, arguments)
    launched = fake.launched(entry)
    assert launched["block"] == (entry.threads, 1, 1)
    assert launched["grid"] == (3 * entry.cluster, 1, 1)
    assert launched["cluster"] == ([entry.cluster, 1] if entry.cluster > 1 else None)
    assert launched["shared"] == entry.shared
    rest = list(launched["parameters"])
    while rest:
        argument, kind, value = rest.pop(0)
        if kind == "tensor_map":
            matrix = arguments[argument]
            decoded = decode_map(value)
            assert (decoded["address"], decoded["shape"]) == (matrix.address, matrix.shape)
            assert [rest.pop(0)[2] for _ in range(4)] == [*matrix.shape, *matrix.strides]
        else:
            assert value == (0 if kind == "scratch" else arguments[argument])


def test_manifest_lists_what_is_there():
    assert {entry.file for entry in manifest().values()} == {file.name for file in FOLDER.glob("*.cubin")}
    assert list(manifest()), "no cubins: run scripts/build-cubins"
    assert len(json.loads((FOLDER / "manifest.json").read_text())["digest"]) == 64


def test_shipped_cubins_are_those_of_the_sources():
    triton39 = os.environ.get("SPARSE24_TRITON39")
    if triton39 is None:
        pytest.skip("needs SPARSE24_TRITON39, the folder of Triton 3.9 that scripts/build-cubins makes")
    path = os.pathsep.join([triton39, str(FOLDER.parents[1])])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "sparse24.build_cubins", "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
