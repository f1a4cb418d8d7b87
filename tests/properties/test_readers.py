"""Training text survives a round trip through every file format; invalid bytes raise an error of one line."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmicl_text.errors import InputError
from fmicl_text.text.data import load_training_text
from tests.properties.files import compressed, damaged, encoded, load_or_input_error, write

TEXTS = (
    st.text(max_size=20)
    | st.text("ab \",'", max_size=6)
    | st.sampled_from(["12", "1.5", "true", "NA", "null", "2001-02-03", "\ufeffx", "a \u3000"])
)
TEXT_FILES = (
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"),
    *(".txt.gz", ".csv.gz", ".tsv.gz", ".json.gz", ".jsonl.gz", ".csv.bz2", ".jsonl.xz", ".tsv.zst"),
)


def read(file, expected, streaming):
    """Read a file and compare its rows with the expected ones, tuples of texts."""
    usable = [tuple(text.lstrip("\ufeff").strip() for text in row) for row in expected]
    usable = [row for row in usable if all(row)]
    try:
        data = load_training_text(train_file=file, streaming=streaming)
    except InputError as error:
        assert "\n" not in str(error)
        assert "contains no text" in str(error) and not usable, error
        return
    found = [tuple(row[name] for name in data.columns) for row in data.dataset]
    assert found == usable
    if not streaming:
        assert data.num_skipped == len(expected) - len(usable)


@pytest.mark.slow
@given(
    TEXTS,
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(TEXTS),
    st.sampled_from([".txt", ".txt.gz"]),
    st.booleans(),
)
def test_lines(folder, start, end, lines, suffix, streaming):
    content = end.join([start.lstrip("\ufeff"), *lines])
    expected = re.split("\r\n|\r|\n", content)
    expected = expected[:-1] if not expected[-1] else expected
    read(write(folder, suffix, content.encode()), [(line,) for line in expected], streaming)


@pytest.mark.parametrize("suffix", [suffix for suffix in TEXT_FILES if "txt" not in suffix])
@settings(max_examples=20)
@given(width=st.sampled_from([1, 2, 3, 4]), data=st.data(), streaming=st.booleans())
def test_tables(folder, suffix, width, data, streaming):
    columns = ("text",) if width == 1 else ("sent0", "sent1", "hard_neg_1", "hard_neg_2")[:width]
    forbidden = "\t\n\r" if suffix.startswith(".tsv") else ""
    texts = TEXTS.filter(lambda text: not set(forbidden) & set(text))
    rows = data.draw(st.lists(st.tuples(*[texts] * width), min_size=1, max_size=6))
    read(write(folder, suffix, encoded(suffix, columns, rows)), rows, streaming)


GOOD = {
    suffix: encoded(suffix, ["text"], [("a, b",), ('c "d"',), ("é",)]) for suffix in TEXT_FILES if "txt" not in suffix
}
GOOD |= {suffix: "one\r\ntwo\n\né\n".encode() for suffix in (".txt", ".txt.gz")}


@settings(max_examples=25)
@pytest.mark.parametrize("suffix", TEXT_FILES)
@given(data=st.data(), streaming=st.booleans(), packed=st.booleans())
def test_any_bytes_as_training_text(folder, suffix, data, streaming, packed):
    """Of a compressed file, the compressed bytes are corrupted as well."""
    content = data.draw(damaged([compressed(suffix, GOOD[suffix]) if packed else GOOD[suffix]]))
    path = Path(write(folder, suffix, content))
    if packed:
        path.write_bytes(content)
    found = load_or_input_error(lambda: load_training_text(train_file=str(path), streaming=streaming))
    if found is not None and not streaming:
        assert all(text.strip() and text.encode() for row in found.dataset for text in row.values())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_null_byte_in_the_header(folder, streaming):
    file = write(folder, ".csv", b"\x00\nab\nc\n")
    load_or_input_error(lambda: load_training_text(train_file=file, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".csv.gz", ".tsv.gz", ".jsonl.gz"])
def test_a_byte_order_mark_is_not_part_of_the_text(folder, suffix, streaming):
    content = GOOD[suffix] if "txt" in suffix else encoded(suffix, ["text"], [("one",), ("two",), ("é",)])
    file = write(folder, suffix, b"\xef\xbb\xbf" + content)
    read(file, [("one",), ("two",), *[("",)] * ("txt" in suffix), ("é",)], streaming)
