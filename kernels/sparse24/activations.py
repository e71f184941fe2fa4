"""Activations of a feed-forward layer as operators: one pass over memory each way, nothing saved but the inputs.

Custom operators with a fake implementation and a gradient of their own, so torch.compile has no graph break. On a GPU
they are the kernels of `gated`, elsewhere the formula in PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse24.ops import use_kernels
from sparse24.reference import magnitude_mask

GATED = ("geglu", "swiglu")
KINDS = ("gelu", "relu2", *GATED)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gated_activation(kind: str, up: Tensor, gate: Tensor | None = None) -> Tensor:
    """The activation between the products of a feed-forward layer.

        gelu: GELU(up), in its tanh form (Hendrycks & Gimpel 2016)
        relu2: relu(up)² (So et al. 2021)
        geglu: GELU(gate)·up, tanh form (Shazeer 2020)
        swiglu: SiLU(gate)·up (Shazeer 2020)

    Args:
        kind: one of these.
        up: (..., features) float32, bfloat16 or float16; leading dimensions are tokens. Any strides, so up and gate
            may be halves of one product.
        gate: like `up`, for geglu and swiglu; else None.

    Returns:
        (..., features), contiguous.

    Raises:
        ValueError: an argument does not fit.
    """
    check_inputs(kind, up, gate)
    features = up.shape[-1]
    out = _activation(up.reshape(-1, features), None if gate is None else gate.reshape(-1, features), kind)
    return out.view(up.shape)


def check_inputs(kind: str, up: Tensor, gate: Tensor | None) -> None:
    """ValueError if they do not fit each other."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; found {kind!r}")
    if up.dtype not in _DTYPES or up.dim() == 0:
        raise ValueError(
            f"up must be float32, bfloat16 or float16 of shape (..., features); found {up.dtype} of {tuple(up.shape)}"
        )
    if (gate is not None) != (kind in GATED):
        raise ValueError(
            f"gate must be {'a tensor' if gate is None else 'None'} with kind={kind!r}; "
            f"found {'None' if gate is None else 'a tensor'}"
        )
    if gate is not None and (gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device):
        raise ValueError(
            f"gate must be like up, {up.dtype} of {tuple(up.shape)} on {up.device}; "
            f"found {gate.dtype} of {tuple(gate.shape)} on {gate.device}"
        )


def _value(x: Tensor, kind: str) -> Tensor:
    if kind == "relu2":
        return F.relu(x).square()
    return F.silu(x) if kind == "swiglu" else F.gelu(x, approximate="tanh")


def _gradient(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    if kind == "relu2":
        return 2 * F.relu(x) * dy
    if kind == "swiglu":
        return torch.ops.aten.silu_backward(dy, x)
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")


@torch.library.custom_op(
    "sparse24::gated_activation", mutates_args=(), schema="(Tensor up, Tensor? gate, str kind) -> Tensor"
)
def _activation(up: Tensor, gate: Tensor | None, kind: str) -> Tensor:
    if use_kernels(up):
        from sparse24.gated import gated_forward

        return gated_forward(kind, up, gate)
    y = _value(up.float(), kind) if gate is None else _value(gate.float(), kind) * up.float()
    return y.to(up.dtype).contiguous()


@torch.library.custom_op(
    "sparse24::gated_activation_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor up, Tensor? gate, str kind) -> Tensor[]",
)
def _activation_backward(dy: Tensor, up: Tensor, gate: Tensor | None, kind: str) -> list[Tensor]:
    if use_kernels(up):
        from sparse24.gated import gated_backward

        return [x for x in gated_backward(kind, dy, up, gate) if x is not None]
    dy, x = dy.float(), up.float()
    if gate is None:
        gradients = [_gradient(dy, x, kind)]
    else:
        gradients = [dy * _value(gate.float(), kind), _gradient(dy * x, gate.float(), kind)]
    return [gradient.to(up.dtype).contiguous() for gradient in gradients]


@_activation.register_fake
def _(up: Tensor, gate: Tensor | None, kind: str) -> Tensor:
    return up.new_empty(up.shape)


@_activation_backward.register_fake
def _(dy: Tensor, up: Tensor, gate: Tensor | None, kind: str) -> list[Tensor]:
    return [up.new_empty(up.shape) for _ in range(1 if gate is None else 2)]


def _save_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    up, gate, ctx.kind = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(up, gate)


def _gradients(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    up, gate = ctx.saved_tensors  # type: ignore[attr-defined]
    dup, *dgate = _activation_backward(dy, up, gate, ctx.kind)  # type: ignore[attr-defined]
    return dup, dgate[0] if dgate else None, None


_activation.register_autograd(_gradients, setup_context=_save_inputs)


# --- squared ReLU pruned to 2:4 ---


def pruned_relu2(x: Tensor) -> Tensor:
    """relu(x)² with the two largest of every four consecutive features of a token, zeros in the place of the others.

    Haziza et al. 2025 ("Accelerating Transformer Inference and Training with 2:4 Activation Sparsity", arXiv
    2503.16672): most entries are zero already, so few are lost. A tie keeps the lower feature. The gradient is
    2·relu(x)·dy where an entry was kept, zero elsewhere; the gradients that the paper prunes as well stay dense here.

    The result is 2:4 but stored with its zeros, so a product with it takes as long as a dense one. Packed for sparse
    products it comes from `gated.relu2_prune_pack`.

    Args:
        x: (..., features) float32, bfloat16 or float16, any strides; features a multiple of 4.

    Returns:
        (..., features), contiguous, in the dtype of x; which entries are kept is decided after rounding to it.

    Raises:
        ValueError: x does not fit.
    """
    if x.dtype not in _DTYPES or x.dim() == 0 or x.shape[-1] % 4:
        raise ValueError(
            "x must be float32, bfloat16 or float16 of shape (..., features) with features a multiple of 4; "
            f"found {x.dtype} of {tuple(x.shape)}"
        )
    return _pruned_relu2(x.reshape(-1, x.shape[-1])).view(x.shape)


@torch.library.custom_op("sparse24::pruned_relu2", mutates_args=(), schema="(Tensor x) -> Tensor")
def _pruned_relu2(x: Tensor) -> Tensor:
    if use_kernels(x):
        from sparse24.gated import relu2_prune

        return relu2_prune(x)
    h = _value(x.float(), "relu2").to(x.dtype).contiguous()
    return h.masked_fill_(~magnitude_mask(h), 0)


@torch.library.custom_op("sparse24::pruned_relu2_backward", mutates_args=(), schema="(Tensor dy, Tensor x) -> Tensor")
def _pruned_relu2_backward(dy: Tensor, x: Tensor) -> Tensor:
    if use_kernels(x):
        from sparse24.gated import relu2_prune_backward

        return relu2_prune_backward(dy, x)
    mask = magnitude_mask(_value(x.float(), "relu2").to(x.dtype))
    return _gradient(dy.float(), x.float(), "relu2").masked_fill_(~mask, 0).to(x.dtype).contiguous()


@_pruned_relu2.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_pruned_relu2_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save_x(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient_of_x(ctx: torch.autograd.function.FunctionCtx, dy: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return _pruned_relu2_backward(dy, x)


_pruned_relu2.register_autograd(_gradient_of_x, setup_context=_save_x)
