"""The cost formulas against counters of bytes and operations, in one and in two processes."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from fmicl_text import FMICLLoss, InfoNCELoss
from fmicl_text.evaluation.scaling import ddp_bytes, fmicl_cost, infonce_cost
from tests.distributed.ranks import run_ranks

ROWS, DIM = 48, 16


def counted(rank, loss, world_size):
    """Bytes received in the forward and in the backward pass, operations of both."""
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(ROWS, DIM, generator=generator).requires_grad_() for _ in range(2))
    received = [0.0]

    def size(tensor):
        return tensor.numel() * tensor.element_size()

    def all_gather(everyone, own, original=dist.all_gather):
        received[-1] += sum(map(size, everyone)) - size(own)
        return original(everyone, own)

    def all_reduce(tensor, original=dist.all_reduce):
        received[-1] += 2 * (world_size - 1) / world_size * size(tensor)
        return original(tensor)

    def batch_isend_irecv(operations, original=dist.batch_isend_irecv):
        received[-1] += sum(size(operation.tensor) for operation in operations if operation.op is dist.irecv)
        return original(operations)

    dist.all_gather, dist.all_reduce, dist.batch_isend_irecv = all_gather, all_reduce, batch_isend_irecv
    in_place = {torch.ops.aten.addmm_: lambda gradient, a, b, **_: 2 * a[0] * a[1] * b[1]}  # unknown to the counter
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        value = loss(x, y)
        received.append(0.0)
        value.backward()
    return *received, counter.get_total_flops()


CASES = {
    "gather": (FMICLLoss(block_size=16, global_batch="gather"), lambda w: fmicl_cost(w, ROWS, DIM, 16)),
    "ring": (FMICLLoss(block_size=16, global_batch="ring"), lambda w: fmicl_cost(w, ROWS, DIM, 16, "ring")),
    "infonce": (InfoNCELoss(global_batch="gather"), lambda w: infonce_cost(w, ROWS, DIM)),
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_counters_agree(name, world_size):
    """All but the row counts (8 bytes) and the sums of the loss (at most 24 bytes each)."""
    loss, cost = CASES[name][0], CASES[name][1](world_size)
    for forward, backward, operations in run_ranks(world_size, counted, loss, world_size):
        assert cost.forward_bytes <= forward <= cost.forward_bytes + 64
        assert backward == cost.backward_bytes
        assert operations == cost.operations


def ddp_received(rank):
    model = DistributedDataParallel(torch.nn.Linear(7, 5))
    seen, all_reduce = [], dist.all_reduce

    def hook(state, bucket):
        seen.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    model.register_comm_hook(None, hook)
    model(torch.ones(3, 7)).sum().backward()
    return sum(seen)


def test_the_encoders_gradients_are_exchanged_once():
    assert run_ranks(2, ddp_received) == [ddp_bytes(2, 40)] * 2
    assert ddp_bytes(1, 40) == 0


def test_memory_grows_with_the_processes_only_where_it_says_so():
    ring = [fmicl_cost(w, 64, 768, 64, "ring").memory_bytes for w in (8, 256)]
    gather = [fmicl_cost(w, 64, 768, 64).memory_bytes for w in (8, 256)]
    assert ring[0] == ring[1] and gather[1] > 20 * gather[0]
