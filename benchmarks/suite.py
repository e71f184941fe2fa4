"""Everything to find out on a GPU, in one command: the kernels' tests, the benchmarks, a short pre-training run.

    scripts/gpu-suite [--minutes N] [--out DIR] [--part …] [--rehearse]

Keeps its time, and writes what there is as it goes, whatever fails. Exits with 0 only if all tests passed and no result
of ours was wrong or failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.__main__ import DEFAULT_OUT
from benchmarks.machine import ROOT, smi
from benchmarks.report import Writer
from benchmarks.run import PARTS, Results, environment, kill, run_parts

TESTS = "tests"
TESTS_SHARE = 0.28  # of the time
MARGIN = 10.0  # seconds at the end
SUMMARY = 7800  # characters
SANITIZER = "compute-sanitizer memcheck"
REHEARSED_TESTS = ("test_packing.py",)


@dataclass
class Job:
    """One process of the tests. errors: an exit code that says so, or output, once it has ended."""

    name: str
    command: list[str]
    env: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    output: Path = Path()
    junit: Path = Path()
    verdict: str = "not started: the time was up"
    passed: bool = False
    failures: list[str] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu-suite", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit (default: 9)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the results")
    parser.add_argument("--part", nargs="+", choices=(TESTS, *PARTS), default=[TESTS, *PARTS], help="what to run")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU; the numbers mean nothing")
    options = parser.parse_args(arguments)
    end = time.time() + 60 * options.minutes
    writer = Writer(options.out)
    results = Results(rehearsal=options.rehearse, environment=_gpu(options.rehearse))
    parts = [part for part in PARTS if part in options.part]
    if parts and "ceilings" not in parts:
        parts.insert(0, "ceilings")  # floors need them
    passed = False
    try:
        passed = _run(options, parts, results, writer, end)
    finally:
        writer.write(results)
        print("\n" + writer.summary(results, SUMMARY), flush=True)
    return 0 if passed and not results.faults else 1


def _run(options: argparse.Namespace, parts: list[str], results: Results, writer: Writer, end: float) -> bool:
    """Whether all tests passed."""
    passed = True
    if TESTS in options.part:
        share = TESTS_SHARE if parts else 1.0
        passed = run_tests(results, share * (end - time.time()) - (not parts) * MARGIN, options.rehearse, writer)
    if parts:
        run_parts(parts, results, end - time.time() - MARGIN, writer.write, "cpu" if options.rehearse else "auto", say)
    return passed


def _gpu(rehearse: bool) -> dict[str, str]:
    """Its name, without opening it: the files are named after it."""
    name = "" if rehearse else smi(("name",)).get("name", "")
    return {"gpu": name} if name else {}


def say(line: str) -> None:
    print(line, flush=True)


def run_tests(results: Results, seconds: float, rehearse: bool, writer: Writer) -> bool:
    """The kernels' tests, a process a file: one that loses the GPU or hangs leaves the others alone."""
    end = time.time() + seconds
    env = environment(rehearse)
    with tempfile.TemporaryDirectory() as folder:
        jobs = _jobs(env, rehearse)
        waiting = list(jobs)
        running: list[Job] = []
        most = max(1, min(6, (os.cpu_count() or 1) // 2))
        try:
            while (waiting or running) and time.time() < end:
                while waiting and len(running) < most:
                    running.append(_start(waiting.pop(0), Path(folder)))
                for job in list(running):
                    if job.process and job.process.poll() is not None:
                        running.remove(job)
                        _judge(job, job.process.returncode)
                        say(f"{job.name}: {job.verdict}")
                time.sleep(0.05)
        finally:
            for job in running:
                if job.process:
                    kill(job.process)
        for job in running:
            job.verdict = "stopped: the time was up"
            job.passed = job.name == SANITIZER  # it slows everything down manifold
        log = "\n\n".join(_log(job) for job in jobs)
    for job in jobs:
        results.tests[job.name] = job.verdict
        for failure in job.failures[:8]:
            results.tests[f"{job.name}: {failure.partition(':')[0]}"] = failure.partition(":")[2].strip()[:300]
    writer.write(results)
    writer.path(results, "_tests.txt").write_text(log)
    return all(job.passed for job in jobs)


def _jobs(env: dict[str, str], rehearse: bool) -> list[Job]:
    files = [*sorted((ROOT / "tests" / "sparse24").glob("test_*.py")), ROOT / "tests/sparsity/test_recipes_gpu.py"]
    if rehearse:
        files = [file for file in files if file.name in REHEARSED_TESTS]
    pytest = [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider"]
    jobs = [Job(file.stem, [*pytest, str(file.relative_to(ROOT))], env) for file in files]
    if rehearse:
        return jobs
    smoke = [sys.executable, "-m", "benchmarks", "smoke"]
    jobs.insert(0, Job("every operator once, tiny", smoke, env))
    if sanitizer := _sanitizer():
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5", *smoke]
        # without the caching allocator, so that memory beside a tensor is nobody's
        jobs.insert(0, Job(SANITIZER, command, {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    return jobs


def _sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def _start(job: Job, folder: Path) -> Job:
    name = re.sub(r"\W+", "_", job.name)
    job.output, job.junit = folder / f"{name}.txt", folder / f"{name}.xml"
    more = [f"--junitxml={job.junit}"] if "pytest" in job.command else []
    with job.output.open("wb") as output:
        job.process = subprocess.Popen(
            [*job.command, *more], cwd=ROOT, env=job.env, stdout=output, stderr=output, start_new_session=True
        )
    return job


def _judge(job: Job, code: int) -> None:
    """Sets verdict, passed and failures of a job that has ended."""
    output = job.output.read_text(errors="replace").strip()
    if "pytest" not in job.command:
        if job.name == SANITIZER and "not supported" in output and "ERROR SUMMARY: 0 errors" not in output:
            # some virtual machines hide the device from it
            job.passed, job.verdict = True, "not available on this machine"
            return
        job.passed = code == 0
        job.verdict = "passed" if code == 0 else f"failed with exit code {code}"
        if code:
            job.failures = [f"end of output: {line}" for line in output.splitlines()[-3:]]
        return
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if job.junit.is_file():
        tree = ElementTree.parse(job.junit)
        for suite in tree.iter("testsuite"):
            for name in counts:
                counts[name] += int(suite.get(name, 0))
        for case in tree.iter("testcase"):
            for problem in (*case.iter("failure"), *case.iter("error")):
                first = (problem.get("message") or "").splitlines() or [""]
                job.failures.append(f"{case.get('name')}: {first[0]}")
    bad = counts["failures"] + counts["errors"]
    good = counts["tests"] - bad - counts["skipped"]
    job.passed = code in (0, 5)  # 5: nothing to run
    job.verdict = f"{good} passed, {bad} failed, {counts['skipped']} skipped"
    if not job.passed and not bad:
        job.verdict = f"ended with exit code {code}: {output.splitlines()[-1][:200] if output else 'no output'}"


def _log(job: Job) -> str:
    text = job.output.read_text(errors="replace") if job.output.is_file() else ""
    return f"=== {job.name}: {job.verdict}\n{text[-20000:]}"


if __name__ == "__main__":
    # a time limit from outside that is shorter than ours: write what there is, and leave nothing running
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
