"""Between registers: moves, packing and conversions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..lanes import LANES
from ..number_formats import DECODE, ENCODE, UINT
from ..shared_memory import OFFSET, RANK_BITS
from .operands import Operands, Run, type_of, unsupported, vector

if TYPE_CHECKING:
    from ..warp import Warp


def _mov(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    target, source = operands
    dtype = type_of(parts[-1])
    if target.startswith("{"):
        return _unpack(resolve, dtype, vector(target), source)
    if source.startswith("{"):
        return _pack(resolve, dtype, target, vector(source))
    store = resolve.destination(target)
    if source in resolve.numbers:
        number = resolve.numbers[source]

        def copy(warp: Warp, mask: np.ndarray | None) -> None:
            value = warp.regs[number]
            if not isinstance(value, np.ndarray):
                raise TypeError
            store(warp, mask, value)

        return copy
    get = resolve.source(source, dtype)
    return lambda warp, mask: store(warp, mask, get(warp))


def _unpack(resolve: Operands, dtype: np.dtype, targets: list[str], source: str) -> Run:
    part = UINT[dtype.itemsize // len(targets)]
    put = [resolve.destination(name) for name in targets]
    get = resolve.source(source, dtype)

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        pieces = np.ascontiguousarray(get(warp)).view(part).reshape(LANES, len(put))
        for i, store in enumerate(put):
            store(warp, mask, pieces[:, i].copy())

    return run


def _pack(resolve: Operands, dtype: np.dtype, target: str, sources: list[str]) -> Run:
    part = np.dtype(UINT[dtype.itemsize // len(sources)])
    store = resolve.destination(target)
    pieces = [resolve.source(name, part) for name in sources]
    return lambda warp, mask: store(
        warp, mask, np.stack([get(warp) for get in pieces], axis=1).view(dtype).reshape(LANES)
    )


def _cvt(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    to, source = parts[-2:]
    if source == "f32" and to in ("bf16x2", "f16x2"):
        half = ENCODE[to.removesuffix("x2")]
        return resolve.simple(
            operands,
            lambda high, low: np.stack([half(low), half(high)], axis=1).view(np.uint32).reshape(LANES),
            np.float32,
            np.float32,
        )
    if to == "f32" and source in ("bf16", "f16"):
        return resolve.simple(operands, DECODE[source], np.uint16)
    a, b = type_of(to), type_of(source)
    if "f" in (a.kind, b.kind):
        raise unsupported(parts)
    return resolve.simple(operands, lambda x: x.astype(a), b)


def _cvta(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    return _mov(resolve, ["mov", "u64"], operands)


def _mapa(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    return resolve.simple(
        operands, lambda address, rank: (address & OFFSET) | (rank << RANK_BITS), np.uint32, np.uint32
    )


TABLE = {"mov": _mov, "cvt": _cvt, "cvta": _cvta, "mapa": _mapa}
