"""`sparse-pretrain report`: one table and one HTML page of runs that are complete or under way."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_pretrain import runs
from sparse_pretrain.config import ReportConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.reporting.run_data import RunData, read_run
from sparse_pretrain.reporting.table import comparison_table


def run(cfg: ReportConfig) -> None:
    """Prints the table and the path of the page.

    Raises:
        UserError: a folder that is not a run, no runs at all, or a page that cannot be written.
    """
    runs_dir = Path(cfg.runs_dir).expanduser().resolve()
    found = [read_run(folder) for folder in _folders(cfg.runs)] if cfg.runs else runs_of(runs_dir)
    default = (found[0].folder if len(found) == 1 else runs_dir) / "report.html"
    out = Path(cfg.out).expanduser().resolve() if cfg.out else default
    print(_report(found, out))
    print(f"\nReport: {out}")


def make_report(folders: Sequence[Path], out: Path) -> str:
    """Write the page about the runs in `folders` to `out`; returns the text table.

    Raises:
        UserError: a folder that is not a run or has no metrics yet, or a page that cannot be written.
    """
    return _report([read_run(folder) for folder in _folders(folders)], out)


def runs_of(runs_dir: Path) -> list[RunData]:
    """Every run in `runs_dir`, by name; says on stderr which cannot be shown.

    Raises:
        UserError: there is none.
    """
    found = []
    for config in sorted(runs_dir.glob(f"*/{runs.CONFIG_FILE}")):
        try:
            found.append(read_run(config.parent))
        except UserError as error:
            print(f"left out {config.parent.name}: {error}", file=sys.stderr)
    if not found:
        raise UserError("runs_dir", f"{runs_dir}, which holds no run with metrics", "a folder of run folders")
    return found


def _folders(given: Sequence[str | Path]) -> list[Path]:
    """Absolute, and each once."""
    return list(dict.fromkeys(Path(folder).expanduser().resolve() for folder in given))


def _report(found: list[RunData], out: Path) -> str:
    from sparse_pretrain.reporting.html import write_report  # matplotlib takes a second to import

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_report(found, out)
    except OSError as error:
        raise UserError("out", f"{out}, which cannot be written ({error.strerror})", "a file") from error
    return comparison_table(found)
