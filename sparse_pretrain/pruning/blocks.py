"""A model as stacks of blocks that are run one at a time: a block is given what the blocks before it, pruned already,
return, and the activations of one depth alone are ever kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparse_pretrain.errors import UserError
from sparse_pretrain.pruning.layers import is_prunable

Forward = Callable[[Any], Any]  # runs the model on one batch


@dataclass(frozen=True)
class Call:
    """How a block was called, its first argument aside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def same(self, other: Call) -> bool:
        """Whether the arguments are the same objects."""
        mine, theirs = [*self.args, *self.kwargs.values()], [*other.args, *other.kwargs.values()]
        return self.kwargs.keys() == other.kwargs.keys() and [*map(id, mine)] == [*map(id, theirs)]


@dataclass(frozen=True)
class StackPlan:
    """names: blocks in the order in which they run, each on what the one before it returns. like: for each the number
    of the first of them that is called with the same arguments beside that."""

    names: list[str]
    like: list[int]


@dataclass
class Stack:
    """Blocks of which each takes what the one before it returns, on their way through the calibration data.

    Attributes:
        blocks: in the order in which they run.
        calls: for each block and batch how it is called.
        hidden: for each batch the first argument of the block that is next.
    """

    blocks: list[nn.Module]
    calls: list[list[Call]]
    hidden: list[Tensor]

    def run(self, number: int) -> Iterator[Tensor]:
        """What the next block, of this number, returns for each batch."""
        for call, hidden in zip(self.calls[number], self.hidden, strict=True):
            # a copy: a block may write into what it is given
            yield _first(self.blocks[number](hidden.clone(), *call.args, **call.kwargs))

    def advance(self, number: int) -> None:
        """Go on behind the next block, of this number."""
        self.hidden = list(self.run(number))


class _Reached(Exception):
    """Everything that was to be recorded of a forward pass has been."""


def find_blocks(model: nn.Module) -> list[str]:
    """The names of the repeated parts that hold all layers worth pruning: members of `nn.ModuleList` or
    `nn.Sequential`, all of one class, none inside another. A model without any has its layers themselves."""
    names: list[str] = []

    def search(module: nn.Module, name: str) -> None:
        inside = {f"{name}.{child}" if name else child: part for child, part in module.named_children()}
        repeated = (
            isinstance(module, nn.ModuleList | nn.Sequential) and len({type(part) for part in inside.values()}) == 1
        )
        if repeated and not any(map(is_prunable, inside.values())) and all(map(_holds_layers, inside.values())):
            names.extend(inside)
        else:
            for child, part in inside.items():
                search(part, child)

    search(model, "")
    return names or [name for name, module in model.named_modules() if is_prunable(module)]


def _holds_layers(module: nn.Module) -> bool:
    return any(is_prunable(part) for part in module.modules())


def find_stacks(model: nn.Module, forward: Forward, batch: Any, names: Iterable[str]) -> list[StackPlan]:
    """The blocks in the order in which the model runs them, in stacks: within one, each block is given the very tensor
    that the one before it returned. Blocks that the model does not run are left out.

    Raises:
        UserError: a block is run more than once: what it is given depends on itself then; or it is not given a tensor
            as its first argument.
    """
    stacks: list[StackPlan] = []
    calls: list[Call] = []  # of the newest stack
    output: list[Any] = [None]

    def before(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args or not isinstance(args[0], Tensor):
                raise UserError(
                    "checkpoint",
                    f"a model that calls {name} without a tensor as its first argument",
                    "one that gives each block what the one before it returned so",
                )
            if any(name in stack.names for stack in stacks):
                raise UserError(
                    "checkpoint", f"a model that uses {name} more than once", "one that runs each of its blocks once"
                )
            if not stacks or args[0] is not output[0]:
                stacks.append(StackPlan([], []))
                calls.clear()
            calls.append(Call(args[1:], kwargs))
            stacks[-1].names.append(name)
            stacks[-1].like.append(next(number for number, call in enumerate(calls) if call.same(calls[-1])))

        return hook

    def after(_: nn.Module, __: tuple[Any, ...], result: Any) -> None:
        output[0] = _first(result)

    handles = []
    for name in names:
        block = model.get_submodule(name)
        handles += [
            block.register_forward_pre_hook(before(name), with_kwargs=True),
            block.register_forward_hook(after),
        ]
    try:
        forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return stacks


def record(model: nn.Module, forward: Forward, batches: Sequence[Any], plan: StackPlan) -> Stack:
    """A stack at its beginning. The model is run up to its first block, or where others are called with arguments of
    their own up to the last of those."""
    blocks = [model.get_submodule(name) for name in plan.names]
    calls: dict[int, list[Call]] = {number: [] for number in sorted(set(plan.like))}
    last = max(calls)
    hidden: list[Tensor] = []

    def keep(number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number == 0:
                hidden.append(args[0].clone())  # as in `Stack.run`
            calls[number].append(Call(args[1:], kwargs))
            if number == last:
                raise _Reached

        return hook

    handles = [blocks[number].register_forward_pre_hook(keep(number), with_kwargs=True) for number in calls]
    try:
        for batch in batches:
            with suppress(_Reached):
                forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return Stack(blocks, [calls[number] for number in plan.like], hidden)


def _first(output: Any) -> Any:
    """A block's hidden states: what it returns, or the first of it."""
    return output[0] if isinstance(output, tuple | list) else output
