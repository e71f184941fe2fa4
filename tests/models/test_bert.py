"""The encoder: sees both ways and no padding, equals transformers' BERT, learns hidden tokens."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

from sparse_pretrain import crosscheck
from sparse_pretrain.config_models import BertConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models.bert import Bert
from sparse_pretrain.paths import config_dir
from sparse_pretrain.schema import load
from sparse_pretrain.sparsity import load_recipe, sparsify
from tests.models.by_hand import fill_bert, randomize

TINY = BertConfig(name="tiny", n_layer=2, n_head=4, d_model=32, max_seq_len=16)
VARIANTS = {
    "bert": {},
    "pre-norm": {"norm_place": "pre"},
    "gated-rms": {"activation": "swiglu", "norm": "rms_norm", "bias": False},
}


def model(**changes) -> Bert:
    torch.manual_seed(0)
    return Bert(replace(TINY, **changes), vocab_size=50)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_token_sees_all_others_and_no_padding(changes):
    bert = model(**changes).eval()
    tokens, types = torch.randint(50, (2, 16)), torch.randint(2, (2, 16))
    mask = torch.ones(2, 16, dtype=torch.bool)
    whole = bert(tokens, mask, types)
    assert whole.shape == (2, 16, 50)
    torch.testing.assert_close(whole, bert(tokens, token_types=types))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    assert not torch.isclose(bert(changed), bert(tokens)).all(-1).any()
    mask[0, 11:] = False
    padded = bert(tokens, mask, types)
    torch.testing.assert_close(padded[:1, :11], bert(tokens[:1, :11], token_types=types[:1, :11]))
    torch.testing.assert_close(padded[1], whole[1])
    assert not torch.allclose(bert(tokens, mask), padded)  # types count


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_gets_a_gradient_with_checkpointing_the_same(changes):
    tokens, mask = torch.randint(50, (2, 16)), torch.ones(2, 16, dtype=torch.bool)
    mask[1, 5:] = False
    grads = []
    for checkpointing in (False, True):
        bert = model(activation_checkpointing=checkpointing, **changes)
        bert(tokens, mask).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bert.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in bert.parameters()]))
    assert torch.equal(*grads)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_it_is_transformers_bert(activation):
    transformers = pytest.importorskip("transformers")
    theirs = randomize(
        transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                max_position_embeddings=16, hidden_act=activation,
            )
        )
    )  # fmt: skip
    ours = model(d_ff=48, activation={"gelu": "gelu_erf"}.get(activation, activation)).eval()
    fill_bert(ours, theirs)
    tokens, types = torch.randint(50, (3, 16)), torch.randint(2, (3, 16))
    mask = torch.arange(16) < torch.tensor([16, 9, 4])[:, None]
    expected = theirs(tokens, mask.long(), types).logits
    torch.testing.assert_close(ours(tokens, mask, types)[mask], expected[mask], atol=1e-5, rtol=1e-5)


# With the published vocabulary: BertForMaskedLM's numbers in transformers.
@pytest.mark.parametrize(("name", "parameters"), [("bert_base", 109_514_298), ("bert_large", 335_174_458)])
def test_sizes_are_as_published(name, parameters):
    cfg = load(BertConfig, yaml.safe_load((config_dir() / "model" / f"{name}.yaml").read_text()))
    with torch.device("meta"):
        assert sum(p.numel() for p in Bert(cfg, 30522).parameters()) == parameters


def test_its_ffn_layers_become_sparse():
    rows = sparsify(model(), load_recipe("ste"))
    sparse = [row.name for row in rows if row.sparse]
    assert sparse == [f"blocks.{i}.ffn.{part}" for i in range(2) for part in ("up", "down")]


@pytest.mark.parametrize("recipe", ["dense", "ste"])
def test_it_learns_hidden_tokens(recipe):
    """Those of a sequence are all the same token."""
    bert = model()
    sparsify(bert, load_recipe(recipe))
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        tokens = torch.randint(2, 18, (16, 1), generator=draw).expand(-1, 16)
        hidden = torch.rand(16, 16, generator=draw) < 0.3
        logits = bert(tokens.masked_fill(hidden, 1))
        loss = F.cross_entropy(logits[hidden], tokens[hidden])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_options_that_do_not_fit(tiny):
    cfg = tiny("dense")
    with pytest.raises(UserError, match=r"model.n_head: found 5; allowed: a divisor of model.d_model=32"):
        crosscheck.check(replace(cfg, model=replace(TINY, n_head=5)))
