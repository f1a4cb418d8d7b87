"""The bundled data: enough sentences, and hand-scored pairs, none of them from the generator."""

import csv
from importlib.resources import files

import pytest
import torch
from safetensors import safe_open

from fmicl_text.evaluation.sts import load_pairs
from fmicl_text.quickstart import ENCODER, PAIRS, SENTENCES
from tests.generate_sentences import sentences


@pytest.mark.slow
def test_sentences_are_distinct_and_as_the_generator_makes_them():
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 10_000
    assert len({line.lower() for line in lines}) == len(lines)
    assert lines == sentences()


def test_sentences_are_varied():
    words = [line.lower().strip(".?!").split() for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    assert all(4 <= len(line) <= 26 for line in words)
    assert len({word for line in words for word in line}) > 2500
    starts = [" ".join(line[:3]) for line in words]
    assert len(set(starts)) > len(starts) / 4


def test_pairs_are_graded_over_the_whole_scale():
    pairs = load_pairs(PAIRS)
    assert len(pairs) >= 250
    bands = [sum(round(score) == band for score in pairs["score"]) for band in range(6)]
    assert min(bands) > 30
    everything = [*pairs["sentence1"], *pairs["sentence2"]]
    assert len(set(everything)) == len(everything)
    with PAIRS.open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file, delimiter="\t")) == ["score", "sentence1", "sentence2"]


def test_no_pair_is_from_the_generator():
    generated = {line.lower().strip(" .?!") for line in SENTENCES.read_text(encoding="utf-8").splitlines()}
    pairs = load_pairs(PAIRS)
    assert not [s for s in [*pairs["sentence1"], *pairs["sentence2"]] if s.lower().strip(" .?!") in generated]


def test_the_encoder_is_float16_and_all_of_it_is_found_in_the_package():
    with safe_open(ENCODER / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    inside = {path.name for path in files("fmicl_text").joinpath("quickstart", "encoder").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= inside
