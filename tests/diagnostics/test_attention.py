"""Attention sinks, against loops over single entries and matrices made by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.diagnostics.attention import HeadMeter, attention_probabilities, sink_scores, tag
from sparse_pretrain.models.blocks import Attention, RotaryEmbedding

T = 8


def layer(causal=True, n_kv_head=None, rotary=False):
    torch.manual_seed(0)
    cfg = GPTConfig(name="x", n_layer=1, n_head=4, d_model=32, max_seq_len=16)
    return Attention(cfg, causal, n_kv_head, RotaryEmbedding(8, 16, 10000.0) if rotary else None).eval()


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_recomputed_is_what_the_layer_does(causal, n_kv_head, rotary):
    attention = layer(causal, n_kv_head, rotary)
    x = torch.randn(2, T, 32)
    probabilities, values = attention_probabilities(attention, x, None)
    assert torch.allclose(probabilities.sum(-1), torch.ones(2, 4, T))
    output = attention.out((probabilities @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(output, attention(x), atol=1e-6)


def test_padding_gets_no_attention():
    attention, x = layer(causal=False), torch.randn(2, T, 32)
    mask = torch.arange(T) < torch.tensor([[T], [5]])
    probabilities, values = attention_probabilities(attention, x, mask)
    assert (probabilities[1, :, :, 5:] == 0).all()
    output = attention.out((probabilities @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(output, attention(x, mask), atol=1e-6)


@pytest.mark.parametrize("lengths", [None, (T, 5, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_alpha_is_the_mean_over_the_queries_that_see_a_key(causal, lengths):
    torch.manual_seed(1)
    scores = torch.randn(3, 2, T, T)
    mask = None if lengths is None else torch.arange(T) < torch.tensor(lengths)[:, None]
    visible = torch.ones(T, T, dtype=torch.bool).tril() if causal else torch.ones(T, T, dtype=torch.bool)
    visible = visible if mask is None else visible & mask[:, None, None, :]
    attention = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    alpha, seen_by = sink_scores(attention, causal, mask)
    for b in range(3):
        length = T if lengths is None else lengths[b]
        for k in range(length):
            queries = range(k, length) if causal else range(length)
            assert seen_by[b, k] == len(queries)
            for h in range(2):
                expected = sum(float(attention[b, h, i, k]) for i in queries) / len(queries)
                assert float(alpha[b, h, k]) == pytest.approx(expected, abs=1e-6)
        assert (seen_by[b, length:] == 0).all()
        assert (alpha[b, :, length:] == 0).all()


def test_known_heads():
    """A head with all attention on the first token, one that looks everywhere alike, one that looks at itself."""
    attention = torch.zeros(1, 3, T, T)
    attention[0, 0, :, 0] = 1
    attention[0, 1] = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    attention[0, 2] = torch.eye(T)
    alpha, _ = sink_scores(attention, causal=True, mask=None)
    assert alpha[0, 0].tolist() == [1.0] + [0.0] * (T - 1)
    for k in range(1, T + 1):
        assert alpha[0, 1, k - 1] == pytest.approx(sum(1 / i for i in range(k, T + 1)) / (T - k + 1))
        assert alpha[0, 2, k - 1] == pytest.approx(1 / (T - k + 1))

    meter = HeadMeter(epsilon=0.3)
    meter.update(attention, torch.randn(1, 3, T, 4), causal=True, mask=None)
    found = meter.result()
    assert found["first_alpha"] == pytest.approx([1.0, sum(1 / i for i in range(1, T + 1)) / T, 1 / T])
    assert found["first_sink"] == [1.0, 1.0, 0.0]
    # Of the last head no token that half of the others see is a sink, though it gives all attention to one token each.
    assert found["any_sink"] == [1.0, 1.0, 0.0]
    assert found["highest_at"] == [0, 0, T // 2]
    assert found["rank1_share"][0] == pytest.approx(1.0)
    assert found["tag_cosine"][0] == pytest.approx(1.0)
    assert found["sink_at"][0] == pytest.approx(2 / 3)
    assert found["sink_at"][T // 2 + 1 :] == [None] * (T // 2 - 1)


def test_bidirectional_heads_have_candidates_everywhere():
    attention = torch.zeros(1, 1, T, T)
    attention[..., T - 1] = 1
    meter = HeadMeter(epsilon=0.3)
    meter.update(attention, torch.randn(1, 1, T, 4), causal=False, mask=None)
    found = meter.result()
    assert (found["highest_alpha"], found["highest_at"], found["any_sink"]) == ([1.0], [T - 1], [1.0])
    assert found["first_alpha"] == [0.0]
    assert found["sink_at"] == [0.0] * (T - 1) + [1.0]


@pytest.mark.parametrize("causal", [True, False])
def test_the_tag_is_the_part_along_the_sinks_value(causal):
    torch.manual_seed(2)
    output, values = torch.randn(2, 3, T, 4), torch.randn(2, 3, T, 4)
    sink = torch.tensor([[0, 2, 7], [1, 1, 3]])
    tokens = torch.arange(T) < torch.tensor([[T], [6]])
    share, cosine = tag(output, values, sink, causal, tokens)
    for b in range(2):
        for h in range(3):
            s, length = int(sink[b, h]), int(tokens[b].sum())
            rows = [i for i in range(length) if (i > s if causal else i != s)]
            v = values[b, h, s] / values[b, h, s].norm()
            total = sum(float(output[b, h, i].square().sum()) for i in rows)
            along = sum(float(output[b, h, i] @ v) ** 2 for i in rows)
            assert float(share[b, h]) == pytest.approx(along / total if rows else 0.0, abs=1e-6)
            cosines = [float(F.cosine_similarity(output[b, h, i], v, dim=0)) for i in rows]
            assert float(cosine[b, h]) == pytest.approx(sum(cosines) / max(len(cosines), 1), abs=1e-6)


def test_batches_add_up():
    attention, x = layer(), torch.randn(6, T, 32)
    whole, parts = HeadMeter(0.2), HeadMeter(0.2)
    whole.update(*attention_probabilities(attention, x, None), True, None)
    for part in x.split(4):
        parts.update(*attention_probabilities(attention, part, None), True, None)
    a, b = whole.result(), parts.result()
    assert a.keys() == b.keys()
    for name in a:
        assert all(
            math.isclose(one, other, abs_tol=1e-6)
            for one, other in zip(a[name], b[name], strict=True)
            if one is not None
        ), name
