"""Training sentences from a file or the Hub: checked, stripped, blank rows dropped."""

from __future__ import annotations

import glob
import gzip
import io
import json
import logging
import textwrap
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.packaged_modules.json.json import JsonConfig
from yaml import YAMLError

from fmicl_text.errors import InputError
from fmicl_text.loading import hub_revision, load_named_dataset

# With pandas' na_filter the cells null, NA and nan would become None.
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
    ".csv": "; cells that hold a comma, a quote or a line break must be in double quotes",
    ".tsv": "; cells cannot hold a tab",
}
_STREAM_BUFFER = 10_000
_ACCEPTED = ".txt, .csv, .tsv, .jsonl (these also .gz) and .parquet"
# What load_dataset raises for faulty input. ValueError: undecodable bytes, the errors of pandas and Arrow, unknown
# configs and splits. OSError: missing files, what is no gzip, no way to the Hub. EOFError, zlib.error: damaged gzip.
# RuntimeError: a dataset that is a script. YAMLError: the README of a dataset. UnpicklingError: pickles in archives.
# LookupError, StopIteration: NUL characters in names of columns and in JSON lines.
_LOADER_ERRORS = (
    *(DatasetsError, ValueError, OSError, EOFError, zlib.error, RuntimeError, YAMLError, UnpicklingError),
    *(LookupError, StopIteration),
)


@dataclass(frozen=True)
class TextData:
    """Training sentences, and what was noticed while reading them.

    Args:
        dataset: the text columns only; every cell is a stripped, non-empty string.
        columns: one name (dropout positives), or `sent0`, `sent1` and, where there is one, `hard_neg`.
        num_skipped: rows of the whole source with a blank or missing text; None when streaming.
        duplicate_share: share of the rows of `dataset`, in [0, 1), that equal an earlier row in all text columns;
            None when streaming.
        source: the file, or `name[/config] [split]` of a dataset.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    columns: tuple[str, ...]
    num_skipped: int | None
    duplicate_share: float | None
    source: str

    def metadata(self) -> dict[str, Any]:
        """What a run says and records of it; what is unknown, when streaming, is left out."""
        facts = {
            "source": self.source,
            "revision": hub_revision(self.dataset),
            "columns": " ".join(self.columns),
            "rows": None if self.num_skipped is None else len(self.dataset),
            "blank rows skipped": self.num_skipped,
            "share of duplicates": None if self.duplicate_share is None else round(self.duplicate_share, 4),
        }
        return {name: value for name, value in facts.items() if value is not None}


def load_training_text(
    train_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str | None = None,
    streaming: bool = False,
    max_train_samples: int | None = None,
    shuffle_seed: int | None = None,
    at_least: int = 1,
) -> TextData:
    """The training sentences of a local file or of a dataset on the Hub.

    Args:
        train_file: UTF-8 .txt (a sentence per line), .csv, .tsv (no quoting) or .jsonl, these also .gz, or .parquet.
            Empty lines of .csv, .tsv and .jsonl are no rows.
        dataset_name: Hub name or local dataset folder; exactly one of this and `train_file`.
        dataset_config: configuration of `dataset_name`.
        split: split of `dataset_name`.
        text_column: the column to train on. Default: sent0, sent1[, hard_neg]; else text; else sentence; else the
            only column.
        streaming: read while training, with no copy on disk. Only the start of the data is checked here; a fault
            further on is raised by `datasets` when training gets there.
        max_train_samples: keep the first so many usable rows, at least 1.
        shuffle_seed: when streaming, shuffle in a buffer of 10,000 rows with this seed (the trainer shuffles only what
            has a length).
        at_least: refuse fewer usable rows than this, a batch for one.

    Raises:
        InputError: for every fault of the arguments or the data, in one line.
    """
    if (train_file is None) == (dataset_name is None):
        got = f"--train_file {train_file} and --dataset_name {dataset_name}"
        raise InputError(f"exactly one of --train_file and --dataset_name is needed, got {got}")
    if max_train_samples is not None and max_train_samples < 1:
        raise InputError(f"--max_train_samples must be at least 1, got {max_train_samples}")
    read: Callable[[], Any]
    if train_file is not None:
        source, read = train_file, partial(_read_file, train_file, streaming)
        explain = partial(_explain_file_error, train_file)
    else:
        source = "/".join(filter(None, (dataset_name, dataset_config))) + f" [{split}]"
        read = partial(load_named_dataset, str(dataset_name), dataset_config, split, streaming)
        explain = partial(_explain_hub_error, str(dataset_name), dataset_config, split)

    with _loader_errors_in_one_line(explain):
        raw = read()
        features = _features(raw)
        columns = _text_columns(list(features), text_column, source)
        _check_strings(features, columns, source)
        usable = _drop_blank(raw, columns)
        if not (first := len(list(islice(usable, at_least)))):
            raise _no_sentences(source)
        if (first := min(first, max_train_samples or first)) < at_least:
            raise InputError(f"{source}: {first} training examples do not fill one batch of {at_least}")
    if streaming:
        usable = usable if max_train_samples is None else usable.take(max_train_samples)
        usable = usable if shuffle_seed is None else usable.shuffle(seed=shuffle_seed, buffer_size=_STREAM_BUFFER)
        return TextData(usable, columns, None, None, source)
    num_skipped = len(raw) - len(usable)
    if max_train_samples is not None:
        usable = usable.select(range(min(max_train_samples, len(usable))))
    duplicate_share = _duplicate_share(usable)
    if len(usable) > 1 and duplicate_share == (len(usable) - 1) / len(usable):
        raise InputError(f"{source}: all {len(usable)} rows hold the same text, so no row is a negative of another")
    return TextData(usable, columns, num_skipped, duplicate_share, source)


def _read_file(train_file: str, streaming: bool) -> Any:
    """The rows of a local file as `datasets` reads them."""
    suffix = _suffix(train_file)
    if Path(train_file).is_dir():
        raise InputError(f"--train_file {train_file} is a folder, accepted is one file: {_ACCEPTED}")
    if suffix not in _LOADERS or train_file.lower().endswith(".parquet.gz"):
        raise InputError(f"--train_file {train_file}: unknown kind of file, accepted are {_ACCEPTED}")
    with _open(train_file) as file:
        if not file.read(1):
            raise _no_sentences(train_file)
    if suffix == ".jsonl":
        _check_block_starts(train_file)
    builder, options = _LOADERS[suffix]
    # data_files are patterns: a[1].txt as it stands would match no file and train on nothing.
    data_files = glob.escape(train_file)
    dataset = datasets.load_dataset(builder, data_files=data_files, split="train", streaming=streaming, **options)
    # Where every row has more cells than the header, pandas takes the first cell for an index and shifts the others.
    if builder == "csv" and "__index_level_0__" in _features(dataset):
        raise InputError(f"{train_file}: line 2 has more cells than the header{_CELL_HINTS[suffix]}")
    return dataset


def _check_block_starts(train_file: str) -> None:
    """Raise for a block of JSON lines, as the loader cuts them up, that begins with null: pyarrow would crash the
    process, behind a byte that is no UTF-8 too. An array is read as a whole."""
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
    """The suffix that tells the format: .txt for both a.txt and a.txt.gz."""
    return Path(train_file.lower().removesuffix(".gz")).suffix


def _open(train_file: str) -> io.BufferedIOBase:
    """The bytes of a file, uncompressed."""
    return gzip.open(train_file) if train_file.lower().endswith(".gz") else open(train_file, "rb")


def _features(dataset: Any) -> datasets.Features:
    """The columns and their types; those of the first row where a streamed dataset does not declare them."""
    if dataset.features is not None:
        return dataset.features
    first = next(dataset.with_format("arrow").iter(batch_size=1), None)
    return datasets.Features() if first is None else datasets.Features.from_arrow_schema(first.schema)


def _text_columns(found: list[str], text_column: str | None, source: str) -> tuple[str, ...]:
    """The columns to train on, of those found."""
    if not found:
        raise _no_sentences(source)
    if text_column is not None:
        if text_column not in found:
            raise InputError(f"{source} has no column {text_column!r} (--text_column), its columns are {found}")
        return (text_column,)
    if "sent0" in found and "sent1" in found:
        return tuple(name for name in ("sent0", "sent1", "hard_neg") if name in found)
    for name in ("text", "sentence"):
        if name in found:
            return (name,)
    if len(found) > 1:
        raise InputError(f"{source} has the columns {found}: say with --text_column which one holds the sentences")
    return (found[0],)


def _check_strings(features: datasets.Features, columns: tuple[str, ...], source: str) -> None:
    """Raise for a text column that holds anything but strings and nulls."""
    for name in columns:
        feature = features[name]
        dtype = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
        if dtype == "Json" and Path(source).is_file():
            # So the loader marks a column of mixed types; which row is the odd one, only the file can tell.
            dtype = f"mixed types ({_first_fault(source, name)})"
        if dtype not in ("string", "large_string", "null"):
            raise InputError(f"{source}: column {name!r} must hold strings, got {dtype}")


def _drop_blank(dataset: Any, columns: tuple[str, ...]) -> Any:
    """The text columns, stripped, without the rows in which one of them is missing or blank."""
    progress = {"desc": "Dropping blank rows"} if isinstance(dataset, datasets.Dataset) else {}
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    selected = dataset.select_columns(list(columns)).with_format("arrow")
    return selected.map(_strip, batched=True, features=features, **progress).with_format(None)


def _strip(table: pa.Table) -> pa.Table:
    # The JSON and Parquet loaders let bytes pass that are not UTF-8: they would only fail when training reads them.
    table.validate(full=True)
    # The cast is for columns that hold nothing but nulls; a byte order mark is left in packed files, and joined ones.
    texts = {name: pc.utf8_ltrim(table[name].cast(pa.string()), "\ufeff") for name in table.column_names}
    columns = {name: pc.utf8_trim_whitespace(text) for name, text in texts.items()}
    return pa.table(columns).filter(
        reduce(pc.and_, [pc.greater(pc.binary_length(column), 0) for column in columns.values()])
    )


def _duplicate_share(dataset: datasets.Dataset) -> float:
    """Share of rows that equal an earlier one, by their 64-bit hashes: 8 bytes a row, however long the texts."""
    rows = (
        row
        for batch in dataset.with_format("arrow").iter(batch_size=10_000)
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    )
    hashes = np.sort(np.fromiter(map(hash, rows), np.int64, len(dataset)))
    return int(np.count_nonzero(hashes[1:] == hashes[:-1])) / len(hashes)


@contextmanager
def _loader_errors_in_one_line(explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Turn the loader's exceptions into `InputError`, and silence the log lines that say the same."""
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except InputError:
        raise
    except _LOADER_ERRORS as error:
        # "An error occurred while generating the dataset" says nothing: the cause does.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        raise InputError(textwrap.shorten(explain(cause or error), width=400)) from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def _explain_file_error(train_file: str, error: BaseException) -> str:
    """What is wrong with a file, with the number of the line where the file can tell."""
    if not Path(train_file).exists():
        return f"--train_file {train_file}: no such file"
    # The words of the loaders for csv, jsonl, txt and parquet; where they change, the message is passed on instead.
    no_rows = ("No columns to parse", "corresponds to no data", "at least one example", "BatchSize must be greater")
    if any(sign in str(error) for sign in no_rows):
        return str(_no_sentences(train_file))
    suffix = _suffix(train_file)
    fault = _first_fault(train_file) if suffix != ".parquet" and isinstance(error, ValueError) else None
    _, tokenizing, reason = str(error).strip().rpartition("Error tokenizing data. C error: ")
    hint = _CELL_HINTS.get(suffix, "") if tokenizing and not fault else ""
    return f"{train_file} cannot be read as {suffix}: {fault or reason or type(error).__name__}{hint}"


def _first_fault(train_file: str, column: str | None = None) -> str | None:
    """The first line that is not UTF-8 or, of JSON lines, no object or with something else than a string in `column`.

    Slow, and therefore only asked when the loader has failed: its own messages count bytes, or rows of a block.
    """
    is_json = _suffix(train_file) == ".jsonl"
    with _open(train_file) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode()
                row = json.loads(text) if is_json and text.strip() else {}  # of bytes, it would guess the encoding
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x})"
            except json.JSONDecodeError as error:
                return f"line {number}, character {error.colno}: {error.msg}"
            if not isinstance(row, dict):
                return f'line {number} is not an object such as {{"text": "a sentence"}}'
            if column is not None and not isinstance(row.get(column), str | None):
                return f"line {number} has {json.dumps(row[column])}"
    return None


def _explain_hub_error(name: str, config: str | None, split: str, error: BaseException) -> str:
    """Why a dataset of the Hub, or a dataset folder, cannot be loaded."""
    if Path(name).is_file():
        return f"--dataset_name {name} is a file: give it as --train_file"
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        return f"--dataset_name {name}: no such folder"
    reason = str(error).partition("Example of usage")[0]
    if isinstance(error, ConnectionError):
        reason += "; without a network, give a --train_file or a dataset that is in the cache"
    config_asked = f" --dataset_config {config}" if config else ""
    return f"--dataset_name {name}{config_asked} --split {split}: {reason}"


def _no_sentences(source: str) -> InputError:
    return InputError(f"{source} has no sentences: it is empty or all its rows are blank")
