"""The documentation is right: its Python runs, its links lead somewhere, its commands parse, its wording is plain."""

import ast
import io
import re
import runpy
import shlex
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from fmicl_text import DIVERGENCES
from fmicl_text.cli import parser as cli_parser
from fmicl_text.cli.accelerate_launch import launcher_flags, parse_launcher_arguments, split_arguments
from fmicl_text.cli.main import SUBCOMMANDS, find_yaml, shipped
from fmicl_text.cli.text import GROUPS as TEXT_GROUPS
from fmicl_text.cli.vision import GROUPS as VISION_GROUPS
from fmicl_text.errors import InputError

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "recipes", "eval", "tests", "fmicl_text/losses", "fmicl_text/quickstart")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.md"))
}
SCRIPTS = [path for folder in ("recipes", "eval", "fmicl_text/cli") for path in sorted((ROOT / folder).glob("*.py"))]
CONFIGS = [path for folder in ("recipes", "fmicl_text") for path in sorted((ROOT / folder).rglob("*.yaml"))]
GROUPS = {"recipes/simcse_fmicl.py": TEXT_GROUPS, "recipes/vision_fmicl.py": VISION_GROUPS}

# ---- Python

EXAMPLES = [
    (page, number, code)
    for page, text in PAGES.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
IMPORTS = [  # in the one-liners of indented blocks
    (page, line)
    for page, text in PAGES.items()
    for line in re.findall(r"^    (from fmicl_text.*)$", text, re.MULTILINE)
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # of sentence-transformers' arguments on a CPU
@pytest.mark.parametrize("page, number, code", EXAMPLES, ids=[f"{page}-{number}" for page, number, _ in EXAMPLES])
def test_python_examples_run(page, number, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("max_steps=20", "max_steps=1"), f"{page}, example {number}", "exec"), {})


def test_there_are_examples():
    assert Counter(page for page, _, _ in EXAMPLES) == {"README.md": 4, "eval/README.md": 1}


@pytest.mark.parametrize("page, line", IMPORTS)
def test_one_liners_import(page, line):
    exec(line, {})


def test_there_are_one_liners():
    assert Counter(page for page, _ in IMPORTS) == {"recipes/README.md": 7}


# ---- links


def slugs(text):
    """Anchors of the headings of a page, as GitHub computes them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)  # the text of a link
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


LINKS = [
    (page, target) for page, text in PAGES.items() for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text)
]


@pytest.mark.parametrize("page, target", LINKS)
def test_links_lead_somewhere(page, target):
    path, _, anchor = target.partition("#")
    place = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    assert place.exists()
    if anchor:
        assert anchor in slugs(place.read_text(encoding="utf-8"))


def test_there_are_links():
    assert {page for page, _ in LINKS} >= {"README.md", "recipes/README.md", "eval/README.md"}


def test_slugs():
    text = "# A title\n\n## Results: STS-B dev\n\n```\n# code\n```\n\n## `f` and [g](h)\n\n## A title\n"
    assert slugs(text) == ["a-title", "results-sts-b-dev", "f-and-g", "a-title-1"]


def test_every_divergence_is_in_the_table():
    assert not [name for name in DIVERGENCES if f"| `{name}` |" not in PAGES["fmicl_text/losses/README.md"]]


# ---- commands

COMMAND = re.compile(r"(?:fmicl-text|accelerate launch|python(?= \S+\.py\b)) .+")


def commands(lines):
    """Commands of this project among indented lines, without comments; a backslash continues a line."""
    text = "\n".join(line for line in lines if line.startswith("    "))
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if match := COMMAND.match(re.sub(r"^\s*(?:for \w+ in [^;]+; do )?(?:\w+=\S+ )*", "", line)):
            yield " ".join(match[0].removesuffix("; done").split())


def headers(path):
    """The comments at the start of a YAML file as indented lines, without labels such as `Run:`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield "    " + re.sub(r"^#\s*(?:[A-Z][\w, ]*:)?\s*", "", line)


COMMANDS = [
    *((page, command) for page, text in PAGES.items() for command in commands(text.splitlines())),
    *((str(path.relative_to(ROOT)), command) for path in CONFIGS for command in commands(headers(path))),
    *(
        (str(path.relative_to(ROOT)), command)
        for path in SCRIPTS
        for command in commands(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines())
    ),
]


class BuiltError(Exception):
    """Carries the parser of a script, instead of parsing."""


@cache
def parser_of(script):
    """The parser of a recipe or script."""
    if script in GROUPS:
        return cli_parser.ArgumentParser(groups=GROUPS[script])

    def carry(parser, *args):
        raise BuiltError(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_parser.ArgumentParser, "parse_args", carry)
        main = runpy.run_path(str(shipped(script)))["main"]
        with pytest.raises(BuiltError) as built:
            main()
    return built.value.args[0]


def check_command(command):
    """Raise if a command names a script, sub-command, configuration, flag or value that does not exist. Shell variables
    stand for 1, and `...` for anything."""
    words = [word for word in shlex.split(re.sub(r"\$\w+", "1", command), comments=True) if word != "..."]
    if words[0] == "accelerate":
        (where,) = [i for i, word in enumerate(words) if word.endswith(".py")]
        script, own, for_launcher = words[where], words[where + 1 :], words[2:where]
    elif words[0] == "python":
        script, own, for_launcher = words[1], words[2:], []
    else:
        script, own, for_launcher = SUBCOMMANDS[words[1]].script, words[2:], []
    assert shipped(script).is_file()
    parser = parser_of(script)
    if words[0] == "fmicl-text" and script in GROUPS:
        for_launcher, own = split_arguments(own, launcher_flags(), parser.flags())
    if for_launcher:
        unknown = [word for word in for_launcher if word.startswith("--") and word.partition("=")[0] not in LAUNCHER]
        assert not unknown
        parse_launcher_arguments([*for_launcher, script])  # also that --config_file exists
    if {"--help", "--help_all"}.isdisjoint(own):
        args = parser.parse_args(own)
        if script in GROUPS and args.config not in (None, "FILE.yaml"):
            assert find_yaml(args.config, "configs/*").is_file()


LAUNCHER = launcher_flags()


@pytest.mark.parametrize("source, command", COMMANDS)
def test_commands_parse(source, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli_parser, "FLAGS", set())
    check_command(command)


def test_there_are_commands():
    sources = {source for source, _ in COMMANDS}
    assert sources >= {"README.md", "recipes/README.md", "eval/README.md", "recipes/simcse_fmicl.py", "eval/sts.py"}
    assert sources >= {str(path.relative_to(ROOT)) for path in CONFIGS}


@pytest.mark.parametrize(
    "command",
    [
        "fmicl-text trian --divergence kl",
        "fmicl-text train --divergnce kl",
        "fmicl-text train --negatives views",
        "fmicl-text train --config bert-base-lk",
        "fmicl-text train --config_file three_cpus",
        "fmicl-text sts --model A --colour",
        "python recipes/simcse.py",
        "python eval/sts.py --models A",
        "accelerate launch --multi recipes/simcse_fmicl.py",
        "accelerate launch recipes/vision_fmicl.py --pooling last",
    ],
)
def test_wrong_commands_are_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli_parser, "FLAGS", set())
    with pytest.raises((InputError, AssertionError, KeyError)):
        check_command(command)


# ---- wording

UNPLAIN = re.compile(
    r"\b(?:gone on with|goes on with|knobs?|slow cop(?:y|ies)|(?:is|are) told of|partners|graded pairs|heeds|foretell"
    r"|the first so many|at most so many|means nothing to|cut short|thereby|in turns|of no matter|like length)\b"
    r"|(?:tokenis|quantis|initialis|normalis)(?:e[ds]?|ing|ation)\b|colours?|\bgrey(?:scale)?\b",
    re.IGNORECASE,
)
SOURCES = [path for folder in ("fmicl_text", "recipes", "eval") for path in sorted((ROOT / folder).rglob("*.py"))]
TEMPLATES = sorted((ROOT / "fmicl_text").rglob("*template.md"))


def prose_of(path):
    """The strings, docstrings and comments of a Python file, the comments of a YAML file, all of another."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return " ".join(re.findall(r"(?:^|\s)#\s*(.*)", text))
    if path.suffix != ".py":
        return text
    strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = " ".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)
    return "\n\n".join([*(string for string in strings if isinstance(string, str)), comments])


@pytest.mark.parametrize(
    "path",
    [*(ROOT / page for page in PAGES), *TEMPLATES, *SOURCES, *CONFIGS],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_wording_is_plain(path):
    assert not UNPLAIN.findall(" ".join(prose_of(path).split()))


def test_the_scan_sees_phrases(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""It\n    heeds it."""\n\nTEXT = f"a {1} slow " "copy"  # cut\n# short\ncolour = 1\n'
    )
    assert UNPLAIN.findall(" ".join(prose_of(tmp_path / "a.py").split())) == ["heeds", "slow copy", "cut short"]
    assert UNPLAIN.findall("Colours of greyscale, tokenised; in turns") == [
        "Colours",
        "greyscale",
        "tokenised",
        "in turns",
    ]
    assert not UNPLAIN.findall("color, in turn, knobkerrie, tokenized")
    assert len(SOURCES) > 40
