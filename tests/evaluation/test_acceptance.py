"""The acceptance rate against speculative sampling itself, and the command that reports it."""

import math
import re

import pytest
import torch

from sparse_pretrain import evaluate, runs, train
from sparse_pretrain.config import EvaluateConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluation.acceptance import token_acceptance, tokens_per_pass


def test_the_rate_is_that_of_speculative_sampling():
    """A draft token x is accepted with probability min(1, p(x) / q(x)): 200,000 of them in each of 4 contexts, within
    four standard deviations."""
    generator = torch.Generator().manual_seed(0)
    draft, target = (2 * torch.randn(4, 12, generator=generator) for _ in range(2))
    count = 200_000
    q, p = draft.softmax(-1), target.softmax(-1)
    tokens = torch.multinomial(q, count, replacement=True, generator=generator)
    accepted = torch.rand(4, count, generator=generator) < (p / q).gather(-1, tokens)
    rates, _ = token_acceptance(draft, target)
    assert rates.max() - rates.min() > 0.1  # contexts that differ
    deviation = (rates * (1 - rates) / count).sqrt()
    assert ((accepted.double().mean(-1) - rates).abs() < 4 * deviation).all()


def test_the_tokens_of_a_pass_are_those_of_speculative_sampling():
    """Drafts are accepted up to the first that is not; the target's own token comes on top."""
    generator = torch.Generator().manual_seed(0)
    rate, drafted, count = 0.7, 4, 200_000
    accepted = torch.rand(count, drafted, generator=generator) < rate
    tokens = 1 + accepted.long().cumprod(-1).sum(-1).double()
    expected = tokens_per_pass(rate, drafted)
    assert expected == pytest.approx((1 - rate**5) / (1 - rate))
    assert float(tokens.mean()) == pytest.approx(expected, abs=4 * float(tokens.std()) / math.sqrt(count))
    assert tokens_per_pass(1.0, 4) == 5
    assert tokens_per_pass(0.0, 4) == 1


def test_identical_models_agree_and_opposite_ones_do_not():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    sampled, greedy = token_acceptance(logits, logits + 3)
    torch.testing.assert_close(sampled, torch.ones(50))
    assert greedy.tolist() == [1.0] * 50
    sampled, greedy = token_acceptance(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]))
    assert sampled.item() < 1e-20
    assert greedy.item() == 0


@pytest.fixture
def teacher_run(tiny):
    return train.run(tiny("dense", "teacher", seed=5))


def rates(capsys, checkpoint, teacher, **options) -> tuple[float, float, str]:
    evaluate.run(EvaluateConfig(checkpoint=str(checkpoint), teacher=str(teacher), accelerator="cpu", **options))
    output = capsys.readouterr().out
    sampled, greedy = re.search(r"acceptance +([\d.]+) of .* temperature 1, ([\d.]+) of", output).groups()
    return float(sampled), float(greedy), output


def test_a_model_accepts_itself(teacher_run, capsys):
    sampled, greedy, output = rates(capsys, teacher_run, teacher_run)
    assert (sampled, greedy) == (1.0, 1.0)
    assert "1: 2.000  2: 3.000  4: 5.000  8: 9.000" in output


def test_evaluate_reports_what_training_logged(tiny, teacher_run, capsys):
    """Also of a draft whose embedding is padded more."""
    draft = train.run(tiny("ste", "draft", recipe__teacher__models=[str(teacher_run)], model__vocab_size=384))
    logged = float(runs.read_rows(draft / runs.METRICS_FILE)[-1]["val/acceptance"])
    sampled, greedy, output = rates(capsys, draft, teacher_run, batches=2, batch_size=8)
    assert sampled == pytest.approx(logged, abs=1e-6)
    assert 0 < sampled < 1
    assert 0 <= greedy < 1
    assert f"2: {1 + sampled + sampled**2:.3f}" in output


def test_models_that_cannot_be_compared(tiny, teacher_run):
    def refuses(expected, teacher):
        with pytest.raises(UserError, match=expected):
            evaluate.run(EvaluateConfig(checkpoint=str(teacher_run), teacher=str(teacher), accelerator="cpu"))

    other = train.run(tiny("dense", "other", data__vocab_size=300))
    refuses("teacher: found .*other, which has another tokenizer than the checkpoint", other)
    short = train.run(tiny("dense", "short", model__max_seq_len=8, data__seq_len=8))
    refuses("teacher: found .*short, made for sequences of 8; allowed: one for at least seq_len=16", short)
    refuses("teacher: found /nowhere, which holds no whole checkpoint", "/nowhere")
