"""`sparse-pretrain train`: check, prepare the data, open the run folder, train, show what came out."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

from sparse_pretrain import crosscheck, preflight, runs
from sparse_pretrain.config import SearchConfig, TrainConfig
from sparse_pretrain.config_models import HFConfig
from sparse_pretrain.interrupt import before_the_first_step


def run(cfg: TrainConfig, command: str = "") -> Path:
    """Train, or go on training, one run; returns its folder. `command` is what a user continues it with.

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
        from sparse_pretrain.checkpoint.mirror import Mirror
        from sparse_pretrain.data.build import prepare
        from sparse_pretrain.tasks.task import Sizes

        continues = bool(store.list_steps(run_dir / runs.CHECKPOINTS))
        url = cfg.trainer.checkpoint_mirror
        mirror = None if url is None else Mirror(url, run_dir.name)

        def fetch() -> bool:
            """A checkpoint that is newer than those here, if the mirror has one."""
            with runs.writing(run_dir):
                fetched = None if mirror is None else mirror.fetch(run_dir)
            if fetched is not None:
                print(f"{run_dir.name}: {fetched.name} fetched from {url}")
            return fetched is not None

        continues = continues or fetch()
        start = None if continues else preflight.check_start(cfg)
        teachers = preflight.check_teacher(cfg, run_dir)
        data = prepare(cfg.data)
        sizes = Sizes.of(data)
        preflight.check_vocabulary(cfg, sizes.vocab_size)
        preflight.check_teacher_tokenizer(teachers, data.tokenizer_path)
        preflight.check_teacher_logits(cfg, teachers, data)
        runs.open_run(cfg, run_dir)
        preflight.check_disk(cfg, run_dir, sizes)
        with runs.locked(run_dir):
            with runs.writing(run_dir):
                damaged = store.set_aside_damaged(run_dir / runs.CHECKPOINTS)
            for note in damaged:
                print(note, file=sys.stderr)
            if damaged:
                fetch()
            if continues:
                runs.restore_metrics(run_dir)
                preflight.check_same_corpus(run_dir, data)
                if not store.list_steps(run_dir / runs.CHECKPOINTS):  # damaged, all of them
                    start = preflight.check_start(cfg)
            if start is not None:
                preflight.check_same_tokenizer(start, data, "init_from" if cfg.init_from else "resume")
            facts: dict[str, Any] = {
                **runs.read_facts(run_dir),
                "id": runs.run_id(run_dir),
                "command": command,
                "git": runs.git_state(Path.cwd()),
                "data": str(data.folder),
                "teachers": {
                    path: {"folder": str(teacher.folder), "sha256": teacher.sha256}
                    for path, teacher in teachers.items()
                },
            }
            if start is not None:
                facts["start"] = str(start)
            if cfg.recipe.decay.factor == "auto" and "decay_search" not in facts:
                from sparse_pretrain.factor_search import search

                facts["decay_search"] = search(cfg, SearchConfig(), run_dir / runs.DECAY_SEARCH, run)
            runs.write_json(run_dir / runs.RUN_FILE, facts)
            if data.tokenizer_path is not None:
                with runs.writing(run_dir):
                    shutil.copyfile(data.tokenizer_path, run_dir / runs.TOKENIZER_FILE)
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
    """The same files, from whichever folder the run is continued or evaluated; options that a file of adapters decides
    are in the config from then on.

    Raises:
        UserError: there is no file of adapters at recipe.adapter.path.
    """

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    data, model = cfg.data, cfg.model
    changes: dict[str, Any] = {
        name: [absolute(path) for path in getattr(data, name)]
        for name in ("train", "validation")
        if hasattr(data, name)
    }
    for name in ("tokenizer", "hf_path"):  # each may also be a name
        value = getattr(data, name, None)
        if value is not None and Path(value).expanduser().exists():
            changes[name] = absolute(value)
    if isinstance(model, HFConfig):
        model = dataclasses.replace(model, path=absolute(model.path))
    recipe, teacher = cfg.recipe, cfg.recipe.teacher
    teacher = dataclasses.replace(
        teacher,
        models=[model if model == "self" else absolute(model) for model in teacher.models],
        logits=teacher.logits and absolute(teacher.logits),
        reference=teacher.reference and absolute(teacher.reference),
    )
    adapter = dataclasses.replace(recipe.adapter, path=recipe.adapter.path and absolute(recipe.adapter.path))
    if adapter.path is not None:
        from sparse_pretrain.sparsity.adapter_files import with_options_of_file

        adapter = with_options_of_file(adapter)
    return dataclasses.replace(
        cfg,
        model=model,
        data=dataclasses.replace(data, **changes),
        recipe=dataclasses.replace(recipe, teacher=teacher, adapter=adapter),
        resume=cfg.resume if cfg.resume in ("auto", "never") else absolute(cfg.resume),
        init_from=cfg.init_from and absolute(cfg.init_from),
    )
