"""GPT-2 of transformers: `Conv1D` layers, whose weights are (in, out), q, k and v in one of them."""

from __future__ import annotations

from typing import Any

from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.models.huggingface.architecture import CLASSIFIER, PRE_TRAINING, SPANS, Architecture
from sparse_pretrain.models.huggingface.config_file import ConfigFile, activation_name, check_option
from sparse_pretrain.models.huggingface.rules import Rule, embedding, linear, norm


def read_config(config: ConfigFile) -> GPTConfig:
    config.only("scale_attn_weights", True, default=True)
    config.only("scale_attn_by_inverse_layer_idx", False, default=False)
    config.only("add_cross_attention", False, default=False)
    d_model = config.get("n_embd", 768)
    return GPTConfig(
        name=config.folder.name,
        n_layer=config.get("n_layer", 12),
        n_head=config.get("n_head", 12),
        d_model=d_model,
        d_ff=config.get("n_inner", 4 * d_model),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=config.activation("activation_function", "gelu_new"),
        bias=True,
        dropout=config.get("resid_pdrop", 0.1),
        max_seq_len=config.get("n_positions", 1024),
        vocab_size=config.get("vocab_size", 50257),
        tied_embeddings=config.get("tie_word_embeddings", True),
    )


def write_config(cfg: GPTConfig) -> dict[str, Any]:
    check_option(cfg, "norm", ["layer_norm"], "GPT-2")
    check_option(cfg, "n_kv_head", [None, cfg.n_head], "GPT-2")
    return {
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_embd": cfg.d_model,
        "n_inner": cfg.ffn_width,
        "n_positions": cfg.max_seq_len,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": activation_name(cfg, "GPT-2"),
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": cfg.dropout,
        "tie_word_embeddings": cfg.tied_embeddings,
    }


def body(cfg: GPTConfig) -> list[Rule]:
    d = cfg.d_model
    found = [
        embedding("tok_embed", "transformer.wte"),
        embedding("pos_embed", "transformer.wpe"),
        *norm("norm", "transformer.ln_f", d),
    ]
    for i in range(cfg.n_layer):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        found += [
            *norm(f"{ours}.attn_norm", f"{theirs}.ln_1", d),
            *linear(f"{ours}.attn.qkv", f"{theirs}.attn.c_attn", 3 * d, conv1d=True),
            *linear(f"{ours}.attn.out", f"{theirs}.attn.c_proj", d, conv1d=True),
            *norm(f"{ours}.ffn_norm", f"{theirs}.ln_2", d),
            *linear(f"{ours}.ffn.up", f"{theirs}.mlp.c_fc", cfg.ffn_width, conv1d=True),
            *linear(f"{ours}.ffn.down", f"{theirs}.mlp.c_proj", d, conv1d=True),
        ]
    return found


def head(cfg: GPTConfig) -> list[Rule]:
    return [embedding("head", "transformer.wte" if cfg.tied_embeddings else "lm_head")]


GPT2 = Architecture(
    model_type="gpt2",
    prefix="transformer.",
    classes={
        PRE_TRAINING: "GPT2LMHeadModel",
        CLASSIFIER: "GPT2ForSequenceClassification",
        SPANS: "GPT2ForQuestionAnswering",
    },
    read_config=read_config,
    write_config=write_config,
    body=body,
    head=head,
    other_heads={CLASSIFIER: {"classifier": "score"}, SPANS: {"classifier": "qa_outputs"}},
    tied={"lm_head.weight": "transformer.wte.weight"},
    ignored=("*.attn.bias", "*.attn.masked_bias"),
    left_behind=("score.*", "qa_outputs.*"),
)
