"""Models of transformers and torchvision, trained as they are."""

import importlib
import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_pretrain.config_models import HFConfig, TorchvisionConfig
from sparse_pretrain.config_recipe import RecipeConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models.library import build_hf, build_torchvision
from sparse_pretrain.optim.adamw import AdamW, parameter_groups
from sparse_pretrain.sparsity import SparseTraining, load_recipe, sparsify
from sparse_pretrain.sparsity.conv import SparseConv2d
from sparse_pretrain.sparsity.swap import select_layers

T = pytest.importorskip("transformers")
T.logging.set_verbosity_error()

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**WIDTHS, "vocab_size": 64, **IDS}
BOTH = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64, "decoder_start_token_id": 2, **IDS,
}  # fmt: skip
CONFIGS = {
    "gpt2": lambda: T.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=64),
    "llama": lambda: T.LlamaConfig(**TEXT),
    "bert": lambda: T.BertConfig(**TEXT),
    "roberta": lambda: T.RobertaConfig(**TEXT | {"pad_token_id": 1}, type_vocab_size=1, max_position_embeddings=34),
    "distilbert": lambda: T.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=64),
    "vit": lambda: T.ViTConfig(**WIDTHS, image_size=8, patch_size=4),
    "bart": lambda: T.BartConfig(**BOTH),
    "marian": lambda: T.MarianConfig(**BOTH),
    "opt": lambda: T.OPTConfig(
        hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, word_embed_proj_dim=16,
        **IDS,
    ),
    "t5": lambda: T.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64),
    "t5_gated": lambda: T.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64, feed_forward_proj="gated-gelu"
    ),
    "convnext": lambda: T.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "resnet": lambda: T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
}  # fmt: skip
AUTO = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image_classification": "AutoModelForImageClassification",
    "text_classification": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}


@pytest.fixture
def folder(tmp_path):
    """folder("gpt2", "causal_lm") -> a folder with a random model; without an objective, only its config."""

    def make(name, objective=None):
        path = tmp_path / name
        if objective is None:
            CONFIGS[name]().save_pretrained(path)
        else:
            torch.manual_seed(0)
            getattr(T, AUTO[objective]).from_config(CONFIGS[name]()).save_pretrained(path)
        return path

    return make


def build(path, objective, **sizes):
    torch.manual_seed(0)
    return build_hf(HFConfig(name="test", path=str(path)), objective, **sizes)


def inputs(objective):
    generator = torch.Generator().manual_seed(1)
    if objective == "image_classification":
        return (torch.randn(2, 3, 8, 8, generator=generator),)
    tokens = torch.randint(3, 60, (2, 12), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 7:] = False
    if objective == "seq2seq":
        return tokens, tokens.flip(1)[:, :5], mask
    return (tokens,) if objective.endswith("_lm") else (tokens, mask, torch.zeros_like(tokens))


MODELS = [
    *(("gpt2", "causal_lm"), ("llama", "causal_lm"), ("opt", "causal_lm"), ("bert", "causal_lm")),
    *(("bert", "masked_lm"), ("roberta", "masked_lm"), ("distilbert", "masked_lm")),
    *(("bart", "seq2seq"), ("marian", "seq2seq"), ("t5", "seq2seq"), ("t5_gated", "seq2seq")),
    *(("vit", "image_classification"), ("convnext", "image_classification"), ("resnet", "image_classification")),
    *(("bert", "text_classification"), ("roberta", "text_classification"), ("gpt2", "text_classification")),
    *(("llama", "text_classification"), ("bert", "question_answering"), ("gpt2", "question_answering")),
]


@pytest.mark.parametrize(("name", "objective"), MODELS)
def test_outputs_are_those_of_transformers(folder, name, objective):
    path = folder(name, objective)
    model = build(path, objective, vocab_size=0 if objective == "image_classification" else 60).eval()
    config = T.AutoConfig.from_pretrained(path)
    if objective == "causal_lm":
        config.is_decoder = True
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 63
    theirs = getattr(T, AUTO[objective]).from_pretrained(path, config=config).eval()
    ours = inputs(objective)
    if objective == "image_classification":
        expected = theirs(pixel_values=ours[0]).logits
    elif objective == "seq2seq":
        expected = theirs(input_ids=ours[0], attention_mask=ours[2].long(), decoder_input_ids=ours[1]).logits
    elif objective.endswith("_lm"):
        expected = theirs(input_ids=ours[0]).logits
    else:
        output = theirs(
            input_ids=ours[0].masked_fill(~ours[1], config.pad_token_id), attention_mask=ours[1].long(),
        )  # fmt: skip
        expected = output.logits if objective == "text_classification" else None
        if expected is None:
            expected = torch.stack((output.start_logits, output.end_logits), 1).masked_fill(
                ~ours[1][:, None], -torch.inf
            )
    assert torch.equal(model(*ours), expected)
    assert {f"model.{key}" for key in theirs.state_dict()} == set(model.state_dict())
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "roberta", "opt"])
def test_a_causal_model_does_not_see_what_it_predicts(folder, name):
    model = build(folder(name), "causal_lm").eval()
    (tokens,) = inputs("causal_lm")
    other = tokens.clone()
    other[:, 6:] = 7
    found, expected = model(other), model(tokens)
    torch.testing.assert_close(found[:, :6], expected[:, :6])
    assert not torch.allclose(found[:, 6:], expected[:, 6:])


@pytest.mark.parametrize(
    ("name", "objective"), [m for m in MODELS if m[1] in ("text_classification", "question_answering", "seq2seq")]
)
def test_padding_does_not_matter(folder, name, objective):
    model = build(folder(name), objective, num_classes=3 if objective == "text_classification" else 0).eval()
    tokens, *rest = inputs(objective)
    mask = rest[-1] if objective == "seq2seq" else rest[0]
    torch.testing.assert_close(model(tokens.masked_fill(~mask, 9), *rest), model(tokens, *rest))


def test_token_types_are_for_models_that_have_them(folder):
    tokens, mask, types = inputs("text_classification")
    for name, seen in (("bert", True), ("roberta", False)):
        model = build(folder(name), "text_classification", num_classes=2).eval()
        assert torch.allclose(model(tokens, mask, types + 1), model(tokens, mask, types)) != seen


FFN = {
    "gpt2": [f"model.transformer.h.{i}.mlp.{n}" for i in (0, 1) for n in ("c_fc", "c_proj")],
    "llama": [f"model.model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")],
    "bert": [f"model.bert.encoder.layer.{i}.{n}.dense" for i in (0, 1) for n in ("intermediate", "output")],
    "roberta": [f"model.roberta.encoder.layer.{i}.{n}.dense" for i in (0, 1) for n in ("intermediate", "output")],
    "distilbert": [f"model.distilbert.transformer.layer.{i}.ffn.{n}" for i in (0, 1) for n in ("lin1", "lin2")],
    "bart": [f"model.model.{side}.layers.0.{n}" for side in ("encoder", "decoder") for n in ("fc1", "fc2")],
    "marian": [f"model.model.{side}.layers.0.{n}" for side in ("encoder", "decoder") for n in ("fc1", "fc2")],
    "opt": [f"model.model.decoder.layers.{i}.{n}" for i in (0, 1) for n in ("fc1", "fc2")],
    "t5": [f"model.{side}.DenseReluDense.{n}" for side in ("encoder.block.0.layer.1", "decoder.block.0.layer.2") for n in ("wi", "wo")],
    "t5_gated": [f"model.{side}.DenseReluDense.{n}" for side in ("encoder.block.0.layer.1", "decoder.block.0.layer.2") for n in ("wi_0", "wi_1", "wo")],
    "convnext": [f"model.convnext.encoder.stages.{i}.layers.0.{n}" for i in (0, 1) for n in ("pwconv1", "pwconv2")],
    "resnet": [
        *(f"model.resnet.encoder.stages.0.layers.0.layer.{i}.convolution" for i in (0, 1)),
        "model.resnet.encoder.stages.1.layers.0.shortcut.convolution",
        *(f"model.resnet.encoder.stages.1.layers.0.layer.{i}.convolution" for i in (0, 1)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FFN)
def test_which_layers_are_meant_by_default(folder, name):
    objective = next(objective for known, objective in MODELS if known == name)
    rows = select_layers(build(folder(name), objective), RecipeConfig("test", "transposable"))
    assert [row.name for row in rows if row.sparse] == FFN[name]
    assert not any(row.skipped for row in rows)


def test_the_ffn_of_a_vit_old_and_new(folder):
    """Its layers were called as BERT's up to transformers 4."""
    rows = select_layers(build(folder("vit"), "image_classification"), RecipeConfig("test", "magnitude"))
    sparse = [row.name for row in rows if row.sparse]
    assert len(sparse) == 4
    assert all(".mlp.fc" in name or ".intermediate." in name or ".output." in name for name in sparse)
    block = {name: nn.Linear(8, 8) for name in ("attention_output", "intermediate", "output")}
    layer = nn.ModuleDict({name: nn.ModuleDict({"dense": linear}) for name, linear in block.items() if "_" not in name})
    layer["attention"] = nn.ModuleDict({"output": nn.ModuleDict({"dense": block["attention_output"]})})
    old = nn.ModuleDict({"vit": nn.ModuleDict({"layer": nn.ModuleList([layer])})})
    rows = select_layers(old, RecipeConfig("test", "magnitude"))
    assert [r.name for r in rows if r.sparse] == ["vit.layer.0.intermediate.dense", "vit.layer.0.output.dense"]


def test_new_weights_are_a_function_of_the_seed(folder):
    path = folder("gpt2", "causal_lm")
    trained = build(path, "causal_lm").state_dict()
    file = load_file(path / "model.safetensors")
    assert torch.equal(trained["model.transformer.h.0.mlp.c_fc.weight"], file["transformer.h.0.mlp.c_fc.weight"])
    torch.manual_seed(1)
    cfg = HFConfig(name="test", path=str(path / "config.json"))  # the file: the weights beside it are not read
    first = build_hf(cfg, "causal_lm").state_dict()
    torch.manual_seed(1)
    again = build_hf(cfg, "causal_lm").state_dict()
    (path / "model.safetensors").unlink()
    bare = build(path, "causal_lm").state_dict()
    name = "model.transformer.h.0.mlp.c_fc.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], trained[name])
    assert not torch.equal(first[name], bare[name])


def test_a_config_in_bf16_is_trained_in_fp32(folder):
    path = folder("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    assert {p.dtype for p in build(path, "causal_lm").parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "learned", "objective"),
    [("bert", "masked_lm", "text_classification"), ("bert", "masked_lm", "question_answering"),
     ("gpt2", "causal_lm", "text_classification"), ("vit", "image_classification", "image_classification")],
)  # fmt: skip
def test_another_task_keeps_the_body_and_gets_a_head(folder, name, learned, objective):
    before = getattr(T, AUTO[learned]).from_pretrained(folder(name, learned)).base_model.state_dict()
    sizes = {"num_classes": 5} if "classification" in objective else {}
    model = build(folder(name, learned), objective, **sizes)
    assert model.training
    body = model.model.base_model.state_dict()
    shared = [key for key in before if "pooler" not in key]
    assert len(shared) > 20
    assert all(torch.equal(body[key], before[key]) for key in shared)
    assert model(*inputs(objective)).shape == ((2, 5) if sizes else (2, 2, 12))


def test_on_meta_nothing_is_read_and_flop_are_counted(folder, monkeypatch):
    path = folder("bart", "seq2seq")
    (path / "model.safetensors").write_bytes(b"damaged")
    with torch.device("meta"):
        model = build(path, "seq2seq").eval()
    source, target, mask = inputs("seq2seq")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(source.to("meta"), target.to("meta"), mask.to("meta"))
    assert logits.shape == (2, 5, 64)
    real = build(path / "config.json", "seq2seq").eval()
    with FlopCounterMode(display=False) as expected, torch.no_grad():
        real(source, target, mask)
    assert counter.get_total_flops() > 0
    linear = 2 * 2 * (12 * (4 * 256 + 2 * 512 + 2 * 256) + 5 * (6 * 256 + 2 * 512 + 64 * 16))
    assert linear <= counter.get_total_flops() <= 1.2 * linear
    assert expected.get_total_flops() <= counter.get_total_flops()  # attention kernels of the CPU are not counted


def test_a_model_of_transformers_learns_sparse(folder):
    model = build(folder("bert"), "text_classification", num_classes=2)
    recipe = load_recipe("fst")
    sparsify(model, recipe)
    tokens, mask, types = inputs("text_classification")
    labels = torch.tensor([0, 1])
    losses = train(model, recipe, lambda _: F.cross_entropy(model(tokens, mask, types), labels), lr=1e-2, steps=24)
    assert losses[-1] < 0.5 * losses[0]


def train(model, recipe, loss_of, lr, steps):
    training = SparseTraining(model, recipe, steps, seed=1)
    optimizer = AdamW(parameter_groups(model, 0.0, lr), lr, (0.9, 0.95), 1e-8, training.decay, training.second_moment)
    training.prepare(0)
    losses = []
    for step in range(steps):
        training.at_tokens(0)
        loss = loss_of(step)
        loss.backward()
        training.adjust_gradients()
        optimizer.step()
        optimizer.zero_grad()
        training.prepare(step + 1)
        losses.append(loss.item())
    return losses


# --- what cannot be ---


def refuse(match, path, objective="causal_lm", **sizes):
    with pytest.raises(UserError, match=match):
        build(path, objective, **sizes)


def test_paths_that_hold_no_model(folder, tmp_path):
    refuse(r"model.path: found .*nothing; allowed: a folder with a model .*hf download", tmp_path / "nothing")
    refuse("model.path: found .*; allowed: a folder with a model", tmp_path)
    path = folder("gpt2")
    (path / "pytorch_model.bin").write_bytes(b"x")
    refuse("gpt2 with pytorch_model.bin; allowed: safetensors", path)
    (path / "config.json").write_text('{"model_type": "gtp2"}')
    refuse("whose config transformers .* cannot use", path)
    (path / "config.json").write_text("{")
    refuse("whose config transformers .* cannot use", path)


def test_code_in_a_folder_is_never_run(folder, tmp_path):
    path = folder("gpt2")
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilConfig: pass\nclass Evil: pass\n")
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    (path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    refuse("whose config transformers .* cannot use", path)
    (path / "config.json").write_text(json.dumps(CONFIGS["gpt2"]().to_dict() | {"auto_map": auto_map}))
    build(path, "causal_lm")  # transformers has this type itself
    assert not (tmp_path / "ran").exists()


def test_heads_and_sizes_that_do_not_fit(folder):
    refuse("a vit model, which has no head for causal_lm; allowed: .*AutoModelForCausalLM knows", folder("vit"))
    refuse("a gpt2 model, which has no head for masked_lm", folder("gpt2"), "masked_lm")
    refuse("a bert model, which has no head for seq2seq", folder("bert"), "seq2seq")
    refuse("with vocab_size=64; allowed: at least the 65 tokens", folder("gpt2"), vocab_size=65)


@pytest.mark.parametrize(("name", "positions"), [("gpt2", 32), ("roberta", 32)])
def test_sequences_that_are_too_long(folder, name, positions):
    model = build(folder(name), "causal_lm").eval()
    model(torch.full((1, positions), 5))
    with pytest.raises(UserError, match=f"found a model of {positions} positions; allowed: one of {positions + 1}"):
        model(torch.full((1, positions + 1), 5))


def test_targets_that_are_too_long(folder):
    model = build(folder("bart"), "seq2seq")
    tokens = torch.full((1, 1025), 5)
    with pytest.raises(UserError, match="found a model of 1024 positions"):
        model(tokens[:, :5], tokens)


def test_weights_that_are_not_whole(folder):
    path = folder("gpt2", "causal_lm")
    tensors = load_file(path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    refuse("whose weights lack transformer.h.1.mlp.c_fc.weight", path)
    (path / "model.safetensors").write_bytes(b"\x10" + b"\0" * 40)
    refuse("whose weights cannot be read", path)
    shutil.copy(folder("bert", "masked_lm") / "model.safetensors", path / "model.safetensors")
    refuse("whose weights lack transformer.*, …; allowed: all weights", path)


@pytest.mark.parametrize("package", ["transformers", "torchvision"])
def test_a_package_that_is_not_there(package, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"transformers": "hf", "torchvision": "vision"}[package]
    vision = TorchvisionConfig(name="x", architecture="resnet18")
    use = {"transformers": lambda: build("x", "causal_lm"), "torchvision": lambda: build_torchvision(vision, 10)}
    with pytest.raises(UserError, match=rf"{package}, which is not installed.*pip install sparse-pretrain\[{extra}\]"):
        use[package]()


def test_a_torchvision_that_does_not_fit_this_torch(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(
        UserError, match=r"cannot be imported \(operator torchvision::nms does not exist\).*built for torch"
    ):
        build_torchvision(TorchvisionConfig(name="x", architecture="resnet18"), 10)


# --- torchvision ---


def vision(architecture, classes=4, **changes):
    torch.manual_seed(0)
    return build_torchvision(TorchvisionConfig(name="x", architecture=architecture, **changes), classes)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "densenet121"])
def test_networks_of_torchvision(torchvision, architecture):
    with torch.device("meta"):
        model = vision(architecture)
    assert type(model) is type(getattr(torchvision.models, architecture)())
    rows = {row.name: row for row in select_layers(model, RecipeConfig("test", "transposable"))}
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == {"resnet18": 20, "resnet50": 53, "densenet121": 120}[architecture]
    assert [name for name, row in rows.items() if row.sparse] == convolutions[1:]  # neither stem nor classifier
    assert not any(row.skipped for row in rows.values())


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3", "vit_b_16", "mobilenet_v2", "squeezenet1_1"])
def test_every_kind_of_classifier_gives_logits(torchvision, architecture):
    size = {"inception_v3": 299, "vit_b_16": 32}.get(architecture, 64)
    with torch.device("meta"):
        model = vision(architecture, image_size=size).train()
        assert model(torch.empty(2, 3, size, size)).shape == (2, 4)
    rows = select_layers(model, RecipeConfig("test", "magnitude"))
    skipped = {row.skipped for row in rows}
    assert skipped == ({"", "in_features=9 is not a multiple of 4"} if architecture == "mobilenet_v2" else {""})
    sparse = [row.name for row in rows if row.sparse]
    if architecture == "vit_b_16":
        assert len(sparse) == 24
        assert all(".mlp." in name for name in sparse)


@pytest.mark.parametrize("recipe", ["fst", "s_ste"])
def test_a_resnet_learns_sparse(torchvision, recipe):
    model = vision("resnet18")
    recipe = load_recipe(recipe)
    sparsify(model, recipe)
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(8) % 4
    images = torch.randn(8, 3, 32, 32, generator=generator)
    losses = train(model, recipe, lambda _: F.cross_entropy(model(images), labels), lr=1e-3, steps=8)
    assert losses[-1] < 0.6 * losses[0]
    layers = [layer for layer in model.modules() if isinstance(layer, SparseConv2d)]
    assert len(layers) == 19
    for layer in layers:
        assert (layer.mask.flatten(1).unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_what_torchvision_has_not(torchvision):
    with pytest.raises(UserError, match="model.architecture: found resnet81; .*did you mean resnet18"):
        vision("resnet81")
    with pytest.raises(UserError, match="model.architecture: found fasterrcnn_resnet50_fpn"):  # no classifier
        vision("fasterrcnn_resnet50_fpn")
    with pytest.raises(UserError, match="model.channels: found 1; allowed: 3"):
        vision("resnet18", channels=1)
