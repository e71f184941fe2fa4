"""`python -m benchmarks`: measure what is asked for, write JSON, Markdown and a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.run import PARTS, Results, run_parts

DEFAULT_OUT = ROOT / "benchmarks" / "results"
DEFAULT_PARTS = [part for part in PARTS if part != "pretrain"]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["worker"]:
        from benchmarks import worker

        worker.end_with_parent()
        worker.main(*arguments[1:])
        return 0
    if arguments == ["smoke"]:
        from benchmarks import worker

        return worker.smoke()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=DEFAULT_PARTS)
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit (default: 10)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the results")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU; the numbers mean nothing")
    options = parser.parse_args(arguments)
    results = measure(options.part, options.minutes, options.out, options.accelerator, options.rehearse)
    return 1 if results.faults else 0


def measure(parts: list[str], minutes: float, out: Path, accelerator: str = "auto", rehearse: bool = False) -> Results:
    """Run parts, in the order of `PARTS`, and write the results; prints progress and where they are."""
    from benchmarks.report import Writer

    writer = Writer(out)
    results = Results(rehearsal=rehearse)
    ordered = [part for part in PARTS if part in parts]
    if "ceilings" not in ordered:
        ordered.insert(0, "ceilings")  # floors need them
    run_parts(ordered, results, minutes * 60, writer.write, "cpu" if rehearse else accelerator)
    print(writer.summary(results))
    return results


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
