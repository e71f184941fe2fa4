"""The wheel holds everything: installed in a new environment, away from the checkout, it trains."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"sparse24/reference.py", "sparse_pretrain/cli.py", "sparse_pretrain/py.typed", "sparse24/py.typed"} <= names
    assert {
        f"sparse_pretrain/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")
    } <= names
    shipped = {f"sparse24/cubins/{path.name}" for path in (ROOT / "kernels" / "sparse24" / "cubins").iterdir()}
    assert shipped <= names
    assert not any(name.startswith(("tests/", "kernels/", "benchmarks/")) for name in names)


@pytest.mark.slow
def test_a_new_environment_trains_two_steps(wheel, tmp_path, corpus):
    """The new environment borrows this one's third-party packages, and nothing of the checkout."""
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", env], check=True)
    subprocess.run([env / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (site,) = env.glob("lib/python*/site-packages")
    packages = (
        Path(os.__file__).parent / "site-packages"
        if sys.prefix == sys.base_prefix
        else next(Path(sys.prefix).glob("lib/python*/site-packages"))
    )
    # As a plain path: .pth files in there, such as an editable install's, are not followed.
    (site / "borrowed.pth").write_text(str(packages))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    result = subprocess.run(
        [env / "bin" / "sparse-pretrain", "train", "debug=default", "trainer.steps=2", "data=text", f"data.train=[{corpus}]",
         "data.vocab_size=300", "trainer.accelerator=cpu", "trainer.peak_tflops=1"],
        cwd=tmp_path, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    where = "import sparse_pretrain, sparse24; print(sparse_pretrain.__file__); print(sparse24.__file__)"
    ours = subprocess.run(
        [env / "bin" / "python", "-c", where], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    assert all(Path(line).is_relative_to(env) for line in ours.stdout.splitlines())
    assert len(list((tmp_path / "runs").glob("gpt_nano-fst-*/summary.json"))) == 1
    assert "val loss" in result.stdout


@pytest.mark.parametrize(
    "module",
    [
        "sparse_pretrain.cli",
        "sparse_pretrain.config",
        "sparse_pretrain.runs",
        "sparse_pretrain.reporting.table",
        "sparse24",
    ],
)
def test_lean_imports(module):
    """Help, errors and reports need no torch, and nothing touches a GPU on import."""
    code = f"import sys, {module}; t = sys.modules.get('torch'); print('torch' in sys.modules, bool(t and t.cuda.is_initialized()))"
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.split() == ["False", "False"]
