"""What a run holds and computes, as numbers: from shapes on the `meta` device, without weights and data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import comb
from pathlib import Path

import torch
from torch import nn

from sparse_pretrain.config import TrainConfig
from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.models.blocks import FeedForward
from sparse_pretrain.models.count import BACKWARD, ModelCount, count_model
from sparse_pretrain.optim.build import hidden_weights
from sparse_pretrain.sparsity.adapter_files import with_options_of_file
from sparse_pretrain.sparsity.adapters import attach, make_adapter
from sparse_pretrain.sparsity.swap import select_layers
from sparse_pretrain.tasks.build import build_model, task_class
from sparse_pretrain.tasks.sharding import CUT, blocks_of, placements
from sparse_pretrain.tasks.task import Sizes

VOCABULARY, IMAGE_CLASSES, TEXT_CLASSES = 32_768, 1000, 3  # assumed where only the data would tell


@dataclass(frozen=True)
class Parameter:
    """shape: of the whole; moments: how many the optimizer keeps of it (Muon: one); logits: whether it is of a learned
    mask; added: whether it is not of the dense model.

    Devices may compute FFNs together (`trainer.tensor_parallel`). ffn: whether it is of one; cut: the dimension that
    they then cut into parts; None = each has it whole.
    """

    shape: tuple[int, ...]
    moments: int
    logits: bool = False
    added: bool = False
    ffn: bool = False
    cut: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class SparseLayer:
    """weight: as it is kept; rows: of its product's input for one example; groups: of a convolution."""

    name: str
    weight: Parameter
    out_features: int
    in_features: int
    rows: int
    groups: int = 1

    @property
    def numel(self) -> int:
        return self.weight.numel


@dataclass(frozen=True)
class Network:
    """A run's model.

    Attributes:
        blocks: parameters of each block, which FSDP gathers together.
        root: all others.
        sparse: its sparse layers.
        buffers: bytes of the dense model's buffers.
        product_weights: numbers of weights of the linear layers and convolutions, by name.
        block_of: the number of the block that each of them is in, if any, by name.
        ffn_outputs: how many numbers all FFNs give out, and take in, for one example.
        cut_flop: of one example's forward pass, with those weights of FFNs that devices may cut into parts.
        count: parameters and FLOP.
    """

    blocks: list[list[Parameter]]
    root: list[Parameter]
    sparse: list[SparseLayer]
    buffers: int
    product_weights: dict[str, int]
    block_of: dict[str, int]
    ffn_outputs: int
    cut_flop: int
    count: ModelCount

    @property
    def parameters(self) -> list[Parameter]:
        return [parameter for group in (*self.blocks, self.root) for parameter in group]

    @property
    def dense_parameters(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if not parameter.added]

    def forward_flop(self, tokens_per_example: int) -> int:
        """Of one example."""
        return self.count.flop_per_token * tokens_per_example // (1 + BACKWARD)

    def block_flop(self, tokens_per_example: int) -> int:
        """Of one example's forward pass through the blocks: what activation checkpointing computes again."""
        outside = sum(
            2 * self.count.rows[name] * weights
            for name, weights in self.product_weights.items()
            if name not in self.block_of and name in self.count.rows
        )
        return max(self.forward_flop(tokens_per_example) - outside, 0)


def sizes_of(cfg: TrainConfig) -> tuple[Sizes, list[str]]:
    """What of the data decides the model's shape, and what had to be assumed of it."""
    data, assumed = cfg.data, []
    vocabulary: int | None = getattr(data, "vocab_size", None)
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer not in (None, "bpe", "wordpiece") and Path(tokenizer).expanduser().exists():
        from sparse_pretrain.data.tokenizer import given_tokenizer_json, load_tokenizer, vocab_size

        vocabulary = vocab_size(load_tokenizer(given_tokenizer_json(tokenizer), tokenizer))
    elif getattr(cfg.model, "vocab_size", None) is None and data.task != "image_classification":
        source = "data.vocab_size" if vocabulary else "no option says it"
        vocabulary = vocabulary or VOCABULARY
        assumed.append(f"the tokenizer is not there yet: a vocabulary of {vocabulary:,} tokens ({source})")
    classes = 0
    if data.task in ("image_classification", "text_classification"):
        classes = IMAGE_CLASSES if data.task == "image_classification" else TEXT_CLASSES
        assumed.append(f"the data are not read: {classes:,} classes")
    return Sizes(vocab_size=vocabulary or 0, num_classes=classes), assumed


def read_network(cfg: TrainConfig, sizes: Sizes) -> Network:
    """The model of a run under its recipe.

    Raises:
        UserError: the recipe's layer patterns do not fit the model, or files that it names are not there.
    """
    recipe = cfg.recipe
    adapter = recipe.adapter if recipe.adapter.path is None else with_options_of_file(recipe.adapter)
    with torch.device("meta"):
        dense, model = build_model(cfg, sizes), build_model(cfg, sizes)
        rows = select_layers(model, recipe)
        shapes = {row.name: model.get_submodule(row.name) for row in rows}
        logits: set[nn.Parameter] = set()
        for row in rows:
            layer = shapes[row.name]
            if row.adapted:
                attach(layer, make_adapter(adapter, row.in_features, row.out_features))
            if row.sparse and recipe.projection == "learned":
                pattern = parse_pattern(recipe.pattern)
                assert pattern is not None
                size = (row.out_features, row.in_features // pattern[1], comb(pattern[1], pattern[0]))
                layer.learned = nn.ParameterDict({"logits": torch.empty(size)})
                logits.add(layer.learned["logits"])
    count = count_model(model, dense, task_class(cfg).example(cfg), cfg.data.tokens_per_example, logits)
    muon = hidden_weights(model) if cfg.optimizer.name == "muon" else set()
    frozen = _frozen(cfg)
    own = {name for name, _ in dense.named_parameters()}
    cuts: dict[nn.Parameter, int | None] = {}
    ffn_outputs = cut_flop = 0
    for name, ffn in model.named_modules():
        if isinstance(ffn, FeedForward):
            ffn_outputs += count.rows[f"{name}.down"] * ffn.down.out_features
            for part, linear in ffn.named_children():
                found = {
                    linear.get_parameter(own_name): getattr(placement, "dim", None)
                    for own_name, placement in placements(linear, CUT[part]).items()
                }
                cuts |= found
                products = sum(p.numel() for p, cut in found.items() if cut is not None and p.dim() == 2)
                cut_flop += 2 * count.rows[f"{name}.{part}"] * products

    def describe(name: str, parameter: nn.Parameter) -> Parameter:
        return Parameter(
            tuple(parameter.shape),
            moments=0 if frozen and name in own else 1 if parameter in muon else 2,
            logits=parameter in logits,
            added=name not in own,
            ffn=parameter in cuts,
            cut=cuts.get(parameter),
        )

    names = {parameter: name for name, parameter in model.named_parameters()}
    blocks, taken = [], set()
    for block in blocks_of(model):
        group = [p for p in block.parameters() if p not in taken]
        taken.update(group)
        blocks.append([describe(names[p], p) for p in group])
    root = [describe(name, p) for p, name in names.items() if p not in taken]
    members = {module: number for number, block in enumerate(blocks_of(model)) for module in block.modules()}
    return Network(
        blocks=blocks,
        root=root,
        sparse=[
            SparseLayer(
                row.name,
                describe(f"{row.name}.weight", shapes[row.name].weight),  # type: ignore[arg-type]
                row.out_features,
                row.in_features,
                count.rows.get(row.name, 0),
                getattr(shapes[row.name], "groups", 1),
            )
            for row in rows
            if row.sparse
        ],
        buffers=sum(buffer.nbytes for buffer in dense.buffers()),
        product_weights={row.name: shapes[row.name].weight.numel() for row in rows},  # type: ignore[operator]
        block_of={row.name: members[shapes[row.name]] for row in rows if shapes[row.name] in members},
        ffn_outputs=ffn_outputs,
        cut_flop=cut_flop,
        count=count,
    )


def _frozen(cfg: TrainConfig) -> bool:
    """Whether the weights themselves are trained at no step, so that they never get moments."""
    schedule = cfg.recipe.schedule
    from_the_start = not schedule.dense_warmup and not schedule.dense_warmup_max and not cfg.recipe.adapter.start
    return not cfg.recipe.train_weights and from_the_start
