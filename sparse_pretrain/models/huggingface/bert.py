"""BERT of transformers: norms after what they add to, a masked-LM head tied to the embedding."""

from __future__ import annotations

from typing import Any

from sparse_pretrain.config_models import BertConfig
from sparse_pretrain.models.huggingface.architecture import CLASSIFIER, PRE_TRAINING, SPANS, Architecture
from sparse_pretrain.models.huggingface.config_file import ConfigFile, activation_name, check_option
from sparse_pretrain.models.huggingface.rules import Rule, embedding, linear, norm


def read_config(config: ConfigFile) -> BertConfig:
    config.only("position_embedding_type", "absolute", default="absolute")
    config.only("is_decoder", False, default=False)
    config.only("tie_word_embeddings", True, default=True)
    return BertConfig(
        name=config.folder.name,
        n_layer=config.get("num_hidden_layers", 12),
        n_head=config.get("num_attention_heads", 12),
        d_model=config.get("hidden_size", 768),
        d_ff=config.get("intermediate_size", 3072),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        activation=config.activation("hidden_act", "gelu"),
        dropout=config.get("hidden_dropout_prob", 0.1),
        max_seq_len=config.get("max_position_embeddings", 512),
        token_types=config.get("type_vocab_size", 2),
        vocab_size=config.get("vocab_size", 30522),
    )


def write_config(cfg: BertConfig) -> dict[str, Any]:
    check_option(cfg, "norm", ["layer_norm"], "BERT")
    check_option(cfg, "norm_place", ["post"], "BERT")
    return {
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.ffn_width,
        "layer_norm_eps": cfg.norm_eps,
        "hidden_act": activation_name(cfg, "BERT"),
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": cfg.dropout,
        "max_position_embeddings": cfg.max_seq_len,
        "type_vocab_size": cfg.token_types,
        "tie_word_embeddings": True,
    }


def body(cfg: BertConfig) -> list[Rule]:
    d = cfg.d_model
    found = [
        embedding("tok_embed", "bert.embeddings.word_embeddings"),
        embedding("pos_embed", "bert.embeddings.position_embeddings"),
        embedding("type_embed", "bert.embeddings.token_type_embeddings"),
        *norm("embed_norm", "bert.embeddings.LayerNorm", d),
    ]
    for i in range(cfg.n_layer):
        ours, theirs = f"blocks.{i}", f"bert.encoder.layer.{i}"
        qkv = tuple(f"{theirs}.attention.self.{part}" for part in ("query", "key", "value"))
        found += [
            *linear(f"{ours}.attn.qkv", qkv, (d, d, d)),
            *linear(f"{ours}.attn.out", f"{theirs}.attention.output.dense", d),
            *norm(f"{ours}.attn_norm", f"{theirs}.attention.output.LayerNorm", d),
            *linear(f"{ours}.ffn.up", f"{theirs}.intermediate.dense", cfg.ffn_width),
            *linear(f"{ours}.ffn.down", f"{theirs}.output.dense", d),
            *norm(f"{ours}.ffn_norm", f"{theirs}.output.LayerNorm", d),
        ]
    return found


def head(cfg: BertConfig) -> list[Rule]:
    assert cfg.vocab_size is not None
    return [
        *linear("head.dense", "cls.predictions.transform.dense", cfg.d_model),
        *norm("head.norm", "cls.predictions.transform.LayerNorm", cfg.d_model),
        embedding("head.out", "bert.embeddings.word_embeddings"),
        Rule("head.out.bias", ("cls.predictions.bias",), (cfg.vocab_size,)),
    ]


BERT = Architecture(
    model_type="bert",
    prefix="bert.",
    classes={
        PRE_TRAINING: "BertForMaskedLM",
        CLASSIFIER: "BertForSequenceClassification",
        SPANS: "BertForQuestionAnswering",
    },
    read_config=read_config,
    write_config=write_config,
    body=body,
    head=head,
    other_heads={
        CLASSIFIER: {"pooler": "bert.pooler.dense", "classifier": "classifier"},
        SPANS: {"classifier": "qa_outputs"},
    },
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ignored=("*.position_ids",),
    left_behind=("bert.pooler.*", "cls.seq_relationship.*", "classifier.*", "qa_outputs.*"),
)
