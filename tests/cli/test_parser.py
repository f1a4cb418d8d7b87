"""Errors of the library, which name arguments, become errors of the command line, which name flags."""

import os
import re
import sys
from unittest import mock

import pytest

from fmicl_text.cli.main import LAUNCH
from fmicl_text.cli.parser import (
    RENAMED,
    ArgumentParser,
    add_dashes,
    cli_errors,
    find_own_modules,
    flags_called,
    known_flags,
)
from fmicl_text.cli.text import GROUPS, parse_args
from fmicl_text.cli.vision import parse_vision_args
from fmicl_text.errors import InputError

FLAGS = {"train_file", "gamma", "model", "max_steps", "dataset_name", "output_dir"}


@pytest.mark.parametrize(
    "message, expected",
    [
        ("train_file=a.txt: no such file", "--train_file a.txt: no such file"),
        ("gamma must be > 0, got -1", "--gamma must be > 0, got -1"),
        ("streaming needs max_steps", "streaming needs --max_steps"),
        ("the model needs gamma=2", "the model needs --gamma 2"),
        ("output_dir=/a/train_file/x: no", "--output_dir /a/train_file/x: no"),
        ("/a/train_file: no", "/a/train_file: no"),
        ("train_file.txt and 'train_file': no", "train_file.txt and 'train_file': no"),
        ("train_file, dataset_name.", "--train_file, --dataset_name."),
        ("betas=0.9 is not a flag", "betas=0.9 is not a flag"),
    ],
)
def test_names_of_arguments_become_flags(message, expected):
    assert add_dashes(message, FLAGS) == expected


def test_scripts_may_call_arguments_otherwise():
    expected = "^images=/a/train_file: no such file; model_name_or_path=b, max_train_samples$"
    with pytest.raises(InputError, match=expected), flags_called(train_file="images", train="x"):
        raise InputError("train_file=/a/train_file: no such file; model_name_or_path=b, max_train_samples")


@pytest.mark.parametrize(
    "launch, program", [(None, "sts.py"), ('{"command": ["fmicl-text", "sts"]}', "fmicl-text sts")]
)
def test_errors_are_one_line_of_the_program(monkeypatch, capsys, launch, program):
    monkeypatch.delenv(LAUNCH, raising=False)
    if launch:
        monkeypatch.setenv(LAUNCH, launch)
    with pytest.raises(SystemExit) as stop, cli_errors("sts.py"):
        raise InputError("two\n  lines")
    assert stop.value.code == 2 and capsys.readouterr().err == f"{program}: error: two lines\n"


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--learning_rate=-1"], "--learning_rate must be finite and at least 0, got -1.0"),
        (["--seed=-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--gamma", "nan"], "--gamma must be auto or a finite number > 0, got nan"),
        (["--similarity", "cosine", "--gamma", "2"], "--gamma 2.0 does not apply to --similarity cosine"),
        (["--max_seq_length", "0"], "--max_seq_length must be at least 3, got 0"),
        (["--load_in_4bit", "--load_in_8bit"], "--load_in_4bit and --load_in_8bit are mutually exclusive"),
    ],
)
def test_errors_of_the_dataclasses_name_flags(argv, expected, capsys):
    with pytest.raises(SystemExit), cli_errors("x.py"):
        parse_args(argv)
    assert capsys.readouterr().err == f"x.py: error: {expected}\n"


def test_modules_of_the_current_folder_are_found_for_flags_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_divergence.py").write_text("def f(u):\n    return u * u.log()\n")
    (tmp_path / "run.yaml").write_text("divergence: own_divergence:f\n")
    with mock.patch.object(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())]):
        with pytest.raises(InputError, match="own_divergence"):
            parse_args(["--config", "run.yaml", "--use_cpu", "True"])
        parser = ArgumentParser(groups=GROUPS)
        find_own_modules(parser.parse_args(["--divergence", "kl"]))
        assert str(tmp_path) not in sys.path
        args = parse_args(["--config", "run.yaml", "--divergence", "own_divergence:f", "--use_cpu", "True"])[-1]
        assert args.divergence == "own_divergence:f" and sys.path[-1] == str(tmp_path)
    sys.modules.pop("own_divergence")


@pytest.mark.parametrize("name", RENAMED)
def test_options_of_other_programs_are_named_with_what_replaces_them(name, tmp_path, monkeypatch):
    assert name not in known_flags(ArgumentParser(groups=GROUPS))
    monkeypatch.chdir(tmp_path)
    for argv in ([f"--{name}", "1"], [f"--{name.replace('_', '-')}=1"]):
        with pytest.raises(InputError, match=f"^--{name} is not an option: use "):
            parse_args(argv)
    (tmp_path / "run.yaml").write_text(f"{name}: 1\n")
    with pytest.raises(InputError, match=f"^--config run.yaml: --{name} is not an option: use "):
        parse_args(["--config", "run.yaml"])


def test_what_replaces_an_option_is_accepted():
    """Names in the messages are options of this project."""
    known = set(known_flags(ArgumentParser(groups=GROUPS)))
    for name, instead in RENAMED.items():
        option = re.match(r"\w*", instead)[0]
        assert "_" not in option or option in known, name
        assert option in known or option in ("", "the", "an", "your"), name


def test_the_line_for_the_warmup_ratio(capsys):
    with pytest.raises(SystemExit), cli_errors("x.py"):
        parse_args(["--warmup_ratio", "0.1"])
    expected = "--warmup_ratio is not an option: use --warmup_steps 0.1 for a tenth of all steps: a number below 1 is"
    assert capsys.readouterr().err == f"x.py: error: {expected} a fraction\n"
    with pytest.raises(InputError, match=r"^unknown argument --max_length "):  # images have no length
        parse_vision_args(["--max_length", "1"])
