"""`sparse-pretrain consolidate`: a checkpoint, whatever number of ranks wrote it, as one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

from sparse_pretrain import runs
from sparse_pretrain.checkpoint import single_file, store
from sparse_pretrain.config import ConsolidateConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.schema import to_dict
from sparse_pretrain.tasks.trained import config_of, tokenizer_of


def run(cfg: ConsolidateConfig) -> None:
    """Writes the file `out`, whole or not at all, and prints what is in it.

    Raises:
        UserError: no whole checkpoint, `out` is there already, is no name of such a file or cannot be written.
    """
    out = Path(cfg.out).expanduser().absolute()
    if out.suffix != single_file.SUFFIX:
        raise UserError("out", cfg.out, f"a new file, as NAME{single_file.SUFFIX}")
    if out.exists():
        raise UserError("out", f"{out}, which exists", "a new file")
    checkpoint = store.resolve(Path(cfg.checkpoint), "checkpoint")
    facts = {"config": json.dumps(to_dict(config_of(checkpoint)))}
    _, tokenizer = tokenizer_of(checkpoint)
    if tokenizer is not None:
        facts["tokenizer_sha256"] = tokenizer
    state = store.read(checkpoint)
    with runs.writing(out, "out"):
        single_file.write(state, store.step_of(checkpoint), out, facts)
    print(f"checkpoint  {checkpoint}")
    print(f"written     {out}, {out.stat().st_size:,} bytes")
    print(f"train       resume={out} goes on from it, init_from={out} takes its weights")
