"""2:4 sparse training of any `nn.Module`: swap its linear layers and convolutions, then follow a recipe step by step.

recipe = load_recipe("fst")
sparsify(model, recipe)
training = SparseTraining(model, recipe, total_steps=1000, seed=1)
groups = parameter_groups(model, 0.1, lr=1e-3, own_lr=training.own_lr)
optimizer = AdamW(groups, 1e-3, (0.9, 0.95), 1e-8, decay=training.decay, second_moment=training.second_moment)
training.prepare(0)
for step in range(1000):
    training.at_tokens(first_token=0)
    loss(model).backward()
    training.adjust_gradients()
    optimizer.step()
    training.prepare(step + 1)
"""

from sparse_pretrain.sparsity.conv import SparseConv2d
from sparse_pretrain.sparsity.linear import SparseLinear
from sparse_pretrain.sparsity.products import apply_plans, choose_plans
from sparse_pretrain.sparsity.recipe import SparseTraining, load_recipe
from sparse_pretrain.sparsity.swap import densify, sparsify

__all__ = [
    "SparseConv2d",
    "SparseLinear",
    "SparseTraining",
    "apply_plans",
    "choose_plans",
    "densify",
    "load_recipe",
    "sparsify",
]
