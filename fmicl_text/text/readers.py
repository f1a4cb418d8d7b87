"""Files of text in any format to tables of strings. Only the columns that are trained on are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa

from fmicl_text.errors import InputError
from fmicl_text.files import check_regular
from fmicl_text.text import formats
from fmicl_text.text.columns import DIGITS, select_columns
from fmicl_text.text.opening import ACCEPTED, BINARY, TextFile, fault, not_utf8, reading, suffix_of

_SAMPLE = 1000  # rows that decide about the columns
_BATCH_CHARS = 2**23
_ROWS_FORMAT = "1"  # increment when the rows change, so that cached rows of older versions are not reused


def inspect_file(path: str, names: Sequence[str] | None) -> tuple[TextFile, tuple[str, ...]]:
    """How a file is read, and the columns to train on: `names`, or those that `columns.select_columns` selects.

    Raises:
        InputError: It cannot be read, is empty, or no column can be selected.
    """
    suffix = suffix_of(path)
    check_regular(path, f"train_file={path}")
    if not os.path.exists(path):
        raise InputError(f"train_file={path}: no such file")
    if suffix is None:
        raise InputError(f"train_file={path}: unsupported file type; expected {ACCEPTED}")
    file = TextFile(path, suffix, names=None if names is None else tuple(names))
    with reading(file):
        if suffix in (".csv", ".tsv"):
            file = formats.find_separator(file)
        file = replace(file, kinds=_kinds(file, _SAMPLE))
        try:
            return file, select_columns(file.kinds, names, path)
        except InputError:
            if suffix not in (".json", ".jsonl"):
                raise
        # A column may be null or absent in the first rows.
        file = replace(file, kinds=_kinds(file, None))
    return file, select_columns(file.kinds, names, path)


def read_tables(file: TextFile, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The columns as strings, in tables of bounded size. Missing cells are null.

    Raises:
        InputError: The file cannot be read, or has a cell that is not text. The message has the line.
    """
    with reading(file):
        if file.suffix in BINARY:
            yield from formats.arrow_tables(file, columns)
        else:
            rows = {".txt": formats.lines_of, ".csv": formats.cells_of, ".tsv": formats.cells_of}.get(
                file.suffix, formats.values_of
            )(file, columns)
            yield from _batches(file, rows, columns)


def _batches(file: TextFile, rows: Iterator[formats.Row], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Rows in tables."""
    numbers: list[int] = []
    cells: list[Sequence[Any]] = []
    size = 0
    for number, row in rows:
        numbers.append(number)
        cells.append(row)
        size += sum(map(len, filter(None, row)))
        if len(cells) >= formats.BATCH_ROWS or size > _BATCH_CHARS:
            yield _table(file, numbers, cells, columns)
            numbers, cells, size = [], [], 0
    if cells:
        yield _table(file, numbers, cells, columns)


def _table(file: TextFile, numbers: list[int], rows: list[Sequence[Any]], columns: Sequence[str]) -> pa.Table:
    try:
        arrays = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
    except UnicodeEncodeError:
        for number, row in zip(numbers, rows, strict=True):
            for cell in row:
                if reason := not_utf8(cell or ""):
                    raise fault(file, f"line {number} {reason}") from None
        raise
    return pa.table(dict(zip(columns, arrays, strict=True)))


def _kinds(file: TextFile, limit: int | None) -> dict[str, str]:
    """The type of each column, from the first `limit` rows, or from all of them."""
    if file.suffix == ".txt":
        formats.check_lines(file)
        return {"text": "string"}
    if file.suffix in BINARY:
        return {field.name: formats.arrow_kind(field.type) for field in formats.arrow_schema(file)}
    if file.suffix in (".csv", ".tsv"):
        names, rows = formats.read_header(file)
        sample = list(islice(rows, limit))
        while not names[-1].strip() and not any("".join(row[len(names) - 1 :]).strip() for _, row in sample):
            names = names[:-1]  # separators at the ends of the lines
        numeric = [bool(sample) and all(_is_number(row[i : i + 1]) for _, row in sample) for i in range(len(names))]
        return {name: DIGITS if digits else "string" for name, digits in zip(names, numeric, strict=True)}
    kinds: dict[str, str] = {}
    for _, row in islice(formats.objects_of(file), limit):
        for name, value in row.items():
            if kinds.get(name, "null") == "null" or isinstance(value, str):
                kinds[name] = formats.json_kind(value)
    return kinds


def _is_number(cells: Sequence[str]) -> bool:
    try:
        return not cells or not cells[0].strip() or float(cells[0]) is not None
    except ValueError:
        return False


@dataclass
class TextRowsConfig(datasets.BuilderConfig):
    """Identifies the rows in the cache.

    Args:
        columns: The columns to read.
        content: A hash of the files, and how they are read.
    """

    columns: tuple[str, ...] = ()
    content: str = ""


class TextRows(datasets.ArrowBasedBuilder):
    """Builds the dataset of text files: in the cache, or streamed.

    Args:
        splits: The files of each split.
        columns: The columns to read.
        content: A hash of the files, and how they are read.
        cache_dir: Folder of the cache.
    """

    BUILDER_CONFIG_CLASS = TextRowsConfig

    def __init__(
        self, splits: Mapping[str, Sequence[TextFile]], columns: tuple[str, ...], content: str, cache_dir: str | None
    ) -> None:
        self.splits = {split: list(files) for split, files in splits.items()}
        super().__init__(cache_dir=cache_dir, hash=_ROWS_FORMAT, columns=columns, content=content)

    def _info(self) -> datasets.DatasetInfo:
        features = datasets.Features({name: datasets.Value("string") for name in self.config.columns})
        return datasets.DatasetInfo(features=features)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": files}) for split, files in self.splits.items()
        ]

    def _generate_tables(self, files: Sequence[TextFile]) -> Iterator[tuple[Any, pa.Table]]:
        for number, file in enumerate(files):
            for batch, table in enumerate(read_tables(file, self.config.columns)):
                yield datasets.builder.Key(number, batch), table
