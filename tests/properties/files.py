"""Valid and corrupted files."""

import csv
import gzip
import io
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from fmicl_text.errors import InputError

NUMBER = itertools.count()


def write(folder, suffix, content):
    """Write a file with a new name, because two files of the same name, size and time would share a cache entry."""
    path = folder / f"{next(NUMBER)}{suffix}"
    path.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content)
    return str(path)


def parquet(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def encoded(suffix, columns, rows):
    """The bytes of a file (before gzip) with rows of texts and a column `id` of numbers."""
    kind, names = suffix.removesuffix(".gz"), [*columns, "id"]
    if kind == ".parquet":
        return parquet(**dict(zip(names, [*zip(*rows, strict=True), range(len(rows))], strict=True)))
    if kind == ".jsonl":
        lines = [
            json.dumps(dict(zip(names, [*row, i], strict=True)), ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)
        ]
        return "\n".join(lines).encode()
    table = [names, *([*row, str(i)] for i, row in enumerate(rows))]
    if kind == ".tsv":
        return "\n".join("\t".join(row) for row in table).encode()
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows(table)
    return buffer.getvalue().encode()


@st.composite
def damaged(draw, contents):
    """Random bytes, or a file in which a section is replaced, repeated or removed."""
    content = draw(st.sampled_from(contents))
    start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 30))
    junk = draw(st.binary(max_size=30) | st.just(content[:200]))
    return draw(st.sampled_from([junk, content[:start] + junk + content[start + length :], content[:start]]))


def load_or_input_error(load):
    """The result, or None if an `InputError` of one line was raised."""
    try:
        return load()
    except InputError as error:
        assert "\n" not in str(error)
        return None
