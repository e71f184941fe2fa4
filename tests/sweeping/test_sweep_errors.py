"""What is wrong with a sweep is one sentence, before anything is run or written."""

import pytest
import yaml

from sparse_pretrain import cli, sweep
from sparse_pretrain.errors import UserError
from sparse_pretrain.sweeping.metrics_tail import MetricsTail
from tests.cli.test_errors import error_of as error_of_command

LR = "optimizer.lr: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}"


def error_of(capsys, *arguments):
    return error_of_command(capsys, "sweep", *arguments)


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("optimizer.lrr: {type: float, low: 1, high: 2}", "optimizer.lrr: found no such option; allowed: optimizer.lr"),
        ("lr: {type: float, low: 1, high: 2}", "lr: found no such option; allowed: optimizer.lr"),
        ("trials: {type: int, low: 1, high: 2}", "trials: found no such option"),
        ("model.n_layer: {type: float, low: 1, high: 2}", "model.n_layer: found 1.0; allowed: a whole number"),
        ("model.bias: {type: int, low: 0, high: 1}", "model.bias: found 0; allowed: true or false"),
        ("optimizer.lr: {type: float, low: -1, high: 1}", "optimizer.lr: found -1; allowed: at least 0"),
        ("recipe.schedule.dense_warmup: {type: float, low: 0, high: 2}", "recipe.schedule.dense_warmup: found 2; allowed: at least 0 and at most 1"),
        ("recipe: {type: categorical, choices: [ste, fts]}", "recipe: found fts; allowed: ast, dense"),
        ("model.activation: {type: categorical, choices: [gelu, gleu]}", "model.activation: found gleu; allowed: gelu, "),
        ("optimizer.betas: {type: categorical, choices: [0.9, 0.95]}", "optimizer.betas: found 0.9; allowed: a list"),
        ("model.n_head: {type: categorical, choices: [5, 7]}", "model.n_head: found 5; allowed: a divisor of model.d_model=128"),
        ("optimizer.lr: {type: float, low: 1, high: 0.1}", "hparams_search.optimizer.lr.low: found 1 with high=0.1"),
        ("optimizer.lr: 3", "hparams_search.optimizer.lr: found 3; allowed: {type: float"),
        ("{}", "hparams_search: found nothing to search"),
    ],
)  # fmt: skip
def test_spaces(capsys, spaces, tmp_path, monkeypatch, space, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, *spaces(mine=space))
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["hparams_search=lrr"], "hparams_search: found lrr; allowed: decay, lr, "),
        (["-m", "recipe=ste,fst"], "options: found -m; allowed: none: a sweep is many runs by itself"),
        (["recipe=ste,fst"], "recipe=ste,fst: found several values; allowed: one value: those to try are in hparams_search"),
        (["run_dir=x"], "run_dir: found x; allowed: runs_dir=FOLDER"),
        (["optimizer.lr=1e-3"], "optimizer.lr: found one value on the command line, and a search for it"),
        (["resume=never"], "resume: found never; allowed: auto"),
        (["trainer.stop_after=5"], "trainer.stop_after: found 5; allowed: null"),
        (["trials=0"], "trials: found 0; allowed: at least 1"),
        (["workers=0"], "workers: found 0; allowed: at least 1"),
        (["sampler=tpee"], "sampler: found tpee; allowed: tpe, random, grid; did you mean tpe?"),
        (["pruner=medain"], "pruner: found medain; allowed: median, hyperband, none; did you mean median?"),
        (["sampler=grid"], "sampler: found grid, where optimizer.lr has neither step nor choices"),
        (["steps=10"], "steps: found no such option; allowed: trainer.steps"),
        (["data=text"], "data.train: found nothing"),
        (["trainer.precision=fp16", "trainer.accelerator=cpu"], "trainer.precision: found fp16 on a CPU"),
        (["init_from=/nowhere"], "init_from: found"),
        (["wandb=/proc/nowhere/x.yaml"], "/proc/nowhere, which cannot be written"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_options(capsys, tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["out=/proc/nowhere"], "/proc/nowhere, which cannot be written"),
        (["storage=study.db"], "storage: found study.db; allowed: null"),
        (["storage=sqlite:////nowhere/x.db"], "which cannot be opened (unable to open database file)"),
    ],
)
def test_places(capsys, tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "prepare", lambda cfg, example: [])
    assert expected in error_of(capsys, *options)
    assert not list(tmp_path.iterdir())


def test_without_optuna(capsys, monkeypatch):
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'sparse-pretrain[sweep]' installs it" in error_of(capsys)
    with pytest.raises(SystemExit):
        cli.main(["sweep-report", "sweep=x"])
    assert "optuna: found not installed" in capsys.readouterr().err


def test_no_report_of_no_sweep(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep-report", f"sweep={tmp_path}"])
    assert stop.value.code == 2
    assert (
        f"sweep: found {tmp_path}; allowed: the folder of a sweep, one that holds sweep.yaml" in capsys.readouterr().err
    )


def test_workers_share_the_gpus(monkeypatch):
    import torch

    from sparse_pretrain import hardware

    (cfg,) = cli._preflight("sweep", ["workers=2", "trainer.devices=2"])
    monkeypatch.setattr(hardware, "pick_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep._devices(cfg, cfg) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert sweep._devices(cfg, cfg) == ["4,5", "6,7"]
    cfg.workers = 3
    with pytest.raises(UserError, match="workers: found 3 with 2 GPUs each; allowed: at most 2: there are 4"):
        sweep._devices(cfg, cfg)


def test_metrics_are_followed_while_they_are_written(tmp_path):
    path = tmp_path / "metrics.csv"
    tail = MetricsTail(path)
    assert tail.read() == []
    path.write_text("step,seconds,val/loss\n1,0.5,\n2,1.0,5.5\n3,1.5,4.")
    assert tail.read() == [(2, 5.5)]
    assert (tail.step, tail.seconds) == (2, 1.0)
    with open(path, "a") as file:
        file.write("25\n4,2.0,nan\n")
    (third, fourth) = tail.read()
    assert third == (3, 4.25)
    assert fourth[1] != fourth[1]
    assert tail.read() == []
    (tmp_path / "new").write_text(
        "step,seconds,val/loss\n1,0.5,\n2,1.0,5.5\n3,1.5,4.25\n5,2.5,4\n"
    )  # as a resumed run does
    (tmp_path / "new").rename(path)
    assert tail.read() == [(2, 5.5), (3, 4.25), (5, 4.0)]


def test_spaces_are_kept_as_they_are_written(spaces):
    (cfg,) = cli._preflight("sweep", spaces(mine=LR))
    assert cfg.hparams_search == yaml.safe_load(LR)
