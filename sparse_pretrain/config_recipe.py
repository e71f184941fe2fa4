"""The options of recipes: how weights become sparse, and when. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DecayConfig:
    """Masked decay: what pulls pruned weights towards zero."""

    place: str = "none"
    factor: float | Literal["auto"] = 0.0  # auto = found at the start, by the flip rate
    ramp: float = 0.0  # share of the sparse steps over which the factor rises from 0


@dataclass
class ScheduleConfig:
    """When a run is dense and when it is sparse, as shares of its steps; how often masks are recomputed."""

    dense_warmup: float = 0.0
    dense_warmup_max: float | None = None  # null = no choice; else the second moment decides, from dense_warmup to here
    switch_mean: str = "arithmetic"
    dense_finetune: float = 0.0
    refresh_every: int = 1
    track_dense: bool = False  # recompute masks in dense phases too, for their flip rate alone


@dataclass
class LearnedConfig:
    """Masks drawn from trained logits (MaskLLM). Pairs are the values at the first and at the last sparse step."""

    temperature: list[float] = field(default_factory=lambda: [4.0, 0.05])
    scale: list[float] = field(default_factory=lambda: [100.0, 500.0])
    prior_strength: float = 3.0
    logit_std: float = 0.01
    logit_lr: float = 5e-4
    norm_weight: float = 1e-5


@dataclass
class AdapterConfig:
    """What is added beside the weight of a layer."""

    kind: str = "none"
    rank: int = 8  # lora
    rank_share: float | None = None  # lora: in place of rank: the share of a layer's weights that its adapter may have
    alpha: float = 16.0  # lora: the adapter's output is scaled by alpha / rank
    init: str | None = None  # null = lora: kaiming, else normal; slorb: mean, else sum
    group: int = 16  # slorb: inputs that share one weight
    train_groups: bool = True  # slorb: whether the sums over groups become weighted ones
    start: float = 0.0  # share of the run before it appears
    path: str | None = None  # safetensors file of adapters to start from


@dataclass
class TeacherConfig:
    """Whom a run also learns from. Losses: (1 - weight) · task + weight · temperature² · KL(teacher ‖ student)."""

    models: list[str] = field(default_factory=list)
    weight: float = 0.67
    temperature: float = 2.0
    logits: str | None = None  # folder where the teacher's logits are kept for other runs
    top_k: int | None = 64  # of them, per token; null = all
    reference: str | None = None  # AdaSPEC: a draft model distilled before
    token_share: float = 1.0  # AdaSPEC: of the tokens, those furthest behind the reference


@dataclass
class RecipeConfig:
    """One published 2:4 training method, as a choice for each part."""

    name: str
    projection: str = "none"
    pattern: str = "2:4"
    input_gradient: str = "same"
    weight_gradient: str = "dense"
    train_weights: bool = True  # false = once there are adapters or mask logits to train, they alone are
    frozen_preconditioner: bool = False  # STEP: when sparse Adam divides by the second moment it ended dense with
    fp8: bool = False  # products of e4m3 (forward) and e5m2 (gradients) values, one scale a tensor; weights stay fp32
    decay: DecayConfig = field(default_factory=DecayConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    learned: LearnedConfig = field(default_factory=LearnedConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    include: list[str] | None = None  # layer name patterns; null = the FFN of every block
    exclude: list[str] = field(default_factory=list)

    @property
    def input_is_sparse(self) -> bool:
        """Whether the weight in dX = dY W is 2:4 along out_features."""
        return self.input_gradient == "double_pruned" or (
            self.projection == "transposable" and self.input_gradient == "same"
        )
