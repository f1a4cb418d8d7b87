"""Timing and peak memory of functions with known cost."""

import sys

import pytest
import torch

from fmicl_text.evaluation.benchmark import interleaved_seconds, median_ratio, peak_extra_mib


def test_functions_are_interleaved():
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
