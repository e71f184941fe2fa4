"""A trained model from a checkpoint, ready to be evaluated or to generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_pretrain import runs
from sparse_pretrain.checkpoint import store
from sparse_pretrain.config import TrainConfig
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.tasks.causal_lm import CausalLM, build_model


@dataclass(frozen=True)
class Trained:
    """model: in evaluation mode, in the phase (dense or sparse) that the checkpoint's next step would train in."""

    checkpoint: Path
    step: int
    cfg: TrainConfig
    model: GPT
    tokenizer_path: Path


def load_trained(path: str, device: torch.device, option: str = "checkpoint") -> Trained:
    """The model of a checkpoint folder, or of a run folder's newest whole checkpoint.

    Raises:
        UserError: naming `option`: there is none, or it is damaged.
    """
    checkpoint = store.resolve(Path(path), option)
    run_dir = checkpoint.parent.parent
    cfg = runs.read_config(run_dir)
    state = store.load(checkpoint)
    module = CausalLM(cfg, vocab_size=len(state["state_dict"]["model.tok_embed.weight"]))
    module.load_state_dict(state["state_dict"])
    module.to(device).eval()
    module.sparse_training.load_state_dict(state["sparse_training"])
    module.sparse_training.prepare(state["steps_done"], refresh=False)
    return Trained(checkpoint, state["steps_done"], cfg, module.model, run_dir / runs.TOKENIZER_FILE)


def load_weights(module: CausalLM, path: str) -> None:
    """Give a run that starts the weights of another one's checkpoint: master weights, without masks, optimizer and
    adapters.

    Raises:
        UserError: there is no whole checkpoint at `path`.
    """
    state = store.load(store.resolve(Path(path), option="init_from"))["state_dict"]
    if any(".adapter." in name for name in state):
        print(f"  {path} has adapters, which stay behind: recipe.adapter.path brings them")
    with torch.device("meta"):
        plain = build_model(module.cfg, len(state["model.tok_embed.weight"])).state_dict()
    module.model.load_state_dict({name: state[f"model.{name}"] for name in plain}, strict=False)
