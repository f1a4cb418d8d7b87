"""The seven STS tasks with SimCSE's protocol: SentEval's files, one correlation over all pairs of a task."""

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

# The subsets of the tasks of 2012 to 2016, one file each. STS13 lacks SMT, which may not be redistributed.
YEARS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
# Numbers of pairs in the standard versions. SICK, for example, exists in three versions of different size.
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
    """The text files of SentEval's data folder, which contains STS/ and SICK/.

    Args:
        data_dir: The folder. None downloads SimCSE's archive of it from the Hugging Face Hub.

    Attributes:
        source: The folder, or the name of the archive on the Hub.
        commit: The commit of the archive; None for a folder.

    Raises:
        InputError: The folder contains neither STS/ nor SICK/, or the archive cannot be downloaded or read.
    """

    def __init__(self, data_dir: Path | None = None) -> None:
        self.folder = data_dir
        self.source, self.commit = str(data_dir), None
        if data_dir is not None:
            if not ((data_dir / "STS").is_dir() or (data_dir / "SICK").is_dir()):
                raise InputError(f"data_dir={data_dir}: must contain STS/ or SICK/, like data/downstream of SentEval")
            return
        self.source = f"{HUB_REPOSITORY}/{HUB_FILE}"
        try:
            path = hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset")
            with tarfile.open(path) as archive:  # never unpacked to disk
                members = {below_top(member.name): archive.extractfile(member) for member in archive if member.isfile()}
                self.contents = {name: file.read() for name, file in members.items() if name and file}
        except (OSError, EOFError, tarfile.TarError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{self.source}: {reason}; use a local folder (data_dir)") from error
        self.commit = Path(path).parent.name

    def read(self, name: str) -> tuple[str, bytes]:
        """Path (for messages) and content of a file such as STS/STS13-en-test/STS.gs.FNWN.txt."""
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
    """The part of a path in the archive that begins with STS/ or SICK/; None for other files."""
    parts = Path(name).parts
    start = next((i for i, part in enumerate(parts) if part in ("STS", "SICK")), None)
    return None if start is None else "/".join(parts[start:])


def load_task(task: str, split: str, files: SentEvalFiles) -> dict[str, Dataset]:
    """Load the sentence pairs of a task, by name of the subset. A task without subsets has one, named after the split.

    Args:
        task: A name in `STS_TASKS`.
        split: One of its splits.
        files: SentEval's files.

    Raises:
        InputError: A file is missing or invalid, or the number of pairs differs from the standard one.
    """
    if split not in STS_TASKS[task]:
        raise InputError(f"split of {task} must be one of {', '.join(STS_TASKS[task])}, got {split!r}")
    if task in YEARS:
        sets = {name: load_set(f"STS/{task}-en-test", name, files) for name in YEARS[task]}
    elif task == "STSBenchmark":
        path, content = files.read(f"STS/STSBenchmark/sts-{split}.csv")
        sets = {split: checked_pairs(single_spaced(text_rows(path, content)), path)}
    else:
        path, content = files.read(f"SICK/{SICK_FILES[split]}")
        sets = {split: checked_pairs(single_spaced(text_rows(path, content, SICK_COLUMNS)), path)}
    num_pairs, standard = sum(map(len, sets.values())), STS_TASKS[task][split]
    if num_pairs != standard:
        raise InputError(
            f"{task} {split} has {num_pairs:,} pairs in {files.source} instead of the standard {standard:,}, so its "
            "score would not be comparable"
        )
    return sets


def load_set(folder: str, name: str, files: SentEvalFiles) -> Dataset:
    """Load a subset from STS.input.NAME.txt and STS.gs.NAME.txt (scores). Pairs without a score are skipped."""
    (input_path, sentences), (gold_path, scores) = (
        numbered_lines(*files.read(f"{folder}/STS.{kind}.{name}.txt")) for kind in ("input", "gs")
    )
    if len(sentences) != len(scores):
        raise InputError(f"{input_path} has {len(sentences)} lines, {Path(gold_path).name} has {len(scores)}")

    def rows() -> Iterator[Row]:
        for number, (line, score) in enumerate(zip(sentences, scores, strict=True), start=1):
            if not score.strip():
                continue
            cells = line.split("\t")
            if len(cells) != 2:
                raise InputError(f"{input_path}, line {number}: expected 2 cells, got {len(cells)}")
            yield number, (cells[0], cells[1], score.strip())

    return checked_pairs(single_spaced(rows()), gold_path)


def numbered_lines(path: str, content: bytes) -> tuple[str, list[str]]:
    """Path of a file and its lines; a final line break is optional."""
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from error
    return path, lines[:-1] if not lines[-1] else lines


def single_spaced(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows with single spaces between tokens, as in SentEval. RoBERTa's tokenizer depends on spaces."""
    for number, (sentence1, sentence2, score) in rows:
        yield number, (" ".join(sentence1.split()), " ".join(sentence2.split()), score)


def evaluate_task(encode: Callable[[list[str]], Tensor], sets: dict[str, Dataset]) -> dict[str, Any]:
    """Evaluate an encoder on a task.

    Args:
        encode: Maps M sentences to embeddings [M, D]. Called once, with every distinct sentence once.
        sets: Sentence pairs by subset, from `load_task`.

    Returns:
        The metrics of `sts.sts_metrics` over the pairs of all subsets, and num_pairs. With several subsets also
        spearman_mean and spearman_weighted_mean over subsets, which are different protocols, and sets: spearman,
        pearson and num_pairs of each subset.
    """
    pairs = concatenate_datasets(list(sets.values()))
    x, y = embed_pairs(encode, pairs)
    scores = torch.tensor(pairs["score"][:], dtype=torch.float64)
    metrics: dict[str, Any] = sts_metrics(x, y, scores) | {"num_pairs": len(pairs)}
    if len(sets) > 1:
        sizes = [len(part) for part in sets.values()]
        parts = zip(x.split(sizes), y.split(sizes), scores.split(sizes), strict=True)
        of_sets = [
            {name: value for name, value in sts_metrics(*part).items() if name in ("spearman", "pearson")}
            for part in parts
        ]
        spearmans = torch.tensor([score["spearman"] for score in of_sets], dtype=torch.float64)
        weights = torch.tensor(sizes, dtype=torch.float64) / len(pairs)
        metrics |= {"spearman_mean": spearmans.mean().item(), "spearman_weighted_mean": (spearmans @ weights).item()}
        metrics["sets"] = {
            name: score | {"num_pairs": size} for name, score, size in zip(sets, of_sets, sizes, strict=True)
        }
    return metrics
