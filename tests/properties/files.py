"""Files to read: written as they should be, and damaged."""

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
    """A file of a new name: two files of one name and size within a tick of the clock share a place in the cache."""
    path = folder / f"{next(NUMBER)}{suffix}"
    path.write_bytes(gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content)
    return str(path)


def parquet(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def encoded(suffix, columns, rows):
    """Rows of texts as the bytes of a file (before gzip), with a column of numbers beside them."""
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
    """Any bytes, or a file with a stretch of it replaced, repeated or cut off."""
    content = draw(st.sampled_from(contents))
    start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 30))
    junk = draw(st.binary(max_size=30) | st.just(content[:200]))
    return draw(st.sampled_from([junk, content[:start] + junk + content[start + length :], content[:start]]))


def loads_or_says_why(load):
    """The result, or None where an `InputError` of one line was raised."""
    try:
        return load()
    except InputError as error:
        assert "\n" not in str(error)
        return None
