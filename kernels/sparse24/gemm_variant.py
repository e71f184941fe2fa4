"""What is built ahead of time: one GEMM kernel with its tile, data type and architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Variant:
    """One cubin to build.

    name: unique, and the name of the cubin's file.
    form: "linear" (result (n, m) = x Âᵀ) or "outer" (result (m, n) = Â x).
    dtype: of A and x.
    capability: compute capability times ten; 90 is built for sm_90a, the others also run on newer minor versions.
    kernel: the Gluon function.
    signature: argument name -> Triton type ("*bf16", "i32", "tensordesc<…>", "constexpr"), in the kernel's order.
    constexprs: values of the arguments that are constexpr.
    num_warps, num_ctas: as in Triton's options; num_ctas > 1 makes clusters.
    block: the tile of the result and the step along k of one CTA, (m, n, k).
    attrs: argument name -> the power of two that divides it (pointers: of the address), as the launcher promises.
    options: further compiler options.
    """

    name: str
    form: Literal["linear", "outer"]
    dtype: Literal["bf16", "fp16", "e4m3"]
    capability: Literal[80, 89, 90]
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_ctas: int
    block: tuple[int, int, int]
    attrs: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def compile_variant(variant: Variant) -> Any:
    """Compile with Triton (3.9), without a GPU.

    Returns:
        Triton's compiled kernel: `asm["ptx"]`, `asm["cubin"]`, `metadata.shared`, `metadata.num_warps`, ….
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    arguments = list(variant.signature)
    attrs = {(arguments.index(name),): [["tt.divisibility", divisor]] for name, divisor in variant.attrs.items()}
    source = GluonASTSource(variant.kernel, dict(variant.signature), dict(variant.constexprs), attrs)
    options = {"num_warps": variant.num_warps, "num_ctas": variant.num_ctas, **variant.options}
    return triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options=options)
