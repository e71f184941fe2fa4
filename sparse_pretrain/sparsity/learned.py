"""Masks that are learned: a distribution over the patterns of each group (MaskLLM, Fang et al., NeurIPS 2024)."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from sparse_pretrain.config_recipe import LearnedConfig
from sparse_pretrain.sharding import Split, own, put, whole


class LearnedMask(nn.Module):
    """Per group of M weights one logit for each of the patterns that keep N of them.

    In training the mask is Σₖ softmaxₖ((κ·logitₖ + Gumbel) / τ)·patternₖ, differentiable in the logits; what is
    evaluated and deployed is the pattern with the largest logit. The noise is drawn once per optimizer step.

    Args:
        out_features, in_features: of the weight; in_features a multiple of `group`.
        kept, group: N and M.
        cfg: how logits start, and how κ and τ change over the sparse steps.
    """

    patterns: Tensor
    scale: Tensor
    temperature: Tensor
    noise: Tensor

    def __init__(self, out_features: int, in_features: int, kept: int, group: int, cfg: LearnedConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.kept = kept
        patterns = torch.zeros(len(list(combinations(range(group), kept))), group)
        for row, columns in zip(patterns, combinations(range(group), kept), strict=True):
            row[list(columns)] = 1.0
        # three dimensions: no matrix, so neither weight decay nor the FLOP count takes them for a layer's weight
        self.logits = nn.Parameter(torch.zeros(out_features, in_features // group, len(patterns)))
        self.register_buffer("patterns", patterns, persistent=False)
        self.register_buffer("scale", torch.tensor(cfg.scale[0]), persistent=False)
        self.register_buffer("temperature", torch.tensor(cfg.temperature[0]), persistent=False)
        self.register_buffer("noise", torch.zeros_like(self.logits), persistent=False)

    @torch.no_grad()
    def start(self, prior: Tensor, generator: torch.Generator) -> None:
        """Draw the logits from N(0, logit_std²) and favour patterns that agree with `prior` (out_features, in_features)
        boolean: logit += (overlap − N/2)·std(logit)·prior_strength, for 2:4 an overlap of 0, 1 or 2 less 1."""
        drawn = torch.empty(self.logits.shape).normal_(0.0, self.cfg.logit_std, generator=generator)
        drawn = drawn.to(prior.device)
        overlap = prior.reshape(*self.logits.shape[:2], -1).to(self.patterns.dtype) @ self.patterns.t()
        put(self.logits, drawn + (overlap - self.kept / 2) * (drawn.std() * self.cfg.prior_strength))

    def draw(self, progress: float, seed: int) -> None:
        """Gumbel noise of one optimizer step, and κ and τ at `progress` (0 … 1) through the sparse steps."""
        for value, (first, last) in ((self.scale, self.cfg.scale), (self.temperature, self.cfg.temperature)):
            value.fill_(first + (last - first) * progress)
        generator = torch.Generator(self.noise.device).manual_seed(seed)
        self.noise.exponential_(generator=generator).log_().neg_()

    def soft_mask(self, split: Split | None = None, logits: Tensor | None = None) -> Tensor:
        """The mask of this step, (out_features, in_features) float32 in [0, 1], differentiable in the logits (default:
        its own); with `split` the part of this rank."""
        logits = own(self.logits) if logits is None else logits
        noise = self.noise if split is None else split.part(self.noise)
        with torch.autocast(logits.device.type, enabled=False):
            share = ((self.scale * logits + noise) / self.temperature).softmax(dim=-1)
            return (share @ self.patterns).flatten(1)

    @torch.no_grad()
    def hard_mask(self) -> Tensor:
        """The likeliest pattern of each group: (out_features, in_features) boolean."""
        return self.patterns[whole(self.logits).argmax(dim=-1)].flatten(1).bool()
