"""Semantic textual similarity (STS): load sentence pairs with similarity scores, and evaluate encoders on them."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from datasets import Dataset, load_dataset
from torch import Tensor

from fmicl_text.errors import InputError
from fmicl_text.evaluation.correlation import pair_correlations
from fmicl_text.evaluation.geometry import alignment, uniformity
from fmicl_text.files import check_regular

COLUMNS = ("sentence1", "sentence2", "score")
SENTEVAL_CELLS = (5, 6, 4)  # positions of COLUMNS in a line of SentEval's sts-*.csv
MAX_SCORE = 5.0
POSITIVE_SCORE = 4.0  # "the two sentences are mostly equivalent"; positive pairs for alignment
STSB_HUB_NAME = "mteb/stsbenchmark-sts"

Row = tuple[int, tuple[str, str, str]]  # line or row in the file; sentence1, sentence2, score, as strings


def load_pairs(path: str | Path) -> Dataset:
    """Load sentence pairs with similarity scores: sentence1 (str), sentence2 (str), score (float, 0 to 5).

    The format is detected from the content: parquet, or text with a header, tab-separated (quotes are literal) or
    comma-separated (quotes enclose cells), or SentEval's lines without a header.

    Raises:
        InputError: The file cannot be read or is invalid. The message names the line.
    """
    check_regular(path, str(path))
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if content.startswith(b"PAR1"):
        return checked_pairs(parquet_rows(path, content), path, unit="row")
    return checked_pairs(text_rows(path, content), path)


def text_rows(path: str | Path, content: bytes, columns: tuple[str, ...] = COLUMNS) -> Iterator[Row]:
    """Rows of a .tsv, .csv or SentEval file with their line numbers.

    Args:
        path: Name of the file, for messages.
        content: Its bytes.
        columns: Names of sentence1, sentence2 and score in the header.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from error
    if not text.strip():
        raise InputError(f"{path} is empty")
    tabs = "\t" in text.lstrip().partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    cells: tuple[int, ...] | None = None
    try:
        for row in reader:
            if not row:
                continue
            if cells is None:
                if has_header := not (tabs and is_senteval(row)):
                    names = [name.strip() for name in row]
                    require_columns(path, names, columns)
                    cells, num_cells = tuple(names.index(name) for name in columns), len(names)
                    continue
                cells, num_cells = SENTEVAL_CELLS, max(SENTEVAL_CELLS) + 1
            # Extra cells mean a separator inside a sentence, but SentEval's lines may have further columns.
            if len(row) < num_cells or (has_header and len(row) > num_cells):
                raise InputError(f"{path}, line {reader.line_num}: expected {num_cells} cells, got {len(row)}")
            sentence1, sentence2, score = (row[cell] for cell in cells)
            yield reader.line_num, (sentence1, sentence2, score)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error


def is_senteval(row: list[str]) -> bool:
    """Whether the first row is a data row of SentEval's sts-*.csv instead of a header."""
    if len(row) <= max(SENTEVAL_CELLS) or set(COLUMNS) & set(row):
        return False
    try:
        float(row[SENTEVAL_CELLS[-1]])
    except ValueError:
        return False
    return True


def parquet_rows(path: str | Path, content: bytes) -> Iterator[Row]:
    """Rows of a parquet file, numbered from 1. Nulls become empty strings."""
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        require_columns(path, table.column_names)
        rows = table.select(COLUMNS).to_pylist()
    except InputError:
        raise
    except Exception as error:  # of any type, for corrupted pages
        raise InputError(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    for number, row in enumerate(rows, start=1):
        if wrong := [name for name in COLUMNS[:2] if not isinstance(row[name], str | None)]:
            raise InputError(f"{path}, row {number}: {wrong[0]} must be a string, got {row[wrong[0]]!r}")
        sentence1, sentence2, score = ("" if row[name] is None else str(row[name]) for name in COLUMNS)
        yield number, (sentence1, sentence2, score)


def require_columns(path: str | Path, names: list[str], columns: tuple[str, ...] = COLUMNS) -> None:
    """Raise `InputError` if a column is missing."""
    if missing := [name for name in columns if name not in names]:
        found = textwrap.shorten(", ".join(names), 200)
        raise InputError(f"{path}: missing column {', '.join(missing)}; found {found}")


def checked_pairs(rows: Iterable[Row], path: str | Path, unit: str = "line") -> Dataset:
    """The rows as a Dataset. Raises `InputError`, with the line or row, if a score or sentence is invalid."""
    first, second, scores = [], [], []
    for number, (sentence1, sentence2, score) in rows:
        try:
            scores.append(float(score))
        except ValueError as error:
            raise InputError(f"{path}, {unit} {number}: the score {score!r} is not a number") from error
        if not 0 <= scores[-1] <= MAX_SCORE:
            raise InputError(f"{path}, {unit} {number}: the score {score} is not in [0, {MAX_SCORE:g}]")
        if not (sentence1.strip() and sentence2.strip()):
            raise InputError(f"{path}, {unit} {number}: blank sentence")
        first.append(sentence1)
        second.append(sentence2)
    if len(scores) < 2:
        raise InputError(f"{path}: {len(scores)} pairs; a correlation requires at least 2")
    if min(scores) == max(scores):
        raise InputError(f"{path}: all scores are {scores[0]:g}, so correlations are undefined")
    return Dataset.from_dict(dict(zip(COLUMNS, (first, second, scores), strict=True)))


def load_stsb(split: str) -> Dataset:
    """Load STS Benchmark (raw sentences) from the Hugging Face Hub, in the format of `load_pairs`.

    Args:
        split: train, dev or test.

    Raises:
        InputError: Unknown split, or the Hub cannot be reached.
    """
    if split not in (splits := ("train", "dev", "test")):
        raise InputError(f"split of STSBenchmark must be one of {', '.join(splits)}, got {split!r}")
    try:
        rows = load_dataset(STSB_HUB_NAME, split="validation" if split == "dev" else split)
    except OSError as error:
        hint = "use a local file (sts_dev_file)"
        raise InputError(f"{str(error).splitlines()[0]}: {hint}") from error
    columns = [map(str, rows[column]) for column in COLUMNS]
    pairs = checked_pairs(enumerate(zip(*columns, strict=True), start=1), STSB_HUB_NAME, unit="row")
    pairs.info.download_checksums = rows.info.download_checksums
    return pairs


def sts_metrics(embeddings1: Tensor, embeddings2: Tensor, scores: Tensor | list[float]) -> dict[str, float]:
    """Correlation of the similarities of pairs with their scores, and the geometry of the embeddings.

    Args:
        embeddings1: Embeddings of the first sentences, [N, D].
        embeddings2: Embeddings of the second sentences, [N, D].
        scores: Similarity scores given by annotators, [N], 0 to 5.

    Returns:
        spearman, pearson: Correlation of cosine and score over all pairs, times 100.
        spearman_dot, pearson_dot, spearman_euclidean, pearson_euclidean: The same for other similarities.
        alignment: Over the pairs with a score of at least 4; absent if there are none.
        uniformity: Over the distinct embeddings of both sides.

    Raises:
        InputError: A correlation is undefined: non-finite or zero embeddings, equal cosines, equal scores.
    """
    x, y = embeddings1.detach().float().cpu(), embeddings2.detach().float().cpu()
    correlations = pair_correlations(x, y, scores)
    metrics = {name.removesuffix("_cosine"): value for name, value in correlations.items()}
    metrics["uniformity"] = float(uniformity(torch.cat([x, y]).unique(dim=0)))
    positive = torch.as_tensor(scores) >= POSITIVE_SCORE
    if positive.any():
        metrics["alignment"] = float(alignment(x[positive], y[positive]))
    return metrics


def embed_pairs(encode: Callable[[list[str]], Tensor], pairs: Dataset) -> tuple[Tensor, Tensor]:
    """Embeddings of the first and of the second sentences of pairs, [N, D] each.

    Args:
        encode: Maps M sentences to embeddings [M, D]. Called once, with every distinct sentence once.
        pairs: Sentence pairs in the format of `load_pairs`.
    """
    first, second = list(pairs["sentence1"]), list(pairs["sentence2"])
    row = {sentence: i for i, sentence in enumerate(dict.fromkeys(first + second))}
    embeddings = encode(list(row))
    if len(embeddings) != len(row):
        raise ValueError(f"encode returned {len(embeddings)} embeddings for {len(row)} sentences")
    return embeddings[[row[sentence] for sentence in first]], embeddings[[row[sentence] for sentence in second]]


def evaluate_sts(encode: Callable[[list[str]], Tensor], pairs: Dataset) -> dict[str, float]:
    """Evaluate an encoder on sentence pairs with similarity scores.

    Args:
        encode: Maps M sentences to embeddings [M, D]. Called once, with every distinct sentence once.
        pairs: Sentence pairs in the format of `load_pairs`.

    Returns:
        The metrics of `sts_metrics`, and num_pairs.
    """
    x, y = embed_pairs(encode, pairs)
    return sts_metrics(x, y, list(pairs["score"])) | {"num_pairs": len(pairs)}
