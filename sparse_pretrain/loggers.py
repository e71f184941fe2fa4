"""Where a run's metrics go: always RUN_DIR/metrics.csv; TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from sparse_pretrain.config import LoggerConfig
from sparse_pretrain.runs import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_COLUMNS,
    METRICS_FILE,
    RUN_FILE,
    TOKENIZER_FILE,
    read_rows,
    write_text,
    writing,
)


class CsvLogger(Logger):
    """One row per logged step, appended and flushed at once, so that a killed run loses none.

    A resumed run begins by cutting the rows after its checkpoint: they are written again, identically.

    Args:
        folder: the run folder.
        steps_done: of the checkpoint that the run goes on from; 0 = a new file.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        super().__init__()
        self.path = folder / METRICS_FILE
        rows = [row for row in read_rows(self.path) if int(row["step"]) <= steps_done] if steps_done else []
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        row = {key: f"{value:.9g}" if isinstance(value, float) else value for key, value in metrics.items()}
        with writing(self.path), open(self.path, "a", newline="") as file:
            csv.DictWriter(file, METRICS_COLUMNS).writerow({"step": step, **row})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The whole config is in RUN_DIR/config.yaml."""

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""


def build_loggers(
    cfg: LoggerConfig, run_dir: Path, run_id: str, config: dict[str, Any], steps_done: int
) -> list[Logger]:
    """The run's loggers; those that continue an earlier run drop what it logged after `steps_done`."""
    loggers: list[Logger] = [CsvLogger(run_dir, steps_done)]
    if cfg.tensorboard:
        purge_step = steps_done + 1 if steps_done else None
        loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=purge_step))
    if cfg.wandb:
        loggers.append(
            WandbLogger(
                name=run_dir.name,
                id=run_id,
                resume="allow",
                save_dir=str(run_dir),
                project=cfg.wandb_project,
                entity=cfg.wandb_entity,
                offline=cfg.wandb_mode == "offline",
                config=config,
            )
        )
    return loggers


def log_artifact(loggers: list[Logger], run_dir: Path, checkpoint: Path) -> None:
    """Give Weights & Biases a run folder with what is needed to go on from `checkpoint`, or to evaluate it."""
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb

        artifact = wandb.Artifact(run_dir.name, type="model")
        for name in (CONFIG_FILE, RUN_FILE, TOKENIZER_FILE):
            if (run_dir / name).is_file():
                artifact.add_file(str(run_dir / name), name)
        artifact.add_dir(str(checkpoint), f"{CHECKPOINTS}/{checkpoint.name}")
        logger.experiment.log_artifact(artifact)


def close_loggers(loggers: list[Logger]) -> None:
    """Write out what they still hold: several runs of a grid may share this process."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.close()


def logged_in_to_wandb() -> bool:
    """Whether Weights & Biases has a key to use: in the environment, or in ~/.netrc as `wandb login` leaves it."""
    netrc = Path.home() / ".netrc"
    return "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))
