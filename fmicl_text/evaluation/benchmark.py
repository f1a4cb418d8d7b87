"""Time and memory of contestants, measured side by side in one process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

MIB = 2**20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_seconds(
    contestants: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, progress: bool = True
) -> dict[str, list[float]]:
    """Seconds of each contestant in each of `repeats` rounds, after a round that does not count. One round runs every
    contestant once, so that what disturbs the machine disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in tqdm(range(repeats + 1), desc="rounds", leave=False, disable=not progress):
        for name, run in contestants.items():
            wait_for(device)
            start = time.perf_counter()
            run()
            wait_for(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median over rounds of first/second."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def peak_extra_mib(run: Callable[[], object], device: torch.device) -> float:
    """MiB that a call needs at its peak beyond what is held before it: of the GPU's memory, else resident (Linux).

    On Linux glibc is told, for the rest of the process, to return what is freed in pieces of 1 MiB and more: what it
    keeps would count as needed. That slows allocation down, so measure time first.

    Raises:
        OSError: No GPU and no /proc, so that nothing here can tell.
    """
    gc.collect()
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        wait_for(device)
        return (torch.cuda.max_memory_allocated(device) - held) / MIB
    if not sys.platform.startswith("linux"):
        raise OSError("peak memory on a CPU is read from /proc, which only Linux has")
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MIB)
    libc.malloc_trim(0)  # what was freed before but kept would hide a part of the need
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident_mib("VmRSS")
    run()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (at its highest) of this process, in MiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def plot_scaling(rows: Sequence[Mapping[str, object]], path: str | Path, title: str) -> None:
    """Time and peak memory against N on logarithmic axes, one line per contestant.

    Args:
        rows: {contestant, N, ms, peak MiB}; a value that is None has no point.
        path: Where to write the PNG.
        title: What was run.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, (key, label) in zip(
        figure.subplots(1, 2),
        {"ms": "milliseconds, forward + backward", "peak MiB": "extra memory, MiB"}.items(),
        strict=True,
    ):
        for name in dict.fromkeys(row["contestant"] for row in rows):
            points = [(row["N"], row[key]) for row in rows if row["contestant"] == name and row.get(key)]
            if points:
                style = "--" if name == "floor" else "-"
                axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=str(name))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("N, examples in the batch")
        axis.set_title(label, fontsize="medium")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=100)
