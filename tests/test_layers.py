"""Imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "fmicl_text").rglob("*.py"))

# folder or module: which others of this package it may import
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "files": set(),
    "quickstart": set(),
    "losses": {"errors"},
    "loading": {"errors"},
    "model": {"errors", "loading"},
    "text": {"errors", "loading", "model"},
    "evaluation": {"errors", "files", "loading", "losses", "text"},
    "vision": {"errors", "evaluation", "loading", "model"},
    "hub": {"errors", "evaluation", "files"},
    "training": {"errors", "evaluation", "files", "hub", "losses", "model"},
    "integrations": {"hub", "losses"},
    "cli": {
        *("errors", "evaluation", "files", "hub", "loading", "losses", "quickstart", "text", "training", "vision"),
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
    place = path.relative_to(ROOT / "fmicl_text").with_suffix("").parts[0]
    if path.parent.name == "fmicl_text" and place == "__init__":
        return  # the public names, imported on first use
    assert imports(path) - {place} <= ALLOWED[place], f"{path} imports {imports(path) - ALLOWED[place]}"


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
