"""Training text from files, the Hub or Python lists: checked, stripped, without blank rows."""

from __future__ import annotations

import glob
import gzip
import io
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.packaged_modules.json.json import JsonConfig

from fmicl_text.errors import InputError
from fmicl_text.files import check_regular, content_hash
from fmicl_text.loading import (
    cache_of,
    explain_full_cache,
    hub_revision,
    load_named_dataset,
    stream_fingerprint,
    translate_dataset_errors,
)

logger = logging.getLogger(__name__)

# With na_filter, pandas would read the cells null, NA and nan as None.
_CSV: dict[str, Any] = {"keep_default_na": False, "na_filter": False}
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Lines end at \n, \r\n or a lone \r; U+2028, U+0085 and form feed stay inside the line.
    ".txt": ("text", {"encoding": "utf-8-sig"}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t", "quoting": 3}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_CELL_HINTS = {
    ".csv": "; cells that contain a comma, a quote or a line break must be in double quotes",
    ".tsv": "; cells cannot contain a tab",
}
_STREAM_BUFFER = 10_000
_ACCEPTED = ".txt, .csv, .tsv, .jsonl (also as .gz) or .parquet"
_PAIR_COLUMNS = ("sent0", "sent1", "hard_neg")
_STRINGS = ("string", "large_string")


@dataclass(frozen=True)
class TextData:
    """Training text and statistics of its source.

    Args:
        dataset: The text columns only. Every cell is a stripped, non-empty string.
        columns: One column (dropout positives), two (positive pairs) or more (pairs with hard negatives).
        num_skipped: Number of rows in the source with a blank or missing text; None when streaming.
        source: The file, or `name[/config] [split]` of a dataset.
        fingerprint: Identifies the content and order of a stream; None if unknown, or not a stream.
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
            "share of duplicates": None if self.duplicate_share is None else round(self.duplicate_share, 4),
            "share of texts truncated": None if self.truncated_share is None else round(self.truncated_share, 4),
        }
        return {name: value for name, value in metadata.items() if value is not None}


def load_training_text(
    train_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    text_column: str | None = None,
    streaming: bool = False,
    max_train_samples: int | None = None,
    shuffle_seed: int | None = None,
    at_least: int = 1,
) -> TextData:
    """Load training text from a local file or a dataset on the Hub. Rows with a blank or missing text are skipped.

    Args:
        train_file: UTF-8 .txt (one sentence per line), .csv, .tsv (without quoting) or .jsonl, optionally gzipped, or
            .parquet. Empty lines are skipped.
        dataset_name: Hub name or local folder of a dataset. Exactly one of `dataset_name` and `train_file` is
            required.
        dataset_config: Configuration of `dataset_name`.
        dataset_split: Split of `dataset_name`.
        text_column: The column to train on. By default, `text_columns` selects one to three columns.
        streaming: Read the data while training, without a copy on disk. Only its start is checked here; `datasets`
            raises an error when training reaches an invalid row.
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
    read: Callable[[], Any]
    if train_file is not None:
        source, read = train_file, partial(_read_file, train_file, streaming)
        explain = partial(_file_error_message, train_file)
    else:
        source = "/".join(filter(None, (dataset_name, dataset_config))) + f" [{dataset_split}]"
        read = partial(load_named_dataset, str(dataset_name), dataset_config, dataset_split, streaming)
        explain = partial(_hub_error_message, str(dataset_name), dataset_config, dataset_split)

    with translate_dataset_errors(explain):
        raw = read()
        columns = text_columns(raw, text_column, source)
        usable = _drop_blank(raw, columns)
        if not (num_usable := len(list(islice(usable, at_least)))):
            raise no_text(source)
        if (num_usable := min(num_usable, max_train_samples or num_usable)) < at_least:
            raise InputError(f"{source}: {num_usable} training examples are fewer than one batch of {at_least}")
    if streaming:
        usable = usable if max_train_samples is None else usable.take(max_train_samples)
        usable = usable if shuffle_seed is None else usable.shuffle(seed=shuffle_seed, buffer_size=_STREAM_BUFFER)
        content = content_hash(train_file) if train_file else stream_fingerprint(str(dataset_name), dataset_config)
        rows = (
            None
            if content is None
            else f"{content} {dataset_config} {dataset_split} {columns} {max_train_samples} {shuffle_seed}"
        )
        return TextData(usable, columns, None, source, rows)
    num_skipped = len(raw) - len(usable)
    if max_train_samples is not None:
        usable = usable.select(range(min(max_train_samples, len(usable))))
    return TextData(usable, columns, num_skipped, source, num_rows=len(usable))


def as_text_dataset(rows: Any) -> datasets.Dataset | datasets.IterableDataset:
    """A dataset of text columns for `TextViewCollator`. Rows with a blank or missing text are skipped,
    with a warning unless the dataset is streamed.

    >>> as_text_dataset([("a dog", "the dog runs"), ("a cat", "the cat sleeps")]).column_names
    ['sent0', 'sent1']

    Args:
        rows: A list of texts, a list of pairs or triplets of texts, or a dataset whose columns `text_columns` accepts.

    Raises:
        InputError: The rows are of another type, contain no text, or have ambiguous columns.
    """
    source = "train_dataset"
    dataset = rows if isinstance(rows, datasets.Dataset | datasets.IterableDataset) else _from_list(rows, source)
    usable = _drop_blank(dataset, text_columns(dataset, source=source))
    if isinstance(dataset, datasets.Dataset):
        if not len(usable):
            raise no_text(source)
        if num_skipped := len(dataset) - len(usable):
            logger.warning("%s: skipped %d of %d rows with a blank text", source, num_skipped, len(dataset))
    return usable


def _from_list(rows: Any, source: str) -> datasets.Dataset:
    """The dataset of a list of texts (column text) or of pairs or triplets of texts (sent0, sent1[, hard_neg])."""
    expected = f"{source} must be a dataset, a list of strings, or a list of pairs or triplets of strings"
    if not isinstance(rows, list | tuple):
        raise InputError(f"{expected}; got {type(rows).__name__}")
    if not rows:
        raise no_text(source)
    table = [(row,) if isinstance(row, str) else row for row in rows]
    for number, row in enumerate(table):
        is_row = isinstance(row, list | tuple) and all(isinstance(text, str) for text in row)
        if not is_row or not 1 <= len(row) == len(table[0]) <= 3:
            raise InputError(f"{expected}; got {rows[number]!r:.80} at index {number}")
    names = ("text",) if len(table[0]) == 1 else _PAIR_COLUMNS[: len(table[0])]
    return datasets.Dataset.from_dict(dict(zip(names, zip(*table, strict=True), strict=True)))


def text_columns(
    dataset: datasets.Dataset | datasets.IterableDataset, text_column: str | None = None, source: str = "train_dataset"
) -> tuple[str, ...]:
    """The columns to train on: one (dropout positives), two (positive pairs) or three (with a hard negative).

    The first rule that applies is used: `text_column`; sent0, sent1[, hard_neg]; text; sentence; the only column;
    the two or three columns of a dataset in which all columns are strings, in their order, as in sentence-transformers.

    Args:
        dataset: Its columns are the candidates.
        text_column: The column to train on. None applies the other rules.
        source: Name of the dataset in messages.

    Raises:
        InputError: There are no columns, none of the rules applies, or a selected column does not contain strings.
    """
    features = _features(dataset)
    columns = _select_columns(features, text_column, source)
    for name in columns:
        if (kind := _kind(features[name])) not in (*_STRINGS, "null"):
            if kind == "Json" and os.path.isfile(source):  # the loader's type for columns of mixed types
                kind = f"mixed types ({_first_fault(source, name)})"
            raise InputError(f"{source}: column {name!r} must contain strings, got {kind}")
    return columns


def _select_columns(features: datasets.Features, text_column: str | None, source: str) -> tuple[str, ...]:
    found = list(features)
    if not found:
        raise no_text(source)
    if text_column is not None:
        if text_column not in found:
            raise InputError(f"{source} has no column {text_column!r} (text_column); its columns are {found}")
        return (text_column,)
    if "sent0" in found and "sent1" in found:
        return tuple(name for name in _PAIR_COLUMNS if name in found)
    for name in ("text", "sentence"):
        if name in found:
            return (name,)
    if len(found) == 1 or (len(found) <= 3 and all(_kind(features[name]) in _STRINGS for name in found)):
        return tuple(found)
    raise InputError(
        f"{source} has the columns {found}: select one with text_column, or keep only one, two (pairs) or three "
        "(triplets) columns of strings"
    )


def _kind(feature: Any) -> str:
    """The type of a column: string, int64, List, ..."""
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def _read_file(train_file: str, streaming: bool) -> Any:
    """The rows of a local file as `datasets` reads them."""
    suffix = _suffix(train_file)
    check_regular(train_file, f"train_file={train_file}")
    if os.path.isdir(train_file):
        raise InputError(f"train_file={train_file} is a folder; expected one file: {_ACCEPTED}")
    if suffix not in _LOADERS or train_file.lower().endswith(".parquet.gz"):
        raise InputError(f"train_file={train_file}: unsupported file type; expected {_ACCEPTED}")
    with _open(train_file) as file:
        if not file.read(1):
            raise no_text(train_file)
    if suffix == ".jsonl":
        _check_block_starts(train_file)
    builder, options = _LOADERS[suffix]
    # data_files are glob patterns: without escaping, a[1].txt would match no file.
    data_files, cache_dir = glob.escape(train_file), None if streaming else cache_of(train_file)
    dataset = datasets.load_dataset(
        builder, data_files=data_files, split="train", streaming=streaming, cache_dir=cache_dir, **options
    )
    names = list(_features(dataset))
    if builder == "csv" and len(names) == 1 and (found := _other_separator(names[0], suffix)):
        expected = {".csv": "commas", ".tsv": "tabs"}[suffix]
        raise InputError(
            f"{train_file}: its only column is {names[0]!r}; separate cells by {expected}, not by {found!r}"
        )
    # If every row has more cells than the header, pandas takes the first cell for an index and shifts the others.
    if builder == "csv" and "__index_level_0__" in _features(dataset):
        raise InputError(f"{train_file}: line 2 has more cells than the header{_CELL_HINTS[suffix]}")
    return dataset


def _other_separator(header: str, suffix: str) -> str | None:
    """Another separator than that of the file type in a header of one cell, such as `id;text` in a .csv file."""
    others = {".csv": ";|\t", ".tsv": ";|,"}[suffix]
    return next((separator for separator in others if separator in header), None)


def _check_block_starts(train_file: str) -> None:
    """Raise `InputError` if a block of JSON lines, as the loader splits them, does not begin with an object: pyarrow
    crashes the process on a null there, even after a byte that is not UTF-8. A file with a JSON array is not
    split into blocks."""
    with _open(train_file) as file:
        while start := file.read(2**16):
            first = start.removeprefix(b"\xef\xbb\xbf").strip()[:1]
            if first == b"[":
                return
            if first not in (b"{", b""):
                raise InputError(f"{train_file} cannot be read as .jsonl: {_first_fault(train_file)}")
            file.seek(max(0, JsonConfig.chunksize - len(start)), io.SEEK_CUR)
            file.readline()


def _suffix(train_file: str) -> str:
    """The suffix that specifies the format: .txt for both a.txt and a.txt.gz."""
    return Path(train_file.lower().removesuffix(".gz")).suffix


def _open(train_file: str) -> io.BufferedIOBase:
    """Open a file to read its uncompressed bytes."""
    return gzip.open(train_file) if train_file.lower().endswith(".gz") else open(train_file, "rb")


def _features(dataset: Any) -> datasets.Features:
    """The columns and their types, from the first row if a streamed dataset does not declare them."""
    if dataset.features is not None:
        return dataset.features
    first = next(dataset.with_format("arrow").iter(batch_size=1), None)
    return datasets.Features() if first is None else datasets.Features.from_arrow_schema(first.schema)


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
    # The cast is for columns of nulls. Gzipped and concatenated files keep their byte order mark.
    texts = {name: pc.utf8_ltrim(table[name].cast(pa.string()), "\ufeff") for name in table.column_names}
    columns = {name: pc.utf8_trim_whitespace(text) for name, text in texts.items()}
    return pa.table(columns).filter(
        reduce(pc.and_, [pc.greater(pc.binary_length(column), 0) for column in columns.values()])
    )


def _file_error_message(train_file: str, error: BaseException) -> str:
    """The reason for an error of the loader, with the line number if the file can be read line by line."""
    if not os.path.exists(train_file):
        return f"train_file={train_file}: no such file"
    # Messages of the loaders for csv, jsonl, txt and parquet. If they change, the loader's message is shown instead.
    no_rows = ("No columns to parse", "corresponds to no data", "at least one example", "BatchSize must be greater")
    if any(sign in str(error) for sign in no_rows):
        return str(no_text(train_file))
    suffix = _suffix(train_file)
    fault = _first_fault(train_file) if suffix != ".parquet" and isinstance(error, ValueError) else None
    _, tokenizing, reason = str(error).strip().rpartition("Error tokenizing data. C error: ")
    hint = _CELL_HINTS.get(suffix, "") if tokenizing and not fault else ""
    return f"{train_file} cannot be read as {suffix}: {fault or reason or type(error).__name__}{hint}"


def _first_fault(train_file: str, column: str | None = None) -> str | None:
    """The first invalid line: not UTF-8 or, in JSON lines, not an object or with a value in `column` that is
    neither a string nor null.

    Slow, and therefore called only after an error. The loader's own messages count bytes, or rows within a block.
    """
    is_json = _suffix(train_file) == ".jsonl"
    with _open(train_file) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode()
                row = json.loads(text) if is_json and text.strip() else {}  # for bytes, it would guess the encoding
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x})"
            except json.JSONDecodeError as error:
                return f"line {number}, character {error.colno}: {error.msg}"
            if not isinstance(row, dict):
                return f'line {number} is not an object such as {{"text": "a sentence"}}'
            if column is not None and not isinstance(row.get(column), str | None):
                return f"line {number} has {json.dumps(row[column])}"
    return None


def _hub_error_message(name: str, config: str | None, split: str, error: BaseException) -> str:
    """The reason why a dataset on the Hub, or a dataset folder, cannot be loaded."""
    if os.path.isfile(name):
        return f"dataset_name={name} is a file: pass it as train_file"
    if name.startswith((".", "/", "~")) and not os.path.exists(name):
        return f"dataset_name={name}: no such folder"
    reason = str(error).partition("Example of usage")[0]
    if isinstance(error, ConnectionError):
        reason += "; without a network, pass a train_file or a dataset that is in the cache"
    requested = f" dataset_config={config}" if config else ""
    return f"dataset_name={name}{requested} dataset_split={split}: {reason}"


def no_text(source: str) -> InputError:
    return InputError(f"{source} contains no text: it is empty or all its rows are blank")
