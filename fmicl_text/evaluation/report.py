"""What a run leaves for people: tables, the training curve, the versions it ran with."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
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
    """STS score, loss, and alignment and uniformity of the training batches against the step, as a PNG.

    Args:
        log_history: `trainer.state.log_history`.
        path: Where to write the picture.
        title: What was run.
    """
    panels = {
        "eval_sts_spearman": "Spearman x 100 on the graded pairs",
        "loss": "loss (f-MICL's is minus a bound)",
        "alignment": "alignment of training batches (lower: positives closer)",
        "uniformity": "uniformity of training batches (lower: more spread)",
    }
    figure = Figure(figsize=(10, 6), layout="constrained")  # no pyplot: a notebook keeps its backend
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (key, label) in zip(axes.flat, panels.items(), strict=True):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3) if points else axis.text(0.4, 0.5, "not logged")
        axis.set_title(label, fontsize="medium")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
