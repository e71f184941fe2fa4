"""What the README says is so, and what the pages of docs/ tell a user to type."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_pretrain import cli, compare
from sparse_pretrain.errors import UserError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = {
    " ".join(words := shlex.split(line, comments=True)[1:]): words
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("sparse-pretrain")
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_commands_compose(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "config.json").write_text('{"model_type": "gpt2"}')
    name, *options = command
    if name == "compare":
        with cli._configs():
            options = compare.parse(cli._parse(options)).one_run()
    cli._preflight(name, options)


def test_the_error_shown_is_the_error_given(capsys):
    (shown,) = re.findall(r"\$ sparse-pretrain (.*)\n(error: .*)\n", README)
    with pytest.raises(SystemExit):
        cli.main(shlex.split(shown[0]))
    assert capsys.readouterr().err.strip() == shown[1]


def test_the_recipe_shown_composes(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    cli._preflight("train", ["--config-dir", str(tmp_path), "recipe=mine"])
    with pytest.raises(UserError):
        cli._preflight("train", ["recipe=mine"])


def test_the_loop_shown_trains():
    (code,) = blocks("python")
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"block": nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})})}
    )
    x, y = torch.randn(64, 8), torch.randn(64, 8)
    losses = []

    def loss(model):
        hidden = torch.relu(model["block"]["mlp"]["up"](x))
        value = (model["block"]["mlp"]["down"](hidden) - y).square().mean()
        losses.append(value.item())
        return value

    exec(compile(code, "README.md", "exec"), {"model": model, "loss": loss})
    assert len(losses) == 1000
    assert losses[-1] < 0.6 * losses[0]
    assert type(model["block"]["mlp"]["up"]) is nn.Linear


def test_the_code_in_the_kernels_page_runs():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(), re.DOTALL):
        exec(compile(code, "docs/kernels.md", "exec"), names)
    assert names["y"].shape == (32, 256)
    assert set(names["plans"]) == {"ffn"}


def test_paths_and_choices_named_exist():
    for path in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for recipe in (ROOT / "conf" / "recipe").glob("*.yaml"):
        assert f"`{recipe.stem}`" in README
        assert recipe.stem == "dense" or (ROOT / "docs" / "recipes" / f"{recipe.stem}.md").exists()


def test_the_dockerfile_names_what_is_there():
    text = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    assert "constraints.txt" in text
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)


def test_torch_and_triton_are_pinned_as_a_pair():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")
