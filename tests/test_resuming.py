"""Runs that are cut short go on as if nothing had happened; what would not be exact is refused, or said."""

import os
import shutil
import signal
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback

from fmicl_text import ContrastiveModel, FMICLTrainer, InputError, checkpoints
from fmicl_text.errors import Interrupted
from fmicl_text.text.data import load_training_text
from fmicl_text.text.tokens import Passes, training_rows
from tests.conftest import sentences
from tests.test_trainer import make_trainer, same, weights

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "save_total_limit": 2}


class Killed(BaseException):
    """What no handler of errors catches."""


@pytest.fixture(scope="module")
def whole(bert_folder, tmp_path_factory):
    """A run of 8 steps that nothing disturbed: its trainer."""
    trainer = make_trainer(bert_folder, tmp_path_factory.mktemp("whole"), **SAVING)
    trainer.train()
    return trainer


def files(folder):
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_checkpoints_are_whole_and_bounded(whole):
    folder = Path(whole.args.output_dir)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert [checkpoints.fault(path) for path in checkpoints.checkpoints_in(folder)] == [None, None]
    run = checkpoints.run_of(folder / "checkpoint-8")
    assert (run["processes"], run["per_device_train_batch_size"], run["divergence"]) == (1, 8, "kl")
    assert {path.suffix for path in (folder / "checkpoint-8").rglob("*") if path.is_file()} == {
        *(".json", ".safetensors", ".pt", ".pth")
    }


@pytest.mark.parametrize(
    "owner, name",
    [
        (checkpoints, "seal"),
        (checkpoints, "move_into_place"),
        (checkpoints, "remove"),
        (FMICLTrainer, "_save_optimizer_and_scheduler"),
        (FMICLTrainer, "_save_rng_state"),
        (ContrastiveModel, "save_training_only"),
    ],
)
def test_a_kill_in_mid_save_leaves_the_previous_one_whole(whole, bert_folder, tmp_path, monkeypatch, owner, name):
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    original = getattr(owner, name)

    def dies_at_step_6(*args, **kwargs):
        if trainer.state.global_step == 6:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies_at_step_6)
        with pytest.raises(Killed):
            trainer.train()
    resumed = make_trainer(bert_folder, tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint="auto")
    assert same(weights(whole), weights(resumed))
    whole_state, resumed_state = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert all(torch.equal(whole_state[i]["exp_avg_sq"], resumed_state[i]["exp_avg_sq"]) for i in whole_state)
    assert [checkpoints.fault(path) for path in checkpoints.checkpoints_in(tmp_path)] == [None, None]


def test_a_damaged_checkpoint_is_told_of_and_passed_over(whole, bert_folder, tmp_path):
    shutil.copytree(whole.args.output_dir, tmp_path / "run")
    weights_file = tmp_path / "run" / "checkpoint-8" / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-5] ^= 1
    weights_file.write_bytes(content)
    resumed = make_trainer(bert_folder, tmp_path / "run", **SAVING)
    with pytest.warns(UserWarning, match=r"checkpoint-8 is damaged and was passed over: model.safetensors has changed"):
        resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))
    assert checkpoints.fault(tmp_path / "run" / "checkpoint-8") is None  # written anew


def test_a_finished_run_started_again_does_nothing(whole, bert_folder, tmp_path):
    shutil.copytree(whole.args.output_dir, tmp_path / "run")
    before = files(tmp_path / "run")
    for constant in (False, True):
        schedule = {"lr_scheduler_type": "constant"} if constant else {}
        again = make_trainer(bert_folder, tmp_path / "run", **SAVING | schedule)
        with warnings.catch_warnings(action="ignore"):
            result = again.train(resume_from_checkpoint="auto")
        assert result.global_step == 8 and same(weights(whole), weights(again))
        assert files(tmp_path / "run") == before


def falling(encoder):
    """Scores that fall: the first is the best."""
    falling.calls += 1
    return {"sts_spearman": 1.0 / falling.calls}


def early(folder, output_dir, patience=3, **settings):
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True} | settings
    trainer = make_trainer(folder, output_dir, evaluate=True, **settings)
    trainer.evaluator = falling
    trainer.add_callback(EarlyStoppingCallback(patience))
    return trainer


def test_early_stopping_remembers_its_patience(bert_folder, tmp_path):
    """Evaluations at 2, 4, 6, 8; the third that is not better, at 8, ends it. Cut short at 4, and gone on with."""
    falling.calls = 0
    whole = early(bert_folder, tmp_path / "whole", save_total_limit=9)
    whole.train()
    assert whole.state.global_step == 8 and whole.state.best_global_step == 2
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    falling.calls = 2
    resumed = early(bert_folder, tmp_path / "run", save_total_limit=9)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 8 and same(weights(whole), weights(resumed))
    assert resumed.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")  # the folder has moved
    again = early(bert_folder, tmp_path / "run", save_total_limit=9)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 8 and same(weights(whole), weights(again))


def test_the_best_and_the_newest_are_kept(bert_folder, tmp_path):
    falling.calls = 0
    trainer = early(bert_folder, tmp_path, patience=9, max_steps=10, save_total_limit=1)
    trainer.train()
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_a_damaged_best_checkpoint_is_told_of(bert_folder, tmp_path):
    class Harm(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                (tmp_path / "checkpoint-2" / "config.json").write_text("{}")

    falling.calls = 0
    trainer = early(bert_folder, tmp_path, patience=9, max_steps=8)
    trainer.add_callback(Harm())
    with pytest.warns(UserWarning, match=r"checkpoint-2 is damaged \(config.json has 2 bytes.*its last weights"):
        trainer.train()
    assert trainer.state.best_global_step == 8


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size 8 -> 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 -> 2"),
        ({"dataset": Dataset.from_dict({"text": sentences(64, seed=3)})}, "data [0-9a-f]* -> [0-9a-f]*"),
    ],
    ids=["batch", "accumulation", "data"],
)
def test_another_run_is_not_gone_on_with_unless_asked_for(whole, bert_folder, tmp_path, changed, words):
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.raises(InputError, match=rf"checkpoint-6 is of another run: {words}; .*--resume_changed True"):
        make_trainer(bert_folder, tmp_path, **SAVING | changed).train(resume_from_checkpoint="auto")
    asked = make_trainer(bert_folder, tmp_path, **SAVING | changed, resume_changed=True)
    with pytest.warns(UserWarning, match=rf"not exact: .*checkpoint-6 was written with .*{words}"):
        asked.train(resume_from_checkpoint="auto")
    assert asked.state.global_step == 8


def test_other_differences_are_told_of(whole, bert_folder, tmp_path):
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-6", tmp_path / "checkpoint-6")
    with pytest.warns(
        UserWarning, match=r"not exact: .* with max_steps 8 -> 9, learning_rate 0.001 -> 0.01, alpha 4.0"
    ):
        make_trainer(bert_folder, tmp_path, **SAVING | {"max_steps": 9, "learning_rate": 0.01, "alpha": 5.0}).train(
            resume_from_checkpoint="auto"
        )


def test_a_checkpoint_of_a_model_only_is_no_run(bert_folder, tmp_path):
    make_trainer(bert_folder, tmp_path, **SAVING, save_only_model=True).train()
    with pytest.raises(InputError, match=r"checkpoint-8 holds a model only \(--save_only_model\)"):
        make_trainer(bert_folder, tmp_path, **SAVING).train(resume_from_checkpoint="auto")


class Signal(TrainerCallback):
    """Sends this process a signal before a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_signal_saves_and_the_run_goes_on_exactly(whole, bert_folder, tmp_path, step, number):
    before = signal.getsignal(number)
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.add_callback(Signal(step, number))
    words = f"stopped by {number.name} after step {step}; saved .*checkpoint-{step}$"
    with pytest.raises(Interrupted, match=words) as stop:
        trainer.train()
    assert stop.value.signal_number == number and signal.getsignal(number) is before
    assert checkpoints.fault(tmp_path / f"checkpoint-{step}") is None
    resumed = make_trainer(bert_folder, tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 8 and same(weights(whole), weights(resumed))


def test_a_signal_at_the_end_of_an_epoch_comes_after_its_evaluation(bert_folder, tmp_path):
    """8 steps an epoch. Interrupted at 8, the evaluation of the epoch is done and the run ends as the whole one."""
    settings = {"num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch", "save_strategy": "no"}
    whole, cut = (make_trainer(bert_folder, tmp_path / name, evaluate=True, **settings) for name in ("whole", "cut"))
    whole.train()
    cut.add_callback(Signal(8))
    with pytest.raises(Interrupted, match="after step 8"):
        cut.train()
    resumed = make_trainer(bert_folder, tmp_path / "cut", evaluate=True, **settings)
    resumed.train(resume_from_checkpoint="auto")
    scores = [
        {entry["step"]: entry["eval_sts_spearman"] for entry in run.state.log_history if "eval_sts_spearman" in entry}
        for run in (whole, resumed)
    ]
    assert scores[0] == scores[1] and list(scores[0]) == [8, 16]
    assert same(weights(whole), weights(resumed))


def test_a_full_disk_keeps_the_last_good_checkpoint(bert_folder, tmp_path, monkeypatch):
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    original = torch.save

    def full(content, path, *args, **kwargs):
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")
        return original(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    words = r"checkpoint-4 could not be written: No space left on device; last good checkpoint: .*checkpoint-2$"
    with pytest.raises(InputError, match=words):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert checkpoints.fault(tmp_path / "checkpoint-2") is None


def test_a_disk_without_room_is_told_of_before_training(bert_folder, tmp_path, monkeypatch):
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    with pytest.raises(
        InputError,
        match=r"--output_dir .*: 3 checkpoints take about 1 MiB, the disk has 0; a smaller --save_total_limit",
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_saving_keeps_what_is_there_until_all_is_written(bert_folder, tmp_path, monkeypatch):
    trainer = make_trainer(bert_folder, tmp_path)
    trainer.save_model()
    before = files(tmp_path)
    monkeypatch.setattr("fmicl_text.checkpoints.move_files", lambda *args: (_ for _ in ()).throw(Killed))
    torch.nn.init.zeros_(next(trainer.model.parameters()))
    with pytest.raises(Killed):
        trainer.save_model()
    assert {name: content for name, content in files(tmp_path).items() if "unfinished" not in name} == before


@pytest.mark.parametrize("step", [3, 6, 9], ids=["first pass", "end of it", "second pass"])
def test_a_stream_is_gone_on_with_exactly(bert_folder, tmp_path, step):
    """5 batches of 8 and a rest of 3 a pass."""
    (tmp_path / "text.txt").write_text("\n".join(sentences(43)))
    data = load_training_text(str(tmp_path / "text.txt"), streaming=True, shuffle_seed=1)

    def run(folder):
        trainer = make_trainer(bert_folder, tmp_path / folder, save_strategy="no", max_steps=12)
        tokenizer = trainer.model.encoder.tokenizer
        trainer.train_dataset, trainer.data_collator = training_rows(data, tokenizer, 32, False)
        return trainer

    whole, cut, resumed = run("whole"), run("cut"), run("cut")
    whole.train()
    cut.add_callback(Signal(step))
    with pytest.raises(Interrupted):
        cut.train()
    resumed.train(resume_from_checkpoint="auto")
    assert whole.state.global_step == resumed.state.global_step == 12
    assert same(weights(whole), weights(resumed))


def test_a_stream_begins_anew_in_another_order(tmp_path):
    texts = sentences(20)
    (tmp_path / "text.txt").write_text("\n".join(texts))
    data = load_training_text(str(tmp_path / "text.txt"), streaming=True, shuffle_seed=1)
    rows = [row["text"] for row in islice(Passes(data.dataset), 60)]
    passes = [rows[:20], rows[20:40], rows[40:]]
    assert all(sorted(one) == sorted(texts) for one in passes) and len({tuple(one) for one in passes}) == 3
    assert [row["text"] for row in islice(Passes(data.dataset), 60)] == rows


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"mini_batch_size": 3},
        {"mini_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 6},
        {"bf16": True},
        {"dataloader_num_workers": 1},
        {"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"objective": "infonce", "gamma": None, "alpha": None},
        {"head": "simcse", "max_steps": 20},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_every_way_of_training_goes_on_exactly(bert_folder, tmp_path, settings):
    """8 batches of 8 an epoch; cut short in the middle of an epoch, the second where there is one."""
    whole, cut, resumed = (
        make_trainer(bert_folder, tmp_path / name, **{"max_steps": 12, "save_strategy": "no"} | settings)
        for name in ("whole", "cut", "cut")
    )
    whole.train()
    cut.add_callback(Signal(whole.state.global_step * 3 // 4))
    with pytest.raises(Interrupted):
        cut.train()
    resumed.train(resume_from_checkpoint="auto")
    assert whole.state.global_step == resumed.state.global_step
    assert same(weights(whole), weights(resumed))
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_a_run_that_finished_in_mid_epoch_takes_no_step_more(bert_folder, tmp_path):
    settings = SAVING | {"max_steps": 5}
    whole, again = (make_trainer(bert_folder, tmp_path, **settings) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 5 and same(weights(whole), weights(again))


def test_a_second_signal_does_what_it_always_did(bert_folder, tmp_path):
    class Twice(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.add_callback(Twice())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.stopped_by == trainer.signalled == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_one_trainer_trains_again_after_a_signal(bert_folder, tmp_path):
    trainer, stop = make_trainer(bert_folder, tmp_path, **SAVING), Signal(3)
    trainer.add_callback(stop)
    with pytest.raises(Interrupted):
        trainer.train()
    trainer.remove_callback(stop)
    assert trainer.train(resume_from_checkpoint="auto").global_step == 8


def test_checkpoints_ahead_of_the_run_are_left_alone(bert_folder, tmp_path):
    make_trainer(bert_folder, tmp_path, **SAVING | {"save_total_limit": 9}).train()
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.add_callback(Signal(5))
    with pytest.raises(Interrupted):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    steps = [checkpoints.step_of(path) for path in checkpoints.checkpoints_in(tmp_path)]
    assert steps == [4, 5, 6, 8]
