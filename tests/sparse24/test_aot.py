"""Every kernel compiles for every architecture, without a GPU, and does not spill registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import aot
import pytest

pytest.importorskip("triton", reason="the kernels need triton")


@pytest.fixture(scope="module")
def reports():
    """The reports of all cases, by case and architecture; compiled in two processes with the interpreter off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    names = list(aot.CASES)
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(aot.__file__)), *share],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in (names[::2], names[1::2])
        if share
    ]
    found = {}
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        for line in output.splitlines():
            report = json.loads(line)
            found[report["case"], report["arch"]] = report
    return found


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("name", list(aot.CASES))
def test_compiles_without_spills(name, arch, reports):
    if arch not in aot.CASES[name].get("archs", aot.ARCHS):
        pytest.skip(f"{name} is not meant for sm_{arch}")
    report = reports[name, arch]
    assert "error" not in report, report["error"]
    if "instructions" not in report:
        pytest.skip(f"this triton's cuobjdump cannot disassemble sm_{arch}; it compiles")
    assert report["spills"] == 0
    assert report["stack_bytes"] == 0
