"""AdamW with masked decay over many tensors in one pass and one launch.

Each element of a weight, its gradient and its two moments is read once and written once (the gradient and a frozen
second moment only read), whatever is switched on; masked decay adds one byte of mask. Mask changes are not counted
here: the kernels that refresh a mask count them in their own pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

DECAY_PLACES = ("none", "gradient", "momentum", "weight")
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ROLES = ("params", "grads", "exp_avgs", "exp_avg_sqs")
# four elements a thread: one access of 16 bytes in float32, and no exchange between threads for other dtypes
_BLOCK, _WARPS = 1024, 8
_ALIGNMENT = 16  # bytes


class TensorTable:
    """Where the tensors of one list of parameters are, on their device.

    Built by the first `adamw_step` it is given to, and again only when a tensor has moved: gradients do when they are
    freed between steps (`zero_grad(set_to_none=True)`) and the allocator hands out other memory. The shapes of the
    parameters must not change.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._launches: list[tuple[tuple[torch.dtype, ...], bool, Tensor, Tensor]] = []

    def launches(
        self, tensors: tuple[Sequence[Tensor], ...], steps: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> list[tuple[tuple[torch.dtype, ...], bool, Tensor, Tensor]]:
        """For each combination of dtypes and alignment: the dtypes, whether all is aligned to 16 bytes, the table of
        addresses (tensors, 8) int64, and which tensor each program works on (programs,) int32."""
        lists = (*tensors, steps, masks)
        key = tuple(None if t is None else (t.data_ptr(), t.dtype) for group in lists for t in group)
        if key != self._key:
            if tensors[0][0].is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a CUDA graph is being captured and tensors have moved since the table was built: make a step "
                    "with these very gradients first, as a replay would read addresses that are no longer theirs"
                )
            _check(tensors, steps, masks)
            self._launches = _build(tensors, steps, masks)
            self._key = key
        return self._launches


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay_factor: float = 0.0,
    decay_place: str = "none",
    frozen: bool = False,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
    table: TensorTable | None = None,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019), in place, with λ·(1−M)⊙W pulling pruned weights to zero.

    As `torch.optim.AdamW`: t ← t + 1; W ← W − lr·weight_decay·W; m ← β₁m + (1−β₁)g; v ← β₂v + (1−β₂)g²;
    W ← W − lr·(m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε). Computed in float32, rounded once when stored. The decay, with W as it
    was before the step, enters at `decay_place`:

        none
        gradient: g ← g + λ·(1−M)⊙W first (FST, arXiv 2404.01847, eq. 7).
        momentum: u = m + λ·(1−M)⊙W takes the place of m in the update of W, and of g in v; m itself stays without
            it (AST, Huang et al. 2025). A parameter without a mask is updated as with `none`.
        weight: W ← W − lr·λ·(1−M)⊙W first (SR-STE, arXiv 2102.04010, under Adam).

    With `frozen`, exp_avg_sqs hold v̂, the corrected second moment of an earlier step: it is only read, and
    W ← W − lr·(m/(1−β₁ᵗ)) / (√v̂ + ε) (STEP, Lu et al. 2023, phase 2).

    Moments in bfloat16 save memory, but v can shrink no more once 1 − β₂ is below about 2⁻⁸: changes that small are
    lost in rounding.

    Args:
        params: any shapes, dense; float32, bfloat16 or float16, as are `grads`, `exp_avgs` and `exp_avg_sqs`, which
            need the shapes and strides of the parameters. Each combination of dtypes is one launch.
        steps: t of each parameter, 0-dim float32 on the device; the same tensor may be given many times.
        masks: boolean, with the parameter's shape and strides, True = kept; None for a parameter without, or for all.
        lr: float or 0-dim float32 tensor on the device.
        decay_factor: λ.
        found_inf: 0-dim float32 on the device; if it is not 0 then nothing changes.
        grad_scale: 0-dim float32 on the device; gradients are divided by it, and left as they are in memory.
        table: addresses of an earlier step with the same parameters; without one it is built anew.

    Raises:
        ValueError: an argument does not fit. Tensors are checked when the table is built.
        RuntimeError: the table would have to be built while a CUDA graph is captured.
    """
    if decay_place not in DECAY_PLACES:
        raise ValueError(f"decay_place must be one of {', '.join(DECAY_PLACES)}; found {decay_place!r}")
    if not params:
        return
    masks = [None] * len(params) if masks is None else masks
    for name, group in (
        *zip(_ROLES[1:], (grads, exp_avgs, exp_avg_sqs), strict=True),
        ("steps", steps),
        ("masks", masks),
    ):
        if len(group) != len(params):
            raise ValueError(f"{name} must be as many as params, {len(params)}; found {len(group)}")
    device = params[0].device
    for name, scalar in (("lr", lr), ("found_inf", found_inf), ("grad_scale", grad_scale)):
        if isinstance(scalar, Tensor) and (
            scalar.numel() != 1 or scalar.dtype != torch.float32 or scalar.device != device
        ):
            raise ValueError(
                f"{name} must be float32 of one element on {device}; "
                f"found {scalar.dtype} of {tuple(scalar.shape)} on {scalar.device}"
            )
    beta1, beta2 = betas
    place = decay_place if decay_factor or decay_place == "momentum" else "none"
    launches = (table or TensorTable()).launches((params, grads, exp_avgs, exp_avg_sqs), steps, masks)
    with torch.cuda.device_of(params[0]):
        for dtypes, aligned, addresses, owners in launches:
            _adamw[(owners.numel(),)](
                addresses,
                owners,
                lr if isinstance(lr, Tensor) else float(lr),
                found_inf,
                grad_scale,
                1 - beta1,
                1 - beta2,
                math.log(beta1) if beta1 else -math.inf,
                math.log(beta2) if beta2 else -math.inf,
                float(eps),
                float(weight_decay),
                float(decay_factor),
                PLACE=place,
                FROZEN=frozen,
                LR_IN_MEMORY=isinstance(lr, Tensor),
                P=_DTYPES[dtypes[0]],
                G=_DTYPES[dtypes[1]],
                M=_DTYPES[dtypes[2]],
                V=_DTYPES[dtypes[3]],
                ALIGNED=aligned,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
    # after the kernel, whose programs all read the steps
    unique = list({step.data_ptr(): step for step in steps}.values())
    torch._foreach_add_(unique, 1.0 if found_inf is None else (found_inf.reshape(()) == 0).float())


def _check(tensors: tuple[Sequence[Tensor], ...], steps: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    params = tensors[0]
    device = params[0].device
    for i, param in enumerate(params):
        if torch.empty_like(param, device="meta").stride() != param.stride():
            raise ValueError(f"params[{i}] must be dense and without overlap; found strides {param.stride()}")
        for name, tensor in zip((*_ROLES, "masks"), (*(group[i] for group in tensors), masks[i]), strict=True):
            if tensor is None:
                continue
            dtypes = (torch.bool,) if name == "masks" else tuple(_DTYPES)
            # strides of dimensions of size 1 mean nothing
            same = tensor.shape == param.shape and all(
                size == 1 or a == b for size, a, b in zip(param.shape, tensor.stride(), param.stride(), strict=True)
            )
            if tensor.dtype not in dtypes or tensor.device != device or not (same or not param.numel()):
                raise ValueError(
                    f"{name}[{i}] must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} with the shape "
                    f"{tuple(param.shape)} and strides {param.stride()} of params[{i}] on {device}; found "
                    f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
                )
        step = steps[i]
        if step.dim() or step.dtype != torch.float32 or step.device != device:
            raise ValueError(
                f"steps[{i}] must be 0-dim float32 on {device}; found {step.dtype} of {tuple(step.shape)} "
                f"on {step.device}"
            )


def _build(
    tensors: tuple[Sequence[Tensor], ...], steps: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> list[tuple[tuple[torch.dtype, ...], bool, Tensor, Tensor]]:
    kinds: dict[tuple[tuple[torch.dtype, ...], bool], list[list[int]]] = {}
    for *four, step, mask in zip(*tensors, steps, masks, strict=True):
        if not four[0].numel():
            continue
        address = [t.data_ptr() for t in four] + [0 if mask is None else mask.data_ptr()]
        kind = tuple(t.dtype for t in four), not any(a % _ALIGNMENT for a in address)
        kinds.setdefault(kind, []).append([*address, step.data_ptr(), four[0].numel()])
    device = tensors[0][0].device
    launches = []
    for (dtypes, aligned), rows in kinds.items():
        programs = [triton.cdiv(row[-1], _BLOCK) for row in rows]
        first = 0
        for row, count in zip(rows, programs, strict=True):
            row.append(first)
            first += count
        # pinned: the copy waits neither for the device nor for the host
        columns = [torch.tensor(rows, dtype=torch.int64), torch.tensor(programs, dtype=torch.int64)]
        if device.type == "cuda":
            columns = [column.pin_memory().to(device, non_blocking=True) for column in columns]
        addresses, counts = columns
        owners = torch.arange(len(rows), dtype=torch.int32, device=device)
        launches.append((dtypes, aligned, addresses, owners.repeat_interleave(counts, output_size=first)))
    return launches


@triton.jit
def _one_minus_power(log_beta, t):
    """1 − βᵗ, without cancellation where βᵗ is close to 1: there the series of −expm1(t·ln β)."""
    z = t * log_beta
    series = 1.0 + z / 8.0
    for i in tl.static_range(6):
        series = 1.0 + z / (7.0 - i) * series
    return tl.where(z > -0.5, -z * series, 1.0 - tl.exp(z))


@triton.jit
def _address(table_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, mask_ptr, offset, inside, lr, grad_scale_ptr, take1, take2, step_size, root, eps,
    weight_decay, decay_factor, PLACE: tl.constexpr, FROZEN: tl.constexpr
):  # fmt: skip
    p = tl.load(p_ptr + offset, mask=inside).to(tl.float32)
    g = tl.load(g_ptr + offset, mask=inside).to(tl.float32)
    m = tl.load(m_ptr + offset, mask=inside).to(tl.float32)
    v = tl.load(v_ptr + offset, mask=inside).to(tl.float32)
    if grad_scale_ptr is not None:
        g = g / tl.load(grad_scale_ptr)
    if PLACE != "none":
        # a block, as the interpreter of Triton 3.9 takes no scalar for the mask of one
        has_mask = (mask_ptr.to(tl.int64) + tl.zeros(offset.shape, tl.int64)) != 0
        kept = tl.load(mask_ptr + offset, mask=has_mask if inside is None else has_mask & inside, other=1)
        decay = tl.where(kept == 0, decay_factor * p, 0.0)
    if PLACE == "gradient":
        g += decay
    if PLACE == "weight":
        p -= lr * decay
    p -= lr * weight_decay * p
    m += take1 * (g - m)
    u = m
    if PLACE == "momentum":
        u += decay
        g = tl.where(has_mask, u, g)
    if not FROZEN:
        v += take2 * (g * g - v)
    p -= step_size * u / (tl.sqrt(v) * root + eps)
    tl.store(p_ptr + offset, p.to(p_ptr.dtype.element_ty), mask=inside)
    tl.store(m_ptr + offset, m.to(m_ptr.dtype.element_ty), mask=inside)
    if not FROZEN:
        tl.store(v_ptr + offset, v.to(v_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _adamw(
    table_ptr, owners_ptr, lr, found_inf_ptr, grad_scale_ptr, take1, take2, log_beta1, log_beta2, eps, weight_decay,
    decay_factor, PLACE: tl.constexpr, FROZEN: tl.constexpr, LR_IN_MEMORY: tl.constexpr, P: tl.constexpr,
    G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of one tensor. take1, take2: 1 − β₁ and 1 − β₂, rounded once."""
    if found_inf_ptr is not None:  # noqa: SIM102 (decided by the compiler, unlike the next)
        if tl.load(found_inf_ptr) != 0.0:
            return
    table_ptr += tl.load(owners_ptr + tl.program_id(0)) * 8
    p_ptr = _address(table_ptr, 0, P, ALIGNED)
    g_ptr = _address(table_ptr, 1, G, ALIGNED)
    m_ptr = _address(table_ptr, 2, M, ALIGNED)
    v_ptr = _address(table_ptr, 3, V, ALIGNED)
    mask_ptr = _address(table_ptr, 4, tl.int8, ALIGNED)
    t = tl.load(_address(table_ptr, 5, tl.float32, False)) + 1.0
    size = tl.load(table_ptr + 6)
    if LR_IN_MEMORY:
        lr = tl.load(lr)
    step_size = lr / _one_minus_power(log_beta1, t)
    root = 1.0
    if not FROZEN:
        root = 1.0 / tl.sqrt_rn(_one_minus_power(log_beta2, t))
    start = (tl.program_id(0) - tl.load(table_ptr + 7)) * BLOCK
    offset = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:  # without a mask, as only such accesses are known to be whole 16 bytes
        _update(
            p_ptr, g_ptr, m_ptr, v_ptr, mask_ptr, offset, None, lr, grad_scale_ptr, take1, take2, step_size,
            root, eps, weight_decay, decay_factor, PLACE, FROZEN,
        )  # fmt: skip
    else:
        _update(
            p_ptr, g_ptr, m_ptr, v_ptr, mask_ptr, offset, offset < size, lr, grad_scale_ptr, take1, take2, step_size,
            root, eps, weight_decay, decay_factor, PLACE, FROZEN,
        )  # fmt: skip
