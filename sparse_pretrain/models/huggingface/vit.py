"""ViT of transformers, and DeiT with a distillation token and two heads."""

from __future__ import annotations

from typing import Any

from sparse_pretrain.config_models import ViTConfig
from sparse_pretrain.models.huggingface.architecture import PRE_TRAINING, Architecture
from sparse_pretrain.models.huggingface.config_file import ConfigFile, activation_name, check_option
from sparse_pretrain.models.huggingface.rules import Rule, linear, norm


def read_config(config: ConfigFile) -> ViTConfig:
    distilled = config.values["model_type"] == "deit"
    for size in ("image_size", "patch_size"):
        if not isinstance(config.values.get(size, 16), int):
            raise config.error(size, config.values[size], "a whole number: square images of square patches")
    if distilled and config.values.get("architectures") == ["DeiTForImageClassification"]:
        raise config.error("architectures", "DeiTForImageClassification", ["DeiTForImageClassificationWithTeacher"])
    return ViTConfig(
        name=config.folder.name,
        n_layer=config.get("num_hidden_layers", 12),
        n_head=config.get("num_attention_heads", 12),
        d_model=config.get("hidden_size", 768),
        d_ff=config.get("intermediate_size", 3072),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        activation=config.activation("hidden_act", "gelu"),
        dropout=config.get("hidden_dropout_prob", 0.0),
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 16),
        channels=config.get("num_channels", 3),
        distillation_token=distilled,
    )


def write_config(cfg: ViTConfig) -> dict[str, Any]:
    name = "DeiT" if cfg.distillation_token else "ViT"
    check_option(cfg, "norm", ["layer_norm"], name)
    return {
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.ffn_width,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_act": activation_name(cfg, name),
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": cfg.dropout,
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "num_channels": cfg.channels,
        "qkv_bias": True,
    }


def body(cfg: ViTConfig) -> list[Rule]:
    d = cfg.d_model
    top = "deit" if cfg.distillation_token else "vit"
    tokens = ("cls_token", "distillation_token") if cfg.distillation_token else ("cls_token",)
    found = [
        Rule("extra_tokens", tuple(f"{top}.embeddings.{token}" for token in tokens), (1,) * len(tokens), batched=True),
        Rule("pos_embed", (f"{top}.embeddings.position_embeddings",), batched=True),
        *linear("patch_embed", f"{top}.embeddings.patch_embeddings.projection", d),
        *norm("norm", f"{top}.layernorm", d),
    ]
    for i in range(cfg.n_layer):
        ours, theirs = f"blocks.{i}", f"{top}.encoder.layer.{i}"
        qkv = tuple(f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value"))
        found += [
            *norm(f"{ours}.attn_norm", f"{theirs}.layernorm_before", d),
            *linear(f"{ours}.attn.qkv", qkv, (d, d, d)),
            *linear(f"{ours}.attn.out", f"{theirs}.attention.output.dense", d),
            *norm(f"{ours}.ffn_norm", f"{theirs}.layernorm_after", d),
            *linear(f"{ours}.ffn.up", f"{theirs}.intermediate.dense", cfg.ffn_width),
            *linear(f"{ours}.ffn.down", f"{theirs}.output.dense", d),
        ]
    return found


def head(cfg: ViTConfig) -> list[Rule]:
    # No rows: these biases are always there
    if not cfg.distillation_token:
        return linear("head", "classifier", ())
    return [*linear("head", "cls_classifier", ()), *linear("distillation_head", "distillation_classifier", ())]


VIT = Architecture(
    model_type="vit",
    prefix="vit.",
    classes={PRE_TRAINING: "ViTForImageClassification"},
    read_config=read_config,
    write_config=write_config,
    body=body,
    head=head,
    other_heads={},
    left_behind=("vit.pooler.*", "vit.embeddings.mask_token", "decoder.*"),
)
DEIT = Architecture(
    model_type="deit",
    prefix="deit.",
    classes={PRE_TRAINING: "DeiTForImageClassificationWithTeacher"},
    read_config=read_config,
    write_config=write_config,
    body=body,
    head=head,
    other_heads={},
    left_behind=("deit.pooler.*", "deit.embeddings.mask_token", "decoder.*"),
)
