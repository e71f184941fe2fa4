"""Imports go one way: read off the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# package or module of sparse_pretrain -> what of ours it may import
ALLOWED = {
    "errors": [],
    "limits": [],
    "seeds": [],
    "disk": [],
    "sharding": [],
    "paths": [],
    "interrupt": [],
    "schema": ["errors", "limits"],
    "config_models": ["schema"],
    "config_data": ["schema"],
    "config_recipe": [],
    "config": ["config_models", "config_data", "config_recipe"],
    "objective": ["config", "config_data", "config_models", "errors"],
    "hardware": ["errors"],
    "runs": ["config", "schema", "errors"],
    "models": ["config_models", "errors", "sparse24"],
    "data": ["config_data", "disk", "errors", "interrupt", "paths", "seeds", "sharding"],
    "optim": ["config", "sharding", "sparse24"],
    "checkpoint": ["disk", "errors", "interrupt"],
    "evaluation": ["errors"],
    "sparsity": ["config_recipe", "schema", "limits", "errors", "paths", "seeds", "sharding", "optim", "sparse24"],
    "tasks": [
        *(
            "config",
            "config_recipe",
            "config_models",
            "config_data",
            "errors",
            "paths",
            "runs",
            "hardware",
            "models",
            "optim",
            "schema",
        ),
        *("sparsity", "evaluation", "checkpoint", "sparse24", "seeds", "sharding", "objective"),
    ],
    "loggers": ["config", "runs"],
    "reporting": ["config", "schema", "errors", "runs"],
    "worker": [
        "cluster",
        "meeting",
        "interrupt",
        "objective",
        "config",
        "config_models",
        "schema",
        "errors",
        "runs",
        "hardware",
        "loggers",
        "data",
        "models",
        "checkpoint",
        "sparsity",
        "tasks",
    ],
    "cluster": ["config", "errors"],
    "meeting": ["cluster", "errors"],
    "launch": ["cluster", "config", "errors", "interrupt", "meeting", "worker"],
    "crosscheck": ["config", "config_recipe", "config_models", "config_data", "errors", "limits", "objective"],
    "preflight": [
        "models",
        "config",
        "config_data",
        "schema",
        "limits",
        "errors",
        "runs",
        "hardware",
        "loggers",
        "data",
        "checkpoint",
        "sparsity",
        "tasks",
    ],
    "train": [
        "crosscheck",
        "sparsity",
        "tasks",
        "config",
        "config_models",
        "interrupt",
        "preflight",
        "runs",
        "data",
        "checkpoint",
        "launch",
        "report",
        "factor_search",
    ],
    "finetune": [
        *("config", "config_data", "config_models", "crosscheck", "errors", "models", "runs", "data", "checkpoint"),
        *("tasks", "train", "evaluate"),
    ],
    "factor_search": [
        "crosscheck",
        "config",
        "config_recipe",
        "errors",
        "interrupt",
        "preflight",
        "runs",
        "data",
        "sparsity",
        "reporting",
    ],
    "decay_search": ["crosscheck", "config", "schema", "preflight", "runs", "factor_search", "train"],
    "compare": ["config", "errors", "paths", "runs", "train", "reporting"],
    "planning": [
        *(
            "config",
            "config_recipe",
            "config_models",
            "data",
            "errors",
            "hardware",
            "limits",
            "models",
            "optim",
            "sparsity",
            "tasks",
        ),
        "sparse24",
    ],
    "plan": ["config", "crosscheck", "planning", "reporting", "runs", "schema"],
    "sweeping": ["cluster", "config", "errors", "interrupt", "runs", "schema", "train", "reporting"],
    "sweep": [
        *("config", "crosscheck", "data", "errors", "hardware", "interrupt", "preflight", "runs", "train"),
        *("sweeping", "sweep_report"),
    ],
    "sweep_report": ["config", "runs", "reporting", "sweep", "sweeping"],
    "scoring": ["config_data", "data", "errors", "evaluation", "models", "tasks"],
    "evaluate": [
        "scoring",
        "config_data",
        "config",
        "errors",
        "runs",
        "hardware",
        "data",
        "evaluation",
        "sparsity",
        "tasks",
    ],
    "generate": [
        *("config", "config_data", "errors", "hardware", "paths", "data", "models", "sparsity", "tasks"),
    ],
    "diagnostics": ["config_recipe", "errors", "limits", "models", "sparsity", "sparse24", "reporting"],
    "pruning": ["errors", "limits", "sparse24"],
    "calibration": ["config", "config_data", "errors", "objective", "data", "models", "tasks", "evaluate"],
    "pruned": ["config_recipe", "schema", "errors", "runs", "checkpoint", "models", "sparsity", "tasks"],
    "prune": [
        *(
            "config",
            "config_recipe",
            "errors",
            "runs",
            "hardware",
            "checkpoint",
            "models",
            "pruning",
            "reporting",
            "tasks",
        ),
        *("calibration", "pruned"),
    ],
    "inspection": [
        *(
            "config",
            "config_recipe",
            "config_models",
            "errors",
            "runs",
            "hardware",
            "checkpoint",
            "data",
            "models",
            "sparsity",
        ),
        *("tasks", "diagnostics", "reporting", "evaluate"),
    ],
    "exportable": ["config", "config_data", "config_models", "errors", "runs", "data", "models", "sparsity", "tasks"],
    "export": ["config", "errors", "exportable", "limits", "models"],
    "consolidate": ["config", "errors", "runs", "schema", "checkpoint", "tasks"],
    "report": ["config", "errors", "runs", "reporting"],
    "doctor": ["config", "hardware", "loggers", "paths", "sparse24"],
    "bench": ["config", "errors", "hardware", "paths"],
    "exposition": ["config", "errors", "limits", "reporting", "seeds", "sparse24"],
    "sparsest": ["config", "errors", "exposition", "hardware", "limits", "reporting", "runs"],
    "submit": ["config", "errors"],
    "cli": [
        "cluster",
        "config",
        "launch",
        "submit",
        "schema",
        "crosscheck",
        "errors",
        "paths",
        "compare",
        "interrupt",
        "sweep",
    ],
}
NEVER_IN_SPARSE24 = ("lightning", "hydra", "omegaconf", "transformers", "sparse_pretrain")


def imports(path: Path) -> set[str]:
    """Top-level names imported anywhere in a file, ours as `models` for sparse_pretrain.models."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            modules = [
                f"{node.module}.{alias.name}" if node.module == "sparse_pretrain" else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        for module in modules:
            top, *rest = module.split(".")
            names.add(rest[0] if top == "sparse_pretrain" and rest else top)
    return names


FILES = sorted((ROOT / "sparse_pretrain").rglob("*.py"))
OURS = set(ALLOWED) | {"sparse24"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = path.relative_to(ROOT / "sparse_pretrain").parts[0].removesuffix(".py")
    if part == "__init__":
        return
    assert part in ALLOWED, f"say in this file what {part} may import"
    upward = (imports(path) & OURS) - set(ALLOWED[part]) - {part}
    assert not upward, f"{path.name} imports {upward}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels" / "sparse24").rglob("*.py")), ids=lambda path: path.name)
def test_sparse24_stands_alone(path):
    assert not imports(path) & (set(NEVER_IN_SPARSE24) | set(ALLOWED))


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow the installed package of that name


@pytest.mark.parametrize(
    "path", FILES + sorted((ROOT / "kernels").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_runs_code_from_data(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            assert not (isinstance(node.func, ast.Name) and name in ("eval", "exec")), f"{path}:{node.lineno}"
            if (
                name == "load"
                and isinstance(node.func, ast.Attribute)
                and getattr(node.func.value, "id", "") == "torch"
            ):
                safe = [
                    k for k in node.keywords if k.arg == "weights_only" and getattr(k.value, "value", False) is True
                ]
                assert safe, f"{path}:{node.lineno}: torch.load without weights_only=True"
