"""One rank of a training run: reads RUN_DIR/config.yaml, builds everything, trains. Knows no Hydra.

Started in-process by `launch`, or on each rank as `python -m sparse_pretrain.worker RUN_DIR`.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import sys
import traceback
import warnings
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from sparse_pretrain import cluster, meeting, runs
from sparse_pretrain.checkpoint import store
from sparse_pretrain.checkpoint.callback import AtomicCheckpointIO, CheckpointCallback
from sparse_pretrain.checkpoint.mirror import Mirror
from sparse_pretrain.checkpoint.saver import Saver
from sparse_pretrain.checkpoint.strategy import ShardedStrategy
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.data.build import Store, data_module, open_store
from sparse_pretrain.data.token_store import TokenStore
from sparse_pretrain.errors import UserError
from sparse_pretrain.hardware import device_name, peak_tflops, pick_device, precision_dtype
from sparse_pretrain.interrupt import Interrupted, before_the_first_step
from sparse_pretrain.loggers import build_loggers, close_loggers, log_artifact
from sparse_pretrain.models.count import count_model
from sparse_pretrain.schema import to_dict
from sparse_pretrain.sparsity.adapter_files import load_adapters, save_adapters
from sparse_pretrain.sparsity.communication import MaskedDDPStrategy
from sparse_pretrain.sparsity.recipe import SparseTraining
from sparse_pretrain.tasks.build import build_model, build_task
from sparse_pretrain.tasks.metrics import MetricsCallback
from sparse_pretrain.tasks.products import ProductsCallback
from sparse_pretrain.tasks.sampling import sampling
from sparse_pretrain.tasks.task import Sizes, Task
from sparse_pretrain.tasks.teacher import TeacherCallback
from sparse_pretrain.tasks.trained import load_weights

PACKAGES = ("torch", "triton", "lightning", "hydra-core", "tokenizers", "datasets")


def run(run_dir: Path) -> None:
    """Train, or go on training, the run of `run_dir`, up to `trainer.stop_after`; does nothing if it is complete.

    Raises:
        UserError: the run cannot start, or a guard stopped it.
        Interrupted: a signal ended it; its checkpoint is saved.
    """
    if runs.is_complete(run_dir):
        return
    quiet_lightning()
    cfg = runs.read_config(run_dir)
    given = runs.read_json(run_dir / runs.RUN_FILE)
    data, start = open_store(Path(given["data"])), given.get("start")
    sizes = Sizes.of(data)
    checkpoint = find_checkpoint(cfg, run_dir, start)
    steps_done = store.step_of(checkpoint) if checkpoint else 0
    if cfg.trainer.stop_after is not None and cfg.trainer.stop_after <= steps_done < cfg.trainer.steps:
        print_stop(cfg, run_dir, steps_done)
        return

    module = build_task(cfg, sizes)
    training = module.sparse_training
    module.forked = checkpoint is not None and checkpoint.parent != run_dir / runs.CHECKPOINTS
    if checkpoint is None and cfg.init_from is not None:
        assert start is not None
        load_weights(module, Path(start))
    if checkpoint is None and cfg.recipe.adapter.path is not None:
        load_adapters(module.model, cfg.recipe.adapter.path)
    device = pick_device(cfg.trainer.accelerator, "trainer.accelerator")
    dtype = precision_dtype(cfg.trainer.precision, device, "trainer.precision")
    with torch.device("meta"):
        dense = build_model(cfg, sizes)
    count = count_model(module.model, dense, module.example(cfg), cfg.data.tokens_per_example, training.own_lr)
    module.rows = count.rows
    peak, peak_source = (cfg.trainer.peak_tflops, "given") if cfg.trainer.peak_tflops else peak_tflops(device, dtype)
    identifier = runs.run_id(run_dir)
    mirror = cfg.trainer.checkpoint_mirror and Mirror(cfg.trainer.checkpoint_mirror, run_dir.name)
    saver = Saver(
        cfg.trainer.checkpoints_kept,
        cfg.trainer.async_checkpoints,
        mirror or None,
        timedelta(seconds=cfg.trainer.timeout),
        copies=[run_dir / name for name in runs.COPIED],
    )
    callbacks = [
        TeacherCallback(run_dir),
        ProductsCallback(run_dir, dtype),
        TimeoutCallback(cfg.trainer.timeout),
        MetricsCallback(run_dir, count.flop_per_token, peak * 1e12 * cfg.trainer.ranks),
        CheckpointCallback(
            run_dir / runs.CHECKPOINTS,
            saver,
            cfg.trainer.checkpoint_every,
            cfg.trainer.steps,
            poll_every=cfg.trainer.log_every,
            stop_after=cfg.trainer.stop_after,
        ),
    ]
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.nodes,
        strategy=make_strategy(cfg, training, saver),
        plugins=[
            AtomicCheckpointIO(saver),
            precision_plugin(dtype, device),
            # named, or Lightning would take the variables of a SLURM job for those of its ranks
            TorchElasticEnvironment() if cfg.trainer.ranks > 1 else LightningEnvironment(),
        ],
        callbacks=callbacks,
        logger=False,
        max_epochs=1,
        limit_val_batches=0,
        deterministic=cfg.trainer.deterministic,
        default_root_dir=run_dir,
        enable_checkpointing=False,  # ours does it, and the progress bar, and the summary
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if trainer.is_global_zero:
        trainer.loggers = build_loggers(cfg.logger, run_dir, identifier, to_dict(cfg), steps_done)
        facts = {
            **runs.read_json(run_dir / runs.RUN_FILE),
            "id": identifier,
            "python": platform.python_version(),
            "packages": package_versions(),
            "device": device_name(device),
            "precision": str(dtype).removeprefix("torch."),
            "peak_tflops": peak,
            "peak_source": peak_source,
            "corpus": describe(data),
            "model": {name: value for name, value in asdict(count).items() if name != "rows"},
            "layers": [asdict(row) for row in module.layers],
        }
        runs.write_json(run_dir / runs.RUN_FILE, facts)
        print_start(cfg, run_dir, facts, steps_done)
    batches = data_module(
        cfg.data,
        data,
        batch_size=cfg.trainer.batch_size,
        seed=cfg.seed,
        total_steps=cfg.trainer.steps,
        eval_batches=cfg.trainer.eval_batches,
        start_step=lambda: module.steps_done,
        **sampling(cfg),
    )
    try:
        trainer.fit(module, datamodule=batches, ckpt_path=checkpoint, weights_only=True)
        if cfg.logger.wandb_artifact and module.steps_done == cfg.trainer.steps:
            log_artifact(
                trainer.loggers, run_dir, store.checkpoint_folder(run_dir / runs.CHECKPOINTS, cfg.trainer.steps)
            )
    finally:
        close_loggers(trainer.loggers)
    if module.steps_done < cfg.trainer.steps:
        print_stop(cfg, run_dir, module.steps_done)
        return
    if training.adapters:
        save_adapters(module.model, run_dir / runs.ADAPTER_FILE, write=trainer.is_global_zero)
    if trainer.is_global_zero:
        runs.write_json(run_dir / runs.SUMMARY_FILE, summarize(module, run_dir))


class TimeoutCallback(lightning.Callback):
    """From the first step on, ranks wait for each other as long as `trainer.timeout` says."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.world_size > 1:
            meeting.set_timeout(self.seconds)


def make_strategy(cfg: TrainConfig, training: SparseTraining, saver: Saver) -> Strategy | str:
    """How the ranks of a run work together."""
    if cfg.trainer.ranks == 1:
        return "auto"
    # until all have started: trainer.timeout counts from the first step on
    timeout = timedelta(seconds=max(cfg.trainer.timeout, meeting.MEET_SECONDS))
    if cfg.trainer.strategy == "fsdp":
        return ShardedStrategy(
            saver, timeout, data_parallel_size=cfg.trainer.data_ranks, tensor_parallel_size=cfg.trainer.tensor_parallel
        )
    # Masks and guards are the same on all ranks, being functions of the same weights, losses and norms: sending them
    # (and Ŵ) round before each step would cost half as much as the gradients. Adapters and the logits of masks have no
    # gradient in some phases.
    options: dict[str, Any] = {
        "timeout": timeout,
        "broadcast_buffers": False,
        "find_unused_parameters": bool(training.adapters or training.own_lr),
    }
    masked = training.layers and cfg.recipe.weight_gradient == "masked"
    return MaskedDDPStrategy(training, **options) if masked else DDPStrategy(**options)


def find_checkpoint(cfg: TrainConfig, run_dir: Path, start: str | None) -> Path | None:
    """The checkpoint to go on from: this run's newest one, else the one that `resume` has been found to mean, if any.
    Whether it is whole has been seen before the ranks started: not each of them reads all of it for that."""
    steps = store.list_steps(run_dir / runs.CHECKPOINTS)
    if steps:
        return store.checkpoint_folder(run_dir / runs.CHECKPOINTS, steps[-1])
    if cfg.resume in ("auto", "never"):
        return None
    assert start is not None
    return Path(start)


def precision_plugin(dtype: torch.dtype, device: torch.device) -> Precision:
    """Weights stay fp32; products run in `dtype`, with loss scaling for fp16."""
    if dtype == torch.float32:
        return Precision()
    return MixedPrecision("16-mixed" if dtype == torch.float16 else "bf16-mixed", device.type)


def print_start(cfg: TrainConfig, run_dir: Path, facts: dict[str, Any], steps_done: int) -> None:
    """Size, cost and layers, before the first step."""
    model = facts["model"]
    tokens = cfg.trainer.steps * cfg.trainer.batch_size * cfg.data.tokens_per_example
    sparse = [row for row in facts["layers"] if row["sparse"]]
    weights = sum(row["out_features"] * row["in_features"] for row in sparse)
    print(
        f"\n{run_dir.name}: {model['parameters'] / 1e6:.2f}M parameters, "
        f"{model['flop_per_token'] / 1e6:.1f} MFLOP per token, {model['state_bytes'] / 1e9:.2f} GB of training state; "
        f"{tokens / 1e6:.3g}M tokens in {cfg.trainer.steps} steps ({tokens * model['flop_per_token'] / 1e15:.2g} PFLOP)"
    )
    print(
        f"  {facts['device']}, {facts['precision']}, peak {facts['peak_tflops']:.3g} TFLOP/s ({facts['peak_source']})"
    )
    if sparse:
        share = f"{weights / 1e6:.2f}M weights ({weights / model['parameters']:.0%})"
        print(f"  recipe {cfg.recipe.name}: {len(sparse)} linear layers {cfg.recipe.pattern} sparse, {share}")
    adapted = sum(row["adapted"] for row in facts["layers"])
    if adapted:
        print(f"  {cfg.recipe.adapter.kind} adapters beside {adapted} linear layers")
    if "decay_search" in facts:
        print(f"  decay factor {cfg.recipe.decay.factor:g}, found by the flip rates of short runs")
    for row in facts["layers"]:
        if row["skipped"]:
            print(f"  {row['name']} stays dense: {row['skipped']}")
    if steps_done:
        print(f"  resuming at step {steps_done}")
    sys.stdout.flush()


def print_stop(cfg: TrainConfig, run_dir: Path, steps_done: int) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{run_dir.name}: stopped at step {steps_done} of {cfg.trainer.steps}, by "
            f"trainer.stop_after={cfg.trainer.stop_after}; the same command with a later one, or none, continues it"
        )


def summarize(module: Task, run_dir: Path) -> dict[str, Any]:
    """The final figures of a run, from its metrics file.

    Raises:
        UserError: the file is gone, or training has diverged.
    """
    rows = runs.read_rows(run_dir / runs.METRICS_FILE)
    if not rows or not rows[-1]["val/loss"]:
        raise UserError("run_dir", f"{run_dir} without the rows of {runs.METRICS_FILE}", "a run folder left as it was")
    if not math.isfinite(float(rows[-1]["val/loss"])):
        raise UserError(
            "optimizer.lr", "a run that ended with a loss that is not finite", "settings under which training is stable"
        )
    rates = sorted(float(row["train/tokens_per_second"]) for row in rows[1:] or rows)
    return {
        "steps": module.steps_done,
        "tokens": int(rows[-1]["tokens"]),
        "seconds": float(rows[-1]["seconds"]),
        "train_loss": float(rows[-1]["train/loss"]),
        "val_loss": float(rows[-1]["val/loss"]),
        "tokens_per_second": rates[len(rates) // 2],
        "memory_gb": max(float(row["train/memory_gb"]) for row in rows),
        "dropped_steps": int(rows[-1]["train/dropped_steps"]),
        "flip_rate": module.sparse_training.flip_rate(),
        "layer_flip_rates": module.sparse_training.layer_flip_rates(),
    }


def describe(data: Store) -> dict[str, Any]:
    """What the run is trained on; the digest tells whether two runs saw the same."""
    facts: dict[str, Any] = {"name": data.manifest["name"], "digest": data.digest}
    if isinstance(data, TokenStore):
        splits = {f"{split}_tokens": data.num_tokens(split) for split in ("train", "validation")}
    else:
        splits = {f"{split}_examples": data.num_examples(split) for split in ("train", "validation")}
    known = {key: data.manifest[key] for key in ("label_names", "mean", "std") if data.manifest.get(key)}
    return {**facts, **asdict(Sizes.of(data)), **splits, **known}


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def quiet_lightning() -> None:
    """Lightning's tips and its advice on loaders do not concern a user of this program."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # weights that are cut twice are gathered in two operations: it says so for each
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def main() -> None:
    """Exits as `sparse-pretrain train`; with `cluster.LOST` when other ranks do not answer, which `launch` tells."""
    exit_code = 0
    try:
        with before_the_first_step():
            run(Path(sys.argv[1]))
        return
    except (UserError, Interrupted) as end:
        exit_code = end.exit_code
        if meeting.communication_error(end) is not None:
            exit_code = cluster.LOST
        else:
            meeting.last_words(f"error: {end}" if isinstance(end, UserError) else str(end))
    except Exception as error:
        exit_code = cluster.LOST if meeting.communication_error(error) is not None else 1
        if exit_code == 1:
            traceback.print_exc()
    meeting.exit_now(exit_code)


if __name__ == "__main__":
    main()
