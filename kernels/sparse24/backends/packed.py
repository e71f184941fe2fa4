"""What our own backends share: Ŵ packed by our own kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse24.backends.base import Backend


class PackedBackend(Backend):
    """Operands are values and metadata, in fragment order or row-major; both directions in one pass over W."""

    fragments: bool

    def pack_weight(
        self, weight: Tensor, mask: Tensor, scale: Tensor | None, dtype: torch.dtype, forward: bool, transpose: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        from sparse24.prune import prune_pack
        from sparse24.transposable import pack_both

        if forward and transpose:
            packed, packed_t = pack_both(weight, "mask", dtype, mask=mask, fragments=self.fragments)
            return [packed.values, packed.metadata], [packed_t.values, packed_t.metadata]
        if scale is not None:
            packed = prune_pack(weight, "soft_threshold", dtype, scale=scale, fragments=self.fragments)
        else:
            one = (weight.t(), mask.t()) if transpose else (weight, mask)
            packed = prune_pack(one[0], "mask", dtype, mask=one[1], fragments=self.fragments)
        tensors = [packed.values, packed.metadata]
        return (tensors, []) if forward else ([], tensors)
