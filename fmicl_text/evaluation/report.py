"""What a run leaves for people: tables, the training curve, the versions it ran with."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

PACKAGES = ("fmicl_text", "torch", "transformers", "sentence-transformers", "accelerate", "datasets", "scipy")


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
    part = Path(f"{path}.part")
    part.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(part, path)


def plot_training_curve(log_history: Sequence[Mapping[str, float]], path: str | Path, title: str) -> None:
    """Loss, STS score and the alignment/uniformity of the training batches against the step, as a PNG.

    Args:
        log_history: `trainer.state.log_history`.
        path: Where to write the picture.
        title: What was run.
    """
    figure, (loss_axis, score_axis, geometry_axis) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    draw_series(
        loss_axis, log_history, {"loss": "loss"}, "minus a bound on the f-mutual information\nor the baseline's loss"
    )
    draw_series(score_axis, log_history, {"eval_sts_spearman": "Spearman x 100"}, "graded pairs, dev")
    names = {"alignment": "alignment (positives, lower = closer)", "uniformity": "uniformity (lower = more spread)"}
    draw_series(geometry_axis, log_history, names, "training batches")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_series(axis: Any, log_history: Sequence[Mapping[str, float]], names: Mapping[str, str], title: str) -> None:
    """Each logged quantity in names {key: label} against the step."""
    for key, label in names.items():
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, marker="o", markersize=3, label=label)
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize="small")
