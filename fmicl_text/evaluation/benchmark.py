"""Measure time and peak memory of functions in one process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

MIB = 2**20
M_MMAP_THRESHOLD = -3  # from malloc.h of glibc


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, progress: bool = True
) -> dict[str, list[float]]:
    """Seconds of each function in each of `repeats` rounds, after one warm-up round. Every round calls each function
    once, so that background load affects all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(repeats + 1), desc="rounds", leave=False, disable=not progress):
        for name, run in functions.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median over rounds of first / second."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def peak_extra_mib(run: Callable[[], object], device: torch.device) -> float:
    """Peak memory of a call in MiB, in addition to the memory in use before it: allocated on a GPU, else resident.

    On a CPU, this makes glibc return freed blocks of 1 MiB or more to the system, for the rest of the process;
    otherwise the blocks that it keeps would count. That slows allocation down, so measure time first.

    Raises:
        OSError: The device is a CPU and the system is not Linux.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - allocated) / MIB
    if not sys.platform.startswith("linux"):
        raise OSError("measuring peak memory on a CPU requires Linux (/proc)")
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MIB)
    libc.malloc_trim(0)  # freed blocks that glibc keeps would hide part of the peak
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident_mib("VmRSS")
    run()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """VmRSS (current) or VmHWM (peak) of this process in MiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024
