"""`sparse-pretrain generate`: text from a checkpoint."""

from __future__ import annotations

import torch

from sparse_pretrain.config import GenerateConfig
from sparse_pretrain.data.tokenizer import end_of_text_id, load_tokenizer
from sparse_pretrain.hardware import pick_device
from sparse_pretrain.tasks.trained import load_trained


def run(cfg: GenerateConfig) -> None:
    """Prints the prompt and its continuation, up to the end of the text or `max_new_tokens`.

    Raises:
        UserError: no such checkpoint.
    """
    device = pick_device(cfg.accelerator, "accelerator")
    trained = load_trained(cfg.checkpoint, device)
    tokenizer = load_tokenizer(trained.tokenizer_path.read_bytes(), str(trained.tokenizer_path))
    end = end_of_text_id(tokenizer)
    # A document begins after the end of the one before it: that is the context an empty prompt gets.
    prompt = [end, *tokenizer.encode(cfg.prompt, add_special_tokens=False).ids]
    generator = torch.Generator(device).manual_seed(cfg.seed)
    tokens = trained.model.generate(
        torch.tensor([prompt], device=device), cfg.max_new_tokens, cfg.temperature, cfg.top_k, generator, stop_token=end
    )
    print(tokenizer.decode([token for token in tokens[0].tolist() if token != end]))
