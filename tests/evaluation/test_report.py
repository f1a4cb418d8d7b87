"""Tables and JSON."""

import json

import pytest

from fmicl_text.cli import compare
from fmicl_text.errors import InputError
from fmicl_text.evaluation.report import (
    SEVEN_TASKS,
    before_after_table,
    library_versions,
    load_results,
    markdown_table,
    named_model,
    score_rows,
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


def test_before_after_table_has_the_metrics_of_both():
    table = before_after_table({"eval_sts_spearman": 60.0, "epoch": 0}, {"eval_sts_spearman": 66.5, "eval_new": 1.0})
    assert table.splitlines()[2:] == ["| sts_spearman | 60.00  | 66.50 | 6.50   |"]


def test_json_is_written_atomically(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Circular"):
        circular = {}
        circular["self"] = circular
        write_json(path, circular)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_versions_include_the_dependencies_of_results():
    assert {"python", "torch", "transformers", "sentence-transformers", "fmicl_text"} <= set(library_versions())


def result(model, task, spearman, name=None, **changes):
    """An entry as eval/sts.py writes it."""
    entry = {"name": name or model, "model": model, "pooling": "cls", "pooling_from": "the model"}
    entry |= {"protocol": "SimCSE", "task": task, "split": "test", "metrics": {"spearman": spearman}}
    return entry | changes


def test_seeds_become_mean_and_deviation():
    """Sample deviation of 70, 71, 73: squares 1.7778 + 0.1111 + 2.7778 over 2, its root 1.5275."""
    rows = score_rows([result(f"run-{i}", "STS13", score, "kl") for i, score in enumerate((70.0, 71.0, 73.0))])
    assert rows == [
        {"model": "kl", "protocol": "SimCSE", "pooling": "cls", "seeds": 3, "STS13": "71.33 ± 1.53"},
    ]


def test_average_only_when_all_seven_are_there():
    seven = [result("a", task, 70.0 + i) for i, task in enumerate(SEVEN_TASKS)]
    assert score_rows(seven)[0]["Avg."] == "73.00"
    assert "Avg." not in score_rows(seven[:-1])[0]
    assert "Avg." not in score_rows([entry | {"protocol": "MTEB 2.0"} for entry in seven])[0]
    assert "Avg." not in score_rows([*seven[:-1], seven[-1] | {"split": "dev"}])[0]
    second_seed = [result("b", task, 72.0 + i, "a") for i, task in enumerate(SEVEN_TASKS)]
    assert score_rows(seven + second_seed)[0]["Avg."] == "74.00 ± 1.41"
    incomplete = score_rows(seven + second_seed[1:])[0]
    assert incomplete["STS12"] is None and "Avg." not in incomplete and incomplete["STS13"] == "72.00 ± 1.41"


def test_the_average_in_the_paper_is_shown_for_the_same_objective():
    def seven(**changes):
        return [result("a", task, 70.0, **changes) for task in SEVEN_TASKS]

    paper = "Avg. in the paper, BERT-base"
    assert score_rows(seven(trained={"objective": "fmicl-kl"}))[0][paper] == 78.02
    assert paper not in score_rows(seven(trained={"objective": "fmicl-jeffrey"}))[0]
    assert paper not in score_rows(seven())[0]
    assert paper not in score_rows(seven(trained={"objective": "fmicl-kl"})[:-1])[0]


def test_protocols_poolings_and_splits_are_kept_apart():
    rows = score_rows(
        [
            result("a", "STS13", 70.0),
            result("a", "STS13", 71.0, protocol="MTEB 2.0"),
            result("a", "STS13", 50.0, pooling="mean", pooling_from="assumed"),
            result("a", "STSBenchmark", 80.0, split="dev"),
        ]
    )
    assert [(row["protocol"], row["pooling"], row.get("STS13")) for row in rows] == [
        ("SimCSE", "cls", "70.00"),
        ("MTEB 2.0", "cls", "71.00"),
        ("SimCSE", "mean (assumed)", "50.00"),
    ]
    assert rows[0]["STSBenchmark (dev)"] == "80.00" and rows[1]["STSBenchmark (dev)"] is None
    with pytest.raises(InputError, match=r"a has two scores for STS13 \(SimCSE\)"):
        score_rows([result("a", "STS13", 70.0), result("a", "STS13", 70.0)])


def test_sets_are_columns_on_request():
    metrics = {"spearman": 70.0, "spearman_mean": 60.0, "spearman_weighted_mean": 65.0}
    metrics["sets"] = {"OnWN": {"spearman": 75.0}}
    entry = result("a", "STS13", 0.0, metrics=metrics)
    assert "STS13: OnWN" not in score_rows([entry])[0]
    row = score_rows([entry], sets=True)[0]
    assert list(row)[3:] == ["STS13", "STS13: OnWN", "STS13: mean", "STS13: weighted mean"]
    assert [row[name] for name in list(row)[3:]] == ["70.00", "75.00", "60.00", "65.00"]


def test_many_files_become_one_table_and_one_plot(tmp_path, monkeypatch, capsys):
    trained = {"objective": "fmicl-kl"}
    seven = [
        [result(f"m{i}", task, 60.0 + 3 * i + k, "kl", trained=trained) for k, task in enumerate(SEVEN_TASKS)]
        for i in range(2)
    ]
    files = [tmp_path / "1.json", tmp_path / "2.json", tmp_path / "3.json"]
    for file, entries in zip(files, [*seven, [result("bert", "STS13", 50.0), {"missing": "x"}]], strict=True):
        write_json(file, entries)
    plot = tmp_path / "scores.png"
    monkeypatch.setattr("sys.argv", ["compare", *map(str, files), "--plot", str(plot)])
    compare.main()
    _, _, kl, bert = capsys.readouterr().out.splitlines()
    assert "| 64.50 ± 2.12 " in kl and "| 78.02 " in kl and "| 50.00 " in bert
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("{", "eval/sts.py or eval/mteb_sts.py"),
        ('[{"metrics": {}}]', "eval/sts.py or eval/mteb_sts.py"),
        ("[1]", "eval/sts.py or eval/mteb_sts.py"),
        ('[{"missing": "x"}]', "no score"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_results(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_names(tmp_path):
    assert named_model("kl=runs/kl-1") == ("kl", "runs/kl-1")
    assert named_model("org/model") == ("org/model", "org/model")
    (tmp_path / "a=b").mkdir()
    assert named_model(str(tmp_path / "a=b")) == (str(tmp_path / "a=b"),) * 2
