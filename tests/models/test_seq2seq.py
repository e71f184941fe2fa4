"""The encoder-decoder: causal, blind to padding, equal to transformers' BART and Marian, learns to copy."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

from sparse_pretrain import crosscheck
from sparse_pretrain.config_models import GPTConfig, Seq2SeqConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models.blocks import SinusoidalPositions
from sparse_pretrain.models.seq2seq import Seq2Seq
from sparse_pretrain.paths import config_dir
from sparse_pretrain.schema import load
from sparse_pretrain.sparsity import load_recipe, sparsify
from tests.models.by_hand import fill_seq2seq, randomize

TINY = Seq2SeqConfig(name="tiny", n_layer=2, n_head=4, d_model=32, max_seq_len=16)
VARIANTS = {
    "transformer": {},
    "bart": {"position": "learned", "embedding_norm": True, "scale_embedding": False, "activation": "gelu_erf"},
    "pre-norm-gated": {"norm_place": "pre", "activation": "swiglu", "norm": "rms_norm", "bias": False},
    "shallow-decoder": {"n_decoder_layer": 1},
}


def model(**changes) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(replace(TINY, **changes), vocab_size=50)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_target_token_sees_those_before_it_and_the_source_but_no_padding(changes):
    seq2seq = model(**changes).eval()
    source, target = torch.randint(50, (2, 12)), torch.randint(50, (2, 9))
    before = seq2seq(source, target)
    assert before.shape == (2, 9, 50)
    changed = target.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    after = seq2seq(source, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()
    changed = source.clone()
    changed[:, 11] = (changed[:, 11] + 1) % 50
    assert not torch.isclose(before, seq2seq(changed, target)).all(-1).any()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 7:] = False
    padded = seq2seq(source, target, mask)
    torch.testing.assert_close(padded[:1], seq2seq(source[:1, :7], target[:1]))
    torch.testing.assert_close(padded[1], before[1])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_gets_a_gradient_with_checkpointing_the_same(changes):
    source, target, mask = torch.randint(50, (2, 16)), torch.randint(50, (2, 16)), torch.arange(16).expand(2, 16) < 13
    grads = []
    for checkpointing in (False, True):
        seq2seq = model(activation_checkpointing=checkpointing, **changes)
        seq2seq(source, target, mask).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in seq2seq.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in seq2seq.parameters()]))
    assert torch.equal(*grads)


def test_positions_are_marians_and_up_to_their_order_the_papers():
    table = SinusoidalPositions(10, 8)(torch.arange(10))
    for position in range(10):
        for i in range(4):
            angle = torch.tensor(position / 10000 ** (2 * i / 8))
            torch.testing.assert_close(table[position, i], angle.sin())
            torch.testing.assert_close(table[position, 4 + i], angle.cos())


@pytest.mark.parametrize(
    ("family", "scale"), [("bart", False), ("bart", True), ("marian", True)], ids=["bart", "bart-scaled", "marian"]
)
def test_it_is_transformers(family, scale):
    theirs, ours = pair(family, scale)
    source, target = torch.randint(3, 40, (3, 12)), torch.randint(3, 40, (3, 9))
    mask = torch.arange(12) < torch.tensor([12, 5, 9])[:, None]
    expected = theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(ours(source, target, mask), expected, atol=1e-5, rtol=1e-5)


def pair(family: str, scale: bool = True, std: float = 0.2):
    """transformers' model with random weights, 40 tokens (0 pads and starts, 2 ends), and ours with the same."""
    transformers = pytest.importorskip("transformers")
    options = {
        "vocab_size": 40, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 16,
        "scale_embedding": scale, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
        "forced_eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(1)
    if family == "bart":
        theirs = transformers.BartForConditionalGeneration(transformers.BartConfig(**options))
        changes = {"position": "learned", "embedding_norm": True, "activation": "gelu_erf"}
    else:
        theirs = transformers.MarianMTModel(transformers.MarianConfig(**options, activation_function="swish"))
        changes = {"activation": "silu"}
    randomize(theirs, std)
    cfg = replace(TINY, n_decoder_layer=1, d_ff=48, scale_embedding=scale, **changes)
    ours = Seq2Seq(cfg, vocab_size=40).eval()
    fill_seq2seq(ours, theirs)
    return theirs, ours


# Vaswani et al. 2017, table 3, for about 37000 tokens: 65 and 213 million.
@pytest.mark.parametrize(("name", "millions"), [("transformer_base", 63.1), ("transformer_big", 214.3)])
def test_sizes_are_as_published(name, millions):
    cfg = load(Seq2SeqConfig, yaml.safe_load((config_dir() / "model" / f"{name}.yaml").read_text()))
    with torch.device("meta"):
        seq2seq = Seq2Seq(cfg, 37000)
    assert sum(p.numel() for p in seq2seq.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_initial_weights_are_fairseqs():
    seq2seq = model(d_model=64, position="learned")
    for name, module in seq2seq.named_modules():
        if isinstance(module, torch.nn.Embedding):
            assert module.weight.std().item() == pytest.approx(64**-0.5, rel=0.1), name
        elif isinstance(module, torch.nn.Linear):
            if name != "head":  # whose weights are the embedding's
                bound = (6 / sum(module.weight.shape)) ** 0.5
                assert 0.99 * bound < module.weight.abs().max() <= bound, name
            assert (module.bias == 0).all(), name


def test_its_ffn_layers_become_sparse():
    rows = sparsify(model(), load_recipe("ste"))
    sparse = [row.name for row in rows if row.sparse]
    assert sparse == [
        f"{side}.blocks.{i}.ffn.{part}" for side in ("encoder", "decoder") for i in range(2) for part in ("up", "down")
    ]


@pytest.mark.parametrize("recipe", ["dense", "ste"])
def test_it_learns_to_copy(recipe):
    """The source's tokens, in order; then generates them, greedily and by beam search, from a padded batch."""
    seq2seq = model(norm_place="pre")
    sparsify(seq2seq, load_recipe(recipe))
    optimizer = torch.optim.AdamW(seq2seq.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        source = torch.randint(3, 11, (32, 4), generator=draw)
        target = F.pad(F.pad(source, (1, 0), value=1), (0, 1), value=2)
        loss = F.cross_entropy(seq2seq(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    source = torch.randint(3, 11, (8, 4), generator=draw)
    padded, mask = F.pad(source, (0, 3)), torch.arange(7).expand(8, 7) < 4
    for beams in (1, 3):
        copies = seq2seq.generate(padded, mask, start_token=1, end_token=2, max_new_tokens=8, beams=beams)
        assert (copies[:, 1:5] == source).float().mean() > 0.8


def test_options_that_do_not_fit(tiny):
    cfg = tiny("dense")
    for wrong, message in (
        (replace(TINY, position="rotary"), r"model.position: found rotary with model.family=seq2seq; allowed: learned"),
        (replace(TINY, d_model=33, n_head=3), r"model.d_model: found 33 with sinusoidal positions; allowed: an even"),
        (
            GPTConfig(name="tiny", n_layer=1, n_head=2, d_model=16, position="sinusoidal"),
            r"model.position: found sinusoidal with model.family=gpt; allowed: learned",
        ),
    ):
        with pytest.raises(UserError, match=message):
            crosscheck.check(replace(cfg, model=wrong))
