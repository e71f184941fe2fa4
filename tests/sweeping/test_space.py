"""What a space may say, and how its values reach the command line."""

import itertools

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from sparse_pretrain import cli, crosscheck
from sparse_pretrain.errors import UserError
from sparse_pretrain.paths import config_dir
from sparse_pretrain.sweeping import space as spaces


def parse(text, sampler="tpe", shared=()):
    return spaces.parse(yaml.safe_load(text), sampler, shared)


@pytest.mark.parametrize(
    "value",
    [1, -3, 0.1, 1e-07, 2.5e20, True, False, None, "fst", "2:4", "it's", "a b", "", "null", "True", "1e-4", "x,y", "[a]", "{a}", "a=b",
     "back\\slash", "ends\\", "\\'", "../data/x.txt", "$x", [0.9, 0.95], ["a", "b c"], [], [[1], [None, "2"]]],
    ids=repr,
)  # fmt: skip
def test_values_come_through_hydras_grammar_unchanged(value):
    (parsed,) = OverridesParser.create().parse_overrides([f"key={spaces.hydra_text(value)}"])
    assert parsed.value() == value
    assert type(parsed.value()) is type(value)
    assert not parsed.is_sweep_override()


def test_what_a_file_says():
    lr, layers, share, betas = parse("""
        optimizer.lr: {type: float, low: 1.0e-4, high: 1, log: true}
        model.n_layer: {type: int, low: 2, high: 8, step: 2}
        recipe.schedule.dense_warmup: {type: float, low: 0, high: 0.3, step: 0.1}
        optimizer.betas: {type: categorical, choices: [[0.9, 0.95], [0.9, 0.98]]}
    """)
    assert (lr.ends(), lr.values(), lr.distribution.log) == ([1e-4, 1.0], None, True)
    assert layers.values() == [2, 4, 6, 8]
    assert share.values() == [0.0, 0.1, 0.2, 0.3]
    assert share.snapped(0.1 + 0.2) == 0.3
    assert share.override(0.3) == "recipe.schedule.dense_warmup=0.3"
    assert betas.override(betas.ends()[1]) == "optimizer.betas=[0.9,0.98]"
    assert spaces.size([lr, layers]) is None
    assert spaces.size([layers, share, betas]) == 32
    assert len({tuple(each.items()) for each in spaces.settings([layers, share, betas])}) == 32
    assert next(spaces.settings([layers, betas])) == {"model.n_layer": 2, "optimizer.betas": "[0.9,0.95]"}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("3", "hparams_search.optimizer.lr: found 3; allowed: {type: float"),
        ("{low: 1, high: 2}", "hparams_search.optimizer.lr.type: found nothing; allowed: float, int, categorical"),
        ("{type: flaot, low: 1, high: 2}", "did you mean float?"),
        ("{type: float, min: 1, max: 2}", "hparams_search.optimizer.lr: found min; allowed: type, low, high, log, step"),
        ("{type: float, low: 1}", "hparams_search.optimizer.lr.high: found nothing; allowed: a number"),
        ("{type: float, low: 1e-4, high: 1}", "hparams_search.optimizer.lr.low: found '1e-4'; allowed: a number"),
        ("{type: float, low: .nan, high: 1}", "hparams_search.optimizer.lr.low: found nan; allowed: a number"),
        ("{type: float, low: 2, high: 1}", "hparams_search.optimizer.lr.low: found 2 with high=1; allowed: a number below high"),
        ("{type: float, low: 1, high: 1}", "found 1 with high=1"),
        ("{type: float, low: 0, high: 1, log: true}", "hparams_search.optimizer.lr.low: found 0 with log=true; allowed: above 0"),
        ("{type: float, low: 0, high: 1, log: yes please}", "hparams_search.optimizer.lr.log: found 'yes please'; allowed: true or false"),
        ("{type: float, low: 1, high: 2, log: true, step: 1}", "hparams_search.optimizer.lr.step: found 1 with log=true"),
        ("{type: float, low: 0, high: 1, step: 0.3}", "hparams_search.optimizer.lr.step: found 0.3; allowed: a divisor of high - low = 1"),
        ("{type: float, low: 0, high: 1, step: 0}", "hparams_search.optimizer.lr.step: found 0;"),
        ("{type: int, low: 1.5, high: 3}", "hparams_search.optimizer.lr.low: found 1.5; allowed: a whole number"),
        ("{type: int, low: true, high: 3}", "found True; allowed: a whole number"),
        ("{type: categorical, choices: []}", "hparams_search.optimizer.lr.choices: found none; allowed: two or more"),
        ("{type: categorical, choices: [1]}", "choices: found [1]; allowed: two or more; one alone goes on the command line"),
        ("{type: categorical}", "hparams_search.optimizer.lr.choices: found nothing; allowed: a list of values"),
        ("{type: categorical, choices: [1, 2, 1]}", "choices: found 1 twice; allowed: different values"),
        ("{type: categorical, choices: [1, {a: 2}]}", "choices: found {'a': 2}; allowed: numbers, texts"),
        ("{type: categorical, choices: [1, 2], low: 3}", "hparams_search.optimizer.lr: found low; allowed: type, choices"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(entry, expected):
    with pytest.raises(UserError) as error:
        parse(f"optimizer.lr: {entry}")
    assert expected in str(error.value)


def test_what_cannot_be_searched():
    lr = "optimizer.lr: {type: float, low: 1, high: 2}"
    with pytest.raises(UserError, match="hparams_search: found nothing to search"):
        parse("{}")
    with pytest.raises(UserError, match="sampler: found grid, where optimizer.lr has neither step nor choices"):
        parse(lr, sampler="grid")
    with pytest.raises(UserError, match="optimizer.lr: found one value on the command line, and a search for it"):
        parse(lr, shared=["optimizer.lr"])
    for option in ("trainer.devices", "run_dir", "logger.wandb"):
        with pytest.raises(UserError, match="found an option that changes no loss"):
            parse(f"{option}: {{type: int, low: 1, high: 2}}")


@pytest.mark.parametrize("path", sorted((config_dir() / "hparams_search").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_space_can_be_searched(path):
    (cfg,) = cli._preflight("sweep", [f"hparams_search={path.stem}"])
    space = spaces.parse(cfg.hparams_search, "tpe", ())
    for choose in itertools.islice(itertools.product((0, -1), repeat=len(space)), 8):
        options = [parameter.override(parameter.ends()[end]) for parameter, end in zip(space, choose, strict=True)]
        (trial,) = cli._preflight("train", options)
        crosscheck.check(trial)
