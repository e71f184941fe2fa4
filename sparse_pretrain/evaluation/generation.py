"""Metrics of generated text, by the libraries that published numbers come from (extra `metrics`).

All scores are in percent, over a whole set. `references` holds for each prediction the texts it may be: one for
translation, several for E2E, where all references of one meaning representation belong to its one prediction.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from types import ModuleType
from typing import Any

from sparse_pretrain.errors import UserError

LIBRARIES = ("sacrebleu", "rouge_score.rouge_scorer", "nltk.translate.meteor_score")


@dataclass(frozen=True)
class Score:
    """A score and sacreBLEU's signature of it: everything that must be equal for two scores to be compared."""

    value: float
    signature: str


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], lowercase: bool = False) -> Score:
    """Corpus BLEU of detokenized text (Papineni et al. 2002; Post 2018): 13a tokens, exponential smoothing, n-grams
    clipped by the reference that has most of them, the reference nearest in length for the brevity penalty.

    Raises:
        UserError: sacrebleu is not installed.
        ValueError: not as many predictions as lists of references, none at all, or one without references.
    """
    return _sacrebleu(_library("sacrebleu").metrics.BLEU(lowercase=lowercase), predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """chrF2 (Popović 2015): F-score of character 1- to 6-grams, the best reference counting. Raises as `bleu` does."""
    return _sacrebleu(_library("sacrebleu").metrics.CHRF(), predictions, references)


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin 2004) as `rouge1`, `rouge2`, `rougeL`: the mean over predictions of the F-score against
    the reference that gives the best, without stemming.

    Raises:
        UserError: rouge-score is not installed.
        ValueError: as `bleu`.
    """
    _check(predictions, references)
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(names)
    scores = [scorer.score_multi(texts, text) for text, texts in zip(predictions, references, strict=True)]
    return {name: 100 * fmean(score[name].fmeasure for score in scores) for name in names}


class _NoSynonyms:
    """In place of WordNet, which nltk would have to download."""

    def synsets(self, word: str) -> list[Any]:
        return []


def meteor_exact_stem(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR (Lavie and Agarwal 2007) by nltk with its first two matchers, equal words and equal Porter stems, and not
    the third, synonyms: lower than METEOR, and not to be compared with it. The mean over predictions of the best
    reference; tokens are runs of letters and digits, and runs of other signs.

    Raises:
        UserError: nltk is not installed.
        ValueError: as `bleu`.
    """
    _check(predictions, references)
    score = _library("nltk.translate.meteor_score").meteor_score
    split = _library("nltk.tokenize").wordpunct_tokenize
    return 100 * fmean(
        score([split(reference) for reference in texts], split(text), wordnet=_NoSynonyms())
        for text, texts in zip(predictions, references, strict=True)
    )


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions equal to one of their references but for case and whitespace. For WikiSQL, exact match of
    the logical form as text: conditions in another order do not match, and no query is run.

    Raises:
        ValueError: as `bleu`.
    """
    _check(predictions, references)
    return 100 * fmean(_plain(text) in map(_plain, texts) for text, texts in zip(predictions, references, strict=True))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _sacrebleu(metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    _check(predictions, references)
    most = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    value = metric.corpus_score(list(predictions), streams).score
    return Score(value, str(metric.get_signature()))


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(f"{len(predictions)} predictions with {sum(map(bool, references))} lists of references")


def check_installed() -> None:
    """That the libraries are there, to be known before texts are generated.

    Raises:
        UserError: one of them is not.
    """
    for module in LIBRARIES:
        _library(module)


def _library(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0].replace("_", "-")
        hint = "pip install 'sparse-pretrain[metrics]' installs it"
        raise UserError(package, "no such package", f"{package} installed", hint=hint) from error
