"""What the tests of the published recipes share: a layer in training, and the same steps written out in fp64."""

import torch
from torch import nn

from sparse_pretrain.config import OptimizerConfig
from sparse_pretrain.optim.build import build_optimizers
from sparse_pretrain.sparsity import SparseTraining, sparsify

LR, BETA1, BETA2, EPS = 0.05, 0.9, 0.75, 1e-8
OUT, IN, TOKENS, STEPS = 8, 16, 12, 40


def keep(scores, n=2, m=4):
    """N of M by rank: how many of its group go before an entry, larger ones and equal ones to its left."""
    a = scores.detach().double().abs().nan_to_num(nan=torch.inf, posinf=torch.inf).reshape(-1, m)
    left = torch.ones(m, m).tril(-1).bool()  # [i, j]: j is to the left of i
    before = (a[:, None, :] > a[:, :, None]) | ((a[:, None, :] == a[:, :, None]) & left)
    return (before.sum(-1) < n).view(scores.shape)


def build(recipe, steps=STEPS, out=OUT, inputs=IN, eps=EPS, weight_decay=0.0, layer=None):
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": layer or nn.Linear(inputs, out, bias=False)})
    sparsify(model, recipe, include=["ffn"])
    training = SparseTraining(model, recipe, steps, seed=1, beta2=BETA2, eps=eps)
    cfg = OptimizerConfig(lr=LR, betas=[BETA1, BETA2], eps=eps, weight_decay=weight_decay)
    (optimizer,) = build_optimizers(model, cfg, training.decay, training.second_moment, training.own_lr)
    training.prepare(0)
    return model, training, optimizer


def data(step, scale=1.0):
    """Inputs and what the outputs should be, other ones in each step; inputs differ in size."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(TOKENS, IN, generator=generator) * torch.linspace(0.3, 3.0, IN)
    return x, torch.randn(TOKENS, OUT, generator=generator), scale


def train_step(model, training, optimizer, step, x, y, scale=1.0):
    """One optimizer step; returns outputs and input gradient."""
    x = x.clone().requires_grad_()
    out = model["ffn"](x)
    (scale * 0.5 * (out - y).square().sum()).backward()
    training.adjust_gradients()
    optimizer.step()
    optimizer.zero_grad()
    training.prepare(step + 1)
    return out.detach(), x.grad


class Adam:
    """Adam, fp64, of one tensor. frozen: v̂ that takes the place of the second moment."""

    def __init__(self, lr=LR, eps=EPS):
        self.lr, self.eps, self.t, self.m, self.v, self.frozen = lr, eps, 0, 0.0, 0.0, None

    def step(self, weight, gradient, outside=None):
        """outside (AST): what joins the first moment in this step only; the second is then of the two together."""
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * gradient
        update = self.m if outside is None else self.m + outside
        self.v = BETA2 * self.v + (1 - BETA2) * (gradient if outside is None else update) ** 2
        corrected = self.v / (1 - BETA2**self.t) if self.frozen is None else self.frozen
        return weight - self.lr * (update / (1 - BETA1**self.t)) / (corrected**0.5 + self.eps)


def near(found, expected, **tolerance):
    torch.testing.assert_close(found.detach().double(), expected, **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


def double_pruned(weight, mask, n=2, m=4):
    """Which entries of Ŵ are left when Ŵᵀ is pruned again along out_features."""
    return keep((weight * mask).T.contiguous(), n, m).T & mask
