"""Synchronous loads and stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import EmulatorError
from ..lanes import LANES
from ..number_formats import UINT
from .operands import Operands, Run, all_lanes, require, type_of, unsupported, vector

if TYPE_CHECKING:
    from ..warp import Warp


def _space(parts: list[str]) -> str:
    found = [p for p in parts[1:] if p.split("::")[0] in ("param", "global", "shared")]
    if len(found) != 1 or found[0] == "shared::cluster":
        raise EmulatorError(f"{'.'.join(parts)}: state space not supported")
    return found[0].split("::")[0]


def _ld(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    space = _space(parts)
    if space == "param":
        return _load_parameter(resolve, parts, operands)
    shared = space == "shared"
    put = [resolve.destination(name) for name in vector(operands[0])]
    dtype = type_of(parts[-1])
    size, count = dtype.itemsize, len(put)
    address = resolve.address(operands[1])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        at = address(warp) if mask is None else address(warp)[mask]
        memory = warp.cta.memory if shared else warp.cta.launch.memory
        values = memory.load(at, size, count)
        for i, store in enumerate(put):
            value = values[:, i]
            if mask is not None:
                value = np.zeros(LANES, value.dtype)
                value[mask] = values[:, i]
            store(warp, mask, np.ascontiguousarray(value).view(dtype))

    return run


def _load_parameter(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    name = operands[1][1:-1].strip()
    dtype = UINT[type_of(parts[-1]).itemsize]
    put = resolve.destination(operands[0])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        value = warp.cta.launch.parameters[name]
        put(warp, mask, np.full(LANES, value % (1 << 8 * np.dtype(dtype).itemsize), np.uint64).astype(dtype))

    return run


def _st(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    if "async" in parts:
        raise unsupported(parts)
    shared = _space(parts) == "shared"
    size = type_of(parts[-1]).itemsize
    get = [resolve.source(name, UINT[size]) for name in vector(operands[1])]
    address = resolve.address(operands[0])

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        at, values = address(warp), np.stack([g(warp) for g in get], axis=1)
        if mask is not None:
            at, values = at[mask], values[mask]
        if shared:
            warp.cta.memory.store(at, values, warp.number)
        else:
            warp.cta.launch.memory.store(at, values)

    return run


def _ldmatrix(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    require(parts, "m8n8", "b16")
    put = [resolve.destination(name) for name in vector(operands[0])]
    address, transposed = resolve.address(operands[1]), "trans" in parts

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        all_lanes(mask, "ldmatrix")
        at = address(warp)[: 8 * len(put)]
        tiles = warp.cta.memory.load(at, 2, 8).reshape(len(put), 8, 8)
        for tile, store in zip(tiles, put, strict=True):
            tile = np.ascontiguousarray(tile.T if transposed else tile)
            store(warp, None, tile.reshape(LANES, 2).view(np.uint32).reshape(LANES))

    return run


def _stmatrix(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    require(parts, "m8n8", "b16")
    get = [resolve.source(name, np.uint32) for name in vector(operands[1])]
    address, transposed = resolve.address(operands[0]), "trans" in parts

    def run(warp: Warp, mask: np.ndarray | None) -> None:
        all_lanes(mask, "stmatrix")
        tiles = [g(warp).reshape(LANES, 1).view(np.uint16).reshape(8, 8) for g in get]
        rows = np.concatenate([tile.T if transposed else tile for tile in tiles])
        warp.cta.memory.store(address(warp)[: 8 * len(get)], np.ascontiguousarray(rows), warp.number)

    return run


TABLE = {"ld": _ld, "st": _st, "ldmatrix": _ldmatrix, "stmatrix": _stmatrix}
