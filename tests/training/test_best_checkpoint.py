"""The best checkpoint and early stopping, in runs that are interrupted and resumed."""

import shutil

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from fmicl_text.errors import Interrupted
from fmicl_text.training import checkpoint as checkpoints
from tests.support import SAVING, Signal, make_trainer, same, weights


def falling(encoder):
    """Scores that fall in training: the first is the best. That of call 0, before training, is lower."""
    falling.calls += 1
    return {"sts_spearman": 1.0 / falling.calls if falling.calls else 0.0}


def early(folder, output_dir, patience=3, **settings):
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True} | settings
    trainer = make_trainer(folder, output_dir, evaluate=True, **settings)
    trainer.evaluator = falling
    trainer.add_callback(EarlyStoppingCallback(patience))
    return trainer


@pytest.mark.slow
def test_early_stopping_remembers_its_patience(bert_folder, tmp_path):
    """Evaluations at 2, 4, 6, 8; the third without improvement, at 8, ends it. Interrupted at 4 and resumed."""
    falling.calls = -1
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
    falling.calls = -1
    trainer = early(bert_folder, tmp_path, patience=9, max_steps=10, save_total_limit=1)
    trainer.train()
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_a_damaged_best_checkpoint_is_told_of(bert_folder, tmp_path):
    class Harm(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                (tmp_path / "checkpoint-2" / "config.json").write_text("{}")

    falling.calls = -1
    trainer = early(bert_folder, tmp_path, patience=9, max_steps=8)
    trainer.add_callback(Harm())
    with pytest.warns(UserWarning, match=r"checkpoint-2 .*config.json has 2 bytes"):
        trainer.train()
    assert trainer.state.best_global_step == 8


def cut_short(trainer, step):
    trainer.add_callback(Signal(step))
    return trainer


def test_the_newest_is_kept_where_one_is_asked_for_and_the_best_not_loaded(bert_folder, tmp_path):
    falling.calls = 0
    trainer = make_trainer(bert_folder, tmp_path, evaluate=True, **SAVING | {"save_total_limit": 1})
    trainer.evaluator = falling
    trainer.train()
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path)] == ["checkpoint-2", "checkpoint-8"]


@pytest.mark.slow
def test_the_best_one_may_be_in_the_folder_that_a_run_was_begun_in(bert_folder, tmp_path):
    falling.calls = -1
    whole = early(bert_folder, tmp_path / "a", patience=99, max_steps=8, save_total_limit=9)
    whole.train()
    falling.calls = 2
    cut = cut_short(early(bert_folder, tmp_path / "b", patience=99, max_steps=8, save_total_limit=9), 5)
    with pytest.raises(Interrupted):
        cut.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    resumed = early(bert_folder, tmp_path / "b", patience=99, max_steps=8, save_total_limit=9)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.best_model_checkpoint == str(tmp_path / "a" / "checkpoint-2")
    assert same(weights(whole), weights(resumed))


def test_a_best_one_that_is_gone_is_told_of(bert_folder, tmp_path):
    falling.calls = -1
    cut = cut_short(early(bert_folder, tmp_path, patience=99, max_steps=8, save_total_limit=9), 5)
    with pytest.raises(Interrupted):
        cut.train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    trainer = early(bert_folder, tmp_path, patience=99, max_steps=8)
    with pytest.warns(UserWarning, match="checkpoint-2, the best checkpoint so far, is missing"):
        trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.best_global_step == 8  # whose weights the run ends with


def test_a_finished_run_whose_folder_has_moved_ends_with_its_best(bert_folder, tmp_path):
    falling.calls = -1
    whole = early(bert_folder, tmp_path / "a")
    whole.train()
    shutil.move(tmp_path / "a", tmp_path / "b")
    again = early(bert_folder, tmp_path / "b")
    again.train(resume_from_checkpoint="auto")
    assert same(weights(whole), weights(again))


@pytest.mark.slow
def test_an_evaluation_before_training_is_not_made_again(bert_folder, tmp_path):
    """It would count as an evaluation without improvement."""
    settings = {"save_total_limit": 9, "eval_on_start": True}
    falling.calls = -1
    whole = early(bert_folder, tmp_path / "whole", **settings)
    whole.train()
    falling.calls = -1
    with pytest.raises(Interrupted):
        cut_short(early(bert_folder, tmp_path / "cut", **settings), 5).train()
    resumed = early(bert_folder, tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint="auto")
    assert whole.state.global_step == resumed.state.global_step == 8


@pytest.mark.slow
def test_a_run_that_stopped_early_trains_anew_when_asked_to(bert_folder, tmp_path):
    falling.calls = -1
    early(bert_folder, tmp_path, save_total_limit=9).train()
    again = early(bert_folder, tmp_path, save_total_limit=9)
    again.train(resume_from_checkpoint="auto")
    falling.calls = -1
    assert again.train().global_step == 8


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, None], ids=["cut short", "stopped early"])
def test_a_patience_given_now_counts_and_is_told_of(bert_folder, tmp_path, step):
    falling.calls = -1
    first = early(bert_folder, tmp_path, patience=3, save_total_limit=9)
    if step is None:
        first.train()
    else:
        with pytest.raises(Interrupted):
            cut_short(first, step).train()
    longer = early(bert_folder, tmp_path, patience=6, save_total_limit=9)
    with pytest.warns(
        UserWarning, match=r"not exact: .*'early_stopping_patience': 3.* -> .*'early_stopping_patience': 6"
    ):
        longer.train(resume_from_checkpoint="auto")
    assert longer.state.global_step == 14


class Remember(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}


BETWEEN = {"eval_steps": 1, "save_steps": 4, "max_steps": 8, "patience": 99}


def peak(encoder):
    """Scores that are highest at the third evaluation in training."""
    peak.calls += 1
    return {"sts_spearman": -abs(peak.calls - 3.0)}


def test_a_best_step_between_two_saves_is_the_result(bert_folder, tmp_path):
    peak.calls, remember = -1, Remember()
    trainer = early(bert_folder, tmp_path, **BETWEEN)
    trainer.evaluator = peak
    trainer.add_callback(remember)
    trainer.train()
    assert trainer.state.best_global_step == 3 and same(weights(trainer), remember.weights[3])
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-8"]


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [2, 3, 5])
def test_a_stop_does_not_change_the_result(bert_folder, tmp_path, stopped_at):
    results = []
    for stops in ([], [stopped_at]):
        peak.calls = -1
        for step in [*stops, None]:
            trainer = early(bert_folder, tmp_path / str(len(stops)), **BETWEEN)
            trainer.evaluator = peak
            if step is None:
                trainer.train(resume_from_checkpoint="auto")
            else:
                with pytest.raises(Interrupted):
                    cut_short(trainer, step).train()
        results.append((trainer.state.best_global_step, weights(trainer)))
    assert results[0][0] == results[1][0] == 3 and same(results[0][1], results[1][1])


def test_a_best_checkpoint_that_is_gone_at_the_end_is_not_the_result(bert_folder, tmp_path):
    class Remove(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                shutil.rmtree(tmp_path / "checkpoint-2")

    falling.calls = -1
    trainer = early(bert_folder, tmp_path, patience=9, max_steps=8)
    trainer.add_callback(Remove())
    with pytest.warns(UserWarning, match=r"checkpoint-2 .*last weights"):
        trainer.train()
    assert trainer.state.best_global_step == 8


@pytest.mark.slow
def test_steps_given_at_a_resume_count(bert_folder, tmp_path):
    with pytest.raises(Interrupted):
        cut_short(make_trainer(bert_folder, tmp_path, evaluate=True, **SAVING), 4).train()
    changed = SAVING | {"save_steps": 5, "eval_steps": 1, "logging_steps": 2, "save_total_limit": 9}
    trainer = make_trainer(bert_folder, tmp_path, evaluate=True, **changed)
    with pytest.warns(UserWarning, match="eval_steps .* -> 1"):
        trainer.train(resume_from_checkpoint="auto")
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints_in(tmp_path)] == [2, 4, 5, 8]
    later = [entry for entry in trainer.state.log_history if entry["step"] > 4]
    assert [entry["step"] for entry in later if "eval_sts_spearman" in entry] == [5, 6, 7, 8]
    assert [entry["step"] for entry in later if "loss" in entry] == [6, 8]
