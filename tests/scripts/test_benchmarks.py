"""The benchmark scripts with minimal settings: tables, JSON files and plots."""

import json
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import sentences

EVAL = Path(__file__).parent.parent.parent / "eval"


def run(script, *flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    runpy.run_path(str(EVAL / script), run_name="__main__")


@pytest.mark.slow
def test_loss_benchmark(tmp_path, monkeypatch, capsys):
    flags = ["--sizes", 64, 32, "--dim", 8, "--repeats", 2, "--block_size", 16, "--max_memory", "5e-5"]
    run(
        "loss_benchmark.py",
        *flags,
        "--output",
        tmp_path / "r.json",
        "--plot",
        tmp_path / "r.png",
        monkeypatch=monkeypatch,
    )
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["N"], row["implementation"]) for row in rows[:2]] == [(32, "blockwise"), (32, "plain")]
    assert {row["implementation"]: row["skipped"] for row in rows if row["N"] == 64}["MNRL"].startswith("would need")
    kept = [row for row in rows if row["skipped"] is None]
    assert len(kept) == 6 + 3 and all(row["ms"] > 0 and len(row["rounds"]) == 2 for row in kept)
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert "| blockwise" in capsys.readouterr().out


@pytest.mark.slow
def test_throughput(tmp_path, monkeypatch, capsys, bert_folder):
    (tmp_path / "text.txt").write_text("\n".join(sentences(60)), encoding="utf-8")
    flags = [
        "--model",
        bert_folder,
        "--train_file",
        tmp_path / "text.txt",
        "--batch_size",
        4,
        "--steps",
        2,
        "--warmup",
        1,
    ]
    options = ["--options", "FMICLTrainer", "FMICLTrainer, mini_batch_size 16", "FMICLTrainer, torch's dropout"]
    monkeypatch.setattr("fmicl_text.training.args.FMICLTrainingArguments.check_ranges", lambda args: None)
    run("throughput.py", *flags, "--rounds", 1, *options, "--output", tmp_path / "r.json", monkeypatch=monkeypatch)
    table = json.loads((tmp_path / "r.json").read_text())["table"]
    assert [row["trainer"] for row in table] == ["SentenceTransformerTrainer", *options[1:]]
    assert all(row["tokens/s"] > row["sentences/s"] > 0 for row in table)
    assert all(0 < row["share of the limit"] < 1 for row in table)


@pytest.mark.slow
def test_throughput_of_a_size(tmp_path, monkeypatch, capsys):
    """An encoder with random weights, on joined sentences."""
    (tmp_path / "text.txt").write_text("\n".join(sentences(60)), encoding="utf-8")
    flags = ["--size", "minilm", "--texts", "mixed", "--train_file", tmp_path / "text.txt", "--batch_size", 4]
    flags += [
        "--steps",
        1,
        "--warmup",
        1,
        "--rounds",
        1,
        "--options",
        "FMICLTrainer",
        "FMICLTrainer, random batches, padded",
    ]
    run("throughput.py", *flags, "--output", tmp_path / "r.json", monkeypatch=monkeypatch)
    table = json.loads((tmp_path / "r.json").read_text())["table"]
    assert [row["trainer"] for row in table][1:] == ["FMICLTrainer", "FMICLTrainer, random batches, padded"]


@pytest.mark.slow
def test_communication(monkeypatch, capsys, tmp_path):
    """16 processes: the gradient of one, all rows held by `gather` and those of three processes by `ring`."""
    flags = ["--processes", 3, 16, "--rows", 4, "--width", 512, "--output", tmp_path / "r.json"]
    run("communication.py", *flags, monkeypatch=monkeypatch)
    rows = {(row["loss"], row["processes"]): row for row in json.loads((tmp_path / "r.json").read_text())["table"]}
    own = 4 * 512 * 4 / 2**20
    for (name, processes), row in rows.items():
        assert float(row["difference to one process"]) < 1e-12
        assert row["sent, forward (MiB)"] == pytest.approx((processes - 1) * own, rel=0.1)
        assert row["held (MiB)"] == pytest.approx(
            min(3 if "ring" in name else processes, processes - 1) * own, rel=0.15
        )
        backward = 2 * (processes - 1) * own if "InfoNCE" in name else 0
        assert row["sent, backward (MiB)"] == pytest.approx(backward, rel=0.1)


@pytest.mark.slow
def test_batch_memory(monkeypatch, capsys, tmp_path):
    run(
        "batch_memory.py",
        "--batches",
        4,
        "--mini_batch_size",
        2,
        "--output",
        tmp_path / "r.json",
        monkeypatch=monkeypatch,
    )
    (row,) = json.loads((tmp_path / "r.json").read_text())["table"]
    assert row["batch"] == 4 and row["other / first"] == 1.0


@pytest.mark.slow
def test_batch_bias(monkeypatch, capsys, tmp_path):
    """With one part, the error is 0. The average of f-MICL over all partitions of 4 rows into two pairs is its
    gradient, and that of InfoNCE is not."""
    flags = ["--batch", 4, "--micro_batches", 2, 4, "--partitions", 1, 200, "--output", tmp_path / "r.json"]
    run("batch_bias.py", *flags, "--plot", tmp_path / "r.png", monkeypatch=monkeypatch)
    table = json.loads((tmp_path / "r.json").read_text())["table"]
    errors = {(row["micro-batch"], row["loss"]): row for row in table}
    assert all(errors[4, name]["1"] < 1e-4 for name in ("kl", "pearson", "alignment + uniformity", "InfoNCE"))
    assert errors[2, "kl"]["200"] < 0.2 < errors[2, "InfoNCE"]["200"]
    assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.parametrize("kornia", [True, False])
def test_views_benchmark(tmp_path, monkeypatch, capsys, kornia):
    """Rows: views of this package twice, PIL, and kornia if it is installed."""
    if not kornia:
        monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    elif not find_spec("kornia"):
        pytest.skip("kornia is not installed")
    flags = ["--batch", 8, "--rounds", 2, "--size", 16, "--output", tmp_path / "r.json"]
    run("views_benchmark.py", *flags, monkeypatch=monkeypatch)
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["seconds"]) == 3 + kornia and all(len(taken) == 2 for taken in result["seconds"].values())
    printed = capsys.readouterr().out
    assert ("kornia is not installed" in printed) != kornia and "| PIL, one image at a time |" in printed
