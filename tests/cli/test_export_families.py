"""`export` of encoders, encoder-decoders, vision transformers, fine-tuned models and models of transformers itself."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from sparse_pretrain import cli, train
from sparse_pretrain.config_data import ImagesConfig, PairsConfig, SentencesConfig
from sparse_pretrain.config_models import BertConfig, HFConfig, Seq2SeqConfig, ViTConfig
from sparse_pretrain.data.build import open_store
from sparse_pretrain.data.tokenizer import load_tokenizer, train_bpe, train_wordpiece
from sparse_pretrain.runs import RUN_FILE, TOKENIZER_FILE, read_json
from sparse_pretrain.tasks.trained import load_trained

transformers = pytest.importorskip("transformers")

SPARSE_TO_THE_END = {"recipe__schedule__dense_finetune": 0.0, "recipe__schedule__refresh_every": 1}
SMALL = {"name": "tiny", "n_layer": 2, "n_head": 2, "d_model": 16}


@pytest.fixture
def exported(tiny, tmp_path):
    """exported(auto class, model, data, …) -> the trained task, its run folder, the export and transformers' model."""

    def run(auto: str, recipe: str = "ste", options: tuple[str, ...] = (), **changes):
        run_dir = train.run(tiny(recipe, **SPARSE_TO_THE_END, **changes))
        folder = tmp_path / "exported"
        cli.main(["export", f"checkpoint={run_dir}", f"out={folder}", *options])
        theirs, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        return load_trained(str(run_dir), torch.device("cpu")).model, run_dir, folder, theirs.eval()

    return run


def targets(folder) -> list[str]:
    return json.loads((folder / "config.json").read_text())["sparsity_config"]["targets"]


@torch.no_grad()
def test_bert(exported, corpus):
    model = BertConfig(**SMALL, max_seq_len=16)
    ours, run_dir, folder, theirs = exported("AutoModelForMaskedLM", model=model, data__tokenizer="wordpiece")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = " ".join(corpus.read_text().split()[:4])
    batch = tokenizer(text, text, return_tensors="pt")
    own = load_tokenizer((run_dir / TOKENIZER_FILE).read_bytes(), "the run")
    assert batch["input_ids"].tolist() == [own.encode(text, text).ids]
    assert (tokenizer.mask_token, tokenizer.cls_token, tokenizer.sep_token) == ("[MASK]", "[CLS]", "[SEP]")
    tokens, types = batch["input_ids"][:, :16], batch["token_type_ids"][:, :16]
    logits = theirs(tokens, token_type_ids=types).logits
    torch.testing.assert_close(ours(tokens, token_types=types), logits, atol=1e-5, rtol=0)
    assert targets(folder) == [
        f"bert.encoder.layer.{i}.{part}.dense" for i in range(2) for part in ("intermediate", "output")
    ]
    assert theirs.config.pad_token_id == tokenizer.pad_token_id == 0


@pytest.fixture
def pairs(corpus, tmp_path) -> PairsConfig:
    words = corpus.read_text().split()
    texts = [" ".join(words[i : i + 4]) for i in range(0, 800, 4)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    (tmp_path / "b.txt").write_text("\n".join(" ".join(reversed(text.split())) for text in texts))
    return PairsConfig(
        name="tiny", format="lines", train=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], vocab_size=300,
        max_source_len=16, max_target_len=16, num_workers=0,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("bart", [False, True], ids=["marian", "bart"])
def test_seq2seq(exported, pairs, corpus, bart):
    changes = {"position": "learned", "embedding_norm": True} if bart else {}
    model = Seq2SeqConfig(**SMALL, max_seq_len=16, **changes)
    ours, run_dir, folder, theirs = exported("AutoModelForSeq2SeqLM", model=model, data=pairs)
    assert type(theirs).__name__ == ("BartForConditionalGeneration" if bart else "MarianMTModel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = " ".join(corpus.read_text().split()[:3])
    batch = tokenizer([text, text.split()[0]], return_tensors="pt", padding=True, return_token_type_ids=False)
    own = load_tokenizer((run_dir / TOKENIZER_FILE).read_bytes(), "the run")
    assert batch["input_ids"][0].tolist() == own.encode(text).ids
    mask = batch["attention_mask"].bool()
    target = torch.randint(300, (2, 6), generator=torch.Generator().manual_seed(0))
    logits = theirs(**batch, decoder_input_ids=target).logits
    torch.testing.assert_close(ours(batch["input_ids"], target, mask), logits, atol=1e-5, rtol=0)
    generated = theirs.generate(**batch, num_beams=1, do_sample=False)  # as generation_config.json says
    assert generated[0, 0] == theirs.config.decoder_start_token_id == own.token_to_id("<s>")
    mine = ours.generate(batch["input_ids"], mask, own.token_to_id("<s>"), own.token_to_id("</s>"), 15)
    for mine_row, their_row in zip(mine.tolist(), generated.tolist(), strict=True):
        end = [*mine_row[1:], 2].index(2) + 1
        assert mine_row[:end] == their_row[:end]


@pytest.fixture
def images(tmp_path) -> ImagesConfig:
    """40 random images of two classes, 8 by 8."""
    draw = random.Random(0)
    for i in range(40):
        folder = tmp_path / "images" / ("dark", "light")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = bytes(draw.randrange(128) + 127 * (i % 2) for _ in range(8 * 8 * 3))
        Image.frombytes("RGB", (8, 8), pixels).save(folder / f"{i}.png")
    return ImagesConfig(name="tiny", train=[str(tmp_path / "images")], image_size=8, flip=False, validation_share=0.3, num_workers=0)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("distilled", [False, True], ids=["vit", "deit"])
def test_vit(exported, images, distilled):
    model = ViTConfig(**SMALL, image_size=8, patch_size=4, distillation_token=distilled)
    auto = "DeiTForImageClassificationWithTeacher" if distilled else "AutoModelForImageClassification"
    ours, run_dir, folder, theirs = exported(auto, model=model, data=images)
    assert theirs.config.id2label == {0: "dark", 1: "light"}
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    picture = Image.open(next((run_dir.parent / "images" / "dark").iterdir()))
    pixels = processor(picture, return_tensors="pt").pixel_values
    facts = open_store(Path(read_json(run_dir / RUN_FILE)["data"])).manifest
    mean, std = (torch.tensor(facts[name]).view(3, 1, 1) for name in ("mean", "std"))
    raw = torch.tensor(list(picture.tobytes())).view(8, 8, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(pixels[0], ((raw - mean) / std).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(pixels), theirs(pixels).logits, atol=1e-5, rtol=0)


def sentences(corpus, tmp_path, body, length):
    """60 texts of so many words of the corpus, and data of two classes of them, cut as `body` was trained."""
    words = corpus.read_text().split()
    texts = [" ".join(words[4 * i : 4 * i + length]) for i in range(60)]
    rows = "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts))
    (tmp_path / "train.tsv").write_text(f"sentence\tlabel\n{rows}")
    data = SentencesConfig(
        name="tiny", train=[str(tmp_path / "train.tsv")], tokenizer=str(body / TOKENIZER_FILE), seq_len=16, num_workers=0,
        validation_share=0.3,
    )  # fmt: skip
    return texts, data


@torch.no_grad()
def test_a_fine_tuned_classifier(exported, tiny, corpus, tmp_path):
    model = BertConfig(**SMALL, max_seq_len=16)
    body = train.run(tiny("ste", run_dir="body", model=model, data__tokenizer="wordpiece", **SPARSE_TO_THE_END))
    texts, data = sentences(corpus, tmp_path, body, length=4)
    ours, _, folder, theirs = exported(
        "AutoModelForSequenceClassification", model=model, data=data, init_from=str(body)
    )
    assert theirs.config.id2label == {0: "negative", 1: "positive"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = texts[0].split()
    batch = tokenizer([words[0], " ".join(words[:3])], return_tensors="pt", padding=True)
    logits = ours(batch["input_ids"], batch["attention_mask"].bool())
    torch.testing.assert_close(logits, theirs(**batch).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_fine_tuned_decoder(exported, tiny, corpus, tmp_path):
    """Whose texts end with the token that fills batches up here, by which transformers would not find their end."""
    body = train.run(tiny("ste", run_dir="body", **SPARSE_TO_THE_END))
    texts, data = sentences(corpus, tmp_path, body, length=2)
    ours, _, folder, theirs = exported("AutoModelForSequenceClassification", data=data, init_from=str(body))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts[:3]:
        batch = tokenizer(text, return_tensors="pt")
        assert batch["input_ids"][0, -1] == tokenizer.eos_token_id  # as in fine-tuning
        logits = ours(batch["input_ids"], batch["attention_mask"].bool())
        torch.testing.assert_close(logits, theirs(**batch).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="pad"):
        tokenizer([text, text], padding=True)


@torch.no_grad()
@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
def test_a_model_of_transformers(exported, tmp_path, adapters):
    """One that ours cannot hold: norms without weights, q and k normed, and so on."""
    config = transformers.Qwen3Config(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=16,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "theirs")
    changes = {"recipe__adapter__kind": "lora", "recipe__adapter__rank": 2} if adapters else {}
    options = ("adapters=apart",) if adapters else ()
    ours, _, folder, theirs = exported(
        "AutoModelForCausalLM", options=options, model=HFConfig(name="tiny", path=str(tmp_path / "theirs")), **changes
    )
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert targets(folder) == sorted(
        f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("down", "gate", "up")
    )
    tokens = torch.arange(16)[None]
    if adapters:
        peft = pytest.importorskip("peft")
        theirs = peft.PeftModel.from_pretrained(theirs, folder / "adapter")
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)
    assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Qwen3"])
def test_pruned_folders(tmp_path, corpus, capsys, kind):
    """OATS leaves 2:4 weights and low-rank adapters in a Hugging Face folder, of architectures that are ours or not."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=320, n_positions=16, n_embd=16, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0
        )
    else:
        extra = {"head_dim": 8} if kind == "Qwen3" else {}
        config = getattr(transformers, f"{kind}Config")(vocab_size=320, max_position_embeddings=16, **small, **extra)
    source = tmp_path / "source"
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    getattr(transformers, name)(config).save_pretrained(source)
    (source / "tokenizer.json").write_bytes(train_bpe(iter([corpus.read_text()]), 320))
    pruned = tmp_path / "pruned"
    cli.main([
        "prune", f"checkpoint={source}", "method=oats", f"text=[{corpus}]", "samples=4", "seq_len=16", "iterations=2",
        f"out={pruned}", "accelerator=cpu",
    ])  # fmt: skip
    ours = load_trained(str(pruned), torch.device("cpu")).model.eval()
    capsys.readouterr()
    cli.main(["export", f"checkpoint={pruned}", f"out={tmp_path / 'merged'}", "adapters=merged"])
    cli.main(["export", f"checkpoint={pruned}", f"out={tmp_path / 'apart'}", "adapters=apart"])
    layers = 8 if kind == "GPT2" else 14
    assert f"2:4 in {layers} layers" in capsys.readouterr().out
    tokens = torch.arange(16)[None]
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(ours(tokens), merged(tokens).logits, atol=1e-5, rtol=0)
    assert not (tmp_path / "merged" / "adapter.safetensors").exists()
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
    assert (base(tokens).logits - merged(tokens).logits).abs().max() > 1e-4
    apart = peft.PeftModel.from_pretrained(base, tmp_path / "apart" / "adapter")
    torch.testing.assert_close(ours(tokens), apart(tokens).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_pruned_body(tmp_path, corpus):
    """An encoder without a head, as sentence encoders are: its tensors lack the prefix of a whole model's."""
    config = transformers.BertConfig(
        vocab_size=320, max_position_embeddings=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "source")
    tokenizer = train_wordpiece(iter([corpus.read_text()]), 320)
    (tmp_path / "source" / "tokenizer.json").write_bytes(tokenizer)
    cli.main([
        "prune", f"checkpoint={tmp_path / 'source'}", "method=oats", f"text=[{corpus}]", "samples=4", "seq_len=16",
        "iterations=2", f"out={tmp_path / 'pruned'}", "accelerator=cpu",
    ])  # fmt: skip
    cli.main(["export", f"checkpoint={tmp_path / 'pruned'}", f"out={tmp_path / 'out'}", "adapters=merged"])
    ours = load_trained(str(tmp_path / "pruned"), torch.device("cpu")).model
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out")
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(ours.hidden(tokens), theirs(tokens).last_hidden_state, atol=1e-5, rtol=0)
