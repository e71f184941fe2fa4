"""Products with a 2:4 matrix in fragment order, on the sparse tensor cores, by the kernels of `cubins/`.

    linear   y (n, m) = x (n, k) Âᵀ + bias      the forward pass and, with Ŵᵀ for Â, the input gradient
    outer    (m, n) = Â x (k, n), float32       the weight gradient: Â the pruned dYᵀ, x the activations

Several kernels may compute the same; `variants` names them, and the dispatcher measures which is the fastest. Plain
functions on CUDA tensors, on the current stream; nothing is synchronised, and CUDA graphs capture them once each
kernel has been called.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparse24 import cubin
from sparse24.cubin import Entry, Matrix
from sparse24.fragments import Fragments

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "e4m3"}
# names that kernels may use for their arguments, and what they get
ARGUMENTS = {
    "x_desc": "x as a tensor map, (n, k) or for outer (rows, n)",
    "x_ptr": "x",
    "values_ptr": "values in fragment order",
    "metadata_ptr": "metadata in fragment order",
    "bias_ptr": "bias (m,), or null if has_bias is 0",
    "scale_ptr": "a float32 to multiply with",
    "y_desc": "the result as a tensor map",
    "out_ptr": "the result",
    "y_ptr": "the result",
    "m": "rows of Â",
    "n": "columns of the other operand",
    "k": "contraction length, as of Â",
    "x_rows": "for outer: rows that x has, at most k",
    "has_bias": "0 or 1",
}
M_STEP = 128  # rows of Â are whole tiles
LONGEST_ROW = 1 << 23  # kernels have 32-bit offsets within a tile of up to 1024 rows
_ALIGNMENT = 16  # bytes, of addresses and rows


def variants(form: str, dtype: torch.dtype, capability: tuple[int, int]) -> list[str]:
    """Names of the kernels for a form (`linear`, `outer`) that run on a device of this compute capability."""
    return list(_entries(form, dtype, capability))


@lru_cache
def _entries(form: str, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, Entry]:
    return {
        name: entry
        for name, entry in cubin.manifest().items()
        if entry.form == form and entry.dtype == DTYPES.get(dtype) and entry.runs_on(capability)
    }


def supports(form: str, m: int, n: int, k: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[bool, str]:
    """Whether there is a kernel for contiguous operands of these sizes, and if not, why not.

    Args:
        form: `linear` or `outer`.
        m, k: rows and columns of Â, as padded.
        n: rows (`linear`) or columns (`outer`) of the other operand.
        dtype: of both operands.
        capability: of the device.
    """
    entries = _entries(form, dtype, capability)
    if not entries:
        name = str(dtype).removeprefix("torch.")
        return False, f"no kernel for {form} with {name} on compute capability {capability[0]}.{capability[1]}"
    k_step = next(iter(entries.values())).block[2]
    if m % M_STEP or k % k_step or not m or not k:
        return False, f"needs m in multiples of {M_STEP} and k of {k_step}, found {m} and {k}"
    if form == "outer" and n * dtype.itemsize % _ALIGNMENT:
        return False, f"needs n in multiples of {_ALIGNMENT // dtype.itemsize}, found {n}"
    if max(m, k, n if form == "outer" else 0) >= LONGEST_ROW or n >= 1 << 31:
        return False, f"needs rows shorter than {LONGEST_ROW}, found {m}, {n}, {k}"
    return True, ""


def linear(
    a: Fragments,
    x: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    variant: str | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """y = scale · x Âᵀ + bias, sums in float32.

    Args:
        a: Â (m, k), bf16, fp16 or e4m3.
        x: (n, k), contiguous, of a's dtype.
        bias: (m,) in the result's dtype, contiguous, or None.
        out: (n, m) in the result's dtype, contiguous, to be written.
        variant: one of `variants`; None = the largest tiles that occupy the whole GPU.
        scale: a float32 on the device, for e4m3 only and needed there.

    Returns:
        (n, m) in a's dtype, for e4m3 in bf16.

    Raises:
        ValueError: operands do not fit each other or no kernel can serve them.
        RuntimeError: the driver refuses.
    """
    m, k = a.rows, a.cols
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"x must be (n, k={k}); found {tuple(x.shape)}")
    n = x.shape[0]
    result = torch.bfloat16 if a.dtype == torch.float8_e4m3fn else a.dtype
    y = torch.empty(n, m, dtype=result, device=x.device) if out is None else out
    _check(a, x, y, (n, m), result)
    if bias is not None and (bias.shape != (m,) or bias.dtype != result or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous {result} of shape {(m,)}; found {bias.dtype} of {tuple(bias.shape)}")
    if (scale is not None) != (a.dtype == torch.float8_e4m3fn):
        raise ValueError(f"scale must be given for float8_e4m3fn and for nothing else; found {scale} with {a.dtype}")
    if scale is not None and (scale.numel() != 1 or scale.dtype != torch.float32):
        raise ValueError(f"scale must be one float32; found {scale.dtype} of {tuple(scale.shape)}")
    more = {
        "bias_ptr": 0 if bias is None else bias.data_ptr(),
        "has_bias": int(bias is not None),
        "scale_ptr": 0 if scale is None else scale.data_ptr(),
    }
    _launch("linear", variant, a, x, y, n, more)
    return y


def outer(a: Fragments, x: Tensor, out: Tensor | None = None, variant: str | None = None) -> Tensor:
    """Â x in float32.

    Args:
        a: Â (m, k), bf16 or fp16. k may be more than the rows of x: what is beyond them counts as multiplied by zero.
        x: (rows, n), contiguous, of a's dtype, k - 64 < rows <= k.
        out: (m, n) float32, contiguous, to be written.
        variant: as for `linear`.

    Returns:
        (m, n) float32.

    Raises:
        ValueError: operands do not fit each other or no kernel can serve them.
        RuntimeError: the driver refuses.
    """
    m, k = a.rows, a.cols
    if x.dim() != 2 or not 0 <= k - x.shape[0] < 64:
        raise ValueError(f"x must be (rows, n) with rows rounded up to multiples of 64 {k}; found {tuple(x.shape)}")
    n = x.shape[1]
    y = torch.empty(m, n, dtype=torch.float32, device=x.device) if out is None else out
    _check(a, x, y, (m, n), torch.float32)
    _launch("outer", variant, a, x, y, n, {"x_rows": x.shape[0]})
    return y


def _check(a: Fragments, x: Tensor, y: Tensor, shape: tuple[int, int], result: torch.dtype) -> None:
    if x.dtype != a.dtype or not x.is_contiguous():
        raise ValueError(f"x must be contiguous {a.dtype}; found {x.dtype} with strides {x.stride()}")
    if y.shape != shape or y.dtype != result or not y.is_contiguous():
        raise ValueError(f"out must be contiguous {result} of shape {shape}; found {y.dtype} of {tuple(y.shape)}")
    for name, tensor in (("x", x), ("values", a.values), ("metadata", a.metadata), ("out", y)):
        if tensor.data_ptr() % _ALIGNMENT:
            raise ValueError(f"{name} must begin at a multiple of {_ALIGNMENT} bytes; found {tensor.data_ptr()}")
    size = a.rows * a.cols
    for name, tensor, words in (
        ("values", a.values, size * a.dtype.itemsize // 8),
        ("metadata", a.metadata, size // 32),
    ):
        if tensor.numel() != words or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {words} contiguous int32 for a matrix {(a.rows, a.cols)}; "
                f"found {tensor.dtype} of {tuple(tensor.shape)}"
            )
        if tensor.device != x.device or y.device != x.device:
            raise ValueError(f"{name} and out must be on x's device {x.device}; found {tensor.device} and {y.device}")


def _launch(form: str, variant: str | None, a: Fragments, x: Tensor, y: Tensor, n: int, more: dict[str, int]) -> None:
    device, capability, stream = _place(x.device)
    able, reason = supports(form, a.rows, n, a.cols, a.dtype, capability)
    if not able:
        raise ValueError(f"{form}: {reason}")
    entries = _entries(form, a.dtype, capability)
    if variant is not None and variant not in entries:
        raise ValueError(f"variant must be one of {', '.join(entries)}; found {variant!r}")
    if not n:
        return
    if variant is None:
        variant = _default(tuple(entries.values()), device, a.rows, n).name
    kernel = cubin.load(variant, device)
    programs = _tiles(kernel.entry, a.rows, n)
    if kernel.entry.persistent:
        programs = min(programs, kernel.resident)
    arguments = {
        "x_desc": _matrix(x),
        "x_ptr": x.data_ptr(),
        "values_ptr": a.values.data_ptr(),
        "metadata_ptr": a.metadata.data_ptr(),
        "y_desc": _matrix(y),
        "y_ptr": y.data_ptr(),
        "out_ptr": y.data_ptr(),
        "m": a.rows,
        "n": n,
        "k": a.cols,
        **more,
    }
    kernel.launch((programs, 1, 1), stream, arguments)


def _tiles(entry: Entry, m: int, n: int) -> int:
    """Programs that it takes; the blocks of a cluster lie one below the other."""
    return -(-m // (entry.block[0] * entry.cluster)) * -(-n // entry.block[1])


def _default(entries: tuple[Entry, ...], device: int, m: int, n: int) -> Entry:
    by_size = sorted(entries, key=lambda entry: entry.block[0] * entry.block[1] * entry.cluster, reverse=True)
    full = (entry for entry in by_size if _tiles(entry, m, n) >= cubin.load(entry.name, device).resident)
    return next(full, by_size[-1])


def _matrix(tensor: Tensor) -> Matrix:
    rows, columns = tensor.shape
    return Matrix(tensor.data_ptr(), (rows, columns), (columns, 1))


def _place(device: torch.device) -> tuple[int, tuple[int, int], int]:
    """Index and compute capability of a CUDA device, and the handle of its current stream."""
    if device.type != "cuda":
        raise ValueError(f"x must be on a CUDA device; found {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.get_device_capability(index), torch.cuda.current_stream(index).cuda_stream
