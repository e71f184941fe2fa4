"""2:4 hidden activations in the model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sparse24.reference import magnitude_mask

from sparse_pretrain import crosscheck
from sparse_pretrain.config_models import GPTConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.models.blocks import FeedForward
from sparse_pretrain.models.gpt import GPT

SPARSE = GPTConfig(
    name="tiny", n_layer=2, n_head=4, d_model=32, max_seq_len=16, activation="relu2", activation_sparsity="2:4"
)


@pytest.mark.parametrize("training", [True, False])
def test_the_down_projection_sees_2_4_activations(training):
    ffn = FeedForward(SPARSE).train(training)
    seen = []
    ffn.down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 5, 32)
    y = ffn(x)
    assert ((seen[0] != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()
    hidden = F.relu(ffn.up(x)).square()
    torch.testing.assert_close(y, ffn.down(hidden * magnitude_mask(hidden)))
    dense = FeedForward(replace(SPARSE, activation_sparsity="none"))
    dense.load_state_dict(ffn.state_dict())
    assert not torch.equal(dense(x), y)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_and_generates(checkpointing):
    torch.manual_seed(0)
    gpt = GPT(replace(SPARSE, activation_checkpointing=checkpointing), vocab_size=50)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    tokens = torch.randint(50, (4, 17))
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(gpt(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    # what a token says of the next does not depend on how many came with it
    alone = gpt.generate(tokens[:1, :3], max_new_tokens=5, temperature=0)
    assert alone.shape == (1, 8)
    torch.testing.assert_close(gpt(alone[:, :4])[:, :3], gpt(alone[:, :3]))


def test_compiled_it_is_the_same():
    ffn = FeedForward(SPARSE)
    x = torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(ffn, fullgraph=True, backend="aot_eager")(x), ffn(x))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_it_needs_squared_relu(tiny, activation):
    cfg = tiny(model__activation=activation, model__activation_sparsity="2:4")
    with pytest.raises(UserError, match=f"model.activation_sparsity: found 2:4 with model.activation={activation}"):
        crosscheck.check(cfg)


def test_it_needs_whole_groups_of_four(tiny):
    cfg = tiny("dense", model__activation="relu2", model__activation_sparsity="2:4", model__d_ff=66)
    with pytest.raises(UserError, match=r"model.d_ff: found 66; allowed: a multiple of 4"):
        crosscheck.check(cfg)
    crosscheck.check(replace(cfg, model=replace(cfg.model, d_ff=68)))
