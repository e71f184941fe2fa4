"""The options of models: one dataclass a family, chosen by `model.family`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_pretrain.schema import Family

GATED_ACTIVATIONS = ("geglu", "swiglu")


@dataclass(kw_only=True)
class ModelConfig(Family):
    """What every model has."""

    name: str
    family: str


@dataclass(kw_only=True)
class TransformerConfig(ModelConfig):
    """What our own transformers share."""

    n_layer: int
    n_head: int
    d_model: int
    d_ff: int | None = None  # null = 4 d_model, or 8/3 d_model for gated activations, rounded up to 64
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    activation_sparsity: str = "none"  # 2:4: of the hidden activations of a squared-ReLU FFN
    bias: bool = True
    dropout: float = 0.0
    activation_checkpointing: bool = False

    @property
    def ffn_width(self) -> int:
        """d_ff as given, else 4 d_model, or 8/3 d_model rounded up to a multiple of 64 for the gated activations
        (Shazeer 2020: the same number of parameters)."""
        if self.d_ff is not None:
            return self.d_ff
        if self.activation in GATED_ACTIVATIONS:
            return -(-8 * self.d_model // (3 * 64)) * 64
        return 4 * self.d_model


@dataclass(kw_only=True)
class GPTConfig(TransformerConfig):
    """A decoder: GPT-2 and Llama are two settings of the same options."""

    family: str = "gpt"
    n_kv_head: int | None = None  # fewer than n_head: grouped-query attention; null = n_head
    vocab_size: int | None = None  # null = the tokenizer's, rounded up to 64
    max_seq_len: int = 1024
    position: str = "learned"
    rope_theta: float = 10000.0
    bias: bool = False
    tied_embeddings: bool = True


@dataclass(kw_only=True)
class BertConfig(TransformerConfig):
    """An encoder that learns from words hidden from it (Devlin et al. 2019)."""

    family: str = "bert"
    vocab_size: int | None = None  # null = the tokenizer's, rounded up to 64
    max_seq_len: int = 512
    norm_place: str = "post"
    norm_eps: float = 1e-12
    activation: str = "gelu_erf"
    token_types: int = 2
    mask_share: float = 0.15  # of the tokens, hidden in pre-training
    whole_words: bool = True  # hide all pieces of a word or none


@dataclass(kw_only=True)
class Seq2SeqConfig(TransformerConfig):
    """An encoder-decoder (Vaswani et al. 2017) with one embedding for source, target and output."""

    family: str = "seq2seq"
    n_decoder_layer: int | None = None  # null = n_layer
    vocab_size: int | None = None  # null = the tokenizer's, rounded up to 64
    max_seq_len: int = 512
    norm_place: str = "post"
    position: str = "sinusoidal"
    activation: str = "relu"
    scale_embedding: bool = True  # by sqrt(d_model)
    embedding_norm: bool = False


@dataclass(kw_only=True)
class ViTConfig(TransformerConfig):
    """A vision transformer (Dosovitskiy et al. 2021); with a distillation token DeiT (Touvron et al. 2021)."""

    family: str = "vit"
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    norm_eps: float = 1e-6
    activation: str = "gelu_erf"
    distillation_token: bool = False


@dataclass(kw_only=True)
class HFConfig(ModelConfig):
    """Any model of transformers."""

    family: str = "hf"
    path: str  # a folder with config.json and safetensors, to start from these weights; or a config.json, to start anew
    max_seq_len: int = 1024  # of the sequences it is given


@dataclass(kw_only=True)
class TorchvisionConfig(ModelConfig):
    """An image classifier of torchvision, with initial weights."""

    family: str = "torchvision"
    architecture: str
    image_size: int = 224
    channels: int = 3


ModelConfig.family_option = "family"
ModelConfig.families = {
    "gpt": GPTConfig,
    "bert": BertConfig,
    "seq2seq": Seq2SeqConfig,
    "vit": ViTConfig,
    "hf": HFConfig,
    "torchvision": TorchvisionConfig,
}
