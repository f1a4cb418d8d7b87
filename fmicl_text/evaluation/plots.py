"""Pictures: training curves, scores of many models, geometry of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: a notebook keeps its backend
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fmicl_text.evaluation.geometry import direction_shares, pair_distances

SCORES = {
    "eval_sts_spearman": "Spearman x 100 on the graded pairs",
    "eval_knn_accuracy": "k-NN accuracy on the held-out images, percent",
}


def plot_training_curve(
    log_history: Sequence[Mapping[str, float]], path: str | Path, title: str, score: str = "eval_sts_spearman"
) -> None:
    """Score, loss, and alignment and uniformity of the training batches against the step, as a PNG.

    Args:
        log_history: `trainer.state.log_history`.
        path: Where to write the picture.
        title: What was run.
        score: The evaluator's first metric, a name in `SCORES`.
    """
    panels = {
        score: SCORES[score],
        "loss": "loss (f-MICL's is minus a bound)",
        "alignment": "alignment of training batches (lower: positives closer)",
        "uniformity": "uniformity of training batches (lower: more spread)",
    }
    figure = Figure(figsize=(10, 6), layout="constrained")
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


def plot_scores(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Scores of `score_rows` as a PNG: a column of points per task, a color per row, bars of one standard deviation;
    hollow points are the paper's."""
    labels = ("model", "protocol", "pooling", "seeds")
    tasks = list(dict.fromkeys(name for row in rows for name in row if name not in labels and "paper" not in name))
    figure = Figure(figsize=(max(6.0, 1.1 * len(tasks) + 3), 4.5), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(rows):
        shift = (i + 1) / (len(rows) + 1) - 0.5
        points = [(tasks.index(task) + 0.7 * shift, *cell_numbers(row[task])) for task in tasks if row.get(task)]
        label = f"{Path(row['model']).name}, {row['protocol']}, {row['pooling']}"
        x, y, deviation = zip(*points, strict=True)
        axis.errorbar(x, y, yerr=deviation, fmt="o", capsize=3, color=f"C{i}", label=label)
        if (paper := row.get("Avg. in the paper, BERT-base")) is not None:
            average = tasks.index("Avg.") + 0.7 * shift
            axis.plot(
                [average], [paper], "o", mfc="none", color=f"C{i}", label=f"{Path(row['model']).name} in the paper"
            )
    axis.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    for boundary in range(1, len(tasks)):
        axis.axvline(boundary - 0.5, color="0.9", linewidth=0.8)
    axis.set_ylabel("Spearman x 100")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=100)


def cell_numbers(cell: str) -> tuple[float, float]:
    """Mean and deviation of what `mean_std` wrote."""
    mean, _, deviation = cell.partition(" ± ")
    return float(mean), float(deviation or 0)


def plot_geometry(
    views: Mapping[str, tuple[Tensor, Tensor]], kernels: Mapping[str, Mapping[str, Any]], path: str | Path, title: str
) -> None:
    """As a PNG, a color per encoder: sorted distances of similar and dissimilar pairs (arXiv 2402.10150, Figure 2),
    the share of the first k directions and, where a flow was fitted, log p(x, y) against squared distance (Figure 1).

    Args:
        views: Embeddings x and y of partners, [N, D] each, by the encoder's name.
        kernels: What `kernel.check_kernel` gave, by the encoder's name; may be empty.
        path: Where to write the picture.
        title: What was embedded.
    """
    figure = Figure(figsize=(16 if kernels else 11, 4.5), layout="constrained")
    distance_axis, direction_axis, *kernel_axis = figure.subplots(1, 3 if kernels else 2)
    for i, (name, (x, y)) in enumerate(views.items()):
        for distances, style in zip(pair_distances(x, y), ("-", "--"), strict=True):
            distance_axis.plot(torch.linspace(0, 100, len(distances)), distances, style, color=f"C{i}")
        shares = 100 * direction_shares(x).cumsum(0)
        direction_axis.plot(range(1, len(shares) + 1), shares, color=f"C{i}", label=name)
        if name in kernels:
            plot_linear_fit(kernel_axis[0], kernels[name]["joint"], f"C{i}", name)
    distance_axis.axhline(2**0.5, color="0.6", linewidth=0.8)
    distance_axis.annotate("at right angles", (2, 2**0.5 + 0.02), color="0.4", fontsize="small")
    distance_axis.plot([], [], "k-", label="similar pairs")
    distance_axis.plot([], [], "k--", label="dissimilar pairs")
    distance_axis.set(xlabel="percent of pairs, sorted", ylabel="distance on the unit sphere", ylim=(0, 2))
    direction_axis.set(xlabel="first k directions", ylabel="percent of the second moment", xscale="log", ylim=(0, 102))
    for axis in kernel_axis:
        axis.set(xlabel="squared distance of partners", ylabel="log p(x, y), by the flow")
    for axis in (distance_axis, direction_axis, *kernel_axis):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def plot_linear_fit(axis: Axes, fit: Mapping[str, Any], color: str, name: str) -> None:
    """Means and deviations of the bins of a `kernel.LinearFit`, and its line."""
    distance = torch.tensor(fit["distance"])
    axis.errorbar(distance, fit["mean"], yerr=fit["deviation"], fmt="o", markersize=4, elinewidth=0.6, color=color)
    label = f"{name}: gamma {fit['gamma']:.1f}, R² {fit['r2_pairs']:.2f} (bins {fit['r2_bins']:.2f})"
    axis.plot(distance, fit["intercept"] - fit["gamma"] * distance, color=color, label=label)
