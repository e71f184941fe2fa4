"""The picture of a sweep: history, learning curves, settings, importance. The same trials give the same bytes."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparse_pretrain.reporting.figures import SPARSE_COLOURS, STYLE
from sparse_pretrain.sweeping.results import SweepResult, TrialResult, labels
from sparse_pretrain.sweeping.space import Parameter
from sparse_pretrain.sweeping.study import short

COMPLETE, BEST, PRUNED = SPARSE_COLOURS[0], SPARSE_COLOURS[1], "#8a8a8a"
# beside the title, where it hides nothing
LEGEND: Any = {
    "fontsize": 8,
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "ncols": 4,
    "borderaxespad": 0.1,
    "columnspacing": 1.2,
}
START = 0.25  # of the longest trial: losses before it would leave no room for what differs
TEXT_LENGTH = 16  # of a tick's label


def sweep_figure(sweep: SweepResult) -> bytes:
    """A PNG."""
    with matplotlib.rc_context(STYLE):
        count = len(sweep.space)
        heights = (3.8, 3.8, 0.8 + 0.3 * max(count, 2))
        figure = Figure(figsize=(max(11.0, 2.0 + 1.4 * count), sum(heights)), dpi=130, layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=heights)
        _history(figure.add_subplot(grid[0, 0]), sweep)
        _curves(figure.add_subplot(grid[0, 1]), sweep)
        _settings(figure.add_subplot(grid[1, :]), sweep)
        _importance(figure.add_subplot(grid[2, :]), sweep)
        file = io.BytesIO()
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def _history(ax: Axes, sweep: SweepResult) -> None:
    """Each trial's last validation loss, and the best so far."""
    ax.set_title("Trials", loc="left")
    ax.set(xlabel="trial", ylabel="last validation loss (nats)")
    complete = [trial for trial in sweep.trials if trial.state == "complete"]
    pruned = [trial for trial in sweep.trials if trial.state == "pruned"]
    low, high = _limits([_loss(trial) for trial in complete + pruned])
    for shown, colour, marker, name in (
        (pruned, PRUNED, "x", "pruned"),
        (complete, COMPLETE, "o", "complete"),
    ):
        heights = [min(_loss(trial), high) for trial in shown]
        if shown:
            ax.plot([trial.number for trial in shown], heights, marker, color=colour, markersize=5, label=name)
    failed = [trial.number for trial in sweep.trials if trial.state == "failed"]
    if failed:
        ax.plot(failed, [low] * len(failed), "v", color="#000000", markersize=5, label="failed", clip_on=False)
    if complete:
        best = np.minimum.accumulate([_loss(trial) for trial in complete])
        numbers = [trial.number for trial in complete]
        ends = [*numbers, max(trial.number for trial in sweep.trials)]
        ax.step(ends, np.minimum([*best, best[-1]], high), where="post", color=BEST, linewidth=1.4, label="best so far")
    ax.set_ylim(low, high + 0.02 * (high - low))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**LEGEND)


def _curves(ax: Axes, sweep: SweepResult) -> None:
    ax.set_title("Validation loss", loc="left")
    ax.set(xlabel="step", ylabel="validation loss (nats)")
    best = sweep.best
    shown = [trial for trial in sweep.trials if trial.losses]
    begun = START * max((step for trial in shown for step in trial.losses), default=0)
    values = [loss for trial in shown for step, loss in trial.losses.items() if step >= begun]
    for trial in sorted(shown, key=lambda trial: (trial is best, trial.number)):
        steps, losses = list(trial.losses), list(trial.losses.values())
        colour = BEST if trial is best else COMPLETE if trial.state == "complete" else PRUNED
        width, alpha = (2.2, 1.0) if trial is best else (1.0, 0.6)
        ax.plot(steps, losses, color=colour, linewidth=width, alpha=alpha, marker="." if len(steps) < 3 else None)
        if trial.state == "pruned":
            ax.plot(steps[-1:], losses[-1:], "x", color=PRUNED, markersize=5)
    ax.set_ylim(*_limits(values, reach=12))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for colour, name in ((BEST, "best"), (COMPLETE, "complete"), (PRUNED, "others")):
        ax.plot([], [], color=colour, label=name)
    ax.legend(**LEGEND)


def _settings(ax: Axes, sweep: SweepResult) -> None:
    """Parallel coordinates: a line a complete trial, an axis an option, the loss last."""
    ax.set_title("Settings of complete trials, and their loss")
    complete = sorted((trial for trial in sweep.trials if trial.state == "complete"), key=_loss, reverse=True)
    names = labels([parameter.option for parameter in sweep.space])
    count = len(sweep.space)
    ax.set_xlim(-0.25, count + 0.35)
    ax.set_ylim(-0.04, 1.04)
    ax.set_xticks(range(count + 1), [*names.values(), "val loss"])
    ax.set_yticks([])
    ax.tick_params(axis="x", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.grid(visible=False)
    low, high = _limits([_loss(trial) for trial in complete], margin=0.0)
    colours: Colormap = matplotlib.colormaps["viridis"]
    for trial in complete:  # the best last, on top
        share = min((_loss(trial) - low) / (high - low), 1.0)
        heights = [_height(parameter, trial) for parameter in sweep.space]
        best = trial is sweep.best
        ax.plot(
            range(count + 1), [*heights, share],
            color=BEST if best else colours(0.92 * share), linewidth=2.6 if best else 1.1, alpha=1.0 if best else 0.8,
        )  # fmt: skip
    ticks = [_ticks(parameter) for parameter in sweep.space]
    shares = np.linspace(0, 1, 5)
    ticks.append([(float(share), f"{low + share * (high - low):.4g}") for share in shares] if complete else [])
    for x, marks in enumerate(ticks):
        ax.axvline(x, color="#333333", linewidth=1, ymin=0.04 / 1.08, ymax=1.04 / 1.08)
        for height, text in marks:
            ax.annotate(
                text, (x, height), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            )  # fmt: skip
    if not complete:
        ax.text(0.5, 0.5, "no trial is complete", transform=ax.transAxes, ha="center")


def _importance(ax: Axes, sweep: SweepResult) -> None:
    ax.set(title="Importance (PED-ANOVA)", xlabel="share of what the options decide")
    ax.grid(axis="y", visible=False)
    if not sweep.importances:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, "too few complete trials", transform=ax.transAxes, ha="center")
        return
    names = labels(list(sweep.importances))
    shares = list(sweep.importances.values())
    ax.barh(range(len(shares)), shares, color=COMPLETE, height=0.6)
    for row, share in enumerate(shares):
        ax.annotate(f"{share:.0%}", (share, row), xytext=(4, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(shares)), list(names.values()))
    ax.set_ylim(max(len(shares), 2) - 0.5, -0.5)
    ax.set_xlim(0, 1.12 * max(shares))
    ax.tick_params(axis="y", length=0)


def _loss(trial: TrialResult) -> float:
    return math.inf if trial.loss is None or math.isnan(trial.loss) else trial.loss


def _limits(losses: Sequence[float], margin: float = 0.06, reach: float = 4.0) -> tuple[float, float]:
    """What to show: from the lowest loss to the highest, unless few are so high that the rest would be one line."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return 0.0, 1.0
    low, high, middle = min(finite), max(finite), float(np.median(finite))
    if middle > low:
        high = min(high, low + reach * (middle - low))
    spread = (high - low) or 0.01 * abs(low) or 1.0
    return low - margin * spread, low + (1 + margin) * spread


def _height(parameter: Parameter, trial: TrialResult) -> float:
    """Where a setting is on its axis, from 0 to 1; equal choices a little apart, so that lines can be told."""
    value, ends = trial.params[parameter.option], parameter.ends()
    if parameter.choices:
        apart = (zlib.crc32(f"{trial.number}".encode()) % 101 / 100 - 0.5) * 0.3
        return (ends.index(value) + 0.5 + apart) / len(ends)
    return _share(parameter, value)


def _share(parameter: Parameter, value: float) -> float:
    low, high = parameter.ends()
    if getattr(parameter.distribution, "log", False):
        return math.log(value / low) / math.log(high / low)
    return float((value - low) / (high - low))


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    """Height and text."""
    ends = parameter.ends()
    if parameter.choices:
        return [((i + 0.5) / len(ends), _cut(str(choice))) for i, choice in enumerate(ends)]
    low, high = ends
    values: list[Any] = parameter.values() or []
    if getattr(parameter.distribution, "log", False):
        decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        values = [10.0**decade for decade in decades]
        values += [
            end for end in ends if all(abs(_share(parameter, end) - _share(parameter, v)) > 0.08 for v in values)
        ]
    elif not 0 < len(values) <= 7:
        indices = np.linspace(0, len(values) - 1, 5).round().astype(int)
        values = [values[i] for i in indices] if values else list(np.linspace(low, high, 5))
    return [(_share(parameter, float(value)), short(float(value))) for value in values]


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else f"{text[: TEXT_LENGTH - 1]}…"
