"""Arguments of the launcher, the processes that it is asked to start, and the exit status of a recipe."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fmicl_text.cli import accelerate_launch
from fmicl_text.cli.accelerate_launch import launcher_flags, split_arguments
from fmicl_text.cli.main import LAUNCH, shipped
from fmicl_text.errors import InputError
from tests.support import run_command

OWN = {"--gamma", "--output_dir", "--debug", "--gradient_accumulation_steps", "--help"}


@pytest.fixture(autouse=True)
def own_process_state(tmp_path, monkeypatch):
    """No configuration of accelerate; environment, arguments and signal handlers as they were."""
    monkeypatch.setattr(accelerate_launch, "default_config_file", str(tmp_path / "none.yaml"))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with mock.patch.dict(os.environ), mock.patch.object(sys, "argv", ["fmicl-text"]):
        os.environ.pop(LAUNCH, None)
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def started(monkeypatch):
    """What is started instead of a recipe: (None, arguments) in this process, else (launcher's options, arguments)."""
    calls = []
    monkeypatch.setattr(accelerate_launch, "run_script", lambda script, arguments: calls.append((None, arguments)))
    monkeypatch.setattr(
        accelerate_launch, "launch_command", lambda asked: calls.append((asked, asked.training_script_args))
    )
    return calls


@pytest.mark.parametrize(
    "arguments, for_launcher, for_script",
    [
        ("--gamma 2 --output_dir a", "", "--gamma 2 --output_dir a"),
        ("--num_processes 2 --gamma 2", "--num_processes 2", "--gamma 2"),
        ("--gamma 2 --cpu --output_dir a --num-processes=2", "--cpu --num-processes=2", "--gamma 2 --output_dir a"),
        ("--debug a --gradient_accumulation_steps 4", "", "--debug a --gradient_accumulation_steps 4"),  # flags of both
        ("--gama 2 --help", "", "--gama 2 --help"),
        ("--module --no_python", "", "--module --no_python"),
        ("", "", ""),
    ],
)
def test_arguments_are_split(arguments, for_launcher, for_script):
    split = split_arguments(arguments.split(), launcher_flags(), OWN)
    assert split == (for_launcher.split(), for_script.split())


@pytest.mark.parametrize("arguments", ["--gamma 2 --num_processes", "--num_processes --gamma 2"])
def test_a_value_that_is_missing_is_named(arguments):
    with pytest.raises(InputError, match="argument --num_processes: expected one argument"):
        split_arguments(arguments.split(), launcher_flags(), OWN)


@pytest.mark.parametrize(
    "flags", ["", "--num_processes 1 --num_machines 1", "--mixed_precision no", "--help --multi_gpu"]
)
def test_one_process_is_this_one(started, flags):
    assert run_command("train", *flags.split(), "--gamma", "2") == 0
    ((asked, arguments),) = started
    assert asked is None and arguments[-2:] == ["--gamma", "2"]


def test_the_precision_reaches_this_process(started):
    run_command("train-images", "--mixed_precision", "bf16")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16" and started == [(None, [])]


def test_several_processes_are_launched_without_a_warning(started, caplog):
    run_command("train", "--gamma", "2", "--num_processes", "2")
    ((asked, arguments),) = started
    assert (asked.num_processes, asked.num_machines, asked.multi_gpu) == (2, 1, True)
    assert (asked.mixed_precision, asked.dynamo_backend) == ("no", "no")
    assert arguments == ["--gamma", "2"] and asked.training_script == str(shipped("recipes/simcse_fmicl.py"))
    recorded = json.loads(os.environ[LAUNCH])
    assert recorded["command"] == ["fmicl-text", "train", "--gamma", "2", "--num_processes", "2"]
    assert recorded["launcher"] == ["--num_processes", "2"]


@pytest.mark.parametrize("flags", ["--gpu_ids 0", "--cpu", "--num_cpu_threads_per_process 2", "--use_fsdp"])
def test_other_options_go_through_the_launcher(started, flags):
    run_command("train", *flags.split())
    assert started[0][0] is not None


def test_a_configuration_file_goes_through_the_launcher(started, tmp_path, monkeypatch):
    run_command("train", "--config_file", "two_cpus")
    assert started[0][0].config_file == str(shipped("recipes/accelerate/two_cpus.yaml"))
    assert json.loads(os.environ[LAUNCH])["launcher"][-1].endswith("two_cpus.yaml")
    assert run_command("train", "--config_file", "none.yaml") == 2
    (tmp_path / "default.yaml").write_text("")
    monkeypatch.setattr(accelerate_launch, "default_config_file", str(tmp_path / "default.yaml"))
    run_command("train")
    assert started[1][0].config_file is None and started[1][0].num_processes is None


CHILD = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file="none")
KILLED = ProcessFailure(local_rank=0, pid=1, exitcode=-9, error_file="none")


@pytest.mark.parametrize(
    "error, status",
    [
        (subprocess.CalledProcessError(2, "python"), 2),
        (subprocess.CalledProcessError(-signal.SIGTERM, "python"), 143),
        (ChildFailedError("recipe", {0: CHILD}), 2),
        (ChildFailedError("recipe", {0: KILLED}), 137),
        (SignalException("", signal.SIGINT), 130),
    ],
)
def test_the_exit_status_is_the_recipes(monkeypatch, capsys, error, status):
    monkeypatch.setattr(accelerate_launch, "launch_command", mock.Mock(side_effect=error))
    assert run_command("train", "--num_processes", "2") == status
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--num_processes x", "argument --num_processes/--num-processes: invalid int value: 'x'"),
        ("--mixed_precision half", "argument --mixed_precision/--mixed-precision: invalid choice: 'half'"),
        ("--multi_gpu --num_processes 1", "at least 2 processes"),
        ("--cpu --multi_gpu --num_processes 2", "--cpu"),
        ("--config_file none", "--config_file none: no such file"),
    ],
)
def test_mistakes_in_the_launchers_flags_are_one_line(capsys, flags, named):
    assert run_command("train", *flags.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("fmicl-text train: error: ") and named in printed.err
    assert printed.err.count("\n") == 1


def command(*arguments):
    return [sys.executable, "-m", "fmicl_text.cli.main", *arguments]


@pytest.mark.slow
def test_a_mistake_in_two_processes_has_no_traceback_of_the_launcher(tmp_path):
    flags = ("--num_processes", "2", "--use_cpu", "True", "--gamma=-1", "--output_dir", str(tmp_path))
    done = subprocess.run(command("train", *flags), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "fmicl-text train: error: --gamma must be" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_signal_reaches_the_process_that_accelerate_waits_for(tmp_path):
    """With a configuration file, the launcher starts even a single process."""
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"pathlib.Path({str(log)!r}).write_text('ready')\n"
        "time.sleep(300)\n"
    )
    start = (
        "import sys\n"
        "from fmicl_text.cli.accelerate_launch import launch_processes, parse_launcher_arguments\n"
        "launch_processes(parse_launcher_arguments(sys.argv[1:]))"
    )
    flags = ("--config_file=one_gpu", "--mixed_precision=no", str(script))
    process = subprocess.Popen([sys.executable, "-c", start, *flags])
    try:
        deadline = time.monotonic() + 300
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) == 7
    finally:
        process.kill()
