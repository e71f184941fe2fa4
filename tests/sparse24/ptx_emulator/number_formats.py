"""Numbers that numpy does not have, or that registers and memory hold as bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
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


E4M3 = _e4m3_table()
DECODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": from_bf16,
    "f16": lambda bits: bits.view(np.float16).astype(np.float32),
    "e4m3": lambda bits: E4M3[bits],
}
ENCODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bf16": to_bf16,
    "f16": lambda x: x.astype(np.float16).view(np.uint16),
}
ELEMENT = {"bf16": np.uint16, "f16": np.uint16, "e4m3": np.uint8}
