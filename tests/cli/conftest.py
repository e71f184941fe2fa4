from pathlib import Path

import pytest

from sparse_pretrain import cli


@pytest.fixture
def export(capsys, tmp_path):
    """export("dense", *options) -> the folder, and what was printed."""

    def run(name: str, checkpoint: Path | str, *options: str) -> tuple[Path, str]:
        cli.main(["export", f"checkpoint={checkpoint}", f"out={tmp_path / name}", *options])
        return tmp_path / name, capsys.readouterr().out

    return run
