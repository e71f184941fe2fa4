"""The optimizers of a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sparse_pretrain.config import OptimizerConfig
from sparse_pretrain.optim.adamw import AdamW, MaskedDecay, SecondMoment, parameter_groups
from sparse_pretrain.optim.muon import Muon

HEADS = ("head", "distillation_head", "classifier", "lm_head", "score", "fc")  # ours, transformers', torchvision's


def build_optimizers(
    model: nn.Module,
    cfg: OptimizerConfig,
    decay: MaskedDecay | None = None,
    second_moment: SecondMoment | None = None,
    own_lr: Mapping[nn.Parameter, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """`adamw`: one AdamW. `muon`: Muon for the weights of hidden layers, AdamW for all else.

    Each group has `peak_lr`; whoever owns the schedule sets `lr` to a share of it. Loading a state restores moments and
    steps but no options, so a run that goes on from another's checkpoint has its own.

    Args:
        decay: masked decay; every optimizer applies it to the masked weights it has.
        second_moment: what is watched or frozen, of AdamW alone.
        own_lr: see `parameter_groups`.
    """
    hidden = hidden_weights(model) if cfg.name == "muon" else set()
    groups = parameter_groups(model, cfg.weight_decay, cfg.lr, own_lr)
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        matrices = [{**group, "params": [p for p in group["params"] if p in hidden]} for group in groups]
        groups = [{**group, "params": [p for p in group["params"] if p not in hidden]} for group in groups]
        matrices, groups = ([group for group in some if group["params"]] for some in (matrices, groups))
        optimizers.append(Muon(matrices, cfg.lr, cfg.momentum, cfg.weight_decay, decay))
    beta1, beta2 = cfg.betas
    optimizers.append(AdamW(groups, cfg.lr, (beta1, beta2), cfg.eps, decay, second_moment))
    for optimizer in optimizers:
        _keep_options(optimizer)
    return optimizers


def hidden_weights(model: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers, dense or sparse, but of heads and those shared with an embedding."""
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {
        module.weight
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "weight") and name.rpartition(".")[2] not in HEADS
    }
    return weights - embeddings


def _keep_options(optimizer: torch.optim.Optimizer) -> None:
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]

    def restore(loaded: torch.optim.Optimizer) -> None:
        for group, options in zip(loaded.param_groups, own, strict=True):
            group.update(options)

    optimizer.register_load_state_dict_post_hook(restore)
