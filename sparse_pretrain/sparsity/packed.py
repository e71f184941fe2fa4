"""2:4 layers that hold their weight packed: values and 2-bit metadata, 9/16 of the bytes in bf16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from sparse24 import ops
from sparse24.backends import BACKENDS, split_choice
from sparse24.backends.base import FORWARD, Product
from sparse24.backends.triton import MOST_TOKENS
from sparse24.dispatch import LayerShape, UnsupportedError, choose, table
from sparse24.reference import Packed, pack, unpack
from torch import Tensor, nn

from sparse_pretrain.errors import UserError
from sparse_pretrain.sparsity.adapters import add_adapter
from sparse_pretrain.sparsity.conv import SparseConv2d
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.sparsity.swap import replace

ROW_MAJOR = "row-major"  # the form that needs no backend
TOKEN_STEP = 8  # every backend takes multiples of it, and pads other numbers of tokens
PRODUCTS_A_PACKING = 1000  # so many that packing costs nothing


class PackedLinear(nn.Module):
    """Y = X Ŵᵀ + b, for inference, with any number of tokens.

    Row-major, Ŵ is `values` and `metadata` as in `sparse24.packing`: with few tokens on a GPU Triton's kernel reads
    them as they are, else Ŵ is rebuilt for each product. A backend keeps them in a form of its own (cuSPARSELt's is one
    tensor, without metadata) and pads tokens as it must.

    Args:
        layer: with a 2:4 weight.
        choice: `ROW_MAJOR`, or a backend's and its variant's name.
        dtype: of the values; null = the weight's.
    """

    values: Tensor
    metadata: Tensor | None

    def __init__(self, layer: SparseLinear, choice: str = ROW_MAJOR, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        weight, mask = layer.current_weight(), layer.out_by_in(layer.mask)
        dtype = dtype or weight.dtype
        if choice == "triton":
            choice = ROW_MAJOR  # its form, which serves many tokens too
        if choice == ROW_MAJOR:
            packed = pack(weight.to(dtype), mask)
            operand = [packed.values, packed.metadata]
        else:
            operand, _ = split_choice(choice)[0].pack_weight(weight, mask, None, dtype, forward=True, transpose=False)
        self.choice, self.dtype = choice, dtype
        self.out_features, self.in_features = weight.shape
        self.register_buffer("values", operand[0])
        self.register_buffer("metadata", operand[1] if len(operand) > 1 else None)
        self.bias = layer.bias
        if hasattr(layer, "adapter"):
            self.adapter = layer.adapter
            self.register_forward_hook(add_adapter)

    @property
    def operand(self) -> list[Tensor]:
        return [self.values] if self.metadata is None else [self.values, self.metadata]

    def unpacked(self) -> Tensor:
        """Ŵ (out_features, in_features), from the row-major form."""
        assert self.metadata is not None
        packed = Packed(self.values, self.metadata, self.in_features)
        if not ops.use_kernels(self.values):
            return unpack(packed)
        from sparse24.prune import unpack_dense

        return unpack_dense(packed)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., out_features)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        choice = self.choice
        if choice == ROW_MAJOR and self._read_by_triton(x):
            choice = "triton"
        if choice == ROW_MAJOR:
            return F.linear(x, self.unpacked(), self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.linear(choice, self.operand, x, bias, self.out_features)

    def _read_by_triton(self, x: Tensor) -> bool:
        product = Product(FORWARD, x.shape[:-1].numel(), self.out_features, self.in_features, x.dtype)
        return x.dtype == self.dtype and BACKENDS["triton"].supports(product, x.device)[0]


class PackedConv2d(PackedLinear):
    """The same for a convolution, which is one of the rebuilt Ŵ."""

    def __init__(self, layer: SparseConv2d, dtype: torch.dtype | None = None) -> None:
        super().__init__(layer, ROW_MAJOR, dtype)
        self.geometry, self.shape = layer.geometry, layer.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width)."""
        return self.geometry.convolve(self.geometry.framed(x), self.unpacked().view(self.shape), self.bias)


def pack_model(model: nn.Module, choices: Mapping[str, str] | None = None, dtype: torch.dtype | None = None) -> int:
    """Replace the 2:4 layers of `model` that are in their sparse phase by packed ones, in place; returns how many.
    Adapters stay beside them.

    Args:
        choices: layer name -> what multiplies (`PackedLinear`); those not named are row-major.
        dtype: of the values; null = the weights'.

    Raises:
        ValueError: their pattern is not 2:4.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, SparseLinear) and m.is_sparse]
    for name, layer in layers:
        if layer.pattern != (2, 4):
            raise ValueError(f"{name} is {'{}:{}'.format(*layer.pattern)}: only 2:4 can be packed")
    with torch.no_grad():
        for name, layer in layers:
            if isinstance(layer, SparseConv2d):
                replace(model, name, PackedConv2d(layer, dtype))
            else:
                replace(model, name, PackedLinear(layer, (choices or {}).get(name, ROW_MAJOR), dtype))
    return len(layers)


def choose_backends(
    model: nn.Module,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str = "auto",
    cache: Path | None = None,
) -> tuple[dict[str, str], str]:
    """What is to multiply in each layer that `pack_model` packs, by name, and the measurements as a table (empty if
    there were none).

    Args:
        model: with its sparse layers.
        tokens: of the products that are to be fast: while generating, one a text.
        dtype: of the products.
        device: where they will be.
        backend: `auto`: the fastest, row-major where none is faster than dense products; or a backend's name.
        cache: a file that remembers measurements; None = measure anew.

    Raises:
        UserError: the backend asked for cannot serve a layer.
    """
    choices: dict[str, str] = {}
    tables: dict[LayerShape, str] = {}
    tokens = -(-tokens // TOKEN_STEP) * TOKEN_STEP
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLinear) or isinstance(layer, SparseConv2d) or not layer.is_sparse:
            continue
        shape = LayerShape(
            min(tokens, MOST_TOKENS) if backend == "triton" else tokens,  # with more of them it rebuilds Ŵ
            layer.out_features,
            layer.in_features,
            dtype,
            transposable=False,
            mvue=False,
            micro_batches=PRODUCTS_A_PACKING,
        )
        try:
            plan, measured = choose(shape, device, backend, cache)
        except UnsupportedError as error:
            raise UserError("backend", f"{backend}, which cannot serve {name}: {error}", "auto") from error
        if measured:
            tables[shape] = table(shape, plan, measured)
        choices[name] = ROW_MAJOR if plan.forward == "dense" else plan.forward
    return choices, "\n".join(tables.values())
