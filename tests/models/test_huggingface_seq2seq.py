"""BART and Marian: the same logits as transformers, both ways."""

import dataclasses
import json

import pytest
import torch

from sparse_pretrain.config_models import Seq2SeqConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models import huggingface
from sparse_pretrain.models.seq2seq import Seq2Seq
from tests.models.hugging_face import ours_of, randomize, theirs_of

transformers = pytest.importorskip("transformers")

VOCAB = 67
DRAW = torch.Generator().manual_seed(1)
SOURCE = torch.randint(VOCAB, (3, 20), generator=DRAW)
TARGET = torch.randint(VOCAB, (3, 11), generator=DRAW)
MASK = torch.ones(3, 20, dtype=torch.bool)
MASK[1, 13:] = False
SMALL = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56, "max_position_embeddings": 24,
    "pad_token_id": 1, "decoder_start_token_id": 2, "eos_token_id": 2, "bos_token_id": 0,
}  # fmt: skip
MODELS = {"bart": "BartForConditionalGeneration", "marian": "MarianMTModel"}
OURS = {
    "bart": Seq2SeqConfig(name="a", n_layer=2, n_decoder_layer=3, n_head=4, d_model=32, max_seq_len=24, position="learned", embedding_norm=True, activation="gelu_erf"),
    "marian": Seq2SeqConfig(name="a", n_layer=2, n_decoder_layer=3, n_head=4, d_model=32, max_seq_len=24),
}  # fmt: skip
IDS = {
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "forced_eos_token_id": None,
}


@torch.no_grad()
def assert_same(ours, theirs):
    logits = theirs(SOURCE, attention_mask=MASK.long(), decoder_input_ids=TARGET).logits
    torch.testing.assert_close(ours(SOURCE, TARGET, MASK), logits, atol=1e-5, rtol=0)
    logits = theirs(SOURCE, decoder_input_ids=TARGET).logits
    torch.testing.assert_close(ours(SOURCE, TARGET), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"scale_embedding": True, "activation_function": "swish"}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_theirs_in_ours(tmp_path, name, changes):
    config = transformers.AutoConfig.for_model(name, **SMALL | changes)
    theirs = randomize(getattr(transformers, MODELS[name])(config))
    assert theirs.final_logits_bias.abs().max() > 0.1
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tmp_path)
    assert_same(ours, theirs)
    assert ours.head.weight is ours.tok_embed.weight


@pytest.mark.parametrize("changes", [{}, {"bias": False, "scale_embedding": False, "n_decoder_layer": None}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_ours_in_theirs_and_back(tmp_path, name, changes):
    ours = randomize(Seq2Seq(dataclasses.replace(OURS[name], **changes), 128))
    theirs = theirs_of(ours, tmp_path, getattr(transformers, MODELS[name]), **IDS)
    assert_same(ours, theirs)
    assert theirs.lm_head.weight is theirs.model.encoder.embed_tokens.weight is theirs.model.decoder.embed_tokens.weight
    for beams in (1, 3):
        # An early end lets both libraries stop at different lengths: there is none here.
        mine = ours.generate(SOURCE, MASK, start_token=2, end_token=127, max_new_tokens=8, beams=beams)
        their = theirs.generate(
            SOURCE, attention_mask=MASK.long(), max_new_tokens=8, num_beams=beams, do_sample=False, eos_token_id=127
        )
        torch.testing.assert_close(mine, their)
    assert_same(ours_of(tmp_path), theirs)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bart", {"norm_place": "pre"}, "model.norm_place: found pre; allowed: post. BART"),
        ("bart", {"embedding_norm": False}, "model.embedding_norm: found false; allowed: true. BART"),
        ("marian", {"embedding_norm": True}, "model.embedding_norm: found true; allowed: false. Marian"),
        ("marian", {"norm_eps": 1e-6}, "model.norm_eps: found 1e-06; allowed: 1e-05"),
        ("marian", {"norm": "rms_norm"}, "model.norm: found rms_norm; allowed: layer_norm"),
        ("marian", {"activation": "swiglu"}, "model.activation: found swiglu"),
    ],
)
def test_what_they_cannot_hold(name, changes, message):
    with pytest.raises(UserError) as error:
        huggingface.convert(Seq2Seq(dataclasses.replace(OURS[name], **changes), 64))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("bart", {"decoder_attention_heads": 8}, "decoder_attention_heads=8; allowed: 4"),
        ("bart", {"decoder_ffn_dim": 64}, "decoder_ffn_dim=64; allowed: 56"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings=False; allowed: True"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=False"),
        ("marian", {"decoder_vocab_size": 99}, "decoder_vocab_size=99; allowed: 67"),
    ],
)
def test_what_ours_cannot_hold(tmp_path, name, values, message):
    transformers.AutoConfig.for_model(name, **SMALL).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError) as error:
        huggingface.load(tmp_path)
    assert message in str(error.value)
