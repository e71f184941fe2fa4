"""A GGUF file of llama.cpp's, dequantised into a Hugging Face folder: Llama with a byte-level BPE.

Weights are what the file's blocks stand for, in float32. llama.cpp stores the rows of q and k in the order of its own
rotary embedding, pairs of neighbours; Hugging Face rotates the two halves of a head, so they are put back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from sparse_pretrain.errors import UserError
from sparse_pretrain.models.huggingface.folder import (
    CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    write_json,
    write_tensors,
)

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DEFAULTS = {"llama.rope.freq_base": 10000.0}  # llama.cpp's
_CONTROL = 3  # gguf.TokenType.CONTROL: a special token
# Of the names under tokenizer.ggml.pre: those that split text by GPT-2's expression, and whether digits stand alone.
_PRE_TOKENIZERS = {"gpt-2": False, "smollm": True}


def convert(path: Path, folder: Path) -> None:
    """Write the Hugging Face folder (config.json, model.safetensors, tokenizer files) of a GGUF file.

    Raises:
        UserError: naming `checkpoint`: `gguf` is not installed, or the file is no Llama with a tokenizer known here.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "checkpoint", f"{path}, but gguf is not installed", "a Hugging Face folder", "pip install gguf"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise UserError("checkpoint", f"{path} ({error})", "a whole GGUF file") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for key, allowed in (
        ("general.architecture", ["llama"]),
        ("llama.rope.scaling.type", ["none"]),
        ("tokenizer.ggml.model", ["gpt2"]),
        ("tokenizer.ggml.pre", list(_PRE_TOKENIZERS)),
    ):
        if fields.get(key, "none") not in allowed:
            raise UserError("checkpoint", f"{path} with {key}={fields.get(key)}", allowed)
    fields = {**_DEFAULTS, "llama.attention.head_count_kv": fields.get("llama.attention.head_count"), **fields}
    try:
        config, tokenizer, tokenizer_config = _config(fields), _tokenizer(fields), _tokenizer_config(fields)
    except KeyError as error:
        raise UserError("checkpoint", f"{path} without {error.args[0]}", "a whole GGUF file of a Llama") from error
    tensors = {}
    for tensor in reader.tensors:
        name = _name(tensor.name, path)
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for part, heads in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
            if part in name:
                weight = _halves(weight, fields[f"llama.attention.{heads}"])
        tensors[name] = weight.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, {})
    write_json(folder / CONFIG, config | {"tie_word_embeddings": "lm_head.weight" not in tensors})
    tokenizer.save(str(folder / TOKENIZER))
    write_json(folder / TOKENIZER_CONFIG, tokenizer_config)


def _name(name: str, path: Path) -> str:
    base, _, kind = name.rpartition(".")
    if base in _TOP and kind == "weight":
        return f"{_TOP[base]}.weight"
    blk, _, rest = base.partition(".")
    layer, _, part = rest.partition(".")
    if blk != "blk" or part not in _LAYER or kind != "weight":
        raise UserError("checkpoint", f"{path} with a tensor {name}", "a Llama's tensors: no biases, no experts")
    return f"model.layers.{layer}.{_LAYER[part]}.weight"


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs of neighbours to two halves."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5 of a float32
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = _PRE_TOKENIZERS[fields["tokenizer.ggml.pre"]]
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) if digits else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    special = {
        f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{theirs}_token_id" in fields
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return config
