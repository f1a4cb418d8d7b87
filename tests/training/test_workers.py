"""DataLoader workers: the epoch reaches those that live on; how they are started, end, fail and are killed."""

import os
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainerCallback

from fmicl_text.errors import InputError
from fmicl_text.text.tokenization import RepeatedStream
from fmicl_text.training.epochs import EpochRows, EpochStream
from tests.programs import run_program
from tests.support import child_processes, make_trainer, same, sentences, weights

ROOT = Path(__file__).parents[2]
TEXTS = sentences(64)


class RowsOfEpoch(torch.utils.data.Dataset):
    """A user's dataset: which texts it contains depends on the epoch, an ordinary attribute."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return {"text": f"{TEXTS[(i + 7 * self.epoch) % 64]} {self.epoch % 3}"}


class BatchesOfEpoch(RowsOfEpoch):
    """With the method that reads the rows of a batch at once."""

    def __getitems__(self, rows):
        return [self[i] for i in rows]


class StreamOfEpoch(IterableDataset):
    """A user's stream; the workers read alternating rows."""

    def __init__(self):
        self.rows = RowsOfEpoch()

    def set_epoch(self, epoch):
        self.rows.set_epoch(epoch)

    def __iter__(self):
        info = get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (self.rows[i] for i in range(start, 32, step))


def shuffled(shards=1):
    return Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=shards).shuffle(seed=1, buffer_size=16)


DATASETS = {
    "rows": RowsOfEpoch,
    "rows of batches": BatchesOfEpoch,
    "stream": StreamOfEpoch,
    "stream of datasets": shuffled,
    "repeated stream": lambda: RepeatedStream(shuffled()),
}


class Workers(TrainerCallback):
    """Keeps the worker processes of every step."""

    def __init__(self):
        self.processes = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.processes.append(sorted(child.pid for child in child_processes()))


def run(bert_folder, folder, dataset, resume=None, **settings):
    """The weights of a run of 3 epochs or more, and the worker processes at each step."""
    settings = {"max_steps": 14, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9} | settings
    trainer = make_trainer(bert_folder, folder, dataset=dataset, **settings)
    workers = Workers()
    trainer.add_callback(workers)
    trainer.train(resume_from_checkpoint=resume)
    assert not child_processes()
    return weights(trainer), workers.processes


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_the_epoch_reaches_workers_that_live_on(bert_folder, tmp_path, name):
    """Compared with a worker that is started in each epoch; the weights depend on every text."""
    make, settings = DATASETS[name], {"dataloader_num_workers": 1}
    expected, processes = run(bert_folder, tmp_path / "new", make(), **settings)
    assert len({tuple(one) for one in processes if one}) > 1 or name == "repeated stream"
    settings |= {"dataloader_persistent_workers": True}
    found, processes = run(bert_folder, tmp_path / "one", make(), **settings)
    assert same(found, expected)
    assert len({tuple(one) for one in processes if one}) == 1  # one process during all epochs
    step = 6 if name.startswith("rows") else 3  # in the second epoch, or in the first of a stream
    resumed, _ = run(bert_folder, tmp_path / "one", make(), str(tmp_path / "one" / f"checkpoint-{step}"), **settings)
    assert same(resumed, expected)


@pytest.mark.slow
def test_the_epoch_matters_in_these_tests(bert_folder, tmp_path):
    """Otherwise the test above would pass with the first epoch in all."""

    class First(RowsOfEpoch):
        def set_epoch(self, epoch):
            pass

    changing, _ = run(bert_folder, tmp_path / "changing", RowsOfEpoch())
    constant, _ = run(bert_folder, tmp_path / "constant", First())
    assert not same(changing, constant)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "rows of batches"])
def test_two_workers_with_prefetching(bert_folder, tmp_path, name):
    expected, _ = run(bert_folder, tmp_path / "none", DATASETS[name]())
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4}
    found, _ = run(bert_folder, tmp_path / "two", DATASETS[name](), **settings)
    assert same(found, expected)


SCRIPT = """
import os, signal, sys, time
from transformers import TrainerCallback
from fmicl_text.errors import Interrupted
from tests.support import make_trainer
from tests.training.test_workers import RowsOfEpoch

class SignalToAll(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 9:
            os.killpg(0, getattr(signal, sys.argv[4]))
            time.sleep(1)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = make_trainer(
        sys.argv[1], sys.argv[2], dataset=RowsOfEpoch(), max_steps=60, dataloader_num_workers=2,
        dataloader_persistent_workers=True, dataloader_multiprocessing_context=sys.argv[3],
        gradient_accumulation_steps=2, per_device_train_batch_size=4,
    )
    trainer.add_callback(SignalToAll())
    try:
        trainer.train()
    except Interrupted as stop:
        print(stop)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "number"),
    [("fork", "SIGTERM"), ("fork", "SIGINT"), pytest.param("forkserver", "SIGINT", marks=pytest.mark.slow)],
)
def test_a_signal_to_all_processes(bert_folder, tmp_path, method, number):
    """As from a terminal or a cluster, whatever starts the workers: the step ends, a checkpoint is saved."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run_program(tmp_path / "script.py", bert_folder, tmp_path / "out", method, number, env=environment)
    assert "stopped by " + number + " after step 10; saved" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0 and "DataLoader worker" not in done.stderr


class KillWorker(TrainerCallback):
    """Kills a worker, as the kernel does when memory runs out."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            child_processes()[0].kill()


def test_a_worker_that_is_killed_is_one_line(bert_folder, tmp_path):
    """Persistent, since other workers may have read all rows of the epoch before they are killed."""
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "max_steps": 200}
    trainer = make_trainer(bert_folder, tmp_path, dataset=RowsOfEpoch(), **settings)
    trainer.add_callback(KillWorker())
    with pytest.raises(
        InputError, match=r"^DataLoader worker .*(killed|exited).*; if memory ran out, reduce "
    ) as error:
        trainer.train()
    assert "\n" not in str(error.value) and not child_processes()


class Broken(RowsOfEpoch):
    """A dataset that raises an error in the second epoch."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def __getitem__(self, i):
        if self.epoch == 1:
            raise self.error
        return super().__getitem__(i)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_dataset_in_a_worker(bert_folder, tmp_path, workers):
    """An InputError is one line; others keep their type and, from a worker, the traceback there."""
    settings = {"max_steps": 20, "dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    with pytest.raises(InputError, match=r"^row 7 is empty$"):
        make_trainer(bert_folder, tmp_path / "input", dataset=Broken(InputError("row 7 is empty")), **settings).train()
    with pytest.raises(ZeroDivisionError, match="a mistake") as error:
        make_trainer(bert_folder, tmp_path / "bug", dataset=Broken(ZeroDivisionError("a mistake")), **settings).train()
    assert workers == 0 or ("Original Traceback" in str(error.value) and "in __getitem__" in str(error.value))
    assert not child_processes()


def test_datasets_are_sent_to_spawned_workers():
    epoch = torch.zeros((), dtype=torch.long).share_memory_()
    for dataset, kind in ((RowsOfEpoch(), EpochRows), (StreamOfEpoch(), EpochStream)):
        copy = pickle.loads(ForkingPickler.dumps(kind(dataset, epoch)))
        assert type(copy) is kind and type(copy.dataset) is type(dataset)
