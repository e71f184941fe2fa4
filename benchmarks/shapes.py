"""The layers that are measured: the FFNs of known models, and small ones for rehearsals and CPUs."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_pretrain.config_models import GATED_ACTIVATIONS, GPTConfig

TOKENS = 16384
FEW_TOKENS: tuple[int, ...] = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Model:
    """A model's dimensions, as its paper or our conf/model has them."""

    name: str
    d_model: int
    d_ff: int
    n_layer: int
    n_head: int
    activation: str = "gelu"
    vocab_size: int = 50304
    seq_len: int = 1024
    n_kv_head: int | None = None
    tied_embeddings: bool = True

    @property
    def gated(self) -> bool:
        return self.activation in GATED_ACTIVATIONS

    def ffn_flop(self, tokens: int) -> int:
        """Of the FFN's products, forward and backward, dense."""
        return 6 * tokens * self.d_model * self.d_ff * (3 if self.gated else 2)

    def config(self, n_layer: int | None = None) -> GPTConfig:
        llama = self.gated
        return GPTConfig(
            name=self.name,
            n_layer=n_layer or self.n_layer,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head,
            d_model=self.d_model,
            d_ff=self.d_ff,
            vocab_size=self.vocab_size,
            max_seq_len=self.seq_len,
            norm="rms_norm" if llama else "layer_norm",
            position="rotary" if llama else "learned",
            activation=self.activation,
            tied_embeddings=self.tied_embeddings,
        )


GPT2_124M = Model("gpt2_124m", 768, 3072, 12, 12)
GPT2_774M = Model("gpt2_774m", 1280, 5120, 36, 20)
GPT2_1558M = Model("gpt2_1558m", 1600, 6400, 48, 25)
LLAMA_1B = Model("llama_1b", 2048, 8192, 16, 32, "swiglu", 128256, 2048, n_kv_head=8)
LLAMA_7B = Model("llama_7b", 4096, 11008, 32, 32, "swiglu", 32000, 2048, tied_embeddings=False)
# most valuable first: the targets are at 4096 and 2048
MODELS = (LLAMA_7B, LLAMA_1B, GPT2_1558M, GPT2_774M, GPT2_124M)

# for a CPU: about 10 and 30 million parameters, enough tokens that products dominate
CPU_10M = Model("gpt_10m", 320, 1280, 8, 5, vocab_size=2048, seq_len=128)
CPU_30M = Model("gpt_30m", 512, 2048, 9, 8, vocab_size=2048, seq_len=128)
CPU_TOKENS = 1024

TINY = Model("gpt_tiny", 64, 128, 2, 2, vocab_size=256, seq_len=32)
TINY_GATED = Model("llama_tiny", 64, 128, 2, 2, "swiglu", vocab_size=256, seq_len=32)
TINY_TOKENS = 64
