"""The backends, by name. `dense` comes first and can do everything."""

from __future__ import annotations

from sparse24.backends.base import Backend
from sparse24.backends.cusparselt import CuSparseLt
from sparse24.backends.cutlass import Cutlass
from sparse24.backends.dense import Dense
from sparse24.backends.gluon import Gluon
from sparse24.backends.triton import Triton

BACKENDS: dict[str, Backend] = {b.name: b for b in (Dense(), CuSparseLt(), Cutlass(), Gluon(), Triton())}


def split_choice(choice: str) -> tuple[Backend, str]:
    """`backend:variant` or `backend` -> the backend, and the variant or `""`."""
    name, _, variant = choice.partition(":")
    return BACKENDS[name], variant
