"""GPT-2 and Llama: the same logits as transformers, both ways."""

import dataclasses
import json

import pytest
import torch

from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models import huggingface
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.models.heads import SpanPredictor, TextClassifier
from sparse_pretrain.tasks.trained import load_trained
from tests.models.hugging_face import ours_of, randomize, theirs_of

transformers = pytest.importorskip("transformers")

VOCAB = 67  # no multiple of 64
TOKENS = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
SMALL_GPT2 = {"vocab_size": VOCAB, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
SMALL_LLAMA = {"vocab_size": VOCAB, "max_position_embeddings": 24, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4}  # fmt: skip
OURS_GPT2 = GPTConfig(name="a", n_layer=3, n_head=4, d_model=32, max_seq_len=24, bias=True)
OURS_LLAMA = GPTConfig(
    name="a", n_layer=3, n_head=4, n_kv_head=2, d_model=32, max_seq_len=24, norm="rms_norm", activation="swiglu",
    position="rotary", tied_embeddings=False,
)  # fmt: skip


def assert_same(ours, theirs, tokens=TOKENS):
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_inner": 40}, {"tie_word_embeddings": False}, {"activation_function": "relu"}, {"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-3}],
    ids=str,
)  # fmt: skip
def test_their_gpt2_in_ours(tmp_path, changes):
    theirs = randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL_GPT2 | changes)))
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tmp_path)
    assert_same(ours, theirs)
    tied = changes.get("tie_word_embeddings", True)
    assert (ours.head.weight is ours.tok_embed.weight) == tied


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1, "tie_word_embeddings": True}, {"rope_theta": 5e5},
        {"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}, {"rms_norm_eps": 1e-2},
        {"hidden_act": "gelu_pytorch_tanh"}, {"head_dim": 8},
    ],
    ids=str,
)  # fmt: skip
def test_their_llama_in_ours(tmp_path, changes):
    theirs = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL_LLAMA | changes)))
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tmp_path)
    assert_same(ours, theirs)
    assert (ours.head.weight is ours.tok_embed.weight) == changes.get("tie_word_embeddings", False)
    assert ours.cfg.rope_theta == changes.get("rope_theta", 1e4)


@pytest.mark.parametrize(
    ("cfg", "cls"),
    [
        (OURS_GPT2, "GPT2LMHeadModel"),
        (dataclasses.replace(OURS_GPT2, bias=False, tied_embeddings=False), "GPT2LMHeadModel"),
        (dataclasses.replace(OURS_GPT2, activation="relu2", d_ff=48, norm_eps=1e-3, n_kv_head=4), "GPT2LMHeadModel"),
        (dataclasses.replace(OURS_GPT2, activation="silu"), "GPT2LMHeadModel"),
        (OURS_LLAMA, "LlamaForCausalLM"),
        (dataclasses.replace(OURS_LLAMA, tied_embeddings=True, n_kv_head=None), "LlamaForCausalLM"),
        (dataclasses.replace(OURS_LLAMA, bias=True, activation="geglu", rope_theta=5e5), "LlamaForCausalLM"),
    ],
)
def test_ours_in_theirs_and_back(tmp_path, cfg, cls):
    ours = randomize(GPT(cfg, 128))
    theirs = theirs_of(ours, tmp_path, getattr(transformers, cls), eos_token_id=1, pad_token_id=0)
    assert_same(ours, theirs)
    tied = theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    assert tied == cfg.tied_embeddings
    generated = theirs.generate(TOKENS[:1, :4], max_new_tokens=12, do_sample=False, eos_token_id=None)
    torch.testing.assert_close(ours.generate(TOKENS[:1, :4], 12, temperature=0), generated)
    again = ours_of(tmp_path)
    assert_same(again, theirs)
    lost = {"name", "bias", "vocab_size", "d_ff", "n_kv_head"}  # biases that were not there are zeros
    assert {k: v for k, v in vars(again.cfg).items() if k not in lost} == {
        k: v for k, v in vars(cfg).items() if k not in lost
    }


@pytest.mark.parametrize("cfg", [OURS_GPT2, OURS_LLAMA], ids=["gpt2", "llama"])
def test_classifiers(tmp_path, cfg):
    ours = randomize(TextClassifier(GPT(cfg, 128), classes=3))
    cls = transformers.AutoModelForSequenceClassification
    theirs = theirs_of(ours, tmp_path, cls, labels=["a", "b", "c"], pad_token_id=127)
    tokens, mask = TOKENS.clone(), torch.ones_like(TOKENS, dtype=torch.bool)
    tokens[1, 15:], mask[1, 15:] = 127, False
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tokens, mask), theirs(tokens, attention_mask=mask.long()).logits, atol=1e-5, rtol=0
        )
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_spans_of_gpt2(tmp_path):
    ours = randomize(SpanPredictor(GPT(OURS_GPT2, 128)))
    theirs = theirs_of(ours, tmp_path, transformers.AutoModelForQuestionAnswering)
    with torch.no_grad():
        logits, their = ours(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool)), theirs(TOKENS)
    torch.testing.assert_close(logits, torch.stack((their.start_logits, their.end_logits), 1), atol=1e-5, rtol=0)


def test_llama_has_no_head_for_spans():
    with pytest.raises(
        UserError, match="checkpoint: found a llama with a head for spans; allowed: pre-training, classifier"
    ):
        huggingface.convert(SpanPredictor(GPT(OURS_LLAMA, 128)))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (dataclasses.replace(OURS_GPT2, norm="rms_norm"), "model.norm: found rms_norm; allowed: layer_norm. GPT-2 is the"),
        (dataclasses.replace(OURS_GPT2, activation="geglu"), "model.activation: found geglu; allowed: gelu, gelu_erf, relu"),
        (dataclasses.replace(OURS_GPT2, n_kv_head=2), "model.n_kv_head: found 2; allowed: null, 4"),
        (dataclasses.replace(OURS_LLAMA, activation="relu2"), "model.activation: found relu2; allowed: swiglu, geglu. Llama"),
        (dataclasses.replace(OURS_LLAMA, norm="layer_norm"), "model.norm: found layer_norm; allowed: rms_norm"),
        (dataclasses.replace(OURS_GPT2, activation="relu2", activation_sparsity="2:4"), "model.activation_sparsity: found 2:4; allowed: none"),
    ],
)  # fmt: skip
def test_what_they_cannot_hold(cfg, message):
    with pytest.raises(UserError) as error:
        huggingface.convert(GPT(cfg, 128))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "with rope_type=llama3; allowed: default"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "with rope_type=linear; allowed: default"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "with rope_type=yarn; allowed: default"),
        ({"rope_parameters": "linear"}, "with rope_parameters='linear'; allowed: a value like {}"),
        ({"head_dim": 16}, "with head_dim=16; allowed: 8"),
        ({"num_attention_heads": 0}, "with num_attention_heads=0; allowed: a value like 32"),
        ({"num_key_value_heads": "2"}, "with num_key_value_heads='2'; allowed: a value like 4"),
        ({"hidden_act": ["silu"]}, "with hidden_act=['silu']; allowed: a value like 'silu'"),
        ({"model_type": ["llama"]}, "with model_type=['llama']; allowed: a value like ''"),
        ({"tie_word_embeddings": True}, "where lm_head.weight is not model.embed_tokens.weight; allowed: tied weights"),
        ({"hidden_act": "relu"}, "with hidden_act=relu; allowed: gelu_new, gelu_pytorch_tanh"),
        ({"hidden_act": "wave"}, "with hidden_act=wave; allowed: gelu_new"),
        ({"model_type": "mistral", "sliding_window": 4}, "with model_type=mistral; allowed: gpt2, llama"),
        ({"num_hidden_layers": "3"}, "with num_hidden_layers='3'; allowed: a value like 32"),
        ({"num_hidden_layers": 4}, "a llama without model.layers.3.input_layernorm.weight; allowed: all tensors of its"),
        ({"num_hidden_layers": 2}, "a llama with model.layers.2.input_layernorm.weight; allowed: tensors of this"),
        ({"intermediate_size": 60}, "whose tensor for blocks.0.ffn.up.weight is (56, 32); allowed: (60, 32)"),
    ],
)  # fmt: skip
def test_what_ours_cannot_hold(tmp_path, values, message):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL_LLAMA))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if "rope_scaling" in values:  # as transformers 4 writes it
        del config["rope_parameters"]
    path.write_text(json.dumps(config | values))
    with pytest.raises(UserError) as error:
        huggingface.load(tmp_path, "init_from")
    assert str(error.value).startswith(f"init_from: found {tmp_path}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", True)]
)  # fmt: skip
def test_rare_options_of_gpt2(tmp_path, key, value):
    config = transformers.GPT2Config(**SMALL_GPT2)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"{key}={value}; allowed: {not value}"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("rope", [{"rope_parameters": {"rope_type": "default"}}, {"rope_theta": 500}], ids=str)
def test_where_the_base_of_rotary_positions_may_be(tmp_path, rope):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL_LLAMA)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | rope))
    assert_same(ours_of(tmp_path), transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval())
    assert huggingface.options(tmp_path).rope_theta == rope.get("rope_theta", 1e4)


@pytest.mark.parametrize("kept", ["both", "head"])
def test_tied_weights_may_be_there_twice_or_by_their_other_name(tmp_path, kept):
    from safetensors.torch import load_file, save_file

    config = transformers.LlamaConfig(**SMALL_LLAMA, tie_word_embeddings=True)
    theirs = randomize(transformers.LlamaForCausalLM(config))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if kept == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(ours_of(tmp_path), theirs)


def test_scaled_rotary_positions_are_transformers_own(tmp_path):
    """Llama 3.1's: ours does not have them, so commands take the model as it is."""
    scaling = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    theirs = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL_LLAMA, rope_parameters=scaling)))
    theirs.save_pretrained(tmp_path)
    assert not huggingface.is_known(tmp_path)
    assert_same(load_trained(str(tmp_path), torch.device("cpu")).model, theirs)


def test_extra_tensors_are_not_passed_over(tmp_path):
    """A query norm, say: without it the logits would be others."""
    from safetensors.torch import load_file, save_file

    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL_LLAMA)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"a llama with model.layers.0.self_attn.q_norm.weight"):
        huggingface.load(tmp_path)
