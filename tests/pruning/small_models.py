"""Small models of every kind that can be pruned, with a forward function and batches of inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_pretrain.config_models import BertConfig, GPTConfig, Seq2SeqConfig, ViTConfig
from sparse_pretrain.models.bert import Bert
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.models.seq2seq import Seq2Seq
from sparse_pretrain.models.vit import ViT

transformers = pytest.importorskip("transformers")


def gpt() -> tuple[nn.Module, Callable, list[Any]]:
    model = GPT(GPTConfig(name="tiny", n_layer=3, n_head=2, d_model=16, max_seq_len=16), vocab_size=64)
    return model, model, list(torch.randint(64, (3, 2, 16)))


def llama():
    cfg = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    model = transformers.LlamaForCausalLM(cfg)
    return model, lambda batch: model(batch, use_cache=False), list(torch.randint(64, (3, 2, 16)))


def gemma():
    """Masks and positions differ between its blocks."""
    cfg = transformers.Gemma3TextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        vocab_size=64, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(cfg)
    return model, lambda batch: model(batch, use_cache=False), list(torch.randint(64, (2, 2, 16)))


def gpt2():
    """Its layers are Conv1D: weights are (in, out)."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=16)
    )
    return model, lambda batch: model(batch, use_cache=False), list(torch.randint(64, (3, 2, 16)))


def bert():
    cfg = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=16,
    )
    model = transformers.BertForMaskedLM(cfg)
    batches = [
        {"input_ids": torch.randint(64, (2, 8)), "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])}
        for _ in range(3)
    ]
    return model, lambda batch: model(**batch), batches


def bart():
    """Two stacks: the decoder is given what the pruned encoder returns."""
    cfg = transformers.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(cfg)
    batches = [
        {"input_ids": torch.randint(64, (2, 8)), "decoder_input_ids": torch.randint(64, (2, 6))} for _ in range(2)
    ]
    return model, lambda batch: model(**batch, use_cache=False), batches


def vit():
    cfg = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    model = transformers.ViTForImageClassification(cfg)
    return model, model, list(torch.randn(2, 2, 3, 16, 16))


def our_bert():
    cfg = BertConfig(name="tiny", n_layer=2, n_head=2, d_model=16, max_seq_len=16)
    model = Bert(cfg, vocab_size=64)
    mask = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    return model, lambda tokens: model(tokens, mask), list(torch.randint(64, (3, 2, 8)))


def our_seq2seq():
    model = Seq2Seq(Seq2SeqConfig(name="tiny", n_layer=2, n_head=2, d_model=16, max_seq_len=16), vocab_size=64)
    batches = [
        (torch.randint(64, (2, 8)), torch.randint(64, (2, 6)), torch.ones(2, 8, dtype=torch.bool)) for _ in range(2)
    ]
    return model, lambda batch: model(*batch), batches


def our_vit():
    model = ViT(ViTConfig(name="tiny", n_layer=2, n_head=2, d_model=16, image_size=16, patch_size=4), num_classes=3)
    return model, model, list(torch.randn(2, 2, 3, 16, 16))


def mlp():
    """No repeated blocks: each layer is one."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    return model, model, list(torch.randn(3, 20, 8))


class Residual(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.down = nn.Conv2d(channels, channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.down(x)  # two convolutions of one tensor follow each other
        return self.conv2(self.norm(self.conv1(x)).relu_()) + shortcut


def convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Sequential(Residual(8, 1), Residual(8, 2)), nn.Flatten(), nn.Linear(72, 4)
    )
    return model, model, list(torch.randn(2, 4, 3, 8, 8))


MODELS = [gpt, our_bert, our_seq2seq, our_vit, llama, gemma, gpt2, bert, bart, vit, mlp, convolutions]


def build(make) -> tuple[nn.Module, Callable, list[Any]]:
    torch.manual_seed(0)
    model, forward, batches = make()
    for parameter in model.parameters():  # initial weights are so small that blocks hardly change anything
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval(), forward, batches
