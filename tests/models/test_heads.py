"""Heads for fine-tuning: equal to transformers', blind to padding, every parameter trained."""

import pytest
import torch
import torch.nn.functional as F

from sparse_pretrain.models.heads import SpanPredictor, TextClassifier
from tests.models.by_hand import bert_body, randomize
from tests.models.test_bert import model as bert_model
from tests.models.test_gpt import model as gpt_model

BODIES = {"bert": bert_model, "gpt": gpt_model, "gpt-untied": lambda: gpt_model(tied_embeddings=False)}


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.arange(16) < torch.tensor([16, 9, 4])[:batch, None]
    return torch.randint(50, (batch, 16)), mask, torch.randint(2, (batch, 16))


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("head", [lambda body: TextClassifier(body, 3), SpanPredictor], ids=["classes", "spans"])
def test_padding_changes_nothing_and_every_parameter_is_trained(body, head):
    model = head(body()).eval()
    tokens, mask, types = inputs()
    logits = model(tokens, mask, types)
    assert logits.shape == ((3, 3) if isinstance(model, TextClassifier) else (3, 2, 16))
    for row, length in enumerate((16, 9, 4)):
        alone = model(*(value[row : row + 1, :length] for value in (tokens, mask, types)))
        torch.testing.assert_close(logits[row : row + 1, ..., :length], alone)
        if isinstance(model, SpanPredictor):
            assert (logits[row, :, length:] == -torch.inf).all()
    labels = torch.tensor([0, 1, 2] if isinstance(model, TextClassifier) else [3, 8, 0, 4, 2, 1])
    F.cross_entropy(logits.flatten(0, -2), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_classes_are_transformers_berts():
    transformers = pytest.importorskip("transformers")
    theirs = randomize(
        transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                max_position_embeddings=16, num_labels=3,
            )
        )
    )  # fmt: skip
    ours, state = TextClassifier(bert_model(), 3).eval(), theirs.state_dict()
    ours.body.load_state_dict(bert_body(state, 2))
    ours.pooler.load_state_dict({kind: state[f"bert.pooler.dense.{kind}"] for kind in ("weight", "bias")})
    ours.classifier.load_state_dict({kind: state[f"classifier.{kind}"] for kind in ("weight", "bias")})
    tokens, mask, types = inputs()
    expected = theirs(tokens, mask.long(), types).logits
    torch.testing.assert_close(ours(tokens, mask, types), expected, atol=1e-5, rtol=1e-5)


def test_a_gpt_classifies_by_its_last_token():
    classifier = TextClassifier(gpt_model(), 1).eval()
    tokens, mask, types = inputs()
    hidden = classifier.body.hidden(tokens)
    last = torch.stack([hidden[0, 15], hidden[1, 8], hidden[2, 3]])
    torch.testing.assert_close(classifier(tokens, mask, types), last @ classifier.classifier.weight.T)


def test_it_learns_which_token_came_first():
    torch.manual_seed(0)
    classifier = TextClassifier(bert_model(), 2)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        tokens, mask = torch.randint(2, 50, (32, 6)), torch.ones(32, 6, dtype=torch.bool)
        labels = tokens[:, 0] % 2
        loss = F.cross_entropy(classifier(tokens, mask), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
