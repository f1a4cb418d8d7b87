"""What reaches the terminal: one line, without control characters, also for output that is not UTF-8."""

import os
import shlex
import sys
import tempfile
from pathlib import Path

import pytest

from fmicl_text import InputError
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.cli.streams import Output
from fmicl_text.cli.vision import parse_vision_args
from fmicl_text.hub.upload import retry_command
from fmicl_text.training.output_dir import check_output_dir


def test_control_characters_are_escaped(capsys):
    with pytest.raises(SystemExit) as stop, cli_errors("program"):
        raise InputError("model_type \x1b[31mred\x07 is\nunknown")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "program: error: model_type \\x1b[31mred\\x07 is unknown\n"


def test_a_process_that_waits_for_one_that_has_ended_says_so(capsys):
    with pytest.raises(SystemExit) as stop, cli_errors("program"):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3794. This is ...")
    assert stop.value.code == 1
    assert capsys.readouterr().err == "program: error: another process of this run has ended\n"
    with pytest.raises(RuntimeError, match="shape"), cli_errors("program"):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_text_can_be_printed(tmp_path, encoding):
    with open(tmp_path / "out", "w", encoding=encoding) as file:
        print("a\udcffb", "caf\u00e9", file=Output(file))
    expected = {"utf-8": "a\\udcffb caf\u00e9\n", "ascii": "a\\udcffb caf\\xe9\n"}[encoding]
    assert (tmp_path / "out").read_text(encoding=encoding) == expected


def test_control_characters_in_output_are_escaped(capsys):
    with cli_errors("program"):
        sys.stdout.write("\x1b[2Ja\x1b]0;title\x07b\tc\r\x9b1J\x1b[1;31mred\x1b[A\n")
    assert capsys.readouterr().out == "\\x1b[2Ja\\x1b]0;title\\x07b\tc\r\\x9b1J\x1b[1;31mred\x1b[A\n"


def test_the_command_to_retry_a_push_is_quoted(tmp_path):
    folder = tmp_path / "my run; rm -rf x"
    words = shlex.split(retry_command(folder, "a/b", private=True, revision="$(id)"))
    assert words == ["fmicl-text", "push", str(folder), "a/b", "--exist_ok", "--private", "--revision", "$(id)"]


def test_dashes_are_underscores():
    parser = ArgumentParser("program")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--dry-run", action="store_true")
    for flags in (["--batch-size", "3"], ["--batch-size=3"], ["--batch_size", "3"]):
        assert parser.parse_args([*flags, "--dry-run"]).batch_size == 3
    with pytest.raises(InputError, match="--batches-size"):
        parser.parse_args(["--batches-size", "3"])


def test_flags_with_dashes_override_the_presets(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vision_fmicl.py"])
    for flag in ("--num_train_epochs", "--num-train-epochs"):
        _, _, args = parse_vision_args([flag, "3", "--use_cpu", "True"])
        assert (args.num_train_epochs, args.max_steps) == (3, -1), flag


@pytest.fixture
def folder_of_a_user():
    """A folder of a user who is not root, as whom the test runs."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            yield Path(folder)
    finally:
        os.seteuid(before)


def test_folders_without_permission(folder_of_a_user):
    folder = folder_of_a_user / "out"
    folder.mkdir()
    (folder / "results.json").write_text("{}")
    for mode in (0o000, 0o600):
        folder.chmod(mode)
        for resume in (None, "auto"):
            with pytest.raises(InputError, match="output_dir="):
                check_output_dir(folder, resume, overwrite=False)
    folder.chmod(0o700)
    (folder / "results.json").chmod(0o000)
    with pytest.raises(InputError, match="output_dir="):
        check_output_dir(folder, "auto", overwrite=False)
    (folder / "results.json").unlink()
    folder.chmod(0o500)
    with pytest.raises(InputError, match="output_dir="):
        check_output_dir(folder, None, overwrite=False)
    folder.chmod(0o700)
