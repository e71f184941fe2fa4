"""The decoder: causal, every variant trains, sizes as named."""

from dataclasses import replace

import pytest
import torch
import yaml

from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.models.blocks import RotaryEmbedding
from sparse_pretrain.models.count import count_model
from sparse_pretrain.models.generation import sample
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.paths import config_dir
from sparse_pretrain.schema import load
from sparse_pretrain.sparsity import load_recipe, sparsify

TINY = GPTConfig(name="tiny", n_layer=2, n_head=4, d_model=32, max_seq_len=16)
VARIANTS = {
    "gpt2": {},
    "gpt2-bias-untied": {"bias": True, "tied_embeddings": False},
    "llama": {"norm": "rms_norm", "position": "rotary", "activation": "swiglu", "n_kv_head": 2},
    "geglu": {"activation": "geglu"},
    "relu2-mqa": {"activation": "relu2", "n_kv_head": 1},
    "checkpointed": {"activation_checkpointing": True},
}


def model(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(replace(TINY, **changes), vocab_size=50)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_token_sees_only_those_before_it(changes):
    gpt = model(**changes).eval()
    tokens = torch.randint(50, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = gpt(tokens), gpt(changed)
    assert before.shape == (2, 16, 50)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_gets_a_gradient(changes):
    gpt = model(**changes)
    gpt(torch.randint(50, (2, 16))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gpt.parameters())


def test_activation_checkpointing_changes_nothing():
    tokens = torch.randint(50, (2, 16))
    grads = []
    for checkpointing in (False, True):
        gpt = model(activation_checkpointing=checkpointing)
        gpt(tokens).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]))
    assert torch.equal(*grads)


def test_grouped_queries_equal_repeated_heads():
    grouped = model(n_kv_head=2)
    full = model()
    full.load_state_dict(grouped.state_dict() | {
        f"blocks.{i}.attn.qkv.weight": torch.cat((
            block.attn.qkv.weight[:32],
            *(part.view(2, 8, 32).repeat_interleave(2, 0).view(32, 32) for part in block.attn.qkv.weight[32:].split(16)),
        ))
        for i, block in enumerate(grouped.blocks)
    })  # fmt: skip
    tokens = torch.randint(50, (1, 16))
    torch.testing.assert_close(grouped(tokens), full(tokens))


def test_blocks_share_one_table_of_angles():
    """With a context of 128k tokens it is 64 MB."""
    gpt = model(**VARIANTS["llama"])
    assert len([buffer for buffer in gpt.buffers() if buffer.dim() == 2]) == 2


def test_rotary_scores_depend_on_distance_only():
    rotary = RotaryEmbedding(8, max_seq_len=12, theta=100.0)
    q, k = torch.randn(8).expand(1, 1, 12, 8), torch.randn(8).expand(1, 1, 12, 8)
    scores = rotary(q)[0, 0] @ rotary(k)[0, 0].T
    for distance in (-3, 0, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(rotary(q)[0, 0].norm(dim=-1), q[0, 0].norm(dim=-1))


# Parameters with GPT-2's vocabulary padded to 50304, without biases: nanoGPT's and the papers' sizes.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2_124m", 124),
        ("gpt2_350m", 354),
        ("gpt2_774m", 773),
        ("gpt2_1558m", 1557),
        ("llama_1b", 1236),
        ("llama_7b", 6738),
    ],
)
def test_sizes_are_as_named(name, millions):
    cfg = load(GPTConfig, yaml.safe_load((config_dir() / "model" / f"{name}.yaml").read_text()))
    vocab = {"llama_1b": 128256, "llama_7b": 32000}.get(name, 50304)
    with torch.device("meta"):
        gpt = GPT(cfg, vocab)
    assert sum(p.numel() for p in gpt.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_gated_width_keeps_the_parameters():
    assert replace(TINY, d_model=768, activation="swiglu").ffn_width == 2048
    assert replace(TINY, d_model=768).ffn_width == 3072
    assert replace(TINY, d_ff=100).ffn_width == 100


@pytest.mark.parametrize("recipe", ["dense", "ste"])
def test_counts(recipe):
    gpt = model()
    sparsify(gpt, load_recipe(recipe))
    with torch.device("meta"):
        dense = GPT(TINY, vocab_size=50)
    count = count_model(gpt, dense, (torch.zeros(1, 16, dtype=torch.int64),), tokens=16)
    assert count.rows["blocks.0.ffn.up"] == 16
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 50 * 32
    assert count.flop_per_token == 6 * matrices + 12 * 2 * 32 * 16
    assert count.parameters == matrices + 16 * 32 + 5 * 32
    assert count.state_bytes == 16 * count.parameters


def test_rows_of_convolutions_are_output_positions():
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.Flatten(), torch.nn.Linear(8 * 9, 5))
    count = count_model(net, net, (torch.zeros(1, 3, 8, 8),), tokens=1)
    assert count.rows == {"0": 9, "2": 1}
    assert count.flop_per_token == 6 * (9 * 8 * 27 + 72 * 5)


def test_initial_weights_are_gpt2s():
    gpt = model(n_layer=8, d_model=64, d_ff=256, bias=True)
    for name, parameter in gpt.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / 4 if name.endswith(("attn.out.weight", "ffn.down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert (parameter == name.endswith("weight")).all(), name  # norms and biases


def test_what_is_drawn():
    """As often as the softmax of the logits over the temperature says, of the likeliest `top_k`."""
    logits = torch.tensor([0.5, -1.0, 1.0, 0.0])
    rows = 20_000
    for temperature, top_k, kept in ((1.0, None, [0, 1, 2, 3]), (0.5, None, [0, 1, 2, 3]), (2.0, 3, [0, 2, 3])):
        drawn = sample(
            lambda tokens, _: logits.expand(len(tokens), 4), torch.zeros(rows, 1, dtype=torch.int64), 1, temperature, top_k,
            torch.Generator().manual_seed(0),
        )[:, 1]  # fmt: skip
        expected = torch.zeros(4)
        expected[kept] = (logits[kept] / temperature).softmax(0)
        found = drawn.bincount(minlength=4) / rows
        torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
        assert (found > 0).nonzero().flatten().tolist() == kept


def test_generation_is_repeatable_and_greedy_at_zero():
    gpt = model()
    prompt = torch.tensor([[1, 2, 3]])
    first, second = (gpt.generate(prompt, 20, generator=torch.Generator().manual_seed(3), top_k=5) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (1, 23)  # longer than max_seq_len: the window moves
    greedy = gpt.generate(prompt, 1, temperature=0)
    assert greedy[0, -1] == gpt(prompt)[0, -1].argmax()
    stopped = gpt.generate(prompt, 20, temperature=0, stop_token=int(greedy[0, -1]))
    assert stopped.shape == (1, 4)
