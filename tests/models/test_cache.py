"""Decoding with a cache gives what decoding without one does."""

from dataclasses import replace

import pytest
import torch

from sparse_pretrain.models.blocks import KeyValueCache
from sparse_pretrain.models.generation import beam_search, sample
from sparse_pretrain.models.gpt import GPT
from tests.models.by_hand import randomize
from tests.models.test_gpt import TINY, VARIANTS, model
from tests.models.test_seq2seq import VARIANTS as SEQ2SEQ_VARIANTS
from tests.models.test_seq2seq import model as seq2seq_model


def uncached(gpt: GPT):
    return lambda tokens, rows: gpt(tokens[:, -gpt.cfg.max_seq_len :])[:, -1]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 4, 6]], ids=["whole", "single", "pieces"])
@torch.no_grad()
def test_a_decoders_logits(changes, pieces):
    gpt = model(**changes)  # in training too, where activation_checkpointing would compute blocks twice
    tokens = torch.randint(50, (2, 16))
    caches = gpt.make_caches(16)
    logits = torch.cat([gpt(part, caches) for part in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, gpt(tokens))


@pytest.mark.parametrize("changes", SEQ2SEQ_VARIANTS.values(), ids=SEQ2SEQ_VARIANTS)
@torch.no_grad()
def test_an_encoder_decoders_logits(changes):
    seq2seq = seq2seq_model(**changes).eval()
    source, target, mask = torch.randint(50, (2, 12)), torch.randint(50, (2, 9)), torch.arange(12).expand(2, 12) < 8
    memory = seq2seq.encode(source, mask)
    caches = seq2seq.make_caches(9, 12)
    projections = []
    for block in seq2seq.decoder.blocks:
        block.cross_attn.kv.register_forward_hook(lambda *call: projections.append(1))
    parts = [seq2seq.decode(part, memory, mask, caches) for part in target.split([1, 3, 1, 4], dim=1)]
    assert len(projections) == len(seq2seq.decoder.blocks)  # once each
    torch.testing.assert_close(torch.cat(parts, dim=1), seq2seq(source, target, mask))


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("changes", [{}, VARIANTS["llama"]], ids=["gpt2", "llama"])
def test_generated_tokens(changes, temperature):
    """Beyond max_seq_len too, where the window moves."""
    gpt = randomize(model(**changes))
    prompt = torch.randint(50, (3, 5))
    cached, plain = (
        generate(torch.Generator().manual_seed(1))
        for generate in (
            lambda draw: gpt.generate(prompt, 20, temperature, top_k=9, generator=draw),
            lambda draw: sample(uncached(gpt), prompt, 20, temperature, top_k=9, generator=draw),
        )
    )
    assert cached.shape == (3, 25)
    assert torch.equal(cached, plain)


def test_beam_search():
    gpt = randomize(model())
    prompt = torch.randint(50, (2, 3))
    cached = beam_search(gpt.step(15), prompt, beams=4, max_new_tokens=12, end_token=7)
    assert torch.equal(cached, beam_search(uncached(gpt), prompt, beams=4, max_new_tokens=12, end_token=7))


def test_each_row_stops_at_its_stop_token():
    gpt = randomize(model())
    prompts = torch.randint(50, (12, 3), generator=torch.Generator().manual_seed(0))
    alone = [gpt.generate(prompt[None], 12, temperature=0) for prompt in prompts]
    stop = int(alone[0][0, 7])
    together = gpt.generate(prompts, 12, temperature=0, stop_token=stop)
    ends = set()
    for row, free in zip(together, alone, strict=True):
        new = free[0, 3:].tolist()
        ends.add(new.index(stop) if stop in new else None)
        kept = new[: new.index(stop) + 1] if stop in new else new
        assert row[3:].tolist() == (kept + [stop] * 12)[: together.shape[1] - 3]
    assert len(ends) > 2
    first = alone[0][0, 3:].tolist().index(stop)
    assert gpt.generate(prompts[:1], 12, temperature=0, stop_token=stop).shape == (1, 3 + first + 1)


def test_prompts_of_different_lengths():
    gpt = randomize(model())
    prompts, lengths = torch.randint(50, (4, 6)), torch.tensor([2, 6, 3, 5])
    together = gpt.generate(prompts, 4, temperature=0, lengths=lengths)
    assert together.shape == (4, 10)
    for row, prompt, length in zip(together, prompts, lengths.tolist(), strict=True):
        assert torch.equal(row, gpt.generate(prompt[None, :length], 10 - length, temperature=0)[0])
    stop = int(prompts[1, 2])  # within a prompt it stops nothing
    assert stop not in together[1, 6:]
    assert torch.equal(gpt.generate(prompts, 4, temperature=0, lengths=lengths, stop_token=stop)[1], together[1])


def test_a_cache_goes_on_with_other_rows():
    cache = KeyValueCache(5)
    cache.select(torch.tensor([1, 0]))  # nothing in it yet
    first, second = torch.randn(3, 2, 2, 4), torch.randn(3, 2, 1, 4)
    cache.append(first, -first)
    rows = torch.tensor([2, 0, 0])
    cache.select(rows)
    keys, values = cache.append(second, -second)
    assert torch.equal(keys, torch.cat((first[rows], second), dim=2))
    assert torch.equal(values, -keys)


def test_a_decoder_generates_in_its_own_precision():
    gpt = GPT(replace(TINY, position="rotary"), vocab_size=50).bfloat16()
    assert gpt.generate(torch.randint(50, (2, 3)), 4).shape == (2, 7)
