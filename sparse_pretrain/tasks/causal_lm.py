"""Next-token prediction: the training step of every decoder, sparse or dense."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.evaluation.perplexity import token_losses
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.optim.adamw import AdamW, parameter_groups
from sparse_pretrain.optim.schedules import lr_share
from sparse_pretrain.sparsity.recipe import SparseTraining
from sparse_pretrain.sparsity.swap import sparsify
from sparse_pretrain.tasks.guard import StepGuard


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
        self.sparse_training = SparseTraining(self.model, cfg.recipe, cfg.trainer.steps, cfg.seed)
        self.guard = StepGuard(cfg.trainer.guard)
        self.steps_done = 0
        # Since the last logged row, over the steps not dropped: sum of losses, of gradient norms, number of steps.
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.sums: Tensor
        self._resumed = False
        self.forked = False  # whether the checkpoint to resume from is another run's: its masks may be out of date

    def configure_optimizers(self) -> AdamW:
        optimizer = self.cfg.optimizer
        return AdamW(
            parameter_groups(self.model, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.eps,
            decay=self.sparse_training.decay,
        )

    def on_fit_start(self) -> None:
        if self.forked and self.sparse_training.layers:
            self.sparse_training.refresh()
        self.sparse_training.prepare(self.steps_done, refresh=not self._resumed)
        if self.cfg.trainer.compile:
            for block in self.model.blocks:
                block.compile()

    def training_step(self, batch: Tensor, _: int) -> None:
        """batch: (sequences of this rank, seq_len + 1) int64."""
        step, trainer = self.steps_done, self.cfg.trainer
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, AdamW)
        torch.manual_seed(hash_seed(self.cfg.seed, step, self.global_rank))  # dropout

        micro_batches: tuple[Tensor, ...] = batch.split(trainer.micro_batch_size or len(batch))
        loss = torch.zeros((), device=self.device)
        for i, sequences in enumerate(micro_batches):
            tokens = sequences[:, 1:].numel()
            self.sparse_training.at_tokens((self.global_rank * len(micro_batches) + i) * (-(-tokens // 4) * 4))
            with self._sync_gradients(last=i == len(micro_batches) - 1):
                micro_loss = token_losses(self.model, sequences).mean() / len(micro_batches)
                self.manual_backward(micro_loss)
            loss += micro_loss.detach()
        loss = self._mean_over_ranks(loss)

        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # fp16 only
        if scaler is not None:
            scaler.unscale_(optimizer)
        grad_norm = clip_gradients(self.model, trainer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = self.cfg.optimizer.lr * lr_share(step, trainer.steps, self.cfg.scheduler)
        dropped = self.guard.check(step, loss, grad_norm, loss_scaled=scaler is not None)
        optimizer.found_inf = dropped
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()

        row = torch.stack((loss, grad_norm, torch.ones_like(loss))).double()
        self.sums += row.masked_fill(dropped > 0, 0.0)
        self.steps_done = step + 1
        self.sparse_training.prepare(self.steps_done)

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps_done = checkpoint["steps_done"]
        self.sums.copy_(checkpoint["sums"])
        self.sparse_training.load_state_dict(checkpoint["sparse_training"])
        self._resumed = True


def build_model(cfg: TrainConfig, vocab_size: int) -> GPT:
    """The run's model with its initial weights, a function of the seed alone."""
    torch.manual_seed(cfg.seed)
    return GPT(cfg.model, cfg.model.vocab_size or -(-vocab_size // 64) * 64)


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """The gradients' global 2-norm (0-dim fp32), before they are scaled to at most `max_norm`."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)
    return norm.float()


def hash_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed for (seed, step, rank): SplitMix64's finaliser (Steele et al. 2014) over each in turn."""
    mixed = 0
    for value in (seed, step, rank):
        mixed = (mixed + value + 0x9E3779B97F4A7C15) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        mixed ^= mixed >> 31
    return mixed >> 1
