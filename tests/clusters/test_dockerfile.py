"""The Dockerfile, read: every path and pin is there, no secret goes in, and its user has no privileges."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from sparse_pretrain import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [
    (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if line.strip()
]


def of(kind):
    return [rest for name, rest in INSTRUCTIONS if name == kind]


def test_only_known_instructions():
    assert {name for name, _ in INSTRUCTIONS} == {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}
    (image,) = of("FROM")
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", image)  # a version, not the latest
    assert not image.endswith(":latest")


def test_what_is_copied_is_there_and_is_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    sources = [source for line in of("COPY") for source in line.split()[:-1]]
    assert {"constraints.txt", "pyproject.toml", "conf", "kernels", "sparse_pretrain"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source not in ignored
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [build["project"]["readme"], *build["project"]["license-files"]]
    needed += build["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    for path in needed:
        assert any(path == source or path.startswith(f"{source}/") for source in sources), path


def test_every_pin_is_that_of_the_constraints():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    installs = [line for line in of("RUN") if "pip install" in line]
    assert installs
    for line in installs:
        assert "--constraint constraints.txt" in line
        for name, version in re.findall(r"([\w.-]+)==([\w.]+)", line):
            assert pins[name] == version
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r'"\.\[([\w,]+)\]"', TEXT)
    for extra in wanted.split(","):
        for requirement in extras[extra]:
            assert re.match(r"[\w.-]+", requirement).group() in pins, requirement


def test_its_user_has_no_privileges():
    (user,) = of("USER")
    assert user not in ("root", "0")
    assert f"useradd --create-home --uid 1001 {user}" in " ".join(of("RUN"))
    last = max(i for i, (name, _) in enumerate(INSTRUCTIONS) if name in ("RUN", "COPY"))
    assert [name for name, _ in INSTRUCTIONS].index("USER") > last  # what is installed is not its to change
    assert "sudo" not in TEXT


def test_no_secrets():
    assert not re.search(r"(?i)(token|password|secret|api_?key|BEGIN [A-Z ]*PRIVATE)", TEXT)
    assert "ADD" not in dict(INSTRUCTIONS)
    assert {".git", ".venv", "runs", "wandb"} <= set((ROOT / ".dockerignore").read_text().split())


def test_it_starts_what_the_quickstart_starts():
    (entry,), (command,) = of("ENTRYPOINT"), of("CMD")
    assert (entry, command) == ('["sparse-pretrain"]', '["train"]')
    last = (ROOT / "scripts" / "quickstart").read_text().strip().splitlines()[-1]
    assert shlex.split(last) == ["exec", ".venv/bin/sparse-pretrain", "train", "$@"]


@pytest.mark.parametrize("line", re.findall(r"^#   docker run (.*)$", TEXT, re.MULTILINE))
def test_the_commands_shown_compose(line):
    words = shlex.split(line)
    arguments = words[words.index("sparse-pretrain") + 1 :]
    if arguments:
        cli._preflight(arguments[0], arguments[1:])
