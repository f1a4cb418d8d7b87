"""SIGTERM and SIGINT: a checkpoint at the end of the step, from which the run resumes exactly."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from datasets import Dataset
from transformers import TrainerCallback

from fmicl_text.errors import Interrupted
from fmicl_text.training import checkpoint as checkpoints
from fmicl_text.training import checkpointer
from tests.programs import start_program
from tests.support import (
    SAVING,
    Signal,
    child_processes,
    make_trainer,
    one_fast,
    same,
    sentences,
    weights,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def ctrl_c():
    """SIGINT as in a terminal; for background jobs, a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def logged(trainer, name):
    """The logged values of a metric, by step."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", one_fast([5, 1, 8]))
def test_a_signal_saves_and_the_run_goes_on_exactly(finished_run, bert_folder, tmp_path, step, number):
    before = signal.getsignal(number)
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.add_callback(Signal(step, number))
    words = f"stopped by {number.name} after step {step}; saved .*checkpoint-{step}$"
    with pytest.raises(Interrupted, match=words) as stop:
        trainer.train()
    assert stop.value.signal_number == number and signal.getsignal(number) is before
    assert checkpoints.validate_checkpoint(tmp_path / f"checkpoint-{step}") is None
    resumed = make_trainer(bert_folder, tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 8 and same(weights(finished_run), weights(resumed))


@pytest.mark.slow
def test_a_signal_at_the_end_of_an_epoch_comes_after_its_evaluation(bert_folder, tmp_path):
    """8 steps per epoch. Interrupted at 8, the epoch is evaluated, and the run ends like an uninterrupted one."""
    settings = {"num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch", "save_strategy": "no"}
    whole, cut = (make_trainer(bert_folder, tmp_path / name, evaluate=True, **settings) for name in ("whole", "cut"))
    whole.train()
    cut.add_callback(Signal(8))
    with pytest.raises(Interrupted, match="after step 8"):
        cut.train()
    resumed = make_trainer(bert_folder, tmp_path / "cut", evaluate=True, **settings)
    resumed.train(resume_from_checkpoint="auto")
    assert logged(whole, "eval_sts_spearman") == logged(resumed, "eval_sts_spearman")
    assert list(logged(whole, "eval_sts_spearman")) == [8, 16]
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_what_it_always_did(bert_folder, tmp_path, first):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.add_callback(Signal(3, first, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.graceful_stop.stopped_by == trainer.graceful_stop.received == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_that_is_ignored_stays_ignored(bert_folder, tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    trainer.add_callback(Signal(3, signal.SIGINT))
    assert trainer.train().global_step == 8 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_one_trainer_trains_again_after_a_signal(bert_folder, tmp_path):
    trainer, stop = make_trainer(bert_folder, tmp_path, **SAVING), Signal(3)
    trainer.add_callback(stop)
    with pytest.raises(Interrupted):
        trainer.train()
    trainer.remove_callback(stop)
    assert trainer.train(resume_from_checkpoint="auto").global_step == 8


class SignalInEvaluation(TrainerCallback):
    """Sends this process a signal in the evaluation after a step."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("save_strategy", one_fast(["steps", "no"]))
@pytest.mark.parametrize("during, after", [(4, 5), (8, 8)], ids=["in the middle", "the last"])
def test_a_signal_in_an_evaluation_is_heeded(bert_folder, tmp_path, save_strategy, during, after):
    settings = SAVING | {"save_strategy": save_strategy}
    whole, cut, resumed = (
        make_trainer(bert_folder, tmp_path / folder, evaluate=True, **settings) for folder in ("whole", "cut", "cut")
    )
    whole.train()
    cut.add_callback(SignalInEvaluation(during))
    with pytest.raises(Interrupted, match=f"after step {after}; saved .*checkpoint-{after}$") as stop:
        cut.train()
    assert checkpoints.validate_checkpoint(stop.value.checkpoint) is None
    resumed.train(resume_from_checkpoint="auto")
    assert same(weights(whole), weights(resumed))
    assert logged(whole, "eval_sts_spearman") == logged(resumed, "eval_sts_spearman")
    assert list(logged(whole, "eval_sts_spearman")) == [2, 4, 6, 8]


def test_a_signal_in_a_save_is_heeded_after_the_next_step(finished_run, bert_folder, tmp_path, monkeypatch):
    trainer, write_manifest = make_trainer(bert_folder, tmp_path, **SAVING), checkpoints.write_manifest

    def told_to_stop(*args):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        write_manifest(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer, "write_manifest", told_to_stop)
        with pytest.raises(Interrupted, match="after step 5"):
            trainer.train()
    resumed = make_trainer(bert_folder, tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint="auto")
    assert same(weights(finished_run), weights(resumed))


def test_a_signal_that_comes_after_all_is_done_is_not_swallowed(bert_folder, tmp_path):
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(bert_folder, tmp_path, max_steps=2)
    trainer.add_callback(AtTheEnd())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.graceful_stop.received == 0


@pytest.mark.parametrize("step", [3, 4], ids=["between evaluations", "at one"])
def test_a_signal_is_not_put_off_until_a_better_score(bert_folder, tmp_path, step):
    trainer = make_trainer(bert_folder, tmp_path, evaluate=True, max_steps=8, save_strategy="best")
    trainer.evaluator = lambda encoder: {"sts_spearman": 1.0 / (1 + trainer.state.global_step)}
    trainer.add_callback(Signal(step))
    with pytest.raises(Interrupted, match=f"after step {step}"):
        trainer.train()


@pytest.mark.slow
def test_a_log_line_of_each_epoch_is_not_lost(bert_folder, tmp_path):
    settings = {"num_train_epochs": 2, "max_steps": -1, "logging_strategy": "epoch"}
    whole, cut, resumed = (
        make_trainer(bert_folder, tmp_path / folder, **settings) for folder in ("whole", "cut", "cut")
    )
    whole.train()
    cut.add_callback(Signal(8))
    with pytest.raises(Interrupted):
        cut.train()
    resumed.train(resume_from_checkpoint="auto")
    assert logged(whole, "loss") == logged(resumed, "loss") and list(logged(whole, "loss")) == [8, 16]


def test_loggers_are_told_of_the_end(bert_folder, tmp_path):
    ended = []

    class End(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            ended.append(state.global_step)

    trainer = make_trainer(bert_folder, tmp_path, **SAVING)
    for callback in (Signal(3), End()):
        trainer.add_callback(callback)
    with pytest.raises(Interrupted):
        trainer.train()
    assert ended == [3]


class SignalToWorkers(TrainerCallback):
    """Sends a signal to the processes that load data and to this one, as `timeout`, a terminal or a cluster does."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            workers = [str(worker.pid) for worker in child_processes()]
            subprocess.run(["kill", "-TERM", *workers], check=True)  # from their parent it would be the end of work
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_workers_outlive_a_signal_to_all_processes(bert_folder, tmp_path):
    """Enough steps that the workers have not yet read all rows."""
    trainer = make_trainer(
        bert_folder,
        tmp_path,
        dataset=Dataset.from_dict({"text": sentences(512)}),
        max_steps=60,
        dataloader_num_workers=2,
    )
    trainer.add_callback(SignalToWorkers())
    with pytest.raises(Interrupted, match="after step 2"):
        trainer.train()
    assert not child_processes()


STUCK = """
import os, signal, sys, time
from tests.support import make_trainer, sentences
from datasets import Dataset

class Stuck(list):
    def __getitem__(self, i):
        if i == 40:
            open(sys.argv[2] + "/stuck", "w").close()
            while True:
                time.sleep(1000)
        return {"text": f"a {i}"}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from fmicl_text.text.collator import TextViewCollator
    trainer = make_trainer(sys.argv[1], sys.argv[2], max_steps=60, dataloader_num_workers=2)
    trainer.data_collator = TextViewCollator(trainer.model.encoder.tokenizer, ["text"], 16)
    trainer.train_dataset = Stuck([0] * 64)
    trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [["INT", "INT"], ["TERM", "TERM"], ["HUP", "TERM"], ["KILL"]])
def test_a_worker_that_is_stuck_does_not_keep_a_run_alive(bert_folder, tmp_path, numbers):
    (tmp_path / "stuck.py").write_text(STUCK)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"start_new_session": True, "stderr": subprocess.DEVNULL}
    run = start_program(tmp_path / "stuck.py", bert_folder, tmp_path, env=environment, **streams)
    wait_for(lambda: (tmp_path / "stuck").exists())
    workers = psutil.Process(run.pid).children()
    assert len(workers) == 2
    for number in numbers:  # to the group, as a terminal sends it
        os.kill(run.pid, signal.SIGKILL) if number == "KILL" else os.killpg(run.pid, getattr(signal, f"SIG{number}"))
        time.sleep(0.5)
    run.wait(timeout=30)
    if numbers == ["KILL"]:  # no parent could end the workers: any signal does
        for worker in workers:
            worker.terminate()
    psutil.wait_procs(workers, timeout=20)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition, seconds=60):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until
        time.sleep(0.05)
