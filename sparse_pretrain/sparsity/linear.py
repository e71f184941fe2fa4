"""The 2:4 sparse linear layer that takes the place of an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from sparse24 import ops
from sparse24.autograd import MvueKey, SparseWeight, fp8_weight, sparse_linear
from sparse24.backends import split_choice
from sparse24.backends.base import Operand
from sparse24.dispatch import Plan
from sparse24.reference import soft_threshold_scale
from torch import Tensor, nn


class SparseLinear(nn.Module):
    """Y = X Ŵᵀ + b with Ŵ the 2:4 projection of the master weight, which receives the straight-through gradient.

    `weight` and `bias` are the swapped layer's own Parameter objects under its own names, so optimizers, checkpoints
    and tied weights do not notice the swap; `mask` (boolean, the weight's shape, True = kept) is an extra buffer. Ŵ is
    kept from one `project` to the next: once per optimizer step, whatever the number of micro-batches. It is held as
    `plan` says, a dense tensor or packed, in `product_dtype`.

    Args:
        dense: the layer to replace: an `nn.Linear`, or a Hugging Face `Conv1D` (its weight is (in, out)).
        projection: `magnitude`, `transposable`, or `soft_threshold` (S-STE: Ŵ = β·S(W); β is computed here, from the
            weight as it is now, and is the buffer `scale` from then on).
        weight_gradient: `dense`, or `mvue` to prune dY without bias before dW = dYᵀX.
        fp8: products of e4m3 (forward) and e5m2 (gradients) values; Ŵ is held in both, quantised once per `project`.
    """

    mask: Tensor
    scale: Tensor | None
    sparse_weight: Tensor | None

    def __init__(self, dense: nn.Module, projection: str, weight_gradient: str = "dense", fp8: bool = False) -> None:
        super().__init__()
        self._dense = (dense,)  # in a tuple, so that it is no submodule: given back by `densify`
        self.transposed = is_conv1d(dense)
        self.weight: nn.Parameter = dense.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = dense.bias  # type: ignore[assignment]
        self.out_features, self.in_features = self._out_by_in(self.weight).shape
        self.projection = projection
        self.weight_gradient = weight_gradient
        self.fp8 = fp8
        self.mvue: MvueKey | None = None  # set by SparseTraining
        self.plan = Plan()  # dense products, until `sparsity.products` has measured
        self.product_dtype = self.weight.dtype
        self.packed: SparseWeight | None = None  # Ŵ, unless it is in the buffer `sparse_weight`
        self.register_buffer("mask", torch.empty_like(self.weight, dtype=torch.bool))
        self.register_buffer("sparse_weight", None, persistent=False)
        self.register_buffer("scale", None)
        if projection == "soft_threshold":
            self.scale = soft_threshold_scale(self._out_by_in(self.weight.detach()))
        self.refresh()
        self.project()
        self.train(dense.training)

    def _out_by_in(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed else tensor

    @property
    def is_sparse(self) -> bool:
        """Whether products use the 2:4 weight (else the dense master weight)."""
        return self.sparse_weight is not None or self.packed is not None

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """Recompute the mask from the master weight; returns how many of its entries changed (0-dim int64)."""
        projection = "magnitude" if self.projection == "soft_threshold" else self.projection
        return ops.refresh_mask_(self._out_by_in(self.weight), self._out_by_in(self.mask), projection)

    @torch.no_grad()
    def project(self) -> None:
        """Recompute Ŵ, which is M⊙W or β·S(W), from the master weight and go on with it."""
        weight, mask, scale = self._out_by_in(self.weight), self._out_by_in(self.mask), self.scale
        if self.fp8:
            dense = ops.sparse_weight(weight, mask, scale, torch.float32)
            self._hold(fp8_weight(dense, self.plan.forward))
            return
        if self.plan.forward == self.plan.input_gradient == "dense":
            self.packed = None
            if self.sparse_weight is None or self.sparse_weight.dtype != self.product_dtype:
                self.sparse_weight = torch.empty(weight.shape, dtype=self.product_dtype, device=weight.device)
            ops.sparse_weight(weight, mask, scale, out=self.sparse_weight)
            return
        self.sparse_weight = None
        forward, _ = split_choice(self.plan.forward)
        transpose, _ = split_choice(self.plan.input_gradient)
        dtype = self.product_dtype
        if forward is transpose:
            operand, operand_t = forward.pack_weight(weight, mask, scale, dtype, forward=True, transpose=True)
        else:
            operand, _ = forward.pack_weight(weight, mask, scale, dtype, forward=True, transpose=False)
            _, operand_t = transpose.pack_weight(weight, mask, scale, dtype, forward=False, transpose=True)
        self._hold(
            SparseWeight(
                Operand(self.plan.forward, operand),
                Operand(self.plan.input_gradient, operand_t),
                self.plan.weight_gradient,
            )
        )

    def _hold(self, packed: SparseWeight) -> None:
        """Go on with this Ŵ, in the memory of the one before, where a captured CUDA graph will look for it."""
        if self.packed is None or _choices(self.packed) != _choices(packed):
            self.packed = packed
            return
        for old, new in zip(self.packed[:2], packed[:2], strict=True):
            for old_tensor, new_tensor in zip(old.tensors, new.tensors, strict=True):
                old_tensor.copy_(new_tensor)

    @torch.no_grad()
    def current_weight(self) -> Tensor:
        """Ŵ (out_features, in_features) of the master weight as it is now, in its dtype."""
        weight = self._out_by_in(self.weight)
        return ops.sparse_weight(weight, self._out_by_in(self.mask), self.scale, out=torch.empty_like(weight))

    def go_dense(self) -> None:
        """Use the master weight as it is, until the next `project`."""
        self.sparse_weight = self.packed = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., out_features)."""
        weight = self._out_by_in(self.weight)
        sparse_weight = self.sparse_weight if self.packed is None else self.packed
        if sparse_weight is None:
            return F.linear(x, weight, self.bias)
        if self.weight_gradient == "mvue" and self.mvue is None and torch.is_grad_enabled():
            raise RuntimeError("a layer with weight_gradient=mvue trains only under a SparseTraining")
        packed = self.packed is not None and not self.fp8
        if packed and x.dtype != self.product_dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x must be {self.product_dtype}, as the packed weight, or under autocast; found {x.dtype}"
            )
        return sparse_linear(x, weight, sparse_weight, self.bias, self.mvue, self.fp8)

    def dense_layer(self) -> nn.Module:
        """The swapped layer, holding the weight that this one computes with now (in fp8: before it is quantised)."""
        (dense,) = self._dense
        dense.weight = self.weight
        dense.register_parameter("bias", self.bias)
        if self.is_sparse:
            # A Parameter of its own: the master weight may be tied to another layer, which goes on using it.
            dense.weight = nn.Parameter(self._out_by_in(self.current_weight()).contiguous())
        return dense.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A fp8 Ŵ is in no buffer, which a change of dtype would change: after a move it is made anew."""
        super()._apply(fn, recurse)
        if self.fp8 and self.packed is not None and self.packed.forward.choice == "dense":
            self.packed = None
            self.project()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Loads dense checkpoints too: without a mask in them, mask and scale are recomputed from the loaded weight."""
        from_dense = f"{prefix}weight" in state_dict and f"{prefix}mask" not in state_dict
        own = {f"{prefix}mask": self.mask} | ({} if self.scale is None else {f"{prefix}scale": self.scale})
        if from_dense:
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if from_dense:
            for key in own:
                del state_dict[key]
            if self.scale is not None:
                self.scale.copy_(soft_threshold_scale(self._out_by_in(self.weight.detach())))
            self.refresh()
        if self.is_sparse:
            self.project()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"projection={self.projection}, weight_gradient={self.weight_gradient}, fp8={self.fp8}"
        )


def _choices(packed: SparseWeight) -> tuple[str, str, str]:
    return packed.forward.choice, packed.input_gradient.choice, packed.weight_gradient


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's `Conv1D`, told by name so that `transformers` need not be installed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
