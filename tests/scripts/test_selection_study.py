"""The study of scores without labels: its settings, its table by hand, and a small run that is continued."""

import importlib.util
import json
import sys
from itertools import product
from pathlib import Path

import pytest

from fmicl_text.errors import InputError
from tests.support import sentences, write_recipe_data

PATH = Path(__file__).parent.parent.parent / "eval" / "selection_study.py"


@pytest.fixture
def study():
    spec = importlib.util.spec_from_file_location("selection_study", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.*uniformity")
def test_settings_are_drawn_by_the_name_of_the_run(study):
    cells = list(product(study.OBJECTIVES, ("small", "minilm"), ("stsb", "wiki")))
    settings = [study.settings_of(*cell, 0) for cell in cells]
    assert settings == [study.settings_of(*cell, 0) for cell in cells]
    assert settings != [study.settings_of(*cell, 1) for cell in cells]
    assert {one["views"] for one in settings} == {"dropout", "crops"}
    names = {study.loss_of(one).objective_name for one in settings}
    f_micl = ("kl", "js", "pearson", "vlc", "sh", "tsallis")
    assert names == {*(f"fmicl-{name}" for name in f_micl), "infonce", "align_uniform"}
    assert {one["learning_rate"] for one in settings} == set(study.RATES)


def checkpoint(sts, good, spread, cosines=(0.1, 0.2, 0.3)):
    return {"sts": sts, "scores": {"good": good, "uniformity": spread}, "cosines": list(cosines)}


def test_the_table_by_hand(study):
    """Two runs from one encoder. Lower uniformity is better."""
    better = [checkpoint(65, 2, 0), checkpoint(63, 1.5, -2)]
    worse = [checkpoint(50, 0, 1, (3, 2, 1)), checkpoint(55, 0.5, 2)]
    start = {"settings": None, "checkpoints": [checkpoint(60, 1, -1)]}
    runs = [
        {"model": "m", "text": "t", **start},
        {"model": "m", "text": "t", "settings": {}, "checkpoints": better},
        {"model": "m", "text": "t", "settings": {}, "checkpoints": worse},
        {"model": "m", "text": "no runs", **start},
    ]
    rows = {row["score"]: row for row in study.summary(runs)}
    assert rows["good"]["m, t"] == pytest.approx(1) and rows["good"]["mean"] == pytest.approx(1)
    assert rows["good"]["regret in a run"] == rows["good"]["regret over all"] == 0
    uniform = rows["uniformity"]  # chooses 63 where 65 is best, and 60, which is
    assert uniform["regret in a run"] == 1 and uniform["largest regret in a run"] == 2
    assert uniform["regret over all"] == 2 and uniform["m, t"] == pytest.approx(0.6)
    assert rows["(the last checkpoint)"]["regret in a run"] == (2 + 5) / 2
    assert rows["(the encoder as it came)"]["regret in a run"] == 5 / 2
    assert rows["agrees with the encoder as it came"]["m, t"] < 1
    assert next(iter(rows)) == "good" and "m, no runs" not in rows["good"]


def run(study, monkeypatch, folder, *flags):
    argv = ["--output_dir", str(folder / "out"), *flags]
    monkeypatch.setattr(sys, "argv", ["selection_study.py", *argv])
    study.main()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*uniformity")
def test_a_run_is_continued(study, bert_folder, tmp_path, monkeypatch, capsys):
    write_recipe_data(tmp_path)
    (tmp_path / "a.txt").write_text("\n".join(f"{text} {text}" for text in sentences(60)))
    data = ["--model", f"tiny={bert_folder}", "--text", f"a={tmp_path / 'a.txt'}"]
    data += ["--sts_dev_file", str(tmp_path / "dev.tsv"), "--num_texts", "12", "--steps", "3"]
    monkeypatch.setattr(study, "OBJECTIVES", ("kl", "infonce"))
    monkeypatch.setattr(study, "BATCH", 8)
    run(study, monkeypatch, tmp_path, *data)
    first = capsys.readouterr().out
    assert "7 checkpoints of 3 runs" in first and "| MRR, halves" in first and "| effective rank" in first
    out = tmp_path / "out"
    result = json.loads((out / "selection.json").read_text())
    assert result["checkpoints"] == 7 and all(row["regret in a run"] >= 0 for row in result["rows"])
    (out / "run-tiny-a-kl.json").unlink()
    run(study, monkeypatch, tmp_path, *data)
    assert capsys.readouterr().out == first  # the same numbers again
    run(study, monkeypatch, tmp_path, "--table")
    assert capsys.readouterr().out == first
    with pytest.raises(InputError, match=r"run-tiny-a-before\.json is a run with other options"):
        run(study, monkeypatch, tmp_path, *data[:-1], "6")


def test_mistakes(study, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no finished runs"):
        run(study, monkeypatch, tmp_path, "--table")
    (tmp_path / "short.txt").write_text("\n".join(["two words"] * 50))
    write_recipe_data(tmp_path)
    flags = ["--model", "m", "--text", str(tmp_path / "short.txt"), "--sts_dev_file", str(tmp_path / "dev.tsv")]
    with pytest.raises(InputError, match="0 texts of four words or more, fewer than 800"):
        run(study, monkeypatch, tmp_path, *flags)
