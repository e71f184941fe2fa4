"""What is checked before a run starts beside the config itself: devices, checkpoints, teachers, tokens, the disk. What
is wrong is one sentence, and nothing has been lost."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_pretrain import runs
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.schema import flatten, to_dict

if TYPE_CHECKING:
    from sparse_pretrain.data.build import Store
    from sparse_pretrain.tasks.task import Sizes
    from sparse_pretrain.tasks.teacher import TeacherFolder

# Options that decide which parameters, buffers and optimizer state a checkpoint holds.
_STATE_OPTIONS = (
    "optimizer.name",
    *("recipe.projection", "recipe.pattern", "recipe.input_gradient", "recipe.include", "recipe.exclude"),
    *("recipe.adapter.kind", "recipe.adapter.rank", "recipe.adapter.rank_share", "recipe.adapter.group"),
    "recipe.adapter.train_groups",
)

# Options of a model that change none of its weights' shapes or meaning.
_FREE_MODEL_OPTIONS = (
    *("model.name", "model.activation_checkpointing", "model.dropout", "model.mask_share", "model.whole_words"),
)


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
    from sparse_pretrain.tasks.build import build_model

    with torch.device("meta"):
        select_layers(build_model(cfg, _some_sizes()), cfg.recipe)


def _some_sizes() -> Sizes:
    """For a model whose layers are asked for before its data are prepared."""
    from sparse_pretrain.tasks.task import Sizes

    return Sizes(vocab_size=64, num_classes=2)


def check_start(cfg: TrainConfig) -> Path | None:
    """The checkpoint, or the Hugging Face folder, that `resume` or `init_from` names, if any: verified, once for all
    ranks.

    Raises:
        UserError: as `check_resume` and `check_init`.
    """
    if cfg.init_from is not None:
        return check_init(cfg)
    return None if cfg.resume in ("auto", "never") else check_resume(cfg)


def check_resume(cfg: TrainConfig) -> Path:
    """The checkpoint that `resume` names.

    Raises:
        UserError: it is missing, damaged, or of another model.
    """
    from sparse_pretrain.checkpoint import store
    from sparse_pretrain.tasks.trained import config_of

    checkpoint = store.resolve(Path(cfg.resume), option="resume", one_file=True)
    source = config_of(checkpoint)
    _check_same_model(cfg, to_dict(source), "resume", _STATE_OPTIONS)
    if source.recipe.frozen_preconditioner and not cfg.recipe.frozen_preconditioner:
        raise UserError(
            "recipe.frozen_preconditioner", "false, for a checkpoint whose second moment may be frozen", ["true"]
        )
    if store.step_of(checkpoint) >= cfg.trainer.steps:
        raise UserError(
            "trainer.steps",
            f"{cfg.trainer.steps}, but resume names a checkpoint of step {store.step_of(checkpoint)}",
            "more",
        )
    return checkpoint


def check_init(cfg: TrainConfig) -> Path:
    """The checkpoint that `init_from` names, or the Hugging Face folder.

    Raises:
        UserError: it is missing, damaged, or of another model.
    """
    from sparse_pretrain.checkpoint import store
    from sparse_pretrain.models import huggingface
    from sparse_pretrain.tasks.trained import config_of

    assert cfg.init_from is not None
    source = Path(cfg.init_from).expanduser()
    if huggingface.is_hugging_face(source):
        _check_same_model(cfg, {"model": to_dict(huggingface.options(source, "init_from"))}, "init_from")
        return source
    checkpoint = store.resolve(source, option="init_from", one_file=True)
    _check_same_model(cfg, to_dict(config_of(checkpoint)), "init_from")
    return checkpoint


def _check_same_model(cfg: TrainConfig, source: dict[str, Any], option: str, options: tuple[str, ...] = ()) -> None:
    """Raises UserError naming `option` if a config `source` has another model, or others of `options`."""
    there = flatten(source)
    here = flatten(to_dict(cfg))
    for name in here:
        shapes = name.startswith("model.") and name not in _FREE_MODEL_OPTIONS
        if (shapes or name in options) and there.get(name) != here[name]:
            raise UserError(
                option,
                f"a checkpoint of another model: {name}={there.get(name)} there, {here[name]} here",
                "a checkpoint of the same model" + (", sparse layers and optimizer" if options else ""),
            )


def check_adapter(cfg: TrainConfig) -> None:
    """Raises UserError if the file that `recipe.adapter.path` names does not hold adapters for this run's layers."""
    import torch

    from sparse_pretrain.sparsity.adapter_files import read_adapters
    from sparse_pretrain.sparsity.adapters import attach, make_adapter
    from sparse_pretrain.sparsity.swap import select_layers
    from sparse_pretrain.tasks.build import build_model

    if cfg.recipe.adapter.path is None:
        return
    with torch.device("meta"):
        model = build_model(cfg, _some_sizes())
        for row in select_layers(model, cfg.recipe):
            if row.adapted:
                adapter = make_adapter(cfg.recipe.adapter, row.in_features, row.out_features)
                attach(model.get_submodule(row.name), adapter)
    read_adapters(model, cfg.recipe.adapter.path)


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
    known = runs.read_facts(run_dir).get("teachers", {}) if begun else {}
    found = {}
    for path, option in paths.items():
        there = find_teacher(known[path]["folder"] if path in known else path, option)
        if path in known and there.sha256 != known[path]["sha256"]:
            raise UserError(
                option, f"{there.folder}, which changed since this run began", "the same as then, or a new run_dir"
            )
        seq_len = getattr(cfg.data, "seq_len", None)
        if seq_len is not None and there.max_seq_len is not None and there.max_seq_len < seq_len:
            raise UserError(
                "data.seq_len", f"{seq_len}, but {path} is made for {there.max_seq_len}", "at most that many"
            )
        found[path] = there
    tokenizer = getattr(cfg.data, "tokenizer", None)
    if tokenizer is not None and tokenizer.endswith(".json") and Path(tokenizer).is_file():
        check_teacher_tokenizer(found, Path(tokenizer))
    return found


def check_teacher_tokenizer(teachers: dict[str, TeacherFolder], tokenizer: Path | None) -> None:
    """Raises UserError if a token id means another token to a teacher than in the tokenizer.json of this run."""
    if tokenizer is None:
        return
    content = tokenizer.read_bytes()
    for path, teacher in teachers.items():
        if not teacher.has_tokenizer(content):
            raise UserError(
                "data.tokenizer",
                f"another tokenizer than that of {path}, which this run learns from",
                f"data.tokenizer={teacher.tokenizer_path}, which is the teacher's",
            )


def check_teacher_logits(cfg: TrainConfig, teachers: dict[str, TeacherFolder], tokens: Store) -> None:
    """Make `recipe.teacher.logits` the folder of this run's teachers, if it is set.

    Raises:
        UserError: it holds logits of something else, cannot be written, or has no room for what is needed.
    """
    teacher = cfg.recipe.teacher
    if teacher.logits is None:
        return
    from sparse_pretrain.data.token_store import TokenStore
    from sparse_pretrain.hardware import pick_device, precision_dtype
    from sparse_pretrain.tasks import teacher_logits

    assert isinstance(tokens, TokenStore)  # crosscheck: logits are kept of language models alone
    device = pick_device(cfg.trainer.accelerator, "trainer.accelerator")
    settings = {
        "teachers": sorted(teachers[path].sha256 for path in teacher.models),
        "corpus": tokens.digest,
        "vocab_size": tokens.vocab_size,
        "seq_len": cfg.data.tokens_per_example,
        "temperature": teacher.temperature,
        "top_k": None if teacher.top_k is None or teacher.top_k >= tokens.vocab_size else teacher.top_k,
        "precision": str(precision_dtype(cfg.trainer.precision, device, "trainer.precision")).removeprefix("torch."),
    }
    corpus = (tokens.num_tokens("train") - 1) // cfg.data.tokens_per_example
    teacher_logits.prepare(
        Path(teacher.logits), settings, sequences=min(corpus, cfg.trainer.steps * cfg.trainer.batch_size)
    )


def check_same_corpus(run_dir: Path, tokens: Store) -> None:
    """Raises UserError if this run has checkpoints that were trained on other tokens: its text has changed since."""
    known = runs.read_facts(run_dir).get("corpus", {}).get("digest", tokens.digest)
    if known != tokens.digest:
        raise UserError(
            "data",
            f"text or a tokenizer that changed since the checkpoints in {run_dir} were made",
            "the same as then, or a new run_dir",
        )


def check_same_tokenizer(source: Path, tokens: Store, option: str) -> None:
    """Raises UserError naming `option` if the token ids of `source`, a checkpoint or a Hugging Face folder, mean
    something else than this run's."""
    from sparse_pretrain.tasks.trained import tokenizer_of

    path, known = tokenizer_of(source)
    if tokens.tokenizer_path is None or known is None:
        return
    if known != hashlib.sha256(tokens.tokenizer_path.read_bytes()).hexdigest():
        raise UserError(
            option,
            "a checkpoint trained with another tokenizer",
            f"data.tokenizer={path}, which is that checkpoint's",
        )


def check_vocabulary(cfg: TrainConfig, vocab_size: int) -> None:
    """Raises UserError if the model's embedding is too small for the tokenizer."""
    rows = getattr(cfg.model, "vocab_size", None)
    if rows is not None and rows < vocab_size:
        raise UserError("model.vocab_size", rows, f"at least the tokenizer's {vocab_size}, or null")


def check_disk(cfg: TrainConfig, run_dir: Path, sizes: Sizes) -> None:
    """Raises UserError if the checkpoints that this run keeps will not fit on the disk."""
    import torch

    from sparse_pretrain.tasks.build import build_model

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(cfg, sizes).parameters())
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
