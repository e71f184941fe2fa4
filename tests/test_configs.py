"""Every shipped YAML composes into a valid run, and says every option there is."""

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sparse_pretrain import cli, config, crosscheck, runs, schema
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.config_data import DataConfig
from sparse_pretrain.config_models import ModelConfig
from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.paths import config_dir
from sparse_pretrain.sparsity import load_recipe

GROUPS = ["model", "data", "recipe", "optimizer", "scheduler", "trainer", "logger", "experiment", "debug"]
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((config_dir() / group).glob("*.yaml"))]


def composed(*overrides) -> TrainConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return schema.load(TrainConfig, cli._plain(compose("train", overrides=list(overrides))))


# What a choice does not go without.
IMAGES, PAIRS = "data=cifar10", "data=multi30k"
BESIDE = {
    "text": ["data.train=[x]"],
    "draft": ["recipe.teacher.models=[x]"],
    "hf": ["model.path=gpt2"],
    **{name: [IMAGES] for name in ("vit_nano",)},
    **{name: [IMAGES, "data.image_size=224"] for name in ("deit_tiny", "deit_small", "deit_base")},
    **{name: [IMAGES, "data.image_size=224"] for name in ("resnet18", "resnet50", "densenet121")},
    **{name: [PAIRS] for name in ("seq2seq_nano", "transformer_base", "transformer_big")},
    **{name: ["model=vit_nano"] for name in ("cifar10", "cifar100")},
    "fashion_mnist": ["model=vit_nano", "model.image_size=28", "model.channels=1"],
    "imagenet": ["model=deit_tiny"],
    "images": ["model=deit_tiny", "data.train=[x]"],
    "squad": ["model=bert_base"],
    **{name: ["model=seq2seq_nano"] for name in ("wmt14", "e2e", "wikisql", "multi30k")},
    "pairs": ["model=seq2seq_nano", "data.train=[x]"],
}


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: value)
def test_every_choice_makes_a_valid_run(group, choice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    extra = BESIDE.get(choice, [])
    cfg = composed(f"{group}={choice}", *extra)
    crosscheck.check(cfg)
    if group in ("model", "data", "recipe"):
        assert getattr(cfg, group).name == choice


@pytest.mark.parametrize(
    ("group", "choice"), [c for c in CHOICES if c[0] not in ("recipe", "experiment", "debug")], ids=lambda value: value
)
def test_every_file_lists_every_option(group, choice):
    """Hydra only takes overrides of options that the YAML names."""
    listed = yaml.safe_load((config_dir() / group / f"{choice}.yaml").read_text())
    expected = {
        "model": lambda: ModelConfig.families[listed["family"]],
        "data": lambda: DataConfig.families[listed["task"]],
        "optimizer": lambda: config.OptimizerConfig,
        "scheduler": lambda: config.SchedulerConfig,
        "trainer": lambda: config.TrainerConfig,
        "logger": lambda: config.LoggerConfig,
    }[group]()
    assert set(schema.flatten(listed)) == set(schema.options(expected))


def test_recipes_say_what_differs_from_the_defaults():
    defaults = yaml.safe_load((config_dir() / "recipe_defaults.yaml").read_text())
    assert set(schema.flatten(defaults)) == set(schema.options(RecipeConfig))
    assert schema.load(RecipeConfig, defaults | {"name": "x"}) == RecipeConfig("x")


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "train"])
def test_every_command_lists_every_option(name):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        listed = cli._plain(compose(cli.file_name(name)))
    if "hparams_search" in listed:
        listed["hparams_search"] = "the options of train"
    expected = set(schema.options(cli.COMMANDS[name].schema))
    for group, family in (("model", ModelConfig), ("data", DataConfig)):
        if group in listed:
            expected -= set(schema.options(family, f"{group}."))
            expected |= set(schema.options(family.families[listed[group][family.family_option]], f"{group}."))
    assert set(schema.flatten(listed)) == expected


def test_recipes_load_without_hydra():
    for path in (config_dir() / "recipe").glob("*.yaml"):
        assert load_recipe(path.stem) == composed(f"recipe={path.stem}").recipe


def test_fst_is_as_published():
    fst = load_recipe("fst")
    assert (fst.projection, fst.weight_gradient) == ("transposable", "mvue")
    assert (fst.decay.place, fst.decay.factor) == ("gradient", 6e-5)
    assert fst.schedule.refresh_every == 40
    assert fst.schedule.dense_finetune == pytest.approx(1 / 6)
    cfg = composed("experiment=gpt2_350m_fst")
    assert (cfg.recipe.decay.factor, cfg.trainer.steps, cfg.optimizer.lr) == (2e-4, 300_000, 1.5e-4)
    assert cfg.optimizer.lr * cfg.scheduler.final_lr_share == pytest.approx(1e-5)


def test_no_yaml_names_code():
    for path in config_dir().rglob("*.yaml"):
        assert "_target_:" not in path.read_text()
        OmegaConf.load(path)


def test_the_same_options_give_the_same_folder():
    first, second = composed("seed=3"), composed("seed=3", "trainer.devices=2", "data.num_workers=0", "logger=wandb")
    assert runs.resolve_run_dir(first) == runs.resolve_run_dir(second)
    assert runs.resolve_run_dir(first) != runs.resolve_run_dir(composed("seed=4"))
    assert runs.resolve_run_dir(first).name.startswith("gpt_nano-fst-")
