"""Results as files: JSON with everything, Markdown and a picture to read. Written again whenever there is more."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks import machine
from benchmarks.rows import EAGER, GRAPH, OK, SKIPPED, Row
from benchmarks.run import Results

TITLES = {
    "ceilings": "Ceilings of this device",
    "products": "The three products of a linear layer, by backend",
    "operators": "Operators against their floor",
    "ffn": "The FFN",
    "step": "Whole training steps",
    "block": "A transformer block, forward and backward",
    "inference": "Generating text: prefill and decode",
}
EXPLANATIONS = {
    "ceilings": "Bytes read and written per second by a large copy, and operations per second of large dense products"
    " of random data. All floors are computed from these.",
    "products": "Weights under random transposable masks. The weight is packed already (its packing is timed apart); dW"
    " includes pruning dY by MVUE and packing it. `dense` is the product of dense training, without masks. The number"
    " after a backend is its best algorithm or kernel. The floor counts half the operations and 9/16 of the bytes of"
    " the 2:4 operand.",
    "operators": "The floor is the bytes that an operator has to read and write over the copy bandwidth, or its"
    " operations over the matmul rate. Ratios are to the first arm of a case that is not ours, if there is one.",
    "ffn": "Forward and backward, with projecting and packing the weights in every call, MVUE, and the share of a mask"
    " refresh that falls to a step; fp32 master weights. The floor is that of the products alone, at half the"
    " operations where a recipe makes them 2:4. Inference (`forward only`): the weight is packed once.",
    "step": "Forward, backward, clipping, AdamW, and the recipe's projecting, packing and (its share of) mask"
    " refreshes. On a GPU all arms run under torch.compile, block by block; dense has torch's fused AdamW. Peak memory"
    " is that of an arm alone.",
    "block": "As the FFN, with attention, norms and residuals, which stay dense.",
    "inference": "Prefill: the prompts' tokens in one pass. Decode: one new token for each text, with the keys and"
    " values of those before in a cache. `1 x 2048` is 1 text of 2048 tokens. All weights are held in the dtype of the"
    " products; `dense` has no masks, in all others the FFNs are 2:4 and packed. `row-major`: with few tokens Triton's"
    " kernel reads them as they are, with many they are rebuilt for each product. The floor of a decoded token is"
    " reading all weights and the cache, that of a prefill the products of the blocks.",
}
COLOURS = ("#4878a8", "#d1603d", "#6a9f58", "#8a63a8", "#c2a23a", "#5ba8a0", "#a85a7a", "#7a7a7a")
DENSE = "#b9bec3"
LEFT = ("ffn", "step", "block", "inference")  # of the picture
MOST_BARS = 70  # in one panel


class Writer:
    """Writes to NAME_DATE.{json,md,png} in a folder, and NAME_DATE_pretraining.png if there was pre-training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._date = datetime.datetime.now().strftime("%Y-%m-%d_%H%M")

    def path(self, results: Results, suffix: str) -> Path:
        name = machine.short_name(results.environment)
        prefix = "rehearsal_" if results.rehearsal else ""
        return self.folder / f"{prefix}{name}_{self._date}{suffix}"

    def write(self, results: Results) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path(results, ".json").write_text(json.dumps(results.to_dict(), indent=1) + "\n")
        self.path(results, ".md").write_text(markdown(results))
        if figure := picture(results):
            figure.savefig(self.path(results, ".png"), dpi=110)
        if figure := pretraining_picture(results):
            figure.savefig(self.path(results, "_pretraining.png"), dpi=110)

    def summary(self, results: Results, most: int = 6000) -> str:
        where = f"\n\nresults: {self.path(results, '.*')}"
        return summary(results, most - len(where)) + where


# --- Markdown ---


def markdown(results: Results) -> str:
    found = results.environment
    lines = [f"# Measured on {found.get('gpu', found.get('processor', 'an unknown device'))}", ""]
    if results.rehearsal:
        lines += ["**A rehearsal: tiny shapes on a CPU, one call each. The numbers mean nothing.**", ""]
    lines += [
        "Medians of calls timed in turns, with the 20th and 80th percentile; random data in all arms; between two uses"
        " of the same memory at least four times the L2 cache is moved, or inputs rotate so that it is. `x` is the"
        " baseline's time over this one's: above 1 is faster. A result that does not agree with its reference is never"
        " timed.",
        "",
    ]
    lines += _facts(results)
    for part, title in TITLES.items():
        rows = [row for row in results.rows if row.part == part]
        if rows:
            lines += [f"## {title}", "", EXPLANATIONS[part], "", *_part(part, rows, results), ""]
    if results.pretraining.get("runs"):
        lines += ["## A short pre-training run", "", *_pretraining(results), ""]
    return "\n".join(lines) + "\n"


def _facts(results: Results) -> list[str]:
    lines = ["| | |", "|---|---|"]
    for name, value in results.environment.items():
        if isinstance(value, dict):
            lines += [f"| {name} {key} | {inner} |" for key, inner in value.items()]
        else:
            lines.append(f"| {name} | {value} |")
    for when, reading in results.smi.items():
        if reading:
            lines.append(f"| nvidia-smi {when} | {', '.join(f'{key} {value}' for key, value in reading.items())} |")
    for part, seconds in results.seconds.items():
        lines.append(f"| time for {part} | {seconds:.0f} s |")
    for name, value in results.tests.items():
        lines.append(f"| tests: {name} | {_one_line(value)} |")
    return [*lines, *(f"| note | {_one_line(note)} |" for note in results.notes), ""]


def _part(part: str, rows: list[Row], results: Results) -> list[str]:
    lines = []
    timed = [row for row in rows if row.status == OK]
    if timed:
        lines += [
            "| case | arm | mode | ms | p20 to p80 | x | floor | % of floor | |",
            "|---|---|---|--:|--:|--:|--:|--:|---|",
        ]
    last = ""
    for row in timed:
        case = _case_cell(row, results) if row.case != last else ""
        last = row.case
        floor = f"{_ms(row.floor_ms)} ({row.floor})" if row.floor_ms else ""
        share = f"{100 * row.floor_share:.0f} %" if row.floor_share else ""
        ratio = f"{row.ratio:.2f}" if row.ratio else ""
        spread = f"{_ms(row.low)} to {_ms(row.high)}"
        cells = (case, row.arm, row.mode, _ms(row.ms), spread, ratio, floor, share, more(row, rows))
        lines.append(f"| {' | '.join(_one_line(cell) for cell in cells)} |")
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.status != OK:
            reasons.setdefault((row.arm, row.status, row.note), []).append(row.case)
    if reasons:
        lines += ["", "Not timed:", ""]
    for (arm, status, note), cases in reasons.items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases, the first {cases[0]}"
        lines.append(f"- {arm}, {status}: {_one_line(note)} ({where})")
    return lines


def _case_cell(row: Row, results: Results) -> str:
    clocks = results.clocks.get(f"{row.part}/{row.case.partition(': ')[0]}")
    return row.case + (f" [SM {clocks['sm_mhz']:.0f} MHz, {clocks['power_w_highest']:.0f} W]" if clocks else "")


def more(row: Row, rows: Sequence[Row]) -> str:
    """The further numbers of a row, in words."""
    extra, parts = row.extra, []
    if extra.get("gb_per_s"):
        parts.append(f"{extra['gb_per_s']:.0f} GB/s")
    if extra.get("tflops"):
        parts.append(f"{extra['tflops']:.3g} TFLOP/s")
    if extra.get("packing_ms"):
        text = f"packing {_ms(extra['packing_ms'])} ms"
        if row.ratio and row.ms:
            text += f": with it {row.ratio * row.ms / (row.ms + extra['packing_ms']):.2f}x"
        parts.append(text)
    if extra.get("tokens") and row.ms:
        parts.append(f"{extra['tokens'] / row.ms * 1e3:,.0f} tokens/s")
    if extra.get("weights_mb"):
        parts.append(f"weights {extra['weights_mb']:,.1f} MB")
    if extra.get("parameters"):
        parts.append(f"{extra['parameters'] / 1e6:.1f} M parameters")
    if extra.get("peak_memory_gb"):
        parts.append(f"peak {extra['peak_memory_gb']:.2f} GB")
    if extra.get("refresh_ms"):
        parts.append(f"{_ms(extra['refresh_ms'])} ms of it mask refresh")
    if extra.get("products"):
        parts.append(f"products {extra['products']}")
    return "; ".join([*parts, *([extra["note"]] if extra.get("note") else [])])


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _one_line(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _pretraining(results: Results) -> list[str]:
    facts = results.pretraining
    lines = [
        f"{facts['setting']}.",
        "",
        "| recipe | steps | validation loss | training time | tokens/s | x dense | products |",
    ]
    lines.append("|---|--:|--:|--:|--:|--:|---|")
    dense = next((run for run in facts["runs"] if run["recipe"] == "dense"), None)
    for run in facts["runs"]:
        if not run["seconds"]:
            continue
        rate = run["tokens"][-1] / run["seconds"][-1]
        ratio = rate * dense["seconds"][-1] / dense["tokens"][-1] if dense and dense["seconds"] else None
        validation = f"{run['validation'][-1][1]:.4f}" if run["validation"] else ""
        lines.append(
            f"| {run['recipe']} | {len(run['loss'])} | {validation} | {run['seconds'][-1]:.1f} s | {rate:,.0f} | "
            f"{f'{ratio:.2f}' if ratio else ''} | {_one_line(run['products'])} |"
        )
    return lines


# --- the summary ---


def summary(results: Results, most: int) -> str:
    """What to know, in a few thousand characters: faults first, then the best of each case."""
    lines = ["== a rehearsal: the numbers mean nothing =="] if results.rehearsal else []
    found = results.environment
    keys = ("gpu", "processor", "torch", "triton", "cusparselt", "commit")
    lines.append(", ".join(f"{key} {found[key]}" for key in keys if key in found))
    lines += [f"tests: {name}: {value}" for name, value in results.tests.items()]
    lines += [f"note: {note}" for note in results.notes]
    for row in results.faults:
        lines.append(f"{row.status.upper()}: {row.part}: {row.case}: {row.arm}: {row.note}"[:400])
    skipped = [row for row in results.rows if row.status == SKIPPED]
    if skipped:
        lines.append(
            f"skipped for lack of time: {', '.join(dict.fromkeys(f'{r.part}/{r.case}' for r in skipped))}"[:600]
        )
    if results.pretraining.get("runs"):
        lines += ["-- pre-training", *(line.strip("| ") for line in _pretraining(results)[4:])]
    # what is most wanted first: the end may be cut off
    for part in ("ceilings", "ffn", "step", "block", "inference", "operators", "products"):
        cases: dict[str, list[Row]] = {}
        for row in results.rows:
            if row.part == part and row.status == OK and not row.extra.get("check"):
                cases.setdefault(row.case, []).append(row)
        if cases:
            lines.append(f"-- {TITLES[part]}")
        lines += [f"{case}: {_best(part, rows)}" for case, rows in cases.items()]
    text = "\n".join(lines)
    return text if len(text) <= most else text[: most - 30] + "\n… (more in the results)"


def _best(part: str, rows: list[Row]) -> str:
    if part == "ceilings":
        return more(rows[0], rows)
    mode = GRAPH if any(row.mode == GRAPH for row in rows) else EAGER
    shown = [row for row in rows if row.mode == mode]
    if part == "operators":
        return ", ".join(
            f"{row.arm} {_ms(row.ms)} ms" + (f" ({100 * row.floor_share:.0f} % of floor)" if row.floor_share else "")
            for row in shown
            if row.ours
        )
    base = [row for row in shown if row.ratio == 1]
    text = f"{base[0].arm} {_ms(base[0].ms)} ms" if base else "no baseline"
    return ", ".join([text, *(f"{row.arm} {row.ratio:.2f}x" for row in shown if row.ratio and row.ratio != 1)])


# --- pictures ---


def picture(results: Results) -> Figure | None:
    """Ratios to dense as bars, a line at 1 and a mark at the floor; operators in per cent of their floor."""
    panels: list[tuple[str, list[Row]]] = []
    for part in ("ffn", "step", "block", "inference", "products", "operators"):
        rows = _shown(part, results.rows)
        if rows:
            panels.append((part, rows))
    if not panels:
        return None
    columns = [[p for p in panels if p[0] in side] for side in (LEFT, ("products", "operators"))]
    columns = [column for column in columns if column]
    heights = [[_height(rows) for _, rows in column] for column in columns]
    tall = max(sum(column) + 1.1 * len(column) for column in heights)
    matplotlib.rcParams.update({"font.size": 8, "svg.hashsalt": "sparse24"})
    figure = Figure(figsize=(8.6 * len(columns), tall + 0.6), layout="constrained")
    found = results.environment
    figure.suptitle(
        f"{found.get('gpu', found.get('processor', ''))}, torch {found.get('torch')}, {found.get('date', '')[:10]}"
        + ("  (a rehearsal: the numbers mean nothing)" if results.rehearsal else ""),
        fontsize=11,
    )
    for subfigure, column, sizes in zip(
        figure.subfigures(1, len(columns), squeeze=False)[0], columns, heights, strict=True
    ):
        spare = tall - sum(sizes) - 1.1 * len(sizes)
        ratios = [size + 1.1 for size in sizes]
        blank = [max(spare, 0.001)] if spare > 0.3 else []
        axes = subfigure.subplots(len(sizes) + len(blank), 1, height_ratios=ratios + blank, squeeze=False)[:, 0]
        for ax, (part, rows) in zip(axes, column, strict=False):
            _bars(ax, part, rows)
        for ax in axes[len(sizes) :]:
            ax.axis("off")
    return figure


def _shown(part: str, rows: list[Row]) -> list[Row]:
    """What goes into the picture: a mode of each case, no baselines, as many bars as can be read."""
    found = []
    cases = dict.fromkeys(row.case for row in rows if row.part == part and not row.extra.get("check"))
    for case in cases:
        timed = [row for row in rows if (row.part, row.case, row.status) == (part, case, OK)]
        mode = GRAPH if any(row.mode == GRAPH for row in timed) else EAGER
        value = _share if part == "operators" else _ratio
        arms = [row for row in timed if row.mode == mode and value(row) and (row.ours or row.ratio != 1)]
        found += arms if part != "operators" else [row for row in arms if row.ours]
    return found[:MOST_BARS]


def _ratio(row: Row) -> float | None:
    return row.ratio


def _share(row: Row) -> float | None:
    return None if row.floor_share is None else 100 * row.floor_share


def _height(rows: list[Row]) -> float:
    return 0.155 * len(rows) + 0.09 * len({row.case for row in rows}) + 0.3


def _bars(ax: Axes, part: str, rows: list[Row]) -> None:
    value: Callable[[Row], float | None] = _share if part == "operators" else _ratio
    families = list(dict.fromkeys(_family(row.arm) for row in rows))
    colours = {
        family: DENSE if family.startswith("dense") else COLOURS[i % len(COLOURS)] for i, family in enumerate(families)
    }
    if part == "operators":  # arms are named beside their bars
        colours = dict.fromkeys(colours, COLOURS[0])
    y, ticks, labels, widest = 0.0, [], [], 1.0
    for case in dict.fromkeys(row.case for row in rows):
        here = [row for row in rows if row.case == case]
        start = y
        for row in here:
            width = value(row) or 0.0
            widest = max(widest, width)
            ax.barh(y, width, height=0.86, color=colours[_family(row.arm)])
            text = f"{width:.0f} %  {row.arm}" if part == "operators" else f"{width:.2f}"
            ax.text(width, y, f" {text}", va="center", fontsize=6.5)
            if part != "operators" and row.floor_ms and row.ratio and row.ms:
                at = row.ratio * row.ms / row.floor_ms
                ax.plot([at, at], [y - 0.43, y + 0.43], color="#303030", linewidth=1.6)
                widest = max(widest, at)
            y += 1
        ticks.append((start + y - 1) / 2)
        labels.append(case)
        y += 0.6
    ax.set_yticks(ticks, labels, fontsize=7)
    ax.set_ylim(y - 0.4, -0.8)
    unit = 100.0 if part == "operators" else 1.0
    ax.axvline(unit, color="#202020", linewidth=1, linestyle="--")
    ax.set_xlim(0, (1.3 if part == "operators" else 1.14) * max(widest, unit))
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    mode = f" ({', '.join(dict.fromkeys(row.mode for row in rows))})"
    if part == "operators":
        ax.set_title(f"{TITLES[part]}, % of the floor{mode}", fontsize=9, loc="left")
    else:
        ax.set_title(f"{TITLES[part]}: times as fast as dense{mode}", fontsize=9, loc="left")
    handles: list[Patch | Line2D] = [Patch(color=colours[family], label=family) for family in families]
    if part == "operators":
        handles = []
    elif any(row.floor_ms for row in rows):
        handles.append(Line2D([], [], color="#303030", linewidth=1.6, label="floor"))
    if handles:
        ax.legend(
            handles=handles, fontsize=7, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.28 / max(_height(rows), 0.5)),
            frameon=False,
        )  # fmt: skip


def _family(arm: str) -> str:
    """`cusparselt:37` -> `cusparselt`."""
    return re.split(r":", arm)[0]


def pretraining_picture(results: Results) -> Figure | None:
    """Loss against tokens and against the time of training."""
    runs = [run for run in results.pretraining.get("runs", []) if run["loss"]]
    if not runs:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    unit = 1e6 if runs[0]["tokens"][-1] > 1e6 else 1e3
    for ax, key, scale in ((by_tokens, "tokens", unit), (by_time, "seconds", 1.0)):
        colours = iter(COLOURS)
        for run in runs:
            colour = "#606468" if run["recipe"] == "dense" else next(colours)
            ax.plot(
                [x / scale for x in run[key]], _smooth(run["loss"]), color=colour, linewidth=1.2, label=run["recipe"]
            )
            positions = [run[key][step - 1] / scale for step, _ in run["validation"]]
            ax.plot(positions, [loss for _, loss in run["validation"]], "o", color=colour, markersize=4)
        ax.grid(alpha=0.3)
    by_tokens.set(xlabel=f"tokens ({'millions' if unit == 1e6 else 'thousands'})", ylabel="loss (nats per token)")
    by_time.set(xlabel="seconds of training, without validation")
    by_tokens.legend(title="training, smoothed; dots: validation", frameon=False)
    title = results.pretraining["setting"] + (" (a rehearsal)" if results.rehearsal else "")
    figure.suptitle(title, fontsize=9)
    return figure


def _smooth(values: list[float], share: float = 0.1) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else (1 - share) * smoothed[-1] + share * value)
    return smoothed
