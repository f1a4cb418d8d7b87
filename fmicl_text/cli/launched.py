"""Evaluation scripts on several processes, as started by `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from accelerate import PartialState

from fmicl_text.evaluation.sharing import all_processes


@contextmanager
def launched_processes() -> Iterator[bool]:
    """Within this context, the processes of a launcher share the work of evaluation, and only the first prints. Gives
    whether this is the first process; it alone writes files."""
    if "LOCAL_RANK" not in os.environ:
        yield True
        return
    is_first = PartialState(cpu=not torch.cuda.is_available()).is_main_process
    with ExitStack() as stack:
        stack.enter_context(all_processes())
        if not is_first:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield is_first
    if dist.is_initialized():
        dist.destroy_process_group()
