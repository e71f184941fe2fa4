"""wgmma: products of four warps, which run while the warps go on; each computes 16 of the 64 rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import EmulatorError
from ..in_flight import InFlight, Wgmma
from ..number_formats import ELEMENT
from .fragments import accumulator_map, decompress, dense_a
from .matrix_descriptor import MatrixDescriptor
from .operands import Getter, Operands, Run, all_lanes, unsupported, vector

if TYPE_CHECKING:
    from ..warp import Warp


def _wgmma(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    action = parts[1]
    if action == "fence":

        def fence(warp: Warp, mask: np.ndarray | None) -> None:
            warp.fenced = warp.regs.copy()

        return fence
    if action == "commit_group":
        return lambda warp, mask: warp.wgmmas.commit()
    if action == "wait_group":
        keep = int(operands[0], 0)
        return lambda warp, mask: warp.wgmmas.finish(keep)
    return _Multiply(resolve, parts, operands).issue


class _Multiply:
    """wgmma.mma_async: D, A, B, [metadata, selector,] whether D is added to, the signs of A and B, [transpositions].

    A is registers or a descriptor, B a descriptor; with 16-bit types those in shared memory may be transposed.
    """

    def __init__(self, resolve: Operands, parts: list[str], operands: list[str]) -> None:
        self.sparse, self.kind = parts[2] == "sp", parts[-1]
        shape = next(p for p in parts if p.startswith("m64n"))
        self.n, self.k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
        expected_k = (32 if self.kind == "e4m3" else 16) * (2 if self.sparse else 1)
        if self.kind not in ELEMENT or parts[-2] != self.kind or parts[-3] != "f32" or self.k != expected_k:
            raise unsupported(parts)
        result, a, b, *rest = operands
        self.names = resolve.program.register_names
        self.destination = [resolve.numbers[name] for name in vector(result)]
        if len(self.destination) != self.n // 2:
            raise EmulatorError(f"wgmma: {len(self.destination)} registers for n = {self.n}")
        self.row, self.column = accumulator_map(self.n // 2)
        self.from_registers = a.startswith("{")
        if self.sparse and not self.from_registers:
            raise EmulatorError("wgmma.sp with A in shared memory is not supported")
        names_a = vector(a) if self.from_registers else []
        self.a = [resolve.source(name, np.uint32) for name in names_a]
        self.a_descriptor = None if self.from_registers else resolve.source(a, np.uint64)
        self.b_descriptor = resolve.source(b, np.uint64)
        self.held = [resolve.numbers[name] for name in names_a]
        if self.sparse:
            metadata, selector, *rest = rest
            self.metadata, self.selector = resolve.source(metadata, np.uint32), int(selector, 0)
            if metadata in resolve.numbers:
                self.held.append(resolve.numbers[metadata])
            if self.selector not in ((0,) if self.kind == "e4m3" else (0, 1)):
                raise EmulatorError(f"sparsity selector {self.selector} with {self.kind}")
        scale, *flags = rest
        self.scale = resolve.source(scale, bool)
        sign_a, sign_b, *transposed = (int(flag, 0) for flag in flags)
        self.sign = np.float32(sign_a * sign_b)
        self.transposed_a = bool(transposed[0]) if transposed else False
        self.transposed_b = bool(transposed[-1]) if transposed else False

    def issue(self, warp: Warp, mask: np.ndarray | None) -> None:
        all_lanes(mask, "wgmma")
        accumulates = bool(self.scale(warp).all())
        previous = self.previous(warp)
        self.check_fence(warp, accumulates)
        start = None
        if accumulates:
            start = previous or [warp.regs[number] for number in self.destination]
        wgmma = Wgmma(
            self.computation(warp), self.destination, start, {number: warp.regs[number] for number in self.held}
        )
        if not warp.cta.launch.lazy:
            wgmma.execute()
        token = InFlight(wgmma)
        for number in self.destination:
            warp.regs[number] = warp.fenced[number] = token
        warp.wgmmas.open.append(lambda: wgmma.finish(warp))

    def previous(self, warp: Warp) -> Wgmma | None:
        """The one in flight with the same accumulator."""
        values = [warp.regs[number] for number in self.destination]
        previous = values[0].wgmma if isinstance(values[0], InFlight) else None
        if (previous and previous.destination != self.destination) or any(
            isinstance(value, InFlight) and value.wgmma is not previous for value in values
        ):
            raise EmulatorError("wgmma: part of its accumulator is still to be written by another one")
        return previous

    def check_fence(self, warp: Warp, accumulates: bool) -> None:
        """Its registers are written, and a wgmma.fence has come since."""
        if not warp.fenced:
            raise EmulatorError("wgmma without a wgmma.fence before it")
        for number in [*self.destination, *self.held]:
            if warp.regs[number] is None and (accumulates or number in self.held):
                raise EmulatorError(f"{self.names[number]} read before it was written")
            if warp.fenced[number] is not warp.regs[number]:
                raise EmulatorError(f"wgmma: {self.names[number]} changed after the last wgmma.fence")

    def computation(self, warp: Warp) -> Callable[[list[np.ndarray] | None], list[np.ndarray]]:
        """With the registers as they are now: from the accumulator (None: zeros) to the result."""
        memory, kind = warp.cta.memory, self.kind
        issued = (warp.number, memory.fences.copy())
        b = MatrixDescriptor.decode(_uniform(self.b_descriptor, warp))
        words = [get(warp) for get in self.a]
        if self.sparse:
            metadata = self.metadata(warp)
        elif not self.from_registers:
            a = MatrixDescriptor.decode(_uniform(self.a_descriptor, warp))

        def left() -> np.ndarray:
            if self.sparse:
                return decompress(words, metadata, self.selector, kind)
            if self.from_registers:
                return dense_a(words, kind)
            first = 16 * (warp.number % 4)
            return a.read(memory, 64, self.k, kind, self.transposed_a, *issued)[first : first + 16]

        def compute(start: list[np.ndarray] | None) -> list[np.ndarray]:
            right = b.read(memory, self.n, self.k, kind, self.transposed_b, *issued)
            product = self.sign * (left() @ right.T)[self.row, self.column]
            if start is not None:
                product = np.stack(start).view(np.float32) + product
            return list(np.ascontiguousarray(product, np.float32).view(np.uint32))

        return compute


def _uniform(get: Getter, warp: Warp) -> int:
    value = get(warp)
    if (value != value[0]).any():
        raise EmulatorError("wgmma: lanes hold different descriptors")
    return int(value[0])


TABLE = {"wgmma": _wgmma}
