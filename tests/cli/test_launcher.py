"""The number of processes requested, read from the commands of the parent processes; and the resume command."""

import json
import sys
from pathlib import Path

import psutil
import pytest

from fmicl_text.cli import launcher
from fmicl_text.cli.launcher import executable, resume_command
from fmicl_text.processes import LAUNCH, launcher_arguments, launcher_processes


def asked_of(*parents):
    return launcher_processes(launcher_arguments(parents))


class Parent:
    """A process that was started by a command."""

    def __init__(self, *command):
        self.command = command

    def cmdline(self):
        if self.command == ("gone",):
            raise psutil.NoSuchProcess(1)
        return list(self.command)


def test_what_the_launcher_was_asked_for(tmp_path, monkeypatch, capsys):
    config = tmp_path / "engine.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 3\nuse_cpu: true\n")
    script = ("recipes/simcse_fmicl.py", "--num_processes", "9")
    shell, gone = Parent("/bin/sh", "-c", "launch"), Parent("gone")
    monkeypatch.setattr("accelerate.commands.config.default_config_file", str(tmp_path / "none.yaml"))
    for command, expected in [
        (("python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", *script), 2),
        (("python", "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes=4", *script), 4),
        (("accelerate", "launch", "--config_file", str(config), *script), 3),
        (("accelerate", "launch", "--config_file", str(config), "--num_processes", "2", *script), 2),
        (("accelerate", "launch", *script), 1),
        (("/bin/accelerate-launch", "--cpu", "--num_processes", "2", *script), 2),
        (("python", "-m", "accelerate.commands.launch", "--num_processes", "2", *script), 2),
        (("/envs/accelerate/bin/python", "deploy.py", "launch", "--num_processes", "8", "job"), 1),
        (("accelerate", "launch", "--num_processes", "many"), 1),
        (("python", *script), 1),
    ]:
        assert asked_of(gone, shell, Parent(*command)) == expected
    assert asked_of() == 1
    monkeypatch.setattr("accelerate.commands.config.default_config_file", str(config))
    for flags, expected in [((), 3), (("--cpu",), 1)]:  # as accelerate reads its default file
        assert asked_of(Parent("accelerate", "launch", *flags, *script)) == expected


def test_the_resume_command(monkeypatch):
    """As the run was launched, without flags that would start from scratch and with the flag that resumes."""
    monkeypatch.setattr(launcher, "executable", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["r.py", "--overwrite_output_dir", "--alpha", "4", "--resume_from_checkpoint=a/b"])
    monkeypatch.setattr(psutil.Process, "parents", lambda process: [])
    assert resume_command("auto") == "python r.py --alpha 4 --resume_from_checkpoint auto"
    launched = ("accelerate", "launch", "--cpu", "r.py", "--overwrite_output_dir", "True", "--output_dir", "my run")
    monkeypatch.setattr(psutil.Process, "parents", lambda process: [Parent("sh"), Parent(*launched)])
    expected = "accelerate launch --cpu r.py --output_dir 'my run' --resume_from_checkpoint a/checkpoint-5"
    assert resume_command("a/checkpoint-5") == expected
    for torchrun in (("python", "/bin/torchrun"), ("python", "-m", "torch.distributed.run")):
        launched = (
            *torchrun,
            "--nproc_per_node",
            "2",
            "r.py",
            "--overwrite-output-dir",
            "--resume-from-checkpoint",
            "a",
        )
        monkeypatch.setattr(psutil.Process, "parents", lambda process, launched=launched: [Parent(*launched)])
        assert resume_command("auto") == "torchrun --nproc_per_node 2 r.py --resume_from_checkpoint auto"
    for launched in (("accelerate", "launch", "sweep.py"), ("torchrun", "sweep.py", "--overwrite_output_dir")):
        monkeypatch.setattr(psutil.Process, "parents", lambda process, launched=launched: [Parent(*launched)])
        assert resume_command("auto") == "python r.py --alpha 4 --resume_from_checkpoint auto"  # of another script
    monkeypatch.setattr(sys, "argv", ["r.py", "--overwrite-output-dir=True", "--alpha", "4"])
    assert resume_command("auto") == "python r.py --alpha 4 --resume_from_checkpoint auto"
    for no_script in ("-c", ""):  # python -c, and an interactive one
        monkeypatch.setattr(sys, "argv", [no_script, "--alpha", "4"])
        for parent in (("python", "-c", "a job"), ("python", "/", "job.py")):
            monkeypatch.setattr(psutil.Process, "parents", lambda process, parent=parent: [Parent(*parent)])
            assert "job" not in resume_command("auto")
    started = {
        "command": ["fmicl-text", "train", "--num_processes", "2", "--alpha", "4"],
        "launcher": ["--num_processes", "2"],
    }
    monkeypatch.setenv(LAUNCH, json.dumps(started))
    assert resume_command("auto") == "fmicl-text train --num_processes 2 --alpha 4 --resume_from_checkpoint auto"
    assert asked_of() == 2


def test_programs_are_named_so_that_the_shell_finds_them(monkeypatch, tmp_path):
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(folder))
    assert executable("python") == "python"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert executable("python") == str(folder / "python")


@pytest.mark.parametrize(
    "command",
    [
        "mpirun -np 2 python r.py --alpha 4",
        "deepspeed --num_gpus 2 r.py --alpha 4",
        "python -m torch.distributed.launch --nproc_per_node 2 r.py --alpha 4",
    ],
)
def test_other_launchers(monkeypatch, command):
    """Without shells, and with the outermost of several."""
    monkeypatch.setattr(launcher, "executable", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["r.py", "--alpha", "4"])
    parents = [Parent("python", "-u", "r.py", "--alpha", "4"), Parent(*command.split()), Parent("bash", "r.py")]
    monkeypatch.setattr(psutil.Process, "parents", lambda process: parents)
    assert resume_command("auto") == f"{command} --resume_from_checkpoint auto"


def test_overwriting_that_a_file_asks_for_is_overridden(monkeypatch):
    monkeypatch.setattr(launcher, "executable", lambda name: name)
    monkeypatch.setattr(psutil.Process, "parents", lambda process: [])
    for words in (["--config", "a.yaml"], ["--config=a.yaml"]):
        monkeypatch.setattr(sys, "argv", ["r.py", *words, "--overwrite_output_dir"])
        expected = f"python r.py {' '.join(words)} --overwrite_output_dir False --resume_from_checkpoint auto"
        assert resume_command("auto", overwrite=True) == expected
