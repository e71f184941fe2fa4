"""From the text of an operand to a function that reads or writes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EmulatorError
from ..lanes import LANE, LANES
from ..number_formats import UINT
from ..parse import Program, split

if TYPE_CHECKING:
    from ..warp import Warp

BLOCK, EXIT = "block", "exit"  # what an instruction returns when the warp has to wait or ends
Getter = Callable[["Warp"], np.ndarray]
Setter = Callable[["Warp", "np.ndarray | None", np.ndarray], None]
Run = Callable[["Warp", "np.ndarray | None"], Any]


class Operands:
    """Those of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.numbers = {name: i for i, name in enumerate(program.register_names)}

    def source(self, text: str, dtype: Any) -> Getter:
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
            return lambda warp: np.full(LANES, warp.cta.memory.base, UINT[dtype.itemsize]).view(dtype)
        if any(text == name for _, name in self.program.parameters):
            return lambda warp: np.full(LANES, warp.cta.launch.parameters[text], np.uint64).view(dtype)
        value = _constant(text, dtype)
        return lambda warp: value

    def destination(self, text: str) -> Setter:
        """A setter of a register, in the active lanes."""
        if text == "_":
            return lambda warp, mask, value: None
        number = self.numbers[text]
        kind = self.program.register_types[text]
        dtype = np.dtype(bool) if kind == "pred" else np.dtype(UINT[int(kind[1:]) // 8])

        def put(warp: Warp, mask: np.ndarray | None, value: np.ndarray) -> None:
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

    def address(self, text: str) -> Getter:
        """[register + constant] as int64."""
        match = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if match is None:
            raise EmulatorError(f"unknown address {text!r}")
        offset = int(match[2], 0) if match[2] else 0
        wide = self.program.register_types.get(match[1]) == "b64"
        base = self.source(match[1], np.uint64 if wide else np.uint32)
        return lambda warp: base(warp).astype(np.int64) + offset

    def simple(self, operands: list[str], function: Callable[..., np.ndarray], *types: Any) -> Run:
        """The first operand becomes a function of the others."""
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


def _constant(text: str, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":
        return np.full(LANES, bool(int(text)))
    if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
        return np.full(LANES, int(match[1], 16), np.uint32).view(dtype)
    if match := re.fullmatch(r"(-?)(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        if dtype.kind == "f":
            raise EmulatorError(f"integer {text} as a float")
        integer = int(match[2], 0) * (-1 if match[1] else 1)
        return np.full(LANES, integer % (1 << 8 * dtype.itemsize), UINT[dtype.itemsize]).view(dtype)
    raise EmulatorError(f"unknown operand {text!r}")


def vector(text: str) -> list[str]:
    """The operands of {a, b, …}, or the one that stands alone."""
    return split(text[1:-1]) if text.startswith("{") else [text]


def type_of(name: str) -> np.dtype:
    """The numpy type of a PTX type."""
    if name == "pred":
        return np.dtype(bool)
    match = re.fullmatch(r"([busf])(\d+)", name)
    if match is None or (match[1] == "f" and match[2] not in ("32", "64")):
        raise EmulatorError(f"type {name} is not supported")
    return np.dtype({"b": "u", "u": "u", "s": "i", "f": "f"}[match[1]] + str(int(match[2]) // 8))


def unsupported(parts: list[str]) -> EmulatorError:
    return EmulatorError(f"{'.'.join(parts)} is not supported")


def require(parts: list[str], *needed: str) -> None:
    """The instruction is supported with these parts only."""
    if any(part not in parts for part in needed):
        raise unsupported(parts)


def all_lanes(mask: np.ndarray | None, what: str) -> None:
    """Refuse an instruction that has to be executed by all lanes together."""
    if mask is not None:
        raise EmulatorError(f"{what} needs all lanes of the warp")


def lanes(mask: np.ndarray | None) -> np.ndarray:
    """The numbers of the active lanes."""
    return LANE if mask is None else np.nonzero(mask)[0]
