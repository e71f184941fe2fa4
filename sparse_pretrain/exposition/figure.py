"""The picture of the experiment: accuracy over weights, and two networks with what they do to the plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from sparse_pretrain.exposition.connections import on_paths
from sparse_pretrain.exposition.networks import LAYERS, Shape, logits
from sparse_pretrain.exposition.search import name
from sparse_pretrain.exposition.summary import Point, Summary, percent
from sparse_pretrain.exposition.trials import MASK, STRUCTURE, Outcome, Trial
from sparse_pretrain.limits import parse_pattern
from sparse_pretrain.reporting.figures import DENSE_COLOURS, GAINED, LOST, SPARSE_COLOURS, STYLE

SEARCH, GREY = "#000000", DENSE_COLOURS[1]
BLUE, RED, GREEN, PINK, ORANGE, SKY = SPARSE_COLOURS
# colour, marker and line of a method: dashed where it prunes before training, dotted where it learns a mask
LOOKS = {
    "magnitude": (GREY, "o", "--"),
    "snip": (SKY, "s", "--"),
    "iter_snip": (SKY, "D", "--"),
    "force": (SKY, "P", "--"),
    "grasp": ("#999933", "v", "--"),
    "synflow": (BLUE, "^", "--"),
    "one_shot": (ORANGE, "o", "-"),
    "gmp": (RED, "s", "-"),
    "imp": ("#882255", "D", "-"),
    "rigl": (GREEN, "^", "-"),
    "ste": (PINK, "v", ":"),
    "sr_ste": ("#661100", "P", ":"),
    "transposable": ("#332288", "X", ":"),
}
MOST_PANELS = 4  # of widths, spread over those there are
GRID = 400
SIDES = ("#f6d5bd", "#c9ddec")  # of the plane, where a network says class 0, and class 1
CLASSES = (LOST, GAINED)


@dataclass(frozen=True)
class Drawn:
    """A network to show: its trial and outcome, and its parameters (1, parameters)."""

    trial: Trial
    outcome: Outcome
    rows: Tensor
    shape: Shape


def write_figure(summary: Summary, drawn: Mapping[str, Drawn], x: Tensor, y: Tensor, out: Path) -> None:
    """Write the picture as a PNG. The same results give the same bytes.

    Args:
        drawn: `sparsest` and `counterpart`, as far as there are.
        x, y: the points (n, 2) and their classes (n,).

    Raises:
        OSError: `out` cannot be written.
    """
    structures = dict.fromkeys(trial.network for trial, _ in summary.pruned)
    shown = list(structures)
    if len(shown) > MOST_PANELS:
        shown = [shown[round(i * (len(shown) - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 9.2 if drawn else 5), dpi=130, layout="constrained")
        parts = figure.subfigures(2 if drawn else 1, 1, height_ratios=(1, 0.95) if drawn else None, squeeze=False)[:, 0]
        above = parts[0]
        axes = above.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for ax, structure in zip(axes, shown, strict=True):
            _accuracies(ax, summary, structure)
        axes[0].set_ylabel("accuracy, best training")
        handles = {handle.get_label(): handle for ax in axes for handle in ax.get_legend_handles_labels()[0]}
        above.legend(handles=handles.values(), loc="outside lower center", ncols=7)
        if drawn:
            panels = parts[1].subplots(1, 4, squeeze=False)[0]
            titles = {"sparsest": "found by search", "counterpart": "pruned"}
            for i, (which, network) in enumerate(drawn.items()):
                _regions(panels[2 * i], network, titles[which], x, y)
                _connections(panels[2 * i + 1], network)
            for ax in panels[2 * len(drawn) :]:
                ax.set_axis_off()
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})


def _accuracies(ax: Axes, summary: Summary, structure: str) -> None:
    """The search's frontier, and each method's at one width."""
    frontier = summary.frontier
    highest = np.maximum.accumulate([point.best[1].accuracy for point in frontier.values()])
    ax.axhline(summary.target, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.step(list(frontier), highest, where="post", color=SEARCH, linewidth=2.2, label="search", zorder=4)
    ends = [0.0]
    for method, points in summary.methods.items():
        colour, marker, line = LOOKS[method]
        here = {target: point for (network, target), point in points.items() if network == structure}
        counted = sorted(_place(point) for target, point in here.items() if parse_pattern(target) is None)
        ends += [weights for weights, _ in counted]
        if counted:
            look: Any = {"marker": marker, "markersize": 4.5, "linewidth": 1.3, "zorder": 3, "label": method}
            ax.plot(*zip(*counted, strict=True), color=colour, linestyle=line, **look)
        for target, point in here.items():
            if parse_pattern(target) is not None:
                ax.plot(*_place(point), color=colour, marker=marker, markersize=8, markerfacecolor="none", linestyle="",
                        zorder=3, label=f"{method}, N:M")  # fmt: skip
                ax.annotate(target, _place(point), xytext=(5, -8), textcoords="offset points", fontsize=7, color=colour)
    width = structure.split("-")[0]
    ax.set(
        title=f"Pruned from {width} neurons a layer", xlabel="weights on a path from input to output", ylim=(0.48, 1.02)
    )
    ax.set_xlim(0, max(*ends, max(frontier)) * 1.06)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.tick_params(labelleft=True)


def _place(point: Point) -> tuple[int, float]:
    _, outcome = point.best
    return outcome.weights, outcome.accuracy


def _regions(ax: Axes, network: Drawn, title: str, x: Tensor, y: Tensor) -> None:
    """The spiral, and on which side of the network's boundary each place of the plane is."""
    low, high = x.min(dim=0).values - 0.2, x.max(dim=0).values + 0.2
    axes = [torch.linspace(float(low[i]), float(high[i]), GRID) for i in range(2)]
    plane = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1).view(-1, 2)
    side = (logits(network.rows, network.shape, plane)[0] > 0).view(GRID, GRID)
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    ax.imshow(side.numpy(), cmap=ListedColormap(SIDES), vmin=0, vmax=1, origin="lower", extent=extent)
    every = max(1, len(y) // 4000)
    for label, colour in enumerate(CLASSES):
        points = x[y == label][::every].numpy()
        ax.plot(points[:, 0], points[:, 1], linestyle="", marker=".", markersize=1.6, color=colour)
    ax.set(title=f"{title}: {percent(network.outcome.accuracy)}", xticks=[], yticks=[])
    ax.grid(visible=False)


def _connections(ax: Axes, network: Drawn) -> None:
    """Inputs at the left, the output at the right; a line for each weight, as thick as it is large."""
    weights, _ = network.shape.split(network.rows)
    paths = on_paths(weights)
    outcome = network.outcome
    hidden = [(weights[i][0] != 0).any(dim=1) | (weights[i + 1][0] != 0).any(dim=0) for i in range(LAYERS - 1)]
    heights = []  # of each layer's units, from the top down; those without any weight have none
    for there in (torch.ones(2), *hidden, torch.ones(1)):
        units = [int(unit) for unit in torch.nonzero(there)]
        heights.append({unit: 1 - (place + 0.5) / len(units) for place, unit in enumerate(units)})
    largest = max(float(weight.abs().max()) for weight in weights)
    for layer in range(LAYERS):
        for i, j in torch.nonzero(weights[layer][0]).tolist():
            value, connected = float(weights[layer][0, i, j]), bool(paths[layer][0, i, j])
            ax.plot(
                [layer, layer + 1],
                [heights[layer][j], heights[layer + 1][i]],
                color=(BLUE if value > 0 else RED) if connected else "#b5b5b5",
                linewidth=0.6 + 3 * (abs(value) / largest) ** 0.5 if connected else 1.0,
                linestyle="-" if connected else ":",
                zorder=2 if connected else 1,
            )
    for layer, places in enumerate(heights):
        for height in places.values():
            ax.plot(layer, height, marker="o", markersize=9, color="white", markeredgecolor="#333333", zorder=3)
    trial, structure = network.trial, name(network.trial.structure)
    origin = {STRUCTURE: f"all of {structure}", MASK: f"of {structure}"}.get(
        trial.method, f"{trial.method} from {structure}"
    )
    ax.set(title=f"{outcome.weights} weights, {origin}", xlim=(-0.3, LAYERS + 0.3), ylim=(0, 1))
    ax.set_axis_off()
    unused = (
        f"; {outcome.kept - outcome.weights} kept weights on no path (dotted)" if outcome.kept > outcome.weights else ""
    )
    ax.text(
        0.5, -0.02, f"blue: positive, red: negative{unused}", transform=ax.transAxes, ha="center", va="top", fontsize=8
    )
