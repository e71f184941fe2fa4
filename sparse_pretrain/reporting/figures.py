"""The pictures of the report: curves as SVG, masks as PNG data URIs. The same runs give the same bytes."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sparse_pretrain.reporting.run_data import DENSE_FINETUNE, RunData, dense_counterpart

# Okabe and Ito's palette for colour-blind readers, without yellow (too light) and black (dense runs).
SPARSE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DENSE_COLOURS = ("#000000", "#7a7a7a")
SHARED = "#555555"  # what belongs to several runs
MARKERS = "osD^vP"
KEPT, PRUNED, LOST, GAINED = "#5b6770", "#ffffff", "#D55E00", "#0072B2"
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and read out
    "svg.hashsalt": "sparse-pretrain",
    "font.size": 9.0,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlesize": 10.0,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class RunStyle:
    label: str
    colour: str
    marker: str
    line: Any


def run_styles(runs: Sequence[RunData], labels: Sequence[str]) -> list[RunStyle]:
    """A colour and a marker per run, the same in every figure; its line changes when colours run out."""
    counts = {True: 0, False: 0}
    styles = []
    for run, label in zip(runs, labels, strict=True):
        colours = DENSE_COLOURS if run.is_dense else SPARSE_COLOURS
        turn, index = divmod(counts[run.is_dense], len(colours))
        counts[run.is_dense] += 1
        styles.append(RunStyle(label, colours[index], MARKERS[index], ("-", "--", ":", "-.")[turn % 4]))
    return styles


def loss_figure(runs: Sequence[RunData], styles: Sequence[RunStyle]) -> str:
    """Validation and training loss against tokens and against training time."""
    with _figure("loss", 4.3) as (figure, svg):
        by_tokens, by_time = figure.subplots(1, 2, sharey=True)
        scale, unit = token_unit(runs)
        _losses(by_tokens, runs, styles, "tokens", scale)
        by_tokens.set(title=f"Loss by {runs[0].unit}", xlabel=f"{runs[0].unit}{unit}", ylabel="loss (nats)")
        scale, unit = _time_unit(max(float(run.rows["seconds"][-1]) for run in runs))
        _losses(by_time, runs, styles, "seconds", scale)
        by_time.set(title="Loss by training time", xlabel=f"{unit} of training, without validation and checkpoints")
        low, high = _loss_range(runs)
        by_tokens.set_ylim(low - 0.04 * (high - low), high)
        by_time.tick_params(labelleft=True)
        handles = [_handle(style) for style in styles]
        handles.append(Line2D([], [], color=SHARED, alpha=0.5, linewidth=1, label="training, smoothed"))
        handles.append(Line2D([], [], color=SHARED, marker="o", markersize=4, label="validation"))
        figure.legend(handles=handles, loc="outside lower center", ncols=_columns(handles, 120))
    return svg[0]


def sparsity_figure(runs: Sequence[RunData], styles: Sequence[RunStyle]) -> str | None:
    """Validation loss above dense, and flip rate, against tokens; None if no run has either."""
    gaps = [(_gap(run, dense), style) for run, dense, style in _with_dense(runs, styles)]
    flips = [(run, style) for run, style in zip(runs, styles, strict=True) if len(_flip_rates(run)[0])]
    gaps = [(gap, style) for gap, style in gaps if len(gap[0])]
    panels = bool(gaps) + bool(flips)
    if not panels:
        return None
    with _figure("sparsity", 4.0, width=10.6 if panels == 2 else 6.4) as (figure, svg):
        axes = iter(figure.subplots(1, panels, squeeze=False)[0])
        scale, unit = token_unit(runs)
        if gaps:
            ax = next(axes)
            ax.axhline(0, color=DENSE_COLOURS[0], linewidth=1.2, label="dense")
            for (tokens, gap), style in gaps:
                ax.plot(tokens / scale, gap, **_validation(style, len(gap)), label=style.label)
            kind = runs[0].unit
            ax.set(title=f"Validation loss above dense, at equal {kind}", xlabel=f"{kind}{unit}", xlim=(0, None))
            ax.set_ylabel("loss - dense loss (nats)")
            _legend_below(ax)
        if flips:
            ax = next(axes)
            for run, style in flips:
                tokens, rates = _flip_rates(run)
                every = run.config.recipe.schedule.refresh_every
                label = f"{style.label}, refreshed every {every} step{'s' if every > 1 else ''}"
                ax.plot(
                    tokens / scale,
                    rates,
                    color=style.colour,
                    linestyle=style.line,
                    linewidth=1.5,
                    label=label,
                )
            _log_if_wide(ax, np.concatenate([_flip_rates(run)[1] for run, _ in flips]))
            ax.set(title="Flip rate between two refreshes", xlabel=f"{runs[0].unit}{unit}", xlim=(0, None))
            ax.set_ylabel("share of mask entries changed")
            _legend_below(ax)
    return svg[0]


def mask_picture(mask: np.ndarray) -> str:
    """A mask corner, a pixel per entry, as a PNG data URI: kept dark, pruned white."""
    return _png(np.where(mask[..., None], to_rgb(KEPT), to_rgb(PRUNED)))


def change_picture(first: np.ndarray, last: np.ndarray) -> str:
    """Where two corners of one mask differ: lost and gained entries in colour, kept ones pale."""
    pixels = np.where((first & last)[..., None], to_rgb("#d9dde0"), to_rgb(PRUNED))
    pixels[first & ~last] = to_rgb(LOST)
    pixels[~first & last] = to_rgb(GAINED)
    return _png(pixels)


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    imsave(file, pixels, format="png", metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@contextmanager
def _figure(name: str, height: float, width: float = 10.6) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on; its SVG, for use inside HTML, is in the list afterwards."""
    svg: list[str] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, svg
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Ids are global to a page: two figures' clip paths of one name would clip with the first one's.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    svg.append(re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL))


def _losses(ax: Axes, runs: Sequence[RunData], styles: Sequence[RunStyle], column: str, scale: float) -> None:
    changes: dict[tuple[float, str], str] = {}
    for run, style in zip(runs, styles, strict=True):
        x, loss = run.logged(column, "train/loss")
        ax.plot(
            x / scale,
            _smooth(loss),
            color=style.colour,
            linestyle=style.line,
            linewidth=0.9,
            alpha=0.45,
            zorder=2,
        )
        x, loss = run.logged(column, "val/loss")
        ax.plot(x / scale, loss, **_validation(style, len(loss)), zorder=3)
        for i in range(1, len(run.phases)):
            if run.phases[i] != run.phases[i - 1]:
                change = run.rows[column][i - 1] / scale, run.phases[i]
                changes[change] = SHARED if change in changes else style.colour
    ax.set_xlim(0, None)
    for mark, ((at, phase), colour) in enumerate(changes.items()):
        ax.axvline(at, color=colour, linestyle=":", linewidth=1)
        if mark < 8:  # below one another, as long as they do not get down to the curves
            ax.annotate(
                f" {phase} ",
                (at, 0.985 - 0.055 * mark),
                xycoords=("data", "axes fraction"),
                color=colour,
                ha="right" if at > ax.get_xlim()[1] / 2 else "left",
                va="top",
                fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8},
            )


def _legend_below(ax: Axes) -> None:
    handles, _ = ax.get_legend_handles_labels()
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=_columns(handles, 60))


def _columns(handles: Sequence[Artist], width: int) -> int:
    """How many columns of legend fit into `width` characters."""
    lengths = [6 + len(str(handle.get_label())) for handle in handles]
    return len(handles) if sum(lengths) <= width else max(1, width // max(lengths))


def _validation(style: RunStyle, points: int) -> dict[str, Any]:
    return {
        "color": style.colour,
        "linestyle": style.line,
        "linewidth": 1.6,
        "marker": style.marker,
        "markersize": 4,
        "markevery": max(1, points // 16),
    }


def _handle(style: RunStyle) -> Line2D:
    return Line2D(
        [],
        [],
        color=style.colour,
        linestyle=style.line,
        linewidth=2,
        marker=style.marker,
        markersize=5,
        label=style.label,
    )


def _loss_range(runs: Sequence[RunData]) -> tuple[float, float]:
    """The losses to show: those of a run's first tenth would leave no room for what differs."""
    lowest, highest = [], []
    for run in runs:
        steps, loss = run.logged("step", "train/loss")
        loss = _smooth(loss)
        after = loss[steps >= min(run.config.trainer.steps / 10, run.step)]
        _, val = run.logged("step", "val/loss")
        lowest += [np.min(part) for part in (after, val) if len(part)]
        highest += [np.max(part) for part in (after,) if len(part)]
    low, high = (min(lowest), max(highest)) if lowest and highest else (0.0, 1.0)
    return low, max(high, low + 1e-3)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over three rows, or a thirtieth: an exponential one would lag."""
    half = 1 + len(values) // 60
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    # The window narrows at both ends, so that it stays centred.
    reach = np.minimum(half, np.minimum(i, len(values) - 1 - i))
    return (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)


def _with_dense(runs: Sequence[RunData], styles: Sequence[RunStyle]) -> Iterator[tuple[RunData, RunData, RunStyle]]:
    for run, style in zip(runs, styles, strict=True):
        dense = dense_counterpart(run, runs)
        if dense is not None:
            yield run, dense, style


def _gap(run: RunData, dense: RunData) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and validation loss minus the dense run's at the same step; not of the first tenth, whose large
    differences would hide the others."""
    steps, loss = run.logged("step", "val/loss")
    tokens, _ = run.logged("tokens", "val/loss")
    dense_steps, dense_loss = dense.logged("step", "val/loss")
    _, here, there = np.intersect1d(steps, dense_steps, return_indices=True)
    late = steps[here] > run.config.trainer.steps / 10
    return tokens[here][late], (loss[here] - dense_loss[there])[late]


def _flip_rates(run: RunData) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and flip rate while masks are refreshed: in the dense fine-tune the last one stands."""
    there = ~np.isnan(run.rows["sparsity/flip_rate"]) & (np.array(run.phases) != DENSE_FINETUNE)
    return run.rows["tokens"][there], run.rows["sparsity/flip_rate"][there]


def _log_if_wide(ax: Axes, values: np.ndarray) -> None:
    positive = values[values > 0]
    if len(positive) and positive.max() > 8 * positive.min():
        ax.set_yscale("log", nonpositive="mask")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.grid(True, which="minor", axis="y", color="#f2f2f2")
    else:
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.set_ylim(0, None)


def token_unit(runs: Sequence[RunData]) -> tuple[float, str]:
    most = max(float(run.rows["tokens"][-1]) for run in runs)
    return next(
        ((scale, f" ({word})") for scale, word in ((1e9, "billion"), (1e6, "million")) if most >= scale / 5),
        (1.0, ""),
    )


def _time_unit(most: float) -> tuple[float, str]:
    return next(
        ((s, u) for s, u in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")) if most >= 3 * s),
        (1.0, "seconds"),
    )
