"""A decay factor searched in training: short runs, their result, and runs that use it."""

import dataclasses
import json
import shlex

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from sparse_pretrain import cli, config, crosscheck, decay_search, factor_search, runs, schema, train
from sparse_pretrain.config import DecaySearchConfig, SearchConfig
from sparse_pretrain.config_recipe import DecayConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.interrupt import Interrupted
from sparse_pretrain.launch import RanksFailed
from sparse_pretrain.paths import config_dir
from sparse_pretrain.tasks.causal_lm import CausalLM
from sparse_pretrain.tasks.trained import load_trained
from tests.cli.test_commands import OPTIONS
from tests.tasks.test_training import assert_same_run, metrics

FACTORS = [1e-5, 1e-1]
SHORT = {
    "recipe__schedule__refresh_every": 4,
    "trainer__steps": 32,
    "scheduler__warmup_steps": 14,
    "optimizer__lr": 1e-2,
}


def search_config(cfg, **settings) -> DecaySearchConfig:
    return DecaySearchConfig(**vars(cfg), search=SearchConfig(**{"factors": FACTORS, "refine": 0, **settings}))


@pytest.fixture
def trained_steps(monkeypatch):
    """Run folder -> steps trained since."""
    counts: dict[str, int] = {}
    original = CausalLM.training_step

    def training_step(self, batch, index):
        name = self.cfg.run_dir.rpartition("/")[2]
        counts[name] = counts.get(name, 0) + 1
        original(self, batch, index)

    monkeypatch.setattr(CausalLM, "training_step", training_step)
    return counts


def result_of(folder) -> dict:
    return json.loads((folder / factor_search.RESULT_FILE).read_text())


def test_a_search(tiny, tmp_path, capsys, trained_steps):
    folder = decay_search.run(search_config(tiny("fst", **SHORT), factors=[1e-5, 1e-2, 1.0], refine=2))
    output, result = capsys.readouterr().out, result_of(folder)
    assert folder == tmp_path / "run" / "decay-search"
    assert result["sample_step"] == 12  # the last refresh in a warm-up of 14 steps
    assert (result["refresh_every"], result["place"]) == (4, "gradient")
    assert "4 short runs of 12 steps (1 dense, 3 with decay factors), and up to 2 more" in output
    assert "48 to 72 steps, 150% to 225% of the run's 32" in output

    ratios = {trial["factor"]: trial["ratio"] for trial in result["trials"]}
    assert ratios[1e-5] > 0.9
    assert ratios[1.0] < 0.6 < ratios[1e-5]
    assert ratios[1e-5] >= ratios[1e-2] > ratios[1.0]
    for trial in result["trials"]:
        rows = metrics(folder / f"factor-{trial['factor']:g}")
        assert [int(row["step"]) for row in rows] == [4, 8, 12]
        assert trial["flip_rate"] == float(rows[-1]["sparsity/flip_rate"])
        assert trial["ratio"] == trial["flip_rate"] / result["dense_flip_rate"]
        assert f"{trial['factor']:g}" in output
    assert result["dense_flip_rate"] == float(metrics(folder / "dense")[-1]["sparsity/flip_rate"])
    assert set(trained_steps.values()) == {12}
    assert len(trained_steps) == 1 + len(ratios)
    chosen = [line for line in output.splitlines() if "<- chosen" in line]
    assert len(chosen) == 1
    assert chosen[0].startswith(f"{result['factor']:g} ")
    assert (folder / factor_search.FIGURE_FILE).read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*/checkpoints"))


def test_the_short_runs_share_their_start_and_differ_in_decay_alone(tiny):
    """Without decay, masks that are not used for anything change as those of a dense run."""
    cfg = tiny("fst", **SHORT, recipe__decay__ramp=0.5, recipe__schedule__dense_warmup=0.25)
    folder = runs.resolve_run_dir(cfg)
    dense, first, second = (factor_search.short_run(cfg, folder, factor, 8) for factor in (None, 1e-4, 1e-3))
    different = {key for key, value in runs.identity(first).items() if value != runs.identity(second)[key]}
    assert different == {"recipe.decay.factor"}
    assert first.recipe.decay == DecayConfig(place="gradient", factor=1e-4)
    assert first.recipe.schedule.dense_warmup == 0
    different = {key for key, value in runs.identity(first).items() if value != runs.identity(dense)[key]}
    assert {key.rpartition(".")[0] for key in different} == {"recipe.decay", "recipe.schedule"}
    for short in (dense, first, second):
        crosscheck.check(short)
        train.run(short)
    firsts = [metrics(folder / name)[0] for name in ("dense", "factor-0.0001", "factor-0.001")]
    assert [row["phase"] for row in firsts] == ["dense warm-up", "sparse", "sparse"]
    assert cfg.recipe.decay.ramp == 0.5  # the run itself is left as it was


def test_the_short_runs_start_from_given_weights(tiny):
    source = train.run(tiny("dense", "source", **{**SHORT, "trainer__steps": 60}))
    folders = [
        decay_search.run(search_config(tiny("fst", f"from_{init}", init_from=init, **SHORT), factors=[1e-4]))
        for init in (None, str(source))
    ]
    for name in ("dense", "factor-0.0001"):
        without, given = (float(metrics(folder / name)[0]["train/loss"]) for folder in folders)
        assert given < without - 0.5


@pytest.mark.parametrize("recipe", ["sr_ste", "ast"])
def test_other_places_of_decay(tiny, recipe):
    """ast starts dense, teaches itself and ramps its factor up: not so in the short runs."""
    cfg = search_config(tiny(recipe, **SHORT), factors=[1e-4, 100.0])
    result = result_of(decay_search.run(cfg))
    first, second = (trial["ratio"] for trial in result["trials"])
    assert second < first
    assert metrics(runs.resolve_run_dir(cfg) / "decay-search" / "factor-100")[0]["phase"] == "sparse"


def test_an_interrupted_search_goes_on(tiny, tmp_path):
    """In the middle of a short run; those that were done are not run again."""
    whole = result_of(decay_search.run(search_config(tiny("fst", "whole", **SHORT))))
    cfg, folder = tiny("fst", "stopped", **SHORT), tmp_path / "stopped" / "decay-search"
    started = []

    def interrupted(short):
        started.append(short.run_dir.rpartition("/")[2])
        if len(started) == 2:
            train.run(dataclasses.replace(short, trainer=dataclasses.replace(short.trainer, stop_after=6)))
            raise Interrupted("SIGTERM")
        train.run(short)

    settings = SearchConfig(factors=FACTORS, refine=0)
    with pytest.raises(Interrupted):
        factor_search.search(cfg, settings, folder, interrupted)
    assert started == ["dense", "factor-1e-05"]
    assert not (folder / factor_search.RESULT_FILE).exists()
    assert factor_search.search(cfg, settings, folder, interrupted) == whole
    assert started == ["dense", "factor-1e-05", "factor-1e-05", "factor-0.1"]
    assert factor_search.search(cfg, settings, folder, interrupted) == whole
    assert len(started) == 4


def test_the_command_and_what_it_prints_to_train_with(corpus, tmp_path, monkeypatch, capsys):
    """The runs folder is found by the name of the run, and `auto` finds the short runs there."""
    monkeypatch.chdir(tmp_path)
    cli.main(["decay-search", *OPTIONS, f"data.train=[{corpus}]", "search.factors=[1e-5,1e-1]", "search.refine=0"])
    output = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").glob("gpt_nano-fst-*/decay-search")
    factor = result_of(folder)["factor"]
    (command,) = [line.strip() for line in output.splitlines() if "--config-dir" in line]
    assert f"recipe.decay.factor={factor:g}" in output

    monkeypatch.chdir("/")
    cli.main([*shlex.split(command)[1:], f"runs_dir={tmp_path}/found"])
    (found,) = (tmp_path / "found").glob("gpt_nano-fst-*")
    assert runs.is_complete(found)
    assert runs.read_config(found).recipe.decay.factor == factor

    monkeypatch.chdir(tmp_path)
    cli.main(["train", *OPTIONS, f"data.train=[{corpus}]", "recipe.decay.factor=auto"])
    assert (folder.parent / runs.SUMMARY_FILE).exists()
    assert len(list(folder.glob("factor-*"))) >= 5


def test_auto_trains_with_what_it_found(tiny, tmp_path, capsys):
    run_dir = train.run(tiny("fst", "auto", recipe__decay__factor="auto", **SHORT))
    result = runs.read_json(run_dir / runs.RUN_FILE)["decay_search"]
    assert result == result_of(run_dir / "decay-search")
    assert {trial["factor"] for trial in result["trials"]} >= set(SearchConfig().factors)
    assert "found by the flip rates" in capsys.readouterr().out
    given = train.run(tiny("fst", "given", recipe__decay__factor=result["factor"], **SHORT))
    assert_same_run(given, run_dir)
    # other readers see the factor; the folder keeps what was asked for
    assert runs.read_config(run_dir).recipe.decay.factor == result["factor"]
    assert yaml.safe_load((run_dir / runs.CONFIG_FILE).read_text())["recipe"]["decay"]["factor"] == "auto"
    assert load_trained(str(run_dir), torch.device("cpu")).cfg.recipe.decay.factor == result["factor"]
    train.finish([run_dir, given])
    train.run(tiny("fst", "auto", recipe__decay__factor="auto", **SHORT))
    assert "is complete" in capsys.readouterr().out


def test_a_resumed_auto_run_keeps_its_factor(tiny, tmp_path, monkeypatch):
    changes = {"recipe__decay__factor": "auto", **SHORT}
    whole = train.run(tiny("fst", "whole", **changes))
    run_dir = train.run(tiny("fst", "stopped", trainer__stop_after=9, **changes))

    def not_again(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(factor_search, "search", not_again)
        train.run(tiny("fst", "stopped", **changes))
    assert_same_run(whole, run_dir)
    # a record that was lost is found again from the short runs
    found = runs.read_json(run_dir / runs.RUN_FILE)["decay_search"]
    (run_dir / runs.RUN_FILE).write_text("")
    (run_dir / runs.SUMMARY_FILE).unlink()
    train.run(tiny("fst", "stopped", **changes))
    assert runs.read_json(run_dir / runs.RUN_FILE)["decay_search"] == found


def diverging(monkeypatch, least: float) -> None:
    """The gradients of runs with a decay factor of at least this are NaN."""
    original = CausalLM.manual_backward

    def manual_backward(self, loss, *args, **kwargs):
        bad = self.cfg.recipe.decay.factor >= least and self.steps_done >= 5
        original(self, loss * torch.nan if bad else loss, *args, **kwargs)

    monkeypatch.setattr(CausalLM, "manual_backward", manual_backward)


@pytest.mark.parametrize("guard", ["skip", "stop"])
def test_a_run_that_diverges_is_outside(tiny, monkeypatch, capsys, guard):
    cfg = search_config(tiny("fst", trainer__guard__nonfinite=guard, **SHORT))
    with monkeypatch.context() as patch:
        diverging(patch, 1e-1)
        folder = decay_search.run(cfg)
    first, second = result_of(folder)["trials"]
    assert second == {"factor": 0.1, "flip_rate": None, "ratio": None, "note": "diverged"}
    assert result_of(folder)["factor"] == first["factor"]
    output = capsys.readouterr().out
    assert any(line.split() == ["0.1", "-", "diverged"] for line in output.splitlines())
    decay_search.run(cfg)  # with nothing in its way now: it is not run again
    assert result_of(folder)["trials"] == [first, second]


def test_all_diverge_or_the_dense_run_does(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        diverging(patch, 1e-9)
        with pytest.raises(UserError, match=r"search.factors: found 1e-05, 0.1, none of which trained up to step 12"):
            decay_search.run(search_config(tiny("fst", "all", **SHORT)))
    diverging(monkeypatch, 0.0)
    with pytest.raises(UserError, match=r"search.sample_step: found 12, where a dense run .*: diverged"):
        decay_search.run(search_config(tiny("fst", "dense", **SHORT)))


def test_errors_that_are_no_divergence_are_told(tiny):
    for error in (UserError("trainer.devices", 2, "fewer"), RanksFailed(2), RanksFailed(137)):

        def fail(_, error=error):
            raise error

        with pytest.raises(type(error)):
            factor_search.search(tiny("fst", **SHORT), SearchConfig(), runs.resolve_run_dir(tiny()) / "x", fail)


def test_masks_that_do_not_change(tiny):
    with pytest.raises(UserError, match=r"search.sample_step: found 12, .*: its masks do not change"):
        decay_search.run(search_config(tiny("fst", **{**SHORT, "optimizer__lr": 0.0})))


def test_none_in_the_window_is_warned_about(tiny, capsys):
    folder = decay_search.run(search_config(tiny("fst", **SHORT), factors=[1e-7, 1e-6]))
    assert result_of(folder)["in_window"] is False
    assert "Warning: no factor tried has a flip rate of 0.60 to 0.95" in capsys.readouterr().out


def test_a_changed_corpus_or_another_run_in_the_folder(tiny, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("some words to begin with, and some more of them. " * 200)
    cfg = search_config(tiny("fst", data__train=[str(text)], **SHORT))
    decay_search.run(cfg)
    with pytest.raises(UserError, match=r"run_dir: .*optimizer.lr=0.01 where this one has 0.001"):
        decay_search.run(search_config(tiny("fst", data__train=[str(text)], **{**SHORT, "optimizer__lr": 1e-3})))
    text.write_text("other words altogether now, which give other tokens. " * 200)
    with pytest.raises(UserError, match="data: found text or a tokenizer that changed"):
        decay_search.run(cfg)


@pytest.mark.parametrize(
    ("warmup", "every", "given", "expected"), [(14, 4, None, 12), (3, 4, None, 8), (16, 4, None, 16), (14, 4, 20, 20)]
)
def test_the_sample_step(tiny, warmup, every, given, expected):
    cfg = tiny(
        "fst", trainer__steps=32, scheduler__warmup_steps=warmup, recipe__schedule__refresh_every=every
    )  # 27 steps are sparse
    assert crosscheck.sample_step(cfg, SearchConfig(sample_step=given)) == expected


@pytest.mark.parametrize(
    ("recipe", "changes", "settings", "expected"),
    [
        ("dense", {}, {}, "recipe.projection: found none, where a decay factor is searched; allowed: magnitude"),
        ("slope", {}, {}, "recipe.projection: found static"),
        ("ste", {}, {}, "recipe.decay.place: found none, where a decay factor is searched; allowed: gradient"),
        ("fst", {"resume": "other"}, {}, "resume: found other, .*init_from"),
        ("fst", {"recipe__schedule__dense_finetune": 1.0}, {}, "recipe.schedule: found a run that is dense throughout"),
        ("fst", {"trainer__steps": 8, "scheduler__warmup_steps": 2}, {}, "trainer.steps: found 8, of which 7 come before"),
        ("fst", {}, {"sample_step": 6}, "search.sample_step: found 6; allowed: a multiple of .*=4 from 8 to 24"),
        ("fst", {}, {"sample_step": 4}, "search.sample_step: found 4"),
        ("fst", {}, {"sample_step": 28}, "search.sample_step: found 28"),
        ("fst", {}, {"factors": []}, "search.factors: found nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched(tiny, recipe, changes, settings, expected):
    with pytest.raises(UserError, match=expected):
        crosscheck.check(search_config(tiny(recipe, **{**SHORT, **changes}), **settings))


@pytest.mark.parametrize("recipe", ["dense", "slope", "ste"])
def test_auto_needs_the_same(tiny, recipe):
    with pytest.raises(UserError, match="recipe.(projection|decay.place|decay.factor): found"):
        train.run(tiny(recipe, recipe__decay__factor="auto", **SHORT))


def test_every_option_of_train_and_a_group_of_its_own():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        values = cli._plain(compose("decay_search"))
    assert schema.load(DecaySearchConfig, values).search == SearchConfig()
    assert set(schema.options(DecaySearchConfig)) - set(schema.options(config.TrainConfig)) == {
        "search.factors", "search.sample_step", "search.refine",
    }  # fmt: skip
