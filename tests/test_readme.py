"""The README's Python runs, and what it says is there is there."""

import re
from pathlib import Path

import pytest

from fmicl_text import DIVERGENCES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_examples_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[number].replace("max_steps=20", "max_steps=1"), f"README example {number}", "exec"), {})


def test_there_are_examples():
    assert len(EXAMPLES) == 2


def test_every_divergence_is_in_the_table():
    assert all(f"| `{name}`" in README for name in DIVERGENCES)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:|#)([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target.partition("#")[0]).exists()


def test_the_map_shows_the_tree():
    for path in (ROOT / "fmicl_text").glob("[a-z]*.py"):
        assert re.search(rf"^      {path.name} ", README, re.MULTILINE), path.name
