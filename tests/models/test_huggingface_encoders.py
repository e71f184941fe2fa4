"""BERT, ViT and DeiT: the same logits as transformers, both ways."""

import dataclasses
import json

import pytest
import torch

from sparse_pretrain.config_models import BertConfig, ViTConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models import huggingface
from sparse_pretrain.models.bert import Bert
from sparse_pretrain.models.heads import SpanPredictor, TextClassifier
from sparse_pretrain.models.vit import ViT
from tests.models.hugging_face import ours_of, randomize, theirs_of

transformers = pytest.importorskip("transformers")

VOCAB = 67
DRAW = torch.Generator().manual_seed(1)
TOKENS = torch.randint(VOCAB, (3, 20), generator=DRAW)
TYPES = torch.randint(2, (3, 20), generator=DRAW)
MASK = torch.ones(3, 20, dtype=torch.bool)
MASK[1, 13:] = False
IMAGES = torch.randn(2, 3, 16, 16, generator=DRAW)
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56}
SMALL_BERT = SMALL | {"vocab_size": VOCAB, "max_position_embeddings": 24}
SMALL_VIT = SMALL | {"image_size": 16, "patch_size": 4, "num_labels": 5}
OURS_BERT = BertConfig(name="a", n_layer=3, n_head=4, d_model=32, max_seq_len=24)
OURS_VIT = ViTConfig(name="a", n_layer=3, n_head=4, d_model=32, image_size=16, patch_size=4)


@torch.no_grad()
def assert_same_bert(ours, theirs):
    """Padding too: it sees what is no padding."""
    logits = theirs(TOKENS, attention_mask=MASK.long(), token_type_ids=TYPES).logits
    torch.testing.assert_close(ours(TOKENS, MASK, TYPES), logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def assert_same_vit(ours, theirs):
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3}], ids=str
)
def test_their_bert_in_ours(tmp_path, changes):
    theirs = randomize(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL_BERT | changes)))
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tmp_path)
    assert_same_bert(ours, theirs)
    assert ours.head.out.weight is ours.tok_embed.weight


@pytest.mark.parametrize(
    "cfg", [OURS_BERT, dataclasses.replace(OURS_BERT, bias=False, activation="relu2", norm_eps=1e-3, token_types=3)]
)
def test_our_bert_in_theirs_and_back(tmp_path, cfg):
    ours = randomize(Bert(cfg, 128))
    theirs = theirs_of(ours, tmp_path, transformers.BertForMaskedLM)
    assert_same_bert(ours, theirs)
    assert theirs.cls.predictions.decoder.weight is theirs.bert.embeddings.word_embeddings.weight
    assert_same_bert(ours_of(tmp_path), theirs)


def test_heads_of_bert(tmp_path):
    ours = randomize(TextClassifier(Bert(OURS_BERT, 128), classes=3))
    theirs = theirs_of(ours, tmp_path / "classifier", transformers.AutoModelForSequenceClassification)
    with torch.no_grad():
        logits = theirs(TOKENS, attention_mask=MASK.long(), token_type_ids=TYPES).logits
        torch.testing.assert_close(ours(TOKENS, MASK, TYPES), logits, atol=1e-5, rtol=0)
    ours = randomize(TextClassifier(Bert(OURS_BERT, 128), classes=1))
    theirs = theirs_of(ours, tmp_path / "regression", transformers.AutoModelForSequenceClassification)
    assert (theirs.config.problem_type, theirs.config.num_labels) == ("regression", 1)
    ours = randomize(SpanPredictor(Bert(OURS_BERT, 128)))
    theirs = theirs_of(ours, tmp_path / "spans", transformers.AutoModelForQuestionAnswering)
    with torch.no_grad():
        their = theirs(TOKENS, attention_mask=MASK.long(), token_type_ids=TYPES)
        logits = torch.stack((their.start_logits, their.end_logits), 1).masked_fill(~MASK[:, None], -torch.inf)
        torch.testing.assert_close(ours(TOKENS, MASK, TYPES), logits, atol=1e-5, rtol=0)


def test_bodies_and_other_heads(tmp_path):
    """What there is no place for is said, as is what begins anew."""
    theirs = randomize(transformers.BertModel(transformers.BertConfig(**SMALL_BERT)))
    theirs.save_pretrained(tmp_path / "body")
    loaded = huggingface.load(tmp_path / "body")
    assert loaded.left_behind == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    assert loaded.missing == (
        "head.dense.weight", "head.dense.bias", "head.norm.weight", "head.norm.bias", "head.out.bias",
    )  # fmt: skip
    ours = huggingface.build(loaded.cfg).eval()
    ours.load_state_dict(loaded.state_dict, strict=False)
    with torch.no_grad():
        hidden = theirs(TOKENS, attention_mask=MASK.long(), token_type_ids=TYPES).last_hidden_state
        torch.testing.assert_close(ours.hidden(TOKENS, MASK, TYPES), hidden, atol=1e-5, rtol=0)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SMALL_BERT))
    theirs.save_pretrained(tmp_path / "both")
    loaded = huggingface.load(tmp_path / "both")
    assert loaded.missing == ()
    assert "cls.seq_relationship.weight" in loaded.left_behind


def test_names_of_tensorflow(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = randomize(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL_BERT)))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for n in tensors
    }
    assert old - tensors.keys()
    save_file(
        {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in tensors.items()
        },
        path,
    )
    assert_same_bert(ours_of(tmp_path), theirs)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "num_channels": 3, "hidden_act": "relu"}], ids=str)
@pytest.mark.parametrize("name", ["ViT", "DeiT"])
def test_their_vit_in_ours(tmp_path, name, changes):
    config = getattr(transformers, f"{name}Config")(**SMALL_VIT | changes)
    cls = (
        transformers.ViTForImageClassification if name == "ViT" else transformers.DeiTForImageClassificationWithTeacher
    )
    theirs = randomize(cls(config))
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tmp_path)
    assert len(ours.head.weight) == 5
    assert_same_vit(ours, theirs)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("changes", [{}, {"bias": False, "d_ff": 40, "activation": "gelu"}], ids=str)
def test_our_vit_in_theirs_and_back(tmp_path, distilled, changes):
    ours = randomize(ViT(dataclasses.replace(OURS_VIT, distillation_token=distilled, **changes), num_classes=5))
    names = list("abcde")
    cls = transformers.DeiTForImageClassificationWithTeacher if distilled else transformers.ViTForImageClassification
    theirs = theirs_of(ours, tmp_path, cls, labels=names)
    assert list(theirs.config.id2label.values()) == names
    assert_same_vit(ours, theirs)
    assert_same_vit(ours_of(tmp_path), theirs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Bert(dataclasses.replace(OURS_BERT, norm_place="pre"), 64), "model.norm_place: found pre; allowed: post. BERT"),
        (lambda: Bert(dataclasses.replace(OURS_BERT, activation="geglu"), 64), "model.activation: found geglu; allowed: gelu, gelu_erf"),
        (lambda: Bert(dataclasses.replace(OURS_BERT, norm="rms_norm", bias=False), 64), "model.norm: found rms_norm; allowed: layer_norm"),
        (lambda: ViT(dataclasses.replace(OURS_VIT, activation="swiglu"), 5), "model.activation: found swiglu"),
        (lambda: ViT(dataclasses.replace(OURS_VIT, norm="rms_norm"), 5), "model.norm: found rms_norm; allowed: layer_norm. ViT"),
    ],
)  # fmt: skip
def test_what_they_cannot_hold(model, message):
    with pytest.raises(UserError) as error:
        huggingface.convert(model())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (transformers.BertConfig(**SMALL_BERT), {"position_embedding_type": "relative_key"}, "position_embedding_type=relative_key; allowed: absolute"),
        (transformers.BertConfig(**SMALL_BERT), {"is_decoder": True}, "is_decoder=True; allowed: False"),
        (transformers.BertConfig(**SMALL_BERT), {"tie_word_embeddings": False}, "tie_word_embeddings=False; allowed: True"),
        (transformers.ViTConfig(**SMALL_VIT), {"patch_size": [4, 8]}, "patch_size=[4, 8]; allowed: a whole number"),
        (transformers.DeiTConfig(**SMALL_VIT), {"architectures": ["DeiTForImageClassification"]}, "DeiTForImageClassificationWithTeacher"),
    ],
)  # fmt: skip
def test_what_ours_cannot_hold(tmp_path, config, values, message):
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(UserError) as error:
        huggingface.load(tmp_path)
    assert message in str(error.value)
