"""Valid and corrupted files."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from fmicl_text.errors import InputError

NUMBER = itertools.count()


def write(folder, suffix, content):
    """Write a file with a new name, because two files of the same name, size and time would share a cache entry."""
    path = folder / f"{next(NUMBER)}{suffix}"
    path.write_bytes(compressed(suffix, content))
    return str(path)


def compressed(suffix, content):
    """The bytes as a file with this suffix contains them."""
    packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if suffix.endswith(".zst"):
        return pa.compress(content, "zstd", asbytes=True)
    return packed.get(f".{suffix.rpartition('.')[2]}", bytes)(content)


def parquet(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def encoded(suffix, columns, rows):
    """The bytes of a file (before compression) with rows of texts and a column `id` of numbers."""
    kind, names = f".{suffix.split('.')[1]}", [*columns, "id"]
    table_of = dict(zip(names, [*zip(*rows, strict=True), range(len(rows))], strict=True))
    if kind == ".parquet":
        return parquet(**table_of)
    if kind == ".arrow":
        buffer, arrow = io.BytesIO(), pa.table(table_of)
        with pa.ipc.new_file(buffer, arrow.schema) as writer:
            writer.write_table(arrow)
        return buffer.getvalue()
    if kind == ".json":
        return json.dumps([dict(zip(names, [*row, i], strict=True)) for i, row in enumerate(rows)], indent=1).encode()
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
