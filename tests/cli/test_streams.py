"""Signals and closed output: one line, and a checkpoint where training runs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fmicl_text.cli.streams import Stopped
from fmicl_text.loading import translate_dataset_errors, translate_loading_errors
from fmicl_text.training.checkpoint import checkpoints_in
from tests.programs import start_program
from tests.support import one_fast, recipe_flags, write_recipe_data

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)  # a buffer that cannot be written at the end
PROGRAM = """
import sys, time
from fmicl_text.cli.parser import cli_errors
with cli_errors("program"):
    print("begun", flush=True)
    {body}
"""


def start(body, forked=True, **streams):
    """A program that begins and then runs a body, as a new interpreter or forked."""
    code, streams = PROGRAM.format(body=body), {"env": ENVIRONMENT, "stdout": subprocess.PIPE} | streams
    if forked:
        return start_program("-c", code, **streams)
    return subprocess.Popen([sys.executable, "-c", code], text=True, **streams)


@pytest.mark.slow
@pytest.mark.parametrize("number", one_fast([signal.SIGINT, signal.SIGHUP]))
def test_a_signal_outside_of_training(number):
    with start("time.sleep(60)", forked=number != signal.SIGINT, stderr=subprocess.PIPE) as program:
        assert program.stdout.readline() == "begun\n"
        program.send_signal(number)
        printed = program.stderr.read()
    assert program.returncode == 128 + number and printed == f"program: stopped by {number.name}\n"


BODIES = ["print('line', flush=True); time.sleep(60)", "[print('line') for i in range(10**6)]", "print('line')"]


@pytest.mark.slow
@pytest.mark.parametrize("body", one_fast(BODIES))
@pytest.mark.parametrize("both", one_fast([False, True]))
def test_a_closed_pipe(body, both):
    stderr = subprocess.STDOUT if both else subprocess.PIPE
    with start(f"time.sleep(0.2); {body}", forked=both or body != BODIES[0], stderr=stderr) as program:
        assert program.stdout.readline() == "begun\n"
        program.stdout.close()
        printed = "" if both else program.stderr.read()
    assert program.returncode == 128 + signal.SIGPIPE
    assert printed == ("" if both else "program: stopped by SIGPIPE\n")


def test_streams_and_handlers_are_restored():
    before = sys.stdout, sys.stderr, signal.getsignal(signal.SIGPIPE), signal.getsignal(signal.SIGHUP)
    from fmicl_text.cli.parser import cli_errors

    with cli_errors("program"):
        assert sys.stdout is not before[0] and sys.stdout.fileno() == before[0].fileno()
    assert (sys.stdout, sys.stderr, signal.getsignal(signal.SIGPIPE), signal.getsignal(signal.SIGHUP)) == before


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed pipe", "both closed", "SIGHUP", "SIGHUP and closed"])
def test_training_saves_a_checkpoint(bert_folder, tmp_path, how):
    write_recipe_data(tmp_path)
    flags = [
        *recipe_flags(bert_folder),
        "--use_cpu",
        "True",
        "--disable_tqdm",
        "True",
        "--max_steps",
        "3000",
        "--save_steps",
        "5000",
    ]
    flags += ["--logging_steps", "1", "--eval_strategy", "no", "--output_dir", "out"]
    stderr = subprocess.STDOUT if how == "both closed" else subprocess.PIPE
    script = ROOT / "recipes" / "simcse_fmicl.py"
    streams = {"cwd": tmp_path, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": stderr}
    with start_program(script, *flags, **streams) as recipe:
        for line in recipe.stdout:
            if line.startswith("{'loss'"):
                break
        if "SIGHUP" in how:
            recipe.send_signal(signal.SIGHUP)
        if "closed" in how:
            recipe.stdout.close()
        printed = "" if how == "both closed" else recipe.stderr.read()
    expected = signal.SIGHUP if "SIGHUP" in how else signal.SIGPIPE
    assert recipe.returncode == 128 + expected
    (checkpoint,) = [path.name for path in checkpoints_in(tmp_path / "out")]
    if how != "both closed":
        (line,) = [line for line in printed.splitlines() if line.startswith("simcse_fmicl.py: ")]
        assert expected.name in line and checkpoint in line and "To resume: " in line
    assert "Traceback" not in printed


def test_a_signal_while_a_model_or_data_is_read_is_no_error_of_theirs():
    for translate in (translate_loading_errors("model=x"), translate_dataset_errors(str)):
        with pytest.raises(Stopped), translate:
            raise Stopped(signal.SIGHUP)


def test_a_log_that_is_full_stops_like_a_closed_pipe():
    """A write to /dev/full fails as on a full disk."""
    with (
        open("/dev/full", "w") as full,
        start("print('line', flush=True)", stdout=full, stderr=subprocess.PIPE) as program,
    ):
        printed = program.stderr.read()
    assert program.returncode == 128 + signal.SIGPIPE and printed == "program: stopped by SIGPIPE\n"
