"""Pictures are written, whatever there is to show."""

from fmicl_text.evaluation.plots import plot_training_curve


def test_training_curve_is_a_picture(tmp_path):
    history = [
        {"step": 0, "eval_sts_spearman": 60.0},
        {"step": 5, "loss": -3.0, "alignment": 0.2, "uniformity": -1.5},
        {"step": 10, "loss": -4.0, "alignment": 0.1, "uniformity": -1.9},
        {"step": 10, "eval_sts_spearman": 66.0},
    ]
    plot_training_curve(history, tmp_path / "curve.png", "kl, seed 1")
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    plot_training_curve([], tmp_path / "empty.png", "nothing logged")
