"""Scores of generated text: worked out by hand, by other libraries, and as the papers' examples have them."""

import csv
import importlib
import math
from collections import Counter, defaultdict
from functools import partial

import pytest

from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluation.generation import bleu, check_installed, chrf, exact_match, meteor_exact_stem, rouge
from tests.shared_data import shared_data

# The example in sacreBLEU's README
SYSTEM = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def words(text):
    return text.replace(".", " .").split()


def n_grams(tokens, n):
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def hand_bleu(tokens, references):
    """BLEU without smoothing of tokenized text (Papineni et al. 2002)."""
    matches, totals, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for text, others in zip(tokens, references, strict=True):
        length += len(text)
        reference_length += min((abs(len(other) - len(text)), len(other)) for other in others)[1]
        for n in range(4):
            grams = partial(n_grams, n=n + 1)
            most = Counter()
            for other in others:
                most |= grams(other)
            matches[n] += (grams(text) & most).total()
            totals[n] += grams(text).total()
    penalty = min(0.0, 1 - reference_length / length)
    return 100 * math.exp(penalty + sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4)


def test_bleu_of_sacrebleus_own_example():
    pytest.importorskip("sacrebleu")
    score = bleu(SYSTEM, REFERENCES)
    assert score.value == pytest.approx(48.53, abs=0.005)
    assert score.signature.startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    split, *references = ([words(text) for text in texts] for texts in (SYSTEM, *REFERENCES))
    assert score.value == pytest.approx(hand_bleu(split, references))
    assert bleu([text.upper() for text in SYSTEM], REFERENCES, lowercase=True).value == pytest.approx(
        bleu(SYSTEM, REFERENCES, lowercase=True).value
    )
    assert bleu(["THE DOG BIT THE MAN."], [["the dog bit the man."]]).value < 50


def test_chrf_of_sacrebleus_own_example():
    pytest.importorskip("sacrebleu")
    score = chrf(SYSTEM, REFERENCES)
    assert score.value == pytest.approx(59.73, abs=0.005)
    assert "nc:6|nw:0" in score.signature


def test_as_many_references_as_each_has():
    pytest.importorskip("sacrebleu")
    predictions = ["a cat sat on the mat", "he went home at six"]
    texts = [["the cat sat on the mat", "a cat sat there on it"], ["he went home at five"]]
    score = bleu(predictions, texts)
    split, *references = ([words(text) for text in each] for each in (predictions, *texts))
    assert score.value == pytest.approx(hand_bleu(split, references))
    assert "nrefs:var" in score.signature
    assert chrf(["he went home at five"], texts[1:]).value == pytest.approx(100)


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    scores = rouge(["the cat was found under the bed"], [["the cat was under the bed"]])
    assert scores["rouge1"] == pytest.approx(100 * 12 / 13)  # 6 words in common of 7 and 6
    assert scores["rouge2"] == pytest.approx(100 * 8 / 11)  # 4 pairs of 6 and 5
    assert scores["rougeL"] == pytest.approx(100 * 12 / 13)
    both = rouge(["a b c", "x y"], [["c b a", "a b d"], ["x y"]])
    assert both["rouge1"] == pytest.approx(100)  # the best reference for each kind
    assert both["rouge2"] == pytest.approx((50 + 100) / 2)
    assert both["rougeL"] == pytest.approx(100 * (2 / 3 + 1) / 2)


def meteor(precision, recall, chunks, matches):
    """Lavie and Agarwal 2007 with nltk's parameters, α = 0.9, β = 3, γ = 0.5."""
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return 100 * mean * (1 - 0.5 * (chunks / matches) ** 3)


def test_meteor_matches_words_and_stems_only():
    pytest.importorskip("nltk")
    assert meteor_exact_stem(["The cat sat."], [["the cat sat ."]]) == pytest.approx(meteor(1, 1, 1, 4))
    assert meteor_exact_stem(["dogs barking"], [["dog barked"]]) == pytest.approx(meteor(1, 1, 1, 2))
    assert meteor_exact_stem(["on the mat sat the cat"], [["the cat sat on the mat"]]) < 60
    assert meteor_exact_stem(["a car"], [["an automobile"]]) == 0  # WordNet would know
    one, two = meteor(2 / 3, 2 / 4, 1, 2), meteor(1, 1, 1, 3)
    assert meteor_exact_stem(["big red dog"], [["big red cat here"]]) == pytest.approx(one)
    assert meteor_exact_stem(["big red dog"], [["big red cat here", "big red dog"]]) == pytest.approx(two)


def test_exact_match_of_logical_forms():
    query = "SELECT MAX(score) FROM table WHERE name = 'Ann'"
    assert exact_match([query, query], [[query.lower().replace(" ", "  ")], ["SELECT score FROM table"]]) == 50
    assert exact_match(["b"], [["a", " B\n"]]) == 100


def test_every_reference_of_e2e_scores_full_marks():
    """Real data: some twenty references a meaning representation."""
    for package in ("sacrebleu", "rouge_score"):
        pytest.importorskip(package)
    references = defaultdict(list)
    with shared_data("nlg/e2e/devset.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            references[row["mr"]].append(row["ref"])
    texts = list(references.values())[:40]
    assert max(map(len, texts)) > 5
    predictions = [each[-1] for each in texts]
    assert bleu(predictions, texts).value == pytest.approx(100)
    assert rouge(predictions, texts) == pytest.approx({"rouge1": 100, "rouge2": 100, "rougeL": 100})
    others = [each[:-1] for each in texts if len(each) > 1]
    assert 20 < bleu([each[-1] for each in texts if len(each) > 1], others).value < 95


@pytest.mark.parametrize(
    ("metric", "package"),
    [(bleu, "sacrebleu"), (chrf, "sacrebleu"), (rouge, "rouge-score"), (meteor_exact_stem, "nltk")],
)
def test_a_library_that_is_not_installed(metric, package, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=rf"{package}: .*sparse-pretrain\[metrics\]"):
        metric(["a"], [["a"]])
    with pytest.raises(UserError, match=r"sacrebleu: .*sparse-pretrain\[metrics\]"):
        check_installed()


def test_models_that_write_nothing_score_0():
    for package in ("sacrebleu", "rouge_score", "nltk"):
        pytest.importorskip(package)
    assert bleu([""], [["a b"]]).value == chrf([""], [["a b"]]).value == exact_match([""], [["a b"]]) == 0
    assert rouge([""], [["a b"]]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert meteor_exact_stem(["", "a b"], [["a b"], ["a b", "c"]]) == pytest.approx(meteor(1, 1, 1, 2) / 2)


@pytest.mark.parametrize("references", [[], [["a"], ["b"]], [[]]])
def test_predictions_and_references_that_do_not_belong_together(references):
    for metric in (bleu, rouge, meteor_exact_stem, exact_match):
        module = {"bleu": "sacrebleu", "rouge": "rouge_score", "meteor_exact_stem": "nltk"}.get(metric.__name__)
        if module:
            pytest.importorskip(module)
        with pytest.raises(ValueError, match="1 predictions with"):
            metric(["a"], references)
