"""Plots: the panels that are drawn, their data and labels. Pictures are inspected as matplotlib figures."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from fmicl_text.evaluation import plots
from fmicl_text.evaluation.kernel import linear_fit
from fmicl_text.evaluation.plots import plot_geometry, plot_scaling, plot_scores, plot_training_curve

HISTORY = [
    {"step": 0, "eval_sts_spearman": 60.0, "eval_sts_pearson": 61.0},
    *({"step": 5 * i, "loss": -4.0 - i, "alignment": 0.1, "uniformity": -1.9, "grad_norm": 1.0} for i in range(1, 11)),
    {"step": 50, "eval_sts_spearman": 66.25, "eval_sts_pearson": 68.0},
    {"step": 50, "train_loss": -9.0, "train_runtime": 1.0},
]
PANELS = ["STS score", "Training loss", "Alignment of training batches", "Uniformity of training batches"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def record(figure, path, **kwargs):
        save(figure, path, **kwargs)
        assert path.read_bytes()[:4] == b"\x89PNG"
        figures.append(figure)

    monkeypatch.setattr(plots.Figure, "savefig", record)
    return figures


def titles(figure):
    return [axis.get_title("left") for axis in figure.axes]


def texts(axis):
    return " | ".join(text.get_text() for text in axis.texts)


def test_training_curve_shows_score_before_and_after_and_the_change_of_the_loss(tmp_path, drawn):
    plot_training_curve(HISTORY, tmp_path / "curve.png", "kl, seed 1", "eval_sts_spearman")
    (figure,) = drawn
    assert titles(figure) == PANELS and figure.get_suptitle() == "kl, seed 1"
    score, loss, *_ = figure.axes
    assert (
        "before training: 60" in texts(score) and "66.25 (+6.25)" in texts(score) and "higher is better" in texts(score)
    )
    logged, smoothed = loss.get_lines()
    assert list(logged.get_xdata()) == [5 * i for i in range(1, 11)]
    assert list(logged.get_ydata()) == [-i for i in range(10)]
    assert list(smoothed.get_ydata()) == pytest.approx([-0.5, *(-i for i in range(1, 9)), -8.5])
    assert "-5 at step 5" in texts(loss)
    assert len({axis.get_xlim() for axis in figure.axes}) == 1


def without(*keys):
    return [{key: value for key, value in entry.items() if key not in keys} for entry in HISTORY]


@pytest.mark.parametrize(
    "history, panels",
    [
        (without("eval_sts_spearman", "eval_sts_pearson"), PANELS[1:]),
        (without("alignment", "loss"), [PANELS[0], PANELS[3]]),
        (HISTORY[:1], PANELS[:1]),
        (HISTORY[1:2], PANELS[1:]),
        ([], [""]),
        ([{"step": 3, "loss": math.nan}], [""]),
    ],
    ids=["no evaluator", "missing keys", "one evaluation", "one log", "nothing logged", "nothing finite"],
)
def test_training_curve_draws_what_was_logged(tmp_path, drawn, history, panels):
    plot_training_curve(history, tmp_path / "curve.png", "title")
    assert titles(drawn[0]) == panels


def test_any_metric_name_is_drawn(tmp_path, drawn):
    name = "eval_nli-dev_MAP@10"
    history = [{"step": 0, "eval_runtime": 1.0, name: 0.5}, {"step": 10, "eval_runtime": 1.0, name: 0.25}]
    for score in (name, None):
        plot_training_curve(history, tmp_path / "curve.png", "title", score)
    for figure in drawn:
        assert titles(figure) == ["nli-dev_MAP@10"]
        assert "before training: 0.5" in texts(figure.axes[0]) and "0.25 (-0.25)" in texts(figure.axes[0])
        assert "better" not in texts(figure.axes[0])  # unknown


def test_scores_have_a_point_per_task_and_hollow_ones_for_the_paper(tmp_path, drawn):
    rows = [
        {
            "model": "runs/kl",
            "protocol": "SimCSE",
            "pooling": "cls",
            "seeds": 3,
            "STS13": "70.00 ± 1.00",
            "Avg.": "71.00",
        },
        {"model": "bert", "protocol": "SimCSE", "pooling": "mean (assumed)", "seeds": 1, "STS13": None},
    ]
    rows[0]["Avg. in the paper, BERT-base"] = 78.02
    plot_scores(rows, tmp_path / "scores.png")
    (axis,) = drawn[0].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["STS13", "Avg."]
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["kl, SimCSE, cls", "kl in the paper (BERT-base)"]


@pytest.mark.slow
def test_geometry_has_a_panel_for_the_kernel_if_there_is_one(tmp_path, drawn):
    x, y = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
    kernel = {"joint": linear_fit(torch.linspace(0, 1, 60), torch.linspace(3, 1, 60))._asdict()}
    for kernels in ({}, {"js": kernel}):
        plot_geometry({"before": (x, y), "js": (x, x + 0.1 * y)}, kernels, tmp_path / "geometry.png", "title")
    assert [len(figure.axes) for figure in drawn] == [2, 3]
    assert [text.get_text() for text in drawn[1].legends[0].get_texts()] == ["before", "js"]
    (label,) = (text.get_text() for text in drawn[1].axes[2].get_legend().get_texts())
    assert label == "js: gamma 2.0, R² 1.00 (bins 1.00)"


def test_scaling_skips_missing_values(tmp_path, drawn):
    rows = [
        {"implementation": "a", "N": 8, "ms": 1.0, "peak MiB": 2.0},
        {"implementation": "a", "N": 16, "ms": 4.0, "peak MiB": 4.0},
        {"implementation": "b", "N": 8, "ms": None, "peak MiB": None},
    ]
    plot_scaling(rows, tmp_path / "plot.png", "title")
    for axis in drawn[0].axes:
        (line,) = axis.get_lines()
        assert line.get_label() == "a" and list(line.get_xdata()) == [8, 16]
