"""The structured config of every command: what each option is, of which type, and which values it may have.

Imports no torch, so that `--help` and config errors come in well under a second. YAML files under `conf/` pick
values; the dataclasses here say which options exist and of which type they are. `load` turns a composed config
into these dataclasses, with one clear sentence for whatever does not fit.
"""

from __future__ import annotations

import dataclasses
import math
import types
from dataclasses import dataclass, field
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sparse_pretrain.errors import UserError


@dataclass
class ModelConfig:
    """A decoder-only transformer: GPT-2 and Llama are two settings of the same options."""

    name: str
    n_layer: int
    n_head: int
    d_model: int
    family: str = "gpt"
    n_kv_head: int | None = None  # fewer than n_head: grouped-query attention; null = n_head
    d_ff: int | None = None  # null = 4 d_model, or 8/3 d_model for gated activations, rounded up to 64
    vocab_size: int | None = None  # null = the tokenizer's, rounded up to 64
    max_seq_len: int = 1024
    norm: str = "layer_norm"
    position: str = "learned"
    activation: str = "gelu"
    bias: bool = False
    tied_embeddings: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    activation_checkpointing: bool = False


@dataclass
class DataConfig:
    """A corpus, its tokenizer, and how sequences are cut from it."""

    name: str
    source: str
    train: list[str] = field(default_factory=list)  # text: files, folders or globs
    validation: list[str] = field(default_factory=list)  # text: the same; empty = held out from train
    validation_share: float = 0.05  # of the documents, where there is no validation split
    hf_path: str | None = None
    hf_config: str | None = None
    hf_train_split: str = "train"
    hf_validation_split: str | None = None  # null = held out from train
    hf_text_column: str = "text"
    hf_streaming: bool = False
    max_documents: int | None = None
    tokenizer: str = "bpe"  # train a byte-level BPE on the corpus, or the path of a tokenizer.json
    vocab_size: int = 32768  # of the BPE to train
    seq_len: int = 1024
    num_workers: int = 2  # processes that load batches


@dataclass
class DecayConfig:
    """Masked decay: what pulls pruned weights towards zero."""

    place: str = "none"
    factor: float = 0.0


@dataclass
class ScheduleConfig:
    """When a run is dense and when it is sparse, as shares of its steps; how often masks are recomputed."""

    dense_warmup: float = 0.0
    dense_finetune: float = 0.0
    refresh_every: int = 1


@dataclass
class RecipeConfig:
    """One published 2:4 training method, as a choice for each part."""

    name: str
    projection: str = "none"
    weight_gradient: str = "dense"
    decay: DecayConfig = field(default_factory=DecayConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    fp8: bool = False  # products of e4m3 (forward) and e5m2 (gradients) values, one scale a tensor; weights stay fp32
    include: list[str] | None = None  # layer name patterns; null = the FFN of every block
    exclude: list[str] = field(default_factory=list)


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass
class SchedulerConfig:
    """The learning rate over the run, as shares of the peak `optimizer.lr` and of the steps."""

    name: str = "cosine"
    warmup_steps: int = 100
    final_lr_share: float = 0.1
    decay_share: float = 0.2  # wsd: the share of the run, at its end, in which the rate falls


@dataclass
class GuardConfig:
    """What to do about a step that went wrong: `skip` drops and counts it, `stop` ends the run, `off` lets it be."""

    nonfinite: str = "skip"
    loss_spike: str = "off"
    loss_spike_factor: float = 2.0  # over the moving average of the loss
    gradient_spike: str = "off"
    gradient_spike_factor: float = 10.0  # over the moving average of the gradient norm
    max_skipped: int = 100  # in a row; more of them stop the run


@dataclass
class TrainerConfig:
    steps: int = 1000
    batch_size: int = 32  # sequences per optimizer step, over all devices
    micro_batch_size: int | None = None  # sequences per device and forward pass; null = no accumulation
    precision: str = "auto"
    grad_clip: float | None = 1.0
    accelerator: str = "auto"
    devices: int = 1
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 16
    checkpoint_every: int = 200
    checkpoints_kept: int = 2
    compile: bool = False
    deterministic: bool = False
    backend: str = "auto"  # what computes 2:4 products; auto = the fastest that is right, measured at the start
    peak_tflops: float | None = None  # per device, for MFU; null = known devices' figure, else measured
    guard: GuardConfig = field(default_factory=GuardConfig)


@dataclass
class LoggerConfig:
    """Metrics always go to RUN_DIR/metrics.csv; these are beside it."""

    tensorboard: bool = False
    wandb: bool = False
    wandb_mode: str = "offline"
    wandb_project: str = "sparse-pretrain"
    wandb_entity: str | None = None


@dataclass
class TrainConfig:
    """A whole training run."""

    model: ModelConfig
    data: DataConfig
    recipe: RecipeConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 1
    name: str | None = None  # null = MODEL-RECIPE
    runs_dir: str = "runs"
    run_dir: str | None = None  # null = RUNS_DIR/NAME-HASH
    resume: str = "auto"


@dataclass
class EvaluateConfig:
    """Loss and perplexity of a checkpoint."""

    checkpoint: str  # a run folder (its newest checkpoint) or a checkpoint folder
    weights: str = "auto"
    split: str = "validation"
    text: list[str] = field(default_factory=list)  # files, folders or globs to use in place of the run's corpus
    batches: int | None = None  # null = the whole split
    batch_size: int = 16
    accelerator: str = "auto"
    precision: str = "auto"


@dataclass
class GenerateConfig:
    """Text from a checkpoint."""

    checkpoint: str
    prompt: str = "def "
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    seed: int = 1
    accelerator: str = "auto"


@dataclass
class ReportConfig:
    """The report page of one or more runs."""

    runs: list[str] = field(default_factory=list)  # run folders; empty = every run in runs_dir
    runs_dir: str = "runs"
    out: str | None = None  # null = report.html in the run folder (one run) or in runs_dir (several)


@dataclass
class DoctorConfig:
    """What this machine can do."""

    runs_dir: str = "runs"


@dataclass
class BenchConfig:
    """How fast 2:4 operators, layers and training steps are here."""

    part: list[str] = field(default_factory=list)  # empty = all but pretrain
    minutes: float = 10.0
    out: str = "benchmarks/results"
    accelerator: str = "auto"


CHOICES: dict[str, list[str]] = {
    "part": ["ceilings", "products", "operators", "ffn", "step", "block", "pretrain"],
    "weights": ["auto", "dense", "sparse", "packed"],
    "split": ["train", "validation"],
    "accelerator": ["auto", "cpu", "gpu"],
    "precision": ["auto", "fp32", "bf16", "fp16"],
    "model.family": ["gpt"],
    "model.norm": ["layer_norm", "rms_norm"],
    "model.position": ["learned", "rotary"],
    "model.activation": ["gelu", "relu2", "geglu", "swiglu"],
    "data.source": ["stdlib", "text", "huggingface"],
    "recipe.projection": ["none", "magnitude", "transposable", "soft_threshold"],
    "recipe.weight_gradient": ["dense", "mvue"],
    "recipe.decay.place": ["none", "gradient", "momentum", "weight"],
    "optimizer.name": ["adamw"],
    "scheduler.name": ["constant", "cosine", "wsd"],
    "trainer.precision": ["auto", "fp32", "bf16", "fp16"],
    "trainer.accelerator": ["auto", "cpu", "gpu"],
    "trainer.backend": ["auto", "dense", "cusparselt", "cutlass", "gluon", "triton"],
    "trainer.guard.nonfinite": ["skip", "stop"],
    "trainer.guard.loss_spike": ["off", "skip", "stop"],
    "trainer.guard.gradient_spike": ["off", "skip", "stop"],
    "logger.wandb_mode": ["offline", "online"],
}

# option -> (lowest, highest) it may be, both included; None = unbounded
RANGES: dict[str, tuple[float | None, float | None]] = {
    "model.n_layer": (1, None),
    "model.n_head": (1, None),
    "model.n_kv_head": (1, None),
    "model.d_model": (4, None),
    "model.d_ff": (4, None),
    "model.vocab_size": (1, None),
    "model.max_seq_len": (1, None),
    "model.dropout": (0, 0.9),
    "model.norm_eps": (0, 1),
    "model.rope_theta": (1, None),
    "data.validation_share": (1e-6, 0.49),
    "data.max_documents": (1, None),
    "data.vocab_size": (257, 1_000_000),
    "data.seq_len": (1, None),
    "data.num_workers": (0, None),
    "recipe.decay.factor": (0, None),
    "recipe.schedule.dense_warmup": (0, 1),
    "recipe.schedule.dense_finetune": (0, 1),
    "recipe.schedule.refresh_every": (1, None),
    "optimizer.lr": (0, None),
    "optimizer.eps": (0, None),
    "optimizer.weight_decay": (0, None),
    "scheduler.warmup_steps": (0, None),
    "scheduler.final_lr_share": (0, 1),
    "scheduler.decay_share": (0, 1),
    "trainer.steps": (1, None),
    "trainer.batch_size": (1, None),
    "trainer.micro_batch_size": (1, None),
    "trainer.grad_clip": (1e-12, None),
    "trainer.devices": (1, None),
    "trainer.log_every": (1, None),
    "trainer.eval_every": (1, None),
    "trainer.eval_batches": (1, None),
    "trainer.checkpoint_every": (1, None),
    "trainer.checkpoints_kept": (1, None),
    "trainer.peak_tflops": (1e-9, None),
    "trainer.guard.loss_spike_factor": (1, None),
    "trainer.guard.gradient_spike_factor": (1, None),
    "trainer.guard.max_skipped": (1, None),
    "seed": (0, 2**63 - 1),
    "batches": (1, None),
    "batch_size": (1, None),
    "max_new_tokens": (1, None),
    "temperature": (0, None),
    "top_k": (1, None),
    "minutes": (0.1, None),
}

C = TypeVar("C")


def load(schema: type[C], values: dict[str, Any]) -> C:
    """Build `schema` from a composed config, checking names, types, choices and ranges.

    Raises:
        UserError: naming the option, what was found and what is allowed.
    """
    return _build(schema, values, prefix="")


def _build(schema: type[C], values: dict[str, Any], prefix: str) -> C:
    hints = get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"{prefix}{key}", "no such option", sorted(f"{prefix}{name}" for name in fields))
    built: dict[str, Any] = {}
    for name, f in fields.items():
        option = f"{prefix}{name}"
        if name in values:
            built[name] = _convert(hints[name], values[name], option)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(option, "nothing", "a value; this option has no default")
    return schema(**built)


def _convert(hint: Any, value: Any, option: str) -> Any:
    """`value` as the annotated type, or a UserError. An int is accepted where a float is asked for, nothing else."""
    if value == "???":
        raise UserError(option, "nothing", "a value; this option has no default")
    if get_origin(hint) in (Union, types.UnionType):
        inner = next(arg for arg in get_args(hint) if arg is not type(None))
        return None if value is None else _convert(inner, value, option)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(
                option, repr(value), f"a group of options ({', '.join(f.name for f in dataclasses.fields(hint))})"
            )
        return _build(hint, value, prefix=f"{option}.")  # type: ignore[arg-type]
    if get_origin(hint) is list:
        (inner,) = get_args(hint)
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            raise UserError(option, repr(value), "a list, as [a,b]")
        return [_convert(inner, item, option) for item in value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # prompt=12 is a text that YAML takes for a number
    if type(value) is not hint:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise UserError(option, repr(value), words[hint])
    if hint is float and not math.isfinite(value):
        raise UserError(option, value, "a number that is finite")
    if option in CHOICES and value not in CHOICES[option]:
        raise UserError(option, value, CHOICES[option])
    if option in RANGES:
        low, high = RANGES[option]
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = " and ".join(
                text
                for text in (
                    f"at least {low}" if low is not None else "",
                    f"at most {high}" if high is not None else "",
                )
                if text
            )
            raise UserError(option, f"{value:g}" if hint is float else value, bounds)
    return value


def options(schema: Any, prefix: str = "") -> list[str]:
    """The names of all options of a schema, as `model.d_model`."""
    names: list[str] = []
    for name, hint in get_type_hints(schema).items():
        names += options(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [f"{prefix}{name}"]
    return names


def to_dict(cfg: Any) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return dataclasses.asdict(cfg)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"d_model": 64}} -> {"model.d_model": 64}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
