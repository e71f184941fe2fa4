"""Next-token prediction: the training step of every decoder, sparse or dense."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.evaluation.perplexity import cross_entropies
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.optim.build import build_optimizers
from sparse_pretrain.optim.schedules import lr_share
from sparse_pretrain.seeds import hash_seed
from sparse_pretrain.sparsity.recipe import SparseTraining
from sparse_pretrain.sparsity.schedule import SPARSE
from sparse_pretrain.sparsity.swap import sparsify
from sparse_pretrain.tasks.guard import StepGuard

if TYPE_CHECKING:
    from sparse_pretrain.tasks.teacher import Teacher


class CausalLM(lightning.LightningModule):
    """A GPT in training, under a recipe.

    One Lightning batch is one optimizer step: the sequences of the whole step, cut into micro-batches here. That keeps
    the training step in one place and makes "once per optimizer step" (masks, decay, checkpoints, the data order) mean
    one thing. Everything random is drawn from (seed, step), so a resumed run continues bit for bit.

    Args:
        cfg: the whole run.
        vocab_size: of the tokenizer; the embedding gets `model.vocab_size` rows if that is set.
    """

    def __init__(self, cfg: TrainConfig, vocab_size: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.cfg = cfg
        self.model = build_model(cfg, vocab_size)
        self.layers = sparsify(self.model, cfg.recipe)
        self.sparse_training = SparseTraining(
            self.model, cfg.recipe, cfg.trainer.steps, cfg.seed, beta2=cfg.optimizer.betas[1], eps=cfg.optimizer.eps
        )
        self.guard = StepGuard(cfg.trainer.guard)
        self.steps_done = 0
        self.teacher: Teacher | None = None  # TeacherCallback brings it
        self.teacher_copy: dict[str, Tensor] | None = None  # the checkpoint's, for it
        # Since the last logged row, over the steps not dropped: sum of losses, of gradient norms, number of steps, sum
        # of distillation losses, number of steps with a teacher.
        self.register_buffer("sums", torch.zeros(5, dtype=torch.float64), persistent=False)
        self.sums: Tensor
        self._resumed = False
        self.forked = False  # whether the checkpoint to resume from is another run's: its masks may be out of date

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        training = self.sparse_training
        return build_optimizers(
            self.model, self.cfg.optimizer, training.decay, training.second_moment, own_lr=training.own_lr
        )

    def on_fit_start(self) -> None:
        if self.forked:
            self.sparse_training.adopt()
        self._prepare_step(refresh=not self._resumed)
        if self.cfg.trainer.compile:
            for block in self.model.blocks:
                block.compile()

    def _prepare_step(self, refresh: bool) -> None:
        """Make the model, and the teacher it may become, ready for the next step."""
        self.sparse_training.prepare(self.steps_done, refresh)
        if self.teacher is not None and self.sparse_training.phase(self.steps_done) == SPARSE:
            self.teacher.appear(self.model)

    def training_step(self, batch: Tensor, _: int) -> None:
        """batch: (sequences of this rank, seq_len + 1) int64."""
        step, trainer = self.steps_done, self.cfg.trainer
        optimizers: list[Any] = self.trainer.optimizers  # ours, which know `found_inf`
        torch.manual_seed(hash_seed(self.cfg.seed, step, self.global_rank))  # dropout

        micro_batches: tuple[Tensor, ...] = batch.split(trainer.micro_batch_size or len(batch))
        teacher = self.teacher if self.teacher is not None and self.teacher.is_there else None
        losses = torch.zeros(2, device=self.device)  # the task's, the teacher's
        for i, sequences in enumerate(micro_batches):
            tokens = sequences[:, 1:].numel()
            self.sparse_training.at_tokens((self.global_rank * len(micro_batches) + i) * (-(-tokens // 4) * 4))
            last = i == len(micro_batches) - 1
            with self._sync_gradients(last):
                logits = self.model(sequences[:, :-1])
                task = objective = cross_entropies(logits, sequences).mean()
                distillation = torch.zeros_like(task)
                if teacher is not None:
                    distillation = teacher.loss(logits, sequences, step, first_row=i * len(micro_batches[0]))
                    objective = (1 - teacher.cfg.weight) * task + teacher.cfg.weight * distillation
                objective = objective / len(micro_batches)
                if last:  # once a step: it does not depend on the batch
                    objective = objective + self.sparse_training.penalty()
                self.manual_backward(objective)
            losses += torch.stack((task, distillation)).detach() / len(micro_batches)
        loss, distillation = self._mean_over_ranks(losses)
        self.sparse_training.select_gradients()

        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # fp16 only
        if scaler is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
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
        taught = one if teacher is not None else torch.zeros_like(loss)
        row = torch.stack((loss, grad_norm, one, distillation, taught)).double()
        self.sums += row.masked_fill(dropped > 0, 0.0)
        self.steps_done = step + 1
        self._prepare_step(refresh=True)

    def _sync_gradients(self, last: bool) -> Any:
        """Gradients are exchanged between ranks with the last micro-batch only."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if not last and isinstance(strategy, ParallelStrategy) else nullcontext()

    def _mean_over_ranks(self, loss: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(loss, reduce_op="mean") if self.trainer.world_size > 1 else loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.guard.raise_if_stopped()  # a run that is to stop leaves the checkpoints from before
        del checkpoint["loops"]  # `steps_done` says all there is to say; Lightning's counters would contradict it
        checkpoint["steps_done"] = self.steps_done
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


def build_model(cfg: TrainConfig, vocab_size: int) -> GPT:
    """The run's model with its initial weights, a function of the seed alone."""
    torch.manual_seed(cfg.seed)
    return GPT(cfg.model, cfg.model.vocab_size or -(-vocab_size // 64) * 64)


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """The gradients' global 2-norm (0-dim fp32), before they are scaled to at most `max_norm`."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)
    return norm.float()
