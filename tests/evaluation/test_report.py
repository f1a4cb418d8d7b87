"""Tables, JSON and the training curve."""

import json

import pytest

from fmicl_text.evaluation.report import (
    before_after_table,
    library_versions,
    markdown_table,
    plot_training_curve,
    write_json,
)


def test_markdown_table_is_aligned_and_a_missing_value_is_empty():
    table = markdown_table([{"model": "a", "STS-B": 61.237}, {"model": "longer", "SICK": 3}])
    assert table.splitlines() == [
        "| model  | STS-B | SICK |",
        "|--------|-------|------|",
        "| a      | 61.24 |      |",
        "| longer |       | 3    |",
    ]


def test_before_after_table_holds_what_both_hold():
    table = before_after_table({"eval_sts_spearman": 60.0, "epoch": 0}, {"eval_sts_spearman": 66.5, "eval_new": 1.0})
    assert table.splitlines()[2:] == ["| sts_spearman | 60.00  | 66.50 | 6.50   |"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Circular"):
        circular = {}
        circular["self"] = circular
        write_json(path, circular)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_versions_name_what_a_result_depends_on():
    assert {"python", "torch", "transformers", "sentence-transformers", "fmicl_text"} <= set(library_versions())


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
