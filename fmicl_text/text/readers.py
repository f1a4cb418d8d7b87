"""Files of text in any format to tables of strings. Only the columns that are trained on are read."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from fmicl_text.errors import InputError
from fmicl_text.files import check_regular, is_disk_full
from fmicl_text.text.columns import DIGITS, STRINGS, no_text, select_columns

FORMATS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
COMPRESSED: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(path, compression="zstd"),
}
ACCEPTED = ".txt, .csv, .tsv, .json or .jsonl (also as .gz, .bz2, .xz or .zst), .parquet or .arrow"
_BINARY = (".parquet", ".arrow")
_SAMPLE = 1000  # rows that decide about the columns
_BATCH_ROWS, _BATCH_CHARS = 10_000, 2**23
_LONGEST_CELL, _LONGEST_ITEM = 2**26, 2**28  # characters; an open quote or bracket must not read gigabytes
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "pipes"}
_CELL_HINTS = {
    True: "; cells that contain a separator, a quote or a line break must be in double quotes",
    False: "; cells cannot contain a tab",
}
_ROWS_FORMAT = "1"  # increment when the rows change, so that cached rows of older versions are not reused
_SPACE = re.compile(r"\s*")
Row = tuple[int, Sequence[Any]]  # number of the line where a row begins, and its cells


@dataclass(frozen=True)
class TextFile:
    """A file and how it is read.

    Args:
        path: The file.
        suffix: Its format, one of `FORMATS`.
        kinds: The type of each column, as in `columns.select_columns`.
        separator: Between the cells of a .csv or .tsv file.
        skip: Number of lines before the header.
        names: The columns to read, or None for those that `columns.select_columns` selects.
    """

    path: str
    suffix: str
    kinds: Mapping[str, str] = field(default_factory=dict)
    separator: str = ""
    skip: int = 0
    names: tuple[str, ...] | None = None

    @property
    def quoted(self) -> bool:
        """Whether double quotes enclose cells."""
        return self.suffix == ".csv" or self.separator != "\t"


def suffix_of(path: str) -> str | None:
    """The suffix that specifies the format, .txt for both a.txt and a.txt.gz; None if it is not supported."""
    suffixes = Path(path.lower()).suffixes
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    suffix = "".join(suffixes[-2:-1] if compressed else suffixes[-1:])
    return suffix if suffix in FORMATS and not (compressed and suffix in _BINARY) else None


def inspect_file(path: str, names: Sequence[str] | None) -> tuple[TextFile, tuple[str, ...]]:
    """How a file is read, and the columns to train on: `names`, or those that `columns.select_columns` selects.

    Raises:
        InputError: It cannot be read, is empty, or no column can be selected.
    """
    suffix = suffix_of(path)
    check_regular(path, f"train_file={path}")
    if suffix is None:
        raise InputError(f"train_file={path}: unsupported file type; expected {ACCEPTED}")
    file = TextFile(path, suffix, names=None if names is None else tuple(names))
    with _faults(file):
        if suffix in (".csv", ".tsv"):
            file = _sniff(file)
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
    with _faults(file):
        if file.suffix in _BINARY:
            yield from _arrow_tables(file, columns)
        else:
            rows = {".txt": _lines, ".csv": _cells, ".tsv": _cells}.get(file.suffix, _values)(file, columns)
            yield from _batches(file, rows, columns)


@contextmanager
def _faults(file: TextFile) -> Iterator[None]:
    """Within this context, errors of reading are raised as `InputError` with the name of the file."""
    try:
        yield
    except (InputError, Warning):  # a Warning is raised where filters turn warnings into errors
        raise
    except FileNotFoundError as error:
        raise InputError(f"train_file={file.path}: no such file") from error
    except Exception as error:  # for invalid files, any type
        if is_disk_full(error):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _fault(file, " ".join(reason.split())[:300]) from error


def _fault(file: TextFile, reason: str) -> InputError:
    return InputError(f"{file.path} cannot be read as {file.suffix}: {reason}")


def _open(file: TextFile, newline: str | None = None) -> io.TextIOWrapper:
    """The decompressed text. Bytes that are not UTF-8 become surrogates, so that only the cells that are used are
    checked, and the error has their line."""
    opener = COMPRESSED.get(Path(file.path.lower()).suffix, lambda path: open(path, "rb"))
    with opener(file.path) as binary:
        start = binary.read(4)
    if not start:
        raise no_text(file.path)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or re.fullmatch(rb"[\t -~]\0[\t -~]\0|\0[\t -~]\0[\t -~]", start):
        shown = f" (byte 0x{start[0]:02x})" if start[0] >= 0xFE else ""
        raise _fault(file, f"line 1 is not UTF-8{shown} but UTF-16: save it as UTF-8")
    return io.TextIOWrapper(opener(file.path), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _not_utf8(text: str) -> str | None:
    """Why a text cannot be encoded, if it cannot."""
    found = re.search("[\ud800-\udfff]", text)
    if found is None:
        return None
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # from surrogateescape
        return f"is not UTF-8 (byte 0x{code - 0xDC00:02x})"
    return f"has one half of a surrogate pair (\\u{code:x}), which is not a character"


def _batches(file: TextFile, rows: Iterator[Row], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Rows in tables."""
    numbers: list[int] = []
    cells: list[Sequence[Any]] = []
    size = 0
    for number, row in rows:
        numbers.append(number)
        cells.append(row)
        size += sum(len(cell) for cell in row if cell)
        if len(cells) >= _BATCH_ROWS or size > _BATCH_CHARS:
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
                if reason := _not_utf8(cell or ""):
                    raise _fault(file, f"line {number} {reason}") from None
        raise
    return pa.table(dict(zip(columns, arrays, strict=True)))


def _kinds(file: TextFile, limit: int | None) -> dict[str, str]:
    """The type of each column, from the first `limit` rows, or from all of them."""
    if file.suffix == ".txt":
        _open(file).close()
        return {"text": "string"}
    if file.suffix in _BINARY:
        return {field.name: _arrow_kind(field.type) for field in _arrow_schema(file)}
    if file.suffix in (".csv", ".tsv"):
        names, rows = _header(file)
        sample = list(islice(rows, limit))
        numeric = [bool(sample) and all(_is_number(row[i : i + 1]) for _, row in sample) for i in range(len(names))]
        return {name: DIGITS if digits else "string" for name, digits in zip(names, numeric, strict=True)}
    kinds: dict[str, str] = {}
    for _, row in islice(_objects(file), limit):
        for name, value in row.items():
            if kinds.get(name, "null") == "null" or isinstance(value, str):
                kinds[name] = _json_kind(value)
    return kinds


def _is_number(cells: Sequence[str]) -> bool:
    try:
        return not cells or not cells[0].strip() or float(cells[0]) is not None
    except ValueError:
        return False


# Lines


def _lines(file: TextFile, columns: Sequence[str]) -> Iterator[Row]:
    with _open(file) as lines:  # ends at \n, \r\n or a lone \r; U+2028, U+0085 and form feed stay inside the line
        for number, line in enumerate(lines, start=1):
            yield number, (line.removesuffix("\n"),)


# Tables of cells


def _sniff(file: TextFile) -> TextFile:
    """The separator of a file, which may not be the one that its name suggests.

    Raises:
        InputError: The header suggests another separator, but the rows do not have the same number of cells.
    """
    with _open(file, newline="") as text:
        sample = text.read(2**16)
    if declared := re.match(r'"?sep=(.)"?(\r\n|\n|\r)', sample, re.IGNORECASE):  # written for Excel
        return replace(file, separator=declared[1], skip=1)
    expected = {".csv": ",", ".tsv": "\t"}[file.suffix]
    widths = {mark: _widths(replace(file, separator=mark), sample) for mark in _SEPARATORS}
    if not any(widths.values()):
        return replace(file, separator=expected)
    regular = [mark for mark, found in widths.items() if len(set(found)) == 1 and found[0] > 1]
    if expected in regular or max(found[0] for mark, found in widths.items() if found) == 1:
        return replace(file, separator=expected)
    others = [mark for mark in _SEPARATORS if mark != expected and widths[mark] and widths[mark][0] > 1]
    if (widths[expected] or [1])[0] > 1 and not set(others) & set(regular):
        return replace(file, separator=expected)  # some rows have another number of cells
    if len(regular) == 1 and (widths[expected] or [1])[0] == 1:
        return replace(file, separator=regular[0])
    header = sample.splitlines()[0]
    found = (regular or others)[0]
    raise InputError(
        f"{file.path}: its first line is {header[:80]!r}; separate cells by {_SEPARATORS[expected]}, not by {found!r}"
    )


def _widths(file: TextFile, sample: str) -> list[int]:
    """The number of cells of the first rows."""
    reader, widths = _csv_reader(file, io.StringIO(sample, newline="")), []
    try:
        for row in islice(reader, 50):
            if row:
                widths.append(len(row))
    except csv.Error:  # also where the sample ends within quotes
        pass
    return widths[:-1] if len(widths) > 1 and len(sample) >= 2**16 else widths


def _csv_reader(file: TextFile, text: Any) -> Any:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    quoting = csv.QUOTE_MINIMAL if file.quoted else csv.QUOTE_NONE
    return csv.reader(text, delimiter=file.separator, quoting=quoting, strict=file.quoted)


def _header(file: TextFile) -> tuple[list[str], Iterator[Row]]:
    """The names of the columns, and the rows. Blank lines are skipped."""
    rows = _raw_rows(file)
    _, names = next(rows, (0, []))
    while names and not names[-1].strip():  # separators at the ends of the lines
        names = names[:-1]
    if not names:
        raise no_text(file.path)
    if twice := [name for name in names if names.count(name) > 1 and name.strip()]:
        raise InputError(f"{file.path}: its header has the column {twice[0]!r} twice")
    return [str(name) for name in names], rows


def _raw_rows(file: TextFile) -> Iterator[Row]:
    hint, width, number = _CELL_HINTS[file.quoted], 0, 0
    with _open(file, newline="") as text:
        for _ in range(file.skip):
            text.readline()
        reader = _csv_reader(file, text)
        while True:
            number = file.skip + reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reason = "a quote is not closed" if "unexpected end" in str(error) else str(error)
                raise _fault(file, f"line {number}: {reason}{hint}") from None
            if not row:
                continue
            width = width or len(row)
            if len(row) > width and any(row[width:]):
                raise _fault(file, f"line {number} has {len(row)} cells, but the header has {width}{hint}")
            yield number, row


def _cells(file: TextFile, columns: Sequence[str]) -> Iterator[Row]:
    names, rows = _header(file)
    places = [names.index(name) for name in columns]
    for number, row in rows:
        yield number, [row[place] if place < len(row) else None for place in places]


# JSON


def _json_kind(value: Any) -> str:
    kinds = {type(None): "null", str: "string", list: "List", dict: "dict", bool: "bool"}
    return kinds.get(type(value), "number")


def _values(file: TextFile, columns: Sequence[str]) -> Iterator[Row]:
    """The texts of JSON objects."""
    known = dict(file.kinds)
    for number, row in _objects(file):
        cells = [row.get(name) for name in columns]
        for name, cell in zip(columns, cells, strict=True):
            if not isinstance(cell, str | None):
                shown = json.dumps(cell)
                raise InputError(f"{file.path}: column {name!r} must contain strings, line {number} has {shown:.80}")
        if not row.keys() <= known.keys():
            known |= {name: _json_kind(value) for name, value in row.items() if name not in known}
            _check_same_columns(file, known, columns, number)
        yield number, cells


def _check_same_columns(file: TextFile, kinds: Mapping[str, str], columns: Sequence[str], number: int) -> None:
    """Raise `InputError` if a new column would have been selected, had it been in the first rows."""
    try:
        selected = select_columns(kinds, file.names, file.path)
    except InputError:
        return
    if new := [name for name in selected if name not in columns]:
        raise InputError(
            f"{file.path}: line {number} has the column {new[0]!r}, which the lines before do not have: select the "
            "columns with text_columns"
        )


def _objects(file: TextFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, one per line or in an array, with their lines. A string in an array is a text."""
    with _open(file) as lines:
        start = ""
        for number, line in enumerate(lines, start=1):
            if not start and (start := line.strip()[:1]) == "[":
                break
            if line.strip():
                yield number, _object(file, number, _parse(file, line, number))
        else:
            return
        for number, item in _array_items(file, lines, line, number):
            yield number, _object(file, number, {"text": item} if isinstance(item, str) else item)


def _object(file: TextFile, number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _fault(file, f'line {number} is not an object such as {{"text": "a sentence"}}')
    return value


def _parse(file: TextFile, line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        if reason := _not_utf8(line):
            raise _fault(file, f"line {number} {reason}") from None
        if isinstance(error, json.JSONDecodeError):
            raise _fault(file, f"line {number}, character {error.colno}: {error.msg}") from None
        if isinstance(error, RecursionError):
            raise _fault(file, f"line {number} is nested too deeply") from None
    return json.loads(line, parse_int=float)  # an integer of more than 4,300 digits


def _array_items(file: TextFile, rest: io.TextIOWrapper, text: str, number: int) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array that begins in `text`, line `number`, with the lines where they begin."""
    decode, place, after = json.JSONDecoder(parse_int=float).raw_decode, 0, "["
    while True:
        begin = _SPACE.match(text, place).end()  # type: ignore[union-attr]
        number, place = number + text.count("\n", place, begin), begin
        mark = text[place : place + 1]
        if mark and after == "]":
            raise _fault(file, f"line {number} has {mark!r} after the end of the array")
        if mark and (mark == after == "[" or (mark in ",]" and after == ",")):
            after, place = {"[": "first", ",": "item", "]": "]"}[mark], place + 1
            continue
        if mark == "]" and after == "first":
            after, place = "]", place + 1
            continue
        if mark and after == ",":
            raise _fault(file, f"line {number}: expected , or ] instead of {mark!r}")
        fault = None
        if mark:
            try:
                item, end = decode(text, place)
                yield number, item
                number, place, after = number + text.count("\n", place, end), end, ","
                continue
            except json.JSONDecodeError as error:
                fault = f"line {number + error.lineno - 1 - text.count(chr(10), 0, place)}: {error.msg}"
            except RecursionError:
                raise _fault(file, f"line {number} is nested too deeply") from None
        text = text[place:]
        more = rest.read(max(2**20, len(text))) if len(text) < _LONGEST_ITEM else ""
        if not more and after == "]":
            return
        if not more:
            reason = _not_utf8(text[:1000])
            raise _fault(file, f"line {number} {reason}" if reason else fault or f"line {number}: the array is cut off")
        text, place = text + more, 0


# Arrow and Parquet


def _arrow_kind(kind: pa.DataType) -> str:
    return _arrow_kind(kind.value_type) if pa.types.is_dictionary(kind) else str(kind)


def _arrow_schema(file: TextFile) -> pa.Schema:
    if file.suffix == ".parquet":
        return pq.read_schema(file.path)
    return next(_arrow_batches(file, None)).schema


def _arrow_batches(file: TextFile, columns: Sequence[str] | None) -> Iterator[Any]:
    """Batches of rows; without `columns`, one that has at least the schema."""
    if Path(file.path).stat().st_size == 0:
        raise no_text(file.path)
    if file.suffix == ".parquet":
        with pq.ParquetFile(file.path) as parquet:
            yield from parquet.iter_batches(_BATCH_ROWS, columns=list(columns or ()))
        return
    with pa.memory_map(file.path) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # the format of `datasets`
            source.seek(0)
            reader = pa.ipc.open_stream(source)
            batches = iter(reader)
        if columns is None:
            yield reader.schema.empty_table()
            return
        for batch in batches:
            for start in range(0, len(batch), _BATCH_ROWS):
                yield batch.select(list(columns)).slice(start, _BATCH_ROWS)


def _arrow_tables(file: TextFile, columns: Sequence[str]) -> Iterator[pa.Table]:
    first = 1
    for batch in _arrow_batches(file, columns):
        yield pa.table({name: _strings(file, name, batch[name], first) for name in columns})
        first += len(batch)


def _strings(file: TextFile, name: str, array: pa.Array, first: int) -> pa.Array:
    """An array of strings. `first` is the number of its first row."""
    array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    try:
        strings = array.cast(pa.string())
        strings.validate(full=True)  # the loader accepts bytes that are not UTF-8
        return strings
    except pa.ArrowInvalid:
        binary = array.cast(pa.binary()) if _arrow_kind(array.type) in STRINGS else array
        for number, value in enumerate(binary.to_pylist(), start=first):
            if isinstance(value, bytes) and (reason := _not_utf8(value.decode(errors="surrogateescape"))):
                raise _fault(file, f"row {number}, column {name!r}: {reason}") from None
        raise


# The tables as a dataset


@dataclass
class TextRowsConfig(datasets.BuilderConfig):
    """Identifies the rows in the cache.

    Args:
        columns: The columns to read.
        content: A hash of the files.
    """

    columns: tuple[str, ...] = ()
    content: str = ""


class TextRows(datasets.ArrowBasedBuilder):
    """Builds the dataset of text files: in the cache, or streamed.

    Args:
        splits: The files of each split.
        columns: The columns to read.
        content: A hash of the files.
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
