"""A PTX emulator in numpy: runs the compiled GEMM kernels where there is no GPU.

    emulator = Emulator(ptx)                       # the text of one kernel, as in compiled.asm["ptx"]
    counts = emulator.launch(grid, arguments, cluster=None, lazy=True, seed=None, only=None, shared=231424)

grid: CTAs in x, y, z (with clusters: CTAs, not clusters). arguments, in the order of the PTX parameters:
    int, float       a scalar
    numpy array      a pointer to its first element; contiguous; what the kernel writes is in the array afterwards
    Pointer          an array and an offset in bytes, which may lie outside: only accesses are checked
    TensorMap        a TMA descriptor; Triton passes it as `*tensor_map.arguments()` (descriptor, shape, strides)
Missing trailing arguments (Triton's scratch pointers) are null. bfloat16 and float8 are arrays of uint16 and uint8.
cluster: CTAs of a cluster, along x; by default as the PTX says.
only: the CTAs to run, as (x, y, z); with clusters name every CTA of each.
shared: bytes of dynamic shared memory (compiled.metadata.shared), which are checked.
Returns how often each instruction was executed by a warp.

What is asynchronous runs in one of two ways, and a correct kernel gives the same result in both:
    lazy=False       copies are done where they are issued, as early as possible: a buffer that is overwritten too
                     early is found by its wrong result;
    lazy=True        as late as possible: cp.async at the wait for its group, TMA loads when no warp can go on, TMA
                     stores and wgmma (which read shared memory) at the wait. A missing wait is found.
seed: None lets each warp run until it has to wait, in order; a number draws which warps are ahead at random.

Errors (EmulatorError, with the instruction, its number, the CTA and the warp): accesses outside of an array or of
shared memory, misaligned ones, shared memory read before it was written or touched while a copy to it is under way,
registers that are read while a wgmma still has to write them or that change while it still has to read them, a
missing wgmma.fence, generic writes that TMA or wgmma read without fence.proxy.async, mbarrier misuse, invalid
metadata, descriptors that do not fit, and deadlocks (what each warp waits for). Not found: races that no tried order
of the warps shows, and whatever depends on time. Not modelled: registers and occupancy, atomics, floating-point
rounding inside of an mma (the sums are float32 here), __nanosleep, texture, local memory, calls.

Fragment and metadata layouts are those of the PTX ISA: 9.7.14.6 (mma.sp) and 9.7.15.5-6 (wgmma, wgmma.sp; its
metadata figures are those of mma.sp). With 16-bit types the sparsity selector names the pair of threads of each
four, (0, 1) or (2, 3), that holds the metadata; with 8-bit types all four hold it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

LANES = 32
LANE = np.arange(LANES)
GROUP, THREAD = LANE // 4, LANE % 4  # "groupID" and "threadID_in_group" of the PTX ISA
ALL = np.ones(LANES, bool)
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
GLOBAL_BASE = 1 << 36  # beyond 32 bits, so that truncated addresses are found
SHARED_BASE = 1024  # the first KiB of a CTA's shared memory is the system's
TENSOR_MAP_BASE = 1 << 20  # in the space of the parameters, whose addresses have 32 bits

WRITTEN, COPYING = 0xFF, 0x02  # states of a byte of shared memory; 0: never written


class EmulatorError(Exception):
    """The kernel does something that is undefined or that hardware refuses."""


class Deadlock(EmulatorError):
    """No warp can go on."""


# --- arguments ---


@dataclass
class Pointer:
    """The address of `array`, moved by `offset` bytes (any sign)."""

    array: np.ndarray
    offset: int


@dataclass
class TensorMap:
    """A tiled TMA descriptor.

    array: contiguous base. shape, box: elements, outermost first. strides: bytes of all dimensions but the last,
    by default those of a contiguous tensor. swizzle: 0, 32, 64 or 128 bytes. offset: bytes added to the base.
    """

    array: np.ndarray
    shape: Sequence[int]
    box: Sequence[int]
    swizzle: int = 128
    strides: Sequence[int] | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        size = self.array.itemsize
        if self.strides is None:
            self.strides = [int(np.prod(self.shape[i + 1 :])) * size for i in range(len(self.shape) - 1)]
        if self.swizzle not in (0, 32, 64, 128):
            raise ValueError(f"swizzle must be 0, 32, 64 or 128; found {self.swizzle}")
        if any(stride % 16 for stride in self.strides) or self.offset % 16:
            raise ValueError(f"strides and offset must be multiples of 16 bytes; found {self.strides}, {self.offset}")
        if max(self.box) > 256 or self.box[-1] * size % 16 or (self.swizzle and self.box[-1] * size > self.swizzle):
            raise ValueError(f"box must be ≤ 256, its rows multiples of 16 bytes within the swizzle; found {self.box}")

    def arguments(self) -> list[Any]:
        """What Triton passes for a descriptor argument: itself, the shape, the strides in elements."""
        strides = [stride // self.array.itemsize for stride in self.strides or ()]
        return [self, *self.shape, *strides, 1]


class _GlobalMemory:
    """The arrays of one launch, laid out with gaps in one array of bytes."""

    GAP = 4096

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays, self.addresses, end = [], [], self.GAP
        for array in arrays:
            if not array.flags.c_contiguous:
                raise ValueError(
                    f"arrays must be contiguous; found one of shape {array.shape} with strides {array.strides}"
                )
            if not any(array is other for other in self.arrays):
                self.arrays.append(array)
                self.addresses.append(end)
                end = -(-(end + array.nbytes) // 512) * 512 + self.GAP
        self.data = np.zeros(end, np.uint8)
        self.valid = np.zeros(end, bool)
        for array, start in zip(self.arrays, self.addresses, strict=True):
            self.data[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
            self.valid[start : start + array.nbytes] = True
        self.views = {size: self.data[: end // size * size].view(UINT[size]) for size in UINT}

    def address(self, array: np.ndarray) -> int:
        return GLOBAL_BASE + next(a for other, a in zip(self.arrays, self.addresses, strict=True) if other is array)

    def index(self, addresses: np.ndarray, size: int, width: int) -> np.ndarray:
        """Checked offsets, in elements of `size` bytes, of accesses of `width` bytes."""
        offset = addresses - GLOBAL_BASE
        if offset.size and (offset.min() < 0 or offset.max() + width > self.data.size):
            raise EmulatorError(f"global access outside of every array: address {int(offset.min()):#x}…")
        if not (self.valid[offset].all() and self.valid[offset + (width - 1)].all()):
            bad = offset[~(self.valid[offset] & self.valid[offset + (width - 1)])][0]
            near = [f"{a:#x}+{x.nbytes:#x}" for a, x in zip(self.addresses, self.arrays, strict=True)]
            raise EmulatorError(f"global access outside of the arrays: {bad:#x} of {', '.join(near)}")
        if (offset % width).any():
            raise EmulatorError(f"misaligned global access of {width} bytes: {int(offset[offset % width != 0][0]):#x}")
        return offset // size

    def write_back(self) -> None:
        for array, start in zip(self.arrays, self.addresses, strict=True):
            array.reshape(-1).view(np.uint8)[...] = self.data[start : start + array.nbytes]


# --- state of a CTA ---


@dataclass
class _Mbarrier:
    """phase: how many phases are complete. pending: arrivals, transactions: bytes that the current one lacks."""

    count: int
    pending: int
    transactions: int = 0
    phase: int = 0

    def arrive(self, count: int = 1) -> None:
        self.pending -= count
        if self.pending < 0:
            raise EmulatorError(f"mbarrier: more arrivals than its count of {self.count}")
        self._complete()

    def expect(self, size: int) -> None:
        self.transactions += size

    def deliver(self, size: int) -> None:
        self.transactions -= size
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class _Barrier:
    """A barrier that counts warps; `done` is how often it was passed."""

    arrived: int = 0
    expected: int = 0
    done: int = 0

    def arrive(self, warps: int) -> int:
        """Arrive with one warp at a barrier of so many; the value that `done` gets when all have."""
        if self.arrived and self.expected != warps:
            raise EmulatorError(f"barrier used with {warps} warps while others wait for {self.expected}")
        self.arrived, self.expected = self.arrived + 1, warps
        target = self.done + 1
        if self.arrived == warps:
            self.arrived, self.done = 0, target
        return target


class _Cta:
    def __init__(self, launch: _Launch, index: tuple[int, int, int], rank: int) -> None:
        self.launch, self.index, self.rank = launch, index, rank
        self.base = (rank << 24) + SHARED_BASE  # shared::cluster addresses hold the rank
        size = -(-(SHARED_BASE + launch.shared) // 1024) * 1024
        self.end = SHARED_BASE + launch.shared
        self.data, self.state = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self.views = {n: self.data.view(UINT[n]) for n in UINT}
        self.states = {n: self.state.view(UINT[n]) for n in UINT}
        # For the order between generic writes and what TMA and wgmma read ("proxies"): when and by which warp a byte
        # was written, in fences so far, -1 by TMA; and when each warp last executed fence.proxy.async.
        self.stamp, self.writer = np.full(size, -1, np.int32), np.zeros(size, np.uint8)
        self.clock, self.fences = 0, np.zeros(launch.program.threads // LANES, np.int32)
        self.mbarriers: dict[int, _Mbarrier] = {}
        self.barriers: dict[int, _Barrier] = {}
        self.warps = [_Warp(self, i) for i in range(launch.program.threads // LANES)]

    def check_running(self) -> None:
        """The shared memory of a CTA is gone when it ends; others of its cluster must not touch it then."""
        if all(warp.exited for warp in self.warps):
            raise EmulatorError(f"shared memory of CTA {self.index}, which has ended, is accessed by its cluster")

    def offsets(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Checked offsets of shared::cta addresses."""
        if addresses.size == 0:
            return addresses
        if (addresses >> 24 != self.rank).any():
            raise EmulatorError(f"shared::cta address of another CTA: {int(addresses.max()):#x}")
        offset = addresses & 0xFFFFFF
        if offset.min() < SHARED_BASE or offset.max() + width > self.end:
            raise EmulatorError(
                f"shared access outside of the {self.end - SHARED_BASE} bytes: "
                f"{int(offset.min()) - SHARED_BASE} … {int(offset.max()) - SHARED_BASE + width}"
            )
        if (offset % width).any():
            raise EmulatorError(f"misaligned shared access of {width} bytes: {int(offset[offset % width != 0][0])}")
        return offset

    def check_state(self, state: np.ndarray, reading: bool) -> None:
        """Shared memory may be read where it is written and no copy is under way, and written where none is."""
        if (state == COPYING).any():
            verb = "read" if reading else "written"
            raise EmulatorError(f"shared memory {verb} while an asynchronous copy to it is under way (missing wait?)")
        if reading and (state == 0).any():
            raise EmulatorError("shared memory read before it was written")

    def load(self, addresses: np.ndarray, size: int, count: int) -> np.ndarray:
        """(lanes, count) elements of `size` bytes each."""
        index = (self.offsets(addresses, size * count) // size)[:, None] + np.arange(count)
        state = self.states[size][index]
        if (state != np.iinfo(state.dtype).max).any():
            self.check_state(np.ascontiguousarray(state).view(np.uint8), reading=True)
        return self.views[size][index]

    def store(self, addresses: np.ndarray, values: np.ndarray, warp: _Warp) -> None:
        """values (lanes, count)."""
        size, count = values.itemsize, values.shape[1]
        index = (self.offsets(addresses, size * count) // size)[:, None] + np.arange(count)
        full = np.iinfo(values.dtype).max
        state = self.states[size][index]
        if ((state != full) & (state != 0)).any():
            self.check_state(np.ascontiguousarray(state).view(np.uint8), reading=False)
        self.views[size][index] = values
        self.states[size][index] = full
        written = (addresses & 0xFFFFFF)[:, None] + np.arange(size * count)
        self.stamp[written], self.writer[written] = self.clock, warp.number

    def gather_async(self, offsets: np.ndarray, reader: int, fences: np.ndarray) -> np.ndarray:
        """Bytes at offsets, read by TMA or wgmma for a warp; fences as they were when it issued the instruction.

        The fence may be the writer's, before a barrier, or the reader's, after it.
        """
        if offsets.min() < SHARED_BASE or offsets.max() >= self.end:
            raise EmulatorError("TMA or wgmma reads outside of the shared memory")
        self.check_state(self.state[offsets], reading=True)
        stamp, writer = self.stamp[offsets], self.writer[offsets]
        unfenced = (stamp >= fences[reader]) & (stamp >= fences[writer])
        if unfenced.any():
            raise EmulatorError(f"TMA or wgmma reads what warp {writer[unfenced][0]} wrote, without fence.proxy.async")
        return self.data[offsets]

    def mbarrier(self, address: int) -> _Mbarrier:
        """By its shared::cluster address."""
        peer = self.launch.cluster[address >> 24] if address >> 24 < len(self.launch.cluster) else None
        if peer is None or (address & 0xFFFFFF) not in peer.mbarriers:
            raise EmulatorError(f"no mbarrier was initialised at {address:#x} (shared base {self.base:#x})")
        peer.check_running()
        return peer.mbarriers[address & 0xFFFFFF]


@dataclass
class _Wgmma:
    """One wgmma in flight: who computes it, and the registers it holds."""

    compute: Callable[[list[np.ndarray] | None], list[np.ndarray]]
    destination: list[int]
    accumulator: _Wgmma | list[np.ndarray] | None
    operands: dict[int, np.ndarray]
    result: list[np.ndarray] | None = None


class _InFlight:
    """What a register holds that a wgmma still has to write: no operation takes it."""

    def __init__(self, wgmma: _Wgmma) -> None:
        self.wgmma = wgmma


class _Warp:
    def __init__(self, cta: _Cta, number: int) -> None:
        self.cta, self.number = cta, number
        program = cta.launch.program
        self.regs: list[Any] = [None] * len(program.register_names)
        self.fenced: list[Any] = []  # the registers as they were at the last wgmma.fence
        # where the lanes are; more than one path while they diverge. The path with the lowest pc goes first.
        self.paths: list[tuple[int, np.ndarray | None]] = [(0, None)]
        self.waiting = ""
        self.awaits: int | None = None  # the value of `done` of the barrier at which the warp waits
        self.cluster_phase: int | None = None
        self.copies: list[Callable[[], None]] = []  # cp.async since the last commit
        self.copy_groups: list[list[Callable[[], None]]] = []
        self.stores: list[Callable[[], None]] = []  # TMA stores since the last commit
        self.store_groups: list[list[Callable[[], None]]] = []
        self.dense_of: tuple[int, list[Any]] = (-1, [])  # the operands of the last mma.sp, and their dense matrix
        self.dense: np.ndarray | None = None
        self.wgmmas: list[_Wgmma] = []
        self.wgmma_groups: list[list[_Wgmma]] = []
        x = np.arange(number * LANES, (number + 1) * LANES, dtype=np.uint32)
        launch = cta.launch
        special = {
            "laneid": LANE, "warpid": number, "tid.x": x, "tid.y": 0, "tid.z": 0,
            "ntid.x": program.threads, "ntid.y": 1, "ntid.z": 1,
            "ctaid.x": cta.index[0], "ctaid.y": cta.index[1], "ctaid.z": cta.index[2],
            "nctaid.x": launch.grid[0], "nctaid.y": launch.grid[1], "nctaid.z": launch.grid[2],
            "clusterid.x": cta.index[0] // launch.size, "clusterid.y": cta.index[1], "clusterid.z": cta.index[2],
            "nclusterid.x": launch.grid[0] // launch.size, "nclusterid.y": launch.grid[1],
            "nclusterid.z": launch.grid[2], "cluster_ctarank": cta.rank, "cluster_nctarank": launch.size,
            "cluster_ctaid.x": cta.rank, "cluster_ctaid.y": 0, "cluster_ctaid.z": 0,
            "cluster_nctaid.x": launch.size, "cluster_nctaid.y": 1, "cluster_nctaid.z": 1,
        }  # fmt: skip
        self.special = {f"%{name}": np.broadcast_to(np.uint32(v), LANES) for name, v in special.items()}

    @property
    def exited(self) -> bool:
        return not self.paths

    def finish_copies(self, keep: int) -> None:
        while len(self.copy_groups) > keep:
            for copy in self.copy_groups.pop(0):
                copy()

    def finish_stores(self, keep: int) -> None:
        while len(self.store_groups) > keep:
            for store in self.store_groups.pop(0):
                store()

    def finish_wgmmas(self, keep: int) -> None:
        while len(self.wgmma_groups) > keep:
            for wgmma in self.wgmma_groups.pop(0):
                self.finish_wgmma(wgmma)

    def finish_wgmma(self, wgmma: _Wgmma) -> None:
        names = self.cta.launch.program.register_names
        for register, value in wgmma.operands.items():
            if self.regs[register] is not value:
                raise EmulatorError(f"{names[register]} changed while a wgmma had to read it")
        if wgmma.result is None:
            start = wgmma.accumulator.result if isinstance(wgmma.accumulator, _Wgmma) else wgmma.accumulator
            wgmma.result = wgmma.compute(start)
        for register, value in zip(wgmma.destination, wgmma.result, strict=True):
            held = self.regs[register]
            if not isinstance(held, _InFlight):
                raise EmulatorError(f"{names[register]} written while a wgmma was to write it")
            if held.wgmma is wgmma:  # else a later wgmma accumulates on it
                self.regs[register] = self.fenced[register] = value


# --- parsing ---


@dataclass
class _Program:
    name: str
    threads: int
    cluster: int
    parameters: list[tuple[str, str]]  # (type or "tensor map", name)
    statements: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # of brx.idx
    register_types: dict[str, str] = field(default_factory=dict)
    register_names: list[str] = field(default_factory=list)


_STATEMENT = re.compile(r"\s*(?:([$%\w]+)\s*:(?!:)|([{}])|((?:[^;{}\"]|\{[^{};]*\}|\"[^\"]*\")+);)")
_NAME = re.compile(r"[$%]?[A-Za-z_$][\w$]*")


def _parse(ptx: str) -> _Program:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, flags=re.S)
    if head is None:
        raise EmulatorError("no .entry in the PTX")
    threads = re.search(r"\.reqntid\s+(\d+)", head[3])
    cluster = re.search(r"\.reqnctapercluster\s+(\d+)", head[3])
    parameters = []
    for declaration in filter(str.strip, head[2].split(",")):
        kind, name = re.search(r"\.([ubfs]\d+)\b.*?([\w$]+)(?:\[\d+\])?\s*$", declaration, flags=re.S).groups()
        parameters.append(("tensor map" if "[" in declaration else kind, name))
    program = _Program(head[1], int(threads[1]) if threads else 32, int(cluster[1]) if cluster else 1, parameters)

    position, scopes, counter = head.end(), [{}], 0

    def resolve(match: re.Match[str]) -> str:
        return next((scope[match[0]] for scope in reversed(scopes) if match[0] in scope), match[0])

    while scopes:
        match = _STATEMENT.match(text, position)
        if match is None:
            raise EmulatorError(f"cannot parse: {text[position : position + 80]!r}")
        position = match.end()
        label, brace, statement = match.groups()
        if brace == "{":
            counter += 1
            scopes.append({})
            # labels are local to their block, and may be used before they stand there
            for name in re.findall(r"^\s*(\w+):(?!:)", _block(text, position), flags=re.M):
                scopes[-1][name] = f"{name}#{counter}"
        elif brace == "}":
            scopes.pop()
        elif label:
            program.labels[scopes[-1].get(label, label)] = len(program.statements)
        elif statement.lstrip().startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            for name in re.split(r"\s*,\s*", names.strip()):
                many = re.match(r"([%\w]+?)<(\d+)>", name)
                plain = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
                new = {one: f"{one}#{counter}" if len(scopes) > 1 else one for one in plain}
                scopes[-1].update(new)
                for unique in new.values():
                    program.register_types[unique] = kind.lstrip(".")
        elif statement.lstrip().startswith(".pragma"):
            continue
        elif statement.lstrip().startswith(".branchtargets"):
            last = next(reversed(program.labels))
            program.tables[last] = [name.strip() for name in statement.split(None, 1)[1].split(",")]
        elif statement.lstrip().startswith("."):
            raise EmulatorError(f"directive not supported: {statement.strip()}")
        else:
            program.statements.append(_NAME.sub(resolve, " ".join(statement.split())))
    program.statements.append("ret")  # what follows the last statement
    program.register_names = list(program.register_types)
    return program


def _block(text: str, start: int) -> str:
    """From `start` up to the brace that closes what was opened before it."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()]
    raise EmulatorError("a brace is not closed")


def _split(operands: str) -> list[str]:
    """Split at the commas outside of brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(operands):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append(operands[start:i].strip())
            start = i + 1
    last = operands[start:].strip()
    return [*parts, last] if last else parts


# --- numbers ---


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN becomes the canonical one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _e4m3_table() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


_E4M3 = _e4m3_table()
_DECODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": _from_bf16,
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
    "e4m3": lambda bits: _E4M3[bits],
}
_ELEMENT = {"bf16": np.uint16, "f16": np.uint16, "e4m3": np.uint8}


# --- matrix instructions ---


@lru_cache
def _sparse_maps(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and stored column of each element (register, lane, element) of a fragment of the compressed A."""
    per = 32 // bits
    register, lane, element = np.ogrid[:4, :LANES, :per]
    row = lane // 4 + 8 * (register % 2) + 0 * element
    column = per * (lane % 4) + element + (4 * per) * (register // 2)
    return row, column


def _decompress(a: list[np.ndarray], metadata: np.ndarray, selector: int, kind: str) -> np.ndarray:
    """The dense (16, 32 or 64) float32 tile of a warp's fragment of A and its metadata registers."""
    dtype = _ELEMENT[kind]
    per = 4 // dtype().itemsize
    fragment = np.stack(a).view(dtype).reshape(4, LANES, per)
    row, column = _sparse_maps(8 * dtype().itemsize)
    stored = np.zeros((16, 8 * per), np.float32)
    stored[row, column] = _DECODE[kind](fragment)
    words = metadata.reshape(8, 4, 1).astype(np.int64) >> 2 * np.arange(16) & 3  # (g, thread, 16 positions)
    if per == 2:  # two of four threads: the low half of a word is row g's, the high half row g + 8's
        words = words[:, 2 * selector : 2 * selector + 2]
        position = np.concatenate([words[:, :, :8].reshape(8, 16), words[:, :, 8:].reshape(8, 16)])
    else:  # threads 0, 2 row g's and 1, 3 row g + 8's; threads 2, 3 the second half of the columns
        position = np.concatenate([words[:, 0::2].reshape(8, 32), words[:, 1::2].reshape(8, 32)])
    if (position[:, 0::2] >= position[:, 1::2]).any():
        raise EmulatorError("metadata: the two positions of a group are not in increasing order")
    dense = np.zeros((16, 16 * per), np.float32)
    np.put_along_axis(dense, 4 * (np.arange(8 * per) // 2) + position, stored, axis=1)
    return dense


def _dense_a(a: list[np.ndarray], kind: str) -> np.ndarray:
    """The (16, 16 or 32) float32 tile of a warp's fragment of a dense A: the map is that of the compressed one."""
    dtype = _ELEMENT[kind]
    row, column = _sparse_maps(8 * dtype().itemsize)
    tile = np.zeros((16, 32 // dtype().itemsize), np.float32)
    tile[row, column] = _DECODE[kind](np.stack(a).view(dtype).reshape(row.shape))
    return tile


def _accumulator_map(registers: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of (register, lane) of a float32 accumulator."""
    register = np.arange(registers)[:, None]
    return GROUP + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * THREAD + register % 2


def _swizzle(offset: np.ndarray, width: int) -> np.ndarray:
    """The XOR of 16-byte units within rows of `width` bytes, on absolute offsets."""
    return offset ^ (((offset >> 7) & (width // 16 - 1)) << 4) if width else offset


@dataclass
class _Descriptor:
    """A shared-memory matrix descriptor of wgmma."""

    start: int
    leading: int
    stride: int
    width: int  # of the swizzle, in bytes

    @classmethod
    def decode(cls, bits: int) -> _Descriptor:
        if bits >> 49 & 7:
            raise EmulatorError("matrix descriptor: base offsets are not supported")
        width = {0: 0, 1: 128, 2: 64, 3: 32}[bits >> 62]
        return cls((bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, width)

    def offsets(self, rows: int, k: int, size: int, transposed: bool) -> np.ndarray:
        """(rows, k) offsets in shared memory of a matrix with `rows` along M or N; transposed: those contiguous."""
        r, c = np.ogrid[:rows, :k]
        if not transposed:
            width = self.width or 16
            c = c * size
            if self.width:  # rows of `width` bytes in groups of eight; all of k lies in one row
                if int(c.max()) >= width:
                    raise EmulatorError(f"matrix descriptor: k of {k * size} bytes in a swizzle of {width}")
                offset = self.start + r // 8 * self.stride + r % 8 * width + c
            else:
                offset = self.start + r // 8 * self.stride + r % 8 * 16 + c // 16 * self.leading + c % 16
        elif self.width:
            # ((16 bytes, width / 16, m), (8, k)) : ((1, 16 bytes, leading), (width, stride))
            byte = r * size
            offset = self.start + byte // self.width * self.leading + byte % self.width
            offset = offset + c % 8 * self.width + c // 8 * self.stride
        else:
            byte = r * size
            offset = self.start + byte // 16 * self.stride + byte % 16 + c % 8 * 16 + c // 8 * self.leading
        return _swizzle(offset, self.width)

    def read(self, cta: _Cta, rows: int, k: int, kind: str, transposed: bool, *issued: Any) -> np.ndarray:
        """(rows, k) float32; issued: reader and fences, as in `gather_async`."""
        size = _ELEMENT[kind]().itemsize
        offset = self.offsets(rows, k, size, transposed)
        raw = cta.gather_async(offset[..., None] + np.arange(size), *issued)
        return _DECODE[kind](np.ascontiguousarray(raw).view(_ELEMENT[kind])[..., 0])


# --- instructions ---

_BLOCK, _EXIT = "block", "exit"  # what an instruction returns when the warp has to wait or ends; a number: a jump
_Getter = Callable[[_Warp], np.ndarray]
_Run = Callable[[_Warp, "np.ndarray | None"], Any]


class _Compiler:
    """Turns the statements of a program into functions (warp, active lanes or None for all)."""

    def __init__(self, program: _Program) -> None:
        self.program = program
        self.numbers = {name: i for i, name in enumerate(program.register_names)}

    def compile(self, statement: str) -> tuple[str, _Run]:
        guard = re.match(r"@(!?)\s*(\S+)\s+(.*)", statement)
        body = guard[3] if guard else statement
        op, _, rest = body.partition(" ")
        run = self.instruction(op, _split(rest))
        if guard is None:
            return op, run
        predicate, negated = self.numbers[guard[2]], bool(guard[1])

        def guarded(warp: _Warp, mask: np.ndarray | None) -> Any:
            lanes = warp.regs[predicate]
            if lanes is None:
                raise EmulatorError(f"{guard[2]} read before it was written")
            lanes = ~lanes if negated else lanes
            if mask is not None:
                lanes = lanes & mask
            if lanes.all():
                return run(warp, None)
            return run(warp, lanes) if lanes.any() else None

        return op, guarded

    # operands

    def source(self, text: str, dtype: Any) -> _Getter:
        """A getter of an operand as 32 lanes of `dtype`."""
        dtype = np.dtype(dtype)
        if text in self.numbers:
            number = self.numbers[text]
            kind = self.program.register_types[text]
            if dtype.kind == "b" or kind == "pred":
                return lambda warp: warp.regs[number]
            if int(kind[1:]) == 8 * dtype.itemsize:
                return lambda warp: warp.regs[number].view(dtype)
            unsigned = UINT[dtype.itemsize]
            return lambda warp: warp.regs[number].astype(unsigned).view(dtype)
        if text.startswith("%"):
            return lambda warp: warp.special[text].astype(UINT[dtype.itemsize]).view(dtype)
        if text == "global_smem":
            return lambda warp: np.full(LANES, warp.cta.base, UINT[dtype.itemsize]).view(dtype)
        if any(text == name for _, name in self.program.parameters):
            return lambda warp: np.full(LANES, warp.cta.launch.parameters[text], np.uint64).view(dtype)
        if dtype.kind == "b":
            value: Any = np.full(LANES, bool(int(text)))
        elif match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            value = np.full(LANES, int(match[1], 16), np.uint32).view(dtype)
        elif match := re.fullmatch(r"(-?)(0[xX][0-9A-Fa-f]+|\d+)U?", text):
            integer = int(match[2], 0) * (-1 if match[1] else 1)
            if dtype.kind == "f":
                raise EmulatorError(f"integer {text} as a float")
            value = np.full(LANES, integer % (1 << 8 * dtype.itemsize), UINT[dtype.itemsize]).view(dtype)
        else:
            raise EmulatorError(f"unknown operand {text!r}")
        return lambda warp: value

    def destination(self, text: str) -> Callable[[_Warp, np.ndarray | None, np.ndarray], None]:
        if text == "_":
            return lambda warp, mask, value: None
        number = self.numbers[text]
        kind = self.program.register_types[text]
        dtype = np.dtype(bool) if kind == "pred" else np.dtype(UINT[int(kind[1:]) // 8])

        def put(warp: _Warp, mask: np.ndarray | None, value: np.ndarray) -> None:
            if value.dtype != dtype:
                if value.dtype.itemsize == dtype.itemsize and dtype.kind != "b":
                    value = value.view(dtype)
                else:  # widen as the value's own type says
                    value = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64).astype(dtype)
            if mask is not None:
                old = warp.regs[number]
                value = np.where(mask, value, 0 if old is None else old).astype(dtype)
            warp.regs[number] = value

        return put

    def address(self, text: str) -> _Getter:
        """[register + constant] as int64."""
        match = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if match is None:
            raise EmulatorError(f"unknown address {text!r}")
        offset = int(match[2], 0) if match[2] else 0
        wide = self.program.register_types.get(match[1], "b64" if "param" in match[1] else "b32") == "b64"
        base = self.source(match[1], np.uint64 if wide else np.uint32)
        return lambda warp: base(warp).astype(np.int64) + offset

    @staticmethod
    def vector(text: str) -> list[str]:
        return _split(text[1:-1]) if text.startswith("{") else [text]

    @staticmethod
    def type_of(name: str) -> np.dtype:
        if name == "pred":
            return np.dtype(bool)
        match = re.fullmatch(r"([busf])(\d+)", name)
        if match is None or (match[1] == "f" and match[2] not in ("32", "64")):
            raise EmulatorError(f"type {name} is not supported")
        return np.dtype({"b": "u", "u": "u", "s": "i", "f": "f"}[match[1]] + str(int(match[2]) // 8))

    def simple(self, operands: list[str], function: Callable[..., np.ndarray], *types: Any) -> _Run:
        put = self.destination(operands[0])
        get = [self.source(text, t) for text, t in zip(operands[1:], types, strict=True)]
        if len(get) == 1:
            (a,) = get
            return lambda warp, mask: put(warp, mask, function(a(warp)))
        if len(get) == 2:
            a, b = get
            return lambda warp, mask: put(warp, mask, function(a(warp), b(warp)))
        a, b, c = get
        return lambda warp, mask: put(warp, mask, function(a(warp), b(warp), c(warp)))

    # instructions, by the first part of their name

    def instruction(self, op: str, operands: list[str]) -> _Run:
        parts = op.split(".")
        if op in _NOTHING or any(op.startswith(prefix) for prefix in _NOTHING_PREFIXES):
            return lambda warp, mask: None
        name = "_" + re.sub(r"\W", "_", parts[0])
        if parts[0] == "cp":
            name = "_cp_async_bulk" if "bulk" in parts else "_cp_async"
        elif parts[0] in ("ld", "st"):
            space = next((p for p in parts[1:] if p.split("::")[0] in ("param", "global", "shared")), "")
            name = "_load_parameter" if space == "param" else f"_{parts[0]}"
        elif parts[0] in _ARITHMETIC:
            name = "_arithmetic"
        elif op.startswith("mma.sp"):
            name = "_mma_sp"
        method = getattr(self, name, None)
        if method is None:
            raise EmulatorError(f"instruction {op} is not supported")
        return method(parts, operands)

    def _mov(self, parts: list[str], operands: list[str]) -> _Run:
        target, source = operands
        dtype = self.type_of(parts[-1])
        if target.startswith("{"):
            names = self.vector(target)
            part = UINT[dtype.itemsize // len(names)]
            put = [self.destination(name) for name in names]
            get = self.source(source, dtype)

            def unpack(warp: _Warp, mask: np.ndarray | None) -> None:
                pieces = np.ascontiguousarray(get(warp)).view(part).reshape(LANES, len(names))
                for i, store in enumerate(put):
                    store(warp, mask, pieces[:, i].copy())

            return unpack
        store = self.destination(target)
        if source.startswith("{"):
            names = self.vector(source)
            part = np.dtype(UINT[dtype.itemsize // len(names)])
            pieces = [self.source(name, part) for name in names]
            return lambda warp, mask: store(
                warp, mask, np.stack([get(warp) for get in pieces], axis=1).view(dtype).reshape(LANES)
            )
        if source in self.numbers:
            number = self.numbers[source]

            def copy(warp: _Warp, mask: np.ndarray | None) -> None:
                value = warp.regs[number]
                if not isinstance(value, np.ndarray):
                    raise TypeError
                store(warp, mask, value)

            return copy
        get = self.source(source, dtype)
        return lambda warp, mask: store(warp, mask, get(warp))

    def _arithmetic(self, parts: list[str], operands: list[str]) -> _Run:
        name, dtype = parts[0], self.type_of(parts[-1])
        if name in ("mul", "mad") and "wide" in parts:
            wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
            if name == "mul":
                return self.simple(operands, lambda a, b: a.astype(wide) * b.astype(wide), dtype, dtype)
            return self.simple(operands, lambda a, b, c: a.astype(wide) * b.astype(wide) + c, dtype, dtype, wide)
        if name == "mul" and "hi" in parts:
            bits = 8 * dtype.itemsize

            def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
                product = a.astype(object) * b.astype(object) >> bits
                return np.array(product % (1 << bits), dtype=UINT[dtype.itemsize])

            return self.simple(operands, high, dtype, dtype)
        if name in ("shl", "shr"):
            bits = 8 * dtype.itemsize

            def shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
                amount = np.minimum(b, bits - 1).astype(a.dtype)
                if name == "shr" and a.dtype.kind == "i":
                    return a >> amount
                return np.where(b < bits, a << amount if name == "shl" else a >> amount, 0).astype(a.dtype)

            return self.simple(operands, shift, dtype, np.uint32)
        function = _ARITHMETIC[name]
        with_zero = name in ("neg", "abs", "not", "popc", "rcp", "ex2", "lg2", "sqrt", "rsqrt", "tanh")
        count = 1 if with_zero else 3 if name in ("mad", "fma") else 2
        return self.simple(operands, function, *[dtype] * count)

    def _setp(self, parts: list[str], operands: list[str]) -> _Run:
        dtype = self.type_of(parts[-1])
        comparison = parts[1]
        if (
            dtype.kind == "f"
            and comparison.endswith("u")
            and comparison not in ("neu", "equ", "ltu", "gtu", "leu", "geu")
        ):
            raise EmulatorError(f"setp.{comparison} is not supported")
        function = _COMPARE[comparison[:2]]
        a, b = (self.source(text, dtype) for text in operands[1:3])
        unordered = dtype.kind == "f" and len(comparison) == 3

        def compare(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            result = function(x, y)
            return result | np.isnan(x) | np.isnan(y) if unordered else result

        put, *inverse = [self.destination(name) for name in operands[0].split("|")]

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            result = compare(a(warp), b(warp))
            if len(parts) > 3 and parts[2] in ("and", "or", "xor"):
                result = _LOGIC[parts[2]](result, third(warp))
            put(warp, mask, result)
            for store in inverse:
                store(warp, mask, ~result)

        third = self.source(operands[3], bool) if len(operands) > 3 else None
        return run

    def _selp(self, parts: list[str], operands: list[str]) -> _Run:
        dtype = self.type_of(parts[-1])
        return self.simple(operands, lambda a, b, p: np.where(p, a, b), dtype, dtype, bool)

    def _bfe(self, parts: list[str], operands: list[str]) -> _Run:
        dtype = self.type_of(parts[-1])
        unsigned, bits = np.dtype(UINT[dtype.itemsize]), 8 * dtype.itemsize

        def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
            if (length == 0).any() or (position + length > bits).any():
                raise EmulatorError("bfe beyond the register is not supported")
            # up to the top and down again, which extends the sign if there is one
            up = a.view(unsigned) << (bits - position - length).astype(unsigned)
            return up.view(dtype) >> (bits - length).astype(dtype)

        return self.simple(operands, extract, dtype, np.uint32, np.uint32)

    def _bfi(self, parts: list[str], operands: list[str]) -> _Run:
        dtype = self.type_of(parts[-1])
        put = self.destination(operands[0])
        a, b = (self.source(text, dtype) for text in operands[1:3])
        position, length = (int(text, 0) for text in operands[3:5])
        field_mask = dtype.type(((1 << length) - 1) << position)

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            put(warp, mask, (b(warp) & ~field_mask) | ((a(warp) << dtype.type(position)) & field_mask))

        return run

    def _prmt(self, parts: list[str], operands: list[str]) -> _Run:
        if parts != ["prmt", "b32"]:
            raise EmulatorError(f"{'.'.join(parts)} is not supported")

        def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
            pool = np.stack([a, b], axis=1).view(np.uint8).reshape(LANES, 8)
            out = np.zeros((LANES, 4), np.uint8)
            for i in range(4):
                pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
                byte = pool[LANE, pick & 7]
                out[:, i] = np.where(pick & 8, np.where(byte & 128, 255, 0), byte)
            return out.view(np.uint32).reshape(LANES)

        return self.simple(operands, permute, np.uint32, np.uint32, np.uint32)

    def _lop3(self, parts: list[str], operands: list[str]) -> _Run:
        table = int(operands.pop(), 0)

        def combine(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            out = np.zeros_like(a)
            for i in range(8):
                if table >> i & 1:
                    out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            return out

        return self.simple(operands, combine, np.uint32, np.uint32, np.uint32)

    def _shf(self, parts: list[str], operands: list[str]) -> _Run:
        left = parts[1] == "l"

        def funnel(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
            amount = amount & 31 if parts[2] == "wrap" else np.minimum(amount, 32)
            both = high.astype(np.uint64) << np.uint64(32) | low
            both = both << amount.astype(np.uint64) >> np.uint64(32) if left else both >> amount.astype(np.uint64)
            return both.astype(np.uint32)

        return self.simple(operands, funnel, np.uint32, np.uint32, np.uint32)

    def _cvt(self, parts: list[str], operands: list[str]) -> _Run:
        to, source = parts[-2:]
        put = self.destination(operands[0])
        if source == "f32" and to in ("bf16x2", "f16x2"):
            high, low = (self.source(text, np.float32) for text in operands[1:])
            half = _to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)

            def pack(warp: _Warp, mask: np.ndarray | None) -> None:
                pair = np.stack([half(low(warp)), half(high(warp))], axis=1)
                put(warp, mask, pair.view(np.uint32).reshape(LANES))

            return pack
        if "bf16" in (to, source) or "f16" in (to, source):
            if {to, source} == {"f32", "bf16"} or {to, source} == {"f32", "f16"}:
                if to == "f32":
                    get, decode = self.source(operands[1], np.uint16), _DECODE[source]
                    return lambda warp, mask: put(warp, mask, decode(get(warp)))
                get = self.source(operands[1], np.float32)
                if to == "bf16":
                    return lambda warp, mask: put(warp, mask, _to_bf16(get(warp)))
                return lambda warp, mask: put(warp, mask, get(warp).astype(np.float16).view(np.uint16))
            raise EmulatorError(f"{'.'.join(parts)} is not supported")
        a, b = self.type_of(to), self.type_of(source)
        if a.kind == "f" and b.kind == "f" and a != b:
            raise EmulatorError(f"{'.'.join(parts)} is not supported")
        if b.kind == "f" and a.kind != "f":
            rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[parts[1]]
            low, high_end = np.iinfo(a).min, np.iinfo(a).max
            get = self.source(operands[1], b)
            return lambda warp, mask: put(
                warp, mask, np.clip(np.nan_to_num(rounding(get(warp).astype(np.float64))), low, high_end).astype(a)
            )
        get = self.source(operands[1], b)
        return lambda warp, mask: put(warp, mask, get(warp).astype(a))

    def _cvta(self, parts: list[str], operands: list[str]) -> _Run:
        return self._mov(["mov", "u64"], operands)

    def _mapa(self, parts: list[str], operands: list[str]) -> _Run:
        return self.simple(operands, lambda a, rank: (a & 0xFFFFFF) | (rank << 24), np.uint32, np.uint32)

    # control

    def _bra(self, parts: list[str], operands: list[str]) -> _Run:
        target = self.program.labels[operands[0]]

        def run(warp: _Warp, mask: np.ndarray | None) -> Any:
            return target if mask is None else (target, mask)

        return run

    def _brx(self, parts: list[str], operands: list[str]) -> _Run:
        get = self.source(operands[0], np.uint32)
        targets = [self.program.labels[name] for name in self.program.tables[operands[1]]]

        def run(warp: _Warp, mask: np.ndarray | None) -> Any:
            index = get(warp) if mask is None else get(warp)[mask]
            if (index != index[0]).any():
                raise EmulatorError("brx.idx diverges")
            return targets[int(index[0])] if mask is None else (targets[int(index[0])], mask)

        return run

    def _ret(self, parts: list[str], operands: list[str]) -> _Run:
        return lambda warp, mask: _EXIT if mask is None else (_EXIT, mask)

    _exit = _ret

    def _trap(self, parts: list[str], operands: list[str]) -> _Run:
        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            raise EmulatorError("trap")

        return run

    # memory

    def _load_parameter(self, parts: list[str], operands: list[str]) -> _Run:
        put = self.destination(operands[0])
        name = operands[1][1:-1].strip()
        dtype = UINT[self.type_of(parts[-1]).itemsize]

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            value = warp.cta.launch.parameters[name]
            put(warp, mask, np.full(LANES, value % (1 << 8 * np.dtype(dtype).itemsize), np.uint64).astype(dtype))

        return run

    @staticmethod
    def space(parts: list[str]) -> str:
        found = [p for p in parts[1:] if p.split("::")[0] in ("global", "shared")]
        if len(found) != 1 or found[0] == "shared::cluster":
            raise EmulatorError(f"{'.'.join(parts)}: state space not supported")
        return found[0].split("::")[0]

    def _ld(self, parts: list[str], operands: list[str]) -> _Run:
        shared = self.space(parts) == "shared"
        names = self.vector(operands[0])
        put = [self.destination(name) for name in names]
        dtype = self.type_of(parts[-1])
        size, count = dtype.itemsize, len(names)
        address = self.address(operands[1])

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            lanes = address(warp) if mask is None else address(warp)[mask]
            if shared:
                values = warp.cta.load(lanes, size, count)
            else:
                memory = warp.cta.launch.memory
                values = memory.views[size][memory.index(lanes, size, size * count)[:, None] + np.arange(count)]
            for i, store in enumerate(put):
                value = values[:, i]
                if mask is not None:
                    value = np.zeros(LANES, value.dtype)
                    value[mask] = values[:, i]
                store(warp, mask, np.ascontiguousarray(value).view(dtype))

        return run

    def _st(self, parts: list[str], operands: list[str]) -> _Run:
        if "async" in parts:
            raise EmulatorError("st.async is not supported")
        shared = self.space(parts) == "shared"
        size = self.type_of(parts[-1]).itemsize
        get = [self.source(name, UINT[size]) for name in self.vector(operands[1])]
        address = self.address(operands[0])

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            lanes, values = address(warp), np.stack([g(warp) for g in get], axis=1)
            if mask is not None:
                lanes, values = lanes[mask], values[mask]
            if shared:
                warp.cta.store(lanes, values, warp)
            else:
                memory = warp.cta.launch.memory
                index = memory.index(lanes, size, size * len(get))
                memory.views[size][index[:, None] + np.arange(len(get))] = values

        return run

    def _ldmatrix(self, parts: list[str], operands: list[str]) -> _Run:
        self.only(parts, "m8n8", "b16")
        put = [self.destination(name) for name in self.vector(operands[0])]
        address, transposed = self.address(operands[1]), "trans" in parts

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            self.aligned(mask, "ldmatrix")
            lanes = address(warp)[: 8 * len(put)]
            rows = warp.cta.load(lanes, 2, 8).reshape(len(put), 8, 8)
            for tile, store in zip(rows, put, strict=True):
                tile = np.ascontiguousarray(tile.T if transposed else tile)
                store(warp, None, tile.reshape(LANES, 2).view(np.uint32).reshape(LANES))

        return run

    def _stmatrix(self, parts: list[str], operands: list[str]) -> _Run:
        self.only(parts, "m8n8", "b16")
        get = [self.source(name, np.uint32) for name in self.vector(operands[1])]
        address, transposed = self.address(operands[0]), "trans" in parts

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            self.aligned(mask, "stmatrix")
            tiles = [g(warp).reshape(LANES, 1).view(np.uint16).reshape(8, 8) for g in get]
            rows = np.concatenate([tile.T if transposed else tile for tile in tiles])
            warp.cta.store(address(warp)[: 8 * len(get)], np.ascontiguousarray(rows), warp)

        return run

    @staticmethod
    def only(parts: list[str], *needed: str) -> None:
        if any(part not in parts for part in needed):
            raise EmulatorError(f"{'.'.join(parts)} is not supported")

    @staticmethod
    def aligned(mask: np.ndarray | None, what: str) -> None:
        if mask is not None:
            raise EmulatorError(f"{what} needs all lanes of the warp")

    # cp.async

    def _cp_async(self, parts: list[str], operands: list[str]) -> _Run:
        if "commit_group" in parts:

            def commit(warp: _Warp, mask: np.ndarray | None) -> None:
                warp.copy_groups.append(warp.copies)
                warp.copies = []

            return commit
        if "wait_group" in parts or "wait_all" in parts:
            keep = int(operands[0], 0) if operands else 0

            def wait(warp: _Warp, mask: np.ndarray | None) -> None:
                if "wait_all" in parts:
                    warp.copy_groups.append(warp.copies)
                    warp.copies = []
                warp.finish_copies(keep)

            return wait
        if "mbarrier" in parts:
            address = self.address(operands[0])

            def arrive(warp: _Warp, mask: np.ndarray | None) -> None:
                lanes = address(warp) if mask is None else address(warp)[mask]
                barriers = [warp.cta.mbarrier(int(lane)) for lane in lanes]
                if "noinc" not in parts:
                    for barrier in barriers:
                        barrier.pending += 1
                before = [*(c for group in warp.copy_groups for c in group), *warp.copies]

                def done() -> None:
                    for copy in before:
                        copy()
                    for barrier in barriers:
                        barrier.arrive()

                warp.cta.launch.later(done)

            return arrive
        if parts[3:5] not in (["shared", "global"], ["shared::cta", "global"]):
            raise EmulatorError(f"{'.'.join(parts)} is not supported")
        width = int(operands[2], 0)
        target, source = self.address(operands[0]), self.address(operands[1])
        size = self.source(operands[3], np.uint32) if len(operands) > 3 else None

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            cta, memory = warp.cta, warp.cta.launch.memory
            active = ALL if mask is None else mask
            to = cta.offsets(target(warp)[active], width)[:, None] + np.arange(width)
            count = np.full(active.sum(), width) if size is None else size(warp)[active].astype(np.int64)
            if ((count != width) & (count != 0)).any():
                raise EmulatorError("cp.async of a part of its bytes is not supported")
            read = count > 0
            start = memory.index(source(warp)[active][read], 1, width)
            cta.check_state(cta.state[to], reading=False)
            cta.state[to] = COPYING
            finished = False

            def copy() -> None:
                nonlocal finished
                if finished:
                    return
                finished = True
                data = np.zeros(to.shape, np.uint8)
                data[read] = memory.data[start[:, None] + np.arange(width)]
                cta.data[to], cta.state[to] = data, WRITTEN
                cta.stamp[to], cta.writer[to] = cta.clock, warp.number

            if not cta.launch.lazy:
                copy()
            warp.copies.append(copy)

        return run

    # TMA

    def _cp_async_bulk(self, parts: list[str], operands: list[str]) -> _Run:
        if "commit_group" in parts:

            def commit(warp: _Warp, mask: np.ndarray | None) -> None:
                warp.store_groups.append(warp.stores)
                warp.stores = []

            return commit
        if "wait_group" in parts:
            keep = int(operands[0], 0)
            return lambda warp, mask: warp.finish_stores(keep)
        if "prefetch" in parts:
            return lambda warp, mask: None
        if "tensor" not in parts or "im2col" in parts or "reduce" in parts:
            raise EmulatorError(f"{'.'.join(parts)} is not supported")
        to_shared = next(p for p in parts[5:] if p.split("::")[0] in ("shared", "global")).startswith("shared")
        tensor_operand = operands[1] if to_shared else operands[0]
        descriptor, coordinates = _split(tensor_operand[1:-1])
        get_map = self.source(descriptor, np.uint64)
        get_at = [self.source(text, np.int32) for text in reversed(self.vector(coordinates))]
        get_shared = self.address(operands[0] if to_shared else operands[1])
        if to_shared:
            get_barrier = self.address(operands[2])
            multicast = any(p.startswith("multicast") for p in parts)
            get_ctas = self.source(operands[3], np.uint16) if multicast else None

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            launch = warp.cta.launch
            for lane in LANE if mask is None else np.nonzero(mask)[0]:
                tensor = launch.tensor_maps.get(int(get_map(warp)[lane]))
                if tensor is None:
                    raise EmulatorError(f"no tensor map at {int(get_map(warp)[lane]):#x}")
                at = [int(get(warp)[lane]) for get in get_at]
                address = int(get_shared(warp)[lane])
                if len(at) != len(tensor.shape):
                    raise EmulatorError(f"TMA: {len(at)} coordinates for a tensor map of {len(tensor.shape)}")
                if to_shared:
                    ranks = [address >> 24]
                    barrier = int(get_barrier(warp)[lane])
                    if get_ctas is not None:
                        ranks = [r for r in range(16) if int(get_ctas(warp)[lane]) >> r & 1]
                        if ranks and ranks[-1] >= len(launch.cluster):
                            raise EmulatorError(f"TMA: multicast to CTA {ranks[-1]} of {len(launch.cluster)}")
                    for rank in ranks:
                        # without multicast the barrier may be another CTA's; with it each CTA has its own
                        signal = barrier if get_ctas is None else (barrier & 0xFFFFFF) | rank << 24
                        self.tma_load(launch, tensor, at, rank, address & 0xFFFFFF, signal)
                else:
                    self.tma_store(warp, tensor, at, address)

        return run

    @staticmethod
    def tma_box(launch: _Launch, tensor: TensorMap, at: list[int], offset: int) -> tuple[np.ndarray, ...]:
        """Byte offsets (elements, size) in shared memory, those in global memory, which elements are inside."""
        size = tensor.array.itemsize
        if offset % 128:
            raise EmulatorError(f"TMA: shared address {offset} is not a multiple of 128")
        index = np.indices(tuple(tensor.box)).reshape(len(at), -1)
        position = index + np.array(at)[:, None]
        inside = ((position >= 0) & (position < np.array(tensor.shape)[:, None])).all(axis=0)
        strides = np.array([*(tensor.strides or ()), size])
        start = launch.memory.address(tensor.array) - GLOBAL_BASE + tensor.offset
        outer = start + (position * strides[:, None]).sum(axis=0)
        inner = _swizzle(offset + np.arange(index.shape[1]) * size, tensor.swizzle)
        if inside.any():
            launch.memory.index(outer[inside] + GLOBAL_BASE, size, size)
        return inner[:, None] + np.arange(size), outer[:, None] + np.arange(size), inside

    def tma_load(self, launch: _Launch, tensor: TensorMap, at: list[int], rank: int, offset: int, barrier: int) -> None:
        cta = launch.cluster[rank]
        inner, outer, inside = self.tma_box(launch, tensor, at, offset)
        if inner.max() >= cta.end or inner.min() < SHARED_BASE:
            raise EmulatorError("TMA: writes outside of the shared memory")
        cta.check_state(cta.state[inner], reading=False)
        cta.state[inner] = COPYING
        target = cta.mbarrier(barrier)

        def copy() -> None:
            cta.check_running()
            data = np.zeros(inner.shape, np.uint8)
            data[inside] = launch.memory.data[outer[inside]]
            cta.data[inner], cta.state[inner], cta.stamp[inner] = data, WRITTEN, -1
            target.deliver(inner.size)

        launch.later(copy)

    def tma_store(self, warp: _Warp, tensor: TensorMap, at: list[int], address: int) -> None:
        cta, launch = warp.cta, warp.cta.launch
        if address >> 24 != cta.rank:
            raise EmulatorError("TMA: stores from the shared memory of another CTA")
        inner, outer, inside = self.tma_box(launch, tensor, at, address & 0xFFFFFF)
        fences = cta.fences.copy()

        def copy() -> None:
            launch.memory.data[outer[inside]] = cta.gather_async(inner, warp.number, fences)[inside]

        if launch.lazy:
            warp.stores.append(copy)
        else:
            copy()
            warp.stores.append(lambda: None)

    # barriers

    def _bar(self, parts: list[str], operands: list[str]) -> _Run:
        if "warp" in parts:
            return lambda warp, mask: None
        if "cluster" in parts:
            return self.cluster_barrier(parts)
        if not {"sync", "arrive"} & set(parts):
            raise EmulatorError(f"{'.'.join(parts)} is not supported")
        number = self.source(operands[0], np.uint32)
        threads = self.source(operands[1], np.uint32) if len(operands) > 1 else None
        waits = "sync" in parts

        def run(warp: _Warp, mask: np.ndarray | None) -> Any:
            self.aligned(mask, "a barrier")
            barrier = warp.cta.barriers.setdefault(int(number(warp)[0]), _Barrier())
            if warp.awaits is None:
                count = int(threads(warp)[0]) if threads else warp.cta.launch.program.threads
                if count % LANES:
                    raise EmulatorError(f"a barrier of {count} threads is not one of whole warps")
                target = barrier.arrive(count // LANES)
                if not waits:
                    return None
                warp.awaits = target
            if barrier.done < warp.awaits:
                warp.waiting = (
                    f"barrier {int(number(warp)[0])}: {barrier.arrived} of {barrier.expected} warps are there"
                )
                return _BLOCK
            warp.awaits = None
            return None

        return run

    _barrier = _bar

    def cluster_barrier(self, parts: list[str]) -> _Run:
        def run(warp: _Warp, mask: np.ndarray | None) -> Any:
            self.aligned(mask, "barrier.cluster")
            launch = warp.cta.launch
            barrier = launch.cluster_barrier
            if "arrive" in parts:
                if warp.cluster_phase is not None:
                    raise EmulatorError("barrier.cluster.arrive twice without a wait")
                warp.cluster_phase = barrier.arrive(sum(len(cta.warps) for cta in launch.cluster))
                return None
            if warp.cluster_phase is None:
                raise EmulatorError("barrier.cluster.wait without an arrive")
            if barrier.done < warp.cluster_phase:
                warp.waiting = f"the cluster's barrier: {barrier.arrived} of {barrier.expected} warps are there"
                return _BLOCK
            warp.cluster_phase = None
            return None

        return run

    def _mbarrier(self, parts: list[str], operands: list[str]) -> _Run:
        kind = parts[1]
        if kind in ("try_wait", "test_wait"):
            return self.mbarrier_wait(parts, operands)
        arrives = kind == "arrive"
        if arrives:
            operands = operands[1:]  # the state that it returns
        address = self.address(operands[0])
        count = self.source(operands[1], np.uint32) if len(operands) > 1 else None

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            lanes = address(warp)
            for lane in LANE if mask is None else np.nonzero(mask)[0]:
                at = int(lanes[lane])
                value = int(count(warp)[lane]) if count else 1
                if kind == "init":
                    offset = int(warp.cta.offsets(lanes[lane : lane + 1], 8)[0])
                    if not 0 < value < 1 << 20:
                        raise EmulatorError(f"mbarrier.init with a count of {value}")
                    warp.cta.mbarriers[offset] = _Mbarrier(value, value)
                elif kind == "inval":
                    del warp.cta.mbarriers[int(warp.cta.offsets(lanes[lane : lane + 1], 8)[0])]
                elif kind == "expect_tx":
                    warp.cta.mbarrier(at).expect(value)
                elif kind == "complete_tx":
                    warp.cta.mbarrier(at).deliver(value)
                elif arrives and parts[2] == "expect_tx":
                    warp.cta.mbarrier(at).expect(value)
                    warp.cta.mbarrier(at).arrive()
                elif arrives:
                    warp.cta.mbarrier(at).arrive(value)
                else:
                    raise EmulatorError(f"{'.'.join(parts)} is not supported")

        return run

    def mbarrier_wait(self, parts: list[str], operands: list[str]) -> _Run:
        self.only(parts, "parity")
        put, address = self.destination(operands[0]), self.address(operands[1])
        parity = self.source(operands[2], np.uint32)
        blocks = parts[1] == "try_wait"

        def run(warp: _Warp, mask: np.ndarray | None) -> Any:
            active = LANE if mask is None else np.nonzero(mask)[0]
            at, wanted = address(warp)[active], parity(warp)[active]
            if (at != at[0]).any() or (wanted != wanted[0]).any():
                raise EmulatorError("lanes wait for different mbarriers")
            if int(at[0]) >> 24 != warp.cta.rank:
                raise EmulatorError("mbarrier wait on another CTA's")
            barrier = warp.cta.mbarrier(int(at[0]))
            # the phase before the current one is the one that counts as complete
            ready = barrier.phase % 2 != int(wanted[0]) % 2
            if not ready and blocks:
                warp.waiting = (
                    f"mbarrier {(int(at[0]) & 0xFFFFFF) - SHARED_BASE} parity {int(wanted[0])}: phase {barrier.phase} "
                    f"lacks {barrier.pending} of {barrier.count} arrivals and {barrier.transactions} bytes"
                )
                return _BLOCK
            put(warp, mask, np.full(LANES, ready))
            return None

        return run

    # warp

    def _elect(self, parts: list[str], operands: list[str]) -> _Run:
        leader, elected = (self.destination(name) for name in operands[0].split("|"))

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            first = 0 if mask is None else int(np.nonzero(mask)[0][0])
            leader(warp, mask, np.full(LANES, first, np.uint32))
            elected(warp, mask, first == LANE)

        return run

    def _shfl(self, parts: list[str], operands: list[str]) -> _Run:
        self.only(parts, "sync", "b32")
        mode = parts[2]
        put, *inside = [self.destination(name) for name in operands[0].split("|")]
        a, b, c = (self.source(text, np.uint32) for text in operands[1:4])

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            self.aligned(mask, "shfl.sync")
            step, clamp = b(warp).astype(np.int64) & 31, c(warp).astype(np.int64)
            segment, bound = clamp >> 8 & 31, clamp & 31
            limit = (LANE & segment) | (bound & ~segment)
            lower = LANE & segment
            if mode == "up":
                source = LANE - step
                ok = source >= limit
            elif mode == "down":
                source = LANE + step
                ok = source <= limit
            else:
                source = LANE ^ step if mode == "bfly" else lower | (step & ~segment)
                ok = source <= limit
            value = a(warp)[np.where(ok, source, LANE)]
            put(warp, None, value)
            for store in inside:
                store(warp, None, ok)

        return run

    def _activemask(self, parts: list[str], operands: list[str]) -> _Run:
        put = self.destination(operands[0])

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            bits = ((ALL if mask is None else mask).astype(np.uint64) << LANE.astype(np.uint64)).sum()
            put(warp, mask, np.full(LANES, bits, np.uint32))

        return run

    def _fence(self, parts: list[str], operands: list[str]) -> _Run:
        if parts[1:3] != ["proxy", "async"] and not parts[-1].startswith("async"):
            return lambda warp, mask: None

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            warp.cta.clock += 1
            warp.cta.fences[warp.number] = warp.cta.clock

        return run

    # tensor cores

    def _mma_sp(self, parts: list[str], operands: list[str]) -> _Run:
        shape, kind = next(p for p in parts if p.startswith("m16n8k")), parts[-3]
        k = int(shape[6:])
        if (kind, k) not in (("bf16", 32), ("f16", 32), ("e4m3", 64)) or parts[-4] != "f32" or parts[-2] != kind:
            raise EmulatorError(f"{'.'.join(parts)} is not supported")
        if "sp::ordered_metadata" not in parts:
            raise EmulatorError("mma.sp without ordered_metadata is not supported")
        put = [self.destination(name) for name in self.vector(operands[0])]
        a, b, c = ([self.source(name, np.uint32) for name in self.vector(text)] for text in operands[1:4])
        metadata, selector = self.source(operands[4], np.uint32), int(operands[5], 0)
        numbers = [self.numbers[name] for name in (*self.vector(operands[1]), operands[4])]
        if selector not in ((0, 1) if k == 32 else (0,)):
            raise EmulatorError(f"sparsity selector {selector} with {shape} {kind}")
        dtype = _ELEMENT[kind]
        per = 4 // dtype().itemsize
        register, lane, element = np.ogrid[:4, :LANES, :per]
        b_row = per * (lane % 4) + element + 4 * per * register
        b_column = lane // 4 + 0 * b_row
        row, column = _accumulator_map(4)

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            self.aligned(mask, "mma.sp")
            # the same A often meets several B, one after the other
            held = [warp.regs[number] for number in numbers]
            if selector != warp.dense_of[0] or any(x is not y for x, y in zip(held, warp.dense_of[1], strict=True)):
                warp.dense = _decompress([g(warp) for g in a], metadata(warp), selector, kind)
                warp.dense_of = (selector, held)
            dense = warp.dense
            right = np.zeros((k, 8), np.float32)
            fragment = np.stack([g(warp) for g in b]).view(dtype).reshape(4, LANES, per)
            right[b_row, b_column] = _DECODE[kind](fragment)
            result = np.stack([g(warp) for g in c]).view(np.float32) + (dense @ right)[row, column]
            for store, value in zip(put, result, strict=True):
                store(warp, None, value)

        return run

    def _wgmma(self, parts: list[str], operands: list[str]) -> _Run:
        action = parts[1]
        if action == "fence":

            def fence(warp: _Warp, mask: np.ndarray | None) -> None:
                warp.fenced = warp.regs.copy()

            return fence
        if action == "commit_group":

            def commit(warp: _Warp, mask: np.ndarray | None) -> None:
                warp.wgmma_groups.append(warp.wgmmas)
                warp.wgmmas = []

            return commit
        if action == "wait_group":
            keep = int(operands[0], 0)
            return lambda warp, mask: warp.finish_wgmmas(keep)
        return self.wgmma_mma(parts, operands)

    def wgmma_mma(self, parts: list[str], operands: list[str]) -> _Run:
        sparse = parts[2] == "sp"
        n, k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", next(p for p in parts if p.startswith("m64n"))).groups())
        kind = parts[-1]
        expected_k = (32 if kind == "e4m3" else 16) * (2 if sparse else 1)
        if kind not in _ELEMENT or parts[-2] != kind or parts[-3] != "f32" or k != expected_k:
            raise EmulatorError(f"{'.'.join(parts)} is not supported")
        destination = [self.numbers[name] for name in self.vector(operands[0])]
        if len(destination) != n // 2:
            raise EmulatorError(f"wgmma: {len(destination)} registers for n = {n}")
        names_a = self.vector(operands[1]) if operands[1].startswith("{") else None
        get_a = [self.source(name, np.uint32) for name in names_a or ()]
        descriptor_a = None if names_a else self.source(operands[1], np.uint64)
        descriptor_b = self.source(operands[2], np.uint64)
        rest = operands[3:]
        held = [self.numbers[name] for name in names_a or ()]
        if sparse:
            metadata, selector = self.source(rest[0], np.uint32), int(rest[1], 0)
            held += [self.numbers[rest[0]]] if rest[0] in self.numbers else []
            rest = rest[2:]
            if selector not in ((0,) if kind == "e4m3" else (0, 1)):
                raise EmulatorError(f"sparsity selector {selector} with {kind}")
        scale, *signs = rest
        get_scale = self.source(scale, bool)
        flags = [int(x, 0) for x in signs]
        sign = np.float32(flags[0] * flags[1])
        transposed = flags[2:]
        transposed_a = bool(transposed[0]) if transposed and not names_a else False
        transposed_b = bool(transposed[-1]) if transposed else False
        row, column = _accumulator_map(n // 2)
        stored_k = k // 2 if sparse else k

        def uniform(get: _Getter, warp: _Warp) -> int:
            value = get(warp)
            if (value != value[0]).any():
                raise EmulatorError("wgmma: lanes hold different descriptors")
            return int(value[0])

        def run(warp: _Warp, mask: np.ndarray | None) -> None:
            self.aligned(mask, "wgmma")
            cta = warp.cta
            b = _Descriptor.decode(uniform(descriptor_b, warp))
            a = _Descriptor.decode(uniform(descriptor_a, warp)) if descriptor_a else None
            words = [g(warp) for g in get_a]
            extra = metadata(warp) if sparse else None
            accumulate = bool(get_scale(warp).all())
            issued = (warp.number, cta.fences.copy())

            def compute(start: list[np.ndarray] | None) -> list[np.ndarray]:
                if a is None:
                    left = _decompress(words, extra, selector, kind) if sparse else _dense_a(words, kind)
                elif sparse:
                    raise EmulatorError("wgmma.sp with A in shared memory is not supported")
                else:
                    tile = a.read(cta, 64, stored_k, kind, transposed_a, *issued)
                    left = tile[16 * (warp.number % 4) : 16 * (warp.number % 4) + 16]
                product = sign * (left @ b.read(cta, n, k, kind, transposed_b, *issued).T)[row, column]
                if start is not None:
                    product = np.stack(start).view(np.float32) + product
                return list(np.ascontiguousarray(product, np.float32).view(np.uint32))

            values = [warp.regs[number] for number in destination]
            names = self.program.register_names
            previous = None
            if isinstance(values[0], _InFlight):
                previous = values[0].wgmma
                if previous.destination != destination:
                    raise EmulatorError("wgmma: part of its accumulator is still to be written by another one")
            if any(isinstance(v, _InFlight) and v.wgmma is not previous for v in values):
                raise EmulatorError("wgmma: part of its accumulator is still to be written by another one")
            if not warp.fenced:
                raise EmulatorError("wgmma without a wgmma.fence before it")
            for number in [*destination, *held]:
                if warp.regs[number] is None and (accumulate or number in held):
                    raise EmulatorError(f"{names[number]} read before it was written")
                if warp.fenced[number] is not warp.regs[number]:
                    raise EmulatorError(f"wgmma: {names[number]} changed after the last wgmma.fence")
            start = (previous or values) if accumulate else None
            operands_held = {number: warp.regs[number] for number in held}
            wgmma = _Wgmma(compute, destination, start, operands_held)
            if not cta.launch.lazy:
                wgmma.result = compute(previous.result if accumulate and previous else start)
            token = _InFlight(wgmma)
            for number in destination:
                warp.regs[number] = warp.fenced[number] = token
            warp.wgmmas.append(wgmma)

        return run


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.maximum(np.abs(b), 1)
    return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype) if a.dtype.kind == "i" else quotient


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divide(a, b) * b


_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype),
    "div": _divide,
    "rem": _remainder,
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "shl": lambda a, b: a,
    "shr": lambda a, b: a,
    "rcp": lambda a: np.float32(1) / a,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: np.float32(1) / np.sqrt(a),
}
_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_LOGIC: dict[str, Callable[..., np.ndarray]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
# no effect here: register budgets, hints, order of memory accesses (which are executed in order)
_NOTHING = {"membar.cta", "membar.gl", "nop", "nanosleep.u32"}
_NOTHING_PREFIXES = ("setmaxnreg", "griddepcontrol", "prefetch", "createpolicy", "discard", "applypriority")


# --- running ---


@dataclass
class _Launch:
    program: _Program
    code: list[tuple[str, _Run]]
    memory: _GlobalMemory
    grid: tuple[int, int, int]
    size: int
    lazy: bool
    shared: int
    parameters: dict[str, int]
    tensor_maps: dict[int, TensorMap]
    random: np.random.Generator | None
    counts: Counter[str]
    cluster: list[_Cta] = field(default_factory=list)
    cluster_barrier: _Barrier = field(default_factory=_Barrier)
    pending: list[Callable[[], None]] = field(default_factory=list)
    shuffled: bool = False

    def later(self, action: Callable[[], None]) -> None:
        """Something asynchronous that a barrier tells of."""
        if self.lazy:
            self.pending.append(action)
        else:
            action()

    def run_cluster(self, ctas: list[tuple[int, int, int]]) -> None:
        self.cluster = []
        self.cluster_barrier, self.pending, self.shuffled = _Barrier(), [], False
        self.cluster.extend(_Cta(self, index, rank) for rank, index in enumerate(ctas))
        warps = [warp for cta in self.cluster for warp in cta.warps]
        while warps:
            in_order = self.random is None
            moved = sum(self.turn(warp, None) for warp in warps) > 0 if in_order else self.random_turn(warps)
            warps = [warp for warp in warps if not warp.exited]
            if warps and not moved:
                if not self.pending:
                    lines = "\n".join(self.describe(w) for w in warps)
                    raise Deadlock(f"deadlock; {len(warps)} warps wait:\n{lines}")
                which = 0 if self.random is None else int(self.random.integers(len(self.pending)))
                self.pending.pop(which)()
        if self.pending:
            raise EmulatorError(f"the kernel ends while {len(self.pending)} TMA loads are under way")

    def random_turn(self, warps: list[_Warp]) -> bool:
        """Let the first warp that can move do so; now and then reorder them, often by CTA.

        Most of the time the same warps are ahead, so that others are left far behind: races show in extremes.
        """
        if self.random.random() < 0.02 or not self.shuffled:
            self.random.shuffle(warps)
            if self.random.random() < 0.5:
                place = self.random.permutation(len(self.cluster))
                warps.sort(key=lambda warp: place[warp.cta.rank])
            self.shuffled = True
        limit = int(self.random.integers(1, 200))
        return any(self.turn(warp, limit) for warp in warps)

    def describe(self, warp: _Warp) -> str:
        pc = warp.paths[0][0]
        text = self.program.statements[pc]
        return f"  CTA {warp.cta.index} warp {warp.number} at {pc} `{text[:100]}`: {warp.waiting or 'ready'}"

    def turn(self, warp: _Warp, limit: int | None) -> bool:
        """Run a warp until it waits, ends or has had its turn; whether it did anything."""
        steps = 0
        code, counts = self.code, self.counts
        while warp.paths and (limit is None or steps < limit):
            if len(warp.paths) > 1:
                warp.paths = _merge(warp.paths)
            pc, mask = warp.paths[0]
            op, run = code[pc]
            try:
                result = run(warp, mask)
            except EmulatorError as error:
                raise type(error)(f"{error}\n{self.describe(warp)}") from None
            except (TypeError, AttributeError) as error:
                raise self.unusable_register(warp, pc, error) from error
            if result is _BLOCK:
                return steps > 0
            warp.waiting = ""
            steps += 1
            counts[op] += 1
            if result is None:
                warp.paths[0] = (pc + 1, mask)
            elif result is _EXIT:
                warp.paths.pop(0)
                self.check_exit(warp)
            elif isinstance(result, int):
                warp.paths[0] = (result, mask)
            else:
                _diverge(warp, pc, mask, *result)
                if warp.exited:
                    self.check_exit(warp)
        return steps > 0

    def unusable_register(self, warp: _Warp, pc: int, error: Exception) -> Exception:
        """A TypeError of numpy means that a register holds nothing, or a result that is still to come."""
        statement = self.program.statements[pc]
        names = [name for name in re.findall(r"%?[\w#]+", statement) if name in self.program.register_types]
        values = {name: warp.regs[self.program.register_names.index(name)] for name in names}
        reason = {name: "a wgmma has to write it" for name in names if isinstance(values[name], _InFlight)}
        reason = reason or {name: "it is not written" for name in names if values[name] is None}
        for name, why in reason.items():
            return EmulatorError(f"{name} read while {why}\n{self.describe(warp)}")
        return error

    def check_exit(self, warp: _Warp) -> None:
        if warp.paths:
            return
        where = f"CTA {warp.cta.index} warp {warp.number} ends"
        if warp.wgmmas or warp.wgmma_groups:
            raise EmulatorError(f"{where} while a wgmma is in flight")
        if warp.stores or warp.store_groups:
            raise EmulatorError(f"{where} without having waited for its TMA stores")
        if warp.cluster_phase is not None:
            raise EmulatorError(f"{where} between barrier.cluster.arrive and wait")


def _merge(paths: list[tuple[int, np.ndarray | None]]) -> list[tuple[int, np.ndarray | None]]:
    """The paths by pc, those at the same one joined."""
    joined: dict[int, np.ndarray] = {}
    for pc, mask in paths:
        lanes = ALL if mask is None else mask
        joined[pc] = joined[pc] | lanes if pc in joined else lanes
    return [(pc, None if joined[pc].all() else joined[pc]) for pc in sorted(joined)]


def _diverge(warp: _Warp, pc: int, mask: np.ndarray | None, target: Any, taken: np.ndarray) -> None:
    """Lanes `taken` of the path at pc go to `target` (or end), the others on."""
    others = (ALL if mask is None else mask) & ~taken
    warp.paths.pop(0)
    if target is not _EXIT:
        warp.paths.append((target, taken))
    if others.any():
        warp.paths.append((pc + 1, others))
    warp.paths = _merge(warp.paths)


def _unsupported(message: str) -> _Run:
    def run(warp: _Warp, mask: np.ndarray | None) -> None:
        raise EmulatorError(message)

    return run


class Emulator:
    """One kernel; see the top of this file."""

    def __init__(self, ptx: str) -> None:
        self.program = _parse(ptx)
        compiler = _Compiler(self.program)
        self.code = []
        for statement in self.program.statements:
            try:
                self.code.append(compiler.compile(statement))
            except (EmulatorError, KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
                # an error only where the kernel comes to it
                self.code.append((statement, _unsupported(f"cannot execute `{statement}`: {error!r}")))

    def launch(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[Any],
        cluster: int | None = None,
        lazy: bool = True,
        seed: int | None = None,
        only: Sequence[tuple[int, int, int]] | None = None,
        shared: int = 231424,
    ) -> Counter[str]:
        """Run the grid; see the top of this file."""
        size = cluster or self.program.cluster
        if grid[0] % size:
            raise ValueError(f"grid must be whole clusters of {size} along x; found {grid}")
        if len(arguments) > len(self.program.parameters):
            raise ValueError(
                f"{self.program.name} has {len(self.program.parameters)} parameters; {len(arguments)} given"
            )
        arrays = [a.array if isinstance(a, (Pointer, TensorMap)) else a for a in arguments]
        memory = _GlobalMemory([a for a in arrays if isinstance(a, np.ndarray)])
        parameters, tensor_maps = dict.fromkeys((name for _, name in self.program.parameters), 0), {}
        for i, ((kind, name), value) in enumerate(zip(self.program.parameters, arguments, strict=False)):
            if isinstance(value, TensorMap) != (kind == "tensor map"):
                raise ValueError(f"argument {i} must be {'a TensorMap' if kind == 'tensor map' else 'of type ' + kind}")
            if isinstance(value, TensorMap):
                parameters[name] = TENSOR_MAP_BASE + 128 * i
                tensor_maps[parameters[name]] = value
            elif isinstance(value, np.ndarray):
                parameters[name] = memory.address(value)
            elif isinstance(value, Pointer):
                parameters[name] = memory.address(value.array) + value.offset
            elif isinstance(value, float):
                parameters[name] = int(np.float32(value).view(np.uint32))
            else:
                parameters[name] = int(value)
        random = None if seed is None else np.random.default_rng(seed)
        launch = _Launch(
            self.program, self.code, memory, grid, size, lazy, shared, parameters, tensor_maps, random, Counter()
        )
        wanted = None if only is None else set(only)
        with np.errstate(all="ignore"):
            for z in range(grid[2]) if wanted is None else sorted({c[2] for c in wanted}):
                for y in range(grid[1]) if wanted is None else sorted({c[1] for c in wanted}):
                    for x in (
                        range(0, grid[0], size) if wanted is None else sorted({c[0] // size * size for c in wanted})
                    ):
                        ctas = [(x + i, y, z) for i in range(size)]
                        if wanted is None or wanted.issuperset(ctas):
                            launch.run_cluster(ctas)
        memory.write_back()
        return launch.counts
