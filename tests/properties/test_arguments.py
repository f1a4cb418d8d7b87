"""Any flags and any YAML file give settings or an error of one line."""

import os
import warnings
from unittest import mock

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser

from fmicl_text.cli.text import DataArguments, ModelArguments, parse_args
from fmicl_text.cli.vision import (
    ImageDataArguments,
    ImageModelArguments,
    VisionTrainingArguments,
    parse_vision_args,
)
from fmicl_text.errors import InputError
from fmicl_text.training.args import FMICLTrainingArguments

RECIPES = {
    "text": (parse_args, (ModelArguments, DataArguments, FMICLTrainingArguments)),
    "vision": (parse_vision_args, (ImageModelArguments, ImageDataArguments, VisionTrainingArguments)),
}
# These change torch or the loggers of this process, or look for other processes.
EXCLUDED = ("help", "tf32", "torch_compile", "full_determinism", "log_level", "ddp", "local_rank", "deepspeed")
ACTIONS = {
    recipe: [action for action in HfArgumentParser(groups)._actions if not action.dest.startswith(EXCLUDED)]
    for recipe, (_, groups) in RECIPES.items()
}
WORDS = st.text(max_size=12) | st.sampled_from(
    ["no", "None", "~", "{}", "[]", '{"a": 1}', "{", "=", "a=", "--seed", "%s"]
)
NUMBERS = st.integers(-3, 200) | st.integers() | st.floats(allow_infinity=False) | st.sampled_from(["0x1f", "1_0", "٣"])
recipes = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory):
    """Run in an empty folder, because some of the values are file names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("arguments"))
        yield


def parses(recipe, argv):
    """Whether the arguments are valid; otherwise an `InputError` was raised. Changes of the environment and warnings by
    transformers are not tested here."""
    with mock.patch.dict(os.environ), warnings.catch_warnings(action="ignore"):
        try:
            RECIPES[recipe][0](["--use_cpu=True", *argv])
        except InputError as error:
            assert str(error).strip()
            return False
    return True


def written(text):
    with open("a.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    return ["--config", "a.yaml"]


@st.composite
def settings_of(draw, recipe):
    """A few flags by name, with values that often have the right type."""
    values = {}
    for action in draw(st.lists(st.sampled_from(ACTIONS[recipe]), min_size=1, max_size=4)):
        likely = st.sampled_from(list(action.choices)) if action.choices else NUMBERS | st.booleans()
        values[action.dest] = draw(likely | WORDS)
    return values


@recipes
@settings(max_examples=60)
@given(data=st.data())
def test_any_flags(recipe, data):
    values = data.draw(settings_of(recipe))
    parses(recipe, [f"--{name}={value}" for name, value in values.items()])


@pytest.mark.slow
@recipes
@settings(max_examples=60)
@given(data=st.data())
def test_any_mapping_in_the_file(recipe, data):
    scalars = st.none() | WORDS | NUMBERS | st.booleans()
    nested = st.recursive(scalars, lambda of: st.lists(of, max_size=3) | st.dictionaries(WORDS, of, max_size=3))
    nested |= st.dates() | st.binary(max_size=4)
    values = data.draw(settings_of(recipe))
    changed = data.draw(st.dictionaries(st.sampled_from(list(values)) | scalars, nested, max_size=2))
    parses(recipe, written(yaml.safe_dump(values | changed)))


YAML_BITS = [*"\n #%@~{}[]'\"", ": ", "- ", "? ", "|\n", "&a ", "*a", "\t", "\x00", "\ud800"]
YAML_BITS += [
    "!!set ",
    "!!binary ",
    "!!int ",
    "!!bool ",
    "seed",
    "gamma",
    "divergence",
    "js",
    "1",
    "2001-02-03",
    "99-99",
]


@pytest.mark.slow
@settings(max_examples=100)
@given(st.lists(st.sampled_from(YAML_BITS) | st.text(max_size=3), max_size=12).map("".join))
def test_any_text_as_the_file(text):
    with open("a.yaml", "wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    parses("text", ["--config", "a.yaml"])


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!timestamp x\n",
        "accelerator_config: {a: 1}\n",
        "seed: !!int\n",
        "seed: !!bool x\n",
        "accelerator_config: {a: 2001-02-03}\n",
        "eval_steps: .inf\n",
    ],
)
def test_files_found_by_random_testing(text):
    assert not parses("text", written(text))
