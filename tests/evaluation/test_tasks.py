"""The seven STS tasks: loading SentEval's files, errors, and one score over all subsets."""

import io
import math
import tarfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from scipy import stats

from fmicl_text.errors import InputError
from fmicl_text.evaluation import tasks
from fmicl_text.evaluation.tasks import SICK_FILES, STS_TASKS, YEARS, SentEvalFiles, evaluate_task, load_task

SICK_HEADER = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"


def write_year(folder: Path, task: str, num_pairs: int) -> None:
    """The files of a year with `num_pairs` pairs, and one pair without a score in the first subset."""
    names, left = YEARS[task], num_pairs
    (folder / "STS" / f"{task}-en-test").mkdir(parents=True)
    for i, name in enumerate(names):
        count = left if i == len(names) - 1 else num_pairs // len(names)
        left -= count
        sentences = [f"{name}  first {k}\tsecond {k} ." for k in range(count)]
        scores = [str(k % 6) for k in range(count)]
        if i == 0:
            sentences.insert(1, "nobody scored\tthis pair")
            scores.insert(1, "")
        for kind, lines in (("input", sentences), ("gs", scores)):
            path = folder / "STS" / f"{task}-en-test" / f"STS.{kind}.{name}.txt"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_stsb(folder: Path, split: str, num_pairs: int) -> None:
    path = folder / "STS" / "STSBenchmark" / f"sts-{split}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"g\tf\ty\t{k}\t{k % 6}\tfirst {k}\tsecond {k}\n" for k in range(num_pairs)))


def write_sick(folder: Path, split: str, num_pairs: int) -> None:
    path = folder / "SICK" / SICK_FILES[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{k}\tfirst {k}\tsecond {k}\t{1 + k % 5}\tNEUTRAL\n" for k in range(num_pairs))
    path.write_text(SICK_HEADER + rows)


@pytest.fixture(scope="module")
def senteval(tmp_path_factory) -> Path:
    """All seven tasks and splits with made-up sentences, and as many pairs as the real ones."""
    folder = tmp_path_factory.mktemp("senteval")
    for task, splits in STS_TASKS.items():
        for split, num_pairs in splits.items():
            if task in YEARS:
                write_year(folder, task, num_pairs)
            else:
                (write_stsb if task == "STSBenchmark" else write_sick)(folder, split, num_pairs)
    return folder


@pytest.mark.parametrize("task, split", [(task, split) for task in STS_TASKS for split in STS_TASKS[task]])
def test_every_task_from_a_folder(senteval, task, split):
    sets = load_task(task, split, SentEvalFiles(senteval))
    assert list(sets) == (list(YEARS[task]) if task in YEARS else [split])
    assert sum(map(len, sets.values())) == STS_TASKS[task][split]
    first = next(iter(sets.values()))
    expected = [1.0, 2.0] if task == "SICKRelatedness" else [0.0, 1.0]
    assert first["score"][:2] == expected and first.column_names == ["sentence1", "sentence2", "score"]
    if task in YEARS:  # the pair without a score is skipped; single spaces, as in SentEval
        assert first["sentence1"][:2] == [f"{YEARS[task][0]} first 0", f"{YEARS[task][0]} first 1"]
        assert first["sentence2"][1] == "second 1 ."


def test_the_archive_of_the_hub_is_the_folder(senteval, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    archive = tmp_path / "snapshots" / commit / "senteval.tar"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w") as tar:
        tar.add(senteval / "STS", arcname="./downstream/STS")
        tar.add(senteval / "SICK", arcname="./downstream/SICK")
        evil = tarfile.TarInfo("./downstream/STS/STSBenchmark/../../../evil")
        tar.addfile(evil, io.BytesIO())
    asked = []

    def download(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(archive)

    monkeypatch.setattr(tasks, "hf_hub_download", download)
    files = SentEvalFiles()
    assert asked == [("princeton-nlp/datasets-for-simcse", "senteval.tar", "dataset")]
    assert files.commit == commit and files.source == "princeton-nlp/datasets-for-simcse/senteval.tar"
    for task in ("STS16", "SICKRelatedness"):
        of_folder = load_task(task, "test", SentEvalFiles(senteval))
        assert {n: d.to_dict() for n, d in load_task(task, "test", files).items()} == {
            n: d.to_dict() for n, d in of_folder.items()
        }
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["senteval.tar"]  # nothing unpacked
    with pytest.raises(InputError, match=r"senteval\.tar: STS/STS99-en-test/x: no such file in the archive"):
        files.read("STS/STS99-en-test/x")


def test_the_hub_out_of_reach(monkeypatch):
    def download(*args: str, **kwargs: str) -> str:
        raise OSError("no way to the Hub\nand so on")

    monkeypatch.setattr(tasks, "hf_hub_download", download)
    with pytest.raises(InputError, match=r"no way to the Hub; .*data_dir"):
        SentEvalFiles()


def test_a_damaged_archive(tmp_path, monkeypatch):
    (tmp_path / "senteval.tar").write_bytes(b"no archive")
    monkeypatch.setattr(tasks, "hf_hub_download", lambda *args, **kwargs: str(tmp_path / "senteval.tar"))
    with pytest.raises(InputError, match=r"senteval\.tar: .*data_dir"):
        SentEvalFiles()


def edit(folder: Path, name: str, change) -> None:
    path = folder / "STS" / "STS13-en-test" / name
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in change(lines)) + b"\n")


WRONG = {
    "no gold file": (lambda d: (d / "STS/STS13-en-test/STS.gs.OnWN.txt").unlink(), r"STS\.gs\.OnWN\.txt: No such file"),
    "other line counts": (
        lambda d: edit(d, "STS.gs.FNWN.txt", lambda lines: lines[:-1]),
        r"STS\.input\.FNWN\.txt has 501 lines, STS\.gs\.FNWN\.txt has 500",
    ),
    "no number": (
        lambda d: edit(d, "STS.gs.FNWN.txt", lambda lines: [*lines[:4], "4,5", *lines[5:]]),
        r"STS\.gs\.FNWN\.txt, line 5: the score '4,5' is not a number",
    ),
    "out of range": (
        lambda d: edit(d, "STS.gs.FNWN.txt", lambda lines: [*lines[:4], "7", *lines[5:]]),
        r"STS\.gs\.FNWN\.txt, line 5: the score 7 is not in \[0, 5\]",
    ),
    "constant": (
        lambda d: edit(d, "STS.gs.FNWN.txt", lambda lines: ["3"] * len(lines)),
        r"STS\.gs\.FNWN\.txt: all scores are 3",
    ),
    "empty set": (
        lambda d: edit(d, "STS.gs.FNWN.txt", lambda lines: [""] * len(lines)),
        r"STS\.gs\.FNWN\.txt: 0 pairs",
    ),
    "three cells": (
        lambda d: edit(d, "STS.input.FNWN.txt", lambda lines: [*lines[:2], "a\tb\tc", *lines[3:]]),
        r"STS\.input\.FNWN\.txt, line 3: .*2 cells, got 3",
    ),
    "blank sentence": (
        lambda d: edit(d, "STS.input.FNWN.txt", lambda lines: [*lines[:2], "a\t ", *lines[3:]]),
        r"STS\.gs\.FNWN\.txt, line 3: .*blank",
    ),
    "not UTF-8": (
        lambda d: edit(d, "STS.input.FNWN.txt", lambda lines: [*lines[:6], b"caf\xe9\tb", *lines[7:]]),
        r"STS\.input\.FNWN\.txt, line 7: not UTF-8 text",
    ),
    "another test set": (
        lambda d: [edit(d, f"STS.{kind}.FNWN.txt", lambda lines: lines[:-1]) for kind in ("input", "gs")],
        r"STS13 test has 1,499 pairs in .* 1,500",
    ),
}


@pytest.mark.parametrize("damage, message", WRONG.values(), ids=WRONG)
def test_errors_name_the_file_and_the_line(tmp_path, damage, message):
    write_year(tmp_path, "STS13", 1500)
    load_task("STS13", "test", SentEvalFiles(tmp_path))
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_task("STS13", "test", SentEvalFiles(tmp_path))
    assert "\n" not in str(error.value)


def test_another_version_of_sick_raises(tmp_path):
    write_sick(tmp_path, "test", 9927)  # MTEB's: all splits
    with pytest.raises(InputError, match=r"SICKRelatedness test has 9,927 pairs .* 4,927"):
        load_task("SICKRelatedness", "test", SentEvalFiles(tmp_path))


def test_no_such_split_or_folder(senteval, tmp_path):
    with pytest.raises(InputError, match="STS12 must be one of test, got 'dev'"):
        load_task("STS12", "dev", SentEvalFiles(senteval))
    with pytest.raises(InputError, match=r"data_dir=.*absent: must contain STS/ or SICK/"):
        SentEvalFiles(tmp_path / "absent")


def test_one_correlation_over_all_sets():
    """Two subsets in which cosine and score rise together, at different levels: 100 in each, less over both."""
    angles = {"a": 0.0, "b": 0.4, "c": 0.8, "d": 1.2, "e": 0.2, "f": 0.6}
    sets = {
        "low": Dataset.from_dict({"sentence1": ["a"] * 3, "sentence2": ["b", "c", "d"], "score": [2.0, 1.0, 0.0]}),
        "high": Dataset.from_dict({"sentence1": ["a"] * 2, "sentence2": ["f", "e"], "score": [3.0, 5.0]}),
    }

    def encode(sentences: list[str]) -> torch.Tensor:
        return torch.tensor([[math.cos(angles[s]), math.sin(angles[s])] for s in sentences])

    metrics = evaluate_task(encode, sets)
    expected = 100 * stats.spearmanr([-0.4, -0.8, -1.2, -0.6, -0.2], [2, 1, 0, 3, 5]).statistic
    assert metrics["spearman"] == pytest.approx(expected) and 80 < expected < 95
    assert metrics["num_pairs"] == 5
    assert [score["spearman"] for score in metrics["sets"].values()] == pytest.approx([100, 100])
    assert {name: score["num_pairs"] for name, score in metrics["sets"].items()} == {"low": 3, "high": 2}
    sets["high"] = Dataset.from_dict({"sentence1": ["a"] * 2, "sentence2": ["f", "e"], "score": [5.0, 3.0]})
    metrics = evaluate_task(encode, sets)
    assert metrics["spearman_mean"] == pytest.approx(0)
    assert metrics["spearman_weighted_mean"] == pytest.approx(100 * (3 - 2) / 5)
    assert "sets" not in evaluate_task(encode, {"dev": sets["low"]})
