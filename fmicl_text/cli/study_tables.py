"""Tables and plots of the runs of a study."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from fmicl_text.cli.study import Study
from fmicl_text.errors import InputError
from fmicl_text.evaluation.plots import save_figure
from fmicl_text.evaluation.report import library_versions, markdown_table, mean_std, write_json

BEFORE = "before training"


def values_of(record: Mapping[str, Any], metrics: Mapping[str, str]) -> dict[str, float]:
    """The metrics of a run, by name.

    Raises:
        InputError: One of them is not in its results.
    """
    results = record["results"]
    probes = results["data"].get("probes") or [{}]
    known = {name.removeprefix("eval_"): value for name, value in results["after"].items()}
    known |= accuracies(probes[-1])
    if unknown := [name for name in metrics if name not in known]:
        raise InputError(f"metrics: {unknown[0]} is not in the results, which have {', '.join(known)}")
    return {name: float(known[name]) for name in metrics}


def accuracies(probe: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of the table of probes; of "mean ± standard deviation", over draws of labels, the mean."""
    found = {name: re.match(r"([\d.]+)( ± [\d.]+)?$", str(value)) for name, value in probe.items()}
    return {name: float(match[1]) for name, match in found.items() if match}


def values_before(record: Mapping[str, Any], metrics: Mapping[str, str]) -> dict[str, float]:
    """Those of the metrics that the encoder was evaluated by before training."""
    results = record["results"]
    known = {name.removeprefix("eval_"): value for name, value in results["before"].items()}
    for row in results["data"].get("probes") or []:
        known |= accuracies(row) if BEFORE in row.values() else {}
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


def chosen_rows(study: Study, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a choice by the logged value `choose_by` would give. For every column and seed, it takes the row with the
    largest mean of the second half of its values. Shows the scores of these rows, how far they are below the row that
    is best on average, and the same of a random choice.

    Raises:
        InputError: A run did not log it.
    """
    table = []
    for column in dict.fromkeys(record["column"] for record in records):
        found = {(record["seed"], record["row"]): record for record in records if record["column"] == column}
        seeds = sorted({seed for seed, _ in found})
        rows = [row for row, _ in study.settings() if all((seed, row) in found for seed in seeds)]
        if not rows:
            continue
        chosen = [max(rows, key=lambda row: second_half(found[seed, row], str(study.choose_by))) for seed in seeds]
        for metric, title in study.metrics.items():
            scores = {place: values_of(record, study.metrics)[metric] for place, record in found.items()}
            of_choice = [scores[place] for place in zip(seeds, chosen, strict=True)]
            means = [statistics.mean(scores[seed, row] for seed in seeds) for row in rows]
            table.append(
                {
                    "column": column if len(study.metrics) == 1 else f"{column}, {title}".removeprefix(", "),
                    "chosen": "; ".join(dict.fromkeys(chosen)),
                    "score": mean_std(of_choice),
                    "below the best": max(means) - statistics.mean(of_choice),
                    "random choice": max(means) - statistics.mean(means),
                }
            )
    return table


def second_half(record: Mapping[str, Any], name: str) -> float:
    """The mean of the second half of the logged values of a run."""
    _, values = curve([record], name)
    if not values:
        raise InputError(f"choose_by: {name} was not logged by {record['row']}")
    return statistics.mean(values[len(values) // 2 :])


def write_tables(study: Study, records: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Write table.md, table.json, table.png and, if the study has curves, curves.png.

    Args:
        study: The study.
        records: The records of its finished runs, at least one.
        folder: The output folder.

    Returns:
        The Markdown.
    """
    cells = cells_of(study, records)
    parts = [markdown_table(table_rows(study, cells, hyperparameters_of(study, records)))]
    seeds = ", ".join(map(str, study.seeds))
    parts.append(f"Mean ± standard deviation over seeds {seeds}; {len(records)} of {study.num_runs} runs.")
    if study.baseline:
        parts.append(f"Differences to {study.baseline}, paired by seed, ± half of the 95% interval (Student's t).")
    if study.best_by:
        parts += [f"The best row of every {study.best_by}:", markdown_table(best_rows(study, cells))]
    if study.choose_by:
        parts += [f"Choice of the row by {study.choose_by}, per seed:", markdown_table(chosen_rows(study, records))]
    if len(codes := {record["code"] for record in records}) > 1:
        parts.append(f"These runs are of {len(codes)} versions of the code.")
    markdown = "\n\n".join(parts) + "\n"
    (folder / "table.md").write_text(markdown, encoding="utf-8")
    content = {name: {title: cell.values for title, cell in row.items()} for name, row in cells.items()}
    write_json(folder / "table.json", {"cells": content, "code": sorted(codes), "versions": library_versions()})
    plot(study, cells, folder / "table.png")
    if study.curves:
        plot_curves(study, records, folder / "curves.png")
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


def curve(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps at which every run logged a value, and its mean over the runs."""
    logged: list[dict[int, float]] = []
    for record in records:
        logged.append({})
        for entry in record["results"]["log_history"]:
            for key in {name, f"eval_{name}"} & entry.keys():
                logged[-1][entry["step"]] = entry[key]
    steps = sorted(set.intersection(*map(set, logged))) if logged else []
    return steps, [statistics.mean(values[step] for values in logged) for step in steps]


def plot_curves(study: Study, records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the logged values named in `curves`, means over seeds, along training: one line of panels per value, one
    column of panels per column of the study.

    Raises:
        InputError: No run logged one of them.
    """
    columns = list(dict.fromkeys(record["column"] for record in records))
    rows = list(dict.fromkeys(name for name, _ in study.settings()))
    figure = Figure(figsize=(1.2 + 3.4 * len(columns), 0.4 + 2.2 * len(study.curves)), layout="constrained")
    panels = figure.subplots(len(study.curves), len(columns), squeeze=False, sharex="col")
    colors = [f"C{number % 10}" for number in range(len(rows))]
    styles = ["-" if number < 10 else "--" if number < 20 else ":" for number in range(len(rows))]
    for line, (name, title) in zip(panels, study.curves.items(), strict=True):
        for axes, column in zip(line, columns, strict=True):
            for row, color, style in zip(rows, colors, styles, strict=True):
                of_row = [r for r in records if r["row"] == row and r["column"] == column]
                axes.plot(*curve(of_row, name), color=color, linestyle=style, label=row)
            axes.set_ylabel(title)
            axes.grid(color="0.9")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        if not any(line_of.get_xdata().size for axes in line for line_of in axes.get_lines()):
            raise InputError(f"curves: {name} was not logged by any run")
    for axes, column in zip(panels[0], columns, strict=True):
        axes.set_title(column, fontsize="medium")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_figure(figure, path, dpi=150)
