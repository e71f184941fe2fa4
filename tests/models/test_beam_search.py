"""Beam search against transformers' and against all sequences there are."""

import itertools

import pytest
import torch

from sparse_pretrain.models.generation import beam_search
from tests.models.test_seq2seq import model, pair


def trim(row: torch.Tensor, end: int, start: int = 1) -> list[int]:
    """Up to its first end token after the start."""
    tokens = row.tolist()
    return tokens[: tokens.index(end, start) + 1] if end in tokens[start:] else tokens


@pytest.mark.parametrize("family", ["bart", "marian"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
def test_it_finds_what_transformers_finds(family, length_penalty):
    theirs, ours = pair(family, std=0.4)
    source = torch.randint(3, 40, (6, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(12) < torch.tensor([12, 5, 9, 1, 12, 7])[:, None]
    lengths = set()
    for beams, end_bias in itertools.product((1, 2, 5), (2, 5, 8)):  # ends that come early and late
        for bias in (theirs.final_logits_bias[0], ours.head.bias.data):
            bias.zero_()[2] = end_bias
        expected = theirs.generate(
            input_ids=source, attention_mask=mask.long(), num_beams=beams, do_sample=False, max_new_tokens=10,
            length_penalty=length_penalty,
        )  # fmt: skip
        found = ours.generate(source, mask, 0, 2, max_new_tokens=10, beams=beams, length_penalty=length_penalty)
        assert [trim(row, 2) for row in found] == [trim(row, 2) for row in expected]
        assert found.shape[1] == max(len(trim(row, 2)) for row in found)
        lengths |= {len(trim(row, 2)) for row in found}
    assert len(lengths) > 3


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_with_enough_beams_nothing_is_better(length_penalty):
    """Of a vocabulary of four tokens, one of them the end, all continuations of up to three tokens."""
    table = {
        tokens: torch.randn(4, generator=torch.Generator().manual_seed(hash(tokens) % 1000)).log_softmax(-1)
        for n in range(4)
        for tokens in itertools.product(range(4), repeat=n)
    }
    starts = torch.tensor([[0, 1], [2, 2]])

    def step(tokens: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        return torch.stack([table[tuple(row[2:])].roll(row[0]) for row in tokens.tolist()])

    def score(start: int, tokens: tuple[int, ...]) -> float:
        log_probs = [table[tokens[:i]].roll(start)[token] for i, token in enumerate(tokens)]
        return sum(log_probs).item() / len(tokens) ** length_penalty

    everything = [
        tokens
        for n in (1, 2, 3)
        for tokens in itertools.product(range(4), repeat=n)
        if 3 not in tokens[:-1] and (n == 3 or tokens[-1] == 3)
    ]
    # As many beams as continuations: fewer of them finished would end the search, whose rule is a heuristic
    found = beam_search(step, starts, beams=40, max_new_tokens=3, end_token=3, length_penalty=length_penalty)
    for start, row in zip(starts[:, 0].tolist(), found, strict=True):
        best = max(everything, key=lambda tokens: score(start, tokens))
        assert trim(row, 3, start=2)[2:] == list(best)


def test_one_beam_is_greedy():
    seq2seq = model().eval()
    source = torch.randint(50, (4, 9))
    greedy = seq2seq.generate(source, None, 1, 2, max_new_tokens=12)
    step = seq2seq.step(source, None, max_tokens=12)
    beam = beam_search(step, torch.ones(4, 1, dtype=torch.int64), beams=1, max_new_tokens=12, end_token=2)
    assert torch.equal(greedy, beam)


def test_rows_of_a_batch_do_not_touch():
    seq2seq = model().eval()
    source = torch.randint(50, (4, 9))
    together = seq2seq.generate(source, None, 1, 2, max_new_tokens=12, beams=3)
    for row, alone in zip(together, source[:, None], strict=True):
        single = seq2seq.generate(alone, None, 1, 2, max_new_tokens=12, beams=3)
        assert trim(single[0], 2) == trim(row, 2)


def test_when_the_start_is_the_end_token():
    """As BART's is. The search ends once both beams have, and nothing better can come."""
    calls = []

    def step(tokens: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        calls.append(tokens.shape)
        return torch.tensor([0.0, 1.0, 5.0]).expand(len(tokens), 3)

    found = beam_search(step, torch.tensor([[2]]), beams=2, max_new_tokens=9, end_token=2)
    assert found.tolist() == [[2, 2]]
    assert calls == [(2, 1), (2, 2)]
