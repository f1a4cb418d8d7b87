"""Several processes end together: after a signal that one of them got, or a step that is broken in one."""

import math
import os

import pytest
import torch

from fmicl_text import InputError
from fmicl_text.errors import Interrupted
from fmicl_text.training.checkpoint import checkpoints_in, fault
from fmicl_text.training.trainer import NonFiniteError
from tests.distributed.test_trainer import run_trainers
from tests.training.test_callbacks import breaking
from tests.training.test_signals import Signal
from tests.training.test_trainer import make_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:the two views of every text are identical")
SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}


def train(folder, output_dir, signal_at=None, to_all=False, resume=None, **settings):
    """Weights after the last step; what ended training before it."""
    trainer = make_trainer(folder, output_dir, **SAVING | settings)
    if signal_at is not None and (to_all or os.environ["RANK"] == "1"):
        trainer.add_callback(Signal(signal_at))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (Interrupted, InputError) as stop:
        return f"{type(stop).__name__} {stop}"
    return weights(trainer)


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_they_go_on_exactly(bert_folder, tmp_path):
    whole = run_trainers(2, bert_folder, tmp_path / "whole", function=train)
    told = run_trainers(2, bert_folder, tmp_path / "cut", function=train, signal_at=3)
    assert [words.split(";")[0] for words in told] == ["Interrupted stopped by SIGTERM after step 3"] * 2
    assert [path.name for path in checkpoints_in(tmp_path / "cut")] == ["checkpoint-3"]
    assert {path.name for path in (tmp_path / "cut" / "checkpoint-3").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    resumed = run_trainers(2, bert_folder, tmp_path / "cut", function=train, resume="auto")
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    refusal = train(bert_folder, tmp_path / "cut", resume="auto", per_device_train_batch_size=8)
    assert "is of another run: processes 2 -> 1, data" not in refusal and "processes 2 -> 1" in refusal


@pytest.mark.parametrize("to_all", [False, True], ids=["one process", "all"])
def test_a_signal_in_the_last_step_or_to_all_processes(bert_folder, tmp_path, to_all):
    told = run_trainers(2, bert_folder, tmp_path, function=train, signal_at=6, to_all=to_all, save_strategy="no")
    assert [words.split(";")[0] for words in told] == ["Interrupted stopped by SIGTERM after step 6"] * 2


def one_breaks(folder, output_dir):
    trainer = make_trainer(folder, output_dir, global_batch="none", **SAVING)
    if os.environ["RANK"] == "1":
        breaking(trainer, step=2, value=math.nan)
    with pytest.raises(NonFiniteError, match="at step 2"):
        trainer.train()
    return trainer.state.global_step


def test_a_step_that_is_broken_in_one_process_stops_all(bert_folder, tmp_path):
    assert run_trainers(2, bert_folder, tmp_path, function=one_breaks) == [1, 1]


def no_space(path):
    raise OSError(28, "No space left on device")


def cannot_write(folder, output_dir, writer, words):
    trainer = make_trainer(folder, output_dir, **SAVING)
    if os.environ["RANK"] == "1":
        trainer._save_rng_state = writer
    with pytest.raises(InputError, match=f"checkpoint-4 could not be written: {words}; last good checkpoint: none"):
        trainer.train()
    return trainer.state.global_step


@pytest.mark.parametrize(
    "writer, words",
    [
        (no_space, "No space left on device"),
        (print, "process 1 wrote elsewhere: --output_dir must be one folder for all .*"),
    ],
    ids=["full disk", "other machine"],
)
def test_a_checkpoint_that_one_process_cannot_write_is_none(bert_folder, tmp_path, writer, words):
    assert run_trainers(2, bert_folder, tmp_path, writer, words, function=cannot_write) == [4, 4]
    assert not checkpoints_in(tmp_path)


def test_damage_that_only_the_first_process_looks_for_is_told_in_all(bert_folder, tmp_path):
    run_trainers(2, bert_folder, tmp_path, function=train)
    for checkpoint in checkpoints_in(tmp_path):
        (checkpoint / "config.json").write_text("{}")
        assert fault(checkpoint)
    for told in run_trainers(2, bert_folder, tmp_path, function=train, resume="auto"):
        assert told.startswith("InputError --resume_from_checkpoint auto: no whole checkpoint; ")
