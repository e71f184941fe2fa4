"""In place of a training run: the files, signals and exit codes of one, in a tenth of a second. Its arguments are those
of `sparse_pretrain.sweeping.child`; what it does is appended to $FAKE_EVENTS, a line a time.

Seeds decide how it goes: 13 fails, 17 diverges, 19 is killed at its third step every time, 23 once.
"""

import math
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from sparse_pretrain import runs
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.schema import load

CHECKPOINT_EVERY = 2


def event(*words) -> None:
    with open(os.environ["FAKE_EVENTS"], "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def loss(cfg: TrainConfig, step: int) -> float:
    return 4 + (math.log10(cfg.optimizer.lr) + 2.5) ** 2 + 2 * math.exp(-step)


def main(config: str) -> None:
    cfg = load(TrainConfig, yaml.safe_load(Path(config).read_text()))
    folder = runs.resolve_run_dir(cfg)
    runs.open_run(cfg, folder)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    try:
        with runs.locked(folder):
            train(cfg, folder, stopped)
    except UserError as error:
        event("refused", folder.name)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def train(cfg, folder, stopped) -> None:
    checkpoint, metrics = folder / "checkpoint", folder / runs.METRICS_FILE
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    event("start", folder.name, os.getpid(), done)
    if cfg.seed == 13:
        print("error: seed: found 13; allowed: luckier ones", file=sys.stderr)
        sys.exit(2)
    kept = [row for row in runs.read_rows(metrics) if int(row["step"]) <= done]
    rows = ["step,seconds,val/loss", *(f"{row['step']},{row['seconds']},{row['val/loss']}" for row in kept)]
    runs.write_text(metrics, "\n".join(rows) + "\n")
    for step in range(done + 1, cfg.trainer.steps + 1):
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.02")))
        if step == 3 and (cfg.seed == 19 or (cfg.seed == 23 and not done)):
            os.kill(os.getpid(), signal.SIGKILL)
        event("step", folder.name, step)
        with open(metrics, "a") as file:
            file.write(f"{step},{step * 0.5},{'nan' if cfg.seed == 17 and step == 4 else loss(cfg, step)}\n")
        if step % CHECKPOINT_EVERY == 0 or stopped:
            runs.write_text(checkpoint, str(step))
        if stopped and step < cfg.trainer.steps:
            event("stopped", folder.name, step)
            sys.exit(75)
    event("done", folder.name)
    runs.write_json(folder / runs.SUMMARY_FILE, {"val_loss": loss(cfg, cfg.trainer.steps)})


if __name__ == "__main__":
    main(sys.argv[1])
