"""The recipes, told to stop in mid-training and started again with the command that they print."""

import os
import re
import runpy
import shlex
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmicl_text import FMICLTrainer
from fmicl_text.cli import output_dir as run
from tests.scripts.test_simcse_fmicl import material  # noqa: F401

RECIPES = Path(__file__).parent.parent.parent / "recipes"
IMAGES = "--use_cpu True --max_steps 6 --per_device_train_batch_size 32 --max_train_samples 128 --output_dir"
TEXT = [
    *("--lora_rank 2", "--head simcse --train_sampling_strategy group_by_length", "--early_stopping_patience 9"),
    "--streaming True",
    '--optim adafactor --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-5}',
]
VISION = [
    *("", "--method moco --objective infonce --queue_size 128", "--method mocov3"),
    "--save_strategy epoch --validation 100 --load_best_model_at_end True",
]


class Stopped(run.ClearOutputDir):
    """The recipe's own callback, which also sends SIGTERM before the fourth step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def start(monkeypatch, recipe, flags):
    monkeypatch.setattr(sys, "argv", [str(RECIPES / recipe), *flags])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="not exact")
        runpy.run_path(str(RECIPES / recipe), run_name="__main__")


def goes_on(monkeypatch, capsys, recipe, flags):
    """Trains into `whole`; into `cut`, stopped and gone on with; and compares."""
    start(monkeypatch, recipe, [*flags, "whole"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(run, "ClearOutputDir", Stopped)
        start(patch, recipe, [*flags, "cut"])
    said = capsys.readouterr().err
    assert stop.value.code == 128 + signal.SIGTERM and "stopped by SIGTERM after step 4; saved cut/checkpoint-4" in said
    words = shlex.split(re.search("To go on: (.*)", said)[1])
    again = words[words.index(str(RECIPES / recipe)) + 1 :]
    begun_at, step = [], FMICLTrainer.training_step

    def remember(trainer, *args):
        begun_at.append(trainer.state.global_step)
        return step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FMICLTrainer, "training_step", remember)
        start(patch, recipe, again)
    assert begun_at[0] == 4
    whole, cut = (load_file(Path(folder) / "model.safetensors") for folder in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    capsys.readouterr()
    start(monkeypatch, recipe, again)
    assert "cut holds this run, finished: nothing to do" in capsys.readouterr().out


@pytest.fixture
def at_hand(material, tmp_path, monkeypatch):  # noqa: F811
    """The text recipe's flags; the folder of their files is where it is run."""
    folder, flags = material
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    return flags


@pytest.mark.parametrize("flags", TEXT)
def test_text(at_hand, monkeypatch, capsys, flags):
    if "lora" in flags:
        pytest.importorskip("peft")
    goes_on(monkeypatch, capsys, "simcse_fmicl.py", [*at_hand, "--max_steps", "7", *flags.split(), "--output_dir"])


@pytest.mark.parametrize("flags", VISION)
def test_images(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    goes_on(monkeypatch, capsys, "vision_fmicl.py", [*flags.split(), *IMAGES.split()])
