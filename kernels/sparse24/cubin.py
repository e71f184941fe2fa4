"""Kernels compiled ahead of time: the manifest of `cubins/`, and loading and launching with the CUDA driver API.

The sparse GEMMs are written in Gluon and need Triton 3.9 to compile, but not to run: they are shipped as machine
code and launched through libcuda, by ctypes, beside any PyTorch and Triton. This file knows no kernel; what it must
know of one is in the manifest, which `scripts/build-cubins` reads off the compiled code.

How Triton 3.9 passes arguments (nothing of it is assumed here: the builder compares the PTX's parameter list with
the signature, and with the sizes and offsets recorded in the cubin):
    - parameters in the order of the signature, constexpr ones left out;
    - a pointer is 8 bytes; i32, i64 and fp32 are themselves;
    - a tensor descriptor of rank r becomes 1 + 2r parameters: the CUtensorMap by value, 128 bytes aligned to 64;
      the shape, r times i32; the strides in elements, r times i64;
    - last come two pointers to scratch memory, null here (the builder refuses kernels that use any).
The driver takes one host pointer for each parameter and copies sizes and offsets as the cubin says.

Threads of a block are `.reqntid` of the PTX: with warp specialization that includes the worker warps. With clusters
(Triton's num_ctas) a program is a cluster, so the grid's x is programs times cluster size.

Binary compatibility: a cubin for sm_80 runs on 8.0, 8.6 and 8.9, one for sm_89 on 8.9, one for sm_90a on 9.0 alone.
The cubins come from ptxas 12.9 and load in drivers for CUDA 12 and 13; machine code of ptxas 13 would need the latter.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
import threading
from collections.abc import Callable, Mapping
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "cubins"

# kind of a parameter -> its format for `struct`, size and alignment in bytes
KINDS = {
    "tensor_map": ("128s", 128, 64),
    "pointer": ("Q", 8, 8),
    "i64": ("q", 8, 8),
    "i32": ("i", 4, 4),
    "fp32": ("f", 4, 4),
    "scratch": ("Q", 8, 8),
}
TENSOR_MAPS_KEPT = 256  # a kernel; one for each activation buffer it is called with


# --- the manifest ---


@dataclass(frozen=True)
class TensorMapFormat:
    """What a kernel expects of a tensor map, besides address, shape and strides.

    box: what one copy brings, in elements, one entry a dimension, the contiguous one last.
    element: CUtensorMapDataType. element_bytes: its size. swizzle: CUtensorMapSwizzle.
    """

    box: tuple[int, ...]
    element: int
    element_bytes: int
    swizzle: int


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    argument: name in the kernel's signature; those of one tensor descriptor share it; empty for scratch memory.
    kind: one of `KINDS`. size, offset: in bytes, as recorded in the cubin.
    divisor: what the compiler was promised to divide the value (of a pointer: the address).
    tensor_map: for tensor maps only.
    """

    argument: str
    kind: str
    size: int
    offset: int
    divisor: int = 1
    tensor_map: TensorMapFormat | None = None


@dataclass(frozen=True)
class Entry:
    """One cubin of the manifest.

    name, form, dtype, block: as in `gemm_variant.Variant`; file: in the folder of the manifest.
    capability: 80, 89 or 90 (meaning sm_90a).
    threads: of a block. cluster: blocks of a cluster. shared: bytes of dynamic shared memory.
    registers: a thread.
    persistent: a program computes one tile after another, so that a grid of any size computes them all; otherwise one
        program, one tile.
    triton, ptxas: versions it was built with.
    """

    name: str
    file: str
    sha256: str
    symbol: str
    form: str
    dtype: str
    capability: int
    block: tuple[int, int, int]
    threads: int
    cluster: int
    shared: int
    registers: int
    persistent: bool
    parameters: tuple[Parameter, ...]
    triton: str
    ptxas: str

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Entry:
        parameters = []
        for parameter in fields.pop("parameters"):
            if tensor_map := parameter.pop("tensor_map", None):
                tensor_map = TensorMapFormat(**{**tensor_map, "box": tuple(tensor_map["box"])})
            parameters.append(Parameter(**parameter, tensor_map=tensor_map))
        return Entry(**{**fields, "block": tuple(fields["block"])}, parameters=tuple(parameters))

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a device of this compute capability executes the machine code."""
        if self.capability == 90:
            return capability == (9, 0)
        major, minor = divmod(self.capability, 10)
        return capability[0] == major and capability[1] >= minor


@cache
def manifest(folder: Path = FOLDER) -> dict[str, Entry]:
    """All kernels of a folder, by name, in the order in which they were listed when built."""
    file = folder / "manifest.json"
    if not file.exists():
        return {}
    return {fields["name"]: Entry.from_json(fields) for fields in json.loads(file.read_text())["kernels"]}


# --- the driver API ---


class _LaunchAttribute(ctypes.Structure):  # CUlaunchAttribute, its 64-byte union opened for the cluster dimension
    _fields_ = [("id", c_uint), ("pad", c_uint), ("x", c_uint), ("y", c_uint), ("z", c_uint), ("rest", c_uint * 13)]


class _LaunchConfig(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_LaunchAttribute)),
        ("attribute_count", c_uint),
    ]


CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_…
MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_…
L2_PROMOTION_128B = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
MOST_STATIC_SHARED = 48 * 1024  # more dynamic shared memory than this must be asked for

_PROTOTYPES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxGetCurrent": [POINTER(c_void_p)],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuModuleLoadData": [POINTER(c_void_p), c_char_p],
    "cuModuleGetFunction": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": [POINTER(c_int), c_void_p, c_int, c_size_t],
    "cuOccupancyMaxActiveClusters": [POINTER(c_int), c_void_p, POINTER(_LaunchConfig)],
    "cuLaunchKernelEx": [POINTER(_LaunchConfig), c_void_p, POINTER(c_void_p), c_void_p],
    "cuTensorMapEncodeTiled": [
        c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32),
        POINTER(c_uint32), c_int, c_int, c_int, c_int,
    ],
}  # fmt: skip


class Driver:
    """libcuda by ctypes. `call` runs one of its functions and raises for any return code but success.

    Raises:
        RuntimeError: there is no such library, or it is older than CUDA 12.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            cuda = ctypes.CDLL(library)
            self._functions = {name: getattr(cuda, name) for name in _PROTOTYPES}
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"a CUDA driver of version 12 or newer is needed to run cubins: {error}") from error
        for name, argtypes in _PROTOTYPES.items():
            self._functions[name].argtypes = argtypes
            self._functions[name].restype = c_int
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        if code := self._functions[function](*arguments):
            text = c_char_p()
            self._functions["cuGetErrorString"](code, byref(text))
            reason = text.value.decode() if text.value else "unknown error"
            raise RuntimeError(f"{function.removesuffix('_v2')} failed with {code}: {reason}")


@cache
def driver() -> Driver:
    return Driver()


class _Context:
    """`with`: the primary context of a device, which PyTorch uses too, is the current one of this thread.

    A thread may have none yet (a fresh one of autograd) or that of another GPU. For one thread at a time.
    """

    def __init__(self, driver: Driver, device: int) -> None:
        self._driver = driver
        handle, self._context = c_int(), c_void_p()
        driver.call("cuDeviceGet", byref(handle), device)
        self.device = handle.value
        driver.call("cuDevicePrimaryCtxRetain", byref(self._context), handle)
        self._pushed = False

    def __enter__(self) -> None:
        current = c_void_p()
        self._driver.call("cuCtxGetCurrent", byref(current))
        self._pushed = current.value != self._context.value
        if self._pushed:
            self._driver.call("cuCtxPushCurrent_v2", self._context)

    def __exit__(self, *error: object) -> None:
        if self._pushed:
            self._driver.call("cuCtxPopCurrent_v2", byref(c_void_p()))


class Matrix(NamedTuple):
    """What is passed for a tensor descriptor: address in bytes, shape and strides in elements, last stride 1."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Kernel:
    """A kernel loaded on one device; launching it costs a few microseconds of the host.

    resident: programs that run at the same time on this device.

    Raises:
        RuntimeError: the file is not the one that the manifest describes, or the driver refuses it.
    """

    def __init__(self, entry: Entry, device: int, driver: Driver, folder: Path = FOLDER) -> None:
        code = (folder / entry.file).read_bytes()
        if hashlib.sha256(code).hexdigest() != entry.sha256:
            raise RuntimeError(f"{entry.file} is not the file that manifest.json describes; run scripts/build-cubins")
        self.entry = entry
        self._driver = driver
        self._context = _Context(driver, device)
        self._function = c_void_p()
        module = c_void_p()  # never unloaded: it lives as long as the process
        with self._context:
            driver.call("cuModuleLoadData", byref(module), code)
            driver.call("cuModuleGetFunction", byref(self._function), module, entry.symbol.encode())
            if entry.shared > MOST_STATIC_SHARED:
                driver.call("cuFuncSetAttribute", self._function, MAX_DYNAMIC_SHARED_SIZE_BYTES, entry.shared)
        self._lock = threading.Lock()  # for the buffers below: the backward pass has a thread of its own

        layout, offsets, end = "<", [], 0
        for parameter in entry.parameters:
            letter, size, align = KINDS[parameter.kind]
            offset = -(-end // align) * align
            layout += f"{offset - end}x{letter}"
            offsets.append(offset)
            end = offset + size
        self._layout = struct.Struct(layout)
        self._storage = ctypes.create_string_buffer(end + 64)
        self._start = -ctypes.addressof(self._storage) % 64
        base = ctypes.addressof(self._storage) + self._start
        self._pointers = (c_void_p * len(offsets))(*(base + offset for offset in offsets))

        def tensor_maps(format: TensorMapFormat | None) -> Callable[[Matrix], bytes] | None:
            return None if format is None else lru_cache(TENSOR_MAPS_KEPT)(partial(self._encode, format))

        # one item an argument: what of a tensor descriptor comes after its map follows from the map's argument
        self._arguments = [
            (p.argument, p.divisor, tensor_maps(p.tensor_map))
            for i, p in enumerate(entry.parameters)
            if p.kind != "scratch" and (i == 0 or p.argument != entry.parameters[i - 1].argument)
        ]
        self._scratch = (0,) * sum(p.kind == "scratch" for p in entry.parameters)

        self._attribute = _LaunchAttribute(id=CLUSTER_DIMENSION, x=entry.cluster, y=1, z=1)
        self._config = _LaunchConfig(
            block=(entry.threads, 1, 1),
            shared=entry.shared,
            attributes=ctypes.pointer(self._attribute),
            attribute_count=int(entry.cluster > 1),
        )
        with self._context:
            self.resident = self._count_resident()

    def launch(self, programs: tuple[int, int, int], stream: int, arguments: Mapping[str, Any]) -> None:
        """Enqueue the kernel. CUDA graphs capture it, once the kernel has been loaded.

        Args:
            programs: grid in programs, that is in clusters.
            stream: handle of a stream of this device (`torch.cuda.Stream.cuda_stream`).
            arguments: name in the kernel's signature -> value; a `Matrix` for a tensor descriptor, an address for a
                pointer. Names that the kernel does not have are ignored.

        Raises:
            ValueError: a value is not divisible by what the compiler was promised, or does not fit its type.
            RuntimeError: the driver refuses.
        """
        values: list[Any] = []
        with self._lock, self._context:
            for name, divisor, encode in self._arguments:
                value = arguments[name]
                if encode is not None:
                    values += (encode(value), *value.shape, *value.strides)
                    continue
                if divisor > 1 and value % divisor:
                    raise ValueError(f"{name} must be a multiple of {divisor} for {self.entry.name}; found {value}")
                values.append(value)
            try:
                self._layout.pack_into(self._storage, self._start, *values, *self._scratch)
            except struct.error as error:
                raise ValueError(f"arguments of {self.entry.name} do not fit their types: {error}") from error
            self._config.grid[:] = (programs[0] * self.entry.cluster, *programs[1:])
            self._config.stream = stream
            self._driver.call("cuLaunchKernelEx", byref(self._config), self._function, self._pointers, None)

    def _count_resident(self) -> int:
        """For clusters the driver knows how many fit: not every group of processors is a multiple of their size."""
        processors, blocks, clusters = c_int(), c_int(), c_int()
        self._driver.call("cuDeviceGetAttribute", byref(processors), MULTIPROCESSOR_COUNT, self._context.device)
        if self.entry.cluster > 1:
            self._config.grid[:] = (self.entry.cluster * processors.value, 1, 1)
            self._driver.call("cuOccupancyMaxActiveClusters", byref(clusters), self._function, byref(self._config))
            return max(1, clusters.value)
        self._driver.call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            byref(blocks),
            self._function,
            self.entry.threads,
            self.entry.shared,
        )
        return max(1, processors.value * blocks.value)

    def _encode(self, format: TensorMapFormat, matrix: Matrix) -> bytes:
        """The CUtensorMap of a matrix: a pure function of its arguments, so that maps may be kept."""
        rank = len(format.box)
        # the driver wants the contiguous dimension first, and strides in bytes of all others
        shape = (c_uint64 * rank)(*reversed(matrix.shape))
        strides = (c_uint64 * rank)(*(s * format.element_bytes for s in reversed(matrix.strides[:-1])))
        box, steps = (c_uint32 * rank)(*reversed(format.box)), (c_uint32 * rank)(*[1] * rank)
        storage = ctypes.create_string_buffer(128 + 64)
        start = -ctypes.addressof(storage) % 64
        none = 0  # no interleaving; zeros for what lies outside
        try:
            self._driver.call(
                "cuTensorMapEncodeTiled", ctypes.addressof(storage) + start, format.element, rank, matrix.address,
                shape, strides, box, steps, none, format.swizzle, L2_PROMOTION_128B, none,
            )  # fmt: skip
        except RuntimeError as error:
            raise RuntimeError(f"{error}; for {matrix} with box {format.box}") from error
        return storage.raw[start : start + 128]


_loading = threading.Lock()
_loaded: dict[tuple[str, int], Kernel] = {}


def load(name: str, device: int) -> Kernel:
    """The kernel of this name on this device, loaded once.

    Loading is not for the inside of a CUDA graph's capture: call the kernel once before.

    Raises:
        ValueError: there is no such kernel.
        RuntimeError: no driver, or see `Kernel`.
    """
    if kernel := _loaded.get((name, device)):
        return kernel
    if name not in manifest():
        raise ValueError(f"name must be one of {', '.join(manifest()) or '(no cubins built)'}; found {name!r}")
    with _loading:
        if (name, device) not in _loaded:
            _loaded[name, device] = Kernel(manifest()[name], device, driver())
    return _loaded[name, device]
