"""Sweeps of which every trial takes a tenth of a second, with the whole command around it."""

import os
import subprocess
import sys
import types
from pathlib import Path

import fake_sweep
import optuna
import pytest

from sparse_pretrain import cli
from sparse_pretrain.sweeping.storage import open_storage

FAKE = Path(fake_sweep.__file__)
OPTIONS = [
    "data=text", "data.vocab_size=300", "data.seq_len=16", "data.num_workers=0", "model.max_seq_len=16", "model.d_model=16",
    "trainer.accelerator=cpu", "trainer.peak_tflops=1", "trainer.batch_size=4", "trainer.eval_batches=2", "scheduler.warmup_steps=2",
]  # fmt: skip


@pytest.fixture
def spaces(tmp_path):
    """spaces(mine="optimizer.lr: …") -> the options that name it."""

    def write(**files: str) -> list[str]:
        folder = tmp_path / "conf" / "hparams_search"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(text)
        return ["--config-dir", str(tmp_path / "conf"), f"hparams_search={next(iter(files))}"]

    return write


@pytest.fixture
def fake(tmp_path, corpus, monkeypatch, capsys):
    """fake.run("trials=3", …): a sweep whose trials are fakes; `fake.out` is its folder, and `fake.events()` what its
    trials did, as lists of words."""
    made = Fake(tmp_path, corpus, monkeypatch, capsys)
    yield made
    made.close()


class Fake:
    def __init__(self, folder, corpus, monkeypatch, capsys):
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.out = folder / "out"
        self.runs = folder / "runs"
        self._events = folder / "events"
        self._options = [
            *OPTIONS,
            f"data.train=[{corpus}]",
            f"runs_dir={self.runs}",
            f"out={self.out}",
            "trainer.steps=6",
        ]
        self._started = []

    def _command(self, options, step_seconds):
        for name, value in (
            ("FAKE_EVENTS", str(self._events)),
            ("FAKE_STEP_SECONDS", str(step_seconds)),
            ("PYTHONPATH", os.pathsep.join(sys.path)),
        ):
            self.monkeypatch.setenv(name, value)
        flags = options[:2] if options[0] == "--config-dir" else ()
        return [*flags, *self._options, *options[len(flags) :]]

    def start(self, *options, step_seconds=0.02):
        """A process of it."""
        process = subprocess.Popen(
            [sys.executable, str(FAKE), *self._command(options, step_seconds)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def run(self, *options, code=0, step_seconds=0.02):
        """In this process, to its end; returns stdout and stderr."""
        figure = types.SimpleNamespace(sweep_figure=lambda sweep: b"")
        with self.monkeypatch.context() as patched:
            fake_sweep.patch(patched.setattr)
            patched.setitem(sys.modules, "sparse_pretrain.sweeping.figure", figure)
            self.capsys.readouterr()
            try:
                cli.main(["sweep", *self._command(options, step_seconds)])
                ended = 0
            except SystemExit as end:
                ended = end.code
        printed = self.capsys.readouterr()
        assert ended == code, printed
        return printed.out, printed.err

    def events(self, kind=None):
        lines = self._events.read_text().splitlines() if self._events.exists() else []
        return [line.split()[1:] if kind else line.split() for line in lines if kind in (None, line.split()[0])]

    def trials(self, url=None):
        return optuna.load_study(study_name=self.out.name, storage=open_storage(url, self.out)).trials

    def close(self):
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()
