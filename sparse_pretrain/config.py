"""The structured config of every command: what each option is, of which type, and which values it may have.

Imports no torch, so that `--help` and config errors come in well under a second. YAML files under `conf/` pick
values; the dataclasses here say which options exist and of which type they are; `schema.load` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sparse_pretrain.config_data import DataConfig
from sparse_pretrain.config_models import ModelConfig
from sparse_pretrain.config_recipe import RecipeConfig


@dataclass
class OptimizerConfig:
    name: str = "adamw"
    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95  # muon


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
    devices: int = 1  # of each node
    nodes: int = 1
    timeout: int = 1800  # seconds that a rank waits for another one
    strategy: str = "ddp"
    tensor_parallel: int = 1  # devices that compute each FFN together; they get the same examples
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 16
    checkpoint_every: int = 200
    checkpoints_kept: int = 2
    async_checkpoints: bool = False
    checkpoint_mirror: str | None = None
    compile: bool = False
    deterministic: bool = False
    stop_after: int | None = None  # end after this step as a signal would: with a checkpoint, to be continued
    backend: str = "auto"  # what computes 2:4 products; auto = the fastest that is right, measured at the start
    peak_tflops: float | None = None  # per device, for MFU; null = known devices' figure, else measured
    guard: GuardConfig = field(default_factory=GuardConfig)

    @property
    def ranks(self) -> int:
        """Processes that train one model together."""
        return self.devices * self.nodes

    @property
    def data_ranks(self) -> int:
        """How many parts a batch is cut into."""
        return self.ranks // self.tensor_parallel


@dataclass
class LoggerConfig:
    """Metrics always go to RUN_DIR/metrics.csv; these are beside it."""

    tensorboard: bool = False
    wandb: bool = False
    wandb_mode: str = "offline"
    wandb_project: str = "sparse-pretrain"
    wandb_entity: str | None = None
    wandb_artifact: bool = False  # of a complete run: config, tokenizer and last checkpoint


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
    init_from: str | None = None  # whose weights to start from, at step 0: a folder, or a file of `consolidate`


@dataclass
class FinetuneConfig:
    """A training run that starts from a trained model, on data of a task of its own."""

    checkpoint: str  # a run, checkpoint or Hugging Face folder
    data: DataConfig
    recipe: RecipeConfig
    epochs: float | None = 3.0  # null = trainer.steps says how long
    warmup_share: float = 0.1  # of the steps, in place of scheduler.warmup_steps
    dropout: float | None = None  # null = the checkpoint's
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = 1
    name: str | None = None  # null = MODEL-DATA-RECIPE
    runs_dir: str = "runs"
    run_dir: str | None = None  # null = RUNS_DIR/NAME-HASH
    resume: str = "auto"


@dataclass
class CompareConfig(TrainConfig):
    """Training runs of several recipes and seeds: the options of each, and of their comparison."""

    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    out: str | None = None  # null = RUNS_DIR/compare-MODEL-HASH


@dataclass
class SweepConfig(TrainConfig):
    """Training runs that search options for the lowest validation loss."""

    hparams_search: dict = field(default_factory=dict)  # option -> {type, low, high, log, step} or {type, choices}
    trials: int = 20
    workers: int = 1  # trials at once in this process
    sampler: str = "tpe"
    pruner: str = "median"
    prune_after_trials: int = 5  # median: trials that have come as far
    prune_after_steps: int = 0
    max_failures: int = 5  # in a row; so many stop the sweep
    storage: str | None = None  # URL of a database; null = a file in the sweep's folder
    out: str | None = None  # folder; null = RUNS_DIR/sweep-MODEL-HASH
    wandb: str | None = None  # write the sweep to this file, for Weights & Biases to run, and do nothing else


@dataclass
class SweepReportConfig:
    """The table, the best options and the pictures of a sweep."""

    sweep: str  # its folder
    storage: str | None = None  # null = as the sweep has it
    out: str | None = None  # folder; null = that of the sweep


@dataclass
class SearchConfig:
    """Which decay factors are tried, and when their flip rate is read."""

    factors: list[float] = field(default_factory=lambda: [1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    sample_step: int | None = None  # null = the last refresh of the learning rate's warm-up, at least the second one
    refine: int = 3  # further factors at most, between two of these, if none of these will do


@dataclass
class DecaySearchConfig(TrainConfig):
    """A search for the decay factor of a training run."""

    search: SearchConfig = field(default_factory=SearchConfig)


@dataclass
class PlanConfig(TrainConfig):
    """What a training run needs of a cluster."""

    device: str = "H100"
    memory_gb: float | None = None  # of a device; null = its data sheet's
    overhead_gb: float = 2.0  # of it, for the driver, communication buffers and fragmentation
    bandwidth_gbs: float | None = None  # GB/s of a device within a node, in one direction; null = its data sheet's
    network_gbs: float | None = None  # GB/s of a device between nodes; null = its usual network's
    utilization: float = 0.4  # of the device's peak, that dense work reaches
    rates: str | None = None  # JSON of `sparse-pretrain bench`: what 2:4 products take
    price_per_hour: float | None = None  # of a device; null = no cost
    out: str | None = None  # a JSON file


@dataclass
class EvaluateConfig:
    """How good a checkpoint is at what it learned."""

    checkpoint: str  # a run folder (its newest checkpoint), a checkpoint folder or a Hugging Face folder
    weights: str = "auto"
    split: str = "validation"
    text: list[str] = field(default_factory=list)  # files, folders or globs to use in place of the run's corpus
    wikitext: bool = False  # they are WikiText's: undo its tokenization, and one text without marks of its end
    seq_len: int | None = None  # tokens read at once; null = as in training
    stride: int | None = None  # tokens by which windows move on; null = seq_len: they do not overlap
    beams: int = 4  # of the search for generated texts
    teacher: str | None = None  # a run, checkpoint or Hugging Face folder: how often it accepts this model's tokens
    batches: int | None = None  # null = the whole split
    batch_size: int = 16
    accelerator: str = "auto"
    precision: str = "auto"


@dataclass
class GenerateConfig:
    """Text from a checkpoint."""

    checkpoint: str  # a run folder (its newest checkpoint), a checkpoint folder or a Hugging Face folder
    prompt: str = "def "
    prompts: str | None = None  # a file with a prompt a line, in place of `prompt`
    max_new_tokens: int = 200
    temperature: float | None = None  # null = 0.8 to continue a text, 0 to make another one of it
    top_k: int | None = 50
    beams: int = 1
    length_penalty: float = 1.0  # beams: the power of a text's length that its log probability is divided by
    batch_size: int = 16
    weights: str = "auto"
    backend: str = "auto"  # what multiplies packed weights
    precision: str = "auto"
    seed: int = 1
    accelerator: str = "auto"


@dataclass
class PruneConfig:
    """One-shot pruning of a trained model."""

    checkpoint: str  # a run folder (its newest checkpoint), a checkpoint folder or a Hugging Face folder
    method: str = "sparsegpt"
    pattern: str = "2:4"  # N:M, or the share of the weights to prune
    include: list[str] | None = None  # layer name patterns; null = all linear layers and convolutions of the blocks
    exclude: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)  # calibration: files, folders or globs; empty = the run's own data
    samples: int = 128  # sequences, or examples, of calibration data
    seq_len: int | None = None  # null = the run's own, or 512
    rank_ratio: float = 0.25  # oats: the low-rank part's share of what is left
    iterations: int = 80  # oats
    svd: str = "exact"  # oats
    seed: int = 1  # of the choice of samples, and of a randomized svd
    out: str | None = None  # null = beside the checkpoint's folder, as NAME-METHOD-PATTERN
    batch_size: int = 8
    accelerator: str = "auto"


@dataclass
class InspectConfig:
    """What goes on inside checkpoints: attention sinks, outlier features, masks, spectra of what is pruned."""

    checkpoints: list[str] = field(default_factory=list)  # run, checkpoint or Hugging Face folders
    reference: str | None = None  # the same of the model before pruning; null = each one's own master weights
    text: list[str] = field(default_factory=list)  # files, folders or globs; empty = the first run's validation split
    sequences: int = 100
    seq_len: int = 64
    threshold: float = 0.3  # of the mean attention to a token, above which it is a sink
    batch_size: int = 16
    out: str = "inspect"  # folder
    accelerator: str = "auto"


@dataclass
class ExportConfig:
    """A trained model as a folder that other libraries load."""

    checkpoint: str  # a run folder (its newest checkpoint), a checkpoint folder, a Hugging Face folder or a .gguf file
    out: str  # a new folder
    format: str = "dense"
    adapters: str | None = None  # null = there are none
    dtype: str | None = None  # null = the checkpoint's


@dataclass
class ConsolidateConfig:
    """A checkpoint as one file."""

    checkpoint: str  # a run folder (its newest checkpoint) or a checkpoint folder
    out: str  # a new file, NAME.safetensors


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


@dataclass
class SpiralTrainingConfig:
    """How every network of the sparsest-model experiment is trained."""

    epochs: int = 8
    batch_size: int = 128
    lrs: list[float] = field(default_factory=lambda: [0.1, 0.05])
    schedules: list[str] = field(default_factory=lambda: ["cosine"])
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass
class SpiralSearchConfig:
    """The search for the sparsest network."""

    structure: list[int] = field(default_factory=list)  # hidden neurons to search within; empty = the smallest that do
    max_neurons: int = 8  # of a hidden layer, in the search for these
    width: int | None = None  # of the network whose fan-in scales initial weights; null = of each structure itself
    structure_draws: int = 64
    mask_draws: int = 8
    masks_per_count: int | None = None  # masks drawn for each number of weights; null = every mask there is
    max_weights: int | None = None  # of a mask; null = all of the structure
    finalists: int = 10
    finalist_draws: int = 16


@dataclass
class SpiralPruningConfig:
    """What the search is compared with."""

    methods: list[str] = field(
        default_factory=lambda: [
            *("magnitude", "snip", "synflow", "one_shot", "gmp", "imp", "rigl", "ste", "sr_ste", "transposable"),
        ]
    )
    widths: list[int] = field(default_factory=lambda: [4, 8, 16])
    targets: list[int] = field(default_factory=lambda: [16, 20, 24, 28, 32, 40, 50, 64])  # weights to keep
    patterns: list[str] = field(default_factory=lambda: ["2:4", "1:4"])
    draws: int = 8
    rounds: int = 5
    decay: float = 2e-4


@dataclass
class SparsestConfig:
    """The sparsest networks for the Cubist Spiral, and what pruning finds."""

    target: float = 0.95  # accuracy
    points: int = 50_000
    training: SpiralTrainingConfig = field(default_factory=SpiralTrainingConfig)
    search: SpiralSearchConfig = field(default_factory=SpiralSearchConfig)
    pruning: SpiralPruningConfig = field(default_factory=SpiralPruningConfig)
    seed: int = 1
    runs_dir: str = "runs"
    out: str | None = None  # null = RUNS_DIR/sparsest-HASH
    accelerator: str = "auto"
