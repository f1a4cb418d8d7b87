"""The help of the recipes: the options shown, their order, and its length."""

import re
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from fmicl_text.cli import text, vision
from fmicl_text.cli.help import HIDDEN, recipe_help
from fmicl_text.cli.parser import ArgumentParser
from fmicl_text.training.args import FIXED_ARGUMENTS

RECIPES = {"text": text, "vision": vision}
NOT_SUPPORTED = {"text": set(), "vision": {"mini_batch_size"}}
RARE = {
    "ddp_find_unused_parameters",
    "greater_is_better",
    "per_device_eval_batch_size",
}  # of the fields that this project declares
SECTIONS = ["Options", "Model", "Data", "Objective", "Training", "Evaluation and checkpoints", "Output and Hub"]
recipes = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(autouse=True)
def width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def help_of(recipe, everything=False):
    module = RECIPES[recipe]
    parser = ArgumentParser("recipe.py", module.DESCRIPTION, module.GROUPS)
    return recipe_help(parser, module.GROUPS, everything)


def entries(shown):
    """Map each option of a help text to its description."""
    found = re.findall(r"^  --(\w+)(.*(?:\n {20,}.*)*)", shown, re.MULTILINE)
    assert len(found) > 40 and len(dict(found)) == len(found)
    return dict(found)


@recipes
def test_help_is_short_and_in_order(recipe):
    shown = help_of(recipe)
    assert len(shown.splitlines()) < 120
    assert re.findall(r"^(\w.*):$", shown, re.MULTILINE) == SECTIONS
    assert shown.endswith("All other options of transformers.TrainingArguments: --help_all\n")


@recipes
def test_every_option_of_this_project_is_in_the_help(recipe):
    model, data, training = RECIPES[recipe].GROUPS
    ours = {field.name for group in (model, data) for field in fields(group)}
    for kind in training.__mro__:
        if kind.__module__.startswith("fmicl_text"):
            ours |= set(kind.__annotations__)
    assert ours - set(FIXED_ARGUMENTS) - NOT_SUPPORTED[recipe] - RARE <= set(entries(help_of(recipe)))


@recipes
def test_help_all_adds_all_of_transformers(recipe):
    shown = set(entries(help_of(recipe, everything=True)))
    names = {field.name for group in RECIPES[recipe].GROUPS for field in fields(group)}
    assert shown == names - HIDDEN - NOT_SUPPORTED[recipe] | {"config", "help", "help_all"}
    assert set(entries(help_of(recipe))) <= shown
    assert not shown & set(FIXED_ARGUMENTS)


@recipes
@pytest.mark.parametrize("everything", [False, True])
def test_no_option_has_two_defaults(recipe, everything):
    for name, described in entries(help_of(recipe, everything)).items():
        assert "None)" not in described and "SUPPRESS" not in described, name
        assert len(re.findall(r"\(default[: ]|\bDefault ", described)) <= 1, name
        if "(default: " in described:
            assert len(re.findall("default", described, re.IGNORECASE)) == 1, name


def test_switches_without_a_default_of_true_need_no_value():
    shown = help_of("text")
    assert re.search(r"^  --bf16  ", shown, re.MULTILINE)
    assert re.search(r"^  --load_best_model_at_end BOOL", shown, re.MULTILINE)
    assert "--no_load_best_model_at_end" not in help_of("text", everything=True)


@pytest.mark.parametrize("flag", ["--help", "-h", "--help_all"])
def test_the_flags_print_it_and_exit(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        text.parse_args([flag, "--no_such_flag"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and printed.count("transformers.TrainingArguments") >= 1
    assert ("adam_beta1" in printed) == (flag == "--help_all")


def test_the_command_says_that_it_launches(monkeypatch):
    monkeypatch.setenv("FMICL_TEXT_LAUNCH", '{"command": ["fmicl-text", "train"], "launcher": []}')
    shown = help_of("text")
    assert shown.startswith("usage: fmicl-text train ") and "accelerate launch" in shown.splitlines()[-1]
    assert len(shown.splitlines()) < 120


def test_transformers_describes_what_is_not_ours():
    (described,) = [field.metadata["help"] for field in fields(TrainingArguments) if field.name == "adam_beta1"]
    assert " ".join(entries(help_of("text", everything=True))["adam_beta1"].split()).startswith(f"FLOAT {described}")
