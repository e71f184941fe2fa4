"""Arithmetic, comparisons and bit fields, on one register a lane."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import EmulatorError
from ..number_formats import UINT
from .operands import Operands, Run, type_of, unsupported

_UNARY: dict[str, Callable[..., np.ndarray]] = {
    "not": lambda a: ~a,
    "neg": lambda a: -a,
}
_BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}
_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _unary(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    return resolve.simple(operands, _UNARY[parts[0]], type_of(parts[-1]))


def _binary(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    dtype, function = type_of(parts[-1]), _BINARY[parts[0]]
    if "sat" in parts:
        raise unsupported(parts)
    if "relu" in parts:  # of min and max
        return resolve.simple(operands, lambda a, b: np.maximum(function(a, b), 0).astype(a.dtype), dtype, dtype)
    return resolve.simple(operands, function, dtype, dtype)


def _wider(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def _mul(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    dtype = type_of(parts[-1])
    if "wide" in parts:
        wide = _wider(dtype)
        return resolve.simple(operands, lambda a, b: a.astype(wide) * b.astype(wide), dtype, dtype)
    if "hi" in parts:
        bits = 8 * dtype.itemsize

        def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            product = a.astype(object) * b.astype(object) >> bits
            return np.array(product % (1 << bits), dtype=UINT[dtype.itemsize])

        return resolve.simple(operands, high, dtype, dtype)
    return resolve.simple(operands, lambda a, b: a * b, dtype, dtype)


def _mad(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    dtype = type_of(parts[-1])
    if "wide" in parts:
        wide = _wider(dtype)
        return resolve.simple(operands, lambda a, b, c: a.astype(wide) * b.astype(wide) + c, dtype, dtype, wide)
    return resolve.simple(operands, lambda a, b, c: a * b + c, dtype, dtype, dtype)


def _div(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    dtype = type_of(parts[-1])
    if dtype.kind == "f":
        raise unsupported(parts)

    def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Towards zero."""
        quotient = np.abs(a) // np.maximum(np.abs(b), 1)
        return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype) if a.dtype.kind == "i" else quotient

    return resolve.simple(operands, divide, dtype, dtype)


def _fma(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    dtype = type_of(parts[-1])
    return resolve.simple(operands, lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype), dtype, dtype, dtype)


def _setp(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    if len(parts) != 3:
        raise unsupported(parts)
    dtype = type_of(parts[-1])
    return resolve.simple(operands, _COMPARE[parts[1]], dtype, dtype)


def _selp(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    dtype = type_of(parts[-1])
    return resolve.simple(operands, lambda a, b, p: np.where(p, a, b), dtype, dtype, bool)


def _shift(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    left, dtype = parts[0] == "shl", type_of(parts[-1])
    bits = 8 * dtype.itemsize

    def shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        amount = np.minimum(b, bits - 1).astype(a.dtype)
        if not left and a.dtype.kind == "i":
            return a >> amount
        return np.where(b < bits, a << amount if left else a >> amount, 0).astype(a.dtype)

    return resolve.simple(operands, shift, dtype, np.uint32)


def _bfe(resolve: Operands, parts: list[str], operands: list[str]) -> Run:
    dtype = type_of(parts[-1])
    unsigned, bits = np.dtype(UINT[dtype.itemsize]), 8 * dtype.itemsize

    def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        if (length == 0).any() or (position + length > bits).any():
            raise EmulatorError("bfe beyond the register is not supported")
        # up to the top and down again, which extends the sign if there is one
        up = a.view(unsigned) << (bits - position - length).astype(unsigned)
        return up.view(dtype) >> (bits - length).astype(dtype)

    return resolve.simple(operands, extract, dtype, np.uint32, np.uint32)


TABLE = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    "mul": _mul, "div": _div, "mad": _mad, "fma": _fma, "setp": _setp, "selp": _selp, "shl": _shift, "shr": _shift,
    "bfe": _bfe,
}  # fmt: skip
