"""What a sweep leaves: table, best options, page, picture, and the same search for Weights & Biases."""

import shlex

import numpy as np
import optuna
import pytest
import yaml
from matplotlib.image import imread
from optuna.trial import TrialState, create_trial

from sparse_pretrain import cli, crosscheck, runs, train
from sparse_pretrain.errors import UserError
from sparse_pretrain.schema import to_dict
from sparse_pretrain.sweeping import record, results
from sparse_pretrain.sweeping import space as spaces_module
from sparse_pretrain.sweeping.figure import sweep_figure
from sparse_pretrain.sweeping.storage import open_storage

SPACE = """
recipe: {type: categorical, choices: [ste, fst]}
optimizer.lr: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}
model.n_layer: {type: int, low: 1, high: 4}
optimizer.betas: {type: categorical, choices: [[0.9, 0.95], [0.9, 0.98]]}
"""


@pytest.fixture
def sweep(tmp_path):
    """sweep([(recipe, lr, layers, loss or state), …]) -> the folder of a sweep that has these trials."""

    def make(trials, url=None):
        folder = tmp_path / "out"
        (folder / "trials").mkdir(parents=True)
        space = spaces_module.parse(yaml.safe_load(SPACE), "tpe", ())
        method = {"sampler": "tpe", "pruner": "median"}
        shown = url and url.replace("secret", "***")
        record.write(
            folder,
            "sparse-pretrain sweep hparams_search=mine",
            shown,
            {"space": yaml.safe_load(SPACE), "method": method, "options": {}},
        )
        study = optuna.create_study(storage=open_storage(url, folder), study_name="out")
        for number, (recipe, lr, layers, end) in enumerate(trials):
            params = {"recipe": recipe, "optimizer.lr": lr, "model.n_layer": layers, "optimizer.betas": "[0.9,0.98]"}
            config = train.with_absolute_paths(cli._preflight("train", spaces_module.overrides(space, params))[0])
            (folder / "trials" / f"{number:04}.yaml").write_text(yaml.safe_dump(to_dict(config)))
            complete = isinstance(end, float)
            losses = {step: 5 + 1 / step for step in (10, 20)} if end != "FAIL" else {}
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE if complete else TrialState[end],
                    value=end if complete else 5.05 if end == "PRUNED" else None,
                    params=params,
                    distributions={parameter.option: parameter.distribution for parameter in space},
                    intermediate_values=losses | ({30: end} if complete else {}),
                    user_attrs={"reason": "it <diverged>"}
                    if end == "FAIL"
                    else {"steps": 30, "seconds": 61.0}
                    if complete
                    else {},
                )
            )
        return folder

    return make


TRIALS = [
    ("ste", 3e-4, 1, 5.2), ("fst", 1e-3, 2, 4.75), ("ste", 5e-4, 3, "FAIL"), ("fst", 2e-4, 1, "PRUNED"),
    ("ste", 2e-3, 2, 4.5), ("ste", 9e-3, 4, 4.9), ("fst", 4e-3, 2, "RUNNING"),
]  # fmt: skip


def test_the_table_ranks_complete_trials(sweep, capsys):
    folder = sweep(TRIALS)
    cli.main(["sweep-report", f"sweep={folder}"])
    output = capsys.readouterr().out
    lines = [line.split() for line in output.splitlines() if line[:1].isdigit()]
    assert output.splitlines()[1].split() == [
        "trial",
        "state",
        "recipe",
        "lr",
        "n_layer",
        "betas",
        "val",
        "loss",
        "steps",
        "time",
    ]
    assert lines == [
        ["4", "complete", "ste", "0.002", "2", "[0.9,0.98]", "4.5000", "30", "1m", "01s"],
        ["1", "complete", "fst", "0.001", "2", "[0.9,0.98]", "4.7500", "30", "1m", "01s"],
        ["5", "complete", "ste", "0.009", "4", "[0.9,0.98]", "4.9000", "30", "1m", "01s"],
        ["0", "complete", "ste", "0.0003", "1", "[0.9,0.98]", "5.2000", "30", "1m", "01s"],
        ["3", "pruned", "fst", "0.0002", "1", "[0.9,0.98]", "5.0500", "20", "-"],
        ["2", "failed", "ste", "0.0005", "3", "[0.9,0.98]", "-", "-", "-"],
        ["6", "running", "fst", "0.004", "2", "[0.9,0.98]", "5.0500", "20", "-"],
    ]
    assert "trial 2 failed: it <diverged>" in output
    assert "Best: trial 4, validation loss 4.5000" in output
    values = runs.read_json(folder / "sweep.json")
    assert values["best"] == 4
    assert [trial["loss"] for trial in values["trials"]] == [5.2, 4.75, None, 5.05, 4.5, 4.9, 5.05]
    assert sum(values["importances"].values()) == pytest.approx(1)


def test_the_best_options_train_the_same_run(sweep, capsys):
    folder = sweep(TRIALS)
    cli.main(["sweep-report", f"sweep={folder}"])
    command = next(line for line in capsys.readouterr().out.splitlines() if "sparse-pretrain train" in line)
    _, name, *options = shlex.split(command)
    (cfg,) = cli._preflight(name, options)
    (same,) = cli._preflight(
        "train", ["recipe=ste", "optimizer.lr=0.002", "model.n_layer=2", "optimizer.betas=[0.9,0.98]"]
    )
    assert cfg == same
    assert runs.resolve_run_dir(cfg) == runs.resolve_run_dir(same)
    (more,) = cli._preflight(name, [*options, "trainer.steps=5000"])
    assert (more.trainer.steps, more.optimizer.lr) == (5000, 0.002)
    assert (folder / "conf" / "experiment" / "best.yaml").is_file()


def test_best_options_of_another_family(tmp_path):
    """Nothing is left of the options that the default model and data have."""
    from sparse_pretrain.sweeping.best import write_best

    (cfg,) = cli._preflight(
        "train", ["model=vit_nano", "data=cifar10", "recipe=fst", "data.mixup=0.2", f"runs_dir={tmp_path}"]
    )
    config_dir = write_best(cfg, tmp_path)
    (again,) = cli._preflight("train", ["--config-dir", str(config_dir), "experiment=best"])
    assert again == cfg


def test_page_and_picture(sweep, tmp_path):
    folder = sweep(TRIALS)
    cli.main(["sweep-report", f"sweep={folder}", f"out={tmp_path}/report"])
    page = (tmp_path / "report" / "sweep.html").read_text()
    assert "it &lt;diverged&gt;" in page
    assert "<script" not in page
    assert 'src="http' not in page
    assert "7 trials: 4 complete, 1 failed, 1 pruned, 1 running" in page
    assert "float, 0.0001 to 0.01, log" in page
    picture = imread(tmp_path / "report" / "sweep.png")
    assert picture.shape[1] >= 1400
    assert not (folder / "sweep.html").exists()
    again = sweep_figure(results.read_sweep(folder, None))
    assert again == (tmp_path / "report" / "sweep.png").read_bytes()


@pytest.mark.parametrize(
    "trials", [[], [("ste", 1e-3, 1, "RUNNING")], [("ste", 1e-3, 1, 4.0)], [("ste", 1e-3, 1, 4.0), ("fst", 1e-3, 1, 4.0)] * 3],
    ids=["none", "running", "one", "equal"],
)  # fmt: skip
def test_little_to_show_is_shown(sweep, trials, capsys):
    folder = sweep(trials)
    cli.main(["sweep-report", f"sweep={folder}"])
    output = capsys.readouterr().out
    best = any(isinstance(trial[-1], float) for trial in trials)
    assert ("Best: trial 0" if best else "No trial is complete.") in output
    assert np.isfinite(imread(folder / "sweep.png")).all()
    assert (folder / "conf").exists() is best


def test_folders_that_are_no_sweep(sweep, tmp_path):
    for arguments, expected in (
        (
            {"folder": tmp_path / "none"},
            "sweep: found .*none; allowed: the folder of a sweep, one that holds sweep.yaml",
        ),
        (
            {"folder": sweep(TRIALS[:1]), "url": f"sqlite:///{tmp_path}/other.db"},
            "storage: found none with the study out",
        ),
    ):
        with pytest.raises(UserError, match=expected):
            results.read_sweep(arguments["folder"], arguments.get("url"))
    (tmp_path / "out" / "journal.log").unlink()
    with pytest.raises(UserError, match=r"out without journal.log"):
        results.read_sweep(tmp_path / "out", None)
    (tmp_path / "out" / "sweep.yaml").write_text("[")
    with pytest.raises(UserError, match="which is damaged"):
        results.read_sweep(tmp_path / "out", None)


def test_a_database_with_a_password_is_asked_for(sweep, tmp_path):
    folder = sweep([])
    record.write(folder, "x", "postgresql://me:***@host/x", {"space": {}, "method": {}, "options": {}})
    with pytest.raises(UserError, match="without its password"):
        results.read_sweep(folder, None)


def test_labels_are_short_and_different():
    assert results.labels(["optimizer.lr", "recipe", "recipe.decay.factor", "a.lr"]) == {
        "optimizer.lr": "optimizer.lr", "recipe": "recipe", "recipe.decay.factor": "factor", "a.lr": "a.lr",
    }  # fmt: skip


def wandb_file(tmp_path, spaces, *options):
    path = tmp_path / "sweep.yaml"
    cli.main(
        [
            "sweep",
            *spaces(mine=SPACE + EXTRA),
            f"wandb={path}",
            f"runs_dir={tmp_path}/runs",
            "trainer.steps=400",
            *options,
        ]
    )
    assert not (tmp_path / "runs").exists()
    return yaml.safe_load(path.read_text())


EXTRA = """
trainer.batch_size: {type: int, low: 4, high: 64, log: true}
recipe.schedule.dense_warmup: {type: float, low: 0.05, high: 0.25, step: 0.1}
recipe.include: {type: categorical, choices: [null, ["*.ffn.*"]]}
model.dropout: {type: float, low: 0, high: 0.5}
"""


def test_the_same_search_for_wandb(tmp_path, spaces):
    config = wandb_file(tmp_path, spaces, "trials=7")
    assert config["method"] == "bayes"
    assert config["metric"] == {"name": "val/loss", "goal": "minimize"}
    assert config["early_terminate"] == {"type": "hyperband", "min_iter": 10, "eta": 3}
    assert config["run_cap"] == 7
    assert config["parameters"] == {
        "recipe": {"values": ["ste", "fst"]},
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "model.n_layer": {"distribution": "int_uniform", "min": 1, "max": 4},
        "optimizer.betas": {"values": ["[0.9,0.95]", "[0.9,0.98]"]},
        "trainer.batch_size": {"distribution": "q_log_uniform_values", "q": 1, "min": 4, "max": 64},
        "recipe.schedule.dense_warmup": {"values": [0.05, 0.15, 0.25]},
        "recipe.include": {"values": ["null", "['*.ffn.*']"]},
        "model.dropout": {"distribution": "uniform", "min": 0.0, "max": 0.5},
    }


def test_wandb_takes_it_and_its_commands_are_ours(tmp_path, spaces):
    """By wandb's own check, and by the command lines that its agent makes of it."""
    from wandb.apis.public.sweeps import _validate_config_and_fill_distribution
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    config = wandb_file(tmp_path, spaces, "pruner=none", "sampler=random")
    assert _validate_config_and_fill_distribution(config) == config
    assert config["method"] == "random"
    assert "early_terminate" not in config
    for end in (0, -1):
        drawn = {
            option: {"value": entry["values"][end] if "values" in entry else entry["min" if end == 0 else "max"]}
            for option, entry in config["parameters"].items()
        }
        arguments = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
        command = create_sweep_command(config["command"])
        assert command[:2] == ["sparse-pretrain", "train"]
        assert command[-1] == "${args_no_hyphens}"
        (cfg,) = cli._preflight("train", [*command[2:-1], *arguments], check=False)
        assert cfg.trainer.steps == 400
        assert cfg.recipe.include == (None if end == 0 else ["*.ffn.*"])
        assert (cfg.logger.wandb, cfg.logger.wandb_mode) == (True, "online")
        crosscheck._check_model(cfg.model)


def test_a_grid_for_wandb_lists_its_values(tmp_path, spaces):
    path = tmp_path / "sweep.yaml"
    space = "model.n_layer: {type: int, low: 1, high: 3}"
    cli.main(["sweep", *spaces(mine=space), "sampler=grid", f"wandb={path}"])
    config = yaml.safe_load(path.read_text())
    assert (config["method"], config["parameters"]) == ("grid", {"model.n_layer": {"values": [1, 2, 3]}})
