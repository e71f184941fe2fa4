"""`sparse-pretrain generate`, on small trained runs: a language model, an encoder-decoder, and a decoder of pairs."""

import random
import re

import pytest
import torch

from sparse_pretrain import cli, export, train
from sparse_pretrain import generate as command
from sparse_pretrain.config import ExportConfig, GenerateConfig
from sparse_pretrain.data.corpus import END_OF_TEXT
from sparse_pretrain.errors import UserError
from sparse_pretrain.generate import Clock, Form, batches
from sparse_pretrain.models.generation import beam_search
from sparse_pretrain.tasks.trained import load_trained
from tests.sparse24.reference_backend import Reference

CPU = torch.device("cpu")
OPTIONS = [
    "trainer.accelerator=cpu", "trainer.peak_tflops=1", "model.d_model=32", "model.n_layer=2", "model.n_head=2", "trainer.batch_size=16",
    "trainer.eval_every=1000", "trainer.eval_batches=1", "trainer.checkpoint_every=1000", "trainer.log_every=1000", "data.num_workers=0",
    "scheduler.warmup_steps=2", "optimizer.lr=1e-2", "data.vocab_size=300", "recipe=ste",
]  # fmt: skip
DIGITS = ("null", "eins", "zwei", "drei", "vier", "acht")


def train_run(folder, *options):
    (cfg,) = cli._preflight("train", [*OPTIONS, f"runs_dir={folder}", *options])
    return train.run(cfg)


@pytest.fixture(scope="module", autouse=True)
def _cache_of_the_module(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_PRETRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def causal(tmp_path_factory, corpus):
    """A run on texts in which each word foretells the next."""
    folder = tmp_path_factory.mktemp("causal")
    return train_run(folder, "data=text", f"data.train=[{corpus}]", "model.max_seq_len=64", "trainer.steps=60")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Options of runs that learn the names of digits."""
    folder, draw = tmp_path_factory.mktemp("pairs"), random.Random(0)
    numbers = [[draw.randrange(len(DIGITS)) for _ in range(draw.randint(1, 3))] for _ in range(400)]
    (folder / "a").write_text("".join(" ".join(map(str, number)) + "\n" for number in numbers))
    (folder / "b").write_text("".join(" ".join(DIGITS[i] for i in number) + "\n" for number in numbers))
    return ["data=pairs", f"data.train=[{folder}/a,{folder}/b]", "data.max_source_len=10", "data.max_target_len=10"]


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("seq2seq")
    return train_run(folder, "model=seq2seq_nano", "model.dropout=0", "trainer.steps=150", *pairs)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory, pairs):
    return train_run(
        tmp_path_factory.mktemp("conditional"), "model.max_seq_len=32", "trainer.steps=250", "optimizer.lr=4e-3", *pairs
    )


@pytest.fixture
def say(capsys):
    """say(run, prompt="a", …) -> what goes to stdout and to stderr; the likeliest tokens if not told otherwise."""

    def generate(run, **options):
        capsys.readouterr()
        command.run(GenerateConfig(**{"checkpoint": str(run), "accelerator": "cpu", "temperature": 0, **options}))
        return tuple(capsys.readouterr())

    return generate


def test_packed_weights_write_the_same(causal, seq2seq, say):
    for run, prompts in ((causal, ("ab", "")), (seq2seq, ("5 1 0",))):
        for prompt in prompts:
            found = {
                weights: say(run, prompt=prompt, max_new_tokens=30, weights=weights)
                for weights in ("auto", "dense", "sparse", "packed")
            }
            assert len({out for out, _ in found.values()}) == 1
            assert len(found["dense"][0].strip()) > 10
            held = {weights: float(re.search(r"; ([\d.]+) MB", err).group(1)) for weights, (_, err) in found.items()}
            assert held["packed"] < held["dense"] < held["sparse"]
            assert f"(dense: {held['dense']:.2f} MB)" in found["packed"][1]


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_an_exported_folder_can_be_held_packed(causal, say, tmp_path, form):
    out = tmp_path / form
    export.run(ExportConfig(checkpoint=str(causal), out=str(out), format=form))
    expected, _ = say(out, prompt="ab", max_new_tokens=20, weights="dense")
    assert len(expected) > 10
    found, held = say(out, prompt="ab", max_new_tokens=20, weights="packed")
    assert found == expected
    assert "packed: values and 2-bit metadata in 4 layers" in held


def test_any_backend_may_hold_packed_weights(causal, say, monkeypatch):
    from sparse24.backends import BACKENDS

    calls = []

    class Counted(Reference):
        def linear(self, operand, x, bias, features, variant):
            calls.append(len(x))
            return super().linear(operand, x, bias, features, variant)

    monkeypatch.setitem(BACKENDS, "reference", Counted())
    for beams in (1, 2):
        options = {"prompt": "ab", "beams": beams, "max_new_tokens": 5}
        expected, _ = say(causal, **options)
        calls.clear()
        out, err = say(causal, **options, weights="packed", backend="reference")
        assert out == expected
        assert "reference" in err  # in the table of measurements
        assert min(calls) == beams


def test_several_prompts_are_those_one_at_a_time(causal, seq2seq, conditional, say, tmp_path):
    file = tmp_path / "prompts.txt"
    for run, prompts, beams in (
        (causal, ["ab", "", "dcba abcd ab", "a b"], 1),
        (causal, ["ab", "", "dcba abcd ab", "a b"], 2),
        (seq2seq, ["1 2", "5", "4 0 3", "5 5", "0"], 1),
        (seq2seq, ["1 2", "5", "4 0 3", "5 5", "0"], 3),
        (conditional, ["1 2", "5", "4 0 3"], 1),
        (conditional, ["1 2", "5", "4 0 3"], 3),
    ):
        options = {"beams": beams, "max_new_tokens": 12}
        alone = [say(run, prompt=prompt, **options)[0] for prompt in prompts]
        file.write_text("".join(prompt + "\n" for prompt in prompts))
        for size in (2, 16):
            out, _ = say(run, prompts=str(file), batch_size=size, **options)
            assert out == (f"{END_OF_TEXT}\n" if run is causal else "").join(alone)


@pytest.mark.parametrize("run", ["seq2seq", "conditional"])
@pytest.mark.parametrize("beams", [1, 3])
def test_what_was_learned_is_said(run, beams, say, request, tmp_path):
    """It ends by its end token, and is on one line."""
    file = tmp_path / "prompts.txt"
    file.write_text("1 2\n0\n5 4 3\n")
    options = {"temperature": None, "beams": beams, "weights": "packed"}
    out, _ = say(request.getfixturevalue(run), prompts=str(file), **options)
    assert out == "eins zwei\nnull\nacht vier drei\n"


def test_a_text_ends_where_it_ends(causal, say):
    out, err = say(causal, prompt="ab", max_new_tokens=30)
    trained = load_trained(str(causal), CPU)
    form = Form.of(trained)
    tokens = form.encode("ab")
    assert tokens[0] == form.end
    new = trained.model.generate(torch.tensor([tokens]), 30, temperature=0)[0, len(tokens) :].tolist()
    assert form.end not in new  # then all of them are written
    assert out == form.decode("ab", new) + "\n"
    stop = new[4]
    cut = Form(**{**vars(form), "end": stop})
    cfg = GenerateConfig(checkpoint="", max_new_tokens=30, temperature=0)
    assert command.write(trained.model, cut, [tokens], cfg, CPU, Clock(CPU)) == [new[: new.index(stop)]]
    # the prefill gives the first token
    assert re.search(rf"prefill +{len(tokens)} tokens in [\d.]+ s: [\d,]+ tokens/s\ndecode +29 tokens in", err)


def test_beams_are_the_search_of_the_model(causal, say):
    trained = load_trained(str(causal), CPU)
    form = Form.of(trained)
    tokens = torch.tensor([form.encode("b")])
    expected = beam_search(trained.model.step(tokens.shape[1] + 8), tokens, 4, 8, form.end, 0.5)[0, tokens.shape[1] :]
    out, _ = say(causal, prompt="b", beams=4, max_new_tokens=8, length_penalty=0.5)
    assert out == form.decode("b", [token for token in expected.tolist() if token != form.end]) + "\n"


def test_no_more_than_asked_for(causal, seq2seq):
    for run in (causal, seq2seq):
        trained = load_trained(str(run), CPU)
        form = Form.of(trained)
        prompts = [form.encode(text) for text in ("a b a b", "0")]
        cfg = GenerateConfig(checkpoint="", max_new_tokens=3, temperature=0)
        written = command.write(trained.model, form, prompts, cfg, CPU, Clock(CPU))
        assert max(map(len, written)) <= 3
        assert len(written[0]) == 3 or run is seq2seq


def test_half_precision_holds_half_the_bytes(causal, seq2seq, say):
    for run in (causal, seq2seq):
        for weights in ("dense", "packed", "auto"):
            sizes = []
            for precision in ("fp32", "bf16"):
                out, err = say(run, prompt="1 2", max_new_tokens=5, weights=weights, precision=precision)
                assert out.strip()
                sizes.append(float(re.search(r"; ([\d.]+) MB", err).group(1)))
            assert sizes[1] < 0.75 * sizes[0]  # positions, masks and metadata stay as they are


def test_batches_put_short_prompts_together():
    lengths = [5, 1, 3, 1, 5]
    assert list(batches(lengths, 2, same_length=False)) == [[1, 3], [2, 0], [4]]
    assert list(batches(lengths, 2, same_length=True)) == [[1, 3], [2], [0, 4]]


def test_a_model_of_transformers(tmp_path, say, causal):
    """With its own frame and end, given all tokens at each step; text of transformers' `generate`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
        initializer_range=0.5, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((causal / "tokenizer.json").read_bytes())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    prompt = tokenizer("abc", return_tensors="pt").input_ids
    for beams in (1, 3):
        expected = model.generate(prompt, max_new_tokens=8, do_sample=False, num_beams=beams, pad_token_id=0)[0]
        out, _ = say(tmp_path, prompt="abc", max_new_tokens=8, beams=beams)
        assert out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_where_a_published_decoder_starts(seq2seq, tmp_path):
    """At the token that its config says, be it the first one of the vocabulary."""
    transformers = pytest.importorskip("transformers")
    widths = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    for start in (0, 7):
        config = transformers.BartConfig(
            **widths, vocab_size=320, max_position_embeddings=16, decoder_start_token_id=start
        )
        transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / str(start))
        (tmp_path / str(start) / "tokenizer.json").write_bytes((seq2seq / "tokenizer.json").read_bytes())
        assert Form.of(load_trained(str(tmp_path / str(start)), CPU)).start == start


def test_errors(causal, tmp_path, capsys):
    def error(**options):
        with pytest.raises(UserError) as found:
            command.run(GenerateConfig(**{"checkpoint": str(causal), "accelerator": "cpu", **options}))
        return str(found.value)

    (tmp_path / "empty.txt").touch()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "prompts: found /nowhere.txt, which is not there" in error(prompts="/nowhere.txt")
    assert "empty.txt, which is empty; allowed: a file with a prompt a line" in error(prompts=f"{tmp_path}/empty.txt")
    assert "bytes.txt" in error(prompts=f"{tmp_path}/bytes.txt")
    assert "which is 2 files; allowed: one file" in error(prompts=f"{tmp_path}/*.txt")
    assert "temperature: found 0.5 with beams=2; allowed: 0 or null" in error(beams=2, temperature=0.5)
    assert "backend: found gluon with weights=auto; allowed: weights=packed" in error(backend="gluon")
    assert "cannot serve blocks.0.ffn.up: forward by gluon: needs a CUDA device" in error(
        weights="packed", backend="gluon"
    )
    assert "precision: found fp16 on a CPU" in error(precision="fp16")
    assert capsys.readouterr().out == ""


def test_wrong_values_on_the_command_line(capsys):
    for option, message in (
        ("beams=0", "beams: found 0; allowed: at least 1"),
        ("weights=pakced", "weights: found pakced; allowed: auto, dense, sparse, packed; did you mean packed?"),
        ("backend=dense", "backend: found dense; allowed: auto, cusparselt, cutlass, gluon, triton"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["generate", "checkpoint=x", option])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_dense_checkpoint_has_nothing_to_pack(tmp_path, corpus):
    options = ["data=text", f"data.train=[{corpus}]", "model.max_seq_len=16", "trainer.steps=2", "recipe=dense"]
    run = train_run(tmp_path, *options)
    with pytest.raises(
        UserError, match="weights: found packed, but no layer of this checkpoint is in its sparse phase"
    ):
        command.run(GenerateConfig(str(run), accelerator="cpu", weights="packed"))


def test_a_model_that_writes_no_texts(tmp_path, corpus):
    options = ["model=bert_nano", "data=text", f"data.train=[{corpus}]", "data.tokenizer=wordpiece", "data.seq_len=16"]
    run = train_run(tmp_path, *options, "model.max_seq_len=16", "trainer.steps=2")
    with pytest.raises(UserError, match="checkpoint: found .* that writes no texts; allowed: a language model"):
        command.run(GenerateConfig(str(run), accelerator="cpu"))
