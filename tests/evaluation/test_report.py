"""Tables and JSON."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from fmicl_text import FMICLLoss, FMICLTrainingArguments
from fmicl_text.cli import compare
from fmicl_text.errors import InputError
from fmicl_text.evaluation.report import (
    PAPER_COLUMN,
    PAPER_STS_AVERAGE,
    SEVEN_TASKS,
    before_after_table,
    library_versions,
    load_results,
    markdown_table,
    named_model,
    score_rows,
    write_json,
)
from fmicl_text.losses.divergences import tsallis

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs" / "text"
ARGUMENTS = {item.name for item in fields(FMICLTrainingArguments)}


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


# What eval/sts.py reports of a run of recipes/configs/text/bert-base-kl.yaml.
PAPER_RUN = {
    "objective": "fmicl-kl",
    "base_model": "google-bert/bert-base-uncased",
    "hyperparameters": FMICLLoss("kl", 20.0, 409600.0, global_batch="gather").hyperparameters,
    "processes": 1,
    "data": {"rows": 999_990, "blank rows skipped": 10},
    "settings": {"train_file": "data/wiki1m_for_simcse.txt", "pooling": "cls", "head": "simcse", "max_seq_length": 32,
                 "per_device_train_batch_size": 64, "learning_rate": 3e-5, "num_train_epochs": 1.0},
}  # fmt: skip


def seven(trained=None, **changes):
    trained = {} if trained is None else {"trained": trained}
    return [result("a", task, 70.0, **trained, **changes) for task in SEVEN_TASKS]


def other(**settings):
    return PAPER_RUN | {"settings": PAPER_RUN["settings"] | settings}


def test_the_average_in_the_paper_is_shown_for_its_setting():
    assert score_rows(seven(PAPER_RUN))[0][PAPER_COLUMN] == 78.02
    file = PAPER_RUN["settings"]["train_file"]
    assert score_rows(seven(other(train_file=[file])))[0][PAPER_COLUMN] == 78.02  # as --train_file is recorded
    two = PAPER_RUN | {"processes": 2, "settings": other(per_device_train_batch_size=32)["settings"]}
    assert score_rows(seven(two))[0][PAPER_COLUMN] == 78.02
    for objective, published in PAPER_STS_AVERAGE.items():
        config = yaml.safe_load((CONFIGS / f"bert-base-{objective.removeprefix('fmicl-')}.yaml").read_text())
        args = FMICLTrainingArguments(**{name: value for name, value in config.items() if name in ARGUMENTS})
        run = PAPER_RUN | {"objective": args.objective_name, "hyperparameters": args.build_loss().hyperparameters}
        run |= {"base_model": config["model_name_or_path"]}
        settings = {name: value for name, value in config.items() if name in PAPER_RUN["settings"]}
        assert args.objective_name == objective
        assert score_rows(seven(run | {"settings": settings}))[0][PAPER_COLUMN] == published


DIFFERENT = {
    "no run": None,
    "an objective without a published score": PAPER_RUN | {"objective": "fmicl-jeffrey"},
    "a small model": PAPER_RUN | {"base_model": "prajjwal1/bert-tiny"},
    "a local model": PAPER_RUN | {"base_model": None},
    "another alpha": PAPER_RUN | {"hyperparameters": FMICLLoss("kl", 20.0, 4096.0).hyperparameters},
    "cross view": PAPER_RUN
    | {"hyperparameters": FMICLLoss("kl", 20.0, 409600.0, negatives="cross_view").hyperparameters},
    "cosine": PAPER_RUN | {"hyperparameters": FMICLLoss("kl", similarity="cosine").hyperparameters},
    "another order": PAPER_RUN
    | {"objective": "fmicl-tsallis", "hyperparameters": FMICLLoss(tsallis(2.0)).hyperparameters},
    "less data": PAPER_RUN | {"data": {"rows": 100_000}},
    "other data": other(train_file="other.txt"),
    "prompts": PAPER_RUN | {"data": PAPER_RUN["data"] | {"prompts": "'q: '"}},
    "two files": other(train_file=["wiki1m_for_simcse.txt", "other.txt"]),
    "a larger batch": other(per_device_train_batch_size=128),
    "more processes": PAPER_RUN | {"processes": 8},
    "longer texts": other(max_seq_length=64),
    "no head": other(head="none"),
    "another rate": other(learning_rate=1e-5),
    "more epochs": other(num_train_epochs=3.0),
    "few steps": other(max_steps=60),
    "adapters": other(lora_rank=8),
    "an older record": {"objective": "fmicl-kl", "seed": 1, "head": "simcse"},
}


@pytest.mark.parametrize("trained", DIFFERENT.values(), ids=DIFFERENT)
def test_the_average_in_the_paper_is_not_shown_beside_what_differs(trained):
    assert PAPER_COLUMN not in score_rows(seven(trained))[0]


@pytest.mark.parametrize("change", [{"pooling": "mean"}, {"prompt": "q: "}, {"truncate_dim": 64}, {"head": ["Dense"]}])
def test_nor_beside_another_evaluation(change):
    assert PAPER_COLUMN not in score_rows(seven(PAPER_RUN, **change))[0]
    assert PAPER_COLUMN not in score_rows(seven(PAPER_RUN)[:-1])[0]


def test_settings_that_differ_are_columns_and_keep_rows_apart():
    """The same name with another prompt, number of dimensions or tokens is not another seed."""
    changes = [{}, {"prompt": "query: "}, {"truncate_dim": 64}, {"max_seq_length": 32}, {"precision": "bfloat16"}]
    common = {"prompt": None, "truncate_dim": None, "max_seq_length": 128, "precision": "float32"}
    rows = score_rows([result(f"m{i}", "STS13", 70.0 + i, "kl", **common | one) for i, one in enumerate(changes)])
    assert [row["STS13"] for row in rows] == ["70.00", "71.00", "72.00", "73.00", "74.00"]
    assert list(rows[0]) == ["model", "protocol", "pooling", "prompt", "dimensions", "tokens", "precision", "STS13"]
    assert rows[1]["prompt"] == '"query: "' and rows[2]["dimensions"] == "64" and rows[3]["tokens"] == "32"
    same = score_rows([result("m", "STS13", 70.0, **common)])[0]
    assert list(same) == ["model", "protocol", "pooling", "STS13"]
    assert list(score_rows([result("m", "STS13", 70.0, **common | {"prompt": "q: "})])[0])[3] == "prompt"


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
    scored = [
        [result(f"m{i}", task, 60.0 + 3 * i + k, "kl", trained=PAPER_RUN) for k, task in enumerate(SEVEN_TASKS)]
        for i in range(2)
    ]
    files = [tmp_path / "1.json", tmp_path / "2.json", tmp_path / "3.json"]
    for file, entries in zip(files, [*scored, [result("bert", "STS13", 50.0), {"missing": "x"}]], strict=True):
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
