"""Compare settings of a recipe: every setting is run with every seed, and a table shows means, spreads and differences.

    python recipes/compare.py recipes/studies/digits.yaml --output_dir runs/digits
    python recipes/compare.py recipes/studies/text.yaml --variables data=/data --output_dir runs/text --jobs 2
    python recipes/compare.py --list recipes/studies/*.yaml      # the studies, with their number of runs and cost

A study is a YAML file:

    about: Divergences on digits.
    cost: 15 s of one core per run
    recipe: vision_fmicl             # or simcse_fmicl
    seeds: [1, 2, 3]
    metrics: {knn_accuracy: k-NN}    # a metric of results.json or a column of its probes; its title in the table
    hyperparameters: [alpha]         # optional: shown as well, such as those that the recipe measures
    baseline: infonce, temperature 0.5
    options: {max_steps: 100}        # options of the recipe, for all runs
    columns:                         # optional: settings that become columns of the table, such as data or encoders
      digits: {}
    rows:                            # settings that become rows; a list of values makes one row per value
      - divergence: [kl, js, "mine:power"]
        gamma: [5, 10]
      - {objective: infonce, temperature: 0.5, name: InfoNCE}

An option that takes several values is given as a list in `options` and `columns`, and as a list in a list in `rows`.
`{data}` in a value is replaced by --variables data=..., whose default the study can give (variables: {data: data}).

The output folder contains the record of every run (runs/*.json), the output of the recipe (logs/), and table.md,
table.json and table.png. Started again, a study continues: runs that are finished are not repeated, and a run with
checkpoints resumes from the last one. Encoders are deleted after their run unless keep_encoders is true.

Differences are paired by seed. Their 95% intervals are those of Student's t: a bootstrap over three to five seeds would
be too narrow.
"""

from __future__ import annotations

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split

import argparse
import fcntl
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from scipy import stats
from tqdm.auto import tqdm

import fmicl_text
from fmicl_text.cli.checks import whole_number
from fmicl_text.cli.parser import ArgumentParser, LoaderWithoutAliases, cli_errors
from fmicl_text.cli.streams import Stopped
from fmicl_text.cli.text import parse_args as parse_text_args
from fmicl_text.cli.vision import parse_vision_args
from fmicl_text.errors import InputError
from fmicl_text.evaluation.plots import save_figure
from fmicl_text.evaluation.report import library_versions, markdown_table, mean_std, write_json
from fmicl_text.files import content_hash, read_json
from fmicl_text.training.checkpoint import checkpoints_in

PARSERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "simcse_fmicl": parse_text_args,
    "vision_fmicl": parse_vision_args,
}
IN_NAME = ("objective", "divergence")  # options whose value suffices in the name of a row
BEFORE = "before training"
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
    """A study; see the docstring of this file. Fields are the keys of the YAML file."""

    recipe: str
    rows: list[Mapping[str, Any]]
    metrics: Mapping[str, str]
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    variables: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: list[str] = field(default_factory=list)
    baseline: str | None = None
    best_by: str | None = None
    keep_encoders: bool = False
    about: str = ""
    cost: str = ""

    def __post_init__(self) -> None:
        kinds = {
            **dict.fromkeys(("rows", "seeds", "hyperparameters"), list),
            **dict.fromkeys(("metrics", "options", "columns", "variables"), dict),
            **dict.fromkeys(("recipe", "about", "cost"), str),
        }
        names = {list: "a list", dict: "a mapping", str: "text"}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is not str and not value and name in ("rows", "seeds", "metrics")):
                raise InputError(f"{name}: must be {names[kind]}, got {value!r}")
        if untitled := [title for title in self.metrics.values() if not isinstance(title, str)]:
            raise InputError(f"metrics: titles must be text, got {untitled[0]!r}")
        if self.recipe not in PARSERS:
            raise InputError(f"recipe: must be {' or '.join(PARSERS)}, got {self.recipe}")
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
        if self.baseline is not None and self.baseline not in names_of_rows:
            raise InputError(f"baseline: must be one of the rows {'; '.join(names_of_rows)}, got {self.baseline}")

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


# ---- runs


def check(study: Study, runs: Sequence[Run]) -> None:
    """Raise `InputError` for an option that the recipe does not accept."""
    for run in runs:
        try:
            PARSERS[study.recipe]([*run.arguments, "--output_dir=unused"])
        except InputError as error:
            raise InputError(f"{run.row}{run.column and f', {run.column}'}: {error}") from error
    names = [run.name for run in runs]
    if twice := [run.row for run in runs if names.count(run.name) > 1]:
        raise InputError(f"rows: the files of {twice[0]} would have the name of another row; give it another `name`")


def record_of(run: Run, folder: Path) -> dict[str, Any] | None:
    """The record of a run; None if it is not finished."""
    path = folder / "runs" / f"{run.name}.json"
    try:
        record = read_json(path)
        arguments = record["arguments"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not the record of a run ({error})") from error
    if arguments != run.arguments:
        changed = sorted({*arguments} ^ {*run.arguments})
        raise InputError(
            f"{path} is a run with other options ({' '.join(changed)}): choose another --output_dir, or delete it"
        )
    return record if isinstance(record, dict) else None


class Runner:
    """Runs the recipe in processes of its own.

    Args:
        study: The study.
        folder: The output folder.
        threads: Threads of each run.
    """

    def __init__(self, study: Study, folder: Path, threads: int) -> None:
        self.study, self.folder, self.threads = study, folder, threads
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def run(self, run: Run) -> None:
        """Run the recipe, from its last checkpoint if it has one, and write the record."""
        if self.stopped:
            return
        with self.locked_log(run) as log:
            if record_of(run, self.folder) is None:  # of a process that went on after this script was killed
                try:
                    self.execute(run, log)
                except BaseException:
                    self.stopped = True  # before this thread begins the next run
                    raise

    @contextmanager
    def locked_log(self, run: Run) -> Iterator[Any]:
        """The log of a run, locked. The run inherits the lock, so that a run that goes on after this script was killed
        is waited for."""
        path = self.folder / "logs" / f"{run.name}.log"
        with path.open("ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tqdm.write(f"{run.name} is still running in another process; waiting for it")
                fcntl.flock(log, fcntl.LOCK_EX)
            yield log

    def execute(self, run: Run, log: Any) -> None:
        encoder = self.folder / "encoders" / run.name
        results = encoder / "results.json"
        if not results.exists() and not checkpoints_in(encoder):
            shutil.rmtree(encoder, ignore_errors=True)
        resume = ["--resume_from_checkpoint=auto"] if encoder.exists() else []
        script = Path(__file__).with_name(f"{self.study.recipe}.py")
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        command = [
            sys.executable,
            str(script),
            *run.arguments,
            "--disable_tqdm=True",
            f"--output_dir={encoder}",
            *resume,
        ]
        start, position = time.monotonic(), log.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self.running.add(process)
        if self.stopped:
            process.terminate()
        status = process.wait()
        self.running.discard(process)
        if self.stopped:
            return
        if status:
            with open(log.name, "rb") as output:
                output.seek(position)
                lines = output.read().decode(errors="replace").strip().splitlines()
            raise InputError(f"{run.name} ended with status {status}: {lines[-1] if lines else log.name}")
        record = {
            "row": run.row,
            "column": run.column,
            "seed": run.seed,
            "arguments": run.arguments,
            "seconds": round(time.monotonic() - start, 1),
            "code": code_hash(),
            "results": read_json(results),
        }
        values_of(record, self.study.metrics)
        write_json(self.folder / "runs" / f"{run.name}.json", record)
        if not self.study.keep_encoders:
            shutil.rmtree(encoder)

    def stop(self) -> None:
        """Stop all runs; they save a checkpoint."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()
        for process in list(self.running):
            process.wait()


def code_hash() -> str:
    """A hash of the package and the recipes, by which runs of different versions are told apart."""
    package = Path(fmicl_text.__file__).parent
    files = [*package.rglob("*.py"), *(Path(__file__).with_name(f"{name}.py") for name in PARSERS)]
    return content_hash(*sorted(files))[:12]


def execute(study: Study, runs: Sequence[Run], folder: Path, jobs: int, threads: int) -> None:
    """Execute all runs that are not finished, `jobs` at a time. The first one that fails ends all."""
    if folder.is_dir() and any(folder.iterdir()) and not ((folder / "runs").is_dir() and (folder / "logs").is_dir()):
        raise InputError(f"--output_dir {folder}: contains other files; choose a new or empty folder")
    for name in ("runs", "logs", "encoders"):
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {folder}: {error.strerror}") from error
    missing = [run for run in runs if record_of(run, folder) is None]
    runner = Runner(study, folder, threads)
    progress = tqdm(total=len(runs), initial=len(runs) - len(missing), desc="runs", smoothing=0)
    with progress, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(runner.run, run) for run in missing]
        try:
            for future in futures:
                future.add_done_callback(lambda one: progress.update(not (one.cancelled() or one.exception())))
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
    if not any((folder / "encoders").iterdir()):
        (folder / "encoders").rmdir()


# ---- table


def values_of(record: Mapping[str, Any], metrics: Mapping[str, str]) -> dict[str, float]:
    """The metrics of a run, by name.

    Raises:
        InputError: One of them is not in its results.
    """
    results = record["results"]
    probes = results["data"].get("probes") or [{}]
    known = {name.removeprefix("eval_"): value for name, value in results["after"].items()}
    known |= {name: value for name, value in probes[-1].items() if isinstance(value, float)}
    if unknown := [name for name in metrics if name not in known]:
        raise InputError(f"metrics: {unknown[0]} is not in the results, which have {', '.join(known)}")
    return {name: float(known[name]) for name in metrics}


def values_before(record: Mapping[str, Any], metrics: Mapping[str, str]) -> dict[str, float]:
    """Those of the metrics that the encoder was evaluated by before training."""
    results = record["results"]
    known = {name.removeprefix("eval_"): value for name, value in results["before"].items()}
    for row in results["data"].get("probes") or []:
        known |= row if BEFORE in row.values() else {}
    return {name: float(known[name]) for name in metrics if name in known}


@dataclass
class Cell:
    """The values of a row in a column, by seed."""

    values: dict[int, float]

    def difference(self, other: Cell) -> tuple[float, float | None]:
        """Mean difference to another cell over the seeds of both, and half of its 95% interval (None for one seed)."""
        seeds = [seed for seed in self.values if seed in other.values]
        differences = [self.values[seed] - other.values[seed] for seed in seeds]
        if not differences:
            return float("nan"), None
        mean, count = statistics.mean(differences), len(differences)
        if count < 2:
            return mean, None
        return mean, float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5


def cells_of(study: Study, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Cell]]:
    """The cells of the table by row and title of the column, rows in the order of the study."""
    rows: dict[str, dict[str, Cell]] = {BEFORE: {}, **{name: {} for name, _ in study.settings()}}
    for record in records:
        for row, values in (
            (BEFORE, values_before(record, study.metrics)),
            (record["row"], values_of(record, study.metrics)),
        ):
            for metric, value in values.items():
                title = str(study.metrics[metric])
                if record["column"]:
                    title = record["column"] if len(study.metrics) == 1 else f"{record['column']}, {title}"
                rows[row].setdefault(title, Cell({})).values[record["seed"]] = value
    return {row: cells for row, cells in rows.items() if cells}


def hyperparameters_of(study: Study, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """The values of the study's hyperparameters in all runs of a row, by row and title."""
    rows: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for name in study.hyperparameters:
            if isinstance(value := record["results"]["hyperparameters"].get(name), int | float):
                title = ", ".join(filter(None, (record["column"], name)))
                rows.setdefault(record["row"], {}).setdefault(title, []).append(value)
    return rows


def table_rows(
    study: Study,
    cells: Mapping[str, Mapping[str, Cell]],
    hyperparameters: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> list[dict[str, Any]]:
    """The rows of the Markdown table: means, standard deviations, differences to the baseline, and the smallest and
    largest value of hyperparameters."""
    hyperparameters = hyperparameters or {}
    titles = list(dict.fromkeys(title for row in cells.values() for title in row))
    base = cells.get(study.baseline or "", {})
    rows = []
    for name, row in cells.items():
        shown: dict[str, Any] = {"setting": name}
        for title in titles:
            cell = row.get(title)
            shown[title] = cell and mean_std(list(cell.values.values()))
            if base and cell and title in base and name not in (BEFORE, study.baseline):
                mean, half = cell.difference(base[title])
                shown[f"{title}: difference"] = f"{mean:+.2f}" + ("" if half is None else f" ± {half:.2f}")
            elif base:
                shown[f"{title}: difference"] = None
        for title, values in hyperparameters.get(name, {}).items():
            low, high = (f"{value:.3g}" for value in (min(values), max(values)))
            shown[title] = low if low == high else f"{low} to {high}"
        counts = {len(cell.values) for cell in row.values()}
        if counts != {len(study.seeds)}:
            shown["seeds"] = "-".join(map(str, sorted(counts)))
        rows.append(shown)
    return rows


def best_rows(study: Study, cells: Mapping[str, Mapping[str, Cell]]) -> list[dict[str, Any]]:
    """For every value of the option `best_by`, the best row in every column."""
    groups: dict[str, list[str]] = {}
    for name, options in study.settings():
        if study.best_by in options and name in cells:
            groups.setdefault(str(options[study.best_by]), []).append(name)
    rows = []
    for value, names in groups.items():
        row: dict[str, Any] = {str(study.best_by): value}
        for title in dict.fromkeys(title for name in names for title in cells[name]):
            means = {n: statistics.mean(cells[n][title].values.values()) for n in names if title in cells[n]}
            best = max(means, key=lambda name: means[name])
            row |= {f"best, {title}": best, title: mean_std(list(cells[best][title].values.values()))}
        rows.append(row)
    return rows


def write_tables(study: Study, runs: Sequence[Run], folder: Path) -> str:
    """Write table.md, table.json and table.png of the finished runs; returns the Markdown."""
    records = [record for run in runs if (record := record_of(run, folder)) is not None]
    if not records:
        raise InputError(f"--output_dir {folder}: contains no finished run of this study")
    cells = cells_of(study, records)
    parts = [markdown_table(table_rows(study, cells, hyperparameters_of(study, records)))]
    seeds = ", ".join(map(str, study.seeds))
    parts.append(f"Mean ± standard deviation over seeds {seeds}; {len(records)} of {len(runs)} runs.")
    if study.baseline:
        parts.append(f"Differences to {study.baseline}, paired by seed, ± half of the 95% interval (Student's t).")
    if study.best_by:
        parts += [f"The best row of every {study.best_by}:", markdown_table(best_rows(study, cells))]
    if len(codes := {record["code"] for record in records}) > 1:
        parts.append(f"These runs are of {len(codes)} versions of the code.")
    markdown = "\n\n".join(parts) + "\n"
    (folder / "table.md").write_text(markdown, encoding="utf-8")
    content = {name: {title: cell.values for title, cell in row.items()} for name, row in cells.items()}
    write_json(folder / "table.json", {"cells": content, "code": sorted(codes), "versions": library_versions()})
    plot(study, cells, folder / "table.png")
    return markdown


def plot(study: Study, cells: Mapping[str, Mapping[str, Cell]], path: Path) -> None:
    """Plot the seeds and the mean of every row, one panel per column."""
    titles = list(dict.fromkeys(title for row in cells.values() for title in row))
    height = 0.28 * len(cells) + 1.0
    figure = Figure(figsize=(2.5 + 3.2 * len(titles), height), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False, sharey=True)[0]
    names = list(cells)
    for axes, title in zip(panels, titles, strict=True):
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        for place, name in enumerate(names):
            if title in cells[name]:
                values = list(cells[name][title].values.values())
                color = "0.5" if name == BEFORE else "tab:orange" if name == study.baseline else "tab:blue"
                axes.plot(values, np.full(len(values), place), "o", color=color, alpha=0.4, markersize=4)
                axes.plot([statistics.mean(values)], [place], "|", color=color, markersize=12, markeredgewidth=2)
        axes.set_title(title, fontsize="medium")
        axes.set_yticks(range(len(names)), names)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].invert_yaxis()
    save_figure(figure, path, dpi=150)


def print_list(paths: Sequence[Path]) -> None:
    """Print the studies with their number of runs and cost."""
    studies = [(path, load_study(path)) for path in paths]
    count = {path: len(study.settings()) * len(study.columns) * len(study.seeds) for path, study in studies}
    rows = [{"study": path.stem, "runs": count[path], "cost": one.cost, "about": one.about} for path, one in studies]
    print(markdown_table(rows))


# ----


def variable(argument: str) -> tuple[str, str]:
    name, equals, value = argument.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{argument}: must be NAME=VALUE")
    return name, value


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser("compare.py", __doc__)
    parser.add_argument("study", nargs="+", type=Path, help="YAML file of the study")
    parser.add_argument("--output_dir", type=Path, help="folder of the runs and the table (default: runs/STUDY)")
    parser.add_argument("--variables", nargs="+", type=variable, default=[], metavar="NAME=VALUE", help="of the study")
    parser.add_argument("--jobs", type=partial(whole_number, lowest=1), default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--threads", type=partial(whole_number, lowest=1), default=1, help="threads of each run (default: 1)"
    )
    parser.add_argument("--list", action="store_true", help="only print the studies, their runs and cost")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs that are finished")
    args = parser.parse_args()
    if len(args.study) > 1 and not args.list:
        parser.error("several studies are accepted with --list only")
    return args


def stop(number: int, frame: Any) -> None:
    raise Stopped(number)


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, stop)
    if args.list:
        return print_list(args.study)
    path = args.study[0]
    study = load_study(path)
    folder = args.output_dir or Path("runs") / path.stem
    runs = study.runs(dict(args.variables))
    if not args.table:
        check(study, runs)
        execute(study, runs, folder, args.jobs, args.threads)
    print(write_tables(study, runs, folder), end="")


if __name__ == "__main__":
    with cli_errors("compare.py"):
        main()
