"""The architectures of transformers that our models can be, and be made of."""

from __future__ import annotations

from sparse_pretrain.config_models import GPTConfig, Seq2SeqConfig, TransformerConfig, ViTConfig
from sparse_pretrain.models.huggingface.architecture import Architecture
from sparse_pretrain.models.huggingface.bart import BART, MARIAN
from sparse_pretrain.models.huggingface.bert import BERT
from sparse_pretrain.models.huggingface.gpt2 import GPT2
from sparse_pretrain.models.huggingface.llama import LLAMA
from sparse_pretrain.models.huggingface.vit import DEIT, VIT

ARCHITECTURES = {architecture.model_type: architecture for architecture in (GPT2, LLAMA, BERT, VIT, DEIT, BART, MARIAN)}


def architecture_for(cfg: TransformerConfig) -> Architecture:
    """The only one that could hold a model with these options."""
    if isinstance(cfg, GPTConfig):
        return LLAMA if cfg.position == "rotary" else GPT2
    if isinstance(cfg, Seq2SeqConfig):
        return MARIAN if cfg.position == "sinusoidal" else BART
    if isinstance(cfg, ViTConfig):
        return DEIT if cfg.distillation_token else VIT
    return BERT
