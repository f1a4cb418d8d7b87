"""What the wheel contains: `fmicl-text` must work without a clone of the repository."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from fmicl_text import __version__
from fmicl_text.cli.main import SUBCOMMANDS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPED = {"eval": "fmicl_text/eval", "recipes": "fmicl_text/recipes"}


def shipped_files():
    """Paths in the wheel of all files of the package but its READMEs, and of the scripts and YAML files of the mapped
    folders."""
    found = {path.relative_to(ROOT) for path in (ROOT / "fmicl_text").rglob("*") if path.is_file()}
    names = {str(path) for path in found if "__pycache__" not in path.parts and path.name != "README.md"}
    for folder, inside in MAPPED.items():
        paths = [path for kind in ("*.py", "*.yaml") for path in (ROOT / folder).rglob(kind)]
        names |= {f"{inside}/{path.relative_to(ROOT / folder)}" for path in paths}
    return names


def test_every_folder_with_modules_is_a_package_of_the_wheel():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fmicl_text").rglob("__init__.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"fmicl_text.eval", "fmicl_text.recipes"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_the_version_is_stated_once():
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]


@pytest.mark.slow
def test_the_wheel_has_all_files(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    for folder in ("fmicl_text", *MAPPED):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"fmicl_text-{__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if not name.startswith(f"fmicl_text-{__version__}.dist-info/")}
    assert {name for name in inside if not name.endswith("README.md")} == shipped_files()
    for command in SUBCOMMANDS.values():
        assert f"fmicl_text/{command.script}" in names
    assert "fmicl_text/hub/model_card_template.md" in names and "fmicl_text/py.typed" in names
    assert not [name for name in names if "generate" in name or "test" in name]
