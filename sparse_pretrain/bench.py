"""`sparse-pretrain bench`: the benchmarks of this checkout, on this machine.

On a GPU: every operator, product, layer and training step against its floor and against dense. On a CPU, where 2:4
products are dense ones, what the recipes themselves cost: FFN, block and training step.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sparse_pretrain.config import BenchConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.hardware import pick_device
from sparse_pretrain.paths import config_dir


def run(cfg: BenchConfig) -> None:
    """Prints progress, a summary and where the results are.

    Raises:
        UserError: this is no checkout, no GPU where one is asked for, or a folder that cannot be written.
    """
    pick_device(cfg.accelerator, "accelerator")
    root = config_dir().parent
    if not (root / "benchmarks" / "run.py").is_file():
        raise UserError("bench", "an installation without benchmarks", "a checkout of the repository")
    out = Path(cfg.out).expanduser().resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("out", f"{out}, which cannot be written ({error.strerror})", "a folder") from error
    sys.path.insert(0, str(root))
    from benchmarks.__main__ import DEFAULT_PARTS, measure

    measure(cfg.part or DEFAULT_PARTS, cfg.minutes, out, cfg.accelerator)
