"""DDP that does not send the gradients that `weight_gradient=masked` throws away."""

from typing import Any  # annotations are no strings here: DDP looks at those of its hook

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.sparsity.recipe import SparseTraining
from sparse_pretrain.sparsity.schedule import SPARSE


class MaskedDDPStrategy(DDPStrategy):
    """Lightning's, with `mean_of_kept` for the exchange of gradients. Lightning itself would use it on GPUs only."""

    def __init__(self, training: SparseTraining, **options: Any) -> None:
        super().__init__(**options)
        self.training = training

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self.training, mean_of_kept)


def mean_of_kept(training: SparseTraining, bucket: distributed.GradBucket) -> Future[Tensor]:
    """A communication hook of DDP: the mean of a bucket's gradients over all ranks. In the sparse phase those of pruned
    weights are not sent and become 0, which `SparseTraining.adjust_gradients` would make them (but if they are not
    finite).

    Every rank has the same masks, of exactly N in M, so sizes are known without asking the device. Gradients are
    divided before they are summed, as DDP does it.
    """
    masks = training.decay.masks if training.phase(training.step) == SPARSE else {}
    kept, group = parse_pattern(training.recipe.pattern) or (1, 1)
    parts: list[tuple[Tensor, Tensor | None]] = []
    sent: list[Tensor] = []
    for weight, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        mask, values = masks.get(weight), gradient.flatten()  # type: ignore[call-overload]
        if mask is not None:
            places = torch.nonzero_static(mask.flatten(), size=mask.numel() * kept // group).squeeze(1)
            values = values[places]
        parts.append((gradient, mask))
        sent.append(values)
    sizes = [len(values) for values in sent]
    packed = any(mask is not None for _, mask in parts)
    buffer = bucket.buffer()
    message = (torch.cat(sent) if packed else buffer).mul_(1 / distributed.get_world_size())

    def unpack(summed: Future[list[Tensor]]) -> Tensor:
        if packed:
            for (gradient, mask), values in zip(parts, summed.value()[0].split(sizes), strict=True):
                if mask is None:
                    gradient.copy_(values.view_as(gradient))
                else:
                    gradient.zero_().masked_scatter_(mask, values)
        return buffer

    return distributed.all_reduce(message, async_op=True).get_future().then(unpack)
