"""Files of a Hugging Face folder: shards, other precisions, old names, and what is wrong with them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_pretrain.errors import UserError
from sparse_pretrain.models import huggingface
from tests.models.hugging_face import ours_of, randomize

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(67, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def theirs(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=67, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = randomize(transformers.GPT2LMHeadModel(config))
    model.save_pretrained(tmp_path)
    return model


def assert_same(folder, theirs, atol=1e-5):
    with torch.no_grad():
        torch.testing.assert_close(ours_of(folder)(TOKENS), theirs(TOKENS).logits, atol=atol, rtol=0)


def test_shards(tmp_path, theirs):
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert_same(tmp_path / "shards", theirs)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:100])
    with pytest.raises(UserError, match=f"checkpoint: found {shard}, which cannot be read"):
        huggingface.load(tmp_path / "shards")
    shard.write_bytes(content)
    values = json.loads(index.read_text())
    index.write_text(json.dumps(values | {"weight_map": values["weight_map"] | {"transformer.more": shard.name}}))
    with pytest.raises(UserError, match=r"whose shards lack transformer.more; allowed: all tensors of the index"):
        huggingface.load(tmp_path / "shards")
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(UserError, match="with shards in other folders"):
        huggingface.load(tmp_path / "shards")
    index.write_text("{}")
    with pytest.raises(UserError, match="without a weight_map"):
        huggingface.load(tmp_path / "shards")


def test_half_precision_becomes_float(tmp_path, theirs):
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded = huggingface.load(tmp_path / "half")
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.float32}
    assert_same(tmp_path / "half", theirs.float())


def test_the_names_of_openai(tmp_path, theirs):
    """GPT-2 as it is on the hub: without the body's prefix, with buffers of old."""
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    for i in range(2):
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril(), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, path)
    assert_same(tmp_path, theirs)


def test_an_untied_body_lacks_its_head(tmp_path):
    config = transformers.LlamaConfig(vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)  # fmt: skip
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    loaded = huggingface.load(tmp_path)
    assert loaded.missing == ("head.weight",)
    assert loaded.tokenizer_path is None


def test_which_folders_are_known(tmp_path, theirs):
    assert huggingface.is_hugging_face(tmp_path)
    assert huggingface.is_known(tmp_path)
    assert not huggingface.is_hugging_face(tmp_path / "nothing")
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    assert huggingface.is_hugging_face(tmp_path / "t5")
    assert not huggingface.is_known(tmp_path / "t5")
    cfg = huggingface.options(tmp_path)
    assert cfg == huggingface.load(tmp_path).cfg


def test_what_is_wrong(tmp_path, theirs):
    weights = tmp_path / "model.safetensors"
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"with pytorch_model.bin; allowed: model.safetensors, or shards with"):
        huggingface.load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="without weights; allowed: model.safetensors"):
        huggingface.load(tmp_path)
    for content in ("no JSON", "[1]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(
            UserError, match=r"init_from: found .*config.json, which .*; allowed: a Hugging Face folder"
        ):
            huggingface.load(tmp_path, "init_from")
