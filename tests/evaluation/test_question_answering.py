"""SQuAD's scores by hand and against torchmetrics; spans against brute force."""

import json
import random
import warnings
from itertools import pairwise

import numpy as np
import pytest

from sparse_pretrain.evaluation.question_answering import AnswerWindow, best_answer, squad_scores
from tests.shared_data import shared_data


def score(prediction, *truths):
    scores = squad_scores({"q": prediction}, {"q": truths})
    return scores["exact_match"], pytest.approx(scores["f1"])


def test_answers_count_without_case_punctuation_articles_and_spaces():
    assert score("the  Eiffel-Tower!", "EiffelTower") == (100, 100)
    assert score("An apple a day", "apple day.") == (100, 100)
    assert score("theory", "ory") == (0, 0)  # an article is a word of its own
    assert score("in Paris, France", "Paris", "Lyon") == (0, 50)  # precision 1/3, recall 1
    assert score("Paris Paris", "Paris Rome Paris Rome") == (0, pytest.approx(100 * 2 / 3))  # 2 common: 2·2 / (2 + 4)
    assert score("red blue", "blue", "blue red green") == (0, pytest.approx(80))  # the best of 2/3 and 4/5


def test_the_mean_is_over_all_questions():
    truths = {"a": ["one"], "b": ["two"], "c": ["three four"]}
    assert squad_scores({"a": "one", "c": "four", "d": "?"}, truths) == {
        "exact_match": pytest.approx(100 / 3),
        "f1": pytest.approx((100 + 200 / 3) / 3),
    }


def test_an_answer_of_which_nothing_is_left_scores_by_the_rule_of_v1_1():
    assert score("The", "a") == (100, 0)
    assert score("", "word") == (0, 0)


def random_answers(seed):
    draw, words = random.Random(seed), ["The", "cat", "sat,", "on", "a", "mat.", "Mat", "CAT", "«dog»"]
    text = lambda: " ".join(draw.choices(words, k=draw.randint(1, 3))) + " cat"  # noqa: E731
    truths = {str(i): [text() for _ in range(draw.randint(1, 4))] for i in range(150)}
    return {key: text() for key in list(truths)[:140]}, truths


@pytest.mark.parametrize("seed", range(3))
def test_the_scores_are_those_of_torchmetrics(seed):
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    predictions, truths = random_answers(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the questions without an answer
        theirs = squad(
            [{"id": key, "prediction_text": text} for key, text in predictions.items()],
            [
                {"id": key, "answers": {"text": texts, "answer_start": [0] * len(texts)}}
                for key, texts in truths.items()
            ],
        )
    ours = squad_scores(predictions, truths)
    assert 5 < ours["exact_match"] < ours["f1"] < 95
    assert ours == {name: pytest.approx(float(value), abs=1e-4) for name, value in theirs.items()}


def test_the_true_answers_of_xquad_score_100():
    articles = json.loads(shared_data("qa/xquad.en.shared.json").read_text(encoding="utf-8"))["data"]
    questions = [question for article in articles for part in article["paragraphs"] for question in part["qas"]]
    truths = {question["id"]: [answer["text"] for answer in question["answers"]] for question in questions}
    assert len(truths) == 894
    assert squad_scores({key: texts[-1] for key, texts in truths.items()}, truths) == {"exact_match": 100, "f1": 100}
    shifted = dict(zip(truths, [*list(truths.values())[1:], ["nothing"]], strict=True))
    assert squad_scores({key: texts[0] for key, texts in shifted.items()}, truths)["f1"] < 10


CONTEXT = "Ada wrote  the first Program in 1843."
OFFSETS = [(0, 3), (4, 9), (11, 14), (15, 20), (21, 28), (29, 31), (32, 36), (36, 37)]


def window(tokens, starts, ends, question=2):
    """Of the context's tokens [a, b), after a question of two; logits are 0 but where `starts` and `ends` say."""
    offsets = [None] * question + OFFSETS[slice(*tokens)] + [None]
    logits = [[given.get(i - question, 0.0) for i in range(len(offsets))] for given in (starts, ends)]
    return AnswerWindow(logits[0], logits[1], offsets)


def test_the_answer_is_cut_out_of_the_context():
    assert best_answer(CONTEXT, [window((0, 8), {1: 5.0}, {2: 4.0})]) == "wrote  the"
    assert best_answer(CONTEXT, [window((0, 8), {6: 5.0}, {6: 4.0})]) == "1843"


def test_an_end_before_its_start_and_tokens_of_the_question_do_not_count():
    assert best_answer(CONTEXT, [window((0, 8), {4: 5.0, 0: 1.0}, {1: 5.0, 5: 2.0})]) == "Program in"  # 7, before 6
    assert best_answer(CONTEXT, [window((0, 8), {-1: 9.0, 0: 1.0}, {-2: 9.0, 0: 1.0})]) == "Ada"
    assert best_answer(CONTEXT, [window((0, 0), {}, {})]) == ""


def test_the_best_window_of_a_question_wins():
    windows = [window((0, 5), {0: 3.0}, {0: 3.0}), window((3, 8), {1: 3.0}, {1: 4.0})]
    assert best_answer(CONTEXT, windows) == best_answer(CONTEXT, windows[::-1]) == "Program"


def test_the_20_likeliest_starts_are_looked_at():
    def answer(likelier):
        starts = {0: 5.0} | dict.fromkeys(range(-likelier, 0), 9.0)
        return best_answer(CONTEXT, [window((0, 1), starts, {0: 5.0}, question=likelier)])

    assert (answer(19), answer(20)) == ("Ada", "")


def test_an_answer_has_at_most_30_tokens():
    context = "".join(map(chr, range(97, 97 + 26))) * 2
    offsets = [(i, i + 1) for i in range(52)]

    def answer(end):
        ends = [0.0] * 52
        ends[end], ends[10] = 9.0, 5.0
        return best_answer(context, [AnswerWindow([9.0] + [0.0] * 51, ends, offsets)])

    assert answer(29) == context[:30]
    assert answer(30) == context[:11]


@pytest.mark.parametrize("seed", range(20))
def test_spans_as_brute_force_finds_them(seed):
    """Several overlapping windows, in 60 tokens of which only the 20 likeliest starts and ends are looked at."""
    rng = np.random.default_rng(seed)
    context = "".join(rng.choice(list("abcdefghij "), 300))
    cuts = np.sort(rng.choice(np.arange(1, 300), 90, replace=False)).tolist()
    spans = list(pairwise(cuts))
    windows, best = [], (-np.inf, "")
    for first in (0, 20, 30):
        offsets = [None] * 5 + spans[first : first + 50] + [None] * 5
        start, end = rng.normal(size=(2, 60)) * 3
        windows.append(AnswerWindow(start.tolist(), end.tolist(), offsets))
        for i in range(60):
            for j in range(i, min(i + 30, 60)):
                likely = (start > start[i]).sum() < 20 and (end > end[j]).sum() < 20
                if likely and offsets[i] and offsets[j]:
                    best = max(best, (start[i] + end[j], context[offsets[i][0] : offsets[j][1]]))
    assert best_answer(context, windows) == best[1] != ""
