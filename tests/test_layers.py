"""Imports point one way, no test imports another, and messages of the library name arguments, not flags."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "fmicl_text").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# folder or module: which others of this package it may import
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "files": {"errors"},
    "processes": {"errors"},
    "quickstart": set(),
    "losses": {"errors"},
    "loading": {"errors", "files"},
    "model": {"errors", "loading"},
    "text": {"errors", "files", "loading", "model"},
    "evaluation": {"errors", "files", "loading", "losses", "text"},
    "vision": {"errors", "evaluation", "files", "loading", "model"},
    "hub": {"errors", "evaluation", "files", "loading", "vision"},
    "training": {"errors", "evaluation", "files", "hub", "loading", "losses", "model", "processes", "text"},
    "integrations": {"errors", "hub", "losses"},
    "cli": {
        *("errors", "evaluation", "files", "hub", "loading", "losses", "model", "processes", "quickstart", "text"),
        *("training", "vision"),
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


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT / "tests")))
def test_no_test_imports_another(path):
    """Shared helpers are in tests/support.py; fixtures of a conftest.py need no import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else names
            parts = {part for name in names if name.startswith("tests.") for part in name.split(".")}
            assert not [part for part in parts if part.startswith(("test_", "conftest"))], f"{path}: {names}"


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


# ---- the command line turns arguments into flags: see add_dashes of fmicl_text/cli/parser.py

COMMANDS = re.compile(r"(accelerate launch|fmicl-text push)[^`]*")  # to be typed
PARTS_OF_COMMANDS = {
    " --private",
    " --revision {}",
    " --create_pr",
}  # of `fmicl-text push`, in fmicl_text/hub/upload.py


def texts(path):
    """Line number and text of every string that is not a docstring; {} stands for the values of an f-string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings | parts:
            yield node.lineno, node.value


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if "cli" not in path.relative_to(ROOT / "fmicl_text").parts],
    ids=lambda path: str(path.relative_to(ROOT / "fmicl_text")),
)
def test_messages_name_arguments_not_flags(path):
    found = [(line, text) for line, text in texts(path) if text not in PARTS_OF_COMMANDS]
    assert not [f"{path}:{line}: {text}" for line, text in found if re.search("--[a-z]", COMMANDS.sub("", text))]
