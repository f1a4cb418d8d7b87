"""The settings that a run writes are read back exactly by the next run."""

import os
from unittest import mock

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fmicl_text.cli.parser import resolved_settings
from fmicl_text.cli.text import parse_args
from fmicl_text.losses.divergences import DIVERGENCES
from fmicl_text.text.model import POOLINGS

pytestmark = pytest.mark.filterwarnings("ignore:divergence .* fails the uniformity condition")
ODD_NAMES = st.sampled_from(["no", "1", "1e5", "null", "a: b", "2001-02-03", " x ", "--seed", "a=b"])
# without those that PyYAML writes but reads as spaces
LETTERS = st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029")
NAMES = ODD_NAMES | st.text(LETTERS, min_size=1, max_size=12)
POSITIVE = st.floats(1e-3, 1e3)
COMMON = {
    "model_name_or_path": NAMES,
    "pooling": st.sampled_from(POOLINGS),
    "text_columns": NAMES,
    "max_seq_length": st.integers(3, 512),
    "output_dir": NAMES,
    "run_name": NAMES,
    "per_device_train_batch_size": st.integers(64, 4096),
    "mini_batch_size": st.integers(1, 64),
    "learning_rate": st.floats(0, 10),
    "num_train_epochs": POSITIVE,
    "max_steps": st.integers(1, 10**6),
    "seed": st.integers(0, 2**32 - 1),
    "weight_decay": st.floats(0, 1),
    "lr_scheduler_type": st.sampled_from(["linear", "cosine", "constant"]),
    "optim": st.sampled_from(["adamw_torch", "sgd"]),
    "bf16": st.booleans(),
    "save_total_limit": st.integers(1, 9),
}
HYPERPARAMETERS = {
    "fmicl": {
        "divergence": st.sampled_from(list(DIVERGENCES)),
        "gamma": POSITIVE,
        "alpha": POSITIVE,
        "negatives": st.sampled_from(["same_view", "cross_view", "both"]),
    },
    "infonce": {"temperature": POSITIVE},
    "align_uniform": {"gamma": st.floats(0.1, 30), "alpha": POSITIVE},
    "spectral": {"alpha": POSITIVE},
}


def parse(*flags):
    """The parsed dataclasses; the environment is restored."""
    with mock.patch.dict(os.environ):
        return parse_args(["--use_cpu=True", *flags])


@st.composite
def valid_settings(draw):
    objective = draw(st.sampled_from(list(HYPERPARAMETERS)))
    values = draw(st.fixed_dictionaries({}, optional=COMMON | HYPERPARAMETERS[objective]))
    if values.get("divergence") == "tsallis":
        values["tsallis_order"] = draw(st.floats(0.1, 9))
    if values.get("divergence") in ("rkl", "jeffrey", "neyman"):  # which need numbers
        values |= {"gamma": draw(POSITIVE), "alpha": draw(POSITIVE)}
    return {"train_file": draw(NAMES), "objective": objective, **values}


@pytest.mark.slow
@settings(max_examples=50)
@given(valid_settings())
def test_written_settings_are_read_back(folder, values):
    first = parse(*(f"--{name}={value}" for name, value in values.items()))
    resolved = resolved_settings(*first)
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), encoding="utf-8")
    again = parse("--config", str(config))
    assert again[:2] == first[:2] and resolved_settings(*again) == resolved
    for name in values.keys() & vars(first[2]).keys():
        assert getattr(again[2], name) == getattr(first[2], name), name


def test_a_name_may_end_in_an_equals_sign():
    for flags in (["--text_columns", "a="], ["--text_columns=a="]):
        assert parse(*flags)[1].text_columns == ["a="]
