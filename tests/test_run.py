"""Claiming the output folder."""

import psutil
import pytest

from fmicl_text import FMICLTrainingArguments, InputError
from fmicl_text.run import (
    check_processes,
    checkpoint_to_resume,
    claim_output_dir,
    clear_output_dir,
    launcher_processes,
)


def arguments(folder, **settings):
    return FMICLTrainingArguments(output_dir=str(folder), use_cpu=True, **settings)


def test_a_new_folder_is_made_and_an_unrelated_file_is_no_obstacle(tmp_path):
    claim_output_dir(arguments(tmp_path / "a" / "b"))
    (tmp_path / "a" / "b" / "notes.txt").write_text("mine")
    claim_output_dir(arguments(tmp_path / "a" / "b"))


@pytest.mark.parametrize("held", ["results.json", "modules.json", "config.json", "checkpoint-10"])
def test_what_a_run_would_overwrite_is_kept(tmp_path, held):
    (tmp_path / held).mkdir() if held.startswith("checkpoint") else (tmp_path / held).write_text("{}")
    with pytest.raises(InputError, match=f"already holds {held}: name another folder, or add --overwrite_output_dir"):
        claim_output_dir(arguments(tmp_path))
    assert (tmp_path / held).exists()
    claim_output_dir(arguments(tmp_path, resume_from_checkpoint="True"))
    assert (tmp_path / held).exists()


def test_the_checkpoint_to_resume(tmp_path):
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert checkpoint_to_resume(arguments(tmp_path)) is None
    newest = str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(arguments(tmp_path, resume_from_checkpoint="True")) == newest
    other = str(tmp_path / "checkpoint-5")
    assert checkpoint_to_resume(arguments(tmp_path, resume_from_checkpoint=other)) == other
    for named, where in [("True", "empty holds none"), ("nope", "nope is none")]:
        with pytest.raises(
            InputError, match=f"--resume_from_checkpoint {named}: no checkpoint to resume from, .*{where}"
        ):
            checkpoint_to_resume(arguments(tmp_path / "empty", resume_from_checkpoint=named))


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    for name in ("results.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    args = arguments(tmp_path, overwrite_output_dir=True)
    claim_output_dir(args)
    assert len(list(tmp_path.iterdir())) == 3
    clear_output_dir(args)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


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
    monkeypatch.setattr("fmicl_text.run.default_config_file", str(tmp_path / "none.yaml"))
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
        assert launcher_processes([gone, shell, Parent(*command)]) == expected
    assert launcher_processes([]) == 1
    monkeypatch.setattr("fmicl_text.run.default_config_file", str(config))
    for flags, expected in [((), 3), (("--cpu",), 1)]:  # as accelerate reads its default file
        assert launcher_processes([Parent("accelerate", "launch", *flags, *script)]) == expected


def test_a_process_of_several_that_is_alone_is_refused(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    check_processes(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match=r"2 processes were asked for, but this one trains with 1: on CPUs .*--use_cpu True"
    ):
        check_processes(args)
