"""The seven STS tasks as SimCSE scores them: SentEval's files, all pairs of a year in one correlation."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from huggingface_hub import hf_hub_download
from torch import Tensor

from fmicl_text.errors import InputError
from fmicl_text.evaluation.sts import Row, checked_pairs, embed_pairs, sts_metrics, text_rows

HUB_REPOSITORY, HUB_FILE = "princeton-nlp/datasets-for-simcse", "senteval.tar"
SICK_FILES = {"train": "SICK_train.txt", "dev": "SICK_trial.txt", "test": "SICK_test_annotated.txt"}
SICK_COLUMNS = ("sentence_A", "sentence_B", "relatedness_score")

# The sets that one file each holds for every year; STS13 is without SMT, whose licence forbids it.
YEARS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
# Pairs of the standard sets. Another number is another test: SICK alone circulates in three versions.
STS_TASKS = {
    "STS12": {"test": 3108},
    "STS13": {"test": 1500},
    "STS14": {"test": 3750},
    "STS15": {"test": 3000},
    "STS16": {"test": 1186},
    "STSBenchmark": {"train": 5749, "dev": 1500, "test": 1379},
    "SICKRelatedness": {"train": 4500, "dev": 500, "test": 4927},
}


class SentEvalFiles:
    """The text files of SentEval's data folder, which holds STS/ and SICK/.

    Args:
        data_dir: That folder; None takes the archive from which SimCSE evaluates, of the Hugging Face Hub.

    Attributes:
        source: The folder, or the archive's name on the Hub.
        commit: The archive's commit; None for a folder.
    """

    def __init__(self, data_dir: Path | None = None) -> None:
        self.folder = data_dir
        self.source, self.commit = str(data_dir), None
        if data_dir is not None:
            if not ((data_dir / "STS").is_dir() or (data_dir / "SICK").is_dir()):
                raise InputError(f"--data_dir {data_dir}: must hold STS/ or SICK/, as SentEval's data/downstream does")
            return
        self.source = f"{HUB_REPOSITORY}/{HUB_FILE}"
        try:
            path = hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset")
            with tarfile.open(path) as archive:  # read, never unpacked
                members = {below_top(member.name): archive.extractfile(member) for member in archive if member.isfile()}
                self.contents = {name: file.read() for name, file in members.items() if name and file}
        except (OSError, EOFError, tarfile.TarError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{self.source}: {reason}; or name a folder (--data_dir) or pairs (--file)") from error
        self.commit = Path(path).parent.name

    def read(self, name: str) -> tuple[str, bytes]:
        """The path, for messages, and the content of a file such as STS/STS13-en-test/STS.gs.FNWN.txt."""
        if self.folder is None:
            if name not in self.contents:
                raise InputError(f"{self.source}: {name}: no such file in the archive")
            return f"{self.source}: {name}", self.contents[name]
        path = str(self.folder / name)
        try:
            return path, Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error


def below_top(name: str) -> str | None:
    """The part of an archive's path from STS/ or SICK/ on, whatever folder is around them; None for another file."""
    parts = Path(name).parts
    start = next((i for i, part in enumerate(parts) if part in ("STS", "SICK")), None)
    return None if start is None else "/".join(parts[start:])


def load_task(task: str, split: str, files: SentEvalFiles) -> dict[str, Dataset]:
    """Graded pairs of each set of a task, by its name; a task that is one set has the name of the split.

    Args:
        task: A name in `STS_TASKS`.
        split: One of its splits.
        files: Where they are read.

    Raises:
        InputError: A file is missing or wrong (which line), or the pairs are not as many as the standard set has.
    """
    if split not in STS_TASKS[task]:
        raise InputError(f"{task} has the splits {', '.join(STS_TASKS[task])}, got {split!r}")
    if task in YEARS:
        sets = {name: load_set(f"STS/{task}-en-test", name, files) for name in YEARS[task]}
    elif task == "STSBenchmark":
        path, content = files.read(f"STS/STSBenchmark/sts-{split}.csv")
        sets = {split: checked_pairs(tokens_once_apart(text_rows(path, content)), path)}
    else:
        path, content = files.read(f"SICK/{SICK_FILES[split]}")
        sets = {split: checked_pairs(tokens_once_apart(text_rows(path, content, SICK_COLUMNS)), path)}
    num_pairs, standard = sum(map(len, sets.values())), STS_TASKS[task][split]
    if num_pairs != standard:
        raise InputError(
            f"{task} {split} has {num_pairs:,} pairs in {files.source}, the standard set {standard:,}: its score would "
            "not compare with anyone's (--file scores pairs of your own)"
        )
    return sets


def load_set(folder: str, name: str, files: SentEvalFiles) -> Dataset:
    """One set of a year: sentences of STS.input.NAME.txt, grades of STS.gs.NAME.txt; a pair without a grade is none."""
    (input_path, sentences), (gold_path, grades) = (
        numbered_lines(*files.read(f"{folder}/STS.{kind}.{name}.txt")) for kind in ("input", "gs")
    )
    if len(sentences) != len(grades):
        raise InputError(f"{input_path} has {len(sentences)} lines, {Path(gold_path).name} {len(grades)}")

    def rows() -> Iterator[Row]:
        for number, (line, grade) in enumerate(zip(sentences, grades, strict=True), start=1):
            if not grade.strip():
                continue
            cells = line.split("\t")
            if len(cells) != 2:
                raise InputError(f"{input_path}, line {number}: {len(cells)} cells where 2 are needed")
            yield number, (cells[0], cells[1], grade.strip())

    return checked_pairs(tokens_once_apart(rows()), gold_path)


def numbered_lines(path: str, content: bytes) -> tuple[str, list[str]]:
    """A file's path and its lines, the last one with or without an end."""
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from error
    return path, lines[:-1] if not lines[-1] else lines


def tokens_once_apart(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows with single spaces between their tokens, as SentEval joins them: RoBERTa's tokenizer sees spaces."""
    for number, (sentence1, sentence2, score) in rows:
        yield number, (" ".join(sentence1.split()), " ".join(sentence2.split()), score)


def evaluate_task(encode: Callable[[list[str]], Tensor], sets: dict[str, Dataset]) -> dict[str, Any]:
    """Scores of an encoder on a task.

    Args:
        encode: M sentences to embeddings [M, D]; called once, with each distinct sentence once.
        sets: Graded pairs by set, as `load_task` gives them.

    Returns:
        What `sts.sts_metrics` gives over the pairs of all sets together, and num_pairs. With several sets also
        spearman_mean and spearman_weighted_mean over the sets, which are other protocols, and sets: spearman, pearson
        and num_pairs of each.
    """
    pairs = concatenate_datasets(list(sets.values()))
    x, y = embed_pairs(encode, pairs)
    grades = torch.tensor(pairs["score"][:], dtype=torch.float64)
    metrics: dict[str, Any] = sts_metrics(x, y, grades) | {"num_pairs": len(pairs)}
    if len(sets) > 1:
        sizes = [len(part) for part in sets.values()]
        parts = zip(x.split(sizes), y.split(sizes), grades.split(sizes), strict=True)
        scores = [
            {name: value for name, value in sts_metrics(*part).items() if name in ("spearman", "pearson")}
            for part in parts
        ]
        spearmans = torch.tensor([score["spearman"] for score in scores], dtype=torch.float64)
        weights = torch.tensor(sizes, dtype=torch.float64) / len(pairs)
        metrics |= {"spearman_mean": spearmans.mean().item(), "spearman_weighted_mean": (spearmans @ weights).item()}
        metrics["sets"] = {
            name: score | {"num_pairs": size} for name, score, size in zip(sets, scores, sizes, strict=True)
        }
    return metrics
