"""`sparse-pretrain sweep-report`: the trials of a sweep, its best options as configs for `train`, and pictures."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

from sparse_pretrain import runs
from sparse_pretrain.config import SweepReportConfig
from sparse_pretrain.reporting.table import text_table


def run(cfg: SweepReportConfig) -> None:
    """Print the table, and write `sweep.html`, `sweep.png`, `sweep.json` and the best options.

    Raises:
        UserError: there is no such sweep, it has no trials yet, or the results cannot be written.
    """
    from sparse_pretrain.sweep import check_installed

    check_installed()
    from sparse_pretrain.sweeping.best import NAME, write_best
    from sparse_pretrain.sweeping.figure import sweep_figure  # matplotlib takes a second to import
    from sparse_pretrain.sweeping.page import write_page
    from sparse_pretrain.sweeping.results import read_sweep, table
    from sparse_pretrain.sweeping.study import trial_config

    folder = Path(cfg.sweep).expanduser().resolve()
    sweep = read_sweep(folder, cfg.storage)
    out = Path(cfg.out).expanduser().resolve() if cfg.out else folder
    with runs.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    best, train = sweep.best, None
    if best is not None:
        config_dir = write_best(trial_config(folder, best.number), out)
        train = f"sparse-pretrain train --config-dir {shlex.quote(str(config_dir))} experiment={NAME}"
    print()
    print(text_table(*table(sweep)))
    picture = sweep_figure(sweep)
    with runs.writing(out):
        (out / "sweep.png").write_bytes(picture)
    write_page(sweep, picture, train, out / "sweep.html")
    runs.write_json(
        out / "sweep.json",
        {
            "command": sweep.record["command"],
            "best": best and best.number,
            "importances": sweep.importances,
            "trials": [asdict(trial) for trial in sweep.trials],
        },
    )
    if best is None:
        print("\nNo trial is complete.")
    else:
        print(f"\nBest: trial {best.number}, validation loss {best.loss:.4f}. To train with its options:\n  {train}")
    print(f"\nReport: {out}/sweep.html, .png, .json")
