"""Training text from files, the Hub or Python lists: checked, stripped, without blank rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, reduce
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from fmicl_text.errors import InputError
from fmicl_text.loading import explain_full_cache, hub_revision, translate_dataset_errors
from fmicl_text.text.columns import no_text, text_columns
from fmicl_text.text.opening import ACCEPTED
from fmicl_text.text.sources import find_files, read_dataset, read_files

logger = logging.getLogger(__name__)

_STREAM_BUFFER = 10_000
_STREAM_START = 1000  # rows of a stream in which blank cells are counted


@dataclass(frozen=True)
class TextData:
    """Training text and statistics of its source.

    Args:
        dataset: The text columns only. Every cell is a stripped, non-empty string.
        columns: One column (dropout positives), two (positive pairs) or more (pairs with hard negatives).
        num_skipped: Number of rows in the source with a blank or missing text; None when streaming.
        source: The file or files, or `name[/config] [split]` of a dataset.
        fingerprint: Identifies the content and order of a stream; None if unknown, or not a stream.
        blank_cells: For data with several columns, which are blank or missing in how many rows; of a stream, in how
            many of the first 1,000.
        num_rows: Number of rows to train on; None when streaming.
        duplicate_share: Fraction of the rows, in [0, 1), in which the encoder sees the same texts as in an earlier
            row; None before tokenization, and when streaming.
        truncated_share: Fraction of the texts, in [0, 1], that are truncated; None as for `duplicate_share`.
        prompts: Prepended to the texts of each column; empty for none.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    columns: tuple[str, ...]
    num_skipped: int | None
    source: str
    fingerprint: str | None = None
    blank_cells: str | None = None
    num_rows: int | None = None
    duplicate_share: float | None = None
    truncated_share: float | None = None
    prompts: tuple[str, ...] = ()

    def metadata(self) -> dict[str, Any]:
        """Properties for the log and the run record, without those that are unknown when streaming."""
        metadata = {
            "source": self.source,
            "revision": hub_revision(self.dataset),
            "columns": " ".join(self.columns),
            "prompts": " ".join(map(repr, self.prompts)) if any(self.prompts) else None,
            "rows": self.num_rows,
            "blank rows skipped": self.num_skipped,
            "blank cells": self.blank_cells,
            "share of duplicates": None if self.duplicate_share is None else round(self.duplicate_share, 4),
            "share of texts truncated": None if self.truncated_share is None else round(self.truncated_share, 4),
        }
        return {name: value for name, value in metadata.items() if value is not None}


def load_training_text(
    train_file: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    text_columns: Sequence[str] | None = None,
    streaming: bool = False,
    max_train_samples: int | None = None,
    shuffle_seed: int | None = None,
    at_least: int = 1,
) -> TextData:
    """Load training text from local files or a dataset on the Hub. Rows with a blank or missing text are skipped.

    Cells of .csv and .tsv files stay as they are written (`007`, `TRUE`, `NA`). Columns that are not trained on are not
    read. Files and a local folder are read in the same way.

    Args:
        train_file: One or more files, patterns such as `data/*.csv`, or folders, which must contain files of one
            format. UTF-8 .txt (one sentence per line), .csv, .tsv (without quoting), .json (an array of objects) or
            .jsonl, optionally compressed (.gz, .bz2, .xz, .zst), or .parquet or .arrow. A .csv or .tsv file may have
            another separator (comma, tab, semicolon, pipe) if all its rows have it. Empty lines are skipped.
        dataset_name: Hub name or local folder of a dataset. Exactly one of `dataset_name` and `train_file` is
            required.
        dataset_config: Configuration of `dataset_name`.
        dataset_split: Split of `dataset_name`.
        text_columns: The columns to train on: one text, a pair, or a pair and its hard negatives. By default,
            `columns.text_columns` selects them.
        streaming: Read the data while training, without a copy on disk. Only its start is checked here; an error is
            raised when training reaches an invalid row.
        max_train_samples: Use only the first N usable rows, N >= 1.
        shuffle_seed: When streaming, shuffle in a buffer of 10,000 rows with this seed. The trainer itself
            shuffles only map-style datasets.
        at_least: Minimum number of usable rows, such as the batch size.

    Raises:
        InputError: An argument or the data is invalid.
    """
    if (train_file is None) == (dataset_name is None):
        got = f"train_file={train_file} and dataset_name={dataset_name}"
        raise InputError(f"exactly one of train_file and dataset_name is needed, got {got}")
    if max_train_samples is not None and max_train_samples < 1:
        raise InputError(f"max_train_samples must be at least 1, got {max_train_samples}")
    if train_file is not None:
        given = [train_file] if isinstance(train_file, str | os.PathLike) else train_file
        if isinstance(given, bytes) or not isinstance(given, Iterable):
            raise InputError(f"train_file must be one or more paths, got {given!r}")
        if odd := [path for path in given if not isinstance(path, str | os.PathLike)]:
            raise InputError(f"train_file must be one or more paths, got {odd[0]!r}")
        paths = [os.fspath(path) for path in given]
        source, explain = " ".join(paths), partial(_file_error_message, " ".join(paths))
    else:
        source = "/".join(filter(None, (dataset_name, dataset_config))) + f" [{dataset_split}]"
        explain = partial(_hub_error_message, str(dataset_name), dataset_config, dataset_split)

    content: str | None
    with translate_dataset_errors(explain):
        if train_file is not None:
            raw, columns, content = read_files({"train": find_files(paths)}, "train", text_columns, streaming)
        else:
            named = str(dataset_name), dataset_config, dataset_split
            raw, columns, content = read_dataset(*named, text_columns, streaming, source)
        usable = _drop_blank(raw, columns)
        if not (num_usable := len(list(islice(usable, at_least)))):
            raise no_text(source)
        if (num_usable := min(num_usable, max_train_samples or num_usable)) < at_least:
            raise InputError(f"{source}: {num_usable} training examples are fewer than one batch of {at_least}")
    num_skipped = None if streaming else len(raw) - len(usable)
    if blank := None if num_skipped == 0 else _describe_blank(raw, columns):
        logger.warning("%s: %s", source, blank)
    if streaming:
        usable = usable if max_train_samples is None else usable.take(max_train_samples)
        usable = usable if shuffle_seed is None else usable.shuffle(seed=shuffle_seed, buffer_size=_STREAM_BUFFER)
        rows = (
            None
            if content is None
            else f"{content} {dataset_config} {dataset_split} {columns} {max_train_samples} {shuffle_seed}"
        )
        return TextData(usable, columns, None, source, rows, blank)
    if max_train_samples is not None:
        usable = usable.select(range(min(max_train_samples, len(usable))))
    return TextData(usable, columns, num_skipped, source, None, blank, num_rows=len(usable))


def as_text_dataset(rows: Any) -> datasets.Dataset | datasets.IterableDataset:
    """A dataset of the text columns of rows. Those with a blank or missing text are skipped, with a warning unless the
    dataset is streamed.

    >>> as_text_dataset([("a dog", "the dog runs"), ("a cat", "the cat sleeps")]).column_names
    ['sent0', 'sent1']

    Args:
        rows: A list of texts, a list of tuples of texts (pairs, or pairs with hard negatives), or a dataset whose
            columns `columns.text_columns` accepts.

    Raises:
        InputError: The rows are of another type, contain no text, or have ambiguous columns.
    """
    source = "train_dataset"
    dataset = rows if isinstance(rows, datasets.Dataset | datasets.IterableDataset) else _from_list(rows, source)
    columns = text_columns(dataset, source=source)
    usable = _drop_blank(dataset, columns)
    if isinstance(dataset, datasets.Dataset):
        if not len(usable):
            raise no_text(source)
        if num_skipped := len(dataset) - len(usable):
            logger.warning("%s: skipped %d of %d rows with a blank text", source, num_skipped, len(dataset))
            if blank := _describe_blank(dataset, columns):
                logger.warning("%s: %s", source, blank)
    return usable


def _from_list(rows: Any, source: str) -> datasets.Dataset:
    """The dataset of a list of texts (column text) or of tuples of texts (sent0, sent1, hard_neg or hard_neg_1 ...)."""
    expected = f"{source} must be a dataset, a list of strings, or a list of tuples of equally many strings"
    if not isinstance(rows, list | tuple):
        raise InputError(f"{expected}; got {type(rows).__name__}")
    if not rows:
        raise no_text(source)
    table = [(row,) if isinstance(row, str) else row for row in rows]
    for number, row in enumerate(table):
        is_row = isinstance(row, list | tuple) and all(isinstance(text, str) for text in row)
        if not is_row or not 1 <= len(row) == len(table[0]):
            raise InputError(f"{expected}; got {rows[number]!r:.80} at index {number}")
    num_negatives = len(table[0]) - 2
    negatives = ["hard_neg"] if num_negatives == 1 else [f"hard_neg_{i + 1}" for i in range(num_negatives)]
    names = ["text"] if len(table[0]) == 1 else ["sent0", "sent1", *negatives]
    return datasets.Dataset.from_dict(dict(zip(names, zip(*table, strict=True), strict=True)))


def _drop_blank(dataset: Any, columns: tuple[str, ...]) -> Any:
    """The text columns, stripped, without rows in which one of them is missing or blank."""
    progress = {"desc": "Dropping blank rows"} if isinstance(dataset, datasets.Dataset) else {}
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    selected = dataset.select_columns(list(columns)).with_format("arrow")
    with explain_full_cache(dataset):
        return selected.map(_strip, batched=True, features=features, **progress).with_format(None)


def _strip(table: pa.Table) -> pa.Table:
    # The JSON and Parquet loaders accept bytes that are not UTF-8, which would only fail in training.
    table.validate(full=True)
    columns = {name: _stripped(table[name]) for name in table.column_names}
    return pa.table(columns).filter(
        reduce(pc.and_, [pc.greater(pc.binary_length(column), 0) for column in columns.values()])
    )


def _stripped(column: Any) -> Any:
    # The cast is for columns of nulls. Concatenated files keep their byte order mark.
    return pc.utf8_trim_whitespace(pc.utf8_ltrim(column.cast(pa.string()), "\ufeff"))


def _describe_blank(dataset: Any, columns: Sequence[str]) -> str | None:
    """Which of several columns are blank or missing in how many rows, or of a stream in how many of its first."""
    if len(columns) == 1:
        return None
    is_stream = isinstance(dataset, datasets.IterableDataset)
    rows = dataset.take(_STREAM_START) if is_stream else dataset
    blank, num_rows = dict.fromkeys(columns, 0), 0
    for batch in rows.select_columns(list(columns)).with_format("arrow").iter(batch_size=10_000):
        num_rows += len(batch)
        for name in columns:
            filled = pc.sum(pc.greater(pc.binary_length(_stripped(batch[name])), 0)).as_py() or 0
            blank[name] += len(batch) - filled
    of = f"of the first {num_rows} rows" if is_stream else f"of {num_rows} rows"
    return ", ".join(f"{name} is blank in {count} {of}" for name, count in blank.items() if count) or None


def reading_errors(source: str) -> AbstractContextManager[None]:
    """A context that reads rows of a stream, whose errors it raises as `InputError`.

    Args:
        source: Name of the data in messages.
    """
    return translate_dataset_errors(lambda error: f"{source} cannot be read: {type(error).__name__}: {error}")


def _file_error_message(paths: str, error: BaseException) -> str:
    """The reason why files or a folder of files cannot be read, where it is not an `InputError` already."""
    no_rows = ("corresponds to no data", "at least one example")  # messages of `datasets`
    if any(sign in str(error) for sign in no_rows):
        return str(no_text(paths))
    if "any data files" in str(error):
        return f"train_file={paths}: the folder has no data files; expected {ACCEPTED}"
    return f"train_file={paths}: {error or type(error).__name__}"


def _hub_error_message(name: str, config: str | None, split: str, error: BaseException) -> str:
    """The reason why a dataset on the Hub, or a dataset folder, cannot be loaded."""
    if "corresponds to no data" in str(error) or "at least one example" in str(error):
        return str(no_text("/".join(filter(None, (name, config))) + f" [{split}]"))
    if os.path.isfile(name):
        return f"dataset_name={name} is a file: pass it as train_file"
    if name.startswith((".", "/", "~")) and not os.path.exists(name):
        return f"dataset_name={name}: no such folder"
    reason = str(error).partition("Example of usage")[0]
    if isinstance(error, ConnectionError):
        reason += "; without a network, pass a train_file or a dataset that is in the cache"
    requested = f" dataset_config={config}" if config else ""
    return f"dataset_name={name}{requested} dataset_split={split}: {reason}"
