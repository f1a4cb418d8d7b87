"""The recipes, stopped during training and resumed with the command that they print."""

import os
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
from fmicl_text.training.callbacks import ClearCallback
from tests.support import one_fast, peft_or_skip, recipe_flags, words_missing, write_recipe_data

RECIPES = Path(__file__).parent.parent.parent / "recipes"
IMAGES = (
    "--use_cpu True --max_steps 6 --per_device_train_batch_size 32 --max_train_samples 128 --held_out 100 "
    "--probes False --output_dir"
)
TEXT = [
    *("--lora_rank 2", "--head simcse --train_sampling_strategy group_by_length", "--early_stopping_patience 9"),
    "--streaming True",
    '--optim adafactor --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-5}',
]
VISION = [
    *("", "--method moco --objective infonce --queue_size 128", "--method mocov3"),
    "--save_strategy epoch --validation 100 --load_best_model_at_end True",
]


class Stopping(ClearCallback):
    """The trainer's own callback, which also sends SIGTERM before the fourth step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def start(monkeypatch, recipe, flags):
    monkeypatch.setattr(sys, "argv", [str(RECIPES / recipe), *flags])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not exact")
        runpy.run_path(str(RECIPES / recipe), run_name="__main__")


def check_resuming(monkeypatch, capsys, recipe, flags):
    """Train into `uninterrupted`, and into `stopped` in two parts, the second by the printed command; compare."""
    start(monkeypatch, recipe, [*flags, "uninterrupted"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("fmicl_text.training.trainer.ClearCallback", Stopping)
        start(patch, recipe, [*flags, "stopped"])
    printed = capsys.readouterr().err
    assert stop.value.code == 128 + signal.SIGTERM
    assert not words_missing(printed, ("SIGTERM", "step 4", "stopped/checkpoint-4")), printed
    command = printed[printed.index(str(RECIPES / recipe)) :].splitlines()[0]
    resume_flags = shlex.split(command)[1:]
    steps, training_step = [], FMICLTrainer.training_step

    def remember(trainer, *args):
        steps.append(trainer.state.global_step)
        return training_step(trainer, *args)

    monkeypatch.setattr(FMICLTrainer, "training_step", remember)
    start(monkeypatch, recipe, resume_flags)
    assert steps[0] == 4
    expected, resumed = (load_file(Path(folder) / "model.safetensors") for folder in ("uninterrupted", "stopped"))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    taken = len(steps)
    capsys.readouterr()
    start(monkeypatch, recipe, resume_flags)
    assert len(steps) == taken and not words_missing(capsys.readouterr().out, "stopped finished")


@pytest.fixture
def text_flags(bert_folder, tmp_path, monkeypatch):
    """Flags of the text recipe, run in the folder of its data."""
    write_recipe_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return [*recipe_flags(bert_folder), "--use_cpu", "True"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", one_fast(TEXT))
def test_text(text_flags, monkeypatch, capsys, flags):
    if "lora" in flags:
        peft_or_skip()
    check_resuming(
        monkeypatch, capsys, "simcse_fmicl.py", [*text_flags, "--max_steps", "7", *flags.split(), "--output_dir"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("flags", VISION)
def test_images(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    check_resuming(monkeypatch, capsys, "vision_fmicl.py", [*flags.split(), *IMAGES.split()])
