"""The page of a sweep: one HTML file, no script, nothing from the network."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from sparse_pretrain import runs
from sparse_pretrain.reporting.html import CSS
from sparse_pretrain.sweeping.results import SweepResult, labels, table

PICTURE_CSS = ".card img { display: block; max-width: 100%; height: auto; margin: 0 auto }\n"


def write_page(sweep: SweepResult, picture: bytes, train: str | None, out: Path) -> None:
    """Write the page in one piece.

    Args:
        picture: PNG.
        train: the command that trains with the best options; None = there are none yet.

    Raises:
        UserError: it cannot be written.
    """
    title = f"Sweep {sweep.name}"
    states = [trial.state for trial in sweep.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    method = sweep.record["method"]
    image = base64.b64encode(picture).decode("ascii")
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{len(states)} trials: {escape(counts)}; sampler {escape(method["sampler"])}, '
        f"pruner {escape(method['pruner'])}</p>",
        *_best(sweep, train),
        f'<figure><div class="card"><img src="data:image/png;base64,{image}" '
        'alt="losses of the trials, their curves, their settings, and the importance of the options"></div>'
        "<figcaption>Few losses that are far above the others are shown at the upper edge. Importance says how "
        "differently an option is spread among the best tenth of the complete trials; of few trials it says little. "
        "One seed a trial: small differences of loss may be chance.</figcaption></figure>",
        "<h2>Trials</h2>",
        _trials(sweep),
        "<h2>The search</h2>",
        _space(sweep),
        f"<p>Again, or on: <code>{escape(sweep.record['command'])}</code></p>",
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}{PICTURE_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )
    runs.write_text(out, page.encode("ascii", "xmlcharrefreplace").decode())


def _best(sweep: SweepResult, train: str | None) -> list[str]:
    best = sweep.best
    if best is None or train is None:
        return ["<p>No trial is complete.</p>"]
    settings = " ".join(f"{option}={value}" for option, value in best.params.items())
    return [
        f"<p>Best: trial {best.number}, validation loss {best.loss:.4f}, with <code>{escape(settings)}</code>. "
        f"To train with it: <code>{escape(train)}</code></p>"
    ]


def _trials(sweep: SweepResult) -> str:
    (header, *rows), notes = table(sweep)
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "".join(
        f"<tr><th>{escape(cells[0])}</th>" + "".join(f"<td>{escape(text)}</td>" for text in cells[1:]) + "</tr>\n"
        for cells in rows
    )
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>" + (f'\n<ul class="soft">{listed}</ul>' if listed else "")
    )


def _space(sweep: SweepResult) -> str:
    names = labels([parameter.option for parameter in sweep.space])
    rows = "".join(
        f"<tr><th>{escape(names[option])}</th><td><code>{escape(option)}</code></td><td>{escape(_words(entry))}</td></tr>\n"
        for option, entry in sweep.record["space"].items()
    )
    return f'<div class="wide"><table><tbody>\n{rows}</tbody></table></div>'


def _words(entry: dict[str, object]) -> str:
    """{type: float, low: 1, high: 2, log: true} -> float, 1 to 2, log."""
    if "choices" in entry:
        choices = entry["choices"]
        return f"one of {', '.join(map(str, choices if isinstance(choices, list) else []))}"
    words = [str(entry["type"]), f"{entry['low']} to {entry['high']}"]
    words += ["log"] if entry.get("log") else []
    words += [f"in steps of {entry['step']}"] if entry.get("step") is not None else []
    return ", ".join(words)
