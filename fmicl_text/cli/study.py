"""Studies of `recipes/compare.py`: rows of settings, run with several seeds, read from YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from fmicl_text.cli.parser import LoaderWithoutAliases
from fmicl_text.errors import InputError

RECIPES = ("simcse_fmicl", "vision_fmicl")
IN_NAME = ("objective", "divergence")  # options whose value suffices in the name of a row
RESERVED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "config")


@dataclass
class Run:
    """One run of the recipe.

    Attributes:
        row, column: Its place in the table; column is "" in a study without columns.
        seed: Its seed.
        arguments: Its command line, without the output folder.
    """

    row: str
    column: str
    seed: int
    arguments: list[str]

    @property
    def name(self) -> str:
        """Name of its files."""
        return re.sub(r"[^\w.-]+", "_", f"{self.row}-{self.column or 'seed'}-{self.seed}")


@dataclass
class Study:
    """A study; see the docstring of `recipes/compare.py`. Fields are the keys of the YAML file."""

    recipe: str
    rows: list[Mapping[str, Any]]
    metrics: Mapping[str, str]
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    variables: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: list[str] = field(default_factory=list)
    curves: Mapping[str, str] = field(default_factory=dict)
    baseline: str | None = None
    best_by: str | None = None
    choose_by: str | None = None
    keep_encoders: bool = False
    about: str = ""
    cost: str = ""

    def __post_init__(self) -> None:
        kinds = {
            **dict.fromkeys(("rows", "seeds", "hyperparameters"), list),
            **dict.fromkeys(("metrics", "options", "columns", "variables", "curves"), dict),
            **dict.fromkeys(("recipe", "about", "cost"), str),
            **{name: str for name in ("baseline", "best_by", "choose_by") if getattr(self, name) is not None},
            "keep_encoders": bool,
        }
        names = {list: "a list", dict: "a mapping", str: "text", bool: "true or false"}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is not str and not value and name in ("rows", "seeds", "metrics")):
                raise InputError(f"{name}: must be {names[kind]}, got {value!r}")
        if unnamed := [name for name in self.hyperparameters if not isinstance(name, str)]:
            raise InputError(f"hyperparameters: names must be text, got {unnamed[0]!r}")
        for name, titles in (("metrics", self.metrics), ("curves", self.curves)):
            if untitled := [title for title in titles.values() if not isinstance(title, str)]:
                raise InputError(f"{name}: titles must be text, got {untitled[0]!r}")
        if self.recipe not in RECIPES:
            raise InputError(f"recipe: must be {' or '.join(RECIPES)}, got {self.recipe}")
        if any(type(seed) is not int or seed < 0 for seed in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds: must be different whole numbers, got {self.seeds}")
        for place, settings in [("options", self.options), *self.columns.items(), *enumerate(self.rows, 1)]:
            where = f"rows, number {place}" if isinstance(place, int) else str(place) or "columns"
            if not isinstance(settings, dict):
                raise InputError(f"{where}: must be a mapping of options, got {settings!r}")
            if unnamed := [name for name in settings if not isinstance(name, str)]:
                raise InputError(f"{where}: the name of an option must be text, got {unnamed[0]!r}")
            if reserved := [name for name in settings if name in RESERVED]:
                raise InputError(f"{where}: {reserved[0]} is set by this script")
        names_of_rows = [name for name, _ in self.settings()]
        if twice := [name for name in names_of_rows if names_of_rows.count(name) > 1]:
            raise InputError(f"rows: two rows have the name {twice[0]}; give one of them another `name`")
        options_of_rows = dict.fromkeys(name for _, options in self.settings() for name in options)
        if self.best_by is not None and self.best_by not in options_of_rows:
            raise InputError(f"best_by: must be one of the options {', '.join(options_of_rows)}, got {self.best_by}")
        if self.baseline is not None and self.baseline not in names_of_rows:
            raise InputError(f"baseline: must be one of the rows {'; '.join(names_of_rows)}, got {self.baseline}")

    @property
    def num_runs(self) -> int:
        """Rows times columns times seeds."""
        return len(self.settings()) * len(self.columns) * len(self.seeds)

    def settings(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of every row, with lists of values expanded."""
        found = []
        for row in self.rows:
            values = {key: value if isinstance(value, list) else [value] for key, value in row.items() if key != "name"}
            for chosen in product(*values.values()):
                options = dict(zip(values, chosen, strict=True))
                varied = {key: value for key, value in options.items() if len(values[key]) > 1}
                name = row_name(options) if "name" not in row else ", ".join([str(row["name"]), *row_parts(varied)])
                found.append((name, options))
        return found

    def runs(self, variables: Mapping[str, str]) -> list[Run]:
        """All runs, those of the first seed first. Variables override those of the study."""
        known = {**self.variables, **variables}
        if unknown := [name for name in variables if name not in self.variables]:
            raise InputError(f"--variables {unknown[0]}: the study has {', '.join(self.variables) or 'no variables'}")
        return [
            Run(row, str(column), seed, flags({**self.options, **given, **options, "seed": seed}, known))
            for seed in self.seeds
            for row, options in self.settings()
            for column, given in self.columns.items()
        ]


def row_name(options: Mapping[str, Any]) -> str:
    return ", ".join(row_parts(options)) or "defaults"


def row_parts(options: Mapping[str, Any]) -> list[str]:
    """Descriptions of options: `kl`, `gamma 10`, `views crops repeat`."""
    parts = []
    for name, value in options.items():
        shown = " ".join(map(shown_value, value if isinstance(value, list) else [value]))
        parts.append(shown if name in IN_NAME else f"{name} {shown}")
    return parts


def shown_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def flags(options: Mapping[str, Any], variables: Mapping[str, str]) -> list[str]:
    """Options as a command line, with `{name}` replaced by the variable of this name."""
    words = []
    for name, value in options.items():
        value = "no" if value is False and name.endswith("_strategy") else value  # YAML reads an unquoted no as False
        values = [filled(str(one), variables) for one in (value if isinstance(value, list) else [value])]
        words += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    return words


def filled(value: str, variables: Mapping[str, str]) -> str:
    def variable(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise InputError(f"{value}: --variables {match[1]}=... is required")
        return str(variables[match[1]])

    return re.sub(r"\{(\w+)\}", variable, value)


def load_study(path: Path) -> Study:
    """Read a study.

    Raises:
        InputError: It cannot be read, or has an unknown, missing or wrong key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), LoaderWithoutAliases)
    except (OSError, ValueError, AttributeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    keys = Study.__dataclass_fields__
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping, got {type(content).__name__}")
    if unknown := [key for key in content if key not in keys]:
        raise InputError(f"{path}: unknown key {unknown[0]}; known: {', '.join(keys)}")
    if missing := [key for key in ("recipe", "rows", "metrics") if key not in content]:
        raise InputError(f"{path}: the key {missing[0]} is missing")
    try:
        return Study(**content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
