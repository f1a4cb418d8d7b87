"""Rows and jobs that are shared over processes."""

import time

import pytest
import torch

from fmicl_text.evaluation import sharing
from fmicl_text.evaluation.sharing import assign_rows, gather_shared, own_rows, run_jobs
from tests.support import run_ranks


def shared_rows(rank, count, block):
    processes = assign_rows(count, block)
    own = own_rows(processes)
    part = torch.stack([own.float(), 10 * own.float()], 1) if len(own) else torch.empty(0, 0)
    return own.tolist(), gather_shared(part, processes, torch.device("cpu")).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_process_receives_all_rows(world_size):
    """Of numbers that are no multiple of the processes, too, and of fewer rows than processes."""
    for count, block in [(7, 1), (10, 4), (1, 1), (0, 1)]:
        results = run_ranks(world_size, shared_rows, count, block)
        assert sorted(row for own, _ in results for row in own) == list(range(count))
        expected = [[float(i), 10.0 * i] for i in range(count)]
        assert [rows for _, rows in results] == [expected] * world_size
    if world_size == 2:
        assert run_ranks(2, shared_rows, 10, 4)[1][0] == [4, 5, 6, 7]


def slow_jobs(rank, done):
    sharing.POLL = 0.05
    started = time.monotonic()

    def job(i):
        time.sleep(0.3 * (i == 0))
        return rank, i

    results = run_jobs([lambda i=i: job(i) for i in range(done)])
    return results, time.monotonic() - started


@pytest.mark.slow
def test_jobs_are_shared_and_all_wait_for_the_slowest():
    first, second = run_ranks(2, slow_jobs, 5)
    assert first[0] == second[0] == [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4)]
    assert min(first[1], second[1]) > 0.25
    assert run_ranks(1, slow_jobs, 3)[0][0] == [(0, 0), (0, 1), (0, 2)]
    assert run_ranks(2, slow_jobs, 1)[1][0] == [(0, 0)]


def failing_job(rank):
    def fail():
        raise ValueError("singular matrix")

    try:
        run_jobs([lambda: 1, fail])
    except Exception as error:
        return type(error).__name__, str(error)


def test_a_job_that_fails_ends_all_processes():
    first, second = run_ranks(2, failing_job)
    assert first == ("RuntimeError", "another process failed: singular matrix")
    assert second == ("ValueError", "singular matrix")
