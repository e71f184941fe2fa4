"""The windows of a text and its loss against brute force, transformers' own documented method and lm-eval's windows."""

import math
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluation.perplexity import perplexities, text_loss, total_loss, windows
from sparse_pretrain.evaluation.wikitext import detokenize_wikitext
from tests.shared_data import shared_data

CPU = torch.device("cpu")
SHAPES = [(16, 16), (16, 5), (16, 1), (8, 7), (1, 1)]


def loss_of(model, tokens, seq_len, stride, batch_size=4):
    return text_loss(model, tokens, seq_len, stride, batch_size, CPU, nullcontext)


@pytest.mark.parametrize(("seq_len", "stride"), SHAPES)
@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 22, 33, 100])
def test_each_token_but_the_first_is_predicted_once_with_enough_before_it(length, seq_len, stride):
    predicted = {}
    for batch, known in windows(np.arange(length, dtype=np.uint16), seq_len, stride, batch_size=3):
        assert len(batch) <= 3
        assert batch.shape[1] <= seq_len + 1
        assert batch.dtype == torch.int64
        for row in batch.tolist():
            assert row == list(range(row[0], row[-1] + 1))
            for token in row[1 + known :]:
                assert token not in predicted
                predicted[token] = token - row[0]
    assert sorted(predicted) == list(range(1, length))
    for token, before in predicted.items():
        assert min(token, seq_len - stride + 1) <= before <= seq_len


@pytest.mark.parametrize("length", [10, 64, 65, 130])
def test_without_overlap_they_are_those_of_lm_eval(length):
    utils = pytest.importorskip("lm_eval.utils")
    text = list(range(1, length + 1))
    rolling = utils.get_rolling_token_windows(text, prefix_token=0, max_seq_len=32, context_len=1)
    theirs = [(context, predicted) for context, predicted in map(utils.make_disjoint_window, rolling)]
    ours = [row for batch, _ in windows(np.array([0, *text]), 32, 32, 1) for row in batch.tolist()]
    assert [predicted for _, predicted in theirs] == [row[1:] for row in ours]
    # their last window, where it is shorter, is filled up with tokens from before it: more context, never less
    for (context, predicted), row in zip(theirs[:-1], ours[:-1], strict=True):
        assert context + predicted == row


class Recurrent(nn.Module):
    """A causal model that uses all tokens it is given."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(50, 12), nn.GRU(12, 24, batch_first=True), nn.Linear(24, 50)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens):
        return self.head(self.dropout(self.rnn(self.embed(tokens))[0])) * 5


@pytest.mark.parametrize(("seq_len", "stride"), SHAPES)
def test_the_loss_is_the_sum_over_tokens(seq_len, stride):
    torch.manual_seed(0)
    model, tokens = Recurrent(), np.random.default_rng(0).integers(0, 50, 75)
    model.eval()
    expected = 0.0
    for target in range(1, len(tokens)):
        # the first window that reaches it
        window = max(0, math.ceil((target - seq_len) / stride)) * stride
        logits = model(torch.from_numpy(tokens[None, window:target]))[0, -1].double()
        expected -= F.log_softmax(logits, -1)[tokens[target]].item()
    model.train()
    for batch_size in (1, 4):
        assert loss_of(model, tokens, seq_len, stride, batch_size) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_the_loss_is_that_of_whole_sequences_without_overlap():
    torch.manual_seed(0)
    model, tokens = Recurrent(), np.random.default_rng(0).integers(0, 50, 75)
    loss, count = total_loss(model, (batch for batch, _ in windows(tokens, 16, 16, 4)), CPU, nullcontext)
    assert count == 74
    assert loss_of(model, tokens, 16, 16) == pytest.approx(float(loss), rel=1e-7)


def documented_perplexity(model, tokens, max_length, stride):
    """The sliding window of huggingface.co/docs/transformers/perplexity: the perplexity by its weights, and the summed
    loss by the tokens that each window's mean is really over."""
    weighted = weights = exact = count = before = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        labels = tokens[begin:end].clone()
        labels[: -(end - before)] = -100
        with torch.no_grad():
            mean = model(tokens[None, begin:end], labels=labels[None]).loss.item()
        valid = int((labels != -100).sum())
        weighted, weights = weighted + mean * (valid - 1), weights + valid - 1
        really = int((labels[1:] != -100).sum())
        exact, count = exact + mean * really, count + really
        before = end
        if end == len(tokens):
            break
    return math.exp(weighted / weights), exact, count


@pytest.mark.parametrize("spread", [0.02, 0.3])
@pytest.mark.parametrize("stride", [8, 16, 24])
def test_it_is_the_documented_method_of_transformers(stride, spread):
    """Up to that method's weights, which tell the more the more the windows differ."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 60, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": spread}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    tokens = torch.randint(60, (1500,), generator=torch.Generator().manual_seed(1))
    theirs, exact, count = documented_perplexity(model, tokens, 32, stride)
    assert count == len(tokens) - 1

    class Logits(nn.Module):
        def forward(self, inputs):
            return model(inputs).logits

    ours = loss_of(Logits(), tokens.numpy(), 31, stride)
    assert ours == pytest.approx(exact, rel=1e-6)
    assert math.exp(ours / count) == pytest.approx(theirs, rel=1e-4 if spread < 0.1 else 3e-3)


def test_what_cannot_be_measured():
    model, tokens = Recurrent(), np.arange(40)
    for stride in (0, 17):
        with pytest.raises(UserError, match=rf"stride: found {stride}; allowed: 1 to 16"):
            loss_of(model, tokens, 16, stride)
    with pytest.raises(UserError, match="text: found 1 tokens; allowed: at least 2"):
        loss_of(model, tokens[:1], 16, 16)


def test_words_and_bytes_are_those_of_the_text():
    text = " = Ärger = \n\n It cost 1 @,@ 000 . \n"  # 9 words; 35 characters, one of two bytes
    loss = 20 * math.log(8)
    scores = perplexities(loss, 20, text)
    assert scores["perplexity"] == pytest.approx(8)
    assert scores["word_perplexity"] == pytest.approx(8 ** (20 / 9))
    assert scores["bits_per_byte"] == pytest.approx(60 / 36)
    assert math.isfinite(perplexities(1e9, 3, text)["word_perplexity"])


def test_wikitext_reads_as_prose():
    raw = ' = Title = \n \n In 1 @,@ 000 cities ( some @-@ what ) he said , " no " ; the dogs \' 2 @.@ 5 . \n = = Part = = \n'
    assert (
        detokenize_wikitext(raw)
        == ' = Title =\n\nIn 1,000 cities (some-what) he said, "no"; the dogs\' 2.5.\n== Part ==\n'
    )


@pytest.mark.parametrize("name", ["wikitext-103-valid.tokens", "wikitext-2-valid.txt"])
def test_wikitext_is_read_as_lm_eval_does(name):
    preprocess = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    text = shared_data(f"lm/wikitext/{name}").read_text(encoding="utf-8")
    pages = re.split(r"(?<=\n)(?= = [^=\n]+ = \n)", text)
    assert len(pages) == 61  # 60 articles, and a line before them
    assert detokenize_wikitext(text) == "".join(preprocess.wikitext_detokenizer({"page": page}) for page in pages)
