"""BART and Marian of transformers: encoder-decoders with norms after what they add to and one embedding."""

from __future__ import annotations

from typing import Any

from sparse_pretrain.config_models import Seq2SeqConfig
from sparse_pretrain.models.huggingface.architecture import PRE_TRAINING, Architecture
from sparse_pretrain.models.huggingface.config_file import ConfigFile, activation_name, check_option
from sparse_pretrain.models.huggingface.rules import Rule, embedding, linear, norm

NORM_EPS = 1e-5  # PyTorch's; neither has an option for it
POSITION_OFFSET = 2  # BART's table of positions begins with so many rows that no token has


def read_config(config: ConfigFile) -> Seq2SeqConfig:
    marian = config.values["model_type"] == "marian"
    vocab_size = config.get("vocab_size", 58101 if marian else 50265)
    n_head, d_ff = config.get("encoder_attention_heads", 16), config.get("encoder_ffn_dim", 4096)
    config.only("decoder_attention_heads", n_head, default=16)
    config.only("decoder_ffn_dim", d_ff, default=4096)
    config.only("tie_word_embeddings", True, default=True)
    if marian:
        config.only("share_encoder_decoder_embeddings", True, default=True)
        config.only("decoder_vocab_size", vocab_size, None, default=None)
    return Seq2SeqConfig(
        name=config.folder.name,
        n_layer=config.get("encoder_layers", 12),
        n_decoder_layer=config.get("decoder_layers", 12),
        n_head=n_head,
        d_model=config.get("d_model", 1024),
        d_ff=d_ff,
        norm_eps=NORM_EPS,
        activation=config.activation("activation_function", "gelu"),
        dropout=config.get("dropout", 0.1),
        max_seq_len=config.get("max_position_embeddings", 1024),
        position="sinusoidal" if marian else "learned",
        embedding_norm=not marian,
        scale_embedding=config.get("scale_embedding", False),
        vocab_size=vocab_size,
    )


def write_config(cfg: Seq2SeqConfig) -> dict[str, Any]:
    marian = cfg.position == "sinusoidal"
    name = "Marian" if marian else "BART"
    check_option(cfg, "norm", ["layer_norm"], name)
    check_option(cfg, "norm_place", ["post"], name)
    check_option(cfg, "norm_eps", [NORM_EPS], name)
    check_option(cfg, "embedding_norm", [not marian], name)
    config = {
        "encoder_layers": cfg.n_layer,
        "decoder_layers": cfg.n_decoder_layer or cfg.n_layer,
        "encoder_attention_heads": cfg.n_head,
        "decoder_attention_heads": cfg.n_head,
        "d_model": cfg.d_model,
        "encoder_ffn_dim": cfg.ffn_width,
        "decoder_ffn_dim": cfg.ffn_width,
        "activation_function": activation_name(cfg, name),
        "dropout": cfg.dropout,
        "attention_dropout": cfg.dropout,
        "activation_dropout": 0.0,
        "max_position_embeddings": cfg.max_seq_len,
        "scale_embedding": cfg.scale_embedding,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }
    if marian:
        config |= {"share_encoder_decoder_embeddings": True, "decoder_vocab_size": cfg.vocab_size}
    return config


def body(cfg: Seq2SeqConfig) -> list[Rule]:
    d, width = cfg.d_model, cfg.ffn_width
    found = [embedding("tok_embed", "model.shared")]
    for stack, layers in (("encoder", cfg.n_layer), ("decoder", cfg.n_decoder_layer or cfg.n_layer)):
        if cfg.position == "learned":
            theirs = f"model.{stack}.embed_positions.weight"
            found.append(Rule(f"{stack}.pos_embed.weight", (theirs,), skipped=POSITION_OFFSET))
        if cfg.embedding_norm:
            found += norm(f"{stack}.embed_norm", f"model.{stack}.layernorm_embedding", d)
        for i in range(layers):
            ours, theirs = f"{stack}.blocks.{i}", f"model.{stack}.layers.{i}"
            qkv = tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")
            found += [
                *linear(f"{ours}.attn.qkv", qkv, (d, d, d)),
                *linear(f"{ours}.attn.out", f"{theirs}.self_attn.out_proj", d),
                *norm(f"{ours}.attn_norm", f"{theirs}.self_attn_layer_norm", d),
                *linear(f"{ours}.ffn.up", f"{theirs}.fc1", width),
                *linear(f"{ours}.ffn.down", f"{theirs}.fc2", d),
                *norm(f"{ours}.ffn_norm", f"{theirs}.final_layer_norm", d),
            ]
            if stack == "decoder":
                kv = tuple(f"{theirs}.encoder_attn.{part}_proj" for part in "kv")
                found += [
                    *linear(f"{ours}.cross_attn.q", f"{theirs}.encoder_attn.q_proj", d),
                    *linear(f"{ours}.cross_attn.kv", kv, (d, d)),
                    *linear(f"{ours}.cross_attn.out", f"{theirs}.encoder_attn.out_proj", d),
                    *norm(f"{ours}.cross_norm", f"{theirs}.encoder_attn_layer_norm", d),
                ]
    return found


def head(cfg: Seq2SeqConfig) -> list[Rule]:
    assert cfg.vocab_size is not None
    return [
        embedding("head", "model.shared"),
        Rule("head.bias", ("final_logits_bias",), (cfg.vocab_size,), batched=True),
    ]


_TIED = dict.fromkeys(
    ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"), "model.shared.weight"
)

BART = Architecture(
    model_type="bart",
    prefix="model.",
    classes={PRE_TRAINING: "BartForConditionalGeneration"},
    read_config=read_config,
    write_config=write_config,
    body=body,
    head=head,
    other_heads={},
    tied=_TIED,
    ignored=("*coder.version",),
    left_behind=("classification_head.*", "qa_outputs.*"),
)
MARIAN = Architecture(
    model_type="marian",
    prefix="model.",
    classes={PRE_TRAINING: "MarianMTModel"},
    read_config=read_config,
    write_config=write_config,
    body=body,
    head=head,
    other_heads={},
    tied=_TIED,
    ignored=("model.*.embed_positions.weight",),
)
