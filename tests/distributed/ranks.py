"""Several processes for a test: forked after the imports, so that they cost a fifth of a second."""

import multiprocessing
import pickle
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 15


def run_ranks(world_size, function, *args):
    """function(rank, *args) in every one of world_size gloo processes; the results in rank order."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=one_rank, args=(results, f"{folder}/meeting", rank, world_size, function, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            answers = dict(pickle.loads(results.get(timeout=TIMEOUT)) for _ in ranks)
        finally:
            for process in ranks:
                process.join(5)
                process.kill()
    failures = [answer for answer in answers.values() if isinstance(answer, str) and answer.startswith("Traceback")]
    assert not failures, failures[0]
    return [answers[rank] for rank in range(world_size)]


def one_rank(results, meeting, rank, world_size, function, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT),
        )
        results.put(pickle.dumps((rank, function(rank, *args))))  # by value: torch would share memory
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put(pickle.dumps((rank, traceback.format_exc())))
