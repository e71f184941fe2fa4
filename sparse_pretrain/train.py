"""`sparse-pretrain train`: check, prepare the tokens, open the run folder, train, show what came out."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_pretrain import crosscheck, preflight, runs
from sparse_pretrain.config import SearchConfig, TrainConfig
from sparse_pretrain.interrupt import before_the_first_step


def run(cfg: TrainConfig, overrides: Sequence[str] = ()) -> Path:
    """Train, or go on training, one run; returns its folder. `overrides` are what `cfg` was composed from.

    Raises:
        UserError: something about config, data, device, disk or checkpoint does not fit; nothing has been lost.
        Interrupted: a signal ended the run; its checkpoint is saved.
    """
    crosscheck.check(cfg)
    cfg = with_absolute_paths(cfg)
    run_dir = runs.resolve_run_dir(cfg)
    if runs.is_complete(run_dir) and cfg.resume != "never":
        runs.open_run(cfg, run_dir)
        print(f"{run_dir.name} is complete: {run_dir}")
        return run_dir
    with before_the_first_step():
        preflight.check_device(cfg)
        preflight.check_logger(cfg)
        preflight.check_layers(cfg)
        preflight.check_adapter(cfg)
        from sparse_pretrain.checkpoint import store
        from sparse_pretrain.data.token_store import prepare

        continues = bool(store.list_steps(run_dir / runs.CHECKPOINTS))
        source = None if continues or cfg.resume in ("auto", "never") else preflight.check_resume(cfg)
        start = None if continues or cfg.init_from is None else preflight.check_init(cfg)
        teachers = preflight.check_teacher(cfg, run_dir)
        tokens = prepare(cfg.data)
        preflight.check_vocabulary(cfg, tokens.vocab_size)
        preflight.check_teacher_tokenizer(teachers, tokens.tokenizer_path)
        preflight.check_teacher_logits(cfg, teachers, tokens)
        runs.open_run(cfg, run_dir)
        preflight.check_disk(cfg, run_dir, tokens.vocab_size)
        with runs.locked(run_dir):
            for note in store.set_aside_damaged(run_dir / runs.CHECKPOINTS):
                print(note, file=sys.stderr)
            if continues:
                preflight.check_same_corpus(run_dir, tokens)
            if source is not None:
                preflight.check_same_tokenizer(source, tokens, "resume")
            if start is not None:
                preflight.check_same_tokenizer(start, tokens, "init_from")
            facts = {
                **runs.read_json(run_dir / runs.RUN_FILE),
                "id": runs.run_id(run_dir),
                "command": f"sparse-pretrain train {shlex.join(overrides)}".strip(),
                "token_store": str(tokens.folder),
                "teachers": {
                    path: {"folder": str(teacher.folder), "sha256": teacher.sha256}
                    for path, teacher in teachers.items()
                },
            }
            if cfg.recipe.decay.factor == "auto" and "decay_search" not in facts:
                from sparse_pretrain.factor_search import search

                facts["decay_search"] = search(cfg, SearchConfig(), run_dir / runs.DECAY_SEARCH, run)
            runs.write_json(run_dir / runs.RUN_FILE, facts)
            with runs.writing(run_dir):
                shutil.copyfile(tokens.tokenizer_path, run_dir / runs.TOKENIZER_FILE)
            from sparse_pretrain.launch import launch

            launch(cfg, run_dir)
    return run_dir


def finish(run_dirs: list[Path]) -> None:
    """Show what came out: one table and one page for all of these runs that have logged a step."""
    from sparse_pretrain.report import make_report

    run_dirs = [run_dir for run_dir in run_dirs if runs.read_rows(run_dir / runs.METRICS_FILE)]
    if not run_dirs:  # trainer.stop_after came before
        return
    out = (run_dirs[0] if len(run_dirs) == 1 else run_dirs[-1].parent) / "report.html"
    print()
    print(make_report(run_dirs, out))
    print(f"\nReport: {out}")


def with_absolute_paths(cfg: TrainConfig) -> TrainConfig:
    """The same files, from whichever folder the run is continued or evaluated."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    data = cfg.data
    changes: dict[str, Any] = {
        "train": [absolute(path) for path in data.train],
        "validation": [absolute(path) for path in data.validation],
    }
    if data.tokenizer != "bpe":
        changes["tokenizer"] = absolute(data.tokenizer)
    if data.hf_path and Path(data.hf_path).expanduser().is_dir():
        changes["hf_path"] = absolute(data.hf_path)
    recipe, teacher = cfg.recipe, cfg.recipe.teacher
    teacher = dataclasses.replace(
        teacher,
        models=[model if model == "self" else absolute(model) for model in teacher.models],
        logits=teacher.logits and absolute(teacher.logits),
        reference=teacher.reference and absolute(teacher.reference),
    )
    adapter = dataclasses.replace(recipe.adapter, path=recipe.adapter.path and absolute(recipe.adapter.path))
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(data, **changes),
        recipe=dataclasses.replace(recipe, teacher=teacher, adapter=adapter),
        resume=cfg.resume if cfg.resume in ("auto", "never") else absolute(cfg.resume),
        init_from=cfg.init_from and absolute(cfg.init_from),
    )
