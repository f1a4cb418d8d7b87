"""What runs leave for people: tables, JSON, the versions they ran with."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fmicl_text.errors import InputError
from fmicl_text.files import write_atomic

PACKAGES = ("fmicl_text", "torch", "transformers", "sentence-transformers", "accelerate", "datasets", "scipy", "mteb")
SEVEN_TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICKRelatedness")

# The averages that arXiv 2402.10150 reports for BERT-base trained on a million Wikipedia sentences, by objective.
PAPER_STS_AVERAGE = {
    "infonce": 77.40,
    "align_uniform": 77.95,
    "fmicl-kl": 78.02,
    "fmicl-js": 76.76,
    "fmicl-pearson": 77.59,
    "fmicl-sh": 73.60,
    "fmicl-tsallis": 72.68,
    "fmicl-vlc_as_printed": 55.07,
}


def library_versions() -> dict[str, str]:
    """Installed versions of what a result depends on, Python's among them; a package that is not there is left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of {column: value} as an aligned GitHub table; columns in order of appearance, numbers to 2 places, a
    value that is missing as an empty cell."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def before_after_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """One row per metric that both hold: before, after and the change."""
    rows = [
        {
            "metric": name.removeprefix("eval_"),
            "before": before[name],
            "after": after[name],
            "change": after[name] - before[name],
        }
        for name in before
        if name in after and name != "epoch"
    ]
    return markdown_table(rows)


def cell(value: Any) -> str:
    """One table cell."""
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_atomic(Path(path), json.dumps(content, indent=2, default=str) + "\n")


def named_model(argument: str) -> tuple[str, str]:
    """Name and folder or Hub name of a `NAME=M` argument; of a plain `M` both are M.

    Raises:
        InputError: One of the two is empty.
    """
    name, equals, model = argument.partition("=")
    if not equals or Path(argument).exists():
        return argument, argument
    if not (name and model):
        raise InputError(f"{argument}: must be NAME=MODEL, or MODEL alone")
    return name, model


def score_rows(results: Sequence[Mapping[str, Any]], sets: bool = False) -> list[dict[str, Any]]:
    """One table row for each name and protocol: Spearman x 100 on every task, mean ± standard deviation over the models
    of that name. A task that one of them lacks is empty; so is the average unless all seven tasks are there.

    Args:
        results: What `eval/sts.py` and `eval/mteb_sts.py` write, {name, model, pooling, pooling_from, protocol, task,
            split, metrics}.
        sets: Columns for each set of a task, and their plain and weighted means.

    Raises:
        InputError: A model has two scores for the same task.
    """
    scores: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    objectives: dict[tuple[str, str, str], set[str | None]] = {}
    columns: dict[str, None] = {}
    for result in results:
        row = (result["name"], result["protocol"], pooling_label(result))
        of_model = scores.setdefault(row, {}).setdefault(result["model"], {})
        for column, score in task_scores(result, sets).items():
            if column in of_model:
                raise InputError(f"{result['model']} has two scores for {column} ({result['protocol']})")
            of_model[column] = score
            columns[column] = None
        objectives.setdefault(row, set()).add(result.get("trained", {}).get("objective"))
    rows = []
    for row, models in scores.items():
        for of_model in models.values():
            if row[1] == "SimCSE" and all(task in of_model for task in SEVEN_TASKS):
                of_model["Avg."] = statistics.mean(of_model[task] for task in SEVEN_TASKS)
        cells: dict[str, Any] = dict(zip(("model", "protocol", "pooling"), row, strict=True))
        if max(map(len, scores.values())) > 1:
            cells["seeds"] = len(models)
        cells |= {column: mean_std([of_model.get(column) for of_model in models.values()]) for column in columns}
        if average := mean_std([of_model.get("Avg.") for of_model in models.values()]):
            cells["Avg."] = average
            (objective, *others) = objectives[row]
            if not others and objective in PAPER_STS_AVERAGE:
                cells["Avg. in the paper, BERT-base"] = PAPER_STS_AVERAGE[objective]
        rows.append(cells)
    return rows


def pooling_label(result: Mapping[str, Any]) -> str:
    """cls, mean, ..., and who says so unless the model does."""
    label = str(result["pooling"])
    return label if result["pooling_from"] == "the model" else f"{label} ({result['pooling_from']})"


def task_scores(result: Mapping[str, Any], sets: bool) -> dict[str, float]:
    """Column to score of one result: Spearman under the task's name (its subset and split in brackets unless they are
    the usual ones), or the main score of a task that has another; with `sets` also those of each set."""
    metrics = result["metrics"]
    unusual = [result.get("subset"), result["split"], metrics.get("main_score_name")]
    brackets = ", ".join(what for what in unusual if what not in (None, "default", "test"))
    task = result["task"] + (f" ({brackets})" if brackets else "")
    columns = {task: metrics["main_score"] if "main_score" in metrics else metrics["spearman"]}
    if sets and "sets" in metrics:
        columns |= {f"{task}: {name}": score["spearman"] for name, score in metrics["sets"].items()}
        columns |= {
            f"{task}: mean": metrics["spearman_mean"],
            f"{task}: weighted mean": metrics["spearman_weighted_mean"],
        }
    return columns


def mean_std(values: Sequence[float | None]) -> str | None:
    """`mean ± standard deviation` (of a sample) to 2 places; a single value alone; None if one is missing."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    deviation = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.2f}{deviation}"


def load_results(path: Path) -> list[dict[str, Any]]:
    """The scored entries of a JSON file of `eval/sts.py` or `eval/mteb_sts.py`; those missing are left out.

    Raises:
        InputError: There is no such file, or it is something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        kept = [result for result in results if "metrics" in result]
        score_rows(kept)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not what eval/sts.py or eval/mteb_sts.py writes ({error})") from error
    if not kept:
        raise InputError(f"{path}: holds no score")
    return kept
