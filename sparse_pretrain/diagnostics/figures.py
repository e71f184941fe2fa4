"""The pictures of an inspection, as PNG. The same findings give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from sparse_pretrain.diagnostics.findings import Findings, PairAgreement
from sparse_pretrain.reporting.figures import DENSE_COLOURS, MARKERS, SPARSE_COLOURS, STYLE

HEAT = "cividis"  # as even for colour-blind readers
MOST_NUMBERS = 12  # rows or columns of a heat map up to which its numbers are written into it
LEAST = 1e-4  # of the singular values shown, over the weight's largest
LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    marker: str
    style: str


def lines(checkpoints: Sequence[Findings]) -> list[Line]:
    """How each is drawn: dense ones black and grey; the line changes when colours run out."""
    counts = {True: 0, False: 0}
    drawn = []
    for i, checkpoint in enumerate(checkpoints):
        colours = SPARSE_COLOURS if checkpoint.is_sparse else DENSE_COLOURS
        turn, index = divmod(counts[checkpoint.is_sparse], len(colours))
        counts[checkpoint.is_sparse] += 1
        drawn.append(Line(checkpoint.label, colours[index], MARKERS[i % len(MARKERS)], LINES[turn % len(LINES)]))
    return drawn


def write_figures(checkpoints: Sequence[Findings], pairs: Sequence[PairAgreement], threshold: float, out: Path) -> None:
    """Write `sinks.png`, `outliers.png`, `masks.png` and `spectra.png` into the folder `out`.

    Raises:
        OSError: it cannot be written.
    """
    drawn = lines(checkpoints)
    with matplotlib.rc_context(STYLE):
        _save(_sinks(checkpoints, drawn, threshold), out / "sinks.png")
        _save(_outliers(checkpoints, drawn), out / "outliers.png")
        _save(_masks(checkpoints, pairs), out / "masks.png")
        _save(_spectra(checkpoints, drawn), out / "spectra.png")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _sinks(checkpoints: Sequence[Findings], drawn: Sequence[Line], threshold: float) -> Figure:
    """Above, a column per checkpoint: α by layer and head, of the first token and of the one with the highest; below:
    the highest α by layer, and where sinks are."""
    shown = {"first_alpha": "of the first token", "highest_alpha": "of the token with most"}
    most_layers = max(len(found.attention) for found in checkpoints)
    height = min(0.28 * most_layers + 1.0, 3.6)
    figure = Figure(figsize=(max(8.6, 2.4 * len(drawn) + 1.6), 2 * height + 4.0), dpi=120, layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2 * height, 4.0))[:, 0]
    axes = above.subplots(2, len(drawn), squeeze=False)
    for row, (figures, title) in zip(axes, shown.items(), strict=True):
        maps = [np.array([layer[figures] for layer in found.attention.values()]) for found in checkpoints]
        highest = max(threshold, *(float(values.max()) for values in maps))
        for ax, values in zip(row, maps, strict=True):
            image = _heat_map(ax, values, 0.0, highest)
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        row[0].set_ylabel("layer")
        above.colorbar(image, ax=list(row), label=rf"$\alpha$ {title}")
    for ax, line in zip(axes[0], drawn, strict=True):
        ax.set_title(line.label)
    for ax in axes[1]:
        ax.set_xlabel("head")
    by_layer, by_position = below.subplots(1, 2)
    for found, line in zip(checkpoints, drawn, strict=True):
        layers = list(found.attention.values())
        _plot(by_layer, [max(layer["highest_alpha"]) for layer in layers], line)
        shares = zip(*(layer["sink_at"] for layer in layers), strict=True)
        at = [float(np.mean(of_layers)) for of_layers in shares if None not in of_layers]
        _plot(by_position, at, line, first=1)
    by_layer.axhline(threshold, color="#555555", linewidth=1, linestyle=":")
    by_layer.set(title=r"Highest $\alpha$ of a head", xlabel="layer", ylim=(0, None))
    by_layer.set_ylabel(r"$\alpha$, mean over sequences")
    by_position.set(
        title=rf"Sinks by position: $\alpha$ > {threshold:g}", xlabel="position of the token", ylim=(0, None)
    )
    by_position.set_ylabel("share of heads and sequences")
    by_position.yaxis.set_major_formatter(PercentFormatter(1.0))
    for ax in (by_layer, by_position):
        ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    _legend(below, by_layer)
    return figure


def _outliers(checkpoints: Sequence[Findings], drawn: Sequence[Line]) -> Figure:
    figure = Figure(figsize=(11.4, 4.0), dpi=120, layout="constrained")
    ratio, kurtosis, inputs = figure.subplots(1, 3)
    for found, line in zip(checkpoints, drawn, strict=True):
        states = list(found.hidden.values())
        _plot(ratio, [state["largest_over_median"] for state in states], line)
        _plot(kurtosis, [state["kurtosis"] for state in states], line)
        by_block = [
            max(row["largest_over_median"] for name, row in found.inputs.items() if name.startswith(f"{block}."))
            for block in found.hidden
            if block != "embedding"
        ]
        _plot(inputs, by_block, line)
    for ax in (ratio, kurtosis):
        ax.set_xlabel("hidden state after block (0: embedding)")
    ratio.set(title="Largest |h| / median |h|")
    kurtosis.axhline(3, color="#555555", linewidth=1, linestyle=":")
    kurtosis.set(title="Kurtosis of the hidden state (normal: 3)")
    inputs.set(title="Inputs of linear layers: largest E[x²] / median", xlabel="block (its layer with most)")
    for ax in (ratio, kurtosis, inputs):
        _log_if_wide(ax)
        ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    _legend(figure, ratio)
    return figure


def _masks(checkpoints: Sequence[Findings], pairs: Sequence[PairAgreement]) -> Figure:
    """Share of equal mask entries, mean over layers: of every two checkpoints, and of each with the magnitudes of W;
    beside it by layer."""
    labels = [found.label for found in checkpoints]
    values = np.full((len(labels), len(labels) + 1), np.nan)
    for i, found in enumerate(checkpoints):
        values[i, i] = 1.0
        values[i, -1] = np.mean([layer["magnitude_mask"]["equal"] for layer in found.layers.values()])
    for pair in pairs:
        i, j = labels.index(pair.a), labels.index(pair.b)
        values[i, j] = values[j, i] = np.nan if pair.mean is None else pair.mean.equal
    figure = Figure(figsize=(4.6 + 0.9 * len(labels) + 4.6, max(3.4, 2.0 + 0.6 * len(labels))), dpi=120)
    figure.set_layout_engine("constrained")
    matrix, by_layer = figure.subplots(1, 2, width_ratios=(len(labels) + 2.5, 6))
    image = _heat_map(matrix, values, min(0.5, float(np.nanmin(values))), 1.0)
    matrix.set_xticks(range(len(labels) + 1), [*labels, "magnitude\nof W"], rotation=30, ha="right")
    matrix.set_yticks(range(len(labels)), labels)
    matrix.set(title="Share of equal mask entries")
    figure.colorbar(image, ax=matrix, shrink=0.8)
    compared = {f"{pair.a} and {pair.b}": pair.layers for pair in pairs if pair.layers}
    curves = {name: [row.equal for row in layers.values()] for name, layers in compared.items()}
    names = list(next(iter(compared.values()), checkpoints[0].layers))
    if len(labels) == 1:
        own = [layer["magnitude_mask"]["equal"] for layer in checkpoints[0].layers.values()]
        curves[f"{labels[0]} and the magnitudes of W"] = own
    for (name, equal), colour, marker in zip(curves.items(), SPARSE_COLOURS, MARKERS, strict=False):
        _plot(by_layer, equal, Line(name, colour, marker, "-"))
    chance = next((row.equal_by_chance for layers in compared.values() for row in layers.values()), 0.5)
    by_layer.axhline(chance, color="#555555", linewidth=1, linestyle=":", label="by chance")
    if len(names) <= MOST_NUMBERS:
        by_layer.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    else:
        by_layer.set_xlabel("sparse layer")
    left_out = len(curves) - len(SPARSE_COLOURS)
    title = f"By layer, without the last {left_out} pairs" if left_out > 0 else "By layer"
    by_layer.set(title=title, ylabel="share of equal mask entries")
    _legend(figure, by_layer)
    return figure


def _spectra(checkpoints: Sequence[Findings], drawn: Sequence[Line]) -> Figure:
    """A panel per kind of layer: the singular values of what is pruned, over the weight's largest one; geometric mean
    over the blocks."""
    kinds = list(dict.fromkeys(_kind(name) for found in checkpoints for name in found.layers))
    columns = min(len(kinds), 3)
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(max(4.6 * columns, 7.5), 3.6 * rows + 0.8), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, kind in zip(axes, kinds, strict=False):
        for found, line in zip(checkpoints, drawn, strict=True):
            spectra = [row["spectra"] for name, row in found.layers.items() if _kind(name) == kind]
            for part, style in (("weight", ":"), ("residual", "-"), ("residual_after_adapter", "--")):
                if spectra and part in spectra[0]:
                    relative = _mean_spectrum(spectra, part)
                    width, label = (1.0 if part == "weight" else 1.7), (line.label if part == "residual" else None)
                    ax.plot(
                        range(1, len(relative) + 1), relative, style, color=line.colour, linewidth=width, label=label
                    )
        ax.set_yscale("log", nonpositive="mask")
        ax.set_ylim(max(LEAST, ax.get_ylim()[0]), None)
        ax.set(title=kind, xlabel="number of the singular value", ylabel=r"$\sigma$ / largest $\sigma$ of the weight")
    for ax in axes[len(kinds) :]:
        ax.set_visible(False)
    figure.suptitle("Singular values: solid what is pruned, dashed after the adapter, dotted the weight", fontsize=10)
    _legend(figure, axes[0])
    return figure


def _mean_spectrum(spectra: Sequence[dict], part: str) -> np.ndarray:
    relative = [np.array(row[part]["singular_values"]) / row["weight"]["singular_values"][0] for row in spectra]
    shortest = min(map(len, relative))
    return np.exp(np.mean([np.log(np.maximum(values[:shortest], 1e-30)) for values in relative], axis=0))


def _kind(layer: str) -> str:
    """`blocks.3.ffn.up` -> `ffn.up`."""
    return ".".join(part for part in layer.split(".")[1:] if not part.isdecimal())


def _plot(ax: Axes, values: Sequence[float], line: Line, first: int = 0) -> None:
    ax.plot(
        range(first, first + len(values)),
        values,
        color=line.colour,
        linestyle=line.style,
        linewidth=1.6,
        marker=line.marker,
        markersize=4,
        markevery=max(1, len(values) // 16),
        label=line.label,
    )


def _heat_map(ax: Axes, values: np.ndarray, low: float, high: float) -> matplotlib.image.AxesImage:
    image = ax.imshow(values, cmap=HEAT, vmin=low, vmax=high, aspect="auto")
    ax.grid(visible=False)
    if max(values.shape) <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                dark = value < (low + high) / 2
                colour = "white" if dark else "black"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    return image


def _legend(figure: Figure | SubFigure, ax: Axes) -> None:
    """Below all panels, in as many columns as there is room for."""
    handles, labels = ax.get_legend_handles_labels()
    characters = 10 * figure.bbox.width / figure.dpi
    columns = max(1, int(characters / (6 + max(map(len, labels)))))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns))


def _log_if_wide(ax: Axes) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.get_lines()])
    if values.max() > 8 * max(values.min(), 1e-30):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        ax.set_ylim(0, None)
