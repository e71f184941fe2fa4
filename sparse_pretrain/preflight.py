"""Everything that is checked before a run starts: what is wrong is one sentence, and nothing has been lost.

`check` needs the config alone (and no torch); the others look at devices, checkpoints, tokens and the disk.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_pretrain import runs
from sparse_pretrain.config import (
    DecaySearchConfig,
    ModelConfig,
    RecipeConfig,
    SearchConfig,
    TeacherConfig,
    TrainConfig,
    TrainerConfig,
    flatten,
    to_dict,
)
from sparse_pretrain.errors import UserError
from sparse_pretrain.limits import CHOICES, parse_pattern

if TYPE_CHECKING:
    from sparse_pretrain.data.token_store import TokenStore
    from sparse_pretrain.tasks.teacher import TeacherFolder


# Options of a recipe that decide which parameters and buffers a model has.
_LAYER_OPTIONS = (
    *("recipe.projection", "recipe.pattern", "recipe.input_gradient", "recipe.include", "recipe.exclude"),
    *("recipe.adapter.kind", "recipe.adapter.rank", "recipe.adapter.group", "recipe.adapter.train_groups"),
)
# Projections whose masks follow the weights, so that the weights' decay shows in the flip rate.
_FOLLOWS_WEIGHTS = ["magnitude", "transposable", "soft_threshold", "metric"]


def check(cfg: TrainConfig) -> None:
    """The checks across options that need neither data nor a device.

    Raises:
        UserError: for the first combination that cannot work.
    """
    model, data, trainer = cfg.model, cfg.data, cfg.trainer
    _check_model(model)
    if data.seq_len > model.max_seq_len:
        raise UserError("data.seq_len", data.seq_len, f"at most model.max_seq_len={model.max_seq_len}")
    if data.source == "text" and not data.train:
        raise UserError("data.train", "nothing", "a list of files, folders or globs, as data.train=[corpus/*.txt]")
    if data.source == "huggingface" and not data.hf_path:
        raise UserError("data.hf_path", "nothing", "the name of a Hugging Face dataset, or a local folder")
    if len(cfg.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.optimizer.betas):
        raise UserError("optimizer.betas", cfg.optimizer.betas, "two numbers, each at least 0 and below 1")
    if cfg.scheduler.warmup_steps > trainer.steps:
        raise UserError("scheduler.warmup_steps", cfg.scheduler.warmup_steps, f"at most trainer.steps={trainer.steps}")
    _check_recipe(cfg)
    _check_teacher(cfg)
    _check_batch(trainer)
    if isinstance(cfg, DecaySearchConfig):
        sample_step(cfg, cfg.search)
    elif cfg.recipe.decay.factor == "auto":
        sample_step(cfg, SearchConfig())
    if cfg.name is not None and not re.fullmatch(r"[A-Za-z0-9._-]+", cfg.name):
        raise UserError("name", repr(cfg.name), "letters, digits, '.', '_' and '-'")


def _check_model(model: ModelConfig) -> None:
    if model.d_model % model.n_head:
        raise UserError("model.n_head", model.n_head, f"a divisor of model.d_model={model.d_model}")
    if model.position == "rotary" and (model.d_model // model.n_head) % 2:
        raise UserError(
            "model.n_head",
            model.n_head,
            f"one for which model.d_model / model.n_head is even (model.d_model={model.d_model}, rotary positions)",
        )
    if model.n_kv_head is not None and model.n_head % model.n_kv_head:
        raise UserError("model.n_kv_head", model.n_kv_head, f"a divisor of model.n_head={model.n_head}")
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
    if recipe.projection == "none":
        _check_dense(recipe)
    else:
        _check_projection(recipe)
    inits = {"none": CHOICES["recipe.adapter.init"], "lora": ["kaiming", "normal"], "slorb": ["mean", "sum"]}
    if adapter.init is not None and adapter.init not in inits[adapter.kind]:
        raise UserError(
            "recipe.adapter.init", f"{adapter.init} with recipe.adapter.kind={adapter.kind}", inits[adapter.kind]
        )
    if adapter.path is not None and adapter.kind == "none":
        raise UserError("recipe.adapter.path", adapter.path, "null where recipe.adapter.kind=none")
    if not recipe.train_weights and adapter.kind == "none" and recipe.projection != "learned":
        raise UserError(
            "recipe.train_weights", "false, with nothing else to train", "true, or an adapter, or projection=learned"
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
    if pattern is None or pattern[1] > 16:
        raise UserError("recipe.pattern", recipe.pattern, "N:M with 0 < N < M <= 16, as 2:4 or 4:8")
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


def _check_teacher(cfg: TrainConfig) -> None:
    teacher, itself = cfg.recipe.teacher, "self" in cfg.recipe.teacher.models
    if not teacher.models and teacher != TeacherConfig():
        options = [name for name, value in vars(TeacherConfig()).items() if getattr(teacher, name) != value]
        raise UserError("recipe.teacher.models", f"none, with recipe.teacher.{options[0]} set", "at least one teacher")
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


def _check_batch(trainer: TrainerConfig) -> None:
    if trainer.batch_size % trainer.devices:
        raise UserError("trainer.batch_size", trainer.batch_size, f"a multiple of trainer.devices={trainer.devices}")
    per_device = trainer.batch_size // trainer.devices
    if trainer.micro_batch_size is not None and per_device % trainer.micro_batch_size:
        raise UserError(
            "trainer.micro_batch_size",
            trainer.micro_batch_size,
            f"a divisor of the {per_device} sequences per device (trainer.batch_size / trainer.devices)",
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


def check_device(cfg: TrainConfig) -> None:
    """Raises UserError if the devices or the precision asked for are not there."""
    import torch

    from sparse_pretrain.hardware import pick_device, precision_dtype

    device = pick_device(cfg.trainer.accelerator, "trainer.accelerator")
    precision_dtype(cfg.trainer.precision, device, "trainer.precision")
    if device.type == "cuda" and cfg.trainer.devices > torch.cuda.device_count():
        raise UserError(
            "trainer.devices", cfg.trainer.devices, f"at most the {torch.cuda.device_count()} GPUs of this machine"
        )


def check_logger(cfg: TrainConfig) -> None:
    """Raises UserError if Weights & Biases is to be online without a login (it would stop and ask for one)."""
    if cfg.logger.wandb and cfg.logger.wandb_mode == "online":
        from sparse_pretrain.loggers import logged_in_to_wandb

        if not logged_in_to_wandb():
            raise UserError(
                "logger.wandb_mode", "online, but no login", ["offline"], "Run `wandb login` once, or set WANDB_API_KEY"
            )


def check_layers(cfg: TrainConfig) -> None:
    """Raises UserError if the recipe's layer patterns do not fit the model."""
    import torch

    from sparse_pretrain.sparsity.swap import select_layers
    from sparse_pretrain.tasks.causal_lm import build_model

    with torch.device("meta"):
        select_layers(build_model(cfg, vocab_size=cfg.model.vocab_size or 64), cfg.recipe)


def check_resume(cfg: TrainConfig) -> Path:
    """The run folder of the checkpoint that `resume` names.

    Raises:
        UserError: it is missing, damaged, or of another model.
    """
    from sparse_pretrain.checkpoint import store

    checkpoint = store.resolve(Path(cfg.resume), option="resume")
    source = checkpoint.parent.parent
    _check_same_model(cfg, source, "resume", _LAYER_OPTIONS)
    if store.step_of(checkpoint) >= cfg.trainer.steps:
        raise UserError(
            "trainer.steps",
            f"{cfg.trainer.steps}, but resume names a checkpoint of step {store.step_of(checkpoint)}",
            "more",
        )
    return source


def check_init(cfg: TrainConfig) -> Path:
    """The run folder of the checkpoint that `init_from` names.

    Raises:
        UserError: it is missing, damaged, or of another model.
    """
    from sparse_pretrain.checkpoint import store

    assert cfg.init_from is not None
    source = store.resolve(Path(cfg.init_from), option="init_from").parent.parent
    _check_same_model(cfg, source, "init_from")
    return source


def _check_same_model(cfg: TrainConfig, source: Path, option: str, recipe_options: tuple[str, ...] = ()) -> None:
    """Raises UserError naming `option` if the run in `source` has another model, or other ones of these options."""
    there = flatten(to_dict(runs.read_config(source)))
    here = flatten(to_dict(cfg))
    for name in here:
        shapes = name.startswith("model.") and name not in ("model.name", "model.activation_checkpointing")
        if (shapes or name in recipe_options) and there.get(name) != here[name]:
            raise UserError(
                option,
                f"a checkpoint of another model: {name}={there.get(name)} there, {here[name]} here",
                "a checkpoint of the same model" + (" and sparse layers" if recipe_options else ""),
            )


def check_teacher(cfg: TrainConfig, run_dir: Path) -> dict[str, TeacherFolder]:
    """The teachers and the reference of a run: each one's path as given -> where it is.

    A run that goes on keeps those it began with, whichever checkpoints a teacher's run has saved since.

    Raises:
        UserError: one is missing, damaged, another than this run began with, or made for shorter sequences or, as far
            as can be told before the tokens are prepared, another tokenizer.
    """
    teacher = cfg.recipe.teacher
    paths = {path: "recipe.teacher.models" for path in teacher.models if path != "self"}
    if teacher.reference is not None:
        paths[teacher.reference] = "recipe.teacher.reference"
    if not paths:
        return {}
    from sparse_pretrain.checkpoint import store
    from sparse_pretrain.tasks.teacher import find_teacher

    begun = bool(store.list_steps(run_dir / runs.CHECKPOINTS))
    known = runs.read_json(run_dir / runs.RUN_FILE).get("teachers", {}) if begun else {}
    found = {}
    for path, option in paths.items():
        there = find_teacher(known[path]["folder"] if path in known else path, option)
        if path in known and there.sha256 != known[path]["sha256"]:
            raise UserError(
                option, f"{there.folder}, which changed since this run began", "the same as then, or a new run_dir"
            )
        if there.max_seq_len is not None and there.max_seq_len < cfg.data.seq_len:
            raise UserError(
                "data.seq_len", f"{cfg.data.seq_len}, but {path} is made for {there.max_seq_len}", "at most that many"
            )
        found[path] = there
    tokenizer = Path(cfg.data.tokenizer)
    if cfg.data.tokenizer != "bpe" and tokenizer.is_file():
        check_teacher_tokenizer(found, tokenizer)
    return found


def check_teacher_tokenizer(teachers: dict[str, TeacherFolder], tokenizer: Path) -> None:
    """Raises UserError if a token id means another token to a teacher than in the tokenizer.json of this run."""
    content = tokenizer.read_bytes()
    for path, teacher in teachers.items():
        if not teacher.has_tokenizer(content):
            raise UserError(
                "data.tokenizer",
                f"another tokenizer than that of {path}, which this run learns from",
                f"data.tokenizer={teacher.tokenizer_path}, which is the teacher's",
            )


def check_teacher_logits(cfg: TrainConfig, teachers: dict[str, TeacherFolder], tokens: TokenStore) -> None:
    """Make `recipe.teacher.logits` the folder of this run's teachers, if it is set.

    Raises:
        UserError: it holds logits of something else, cannot be written, or has no room for what is needed.
    """
    teacher = cfg.recipe.teacher
    if teacher.logits is None:
        return
    from sparse_pretrain.hardware import pick_device, precision_dtype
    from sparse_pretrain.tasks import teacher_logits

    device = pick_device(cfg.trainer.accelerator, "trainer.accelerator")
    settings = {
        "teachers": sorted(teachers[path].sha256 for path in teacher.models),
        "corpus": tokens.digest,
        "vocab_size": tokens.vocab_size,
        "seq_len": cfg.data.seq_len,
        "temperature": teacher.temperature,
        "top_k": None if teacher.top_k is None or teacher.top_k >= tokens.vocab_size else teacher.top_k,
        "precision": str(precision_dtype(cfg.trainer.precision, device, "trainer.precision")).removeprefix("torch."),
    }
    corpus = (tokens.num_tokens("train") - 1) // cfg.data.seq_len
    teacher_logits.prepare(
        Path(teacher.logits), settings, sequences=min(corpus, cfg.trainer.steps * cfg.trainer.batch_size)
    )


def check_same_corpus(run_dir: Path, tokens: TokenStore) -> None:
    """Raises UserError if this run has checkpoints that were trained on other tokens: its text has changed since."""
    known = runs.read_json(run_dir / runs.RUN_FILE).get("corpus", {}).get("digest", tokens.digest)
    if known != tokens.digest:
        raise UserError(
            "data",
            f"text or a tokenizer that changed since the checkpoints in {run_dir} were made",
            "the same as then, or a new run_dir",
        )


def check_same_tokenizer(source: Path, tokens: TokenStore, option: str) -> None:
    """Raises UserError naming `option` if the token ids of the run in `source` mean something else than this run's."""
    if (source / runs.TOKENIZER_FILE).read_bytes() != tokens.tokenizer_path.read_bytes():
        raise UserError(
            option,
            "a checkpoint trained with another tokenizer",
            f"data.tokenizer={source / runs.TOKENIZER_FILE}, which is that checkpoint's",
        )


def check_vocabulary(cfg: TrainConfig, vocab_size: int) -> None:
    """Raises UserError if the model's embedding is too small for the tokenizer."""
    if cfg.model.vocab_size is not None and cfg.model.vocab_size < vocab_size:
        raise UserError("model.vocab_size", cfg.model.vocab_size, f"at least the tokenizer's {vocab_size}, or null")


def check_disk(cfg: TrainConfig, run_dir: Path, vocab_size: int) -> None:
    """Raises UserError if the checkpoints that this run keeps will not fit on the disk."""
    import torch

    from sparse_pretrain.tasks.causal_lm import build_model

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(cfg, vocab_size).parameters())
    # Weights and two moments in fp32, a mask byte, a teacher's weights; logits of masks at most for every weight. One
    # checkpoint more than are kept is there while it is written.
    size: float = 13 + 4 * ("self" in cfg.recipe.teacher.models)
    if cfg.recipe.projection == "learned":
        kept, group = parse_pattern(cfg.recipe.pattern) or (2, 4)
        size += 12 * math.comb(group, kept) / group
    needed = parameters * size * (cfg.trainer.checkpoints_kept + 1)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise UserError(
            "run_dir",
            f"{free / 1e6:,.1f} MB free on the disk of {run_dir}",
            f"at least {needed / 1e6:,.1f} MB: trainer.checkpoints_kept={cfg.trainer.checkpoints_kept}, and one more",
        )
