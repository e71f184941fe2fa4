"""The picture of a comparison: validation loss over tokens, and each seed's final gap to dense. The same runs give the
same bytes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparse_pretrain.reporting.comparison import RecipeComparison, RecipeResult
from sparse_pretrain.reporting.figures import DENSE_COLOURS, MARKERS, SPARSE_COLOURS, STYLE, token_unit
from sparse_pretrain.reporting.table import count

# A recipe has the same colour and marker in every picture. Okabe and Ito's colours, and two of Tol's for the rest.
COLOURS = {
    "dense": DENSE_COLOURS[0],
    **dict(zip(("fst", "ste", "s_ste", "ast", "sr_ste", "step"), SPARSE_COLOURS, strict=True)),
    "slope": "#882255",
    "maskllm": "#999933",
}
LABEL_GAP = 0.052  # between two labels beside the curves, as a share of the panel's height
START = 0.25  # of the run: losses before it would leave no room for what differs


def write_comparison_figure(comparison: RecipeComparison, out: Path) -> None:
    """Write the picture as a PNG.

    Raises:
        OSError: `out` cannot be written.
    """
    shown = [result for result in comparison.recipes if result.outcomes]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, max(4.2, 2.2 + 0.36 * len(shown))), dpi=150, layout="constrained")
        by_tokens, by_recipe = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _losses(by_tokens, comparison, shown)
        _gaps(by_recipe, shown)
        first = comparison.runs[0]
        seeds = max(len(result.outcomes) for result in shown)
        figure.suptitle(
            f"{first.config.model.name} ({count(first.facts['model']['parameters'])} parameters) on "
            f"{first.facts['corpus']['name']}, {count(int(first.rows['tokens'][-1]))} tokens, "
            f"{seeds} seed{'s' if seeds > 1 else ''}",
            fontsize=11,
        )
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})


def _losses(ax: Axes, comparison: RecipeComparison, shown: Sequence[RecipeResult]) -> None:
    scale, unit = token_unit(comparison.runs)
    end = float(comparison.runs[0].rows["tokens"][-1])
    ends, lowest, highest = [], [], []
    for result in shown:
        tokens, losses = _curves(result)
        colour, mean = _colour(result.recipe), losses.mean(axis=0)
        if len(losses) > 1:
            ax.fill_between(
                tokens / scale, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0
            )
        ax.plot(
            tokens / scale,
            mean,
            color=colour,
            linewidth=2.2 if result.is_dense else 1.5,
            linestyle="--" if result.is_dense else "-",
            zorder=4 if result.is_dense else 3,
            marker=_marker(result.recipe),
            markersize=4,
            markevery=max(1, len(mean) // 10),
        )
        late = tokens >= START * end
        ends.append((float(mean[-1]), result.recipe))
        lowest.append(float(losses[:, late].min()))
        highest.append(float(losses[:, late].max()))
    margin = 0.04 * max(max(highest) - min(lowest), 1e-3)
    ax.set_ylim(min(lowest) - margin, max(highest) + margin)
    ax.set_xlim(0, end / scale)
    ax.set(title="Validation loss (line: mean, band: lowest to highest seed)", xlabel=f"tokens{unit}")
    ax.set_ylabel("loss (nats per token)")
    _label_ends(ax, ends)


def _label_ends(ax: Axes, ends: Sequence[tuple[float, str]]) -> None:
    """The recipes' names at the right, by final loss, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    ordered = sorted(ends)
    heights = spread_out([(loss - low) / (high - low) for loss, _ in ordered], LABEL_GAP)
    for (loss, recipe), height in zip(ordered, heights, strict=True):
        ax.annotate(
            recipe,
            xy=(1.0, (loss - low) / (high - low)),
            xytext=(1.045, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": _colour(recipe),
                "linewidth": 1.2,
                "shrinkA": 3,
                "shrinkB": 0,
                "patchA": None,
                "relpos": (0, 0.5),  # from the middle of the text's left edge: elsewhere it would cross other names
            },
        )


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights in [0, 1], moved as little as possible (in squares) so that neighbours are `gap` apart; then
    those beyond an edge come back."""
    # Without the gaps they must only ascend: neighbours that do not share their mean (pooling adjacent violators).
    blocks: list[list[float]] = []
    for i, height in enumerate(heights):
        blocks.append([height - i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            above = blocks.pop()
            blocks[-1] += above
    moved = [float(np.mean(block)) for block in blocks for _ in block]
    last = 1 - (len(moved) - 1) * gap
    return [max(min(height, last), 0.0) + i * gap for i, height in enumerate(moved)]


def _gaps(ax: Axes, shown: Sequence[RecipeResult]) -> None:
    compared = [result for result in shown if not result.is_dense and not np.isnan(result.gap.mean)]
    ax.set(title="Final validation loss against dense of the same seed", xlabel="change in % (left: better than dense)")
    ax.axvline(0, color=DENSE_COLOURS[0], linestyle="--", linewidth=1.5)
    ax.grid(axis="y", visible=False)
    if not compared:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "no recipe with a dense run to compare with", transform=ax.transAxes, ha="center")
        return
    for row, result in enumerate(compared):
        colour = _colour(result.recipe)
        gaps = [outcome.gap for outcome in result.outcomes if not np.isnan(outcome.gap)]
        ax.plot(
            gaps, [row] * len(gaps), linestyle="", marker=_marker(result.recipe), color=colour, alpha=0.65, markersize=6
        )
        ax.plot([result.gap.mean] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2.5, solid_capstyle="butt")
        ax.annotate(
            f"{result.gap.mean:+.2f}%",
            xy=(1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            annotation_clip=False,
        )
    ax.annotate("mean", xy=(1.01, -0.75), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    ax.set_yticks(range(len(compared)), [result.recipe for result in compared])
    ax.set_ylim(len(compared) - 0.5, -0.95)  # the best on top
    ax.tick_params(axis="y", length=0)


def _curves(result: RecipeResult) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (validations,), and losses (seeds, validations): all seeds validate after the same steps."""
    logged = [outcome.run.logged("tokens", "val/loss") for outcome in result.outcomes]
    return logged[0][0], np.stack([losses for _, losses in logged])


def _colour(recipe: str) -> str:
    return COLOURS.get(recipe) or SPARSE_COLOURS[zlib.crc32(recipe.encode()) % len(SPARSE_COLOURS)]


def _marker(recipe: str) -> str:
    names = list(COLOURS)
    return MARKERS[(names.index(recipe) if recipe in COLOURS else zlib.crc32(recipe.encode())) % len(MARKERS)]
