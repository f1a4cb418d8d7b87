"""The stopwatch and the memory gauge, on loads whose need is known."""

import sys

import pytest
import torch

from fmicl_text.evaluation.benchmark import interleaved_seconds, median_ratio, peak_extra_mib, plot_scaling


def test_contestants_take_turns():
    order = []
    seconds = interleaved_seconds(
        {name: lambda name=name: order.append(name) for name in "ab"}, torch.device("cpu"), repeats=3, progress=False
    )
    assert order == ["a", "b"] * 4  # the first round warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_the_ratio_is_taken_within_a_round():
    assert median_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_a_known_load():
    def load():
        a = torch.ones(20 * 2**20)  # 80 MiB, all touched
        b = a + 1
        del a, b
        torch.ones(2**20)

    assert peak_extra_mib(load, torch.device("cpu")) == pytest.approx(160, abs=8)
    assert peak_extra_mib(lambda: None, torch.device("cpu")) < 8


def test_plot(tmp_path):
    rows = [
        {"contestant": "a", "N": 8, "ms": 1.0, "peak MiB": 2.0},
        {"contestant": "a", "N": 16, "ms": 4.0, "peak MiB": 4.0},
        {"contestant": "b", "N": 8, "ms": None, "peak MiB": None},
    ]
    plot_scaling(rows, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
