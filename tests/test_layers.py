"""Imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "fmicl_text").rglob("*.py"))

# module (or folder/): what of this package it may import
ALLOWED = {
    "environment": set(),
    "errors": set(),
    "divergences": set(),
    "similarity": set(),
    "objectives": set(),
    "quickstart/": set(),
    "distributed": set(),
    "blockwise": {"distributed", "errors", "objectives", "similarity"},
    "loss": {"blockwise", "distributed", "divergences", "errors", "objectives", "similarity"},
    "dropout": set(),
    "adapters": {"errors"},
    "loading": {"errors"},
    "model": {"adapters", "dropout", "errors", "loading"},
    "evaluation/": {"divergences", "errors", "files", "loading", "model", "similarity", "text", "evaluation"},
    "text/": {"errors", "loading", "text"},
    "vision/": {
        *("arguments", "errors", "evaluation", "loading", "loss", "model", "momentum", "trainer", "training_args"),
        "vision",
    },
    "training_args": {"distributed", "divergences", "similarity", "loss"},
    "record": {"evaluation"},
    "training_log": {"evaluation", "loss"},
    "files": set(),
    "checkpoints": {"errors", "files"},
    "guards": {"errors", "loss", "similarity"},
    "position": set(),
    "pushing": {"card", "hub", "record"},
    "saving": {"checkpoints", "errors", "files", "guards", "loss", "model", "pushing", "training_args"},
    "resuming": {"checkpoints", "errors", "saving"},
    "trainer": {"checkpoints", "errors", "guards", "model", "position", "resuming", "training_args", "training_log"},
    "momentum": {"distributed", "errors", "model", "similarity", "trainer"},
    "arguments": {"errors", "model", "quickstart", "training_args"},
    "hub": {"errors"},
    "card": {"evaluation", "files"},
    "integrations/": {"card", "divergences", "loss"},
    "launcher": set(),
    "run": {
        *("card", "checkpoints", "errors", "evaluation", "files", "launcher", "loading", "record", "trainer"),
        "training_args",
    },
}


def imports(path: Path) -> set[str]:
    """First part below fmicl_text of every import in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "fmicl_text":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            assert parts[0] not in ("recipes", "eval"), f"{path} imports a script"
        elif isinstance(node, ast.Import):
            assert not [a for a in node.names if a.name.startswith("fmicl_text.")], f"{path}: use from-imports"
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "fmicl_text")))
def test_imports_point_one_way(path):
    name = path.relative_to(ROOT / "fmicl_text").with_suffix("").as_posix()
    if name == "__init__":
        return
    rule = name.split("/")[0] + "/" if "/" in name else name
    assert imports(path) <= ALLOWED[rule], f"{name} imports {imports(path) - ALLOWED[rule]}"


def test_the_scan_saw_the_package():
    assert len(MODULES) > 15


@pytest.mark.parametrize("folder", ["recipes", "eval"])
def test_scripts_are_no_package_and_shadow_no_library(folder):
    scripts = sorted((ROOT / folder).glob("*.py"))
    assert scripts
    names = {path.stem for path in scripts}
    assert not names & {"__init__", "datasets", "evaluate", "transformers", "torch", "accelerate", "mteb", "scipy"}
    for path in scripts:
        assert not imports(path) & {"recipes", "eval"}
