"""What a run shows and records while it trains: metrics rows, validation, the progress bar, mask snapshots."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparse_pretrain.evaluation.acceptance import total_acceptance
from sparse_pretrain.hardware import peak_memory_gb
from sparse_pretrain.runs import writing
from sparse_pretrain.tasks.causal_lm import CausalLM
from sparse_pretrain.tasks.task import Batch, Task, to_device
from sparse_pretrain.tasks.teacher import Teacher

SNAPSHOT_LAYERS, SNAPSHOT_ROWS, SNAPSHOT_COLUMNS = 3, 32, 64


class MetricsCallback(lightning.Callback):
    """Logs a row every `trainer.log_every` steps and validates every `trainer.eval_every` (and at the last step).

    Args:
        run_dir: mask snapshots go to its `masks/`.
        flop_per_token, peak_flops: for MFU, over all devices; dense FLOP are counted for sparse layers too.
    """

    def __init__(self, run_dir: Path, flop_per_token: int, peak_flops: float) -> None:
        self.run_dir, self.flop_per_token, self.peak_flops = run_dir, flop_per_token, peak_flops
        self.seconds = 0.0  # of training, before the last resume or pause
        self.logged: tuple[int, float] = (0, 0.0)  # step and seconds of the last row
        self.val_loss = math.nan
        self._started = 0.0
        self._bar: tqdm | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.elapsed, "logged": list(self.logged), "val_loss": self.val_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.val_loss = state["seconds"], state["val_loss"]
        self.logged = (state["logged"][0], state["logged"][1])

    @property
    def elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self._started if self._started else 0.0)

    def _pause(self) -> None:
        self.seconds, self._started = self.elapsed, 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if trainer.is_global_zero:
            self._bar = tqdm(
                total=min(pl_module.cfg.trainer.steps, pl_module.cfg.trainer.stop_after or sys.maxsize),
                initial=pl_module.steps_done,
                desc=self.run_dir.name,
                unit="step",
                disable=None,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Only here: the checkpoint callback comes after this one, and its time is not training time.
        if not self._started:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Task)
        cfg, step = pl_module.cfg.trainer, pl_module.steps_done
        last = step == cfg.steps
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        validate = step % cfg.eval_every == 0 or last
        if not (validate or step % cfg.log_every == 0):
            if step % cfg.checkpoint_every == 0:
                pl_module.sums.cpu()  # wait for the device, so that its work is on the clock
                self._pause()
            return
        row = self._training_row(trainer, pl_module)
        self._pause()
        if validate:
            scores = self._validate(trainer, pl_module)
            self.val_loss = scores["loss"]
            row |= {f"val/{name}": score for name, score in scores.items()}
            if isinstance(pl_module, CausalLM) and pl_module.teacher is not None and pl_module.teacher.is_there:
                row["val/acceptance"] = self._validate_acceptance(trainer, pl_module, pl_module.teacher)
            if trainer.is_global_zero:
                save_mask_snapshot(pl_module, self.run_dir, step)
        for logger in trainer.loggers:
            # CSV keeps text (the phase) too; the others take numbers only.
            numbers = {key: value for key, value in row.items() if not isinstance(value, str)}
            logger.log_metrics(row if logger.name == "csv" else numbers, step=step)
        self._show(row, step, cfg.steps, validate)
        pl_module.guard.raise_if_stopped()

    def _training_row(self, trainer: lightning.Trainer, module: Task) -> dict[str, Any]:
        cfg, step = module.cfg, module.steps_done
        # waits for the device: the clock is read after it
        loss, norm, count, distillation, taught = module.sums.tolist()
        module.sums.zero_()
        seconds = self.elapsed
        tokens_per_step = cfg.trainer.batch_size * cfg.data.tokens_per_example
        rate = (step - self.logged[0]) * tokens_per_step / (seconds - self.logged[1])
        self.logged = (step, seconds)
        row = {
            "tokens": step * tokens_per_step,
            "seconds": seconds,
            "phase": module.sparse_training.phase(step - 1),
            "train/loss": loss / count if count else math.nan,
            **({"train/distillation_loss": distillation / taught} if taught else {}),
            "train/grad_norm": norm / count if count else math.nan,
            "train/lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "train/tokens_per_second": rate,
            "train/mfu": rate * self.flop_per_token / self.peak_flops,
            "train/memory_gb": peak_memory_gb(module.device),
            "train/dropped_steps": int(module.guard.dropped.sum()),
        }
        flip_rate = module.sparse_training.flip_rate()
        return row if flip_rate is None else {**row, "sparsity/flip_rate": flip_rate}

    def _validate(self, trainer: lightning.Trainer, module: Task) -> dict[str, float]:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        sums = total_scores(module, loader, trainer.precision_plugin.forward_context)
        return {name: _mean_over_ranks(trainer, values) for name, values in sums.items()}

    def _validate_acceptance(self, trainer: lightning.Trainer, module: Task, teacher: Teacher) -> float:
        """How often the teacher would accept the student's tokens, sampling at temperature 1."""
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        autocast = trainer.precision_plugin.forward_context
        sums, tokens = total_acceptance(
            module.model, teacher.logits, loader, teacher.vocab_size, module.device, autocast
        )
        return _mean_over_ranks(trainer, torch.stack((sums[0], sums.new_tensor(tokens))))

    def _show(self, row: dict[str, Any], step: int, steps: int, validated: bool) -> None:
        if self._bar is None:
            return
        shown = {
            "loss": f"{row['train/loss']:.3f}",
            "val": f"{self.val_loss:.3f}",
            "tok/s": f"{row['train/tokens_per_second']:,.0f}",
            "mfu": f"{row['train/mfu']:.0%}",
            "GB": f"{row['train/memory_gb']:.2g}",
        }
        if "sparsity/flip_rate" in row:
            shown["flips"] = f"{row['sparsity/flip_rate']:.4f}"
        if row["train/dropped_steps"]:
            shown["dropped"] = str(row["train/dropped_steps"])
        self._bar.set_postfix(shown)
        if self._bar.disable and validated:  # no terminal: a line now and then instead of a bar
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"{self.run_dir.name}: step {step}/{steps}  {text}", file=sys.stderr, flush=True)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()


@torch.no_grad()
def total_scores(
    module: Task, batches: Iterable[Batch], autocast: Callable[[], AbstractContextManager]
) -> dict[str, Tensor]:
    """The scores of batches together: each a sum and its count, (2,) fp64."""
    training = module.model.training
    module.model.eval()
    total: dict[str, Tensor] = {}
    for batch in batches:
        with autocast():
            scores = module.scores(to_device(batch, module.device))
        total = {name: total.get(name, 0) + values for name, values in scores.items()}
    module.model.train(training)
    return total


def _mean_over_ranks(trainer: lightning.Trainer, values: Tensor) -> float:
    """The mean over all ranks' targets; `values` are this rank's sum and count, (2,) fp64."""
    if trainer.world_size > 1:
        reduced = trainer.strategy.reduce(values, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        values = reduced
    return float(values[0] / values[1])


def save_mask_snapshot(module: Task, run_dir: Path, step: int) -> None:
    """The upper left corner of a few masks (first, middle, last layer), as `masks/step-00000100.npz` with one uint8
    array (rows, columns) per layer name: what the report draws."""
    layers = list(module.sparse_training.layers.items())
    if not layers:
        return
    chosen = {round(i * (len(layers) - 1) / (SNAPSHOT_LAYERS - 1)) for i in range(SNAPSHOT_LAYERS)}
    corners = {
        layers[i][0]: layers[i][1].mask[:SNAPSHOT_ROWS, :SNAPSHOT_COLUMNS].to("cpu", torch.uint8).numpy()
        for i in sorted(chosen)
    }
    folder = run_dir / "masks"
    with writing(folder):
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"step-{step:08d}.npz", **corners)  # type: ignore[arg-type]
