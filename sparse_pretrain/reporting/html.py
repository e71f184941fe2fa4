"""The report as one HTML file: no script, nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from sparse_pretrain import runs as run_folder
from sparse_pretrain.reporting import figures
from sparse_pretrain.reporting.run_data import RunData, dense_first, labels
from sparse_pretrain.reporting.table import compare, rate
from sparse_pretrain.schema import flatten, to_dict

CSS = """
:root { color-scheme: light dark; --ink: #1c2226; --soft: #5d6a72; --line: #d8dee2; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ea; --soft: #9aa6ad; --line: #3a444a; --page: #14191c }
}
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif }
h1 { font-size: 24px; margin: 0 0 4px }
h2 { font-size: 18px; margin: 32px 0 8px }
h3 { font-size: 15px; margin: 18px 0 6px }
p, ul { max-width: 78ch; margin: 6px 0 }
ul { padding-left: 20px }
.soft, figcaption { color: var(--soft); font-size: 13px }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 10px 0; font-variant-numeric: tabular-nums }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line) }
th, td { text-align: left; vertical-align: top }
th { font-weight: 600 }
thead th { color: var(--soft); font-size: 13px; white-space: nowrap }
.right { text-align: right }
.numbers td, .numbers th { padding: 6px 0 6px 20px; text-align: right; white-space: nowrap }
.numbers th:first-child { padding-left: 0; text-align: left }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin: 0 8px 0 1px;
  box-shadow: 0 0 0 1px var(--soft); print-color-adjust: exact }
figure { margin: 10px 0 18px }
.card { background: #fff; border: 1px solid var(--line); border-radius: 6px }
.card { padding: 8px; margin-bottom: 4px }
.card svg { display: block; max-width: 100%; height: auto; margin: 0 auto }
.masks th, .masks td { border: 0; padding: 0 12px 8px 0; font-weight: 400; font-size: 13px }
.masks tbody th { padding: 4px 0 2px }
.masks img { display: block; width: 256px; image-rendering: pixelated; border: 1px solid var(--line) }
details { margin: 10px 0; border-top: 1px solid var(--line); padding-top: 10px }
details tbody th { font-size: 13px; font-weight: 400 }
summary { cursor: pointer; font-weight: 600 }
tbody td:has(> code) { min-width: 11ch }
code { font: 12.5px/1.4 ui-monospace, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere }
@media print {
  body { max-width: none; padding: 0 }
  figure, tr { break-inside: avoid }
  h2, h3 { break-after: avoid }
  .wide { overflow: visible }
  .masks img { width: 160px }
}
"""


def write_report(runs: Sequence[RunData], out: Path) -> Path:
    """Write the page about `runs` to `out`, in one piece."""
    runs = dense_first(runs)
    names = labels(runs)
    title = f"{_each(run.config.model.name for run in runs)} on {_each(run.config.data.name for run in runs)}: "
    title += ", ".join(names) if len(runs) < 5 else f"{len(runs)} runs"
    styles = figures.run_styles(runs, names)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_setting(runs))}</p>',
        _comparison(runs, styles),
        "<h2>Curves</h2>",
        *_curves(runs, styles),
        *_masks(runs, names),
        "<h2>Details</h2>",
        *[_layers(run, name) for run, name in zip(runs, names, strict=True) if not run.is_dense],
        _options(runs, names),
        _facts(runs, names),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body>\n</html>\n"
    )
    # ASCII alone, so that the locale this is written or served in does not matter.
    run_folder.write_text(out, page.encode("ascii", "xmlcharrefreplace").decode())
    return out


def _setting(runs: Sequence[RunData]) -> str:
    """Size, length and machine, in a line."""
    lengths = []
    for run in runs:
        trainer = run.config.trainer
        tokens = trainer.steps * trainer.batch_size * run.config.data.tokens_per_example
        lengths.append(f"{tokens / 1e6:,.2f}M {run.unit} in {trainer.steps:,} steps")
    parameters = _each(f"{run.facts['model']['parameters'] / 1e6:,.2f}M" for run in runs)
    machines = _each(f"{run.facts['device']}, {run.facts['precision']}" for run in runs)
    return f"{parameters} parameters; {_each(lengths)}; {machines}"


def _each(texts: Iterable[str]) -> str:
    """The different ones."""
    return " / ".join(dict.fromkeys(texts))


def _comparison(runs: Sequence[RunData], styles: Sequence[figures.RunStyle]) -> str:
    comparison = compare(runs)
    head = "".join(f"<th>{escape(text)}</th>" for text in comparison.header)
    rows = "".join(
        f'<tr><th><span class="swatch" style="background:{style.colour}"></span>{escape(cells[0])}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in cells[1:])
        + "</tr>\n"
        for cells, style in zip(comparison.cells, styles, strict=True)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in [*comparison.notes, *_how_to_read(runs)])
    return f'{_grid(head, rows, "numbers")}\n<ul class="soft">{notes}</ul>'


def _grid(head: str, rows: str, style: str = "") -> str:
    """A table that scrolls by itself where the page is too narrow for it."""
    head = f"<thead><tr>{head}</tr></thead>\n" if head else ""
    return f'<div class="wide"><table class="{style}">{head}<tbody>\n{rows}</tbody></table></div>'


def _how_to_read(runs: Sequence[RunData]) -> list[str]:
    notes = []
    if any(run.has_dense_products for run in runs):
        notes.append(
            "The 2:4 products ran as dense products on masked weights: the losses are those of sparse training, "
            "the speed is not, and a sparse run is no faster than dense."
        )
    if len(runs) > 1 and len({run.config.seed for run in runs}) == 1:
        notes.append("One seed: small differences of loss may be chance; repeat with other seeds before trusting them.")
    return notes


def _products(run: RunData) -> str:
    """The backends of forward, dX and dW, each combination once."""
    products = run.facts.get("sparse_products")
    if not products:
        return "-"
    return "; ".join(sorted({" / ".join(dict.fromkeys(plan)) for plan in products["plans"].values()}))


def _curves(runs: Sequence[RunData], styles: Sequence[figures.RunStyle]) -> list[str]:
    loss = figures.loss_figure(runs, styles)
    parts = [
        f'<figure><div class="card">{loss}</div><figcaption>The first tenth of a run may lie above '
        "the picture. Time is time of training: without validation, checkpoints and pauses of a resumed run. "
        "Dotted lines: a run (in its colour; grey: several) begins a phase there.</figcaption></figure>"
    ]
    sparsity = figures.sparsity_figure(runs, styles)
    if sparsity:
        parts.append(
            f'<figure><div class="card">{sparsity}</div><figcaption>Above dense: zero is as good as dense. '
            "Flip rates are comparable between runs with the same refresh interval only; a rate that "
            "falls to near zero by the end says that the masks have settled.</figcaption></figure>"
        )
    return parts


def _masks(runs: Sequence[RunData], names: Sequence[str]) -> list[str]:
    drawn = [(run, name) for run, name in zip(runs, names, strict=True) if run.snapshots]
    if not drawn:
        return []
    parts = [
        "<h2>Masks</h2>",
        '<p class="soft">The upper left corner of some masks: a row is an output, a column an input feature; '
        "dark is kept. In the last column, what changed: "
        f'<span class="swatch" style="background:{figures.LOST}"></span>pruned since, '
        f'<span class="swatch" style="background:{figures.GAINED}"></span>kept since.</p>',
    ]
    for run, name in drawn:
        steps = list(run.snapshots)
        first, last = run.snapshots[steps[0]], run.snapshots[steps[-1]]
        rows = []
        for layer in last:
            cells = [(figures.mask_picture(run.snapshots[step][layer]), f"step {step:,}") for step in steps]
            if len(steps) > 1:
                changed = (first[layer] != last[layer]).mean()
                cells.append((figures.change_picture(first[layer], last[layer]), f"{changed:.1%} changed"))
            pictures = "".join(f'<td><img src="{uri}" alt="{escape(layer)}, {text}">{text}</td>' for uri, text in cells)
            rows.append(f'<tr><th colspan="{len(cells)}"><code>{escape(layer)}</code></th></tr><tr>{pictures}</tr>\n')
        parts.append(f"<h3>{escape(name)}</h3>\n{_grid('', ''.join(rows), 'masks')}")
    return parts


def _layers(run: RunData, name: str) -> str:
    flips = run.summary.get("layer_flip_rates", {})
    rows = "".join(
        f"<tr><td><code>{escape(row['name'])}</code></td>"
        f'<td class="right">{row["out_features"]} &times; {row["in_features"]}</td>'
        f"<td>{escape(_kind(row, run.config.recipe.pattern))}</td>"
        f'<td class="right">{rate(flips[row["name"]]) if row["name"] in flips else ""}</td></tr>\n'
        for row in run.facts["layers"]
    )
    sparse = sum(row["sparse"] for row in run.facts["layers"])
    head = (
        '<th>layer</th><th class="right">shape (out &times; in)</th><th>weights</th>'
        '<th class="right">last flip rate</th>'
    )
    pattern = run.config.recipe.pattern
    title = f"Layers of {escape(name)}: {sparse} of {len(run.facts['layers'])} linear layers {pattern}"
    return f"<details><summary>{title}</summary>\n{_grid(head, rows)}</details>"


def _kind(row: dict[str, object], pattern: str) -> str:
    if row["sparse"]:
        return pattern
    return f"dense (skipped: {row['skipped']})" if row["skipped"] else "dense"


def _options(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """The options that differ between the runs, names of folders aside."""
    options = [flatten(to_dict(run.config)) for run in runs]
    keys = [key for key in options[0] if key not in ("name", "runs_dir", "run_dir", "recipe.name")]
    rows = [[key, *(_value(values[key]) for values in options)] for key in keys]
    return _table("Options that differ", names, [row for row in rows if len(set(row[1:])) > 1])


def _facts(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """What a run was made with, and how to make it again."""
    columns = []
    for run in runs:
        facts, corpus = run.facts, run.facts["corpus"]
        peak = facts.get("peak_tflops")
        columns.append(
            {
                "folder": str(run.folder),
                "id": facts["id"],
                "again": facts["command"],
                "device": facts["device"],
                "precision": facts["precision"],
                "peak": f"{peak:.3g} TFLOP/s ({facts['peak_source']})" if peak else "-",
                "2:4 products": _products(run),
                "memory": f"{run.rows['train/memory_gb'].max():.2f} GB",
                "dropped steps": f"{run.rows['train/dropped_steps'][-1]:.0f}",
                "parameters": f"{facts['model']['parameters']:,}",
                "corpus": run.corpus,
                "corpus digest": corpus["digest"],
                "Python": facts["python"],
                **facts["packages"],
            }
        )
    keys = list(dict.fromkeys(key for column in columns for key in column))
    return _table("Facts", names, [[key, *(column.get(key, "-") for column in columns)] for key in keys])


def _table(title: str, names: Sequence[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *names])
    body = ""
    for key, *values in rows:
        # What all runs share is said once.
        same = len(values) > 1 and len(set(values)) == 1
        cells = (
            f'<td colspan="{len(values)}"><code>{escape(values[0])}</code></td>'
            if same
            else "".join(f"<td><code>{escape(value)}</code></td>" for value in values)
        )
        body += f"<tr><th>{escape(key)}</th>{cells}</tr>\n"
    return f"<details><summary>{escape(title)}</summary>\n{_grid(head, body)}</details>"


def _value(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
