"""What must fit together within a config: needs the config alone, and no torch."""

from __future__ import annotations

import math
import re

from sparse_pretrain.config import DecaySearchConfig, SearchConfig, TrainConfig, TrainerConfig
from sparse_pretrain.config_data import DataConfig, ImagesConfig, PairsConfig, TextConfig
from sparse_pretrain.config_models import GPTConfig, ModelConfig, Seq2SeqConfig, TransformerConfig, ViTConfig
from sparse_pretrain.config_recipe import AdapterConfig, LearnedConfig, RecipeConfig, TeacherConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.limits import CHOICES, parse_pattern
from sparse_pretrain.objective import CAUSAL_LM, IMAGE_CLASSIFICATION, objective_of

# Projections whose masks follow the weights, so that the weights' decay shows in the flip rate.
_FOLLOWS_WEIGHTS = ["magnitude", "transposable", "soft_threshold", "metric"]


def check(cfg: TrainConfig) -> None:
    """The checks across options that need neither data nor a device.

    Raises:
        UserError: for the first combination that cannot work.
    """
    trainer = cfg.trainer
    _check_model(cfg.model)
    learns = objective_of(cfg)
    _check_data(cfg.model, cfg.data)
    if len(cfg.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.optimizer.betas):
        raise UserError("optimizer.betas", cfg.optimizer.betas, "two numbers, each at least 0 and below 1")
    if cfg.scheduler.warmup_steps > trainer.steps:
        raise UserError("scheduler.warmup_steps", cfg.scheduler.warmup_steps, f"at most trainer.steps={trainer.steps}")
    if cfg.optimizer.momentum == 1:
        raise UserError("optimizer.momentum", "1, with which nothing would ever move", "below 1")
    if cfg.resume not in ("auto", "never"):
        for option, start in (("init_from", cfg.init_from), ("recipe.adapter.path", cfg.recipe.adapter.path)):
            if start is not None:
                raise UserError(
                    option, f"{start} with resume={cfg.resume}, which brings its own weights", "one of them"
                )
    _check_recipe(cfg)
    _check_teacher(cfg, learns)
    _check_tensor_parallel(trainer, cfg.model, cfg.recipe)
    _check_batch(trainer)
    _check_strategy(cfg)
    if isinstance(cfg, DecaySearchConfig):
        sample_step(cfg, cfg.search)
    elif cfg.recipe.decay.factor == "auto":
        sample_step(cfg, SearchConfig())
    if cfg.name is not None and not re.fullmatch(r"[A-Za-z0-9._-]+", cfg.name):
        raise UserError("name", repr(cfg.name), "letters, digits, '.', '_' and '-'")


def _check_model(model: ModelConfig) -> None:
    if isinstance(model, ViTConfig) and model.image_size % model.patch_size:
        raise UserError("model.patch_size", model.patch_size, f"a divisor of model.image_size={model.image_size}")
    if not isinstance(model, TransformerConfig):
        return
    if model.d_model % model.n_head:
        raise UserError("model.n_head", model.n_head, f"a divisor of model.d_model={model.d_model}")
    if isinstance(model, GPTConfig):
        _check_gpt(model)
    if isinstance(model, Seq2SeqConfig):
        if model.position == "rotary":
            raise UserError("model.position", f"rotary with model.family={model.family}", ["learned", "sinusoidal"])
        if model.position == "sinusoidal" and model.d_model % 2:
            raise UserError("model.d_model", f"{model.d_model} with sinusoidal positions", "an even number")
    if model.activation_sparsity != "none":
        if model.activation != "relu2":
            raise UserError(
                "model.activation_sparsity",
                f"{model.activation_sparsity} with model.activation={model.activation}",
                "none, or model.activation=relu2",
            )
        if model.d_ff is not None and model.d_ff % 4:
            raise UserError(
                "model.d_ff", model.d_ff, f"a multiple of 4 with model.activation_sparsity={model.activation_sparsity}"
            )


def _check_gpt(model: GPTConfig) -> None:
    if model.position == "sinusoidal":
        raise UserError("model.position", f"sinusoidal with model.family={model.family}", ["learned", "rotary"])
    if model.position == "rotary" and (model.d_model // model.n_head) % 2:
        raise UserError(
            "model.n_head",
            model.n_head,
            f"one for which model.d_model / model.n_head is even (model.d_model={model.d_model}, rotary positions)",
        )
    if model.n_kv_head is not None and model.n_head % model.n_kv_head:
        raise UserError("model.n_kv_head", model.n_kv_head, f"a divisor of model.n_head={model.n_head}")


def _check_recipe(cfg: TrainConfig) -> None:
    recipe, schedule, decay, adapter = cfg.recipe, cfg.recipe.schedule, cfg.recipe.decay, cfg.recipe.adapter
    latest = schedule.dense_warmup if schedule.dense_warmup_max is None else schedule.dense_warmup_max
    if latest < schedule.dense_warmup:
        raise UserError(
            "recipe.schedule.dense_warmup_max",
            f"{latest:g}, below recipe.schedule.dense_warmup={schedule.dense_warmup:g}",
            "the latest switch, not before the earliest",
        )
    if latest + schedule.dense_finetune > 1:
        warmup = "dense_warmup" if schedule.dense_warmup_max is None else "dense_warmup_max"
        raise UserError(
            "recipe.schedule.dense_finetune",
            f"{schedule.dense_finetune:g} with recipe.schedule.{warmup}={latest:g}",
            "shares of the run that add up to at most 1",
        )
    if (decay.factor == "auto" or decay.factor > 0) and decay.place == "none":
        raise UserError("recipe.decay.place", "none with a decay factor above 0", CHOICES["recipe.decay.place"][1:])
    pattern = parse_pattern(recipe.pattern)
    if pattern is None or pattern[1] > 16:
        raise UserError(
            "recipe.pattern",
            recipe.pattern,
            "N:M with 0 < N < M <= 16, as 2:4 or 4:8",
            hint='In YAML with quotes, as pattern: "2:4": without them it is a number of base 60',
        )
    if decay.ramp and decay.place == "none":
        raise UserError("recipe.decay.ramp", f"{decay.ramp:g} with recipe.decay.place=none", "0, or a place")
    if recipe.projection != "learned" and _changed(recipe.learned, LearnedConfig()):
        option = _changed(recipe.learned, LearnedConfig())[0]
        raise UserError(
            f"recipe.learned.{option}",
            f"set with recipe.projection={recipe.projection}",
            "this only with recipe.projection=learned",
        )
    if recipe.projection == "none":
        _check_dense(recipe)
    else:
        _check_projection(recipe)
    _check_adapter(adapter)
    if not recipe.train_weights and adapter.kind == "none" and recipe.projection != "learned":
        raise UserError(
            "recipe.train_weights", "false, with nothing else to train", "true, or an adapter, or projection=learned"
        )
    if not recipe.train_weights and schedule.dense_finetune:
        raise UserError(
            "recipe.schedule.dense_finetune",
            f"{schedule.dense_finetune:g} with recipe.train_weights=false",
            "0: there is nothing to train in a dense end",
        )
    for option, pair in (
        ("recipe.learned.temperature", recipe.learned.temperature),
        ("recipe.learned.scale", recipe.learned.scale),
    ):
        if len(pair) != 2 or min(pair) <= 0:
            raise UserError(option, pair, "two numbers above 0: at the first and at the last sparse step")
    for option, found, used in (
        ("decay.place", "momentum", decay.place == "momentum"),
        ("frozen_preconditioner", "true", recipe.frozen_preconditioner),
        ("schedule.dense_warmup_max", schedule.dense_warmup_max, schedule.dense_warmup_max is not None),
    ):
        if used and cfg.optimizer.name == "muon":
            raise UserError(
                f"recipe.{option}", f"{found} with optimizer.name=muon", "this only with optimizer.name=adamw"
            )


def _check_adapter(adapter: AdapterConfig) -> None:
    if adapter.kind == "none":
        unused = _changed(adapter, AdapterConfig())
        if unused:
            raise UserError(
                f"recipe.adapter.{unused[0]}", "set where recipe.adapter.kind=none", "this only with an adapter"
            )
        return
    inits = {"lora": ["kaiming", "normal"], "slorb": ["mean", "sum"]}[adapter.kind]
    if adapter.init is not None and adapter.init not in inits:
        raise UserError("recipe.adapter.init", f"{adapter.init} with recipe.adapter.kind={adapter.kind}", inits)
    if adapter.start == 1:
        raise UserError("recipe.adapter.start", "1, after the last step", "a share of the run below 1")


def _changed(options: object, default: object) -> list[str]:
    """The names of the options that are not what they are by default."""
    return [name for name, value in vars(default).items() if getattr(options, name) != value]


def _check_dense(recipe: RecipeConfig) -> None:
    adapted = recipe.adapter.kind != "none"
    for option, used in (
        ("recipe.input_gradient", recipe.input_gradient != "same"),
        ("recipe.weight_gradient", recipe.weight_gradient != "dense"),
        ("recipe.decay.factor", recipe.decay.factor != 0),
        ("recipe.frozen_preconditioner", recipe.frozen_preconditioner),
        ("recipe.schedule.track_dense", recipe.schedule.track_dense),
        ("recipe.fp8", recipe.fp8),
        ("recipe.include", recipe.include is not None and not adapted),
        ("recipe.exclude", bool(recipe.exclude) and not adapted),
    ):
        if used:
            raise UserError(option, "set for a dense recipe", "this only with recipe.projection other than none")


def _check_projection(recipe: RecipeConfig) -> None:
    """Which parts go with which projection."""
    projection, pattern = recipe.projection, parse_pattern(recipe.pattern)
    assert pattern is not None
    if pattern != (2, 4):
        for option, used in (
            ("recipe.projection", projection in ("transposable", "soft_threshold")),
            ("recipe.weight_gradient", recipe.weight_gradient == "mvue"),
        ):
            if used:
                found = projection if option == "recipe.projection" else "mvue"
                raise UserError(option, f"{found} with recipe.pattern={recipe.pattern}", "2:4, as it is defined for")
        if projection == "learned" and pattern[1] > 8:
            raise UserError("recipe.pattern", f"{recipe.pattern} with recipe.projection=learned", "M up to 8")
    learned = projection == "learned"
    for option, found, only in (
        ("input_gradient", recipe.input_gradient, "same" if learned or projection == "soft_threshold" else None),
        ("weight_gradient", recipe.weight_gradient, "dense" if learned else None),
        ("decay.place", recipe.decay.place, "none" if learned else None),
        ("fp8", str(recipe.fp8).lower(), "false" if learned else None),
        ("schedule.refresh_every", str(recipe.schedule.refresh_every), "1" if learned else None),
        ("schedule.track_dense", str(recipe.schedule.track_dense).lower(), "false" if learned else None),
    ):
        if only is not None and found != only:
            raise UserError(f"recipe.{option}", f"{found} with recipe.projection={projection}", [only])
    if projection == "transposable" and recipe.input_gradient == "double_pruned":
        raise UserError(
            "recipe.input_gradient", "double_pruned with recipe.projection=transposable", ["same", "dense"],
            hint="A transposable mask is 2:4 along out_features already",
        )  # fmt: skip
    if recipe.frozen_preconditioner and (recipe.schedule.dense_finetune or not recipe.schedule.dense_warmup):
        raise UserError(
            "recipe.frozen_preconditioner",
            f"true with dense_warmup={recipe.schedule.dense_warmup:g}, "
            f"dense_finetune={recipe.schedule.dense_finetune:g}",
            "a dense start whose second moment can be kept, and no dense end",
        )


def _check_data(model: ModelConfig, data: DataConfig) -> None:
    limit = getattr(model, "max_seq_len", None)
    lengths = [name for name in ("seq_len", "max_source_len", "max_target_len") if hasattr(data, name)]
    for name in lengths if limit is not None else ():
        if getattr(data, name) > limit:
            raise UserError(f"data.{name}", getattr(data, name), f"at most model.max_seq_len={limit}")
    if isinstance(data, PairsConfig) and isinstance(model, GPTConfig) and data.tokens_per_example > model.max_seq_len:
        raise UserError(
            "data.max_target_len",
            f"{data.max_target_len} after data.max_source_len={data.max_source_len}",
            f"lengths whose sum is at most model.max_seq_len={model.max_seq_len}",
        )
    if isinstance(data, ImagesConfig):
        for name in ("image_size", "channels"):
            if getattr(model, name, getattr(data, name)) != getattr(data, name):
                raise UserError(f"data.{name}", getattr(data, name), f"model.{name}={getattr(model, name)}")
    if isinstance(data, TextConfig):
        if data.source == "text" and not data.train:
            raise UserError("data.train", "nothing", "a list of files, folders or globs, as data.train=[corpus/*.txt]")
        if data.source == "huggingface" and not data.hf_path:
            raise UserError("data.hf_path", "nothing", "the name of a Hugging Face dataset, or a local folder")


def _check_teacher(cfg: TrainConfig, learns: str) -> None:
    teacher, itself = cfg.recipe.teacher, "self" in cfg.recipe.teacher.models
    if teacher.models and learns not in (CAUSAL_LM, IMAGE_CLASSIFICATION):
        raise UserError(
            "recipe.teacher.models", f"set for {learns}", "none, or data with data.task=language_modeling for a decoder"
        )
    for option, found in (("logits", teacher.logits), ("reference", teacher.reference)):
        if found is not None and learns != CAUSAL_LM:
            raise UserError(f"recipe.teacher.{option}", f"{found} for {learns}", "null: it is for decoders' texts")
    if not teacher.models and teacher != TeacherConfig():
        option = _changed(teacher, TeacherConfig())[0]
        raise UserError("recipe.teacher.models", f"none, with recipe.teacher.{option} set", "at least one teacher")
    if teacher.token_share < 1 and teacher.reference is None:
        raise UserError(
            "recipe.teacher.reference",
            f"null with recipe.teacher.token_share={teacher.token_share:g}",
            "the run of a draft model distilled before, or recipe.teacher.token_share=1",
        )
    if teacher.reference is not None and teacher.token_share == 1:
        raise UserError(
            "recipe.teacher.token_share",
            "1 with a recipe.teacher.reference, which then chooses nothing",
            "below 1 (AdaSPEC's is 0.4)",
        )
    if teacher.reference == "self":
        raise UserError("recipe.teacher.reference", "self", "the run of a draft model distilled before")
    if itself and teacher.logits is not None:
        raise UserError(
            "recipe.teacher.logits",
            "set for the teacher self, whose logits are of this run alone",
            "null, or other teachers",
        )
    if itself and cfg.recipe.projection == "none":
        raise UserError(
            "recipe.teacher.models",
            "self, for a recipe that never becomes sparse",
            "run, checkpoint or Hugging Face folders",
        )
    schedule = cfg.recipe.schedule
    warmup = schedule.dense_warmup if schedule.dense_warmup_max is None else schedule.dense_warmup_max
    if itself and round(warmup * cfg.trainer.steps) == 0 and cfg.init_from is None and cfg.resume in ("auto", "never"):
        raise UserError(
            "recipe.teacher.models",
            "self, for a run that is sparse from its first step on: a teacher that has learned nothing",
            "self with recipe.schedule.dense_warmup above 0, or with init_from=RUN; or other teachers",
        )


def _check_strategy(cfg: TrainConfig) -> None:
    if cfg.trainer.strategy == "fsdp" and cfg.trainer.precision == "fp16":
        raise UserError("trainer.precision", "fp16 with trainer.strategy=fsdp", "fp32 or bf16, or trainer.strategy=ddp")


def _check_tensor_parallel(trainer: TrainerConfig, model: ModelConfig, recipe: RecipeConfig) -> None:
    """FFNs are cut along their hidden features, into parts that no group of M weights and no 4x4 block crosses."""
    ranks, option = trainer.tensor_parallel, "trainer.tensor_parallel"
    if ranks == 1:
        return
    if trainer.strategy != "fsdp":
        raise UserError(option, f"{ranks} with trainer.strategy={trainer.strategy}", "1, or trainer.strategy=fsdp")
    if trainer.devices % ranks:
        raise UserError(option, ranks, f"a divisor of trainer.devices={trainer.devices}")
    if not isinstance(model, TransformerConfig):
        raise UserError(option, f"{ranks} with model.family={model.family}", "1: its FFNs are not ours to cut")
    pattern = parse_pattern(recipe.pattern)
    group = 1 if recipe.projection == "none" or pattern is None else pattern[1]
    if model.activation_sparsity != "none":
        group = math.lcm(group, 4)
    if recipe.adapter.kind == "slorb" and not recipe.adapter.train_groups:
        group = math.lcm(group, recipe.adapter.group)
    for name, found, multiple in (
        ("d_ff", model.ffn_width, ranks * group),
        ("d_model", model.d_model, ranks if model.bias else 1),
    ):
        if found % multiple:
            raise UserError(f"model.{name}", found, f"a multiple of {multiple} with {option}={ranks}")


def _check_batch(trainer: TrainerConfig) -> None:
    ranks = f"trainer.devices={trainer.devices}" + (f" x trainer.nodes={trainer.nodes}" if trainer.nodes > 1 else "")
    if trainer.tensor_parallel > 1:
        ranks += f" / trainer.tensor_parallel={trainer.tensor_parallel}"
    if trainer.batch_size % trainer.data_ranks:
        raise UserError("trainer.batch_size", trainer.batch_size, f"a multiple of {ranks}")
    per_device = trainer.batch_size // trainer.data_ranks
    if trainer.micro_batch_size is not None and per_device % trainer.micro_batch_size:
        raise UserError(
            "trainer.micro_batch_size",
            trainer.micro_batch_size,
            f"a divisor of the {per_device} sequences per device (trainer.batch_size / {ranks})",
        )


def sample_step(cfg: TrainConfig, search: SearchConfig) -> int:
    """The step at which a search for the decay factor reads the flip rate.

    Raises:
        UserError: the recipe has no decay to search a factor for, or the run is too short.
    """
    recipe, schedule, steps = cfg.recipe, cfg.recipe.schedule, cfg.trainer.steps
    warmup = schedule.dense_warmup if schedule.dense_warmup_max is None else schedule.dense_warmup_max
    places, searched = CHOICES["recipe.decay.place"][1:], "where a decay factor is searched"
    for option, found, allowed, fits in (
        ("recipe.projection", recipe.projection, _FOLLOWS_WEIGHTS, recipe.projection in _FOLLOWS_WEIGHTS),
        ("recipe.decay.place", recipe.decay.place, places, recipe.decay.place in places),
        ("recipe.train_weights", "false", ["true"], recipe.train_weights),
        ("resume", cfg.resume, "auto, with init_from for the weights to start from", cfg.resume in ("auto", "never")),
        ("search.factors", "nothing", "at least one factor", bool(search.factors)),
        (
            "recipe.schedule",
            "a run that is dense throughout",
            "a dense warm-up and a dense fine-tune that leave sparse steps",
            warmup + schedule.dense_finetune < 1,
        ),
    ):
        if not fits:
            raise UserError(option, f"{found}, {searched}", allowed)
    every, sparse_steps = schedule.refresh_every, steps - round(schedule.dense_finetune * steps)
    last = (sparse_steps - 1) // every * every
    if last < 2 * every:
        raise UserError(
            "trainer.steps",
            f"{steps}, of which {sparse_steps} come before the dense fine-tune, {searched}",
            f"a run with at least two refreshes after its start: recipe.schedule.refresh_every={every}",
        )
    step = search.sample_step or max(cfg.scheduler.warmup_steps // every, 2) * every
    if step % every or not 2 * every <= step <= last:
        raise UserError(
            "search.sample_step",
            step,
            f"a multiple of recipe.schedule.refresh_every={every} from {2 * every} to {last}",
        )
    return step
