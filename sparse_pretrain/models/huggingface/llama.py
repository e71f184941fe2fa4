"""Llama of transformers: RMSNorm, rotary positions, a gated FFN, grouped queries."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.models.huggingface.architecture import CLASSIFIER, PRE_TRAINING, Architecture
from sparse_pretrain.models.huggingface.config_file import ConfigFile, check_option
from sparse_pretrain.models.huggingface.rules import Rule, embedding, linear

_GATES = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}


def read_config(config: ConfigFile) -> GPTConfig:
    d_model, n_head = config.get("hidden_size", 4096), config.get("num_attention_heads", 32)
    config.only("head_dim", d_model // n_head, None, default=None)
    # transformers 4 has rope_theta beside rope_scaling, 5 both in rope_parameters
    rope = config.get("rope_scaling", {}) or config.get("rope_parameters", {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise config.error("rope_type", kind, "default: positions that are not scaled")
    return GPTConfig(
        name=config.folder.name,
        n_layer=config.get("num_hidden_layers", 32),
        n_head=n_head,
        n_kv_head=config.get("num_key_value_heads", n_head),
        d_model=d_model,
        d_ff=config.get("intermediate_size", 11008),
        norm="rms_norm",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation={"silu": "swiglu", "gelu": "geglu"}[config.activation("hidden_act", "silu", ["silu", "gelu"])],
        bias=config.get("attention_bias", False) or config.get("mlp_bias", False),
        dropout=config.get("attention_dropout", 0.0),
        max_seq_len=config.get("max_position_embeddings", 2048),
        position="rotary",
        rope_theta=float(dataclasses.replace(config, values=config.values | rope).get("rope_theta", 10000.0)),
        vocab_size=config.get("vocab_size", 32000),
        tied_embeddings=config.get("tie_word_embeddings", False),
    )


def write_config(cfg: GPTConfig) -> dict[str, Any]:
    check_option(cfg, "norm", ["rms_norm"], "Llama")
    check_option(cfg, "activation", list(_GATES), "Llama")
    return {
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head or cfg.n_head,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.ffn_width,
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "hidden_act": _GATES[cfg.activation],
        "rope_theta": cfg.rope_theta,
        "attention_bias": cfg.bias,
        "mlp_bias": cfg.bias,
        "attention_dropout": cfg.dropout,
        "tie_word_embeddings": cfg.tied_embeddings,
    }


def body(cfg: GPTConfig) -> list[Rule]:
    d, width = cfg.d_model, cfg.ffn_width
    kv = d // cfg.n_head * (cfg.n_kv_head or cfg.n_head)
    found = [embedding("tok_embed", "model.embed_tokens"), embedding("norm", "model.norm")]
    for i in range(cfg.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        qkv = tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")
        layers = [
            *linear(f"{ours}.attn.qkv", qkv, (d, kv, kv)),
            *linear(f"{ours}.attn.out", f"{theirs}.self_attn.o_proj", d),
            *linear(f"{ours}.ffn.up", f"{theirs}.mlp.up_proj", width),
            *linear(f"{ours}.ffn.gate", f"{theirs}.mlp.gate_proj", width),
            *linear(f"{ours}.ffn.down", f"{theirs}.mlp.down_proj", d),
        ]
        found += [
            embedding(f"{ours}.attn_norm", f"{theirs}.input_layernorm"),
            embedding(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm"),
            *(rule for rule in layers if cfg.bias or not rule.ours.endswith(".bias")),
        ]
    return found


def head(cfg: GPTConfig) -> list[Rule]:
    return [embedding("head", "model.embed_tokens" if cfg.tied_embeddings else "lm_head")]


LLAMA = Architecture(
    model_type="llama",
    prefix="model.",
    classes={PRE_TRAINING: "LlamaForCausalLM", CLASSIFIER: "LlamaForSequenceClassification"},
    read_config=read_config,
    write_config=write_config,
    body=body,
    head=head,
    other_heads={CLASSIFIER: {"classifier": "score"}},
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=("*.rotary_emb.inv_freq",),
    left_behind=("score.*",),
)
