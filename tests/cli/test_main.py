"""The sub-commands of `fmicl-text`."""

import json
import os
import subprocess
import sys
from unittest import mock

import pytest

from fmicl_text import __version__
from fmicl_text.cli.main import LAUNCH, SUBCOMMANDS, find_yaml, program_name, record_launch, shipped
from tests.support import run_command

HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy")


@pytest.fixture(autouse=True)
def own_environment():
    with mock.patch.dict(os.environ), mock.patch.object(sys, "argv", ["fmicl-text"]):
        os.environ.pop(LAUNCH, None)
        yield


def test_help_has_a_line_for_each_command(capsys):
    assert run_command("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in SUBCOMMANDS.items():
        assert len([line for line in lines if line.split()[:1] == [name] and line.endswith(command.help)]) == 1


def test_version(capsys):
    assert run_command("--version") == 0
    assert capsys.readouterr().out == f"fmicl_text {__version__}\n"


@pytest.mark.parametrize("arguments, named", [(["trian"], "trian"), (["--trian"], "--trian"), ([], "no command")])
def test_an_unknown_command_is_one_line_with_the_known_ones(arguments, named, capsys):
    assert run_command(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("fmicl-text: error: ") and named in printed.err and "train-images" in printed.err


def test_no_library_is_imported_before_the_command_is_known():
    code = f"import sys, fmicl_text.cli.main; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", SUBCOMMANDS.values(), ids=SUBCOMMANDS)
def test_scripts_are_found(command):
    assert shipped(command.script).is_file()


def test_a_name_stands_for_a_yaml_file_of_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_yaml("bert-base-js", "configs/*") == shipped("recipes/configs/text/bert-base-js.yaml")
    assert find_yaml("two_cpus", "accelerate") == shipped("recipes/accelerate/two_cpus.yaml")
    for name in ("none", "none/bert-base-js", "bert-base-js.yaml"):
        assert str(find_yaml(name, "configs/*")) == name
    (tmp_path / "bert-base-js").write_text("gamma: 2")
    assert str(find_yaml("bert-base-js", "configs/*")) == "bert-base-js"


def test_the_name_of_the_program():
    sys.argv = ["/a/b/sts.py"]
    assert (program_name(), program_name("geometry.py")) == ("sts.py", "geometry.py")
    record_launch(["train", "--gamma", "2"], ["--cpu"])
    assert (program_name(), program_name("geometry.py")) == ("fmicl-text train", "fmicl-text train")
    recorded = {"command": ["fmicl-text", "train", "--gamma", "2"], "launcher": ["--cpu"]}
    assert json.loads(os.environ[LAUNCH]) == recorded


@pytest.mark.parametrize("name", ["sts", "compare", "push"])
def test_scripts_run_under_the_name_of_the_command(name, capsys):
    assert run_command(name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: fmicl-text {name} ")


def test_the_status_and_message_of_a_script_are_passed_on(tmp_path, capsys):
    assert run_command("push", str(tmp_path / "none"), "you/encoder") == 2
    assert capsys.readouterr().err.startswith("fmicl-text push: error: ")
