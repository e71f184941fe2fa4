"""The training step of every objective, sparse or dense."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.optim.build import build_optimizers
from sparse_pretrain.optim.schedules import lr_share
from sparse_pretrain.seeds import hash_seed
from sparse_pretrain.sharding import data_parallel_rank, whole
from sparse_pretrain.sparsity.recipe import SparseTraining
from sparse_pretrain.sparsity.schedule import SPARSE
from sparse_pretrain.sparsity.swap import sparsify
from sparse_pretrain.tasks.guard import StepGuard
from sparse_pretrain.tasks.sharding import blocks_of, shard

if TYPE_CHECKING:
    from sparse_pretrain.tasks.teacher import Teacher

Batch = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """What of the data decides a model's shape; 0 = they have no such thing.

    Attributes:
        vocab_size: tokens of the tokenizer.
        num_classes: of images or texts; 1 = a score.
    """

    vocab_size: int = 0
    num_classes: int = 0

    @classmethod
    def of(cls, data: Any) -> Sizes:
        """Of a store of prepared data."""
        return cls(data.vocab_size or 0, getattr(data, "num_classes", None) or 0)  # a corpus has no classes


class Task(lightning.LightningModule):
    """A model in training, under a recipe; subclasses say what its loss is.

    One Lightning batch is one optimizer step: the examples of the whole step, cut into micro-batches here. That keeps
    the training step in one place and makes "once per optimizer step" (masks, decay, checkpoints, the data order) mean
    one thing. Everything random is drawn from (seed, step), so a resumed run continues bit for bit.

    Args:
        cfg: the whole run.
        sizes: of its data.
    """

    teaches = False  # whether `losses` knows teachers

    def __init__(self, cfg: TrainConfig, sizes: Sizes) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.cfg, self.sizes = cfg, sizes
        torch.manual_seed(cfg.seed)  # initial weights are a function of the seed alone
        self.model = self.build(cfg, sizes)
        self.layers = sparsify(self.model, cfg.recipe)
        self.sparse_training = SparseTraining(
            self.model,
            cfg.recipe,
            cfg.trainer.steps,
            cfg.seed,
            beta2=cfg.optimizer.betas[1],
            eps=cfg.optimizer.eps,
            new_head=new_head(self.model),
        )
        self.rows: dict[str, int] = {}  # of each product, for one example: the worker counts them
        self.guard = StepGuard(cfg.trainer.guard)
        self.steps_done = 0
        self.teacher: Teacher | None = None  # TeacherCallback brings it
        self.teacher_copy: dict[str, Tensor] | None = None  # the checkpoint's, for it
        # Since the last logged row, over the steps not dropped: sum of losses, of gradient norms, number of steps, sum
        # of distillation losses, number of steps with a teacher.
        self.register_buffer("sums", torch.zeros(5, dtype=torch.float64), persistent=False)
        self.sums: Tensor
        self._resumed = self.sharded = False
        self.forked = False  # whether the checkpoint to resume from is another run's: its masks may be out of date

    @staticmethod
    def build(cfg: TrainConfig, sizes: Sizes) -> nn.Module:
        """The run's model, dense, with initial weights."""
        raise NotImplementedError

    @staticmethod
    def example(cfg: TrainConfig) -> tuple[Tensor, ...]:
        """Inputs of the model for one example."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> Tensor | int:
        """How many predictions a batch's loss is the mean of."""
        raise NotImplementedError

    def losses(self, batch: Batch, step: int, first_row: int) -> tuple[Tensor, Tensor]:
        """The mean losses of part of a step's batch: the task's and the teacher's (0 without one).

        Args:
            batch: examples of this rank's batch of `step`, from `first_row` on.
        """
        raise NotImplementedError

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """What validation reports of a batch: `loss`, and others; each a sum and the count that it is to be divided by
        (2,) fp64."""
        raise NotImplementedError

    def augment(self, batch: Batch, step: int) -> Batch:
        """A step's training batch as it is learned from."""
        return batch

    def configure_model(self) -> None:
        """Under FSDP2: shard the model. Lightning calls it on each rank, once there is a mesh."""
        if self.device_mesh is None or self.sharded:
            return
        for layer in self.sparse_training.layers.values():
            layer.release()
        shard(self.model, self.device_mesh)
        self.sharded = True

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        training = self.sparse_training
        return build_optimizers(
            self.model, self.cfg.optimizer, training.decay, training.second_moment, own_lr=training.own_lr
        )

    def on_train_start(self) -> None:
        if self.forked:
            self.sparse_training.adopt()
        self._prepare_step(refresh=not self._resumed)
        if self.cfg.trainer.compile:
            for block in blocks_of(self.model):
                block.compile()

    def _prepare_step(self, refresh: bool) -> None:
        """Make the model, and the teacher it may become, ready for the next step."""
        self.sparse_training.prepare(self.steps_done, refresh)
        if self.teacher is not None and self.sparse_training.phase(self.steps_done) == SPARSE:
            self.teacher.appear(self.model)

    def training_step(self, batch: Batch, _: int) -> None:
        """batch: the examples of this rank."""
        step, trainer = self.steps_done, self.cfg.trainer
        optimizers: list[Any] = self.trainer.optimizers  # ours, which know `found_inf`
        rank, _ = data_parallel_rank(self.trainer)
        torch.manual_seed(hash_seed(self.cfg.seed, step, rank))  # dropout

        micro_batches = split_batch(self.augment(batch, step), trainer.micro_batch_size)
        shares = self._shares(micro_batches)
        taught = self.teacher is not None and self.teacher.is_there
        weight = self.cfg.recipe.teacher.weight if taught else 0.0
        losses = torch.zeros(2, device=self.device)  # the task's, the teacher's
        first_row = 0
        for i, (part, share) in enumerate(zip(micro_batches, shares, strict=True)):
            rows = -(-batch_size(part) * max(self.rows.values(), default=1) // 4) * 4
            self.sparse_training.at_tokens((rank * len(micro_batches) + i) * rows)
            last = i == len(micro_batches) - 1
            with self._sync_gradients(last):
                task, distillation = self.losses(part, step, first_row)
                objective = ((1 - weight) * task + weight * distillation) * share
                self.manual_backward(objective)
            losses += torch.stack((task, distillation)).detach() * share
            first_row += batch_size(part)
        loss, distillation = self._mean_over_ranks(losses)

        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # fp16 only
        if scaler is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        self.sparse_training.adjust_gradients()
        grad_norm = clip_gradients(self.model, trainer.grad_clip)
        dropped = self.guard.check(step, loss, grad_norm, loss_scaled=scaler is not None)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_share(step, trainer.steps, self.cfg.scheduler)
            optimizer.found_inf = dropped
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()

        one = torch.ones_like(loss)
        row = torch.stack((loss, grad_norm, one, distillation, one * taught)).double()
        self.sums += row.masked_fill(dropped > 0, 0.0)
        self.steps_done = step + 1
        self._prepare_step(refresh=True)

    def _shares(self, micro_batches: list[Batch]) -> Tensor:
        """What each micro-batch's mean loss counts for, (n,) fp32: gradients are averaged over ranks, and a mean over
        all targets is meant, of which ranks and micro-batches may have different numbers."""
        counts = torch.stack([torch.as_tensor(self.targets(part), device=self.device) for part in micro_batches])
        counts = counts.float()
        return counts / self._mean_over_ranks(counts.sum()).clamp(min=1)

    def _sync_gradients(self, last: bool) -> Any:
        """With DDP gradients are exchanged between ranks with the last micro-batch only; with FSDP2 with each, so that
        no rank holds whole ones in between."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if not last and isinstance(strategy, ParallelStrategy) else nullcontext()

    def _mean_over_ranks(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op="mean") if self.trainer.world_size > 1 else values

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.guard.raise_if_stopped()  # a run that is to stop leaves the checkpoints from before
        del checkpoint["loops"]  # `steps_done` says all there is to say; Lightning's counters would contradict it
        checkpoint["steps_done"] = self.steps_done
        checkpoint["sizes"] = asdict(self.sizes)
        checkpoint["sums"] = self.sums
        checkpoint["sparse_training"] = self.sparse_training.state_dict()
        copy = self.teacher.copy if self.teacher is not None else None
        checkpoint["teacher_copy"] = copy.state_dict() if copy is not None else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps_done = checkpoint["steps_done"]
        self.sums.copy_(checkpoint["sums"])
        self.sparse_training.load_state_dict(checkpoint["sparse_training"])
        self.teacher_copy = checkpoint["teacher_copy"]
        self._resumed = True


def new_head(model: nn.Module) -> list[nn.Parameter]:
    """What a model for fine-tuning has beside the `body` that another task has trained."""
    if not isinstance(getattr(model, "body", None), nn.Module):
        return []
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("body.")]


def batch_size(batch: Batch) -> int:
    """How many examples there are."""
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def to_device(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def split_batch(batch: Batch, size: int | None) -> list[Batch]:
    """Consecutive parts of at most `size` examples; null = one part."""
    size = size or batch_size(batch)
    if isinstance(batch, Tensor):
        return list(batch.split(size))
    parts = {name: tensor.split(size) for name, tensor in batch.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


def embedding_rows(cfg_rows: int | None, vocab_size: int) -> int:
    """As the model's options say, else the tokenizer's tokens rounded up to 64, which matrix products like."""
    return cfg_rows or -(-vocab_size // 64) * 64


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """The gradients' global 2-norm (0-dim fp32), before they are scaled to at most `max_norm`."""
    meshes: dict[Any, list[nn.Parameter]] = {}  # over which they are sharded: torch takes those of one together
    for parameter in model.parameters():
        if parameter.grad is not None:
            meshes.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])) for some in meshes.values()]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for some in meshes.values():
        nn.utils.clip_grads_with_norm_(some, math.inf if max_norm is None else max_norm, norm)
    return norm.float()
