"""Communication between the processes of one run. A single process exchanges nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor

from fmicl_text.errors import InputError
from fmicl_text.files import DISK_FULL, is_disk_full

T = TypeVar("T")


def any_rank(flags: Tensor) -> Tensor:
    """The elementwise maximum over all processes, in place. Every process must call this."""
    if PartialState().num_processes > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function in the main process, and return its result in every process.

    Raises:
        InputError: In every process, if the function raised it.
    """
    answer: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            answer = [function()]
        except InputError as error:
            answer = [error]
    if PartialState().num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], InputError):
        raise answer[0]
    return answer[0]


def run_on_all_ranks(function: Callable[[], None]) -> str | None:
    """Call a function that writes files in every process.

    Returns:
        In every process, the reason in one line if the call failed in any; None if all succeeded.
    """
    failure = None
    try:
        function()
    except Exception as error:
        if is_disk_full(error):
            failure = DISK_FULL
        elif isinstance(error, OSError | SafetensorError | RuntimeError | InputError):
            failure = str(getattr(error, "strerror", None) or str(error).strip().splitlines()[0])
        else:
            raise
    return next((reason for reason in gather_object([failure]) if reason), None)
