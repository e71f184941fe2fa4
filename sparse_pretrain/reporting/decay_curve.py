"""The picture of a search for the decay factor: flip rate over that of a dense run, against the factor."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparse_pretrain.reporting.figures import SPARSE_COLOURS, STYLE

CURVE, CHOSEN, WINDOW, FAILED = SPARSE_COLOURS[0], SPARSE_COLOURS[1], SPARSE_COLOURS[2], "#555555"


def decay_curve(
    points: Sequence[tuple[float, float]],
    failed: Sequence[float],
    chosen: float,
    window: tuple[float, float],
    sample_step: int,
    refresh_every: int,
) -> bytes:
    """A PNG.

    Args:
        points: decay factor and ratio of the flip rates, by factor; at least one.
        failed: factors whose runs gave no flip rate.
        chosen: one of the points' factors.
        window: the ratios wanted.
        sample_step: where the flip rates are from.
        refresh_every: steps in which the masks changed so.
    """
    factors, ratios = zip(*points, strict=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
        ax = figure.subplots()
        ax.axhspan(*window, color=WINDOW, alpha=0.18, linewidth=0, label=f"wanted: {window[0]:.2f} to {window[1]:.2f}")
        ax.axhline(1.0, color="black", linewidth=1, label="dense")
        ax.plot(factors, ratios, color=CURVE, marker="o", markersize=4.5, linewidth=1.6, label="sparse")
        ratio = dict(points)[chosen]
        ax.plot(
            [chosen], [ratio], color=CHOSEN, marker="o", markersize=9, linestyle="none", label=f"chosen: {chosen:g}"
        )
        if failed:
            ax.plot(failed, [0] * len(failed), color=FAILED, marker="x", linestyle="none", label="no flip rate")
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        ax.margins(x=0.06)
        ax.set_ylim(-0.03, max(1.15, 1.08 * max(ratios)))
        ax.set(xlabel="decay factor", ylabel="flip rate / flip rate of the dense run")
        ax.set_title(f"Mask changes in {refresh_every} step{'s' if refresh_every > 1 else ''}, at step {sample_step}")
        figure.legend(loc="outside lower center", ncols=3 if failed else 4)
        file = io.BytesIO()
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()
