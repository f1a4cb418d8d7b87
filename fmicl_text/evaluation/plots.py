"""Plots: training curves, scores of several models, geometry of embeddings, scaling of run time and memory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which could change the backend of a notebook
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from torch import Tensor

from fmicl_text.evaluation.geometry import direction_shares, pair_distances
from fmicl_text.evaluation.report import PAPER_COLUMN, ROW_LABELS, SETTINGS

LABELS = {  # title and explanation of panels
    "eval_sts_spearman": ("STS score", "Spearman x 100 on the evaluation pairs, higher is better"),
    "eval_cosine_ndcg@10": ("NDCG@10", "search in the evaluation data, from 0 to 1, higher is better"),
    "eval_held_out_nats": ("Held-out texts", "mutual information of texts and some of their words, higher is better"),
    "eval_knn_accuracy": ("k-NN accuracy", "percent of the evaluation images, higher is better"),
    "eval_view_retrieval": ("View retrieval", "percent of images next to their other view, higher is better"),
    "alignment": ("Alignment of training batches", "squared distance of positive pairs, lower: closer together"),
    "uniformity": ("Uniformity of training batches", "log mean Gaussian potential, lower: embeddings more spread out"),
}
MIN_SMOOTHED = 6  # logged values; fewer are not smoothed


def save_figure(figure: Figure, path: str | Path, **options: Any) -> None:
    """Write a figure to a file, which keeps its old content if the disk is full."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        figure.savefig(temporary, **options)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plot_training_curve(
    log_history: Sequence[Mapping[str, float]], path: str | Path, title: str, score: str | None = None
) -> None:
    """Plot the evaluation metric, the loss, and alignment and uniformity of the training batches over steps.

    Quantities that were not logged are omitted.

    Args:
        log_history: `trainer.state.log_history`.
        path: PNG file to write.
        title: Title of the figure, such as the objective.
        score: Metric of the evaluator as logged, `eval_<name>`. By default the first one in the history.
    """
    score = score or next((key for entry in log_history for key in entry if is_metric(key)), None)
    panels = {key: logged_values(log_history, key) for key in (score, "loss", "alignment", "uniformity") if key}
    panels = {key: points for key, points in panels.items() if points[0]}
    rows, columns = (2, 2) if len(panels) == 4 else (1, max(len(panels), 1))
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    if not panels:
        figure.axes[0].text(0.5, 0.5, "no values were logged", ha="center", transform=figure.axes[0].transAxes)
    for axis, (key, (steps, values)) in zip(axes, panels.items(), strict=False):
        if key == score:
            plot_metric(axis, key, steps, values)
        elif key == "loss":
            start = f"change from {values[0]:,.6g} at step {steps[0]}"
            title_panel(axis, "Training loss", f"{start}, lower is better")
            plot_smoothed(axis, steps, [value - values[0] for value in values])
        else:
            title_panel(axis, *LABELS[key])
            plot_smoothed(axis, steps, values)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axis.set_xlim(*step_range(panels))
    figure.suptitle(title)
    save_figure(figure, path, dpi=100, metadata={"Software": "fmicl_text"})


def is_metric(key: str) -> bool:
    """Whether a key of the log is a metric of the evaluator, and not a timing of the evaluation itself."""
    return key.startswith("eval_") and not key.endswith(("_runtime", "_per_second"))


def logged_values(log_history: Sequence[Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, without non-finite values."""
    points = [(int(entry["step"]), entry[key]) for entry in log_history if key in entry and math.isfinite(entry[key])]
    return [step for step, _ in points], [value for _, value in points]


def step_range(panels: Mapping[str, tuple[list[int], list[float]]]) -> tuple[float, float]:
    """Limits of the step axis that all panels share."""
    steps = [step for steps, _ in panels.values() for step in steps]
    margin = 0.04 * (max(steps) - min(steps)) or 1
    return min(steps) - margin, max(steps) + margin


def title_panel(axis: Axes, title: str, explanation: str) -> None:
    """Set the title of a panel, with an explanation in a smaller font."""
    axis.set_title(title, loc="left", fontsize="medium", fontweight="bold", pad=20)
    axis.text(0, 1.03, explanation, transform=axis.transAxes, fontsize="small", color="0.35")


def plot_metric(axis: Axes, name: str, steps: Sequence[int], values: Sequence[float]) -> None:
    """Plot a metric of the evaluator, with its first and last value and the change."""
    title_panel(axis, *LABELS.get(name, (name.removeprefix("eval_"), "metric of the evaluator")))
    axis.axhline(values[0], color="0.6", linewidth=1, linestyle="--")
    axis.plot(steps, values, marker="o", markersize=4)
    axis.margins(y=0.2)
    when = "before training" if steps[0] == 0 else f"step {steps[0]}"
    rises = values[-1] >= values[0]
    label_point(axis, steps[0], values[0], f"{when}: {values[0]:.4g}", above=not rises, color="0.35", fontsize="small")
    if len(values) > 1:
        text = f"{values[-1]:.4g} ({values[-1] - values[0]:+.3g})"
        label_point(axis, steps[-1], values[-1], text, above=rises, ha="right", fontweight="bold")


def label_point(axis: Axes, x: float, y: float, text: str, above: bool, **style: Any) -> None:
    """Write text above or below a point."""
    style |= {"xytext": (0, 6 if above else -6), "textcoords": "offset points", "va": "bottom" if above else "top"}
    axis.annotate(text, (x, y), **style)


def plot_smoothed(axis: Axes, steps: Sequence[int], values: Sequence[float]) -> None:
    """Plot logged values, faint behind their centered moving average if there are enough of them."""
    if len(values) < MIN_SMOOTHED:
        axis.plot(steps, values, marker="o", markersize=4)
        return
    half = max(1, min(len(values) // 10, 10))
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    means, label = [sum(window) / len(window) for window in windows], f"moving average of {2 * half + 1}"
    marker = "o" if len(values) < 50 else ""
    axis.plot(steps, values, marker=marker, markersize=3, color="C0", alpha=0.3, label="logged")
    axis.plot(steps, means, color="C0", linewidth=2, label=label)
    axis.legend(fontsize="small")


def plot_scores(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Plot the scores of `score_rows`: a column per task, a color per row, error bars of one standard deviation. Hollow
    points are the averages in the paper."""
    tasks = list(dict.fromkeys(name for row in rows for name in row if name not in (*ROW_LABELS, PAPER_COLUMN)))
    figure = Figure(figsize=(max(6.0, 1.1 * len(tasks) + 3), 4.5), layout="constrained")
    axis, handles = figure.subplots(), list[Any]()
    title_panel(axis, "Scores", "higher is better; error bars: standard deviation over seeds")
    for i, row in enumerate(rows):
        shift = 0.7 * ((i + 1) / (len(rows) + 1) - 0.5)
        points = [(tasks.index(task) + shift, *cell_numbers(row[task])) for task in tasks if row.get(task)]
        if not points:
            continue
        name = Path(row["model"]).name
        x, y, deviation = zip(*points, strict=True)
        settings = [f"{key} {row[key]}" for key in SETTINGS if row.get(key)]
        label = ", ".join([name, row["protocol"], row["pooling"], *settings])
        handles.append(axis.errorbar(x, y, yerr=deviation, fmt="o", capsize=3, color=f"C{i}", label=label))
        if (paper := row.get(PAPER_COLUMN)) is not None:
            average = tasks.index("Avg.") + shift
            label = f"{name} in the paper (BERT-base)"
            handles += axis.plot([average], [paper], "o", mfc="none", color=f"C{i}", label=label)
    axis.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axis.set_xlim(-0.5, len(tasks) - 0.5)
    for boundary in range(1, len(tasks)):
        axis.axvline(boundary - 0.5, color="0.9", linewidth=0.8)
    named = any(task.endswith(")") for task in tasks)
    axis.set_ylabel("Spearman x 100, or the metric in parentheses" if named else "Spearman x 100")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(handles=handles, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save_figure(figure, path, dpi=100)


def cell_numbers(cell: str) -> tuple[float, float]:
    """Mean and standard deviation in a cell that `mean_std` formatted."""
    mean, _, deviation = cell.partition(" ± ")
    return float(mean), float(deviation or 0)


def plot_geometry(
    views: Mapping[str, tuple[Tensor, Tensor]], kernels: Mapping[str, Mapping[str, Any]], path: str | Path, title: str
) -> None:
    """Plot the geometry of embeddings, one color per encoder.

    The panels are the sorted distances of similar and dissimilar pairs (arXiv 2402.10150, Figure 2), the cumulative
    explained second moment and, if there are `kernels`, log p(x, y) against the squared distance (Figure 1).

    Args:
        views: Embeddings x and y [N, D] of positive pairs, by name of the encoder.
        kernels: Results of `kernel.check_kernel` by name of the encoder; may be empty.
        path: PNG file to write.
        title: Title of the figure, such as the data.
    """
    figure = Figure(figsize=(16 if kernels else 11, 4.8), layout="constrained")
    distance_axis, direction_axis, *kernel_axis = figure.subplots(1, 3 if kernels else 2)
    title_panel(distance_axis, "Distances", "good: solid far below dashed; collapse: both near 0")
    title_panel(direction_axis, "Spread over directions", "the later a curve rises, the more dimensions are used")
    encoders = []
    for i, (name, (x, y)) in enumerate(views.items()):
        line = {"color": f"C{i}", "linewidth": 3 - 1.5 * (i + 1) / len(views)}  # coinciding curves stay visible
        for distances, style in zip(pair_distances(x, y), ("-", "--"), strict=True):
            distance_axis.plot(torch.linspace(0, 100, len(distances)), distances, style, **line)
        shares = 100 * direction_shares(x).cumsum(0)
        encoders += direction_axis.plot(range(1, len(shares) + 1), shares, label=name, **line)
        if name in kernels:
            plot_linear_fit(kernel_axis[0], kernels[name]["joint"], f"C{i}", name)
    distance_axis.axhline(2**0.5, color="0.6", linewidth=0.8)
    distance_axis.annotate("orthogonal", (1, 2**0.5 + 0.02), color="0.4", fontsize="small")
    distance_axis.plot([], [], "k-", label="similar pairs")
    distance_axis.plot([], [], "k--", label="dissimilar pairs")
    distance_axis.set(xlabel="pairs (percentile)", ylabel="distance on the unit sphere", ylim=(0, 2.02))
    direction_axis.set(xlabel="number of directions", ylabel="cumulative explained second moment (%)", ylim=(0, 102))
    direction_axis.set_xscale("log", base=2)
    direction_axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in kernel_axis:
        title_panel(axis, "Gaussian kernel", "a straight line with slope -gamma: the assumption holds")
        axis.set(xlabel="squared distance of positive pairs", ylabel="log p(x, y), estimated by the flow")
    for axis in (distance_axis, direction_axis, *kernel_axis):
        axis.grid(alpha=0.3)
    for axis in (distance_axis, *kernel_axis):
        axis.legend(fontsize="small")
    figure.legend(handles=encoders, loc="outside lower center", ncols=min(len(views), 8))
    figure.suptitle(title)
    save_figure(figure, path, dpi=100)


def plot_linear_fit(axis: Axes, fit: Mapping[str, Any], color: str, name: str) -> None:
    """Plot the bins of a `kernel.LinearFit`, mean and standard deviation, and its line."""
    distance = torch.tensor(fit["distance"])
    axis.errorbar(distance, fit["mean"], yerr=fit["deviation"], fmt="o", markersize=4, elinewidth=0.6, color=color)
    label = f"{name}: gamma {fit['gamma']:.1f}, R² {fit['r2_pairs']:.2f} (bins {fit['r2_bins']:.2f})"
    axis.plot(distance, fit["intercept"] - fit["gamma"] * distance, color=color, label=label)


def plot_scaling(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Plot run time and peak memory against N on logarithmic axes, one line per implementation.

    Args:
        rows: {implementation, N, ms, peak MiB}; values that are missing or None are not drawn.
        path: PNG file to write.
        title: Title of the figure, such as the settings.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = {
        "ms": ("Time", "forward and backward pass", "milliseconds"),
        "peak MiB": ("Peak memory", "in addition to the inputs", "MiB"),
    }
    sizes = sorted({row["N"] for row in rows})
    for axis, (key, (name, explanation, unit)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for implementation in dict.fromkeys(row["implementation"] for row in rows):
            points = [(row["N"], row[key]) for row in rows if row["implementation"] == implementation and row.get(key)]
            if points:
                style = "--" if implementation == "lower bound" else "-"
                axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=implementation)
        axis.set(xscale="log", yscale="log", xlabel="N (examples in the batch)", ylabel=unit)
        axis.xaxis.set_major_locator(FixedLocator(sizes))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", rotation=30)
        axis.grid(alpha=0.3)
        title_panel(axis, name, explanation)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path, dpi=100)
