"""Rows of text files, by format: lines, tables of cells, JSON, Arrow and Parquet.

The functions yield the number of the line where a row begins, and its cells.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fmicl_text.errors import InputError
from fmicl_text.text.columns import STRINGS, no_text, select_columns
from fmicl_text.text.opening import TextFile, check_content, fault, not_utf8, open_text

BATCH_ROWS = 10_000  # at most, in a table
_LONGEST_CELL, _LONGEST_ITEM = 2**26, 2**28  # characters; an open quote or bracket must not read gigabytes
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "pipes"}
_CELL_HINTS = {
    True: "; cells that contain a separator, a quote or a line break must be in double quotes",
    False: "; cells cannot contain a tab",
}
_SPACE = re.compile(r"\s*")
Row = tuple[int, Sequence[Any]]


# Lines


def lines_of(file: TextFile, columns: Sequence[str]) -> Iterator[Row]:
    with open_text(file) as lines:  # ends at \n, \r\n or a lone \r; U+2028, U+0085 and form feed stay inside the line
        for number, line in enumerate(lines, start=1):
            yield number, (line.removesuffix("\n"),)


def check_lines(file: TextFile) -> None:
    """Raise `InputError` if the lines are not texts, but JSON or rows of a table."""
    with open_text(file) as text:
        lines = [line.strip() for line in islice(text, 1000) if line.strip()]
    _check_not_json(file, lines[0] if lines else "")
    numbers = {line.count("\t") for line in lines}
    if len(lines) > 1 and len(numbers) == 1 and (number := numbers.pop()):
        raise fault(
            file,
            f"its lines have {number + 1} cells separated by tabs: name it .tsv, with the names of the columns in the "
            "first line",
        )


def _check_not_json(file: TextFile, line: str) -> None:
    try:
        is_object = line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return
    if is_object:
        raise fault(file, "its lines are JSON objects: name it .jsonl")


# Tables of cells


def find_separator(file: TextFile) -> TextFile:
    """The separator of a file, which may not be the one that its name suggests.

    Raises:
        InputError: The header suggests another separator, but the rows do not have the same number of cells.
    """
    with open_text(file, newline="") as text:
        sample = text.read(2**16)
    header = next((line for line in sample.splitlines() if line.strip()), "")
    _check_not_json(file, header)
    if declared := re.match(r'"?sep=(\\t|[^\w\s"]|\t)"?[ ,;\t]*(\r\n|\n|\r)', sample, re.IGNORECASE):  # for Excel
        return replace(file, separator=declared[1].replace("\\t", "\t"), skip=1)
    if re.match('"?sep=', sample, re.IGNORECASE):
        raise fault(file, f"its first line is {header[:80]!r}; expected sep= and one separator")
    expected = {".csv": ",", ".tsv": "\t"}[file.suffix]
    widths = {mark: _widths(replace(file, separator=mark), sample) for mark in _SEPARATORS}
    if not any(widths.values()):
        return replace(file, separator=expected)
    regular = [mark for mark, found in widths.items() if len(set(found)) == 1 and found[0] > 1]
    if max(found[0] for found in widths.values() if found) == 1:
        _check_one_column(file, header, sample)
    is_clear = expected in regular and (expected == "\t" or len(regular) == 1)
    if is_clear or max(found[0] for found in widths.values() if found) == 1:
        return replace(file, separator=expected)
    others = [mark for mark in _SEPARATORS if mark != expected and widths[mark] and widths[mark][0] > 1]
    if (widths[expected] or [1])[0] > 1 and not set(others) & set(regular):
        return replace(file, separator=expected)  # some rows have another number of cells
    if len(regular) == 1 and (widths[expected] or [1])[0] == 1:
        return replace(file, separator=regular[0])
    found = ((others and [mark for mark in regular if mark != expected]) or others)[0]
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


def _check_one_column(file: TextFile, header: str, sample: str) -> None:
    """Raise `InputError` if a mark in the header, which is no accepted separator, is equally often in all lines."""
    lines = [line for line in sample.splitlines()[:50] if line.strip()]
    for mark in sorted(set(re.findall(r"[^\w\s\"'().,;|/#-]", header))):
        if len(lines) > 1 and len({line.count(mark) for line in lines}) == 1:
            raise fault(file, f"its first line is {header[:80]!r}; separate cells by commas or tabs, not by {mark!r}")


def _csv_reader(file: TextFile, text: Any) -> Any:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    if file.quoted:
        return csv.reader(text, delimiter=file.separator, strict=True)
    return csv.reader(text, delimiter=file.separator, quoting=csv.QUOTE_NONE)


def read_header(file: TextFile) -> tuple[list[str], Iterator[Row]]:
    """The names of the columns, and the rows. Blank lines are skipped."""
    rows = _raw_rows(file)
    number, names = next(rows, (0, []))
    if not any(map(str.strip, names)):
        raise no_text(file.path)
    if reason := next(filter(None, map(not_utf8, names)), None):
        raise fault(file, f"line {number} {reason}")
    if twice := [name for name in names if names.count(name) > 1 and name.strip()]:
        raise InputError(f"{file.path}: its header has the column {twice[0]!r} twice")
    return [str(name) for name in names], rows


def _raw_rows(file: TextFile) -> Iterator[Row]:
    hint, width, number = _CELL_HINTS[file.quoted], 0, 0
    with open_text(file, newline="") as text:
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
                raise fault(file, f"line {number}: {reason}{hint}") from None
            if not row or not (width or any(map(str.strip, row))):  # blank, or separators before the header
                continue
            width = width or len(row)
            if len(row) > width and any(row[width:]):
                raise fault(file, f"line {number} has {len(row)} cells, but the header has {width}{hint}")
            yield number, row


def cells_of(file: TextFile, columns: Sequence[str]) -> Iterator[Row]:
    names, rows = read_header(file)
    places = [names.index(name) for name in columns]
    for number, row in rows:
        yield number, [row[place] if place < len(row) else None for place in places]


# JSON


def json_kind(value: Any) -> str:
    kinds = {type(None): "null", str: "string", list: "List", dict: "dict", bool: "bool"}
    return kinds.get(type(value), "number")


def values_of(file: TextFile, columns: Sequence[str]) -> Iterator[Row]:
    """The texts of JSON objects."""
    known = dict(file.kinds)
    for number, row in objects_of(file):
        cells = [row.get(name) for name in columns]
        for name, cell in zip(columns, cells, strict=True):
            if cell is not None and not isinstance(cell, str):
                shown = json.dumps(cell)
                raise InputError(f"{file.path}: column {name!r} must contain strings, line {number} has {shown:.80}")
        if not row.keys() <= known.keys():
            known |= {name: json_kind(value) for name, value in row.items() if name not in known}
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


def objects_of(file: TextFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, one per line or in an array, with their lines. A string in an array is a text."""
    with open_text(file) as lines:
        is_array = None
        for number, line in enumerate(lines, start=1):
            if is_array is None and line.strip():
                is_array = line.lstrip()[0] == "["
            if is_array:
                for begin, item in _array_items(file, lines, line, number):
                    yield begin, _object(file, begin, {"text": item} if isinstance(item, str) else item)
                return
            if line.strip():
                yield number, _object(file, number, _parse(file, line, number))


def _object(file: TextFile, number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise fault(file, f'line {number} is not an object such as {{"text": "a sentence"}}')
    return value


def _parse(file: TextFile, line: str, number: int) -> Any:
    try:
        return json.loads(line.rstrip())
    except (ValueError, RecursionError) as error:
        if reason := not_utf8(line):
            raise fault(file, f"line {number} {reason}") from None
        if isinstance(error, json.JSONDecodeError):
            hint = "" if file.suffix == ".jsonl" else "; expected an object per line, or an array of objects"
            raise fault(file, f"line {number}, character {error.colno}: {error.msg}{hint}") from None
        if isinstance(error, RecursionError):
            raise fault(file, f"line {number} is nested too deeply") from None
    return json.loads(line, parse_int=float)  # an integer of more than 4,300 digits


def _array_items(file: TextFile, rest: io.TextIOWrapper, text: str, number: int) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array that begins in `text`, line `number`, with the lines where they begin."""
    decode, place = json.JSONDecoder(parse_int=float).raw_decode, text.index("[") + 1
    expected = "an item or ]"
    while True:
        begin = _SPACE.match(text, place).end()  # type: ignore[union-attr]
        number, place = number + text.count("\n", place, begin), begin
        mark, reason = text[place : place + 1], "the array is cut off"
        if mark == "]" and "]" in expected:
            break
        if mark == "," and "," in expected:
            place, expected = place + 1, "an item"
            continue
        if mark and "," in expected:
            raise fault(file, f"line {number} has {mark!r} instead of {expected}")
        if mark:
            try:
                item, end = decode(text, place)
            except json.JSONDecodeError as error:  # or the item continues after this block
                reason = error.msg
            except RecursionError:
                raise fault(file, f"line {number} is nested too deeply") from None
            else:
                yield number, item
                number, place, expected = number + text.count("\n", place, end), end, ", or ]"
                continue
        text, place = text[place:], 0
        more = rest.read(max(2**20, len(text))) if len(text) < _LONGEST_ITEM else ""
        if not more:
            raise fault(
                file, f"line {number} {not_utf8(text[:1000])}" if not_utf8(text[:1000]) else f"line {number}: {reason}"
            )
        text += more
    after = text[place + 1 :]
    while after:
        if after.strip():
            raise fault(file, f"line {number} or later has {after.strip()[0]!r} after the end of the array")
        after = rest.read(2**20)


# Arrow and Parquet


def arrow_kind(kind: pa.DataType) -> str:
    return arrow_kind(kind.value_type) if pa.types.is_dictionary(kind) else str(kind)


def arrow_schema(file: TextFile) -> pa.Schema:
    _check_not_empty(file)
    with open(file.path, "rb") as content:
        if not (start := content.read(64)).startswith((b"PAR1", b"ARROW1")):
            check_content(file, start)
    if file.suffix == ".parquet":
        return pq.read_schema(file.path)
    return next(_arrow_batches(file, None)).schema


def _check_not_empty(file: TextFile) -> None:
    if Path(file.path).stat().st_size == 0:
        raise no_text(file.path)


def _arrow_batches(file: TextFile, columns: Sequence[str] | None) -> Iterator[Any]:
    """Batches of rows; without `columns`, one that has at least the schema."""
    if file.suffix == ".parquet":
        with pq.ParquetFile(file.path) as parquet:
            yield from parquet.iter_batches(BATCH_ROWS, columns=list(columns or ()))
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
            for start in range(0, len(batch), BATCH_ROWS):
                yield batch.select(list(columns)).slice(start, BATCH_ROWS)


def arrow_tables(file: TextFile, columns: Sequence[str]) -> Iterator[pa.Table]:
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
        binary = array.cast(pa.binary()) if arrow_kind(array.type) in STRINGS else array
        for number, value in enumerate(binary.to_pylist(), start=first):
            if isinstance(value, bytes) and (reason := not_utf8(value.decode(errors="surrogateescape"))):
                raise fault(file, f"row {number}, column {name!r}: {reason}") from None
        raise
