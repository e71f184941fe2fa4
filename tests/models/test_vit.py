"""The vision transformer: sees patches, equals transformers' ViT and DeiT, learns images."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

from sparse_pretrain import crosscheck
from sparse_pretrain.config_models import ViTConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models.vit import ViT
from sparse_pretrain.paths import config_dir
from sparse_pretrain.schema import load
from sparse_pretrain.sparsity import load_recipe, sparsify
from tests.models.by_hand import fill_vit, randomize

TINY = ViTConfig(name="tiny", n_layer=2, n_head=4, d_model=32, image_size=8, patch_size=4)


def model(**changes) -> ViT:
    torch.manual_seed(0)
    return ViT(replace(TINY, **changes), num_classes=5)


@pytest.mark.parametrize("distillation", [False, True])
def test_two_heads_and_their_mean(distillation):
    vit = model(distillation_token=distillation).eval()
    images = torch.randn(3, 3, 8, 8)
    logits, distilled = vit.forward_heads(images)
    assert logits.shape == (3, 5)
    assert vit.hidden(images).shape == (3, 5 + distillation, 32)
    if distillation:
        torch.testing.assert_close(vit(images), (logits + distilled) / 2)
        assert not torch.allclose(logits, distilled)
    else:
        assert distilled is None
        assert torch.equal(vit(images), logits)


def test_a_patch_is_a_linear_layer_of_its_pixels():
    vit = model(channels=1).eval()
    images = torch.randn(2, 1, 8, 8)
    x = torch.stack([images[:, 0, r : r + 4, c : c + 4].flatten(1) for r in (0, 4) for c in (0, 4)], dim=1)
    patches = F.linear(x, vit.patch_embed.weight.flatten(1), vit.patch_embed.bias)
    seen = []
    vit.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vit(images)
    torch.testing.assert_close(seen[0], torch.cat((vit.extra_tokens.expand(2, 1, 32), patches), 1) + vit.pos_embed)


@pytest.mark.parametrize("distillation", [False, True])
def test_every_parameter_gets_a_gradient_with_checkpointing_the_same(distillation):
    images = torch.randn(2, 3, 8, 8)
    grads = []
    for checkpointing in (False, True):
        vit = model(activation_checkpointing=checkpointing, distillation_token=distillation)
        vit(images).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vit.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in vit.parameters()]))
    assert torch.equal(*grads)


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_it_is_transformers(family):
    transformers = pytest.importorskip("transformers")
    options = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8,
        "patch_size": 4, "num_labels": 5, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    if family == "vit":
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**options))
    else:
        theirs = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**options))
    randomize(theirs)
    ours = model(d_ff=48, distillation_token=family == "deit").eval()
    fill_vit(ours, theirs, family)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(ours(images), theirs(images).logits, atol=1e-5, rtol=1e-5)


# Of DeiT's paper, table 1: 5, 22, 86 million, without and with the distillation token; timm's numbers.
@pytest.mark.parametrize(
    ("name", "distillation", "parameters"),
    [
        ("deit_tiny", False, 5_717_416),
        ("deit_tiny", True, 5_910_800),
        ("deit_small", False, 22_050_664),
        ("deit_base", False, 86_567_656),
        ("deit_base", True, 87_338_192),
    ],
)
def test_sizes_are_as_published(name, distillation, parameters):
    cfg = load(ViTConfig, yaml.safe_load((config_dir() / "model" / f"{name}.yaml").read_text()))
    with torch.device("meta"):
        vit = ViT(replace(cfg, distillation_token=distillation), num_classes=1000)
    assert sum(p.numel() for p in vit.parameters()) == parameters


def test_its_ffn_layers_become_sparse():
    rows = sparsify(model(), load_recipe("ste"))
    sparse = [row.name for row in rows if row.sparse]
    assert sparse == [f"blocks.{i}.ffn.{part}" for i in range(2) for part in ("up", "down")]


@pytest.mark.parametrize("recipe", ["dense", "ste"])
def test_it_learns_images(recipe):
    """Where the bright patch is."""
    vit = model(distillation_token=True)
    sparsify(vit, load_recipe(recipe))
    optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(80):
        images, labels = 0.3 * torch.randn(16, 3, 8, 8, generator=draw), torch.randint(4, (16,), generator=draw)
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = 4 * (label // 2), 4 * (label % 2)
            image[:, row : row + 4, column : column + 4] += 1
        loss = F.cross_entropy(vit(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_options_that_do_not_fit(tiny):
    with pytest.raises(UserError, match=r"model.patch_size: found 3; allowed: a divisor of model.image_size=8"):
        crosscheck.check(replace(tiny("dense"), model=replace(TINY, patch_size=3)))
