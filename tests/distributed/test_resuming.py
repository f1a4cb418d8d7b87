"""Several processes stop together: after a signal to one of them, or an error in one of them."""

import math
import os

import pytest
import torch

from fmicl_text import InputError
from fmicl_text.errors import Interrupted
from fmicl_text.training.checkpoint import checkpoints_in, validate_checkpoint
from fmicl_text.training.trainer import NonFiniteError
from tests.support import Signal, breaking, make_trainer, one_fast, run_trainers, weights, words_missing

pytestmark = pytest.mark.filterwarnings("ignore:.*views of every text are identical")
SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 6}


def train(folder, output_dir, signal_at=None, to_all=False, resume=None, **settings):
    """Weights after the last step, or the error that ended training."""
    trainer = make_trainer(folder, output_dir, **SAVING | settings)
    if signal_at is not None and (to_all or os.environ["RANK"] == "1"):
        trainer.add_callback(Signal(signal_at))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (Interrupted, InputError) as stop:
        return f"{type(stop).__name__} {stop}"
    return weights(trainer)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_they_resume_exactly(bert_folder, tmp_path):
    uninterrupted = run_trainers(2, bert_folder, tmp_path / "uninterrupted", function=train)
    messages = run_trainers(2, bert_folder, tmp_path / "stopped", function=train, signal_at=3)
    for message in messages:
        assert not words_missing(message, ("Interrupted", "SIGTERM", "step 3", "checkpoint-3")), message
    assert [path.name for path in checkpoints_in(tmp_path / "stopped")] == ["checkpoint-3"]
    assert {path.name for path in (tmp_path / "stopped" / "checkpoint-3").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    resumed = run_trainers(2, bert_folder, tmp_path / "stopped", function=train, resume="auto")
    for a, b in zip(uninterrupted, resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    error = train(bert_folder, tmp_path / "stopped", resume="auto", per_device_train_batch_size=8)
    assert not words_missing(error, ("InputError", "checkpoint-6", "processes 2 -> 1")), error
    assert words_missing(error, "data"), error


@pytest.mark.slow
@pytest.mark.parametrize("to_all", one_fast([True, False]), ids=["all", "one process"])
def test_a_signal_in_the_last_step_or_to_all_processes(bert_folder, tmp_path, to_all):
    messages = run_trainers(2, bert_folder, tmp_path, function=train, signal_at=6, to_all=to_all, save_strategy="no")
    for message in messages:
        assert not words_missing(message, ("Interrupted", "SIGTERM", "step 6", "checkpoint-6")), message


def one_breaks(folder, output_dir):
    trainer = make_trainer(folder, output_dir, global_batch="none", **SAVING)
    if os.environ["RANK"] == "1":
        breaking(trainer, step=2, value=math.nan)
    with pytest.raises(NonFiniteError, match="step 2"):
        trainer.train()
    return trainer.state.global_step


@pytest.mark.slow
def test_a_step_that_is_broken_in_one_process_stops_all(bert_folder, tmp_path):
    assert run_trainers(2, bert_folder, tmp_path, function=one_breaks) == [1, 1]


def no_space(path):
    raise OSError(28, "No space left on device")


def cannot_write(folder, output_dir, writer, words):
    trainer = make_trainer(folder, output_dir, **SAVING)
    if os.environ["RANK"] == "1":
        trainer._save_rng_state = writer
    with pytest.raises(InputError) as error:
        trainer.train()
    assert not words_missing(str(error.value), ("checkpoint-4", *words)), error.value
    return trainer.state.global_step


@pytest.mark.slow
@pytest.mark.parametrize(
    "writer, words",
    one_fast(
        [
            (no_space, ["No space left on device"]),
            (print, ["process 1", "output_dir"]),
        ]
    ),
    ids=["full disk", "other machine"],
)
def test_no_checkpoint_is_left_where_one_process_cannot_write(bert_folder, tmp_path, writer, words):
    assert run_trainers(2, bert_folder, tmp_path, writer, words, function=cannot_write) == [4, 4]
    assert not checkpoints_in(tmp_path)


@pytest.mark.slow
def test_damage_that_the_first_process_finds_is_reported_by_all(bert_folder, tmp_path):
    run_trainers(2, bert_folder, tmp_path, function=train)
    for checkpoint in checkpoints_in(tmp_path):
        (checkpoint / "config.json").write_text("{}")
        assert validate_checkpoint(checkpoint)
    for message in run_trainers(2, bert_folder, tmp_path, function=train, resume="auto"):
        assert not words_missing(message, "InputError resume_from_checkpoint=auto checkpoint-4 config.json"), message
