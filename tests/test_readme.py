"""The README's Python runs, and what it says is there is there."""

import re
from pathlib import Path

import pytest

from fmicl_text import DIVERGENCES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("", "eval", "recipes", "tests")
TEXTS = [(ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in FOLDERS]
EXAMPLES = [example for text in TEXTS for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
LINKS = [
    (folder, target)
    for folder, text in zip(FOLDERS, TEXTS, strict=True)
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # of sentence-transformers' arguments on a CPU
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_examples_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[number].replace("max_steps=20", "max_steps=1"), f"README example {number}", "exec"), {})


def test_there_are_examples():
    assert len(EXAMPLES) == 4


def test_every_divergence_is_in_the_table():
    assert all(f"| `{name}`" in README for name in DIVERGENCES)


@pytest.mark.parametrize("folder, target", LINKS)
def test_links_lead_somewhere(folder, target):
    assert (ROOT / folder / target.partition("#")[0]).exists()


def test_the_map_shows_the_tree():
    for path in (ROOT / "fmicl_text").glob("[a-z]*.py"):
        assert re.search(rf"^      {path.name} ", README, re.MULTILINE), path.name
