"""From a statement to the function that runs it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import EmulatorError
from .instructions import arithmetic, control, cp_async, load_store, mma, move, synchronize, wgmma
from .instructions.operands import Operands, Run
from .parse import Program, split

if TYPE_CHECKING:
    from .warp import Warp

_TABLE = {
    **arithmetic.TABLE, **control.TABLE, **cp_async.TABLE, **load_store.TABLE, **mma.TABLE, **move.TABLE,
    **synchronize.TABLE, **wgmma.TABLE,
}  # fmt: skip


def compile_program(program: Program) -> list[tuple[str, Run]]:
    """Name and function of each statement."""
    resolve, code = Operands(program), []
    for statement in program.statements:
        try:
            code.append(_statement(resolve, statement))
        except (EmulatorError, KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            # an error only where the kernel comes to it
            code.append((statement, _unsupported(f"cannot execute `{statement}`: {error!r}")))
    return code


def _unsupported(message: str) -> Run:
    def run(warp: Warp, mask: np.ndarray | None) -> None:
        raise EmulatorError(message)

    return run


def _statement(resolve: Operands, statement: str) -> tuple[str, Run]:
    guard = re.match(r"@(!?)\s*(\S+)\s+(.*)", statement)
    op, _, rest = (guard[3] if guard else statement).partition(" ")
    run = _instruction(resolve, op, split(rest))
    if guard is None:
        return op, run
    predicate, negated = resolve.numbers[guard[2]], bool(guard[1])

    def guarded(warp: Warp, mask: np.ndarray | None) -> Any:
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


def _instruction(resolve: Operands, op: str, operands: list[str]) -> Run:
    parts = op.split(".")
    if parts[0] not in _TABLE:
        raise EmulatorError(f"instruction {op} is not supported")
    return _TABLE[parts[0]](resolve, parts, operands)
