"""Weights of transformers' models in ours, name by name: what our classes must be able to hold, without our own
conversions, which are tested elsewhere."""

import re

import torch
from torch import nn

from sparse_pretrain.models.bert import Bert
from sparse_pretrain.models.seq2seq import Seq2Seq
from sparse_pretrain.models.vit import ViT

# of an encoder's or decoder's layer: pattern over transformers' names -> our name
_BERT_BLOCK = {
    r"attention\.self\.(query|key|value)": "attn.qkv",
    r"attention\.output\.dense": "attn.out",
    r"attention\.output\.LayerNorm": "attn_norm",
    r"intermediate\.dense": "ffn.up",
    r"output\.dense": "ffn.down",
    r"output\.LayerNorm": "ffn_norm",
}
_VIT_BLOCK = {
    r"attention\.[qkv]_proj": "attn.qkv",
    r"attention\.o_proj": "attn.out",
    r"layernorm_before": "attn_norm",
    r"mlp\.fc1": "ffn.up",
    r"mlp\.fc2": "ffn.down",
    r"layernorm_after": "ffn_norm",
}
_BART_BLOCK = {
    r"self_attn\.[qkv]_proj": "attn.qkv",
    r"self_attn\.out_proj": "attn.out",
    r"self_attn_layer_norm": "attn_norm",
    r"encoder_attn\.q_proj": "cross_attn.q",
    r"encoder_attn\.[kv]_proj": "cross_attn.kv",
    r"encoder_attn\.out_proj": "cross_attn.out",
    r"encoder_attn_layer_norm": "cross_norm",
    r"fc1": "ffn.up",
    r"fc2": "ffn.down",
    r"final_layer_norm": "ffn_norm",
}
_ORDER = ("query", "key", "value", "q_proj", "k_proj", "v_proj")


def _block(state: dict[str, torch.Tensor], prefix: str, patterns: dict[str, str]) -> dict[str, torch.Tensor]:
    """Of one layer; what goes into one of ours is stacked in the order of queries, keys, values."""
    parts: dict[str, list[str]] = {}
    for name in state:
        if name.startswith(prefix):
            layer, _, kind = name.removeprefix(prefix).rpartition(".")
            (ours,) = [ours for pattern, ours in patterns.items() if re.fullmatch(pattern, layer)]
            parts.setdefault(f"{ours}.{kind}", []).append(name)
    order = {key: i for i, key in enumerate(_ORDER)}
    return {
        ours: torch.cat([state[name] for name in sorted(names, key=lambda n: order.get(n.split(".")[-2], 0))])
        for ours, names in parts.items()
    }


def _blocks(state: dict[str, torch.Tensor], theirs: str, ours: str, count: int, patterns: dict[str, str]) -> dict:
    return {
        f"{ours}.{i}.{name}": value
        for i in range(count)
        for name, value in _block(state, f"{theirs}.{i}.", patterns).items()
    }


def _both(state: dict[str, torch.Tensor], theirs: str, ours: str) -> dict:
    return {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}


def bert_body(state: dict[str, torch.Tensor], n_layer: int) -> dict:
    return {
        "tok_embed.weight": state["bert.embeddings.word_embeddings.weight"],
        "pos_embed.weight": state["bert.embeddings.position_embeddings.weight"],
        "type_embed.weight": state["bert.embeddings.token_type_embeddings.weight"],
        **_both(state, "bert.embeddings.LayerNorm", "embed_norm"),
        **_blocks(state, "bert.encoder.layer", "blocks", n_layer, _BERT_BLOCK),
    }


def fill_bert(ours: Bert, theirs: nn.Module) -> None:
    state = theirs.state_dict()
    ours.load_state_dict({
        **bert_body(state, len(ours.blocks)),
        **_both(state, "cls.predictions.transform.dense", "head.dense"),
        **_both(state, "cls.predictions.transform.LayerNorm", "head.norm"),
        **_both(state, "cls.predictions.decoder", "head.out"),
    })  # fmt: skip


def fill_vit(ours: ViT, theirs: nn.Module, body: str) -> None:
    state = theirs.state_dict()
    heads = {"classifier": "head"} if body == "vit" else {}
    if body == "deit":
        heads = {"cls_classifier": "head", "distillation_classifier": "distillation_head"}
    extra = [state[f"{body}.embeddings.{name}"][0] for name in ("cls_token", "distillation_token")[: len(heads)]]
    ours.load_state_dict({
        "extra_tokens": torch.cat(extra),
        "pos_embed": state[f"{body}.embeddings.position_embeddings"][0],
        **_both(state, f"{body}.embeddings.patch_embeddings.projection", "patch_embed"),
        **_blocks(state, f"{body}.layers", "blocks", len(ours.blocks), _VIT_BLOCK),
        **_both(state, f"{body}.layernorm", "norm"),
        **{name: value for their, our in heads.items() for name, value in _both(state, their, our).items()},
    })  # fmt: skip


def fill_seq2seq(ours: Seq2Seq, theirs: nn.Module) -> None:
    """BART and Marian."""
    state, cfg = theirs.state_dict(), ours.cfg
    weights = {
        "tok_embed.weight": state["model.shared.weight"],
        "head.weight": state["model.shared.weight"],
        "head.bias": state["final_logits_bias"][0],
    }
    for side, stack in (("encoder", ours.encoder), ("decoder", ours.decoder)):
        weights |= _blocks(state, f"model.{side}.layers", f"{side}.blocks", len(stack.blocks), _BART_BLOCK)
        if cfg.position == "learned":  # BART's first two rows were for padding, and are never used
            weights[f"{side}.pos_embed.weight"] = state[f"model.{side}.embed_positions.weight"][2:]
        if cfg.embedding_norm:
            weights |= _both(state, f"model.{side}.layernorm_embedding", f"{side}.embed_norm")
    ours.load_state_dict(weights)


def randomize(model: nn.Module, std: float = 0.2) -> nn.Module:
    """Biases and norms too, so that each counts; in evaluation mode."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=generator)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(generator=generator)
    return model.eval()
