"""The probe on whole models: what it reads is what an observer outside would, and it leaves nothing behind."""

import pytest
import torch

from sparse_pretrain.config_models import BertConfig, GPTConfig
from sparse_pretrain.diagnostics.probe import run_probe
from sparse_pretrain.models.bert import Bert
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.sparsity import load_recipe, sparsify

SMALL = {"name": "small", "n_layer": 2, "n_head": 4, "d_model": 32, "max_seq_len": 16}
MODELS = {
    "gpt": lambda: GPT(GPTConfig(**SMALL), 50),
    "llama": lambda: GPT(
        GPTConfig(**SMALL, n_kv_head=2, position="rotary", norm="rms_norm", activation="swiglu", d_ff=64), 50
    ),
    "bert": lambda: Bert(BertConfig(**SMALL), 50),
}


def make(kind, recipe="dense"):
    torch.manual_seed(0)
    model = MODELS[kind]()
    for parameter in model.parameters():  # larger than the initial ones, so that heads and features differ
        parameter.data.mul_(3.0)
    if recipe != "dense":
        sparsify(model, load_recipe(recipe))
    return model.eval()


def hooks(model):
    return [
        hook
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
        for hook in getattr(module, name)
    ]


@pytest.mark.parametrize("recipe", ["dense", "ste", "slope"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_model_stays_as_it_is(kind, recipe):
    model = make(kind, recipe)
    before, tokens = hooks(model), torch.randint(50, (3, 12))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(tokens)
        probe = run_probe(model, model.hidden, [(tokens, None)], 0.3)
        assert torch.equal(model(tokens), expected)
    assert hooks(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert list(probe.heads) == ["blocks.0.attn", "blocks.1.attn"]
    assert list(probe.hidden) == ["embedding", "blocks.0", "blocks.1"]
    ffn = ("ffn.up", "ffn.gate", "ffn.down") if kind == "llama" else ("ffn.up", "ffn.down")
    assert list(probe.inputs) == [f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "attn.out", *ffn)]


def test_no_hooks_are_left_after_an_error():
    model = make("gpt")
    with pytest.raises(IndexError):
        run_probe(model, model.hidden, [(torch.full((1, 4), 50), None)], 0.3)
    assert not hooks(model)
    with pytest.raises(ValueError, match="none of this project's"):
        run_probe(torch.nn.Linear(2, 2), model.hidden, [], 0.3)


@pytest.mark.parametrize("kind", list(MODELS))
def test_what_is_read_is_what_happens(kind):
    model, tokens = make(kind), torch.randint(50, (4, 12))
    seen = {}
    block = model.blocks[1]
    handles = [
        block.register_forward_hook(lambda _, args, output: seen.update(entered=args[0], left=output)),
        block.ffn.down.register_forward_pre_hook(lambda _, args: seen.update(down=args[0])),
        block.attn.register_forward_pre_hook(lambda _, args: seen.update(attn=args[0])),
    ]
    with torch.no_grad():
        model.hidden(tokens)
    for handle in handles:
        handle.remove()
    probe = run_probe(model, model.hidden, [(part, None) for part in tokens.split(3)], 0.3)
    assert probe.hidden["blocks.1"].result()["largest_of_all"] == pytest.approx(float(seen["left"].abs().max()))
    assert probe.hidden["blocks.0"].result()["largest_of_all"] == pytest.approx(float(seen["entered"].abs().max()))
    for name, x in (("ffn.down", seen["down"]), ("attn.qkv", seen["attn"])):
        moment = probe.inputs[f"blocks.1.{name}"].second_moment().float()
        assert torch.allclose(moment, x.square().mean((0, 1)), rtol=1e-4)

    attn, causal = block.attn, kind != "bert"
    with torch.no_grad():
        q, k, _ = attn.project(seen["attn"])
    alphas = torch.zeros(4, attn.n_head)
    for b in range(4):
        for head in range(attn.n_head):
            keys = k[b, head * attn.n_kv_head // attn.n_head]
            for i in range(12):
                scores = [float(q[b, head, i] @ keys[j]) / attn.head_dim**0.5 for j in range(i + 1 if causal else 12)]
                alphas[b, head] += torch.tensor(scores).softmax(0)[0] / 12
    found = probe.heads["blocks.1.attn"].result()
    assert found["first_alpha"] == pytest.approx(alphas.mean(0).tolist(), rel=1e-4)
    assert found["first_sink"] == (alphas > 0.3).float().mean(0).tolist()


def test_padding_is_as_if_it_were_not_there():
    """Sequences padded and in one batch give what each gives alone."""
    model = make("bert")
    lengths = (12, 7, 9)
    tokens, mask = torch.randint(50, (3, 12)), torch.arange(12) < torch.tensor(lengths)[:, None]
    together = run_probe(model, model.hidden, [(tokens, mask)], 0.2)
    alone = run_probe(model, model.hidden, [(tokens[i : i + 1], mask[i : i + 1]) for i in range(3)], 0.2)
    cut = [run_probe(model, model.hidden, [(tokens[i : i + 1, :n], None)], 0.2) for i, n in enumerate(lengths)]
    for name in together.heads:
        a, b = together.heads[name].result(), alone.heads[name].result()
        single = [probe.heads[name].result() for probe in cut]
        for figure in ("first_alpha", "highest_alpha", "any_sink", "rank1_share", "tag_cosine"):
            assert a[figure] == pytest.approx(b[figure], abs=1e-5)
            mean = torch.tensor([found[figure] for found in single]).mean(0)
            assert a[figure] == pytest.approx(mean.tolist(), abs=1e-5)
        assert a["output_kurtosis"] == pytest.approx(b["output_kurtosis"], rel=1e-4)
    for name in together.hidden:
        a, single = together.hidden[name].result(), [probe.hidden[name].result() for probe in cut]
        assert a["median"] == pytest.approx(sum(found["median"] for found in single) / 3, rel=1e-5)
        assert a["largest_of_all"] == pytest.approx(max(found["largest_of_all"] for found in single), rel=1e-5)
