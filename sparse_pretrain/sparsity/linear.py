"""The 2:4 sparse linear layer that takes the place of an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.sharding import Split, own, whole
from sparse_pretrain.sparsity.learned import LearnedMask


class SparseLinear(nn.Module):
    """Y = X Ŵᵀ + b with Ŵ the 2:4 projection of the master weight, which receives the straight-through gradient.

    `weight` and `bias` are the swapped layer's own Parameter objects under its own names, so optimizers, checkpoints
    and tied weights do not notice the swap; `mask` (boolean, the weight's shape, True = kept) is an extra buffer. Ŵ is
    kept from one `project` to the next: once per optimizer step, whatever the number of micro-batches. It is held as
    `plan` says, a dense tensor or packed, in `product_dtype`.

    Other buffers, each there only where the recipe asks for it: `input_mask`, for `input_gradient=double_pruned`
    (SLoPe), what dX = dY W keeps of Ŵ: 2:4 along out_features, zeros of Ŵ where there are too few others;
    `input_square`, per input the sum of squares since the last refresh, for `projection=metric` (Wanda), to which
    SparseTraining adds `step_square`, that of the step being made (a grouped convolution has those of each group one
    after another); `scale`, β of `projection=soft_threshold` (S-STE:
    Ŵ = β·S(W)), which `start` computes and which is kept from then on.

    Args:
        dense: the layer to replace: an `nn.Linear`, or a Hugging Face `Conv1D` (its weight is (in, out)).
        recipe: its projection, pattern, input_gradient, weight_gradient and fp8 are this layer's. In fp8 Ŵ is held as
            e4m3 (forward) and e5m2 (gradients) values, quantised once per `project`.
    """

    mask: Tensor
    input_mask: Tensor | None
    input_square: Tensor | None
    step_square: Tensor | None
    scale: Tensor | None
    sparse_weight: Tensor | None
    input_weight: Tensor | None

    def __init__(self, dense: nn.Module, recipe: RecipeConfig) -> None:
        super().__init__()
        self._dense = (dense,)  # in a tuple, so that it is no submodule: given back by `densify`
        self.transposed = is_conv1d(dense)
        self.weight: nn.Parameter = dense.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = dense.bias  # type: ignore[assignment]
        self.out_features, self.in_features = self.out_by_in(self.weight).shape
        self.groups: int = getattr(dense, "groups", 1)  # of a convolution: each has inputs of its own
        self.projection = recipe.projection
        pattern = parse_pattern(recipe.pattern)
        assert pattern is not None
        self.pattern = pattern
        self.input_gradient = recipe.input_gradient
        self.input_is_sparse = recipe.input_is_sparse
        self.weight_gradient = recipe.weight_gradient
        self.fp8 = recipe.fp8
        self.mvue: MvueKey | None = None  # set by SparseTraining
        self.split: Split | None = None  # set where ranks compute the layer together: each then has a part of Ŵ
        self.plan = Plan()  # dense products, until `sparsity.products` has measured
        self.product_dtype = self.weight.dtype
        self._whole: Tensor | None = None
        self.packed: SparseWeight | None = None  # Ŵ, unless it is in the buffer `sparse_weight`
        self.register_buffer("mask", torch.empty_like(self.weight, dtype=torch.bool))
        self.register_buffer("sparse_weight", None, persistent=False)
        self.register_buffer("input_weight", None, persistent=False)
        self.register_buffer("step_square", None, persistent=False)
        for name in ("scale", "input_mask", "input_square"):
            self.register_buffer(name, None)
        if self.input_gradient == "double_pruned":
            self.input_mask = torch.empty_like(self.mask)
        if self.projection == "metric":
            self.input_square = torch.zeros(self.groups * self.in_features, device=self.weight.device)
            self.step_square = torch.zeros_like(self.input_square)
        if self.projection == "soft_threshold":
            self.scale = torch.empty((), dtype=torch.float32, device=self.weight.device)
        learned = self.projection == "learned"
        self.learned = LearnedMask(self.out_features, self.in_features, *pattern, recipe.learned) if learned else None
        self.start(seed=0)
        self.refresh()
        self.project()
        self.train(dense.training)

    def out_by_in(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as (out_features, in_features), sharing its memory."""
        return tensor.t() if self.transposed else tensor

    def as_weight(self, matrix: Tensor) -> Tensor:
        """A matrix (out_features, in_features) in the weight's shape."""
        return matrix.t() if self.transposed else matrix

    def master_weight(self) -> Tensor:
        """`weight`, whole where it is sharded: every rank then has to ask."""
        return whole(self.weight.detach()) if self._whole is None else self._whole

    def part(self, matrix: Tensor) -> Tensor:
        """Of a matrix (out_features, in_features) what this rank computes with."""
        return matrix if self.split is None else self.split.part(matrix).contiguous()

    @property
    def part_shape(self) -> tuple[int, int]:
        """(out_features, in_features) of what this rank computes with."""
        shape = [self.out_features, self.in_features]
        if self.split is not None:
            shape[self.split.dimension] //= self.split.mesh.size()
        return shape[0], shape[1]

    @property
    def first_feature(self) -> int:
        """Which of its outputs the first one that this rank computes is."""
        return 0 if self.split is None or self.split.dimension == 1 else self.split.first(self.out_features)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it a sharded weight is gathered once, and must not change."""
        self._whole = self.master_weight()
        try:
            yield
        finally:
            self._whole = None

    @property
    def is_sparse(self) -> bool:
        """Whether products use the 2:4 weight (else the dense master weight)."""
        return self.sparse_weight is not None or self.packed is not None

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Choose what is chosen once, at the first sparse step: static masks, the prior of learned ones, and β."""
        weight, mask = self.out_by_in(self.master_weight()), self.out_by_in(self.mask)
        if self.scale is not None:
            self.scale.copy_(soft_threshold_scale(weight))
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same masks on every device
        if self.projection == "static_random":
            scores = torch.rand(weight.shape, generator=generator) + 1
            ops.refresh_mask_(scores.to(weight.device), mask, "magnitude", self.pattern)
        elif self.projection in ("static", "learned"):
            ops.refresh_mask_(weight, mask, "magnitude", self.pattern)
        if self.learned is not None:
            self.learned.start(mask, generator)

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """Recompute what is not chosen once; returns how many entries of the mask changed (0-dim int64)."""
        weight, mask = self.out_by_in(self.master_weight()), self.out_by_in(self.mask)
        if self.projection.startswith("static"):
            flips = torch.zeros((), dtype=torch.int64, device=weight.device)
        elif self.learned is not None:
            new = self.learned.hard_mask()
            flips = (new != mask).sum()
            mask.copy_(new)
        else:
            transposable = self.projection == "transposable"
            scores = weight if self.input_square is None else self._by_input(weight, self.input_square)
            flips = ops.refresh_mask_(scores, mask, "transposable" if transposable else "magnitude", self.pattern)
        if self.input_mask is not None:
            input_mask = self.out_by_in(self.input_mask)
            ops.refresh_mask_((weight * mask).t(), input_mask.t(), "magnitude", self.pattern)
        return flips

    def _by_input(self, weight: Tensor, square: Tensor) -> Tensor:
        """W_ij·‖X_j‖₂, the inputs since the last refresh (Wanda), which starts anew now; W if there was no input."""
        norm = torch.where(square.amax() > 0, square, 1.0).sqrt()
        square.zero_()
        return (weight.unflatten(0, (self.groups, -1)) * norm.view(self.groups, 1, -1)).flatten(0, 1)

    @torch.no_grad()
    def project(self) -> None:
        """Recompute Ŵ, which is M⊙W or β·S(W), from the master weight and go on with it."""
        weight, mask = self.part(self.out_by_in(self.master_weight())), self.part(self.out_by_in(self.mask))
        input_mask = mask if self.input_mask is None else self.part(self.out_by_in(self.input_mask))
        scale = self.scale
        if self.fp8:
            dense = ops.sparse_weight(weight, mask, scale, torch.float32)
            other = None if self.input_gradient == "same" else self._weight_of_dx(weight, mask, input_mask).float()
            self._hold(fp8_weight(dense, self.plan.forward, other, self._group))
            return
        if self.plan.forward == self.plan.input_gradient == "dense":
            self.packed = None
            if self.sparse_weight is None or self.sparse_weight.dtype != self.product_dtype:
                self.sparse_weight = torch.empty(weight.shape, dtype=self.product_dtype, device=weight.device)
                if self.input_gradient != "same":
                    self.input_weight = torch.empty_like(self.sparse_weight)
            ops.sparse_weight(weight, mask, scale, out=self.sparse_weight)
            if self.input_weight is not None:
                self.input_weight.copy_(self._weight_of_dx(weight, mask, input_mask))
            return
        self.sparse_weight = self.input_weight = None
        forward, _ = split_choice(self.plan.forward)
        transpose, _ = split_choice(self.plan.input_gradient)
        dtype = self.product_dtype
        if self.input_gradient == "dense":
            operand, _ = forward.pack_weight(weight, mask, scale, dtype, forward=True, transpose=False)
            operand_t = [weight.to(dtype, copy=True).t()]
        elif forward is transpose and input_mask is mask:
            operand, operand_t = forward.pack_weight(weight, mask, scale, dtype, forward=True, transpose=True)
        else:
            operand, _ = forward.pack_weight(weight, mask, scale, dtype, forward=True, transpose=False)
            source = weight if input_mask is mask else weight * mask
            _, operand_t = transpose.pack_weight(source, input_mask, scale, dtype, forward=False, transpose=True)
        self._hold(
            SparseWeight(
                Operand(self.plan.forward, operand),
                Operand(self.plan.input_gradient, operand_t),
                self.plan.weight_gradient,
            )
        )

    def _weight_of_dx(self, weight: Tensor, mask: Tensor, input_mask: Tensor) -> Tensor:
        return weight if self.input_gradient == "dense" else weight * mask * input_mask

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
        weight = self.out_by_in(self.master_weight())
        return ops.sparse_weight(weight, self.out_by_in(self.mask), self.scale, out=torch.empty_like(weight))

    def go_dense(self) -> None:
        """Use the master weight as it is, until the next `project`."""
        self.sparse_weight = self.input_weight = self.packed = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., out_features)."""
        weight = self.out_by_in(own(self.weight))
        training = self.training and torch.is_grad_enabled()
        if self.step_square is not None and training:  # twice if recomputed for the backward pass, as all others then
            self._measure(self.step_square, x.detach().float())
        if not self.is_sparse:
            return self._product(x, weight)
        if self.learned is not None and training:
            return self._product(x, weight * self.learned.soft_mask(self.split))
        if self.weight_gradient == "mvue" and self.mvue is None and torch.is_grad_enabled():
            raise RuntimeError("a layer with weight_gradient=mvue trains only under a SparseTraining")
        packed = self.packed is not None and not self.fp8
        if packed and x.dtype != self.product_dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x must be {self.product_dtype}, as the packed weight, or under autocast; found {x.dtype}"
            )
        return self._sparse_product(x, weight)

    def _measure(self, total: Tensor, x: Tensor) -> None:
        """Add the squares of this rank's inputs, of those that several have once."""
        if self.split is None or (self.split.dimension == 0 and self.split.is_first):
            total += self._input_square(x)
        elif self.split.dimension == 1:
            self.split.part(total, 0).add_(self._input_square(x))

    def _input_square(self, x: Tensor) -> Tensor:
        """Per input the sum of squares over all tokens."""
        return x.square().flatten(0, -2).sum(dim=0)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """With any weight (out_features, in_features), differentiable in it."""
        return F.linear(x, weight, self._bias())

    def _bias(self) -> Tensor | None:
        return self.bias if self.split is None else self.split.bias(self.bias, self.out_features)

    @property
    def _group(self) -> str | None:
        return None if self.split is None else self.split.group

    def _sparse_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """With Ŵ; the straight-through gradient goes to `weight`, the master weight."""
        return sparse_linear(x, weight, self._operands(), self._bias(), self.mvue, self.fp8, self._group)

    def _operands(self) -> SparseWeight:
        if self.packed is not None:
            return self.packed
        assert self.sparse_weight is not None
        input_weight = [] if self.input_weight is None else [self.input_weight.t()]
        dense = Operand("dense", [self.sparse_weight]), Operand("dense", input_weight)
        return SparseWeight(*dense, self.plan.weight_gradient)

    def release(self) -> None:
        """Let go of the swapped layer's tensors, before those of this one are sharded; `dense_layer` sets them anew."""
        (dense,) = self._dense
        dense.weight = dense.bias = None  # type: ignore[assignment]

    def dense_layer(self) -> nn.Module:
        """The swapped layer, holding the weight that this one computes with now (in fp8: before it is quantised). An
        active adapter is merged into it."""
        (dense,) = self._dense
        dense.weight = self.weight
        dense.register_parameter("bias", self.bias)
        adapter = getattr(self, "adapter", None)
        if adapter is not None and not (adapter.active and adapter.original is None):
            adapter = None
        if self.is_sparse or adapter is not None:
            # A Parameter of its own: the master weight may be tied to another layer, which goes on using it.
            weight = self.current_weight() if self.is_sparse else self.out_by_in(self.weight.detach())
            if adapter is not None:
                weight = weight + adapter.delta().detach()
            dense.weight = nn.Parameter(self.as_weight(weight).contiguous())
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
        own = {
            f"{prefix}{name}": tensor
            for name, tensor in self.state_dict().items()
            if name not in ("weight", "bias") and f"{prefix}{name}" not in state_dict
        }
        if from_dense:
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if from_dense:
            self.start(seed=0)
            self.refresh()
        if self.is_sparse:
            self.project()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"projection={self.projection}, pattern={'{}:{}'.format(*self.pattern)}, "
            f"input_gradient={self.input_gradient}, weight_gradient={self.weight_gradient}, fp8={self.fp8}"
        )


def _choices(packed: SparseWeight) -> tuple[str, str, str]:
    return packed.forward.choice, packed.input_gradient.choice, packed.weight_gradient


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's `Conv1D`, told by name so that `transformers` need not be installed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
