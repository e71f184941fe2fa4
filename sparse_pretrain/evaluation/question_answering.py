"""Extractive question answering: the span that a model means, and SQuAD's two scores of it."""

from __future__ import annotations

import heapq
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

N_BEST = 20
MAX_ANSWER_TOKENS = 30
ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AnswerWindow:
    """What the model says of one window of a context.

    start, end: a logit for each token, that the answer starts or ends there. offsets: of each token where in the
    context its characters begin and end (exclusive), None for one that is not of the context (question, pads).
    """

    start: Sequence[float]
    end: Sequence[float]
    offsets: Sequence[tuple[int, int] | None]


def best_answer(context: str, windows: Sequence[AnswerWindow]) -> str:
    """The likeliest answer, cut out of `context`: the span with the largest start + end logits of all the windows of
    one question.

    As BERT's run_squad and the run_qa example of transformers: of each window the 20 likeliest starts and ends are
    paired, and a pair counts if both tokens are of the context, the end is not before the start and the answer has at
    most 30 tokens. "" if no pair counts.
    """
    best, answer = float("-inf"), ""
    for window in windows:
        starts, ends = (
            heapq.nlargest(N_BEST, range(len(logits)), key=logits.__getitem__) for logits in (window.start, window.end)
        )
        for start in starts:
            for end in ends:
                first, last = window.offsets[start], window.offsets[end]
                score = window.start[start] + window.end[end]
                if first and last and 0 <= end - start < MAX_ANSWER_TOKENS and score > best:
                    best, answer = score, context[first[0] : last[1]]
    return answer


def squad_scores(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 of SQuAD v1.1 in percent, over all questions of `answers`; one not predicted scores 0.

    The scores of Rajpurkar et al. 2016 (§6.1) as the official evaluation script v1.1 computes them: without case,
    punctuation, articles and runs of whitespace; the best over the true answers of a question. Written out here
    because torchmetrics 1.9 follows the rule of v2.0 for answers of which nothing is left then: F1 1, not 0.

    Args:
        predictions: an answer by id of question.
        answers: by id at least one question with at least one true answer each.
    """
    exact = overlap = 0.0
    for question, truths in answers.items():
        if question in predictions:
            words = _normalized_words(predictions[question])
            exact += max(words == _normalized_words(truth) for truth in truths)
            overlap += max(_f1(words, _normalized_words(truth)) for truth in truths)
    return {"exact_match": 100 * exact / len(answers), "f1": 100 * overlap / len(answers)}


def _normalized_words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split()


def _f1(predicted: list[str], truth: list[str]) -> float:
    common = (Counter(predicted) & Counter(truth)).total()
    return 2 * common / (len(predicted) + len(truth)) if common else 0.0
