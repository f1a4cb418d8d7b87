"""Reports of results: Markdown tables, JSON files, library versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fmicl_text.errors import InputError
from fmicl_text.files import check_regular, read_json, write_atomic

PACKAGES = ("fmicl_text", "torch", "transformers", "sentence-transformers", "accelerate", "datasets", "scipy", "mteb")
SEVEN_TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICKRelatedness")

# Columns of `score_rows` that are not scores. Those of settings are shown where rows differ in them.
SETTINGS = {"prompt": "prompt", "dimensions": "truncate_dim", "tokens": "max_seq_length", "precision": "precision"}
ROW_LABELS = ("model", "protocol", "pooling", *SETTINGS, "seeds")
PAPER_COLUMN = "Avg. in the paper, BERT-base"
# Average STS scores in arXiv 2402.10150 for BERT-base trained on 1M Wikipedia sentences, by objective.
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
# The setting of these scores, recipes/configs/text/bert-base-*.yaml: all of it must agree for the comparison.
PAPER_MODELS = ("google-bert/bert-base-uncased", "bert-base-uncased")
PAPER_FILE, PAPER_ROWS = "wiki1m_for_simcse.txt", 1_000_000
PAPER_BATCH = 64
PAPER_SETTINGS = {"pooling": "cls", "head": "simcse", "max_seq_length": 32, "learning_rate": 3e-5}
PAPER_DEFAULTS = {
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "gradient_accumulation_steps": 1,
    "lora_rank": None,
    "train_sampling_strategy": "random",
}
FMICL_HYPERPARAMETERS = {"gamma": 20.0, "alpha": 409600.0, "negatives": "same_view", "similarity": "gaussian"}
PAPER_HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(PAPER_STS_AVERAGE, FMICL_HYPERPARAMETERS),
    "infonce": {"temperature": 0.05, "negatives": "cross_view"},
    "align_uniform": {"gamma": 2.0, "alpha": 1.0},
    "fmicl-tsallis": FMICL_HYPERPARAMETERS | {"tsallis_order": 3.0},
}


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that results depend on."""
    versions = {package: installed_version(package) for package in PACKAGES}
    return {"python": platform.python_version()} | {name: found for name, found in versions.items() if found}


@cache  # looking it up takes 3 ms, and every checkpoint records it
def installed_version(package: str) -> str | None:
    """The version of an installed distribution, None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def float32_products(device: str) -> str:
    """The precision in which a device multiplies float32 matrices: float32, tf32 (`tf32=True`, or torch's own settings)
    or bf16."""
    backend: Any = torch.backends.mkldnn.matmul if device == "cpu" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return {"none": "float32", "ieee": "float32"}.get(backend.fp32_precision, str(backend.fp32_precision))


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows of {column: value} as a Markdown table, with columns in order of appearance, floats with two decimals
    and empty cells for missing values."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def before_after_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Table of the metrics in both dicts: before, after and the change."""
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
    """Format a table cell."""
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_atomic(Path(path), json.dumps(content, indent=2, default=str) + "\n")


def named_model(argument: str) -> tuple[str, str]:
    """Split an argument `NAME=MODEL` into name and model; for a plain `MODEL`, both are MODEL.

    Raises:
        InputError: The name or the model is empty.
    """
    name, equals, model = argument.partition("=")
    if not equals or os.path.exists(argument):
        return argument, argument
    if not (name and model):
        raise InputError(f"{argument}: must be NAME=MODEL or MODEL")
    return name, model


def score_rows(results: Sequence[Mapping[str, Any]], sets: bool = False) -> list[dict[str, Any]]:
    """Table rows with Spearman x 100 on every task, one row per name, protocol, pooling and other settings.

    Models with the same name are seeds of one run: their cells are mean ± standard deviation. The cell of a task is
    empty if one of them lacks it, and the average is empty unless all seven tasks are present.

    Args:
        results: Entries that `eval/sts.py` and `eval/mteb_sts.py` write: {name, model, pooling, pooling_from, protocol,
            task, split, metrics}, and the settings prompt, truncate_dim, max_seq_length and precision.
        sets: Add columns for each subset of a task, and their unweighted and weighted means.

    Raises:
        InputError: A model has two scores for the same task.
    """
    scores: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    paper: dict[tuple[str, ...], set[float | None]] = {}
    columns: dict[str, None] = {}
    for result in results:
        row = (result["name"], result["protocol"], pooling_label(result), *setting_labels(result))
        of_model = scores.setdefault(row, {}).setdefault(result["model"], {})
        for column, score in task_scores(result, sets).items():
            if column in of_model:
                raise InputError(f"{result['model']} has two scores for {column} ({result['protocol']})")
            of_model[column] = score
            columns[column] = None
        paper.setdefault(row, set()).add(paper_average(result))
    labels = ("model", "protocol", "pooling", *SETTINGS)
    hidden = {label for i, label in enumerate(labels[3:], start=3) if len({row[i] for row in scores}) < 2}
    hidden -= {"prompt", "dimensions"} if any(row[3] or row[4] for row in scores) else set()
    rows = []
    for row, models in scores.items():
        for of_model in models.values():
            if row[1] == "SimCSE" and all(task in of_model for task in SEVEN_TASKS):
                of_model["Avg."] = statistics.mean(of_model[task] for task in SEVEN_TASKS)
        cells: dict[str, Any] = {name: cell for name, cell in zip(labels, row, strict=True) if name not in hidden}
        if max(map(len, scores.values())) > 1:
            cells["seeds"] = len(models)
        cells |= {column: mean_std([of_model.get(column) for of_model in models.values()]) for column in columns}
        if average := mean_std([of_model.get("Avg.") for of_model in models.values()]):
            cells["Avg."] = average
            (published, *others) = paper[row]
            if published is not None and not others:
                cells[PAPER_COLUMN] = published
        rows.append(cells)
    return rows


def setting_labels(result: Mapping[str, Any]) -> list[str]:
    """Cells of `SETTINGS`; prompts are quoted, because of their spaces."""
    values = {name: result.get(key) for name, key in SETTINGS.items()}
    prompt = values.pop("prompt")
    quoted = "" if prompt is None else json.dumps(prompt, ensure_ascii=False).replace("|", r"\|")
    return [quoted, *("" if value is None else str(value) for value in values.values())]


def paper_average(result: Mapping[str, Any]) -> float | None:
    """The average of an encoder's objective in the paper, if the encoder was trained and is evaluated in the setting of
    the paper's scores: the model, the data, the batch, the hyperparameters, ...; else None."""
    trained = result.get("trained", {})
    settings, data = trained.get("settings", {}), trained.get("data", {})
    objective, hyperparameters = trained.get("objective"), trained.get("hyperparameters", {})
    expected = PAPER_HYPERPARAMETERS.get(objective, {})
    comparable = (
        objective in PAPER_STS_AVERAGE
        and trained.get("base_model") in PAPER_MODELS
        and [Path(file).name for file in files_of(settings)] == [PAPER_FILE]
        and data.get("rows", 0) + data.get("blank rows skipped", 0) == PAPER_ROWS
        and settings.get("per_device_train_batch_size", 0) * trained.get("processes", 1) == PAPER_BATCH
        and all(settings.get(name) == value for name, value in PAPER_SETTINGS.items())
        and all(settings.get(name, value) == value for name, value in PAPER_DEFAULTS.items())
        and all(hyperparameters.get(name) == value for name, value in expected.items())
        and result["pooling"] == "cls"
        and not (data.get("prompts") or result.get("prompt") or result.get("truncate_dim") or result.get("head"))
    )
    return PAPER_STS_AVERAGE[objective] if comparable else None


def files_of(settings: Mapping[str, Any]) -> list[str]:
    """The training files of a run; older records have one as a string."""
    files = settings.get("train_file") or []
    return [files] if isinstance(files, str) else list(files)


def pooling_label(result: Mapping[str, Any]) -> str:
    """The pooling and, unless the model specifies it, its origin: `mean (assumed)`."""
    label = str(result["pooling"])
    return label if result["pooling_from"] == "the model" else f"{label} ({result['pooling_from']})"


def task_scores(result: Mapping[str, Any], sets: bool) -> dict[str, float]:
    """Scores of one result by column: Spearman, or the main score of the task if that is a different metric. The column
    is the task, with subset, split and metric in parentheses unless they are the defaults. `sets` adds columns for
    subsets."""
    metrics = result["metrics"]
    unusual = [result.get("subset"), result["split"], metrics.get("main_score_name")]
    details = ", ".join(name for name in unusual if name not in (None, "default", "test"))
    task = result["task"] + (f" ({details})" if details else "")
    columns = {task: metrics["main_score"] if "main_score" in metrics else metrics["spearman"]}
    if sets and "sets" in metrics:
        columns |= {f"{task}: {name}": score["spearman"] for name, score in metrics["sets"].items()}
        columns |= {
            f"{task}: mean": metrics["spearman_mean"],
            f"{task}: weighted mean": metrics["spearman_weighted_mean"],
        }
    return columns


def mean_std(values: Sequence[float | None]) -> str | None:
    """`mean ± sample standard deviation` with two decimals; a single value without deviation; None if a value is
    missing."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    deviation = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.2f}{deviation}"


def load_results(path: Path) -> list[dict[str, Any]]:
    """Load the entries with scores from a JSON file written by `eval/sts.py` or `eval/mteb_sts.py`.

    Raises:
        InputError: The file cannot be read, has another format, or contains no score.
    """
    check_regular(path, str(path))
    try:
        results = read_json(path)
        kept = [result for result in results if "metrics" in result]
        score_rows(kept)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a result file of eval/sts.py or eval/mteb_sts.py ({error})") from error
    if not kept:
        raise InputError(f"{path}: contains no score")
    return kept
