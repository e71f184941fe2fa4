"""The emulator of one kernel, which binds arguments to its parameters and runs its grid."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arguments import Pointer, TensorMap
from .compile import compile_program
from .global_memory import GlobalMemory
from .launch import Launch
from .parse import parse

TENSOR_MAP_BASE = 1 << 20  # in the space of the parameters, whose addresses have 32 bits
Index = tuple[int, int, int]


class Emulator:
    """One kernel; see the package's docstring."""

    def __init__(self, ptx: str) -> None:
        self.program = parse(ptx)
        self.code = compile_program(self.program)

    def launch(
        self,
        grid: Index,
        arguments: Sequence[Any],
        cluster: int | None = None,
        lazy: bool = True,
        seed: int | None = None,
        only: Sequence[Index] | None = None,
        shared: int = 231424,
    ) -> Counter[str]:
        """Run the grid; see the package's docstring."""
        size = cluster or self.program.cluster
        if grid[0] % size:
            raise ValueError(f"grid must be whole clusters of {size} along x; found {grid}")
        arrays = [a.array if isinstance(a, (Pointer, TensorMap)) else a for a in arguments]
        memory = GlobalMemory([a for a in arrays if isinstance(a, np.ndarray)])
        parameters, tensor_maps = self._bind(arguments, memory)
        random = None if seed is None else np.random.default_rng(seed)
        launch = Launch(
            self.program, self.code, memory, grid, size, lazy, shared, parameters, tensor_maps, random, Counter()
        )
        with np.errstate(all="ignore"):
            for ctas in _clusters(grid, size, only):
                launch.run_cluster(ctas)
        memory.write_back()
        return launch.counts

    def _bind(self, arguments: Sequence[Any], memory: GlobalMemory) -> tuple[dict[str, int], dict[int, TensorMap]]:
        """The bits of each parameter, and the tensor maps by their addresses."""
        declared = self.program.parameters
        if len(arguments) > len(declared):
            raise ValueError(f"{self.program.name} has {len(declared)} parameters; {len(arguments)} given")
        parameters, tensor_maps = dict.fromkeys((name for _, name in declared), 0), {}
        for i, ((kind, name), value) in enumerate(zip(declared, arguments, strict=False)):
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
        return parameters, tensor_maps


def _clusters(grid: Index, size: int, only: Sequence[Index] | None) -> list[list[Index]]:
    """The CTAs of each cluster, in the order of the launch."""
    if only is None:
        firsts = itertools.product(range(grid[2]), range(grid[1]), range(0, grid[0], size))
    else:
        firsts = sorted({(z, y, x // size * size) for x, y, z in only})
    clusters = [[(x + i, y, z) for i in range(size)] for z, y, x in firsts]
    return [ctas for ctas in clusters if only is None or set(only).issuperset(ctas)]
