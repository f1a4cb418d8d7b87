from __future__ import annotations

import doctest
import gc
import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmicl_text.errors import InputError
from fmicl_text.text import data as data_module
from fmicl_text.text.data import TextData, as_text_dataset, load_training_text, text_columns

ACCEPTED = ".txt, .csv, .tsv, .json or .jsonl (also as .gz, .bz2, .xz or .zst), .parquet or .arrow"
NO_TEXT = "{file} contains no text: it is empty or all its rows are blank"
QUOTES = "; cells that contain a separator, a quote or a line break must be in double quotes"


# The csv loader of datasets does not close a file that is not read to the end.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def close_files_before_the_next_module() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def cache_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(path: Path, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def texts(data: TextData) -> list[Any]:
    """The texts, or with several columns the tuples of texts."""
    rows = [tuple(row[name] for name in data.columns) for row in data.dataset]
    return [row[0] for row in rows] if len(data.columns) == 1 else rows


def error_of(**arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_training_text(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


GOOD = {
    "lines.txt": "one\ntwo\n",
    "no_last_newline.txt": "one\ntwo",
    "crlf.txt": "one\r\ntwo\r\n",
    "bom.txt": "\ufeffone\ntwo\n",
    "blank_and_space.txt": "\n  one \t\n \u00a0\u3000\t\n\ntwo\n",
    "UPPER.TXT": "one\ntwo\n",
    "pattern[1]*.txt": "one\ntwo\n",
    "lines.txt.gz": "one\r\ntwo\r\n",
    "column.csv": 'text,label\n"one",1\ntwo,2\n',
    "bom.csv": "\ufefftext\r\none\r\ntwo\r\n",
    "column.csv.gz": "text\none\ntwo\n",
    "column.tsv": "label\ttext\n1\tone\n2\ttwo\n",
    "bom.tsv.gz": "\ufefftext\tlabel\r\none\t1\r\ntwo\t2\r\n",
    "rows.jsonl": '{"text": "one", "id": 1}\n\n{"text": null}\n{"text": "two"}\n',
    "bom.jsonl": '\ufeff{"text": "one"}\r\n{"text": "two"}\r\n',
    "rows.jsonl.gz": '{"text": "one"}\n{"text": "two"}\n',
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("name", GOOD)
def test_formats(tmp_path: Path, name: str, streaming: bool) -> None:
    file = write(tmp_path / name, GOOD[name])
    data = load_training_text(train_file=file, streaming=streaming)
    assert texts(data) == ["one", "two"]
    assert data.columns == ("text",)
    assert data.source == file
    assert data.dataset.features == {"text": datasets.Value("string")}
    assert isinstance(data.dataset, datasets.IterableDataset if streaming else datasets.Dataset)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    file = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"id": [1, 2, 3], "text": pa.array(["one", None, " two"]).cast(kind)}), file)
    data = load_training_text(train_file=file)
    assert texts(data) == ["one", "two"]
    assert data.num_skipped == 1
    assert data.dataset.features == {"text": datasets.Value("string")}


def test_separators_inside_a_line_do_not_split_it(tmp_path: Path) -> None:
    sentence = "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g\x00h"
    for name, content in {
        "a.txt": f"{sentence}\nz\n",
        "a.csv": f"text\n{sentence}\nz\n",
        "a.tsv": f"text\tlabel\n{sentence}\t1\nz\t2\n",
        "a.jsonl": json.dumps({"text": sentence}, ensure_ascii=False) + '\n{"text": "z"}\n',
    }.items():
        assert texts(load_training_text(train_file=write(tmp_path / name, content))) == [sentence, "z"]


@pytest.mark.parametrize("cell", ["null", "None", "NA", "N/A", "nan", "NULL", "#N/A"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_cells_that_pandas_reads_as_missing_stay_text(tmp_path: Path, suffix: str, cell: str) -> None:
    file = write(tmp_path / f"a.{suffix}", f"text\n{cell}\nother\n")
    assert texts(load_training_text(train_file=file)) == [cell, "other"]


def test_csv_quotes_and_tsv_without(tmp_path: Path) -> None:
    csv = write(tmp_path / "a.csv", 'text\n"a, ""b""\nc"\nd\n')
    assert texts(load_training_text(train_file=csv)) == ['a, "b"\nc', "d"]
    tsv = write(tmp_path / "a.tsv", 'text\tlabel\n"a, b\t1\nc 5" d\t2\n')
    assert texts(load_training_text(train_file=tsv)) == ['"a, b', 'c 5" d']


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("sent0,sent1,hard_neg,text", ("sent0", "sent1", "hard_neg")),
        ("hard_neg,sent1,sent0", ("sent0", "sent1", "hard_neg")),
        ("text,sent0,sent1", ("sent0", "sent1")),
        ("sentence,text,sent0", ("text",)),
        ("label,sentence", ("sentence",)),
        ("words", ("words",)),
    ],
)
def test_default_columns(tmp_path: Path, header: str, columns: tuple[str, ...]) -> None:
    names = header.split(",")
    file = write(tmp_path / "a.csv", f"{header}\n" + ",".join(f"a {name}" for name in names) + "\n")
    data = load_training_text(train_file=file)
    assert data.columns == columns
    assert data.dataset.to_list() == [{name: f"a {name}" for name in columns}]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_triplets_need_every_text(tmp_path: Path, streaming: bool) -> None:
    rows = [("a", "b", "c"), (" d", "e ", "f"), ("g", None, "h"), ("i", "j", " "), ("", "k", "l"), ("m", "n", "o")]
    lines = [json.dumps(dict(zip(("sent0", "sent1", "hard_neg"), row, strict=True))) for row in rows]
    file = write(tmp_path / "a.jsonl", "\n".join(lines))
    data = load_training_text(train_file=file, streaming=streaming)
    assert texts(data) == [("a", "b", "c"), ("d", "e", "f"), ("m", "n", "o")]
    assert data.num_skipped == (None if streaming else 3)


def test_text_column(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "text,title\none,two\n")
    data = load_training_text(train_file=file, text_columns=["title"])
    assert (texts(data), data.columns) == (["two"], ("title",))
    assert error_of(train_file=file, text_columns=["body"]) == (
        f"{file} has no column 'body' (text_columns); its columns are ['text', 'title']"
    )


FEW_COLUMNS = "select one, two (pairs) or more (pairs with hard negatives) with text_columns"
COLUMNS = {
    # header and first row: the columns to train on, or None if the choice is ambiguous
    ("anchor", "positive"): ("anchor", "positive"),
    ("anchor", "positive", "negative"): ("anchor", "positive", "negative"),
    ("negative", "id", "Positive", "Anchor"): ("Anchor", "Positive", "negative"),
    ("sentence1", "sentence2"): ("sentence1", "sentence2"),
    ("sentence1", "sentence2", "id"): ("sentence1", "sentence2"),
    ("premise", "hypothesis", "idx"): ("premise", "hypothesis"),
    ("answer", "query"): ("query", "answer"),
    ("query", "passage", "url", "title"): ("query", "passage"),
    ("query", "document", "negative"): ("query", "document", "negative"),
    ("query", "response", "id"): ("query", "response"),
    ("query", "positive", "negative_2", "negative_10", "negative_1"): (
        *("query", "positive", "negative_1", "negative_2", "negative_10"),
    ),
    ("question", "answer", "id"): ("question", "answer"),
    ("sent0", "sent1", "hard_neg_1", "hard_neg_2", "label"): ("sent0", "sent1", "hard_neg_1", "hard_neg_2"),
    ("anchor", "positive", "label", "score"): ("anchor", "positive"),
    ("id", "title", "text"): ("text",),
    ("title", "id"): None,
    ("a", "b", "c", "d"): None,
    ("a", "b", "label"): None,
    ("a", "b", "negative"): None,
    ("query", "positive_1", "positive_2"): None,
    ("anchor", "negative"): None,
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("names", COLUMNS, ids=",".join)
def test_columns_of_a_file_and_of_a_dataset(tmp_path: Path, names: tuple[str, ...], streaming: bool) -> None:
    numbers = ("id", "idx", "label", "score")
    rows = [{name: i if name in numbers else f"{name} {i}" for name in names} for i in range(2)]
    file = write(tmp_path / "a.csv", "\n".join([",".join(names), *(",".join(map(str, row.values())) for row in rows)]))
    dataset = datasets.Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    expected = COLUMNS[names]
    if expected is None:
        message = f"has the columns {list(names)}: {FEW_COLUMNS}"
        assert error_of(train_file=file, streaming=streaming) == f"{file} {message}"
        for function in (text_columns, as_text_dataset):
            with pytest.raises(InputError) as caught:
                function(dataset)
            assert str(caught.value) == f"train_dataset {message}"
        return
    data = load_training_text(train_file=file, streaming=streaming)
    assert data.columns == text_columns(dataset) == expected
    found = as_text_dataset(dataset)
    assert text_columns(found) == expected
    kept = [{name: row[name] for name in expected} for row in rows]
    assert list(data.dataset) == list(found) == kept


RATED = "has the column {!r}, so that its pairs may not all be positive: keep those that are, and pass text_columns={}"
SEVERAL = "has several pairs of columns: select one with text_columns, such as {}"
UNCLEAR = {
    "sentence1,sentence2,score": RATED.format("score", "sentence1 sentence2"),
    "premise,hypothesis,label": RATED.format("label", "premise hypothesis"),
    "query,passage,relevance_score": RATED.format("relevance_score", "query passage"),
    "sentence1,sentence2,is_duplicate": RATED.format("is_duplicate", "sentence1 sentence2"),
    "question,answer,correct": RATED.format("correct", "question answer"),
    "premise,hypothesis,class": RATED.format("class", "premise hypothesis"),
    "query,passage,answer": SEVERAL.format("query passage, or query answer"),
    "sent0,sent1,sentence1,sentence2": SEVERAL.format("sent0 sent1, or sentence1 sentence2"),
    "anchor,positive,negative,hard_neg": "has several kinds of negatives, ['hard_neg', 'negative']: select columns "
    "with text_columns",
}


@pytest.mark.parametrize("header", UNCLEAR)
def test_unclear_columns(tmp_path: Path, header: str) -> None:
    file = write(tmp_path / "a.csv", f"{header}\n" + ",".join(f"a {name}" for name in header.split(",")) + "\n")
    assert error_of(train_file=file) == f"{file} {UNCLEAR[header]}"
    names = header.split(",")[:2]
    assert load_training_text(train_file=file, text_columns=names).columns == tuple(names)


@pytest.mark.parametrize("value", ["true", "1"])
def test_pairs_with_values_of_other_names(tmp_path: Path, value: str) -> None:
    name = "same" if value == "true" else "target"
    suffix, row = (".jsonl", f'{{"sentence1": "a", "sentence2": "b", "{name}": {value}}}\n')
    if name == "target":
        suffix, row = ".csv", f"sentence1,sentence2,{name}\na,b,{value}\n"
    file = write(tmp_path / f"a{suffix}", row)
    assert error_of(train_file=file) == f"{file} {RATED.format(name, 'sentence1 sentence2')}"


def test_lists_of_negatives(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"query": "a", "positive": "b", "negatives": ["c", "d"]}) + "\n")
    assert error_of(train_file=file) == (
        f"{file}: column 'negatives' must contain strings, got List; write one text per column, such as negative_1 and "
        "negative_2"
    )
    assert texts(load_training_text(train_file=file, text_columns=["query", "positive"])) == [("a", "b")]


def test_text_columns_of_any_names(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "w,x,y,z\nd,a,c,b\nh,e,g,f\n")
    data = load_training_text(train_file=file, text_columns=["x", "z", "y", "w"])
    assert (data.columns, texts(data)) == (("x", "z", "y", "w"), [("a", "b", "c", "d"), ("e", "f", "g", "h")])
    for names in ([], ["x", "x"]):
        expected = f"text_columns must be one or more different columns, got {names}"
        assert error_of(train_file=file, text_columns=names) == expected


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_a_partly_filled_column_is_reported(tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f"a {i},b {i},{f'c {i}' if i < 3 else ' '}\n" for i in range(58))
    file = write(tmp_path / "a.csv", f"sent0,sent1,hard_neg\n{rows}")
    data = load_training_text(train_file=file, streaming=streaming)
    message = f"hard_neg is blank in 55 of {'the first ' * streaming}58 rows"
    assert f"{file}: {message}" in caplog.text
    assert data.metadata()["blank cells"] == message
    assert len(texts(data)) == 3
    assert "blank cells" not in load_training_text(train_file=file, text_columns="hard_neg").metadata()


def test_a_column_of_nulls_is_not_part_of_a_pair(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"a": "one", "b": null}\n{"a": "two", "b": null}\n')
    assert error_of(train_file=file) == f"{file} has the columns ['a', 'b']: {FEW_COLUMNS}"
    assert texts(load_training_text(train_file=file, text_columns="a")) == ["one", "two"]


LISTS: dict[str, tuple[Any, list[dict[str, str]]]] = {
    "texts": (["one", "two"], [{"text": "one"}, {"text": "two"}]),
    "pairs": ([("a", "b"), ("c", "d")], [{"sent0": "a", "sent1": "b"}, {"sent0": "c", "sent1": "d"}]),
    "triplets": ([["a", "b", "c"]], [{"sent0": "a", "sent1": "b", "hard_neg": "c"}]),
    "two negatives": ([("a", "b", "c", "d")], [{"sent0": "a", "sent1": "b", "hard_neg_1": "c", "hard_neg_2": "d"}]),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_becomes_a_dataset(name: str) -> None:
    rows, expected = LISTS[name]
    dataset = as_text_dataset(rows)
    assert dataset.to_list() == expected
    assert text_columns(dataset) == tuple(expected[0])
    assert as_text_dataset(dataset).to_list() == expected


def test_blank_rows_of_a_list_are_skipped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert as_text_dataset([" one\n", "  ", "two"])["text"][:] == ["one", "two"]
    assert "train_dataset: skipped 1 of 3 rows with a blank text" in caplog.text


WRONG_LISTS = {
    "a string": ("one", "; got str"),
    "numbers": ([1, 2], "; got 1 at index 0"),
    "an empty row": ([()], "; got () at index 0"),
    "mixed rows": ([("a", "b"), "c"], "; got 'c' at index 1"),
    "a missing text": ([("a", "b"), ("c", None)], "; got ('c', None) at index 1"),
    "another width": ([("a", "b"), ("a", "b", "c")], "; got ('a', 'b', 'c') at index 1"),
}


@pytest.mark.parametrize("name", WRONG_LISTS)
def test_lists_that_are_not_texts(name: str) -> None:
    rows, message = WRONG_LISTS[name]
    with pytest.raises(InputError) as caught:
        as_text_dataset(rows)
    expected = "train_dataset must be a dataset, a list of strings, or a list of tuples of equally many strings"
    assert str(caught.value) == expected + message


@pytest.mark.parametrize("rows", [[], [" "], datasets.Dataset.from_dict({"text": [None, ""]})])
def test_training_data_without_text(rows: Any) -> None:
    with pytest.raises(InputError) as caught:
        as_text_dataset(rows)
    assert str(caught.value) == NO_TEXT.format(file="train_dataset")


def test_docstring_example() -> None:
    assert doctest.testmod(data_module) == (0, 1)


def test_counts(tmp_path: Path) -> None:
    """Ten lines, three of them blank."""
    file = write(tmp_path / "a.txt", "a\nb\n\nb \na\n  \nc\n\t\n a\nd\n")
    data = load_training_text(train_file=file)
    assert texts(data) == ["a", "b", "b", "a", "c", "a", "d"]
    assert (data.num_skipped, data.num_rows) == (3, 7)
    first = load_training_text(train_file=file, max_train_samples=3)
    assert texts(first) == ["a", "b", "b"]
    assert (first.num_skipped, first.num_rows) == (3, 3)
    assert len(load_training_text(train_file=file, max_train_samples=100).dataset) == 7
    streamed = load_training_text(train_file=file, max_train_samples=3, streaming=True)
    assert texts(streamed) == ["a", "b", "b"]
    assert (streamed.num_skipped, streamed.num_rows) == (None, None)


def test_a_streamed_data_set_is_shuffled_on_request(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "\n".join(map(str, range(100))))
    orders = [texts(load_training_text(train_file=file, streaming=True, shuffle_seed=seed)) for seed in (None, 1, 1, 2)]
    assert orders[0] == [str(i) for i in range(100)] != orders[1]
    assert orders[1] == orders[2] != orders[3]
    assert sorted(orders[1]) == sorted(orders[0])


def test_second_load_reads_the_cache(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "a\n\nb\n")
    first, second = load_training_text(train_file=file), load_training_text(train_file=file)
    assert first.dataset.cache_files == second.dataset.cache_files != []
    assert first.num_skipped == second.num_skipped == 1
    write(tmp_path / "a.txt", "a\n\nb\n\nc\n")
    assert texts(load_training_text(train_file=file)) == ["a", "b", "c"]


def test_streaming_is_lazy(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "a\n" * 300_000 + "\nb\n")
    data = load_training_text(train_file=file, streaming=True)
    assert not list(tmp_path.rglob("*.arrow"))
    assert texts(TextData(data.dataset.take(2), data.columns, None, None, "")) == ["a", "a"]
    assert next(iter(data.dataset.skip(300_000))) == {"text": "b"}


BAD = {
    "empty.txt": ("", NO_TEXT),
    "empty.txt.gz": ("", NO_TEXT),
    "bom_only.txt": ("\ufeff", NO_TEXT),
    "blank.txt": ("\n  \n\u3000\n", NO_TEXT),
    "empty.csv": ("", NO_TEXT),
    "newlines.csv": ("\n\n", NO_TEXT),
    "header.csv": ("text\n", NO_TEXT),
    "blank.csv": ("text,label\n ,1\n,2\n", NO_TEXT),
    "empty.jsonl": ("", NO_TEXT),
    "blank.jsonl": ("\n \n", NO_TEXT),
    "nulls.jsonl": ('{"text": null}\n{"text": null}\n', NO_TEXT),
    "empty.parquet": ("", NO_TEXT),
    "latin.txt": (
        "a\nb\ncaf\xe9 c\n".encode("latin1"),
        "{file} cannot be read as .txt: line 3 is not UTF-8 (byte 0xe9)",
    ),
    "latin.txt.gz": ("caf\xe9 c\n".encode("latin1"), "{file} cannot be read as .txt: line 1 is not UTF-8 (byte 0xe9)"),
    "utf16.txt": (
        "one".encode("utf-16-le") + b"\xff\n",
        "{file} cannot be read as .txt: line 1 is not UTF-8 but UTF-16: save it as UTF-8",
    ),
    "latin.csv": (
        "text\na\ncaf\xe9\n".encode("latin1"),
        "{file} cannot be read as .csv: line 3 is not UTF-8 (byte 0xe9)",
    ),
    "latin.jsonl": (
        '{"text": "a"}\n{"text": "caf\xe9 au lait"}\n'.encode("latin1"),
        "{file} cannot be read as .jsonl: line 2 is not UTF-8 (byte 0xe9)",
    ),
    "broken.jsonl": (
        '{"text": "a"}\n\n{"text": oops}\n',
        "{file} cannot be read as .jsonl: line 3, character 10: Expecting value",
    ),
    "cut.jsonl": (
        '{"text": "a"}\n{"text": "b',
        "{file} cannot be read as .jsonl: line 2, character 10: Unterminated string starting at",
    ),
    "strings.jsonl": (
        '"a"\n"b"\n',
        '{file} cannot be read as .jsonl: line 1 is not an object such as {{"text": "a sentence"}}',
    ),
    "long_row.csv": (
        "text\na\nb, c, d\n",
        "{file} cannot be read as .csv: line 3 has 3 cells, but the header has 1" + QUOTES,
    ),
    "long_rows.csv": (
        "text\nHello, you\nHello, they\n",
        "{file} cannot be read as .csv: line 2 has 2 cells, but the header has 1" + QUOTES,
    ),
    "open_quote.csv": (
        'text\na\n"b\nc\n',
        "{file} cannot be read as .csv: line 3: a quote is not closed" + QUOTES,
    ),
    "long_row.tsv": (
        "text\tlabel\na\t1\nb\tc\t2\n",
        "{file} cannot be read as .tsv: line 3 has 3 cells, but the header has 2; cells cannot contain a tab",
    ),
    "long_rows.tsv": (
        "text\na\tb\n",
        "{file} cannot be read as .tsv: line 2 has 2 cells, but the header has 1; cells cannot contain a tab",
    ),
    "numbers.jsonl": ('{"text": 0.5}\n', "{file}: column 'text' must contain strings, got number"),
    "lists.jsonl": (
        '{"text": ["a", "b"]}\n',
        "{file}: column 'text' must contain strings, got List; write one text per column, "
        "such as negative_1 and negative_2",
    ),
    "objects.jsonl": ('{"text": {"a": "b"}}\n', "{file}: column 'text' must contain strings, got dict"),
    "mixed.jsonl": (
        '{"text": "a"}\n{"text": null}\n{"text": 3}\n',
        "{file}: column 'text' must contain strings, line 3 has 3",
    ),
    "mixed_list.jsonl": (
        '{"text": "a"}\n{"text": ["b", 3]}\n',
        "{file}: column 'text' must contain strings, line 2 has [\"b\", 3]",
    ),
    "bad_pair.jsonl": (
        '{"sent0": "a", "sent1": 1}\n{"sent0": "b", "sent1": 2}\n',
        "{file}: column 'sent1' must contain strings, got number",
    ),
    "fake.parquet": (
        "this is not a parquet file",
        "{file} cannot be read as .parquet: Parquet magic bytes not found in footer."
        " Either the file is corrupted or this is not a parquet file.",
    ),
    "a.doc": ("a\n", f"train_file={{file}}: unsupported file type; expected {ACCEPTED}"),
    "a": ("a\n", f"train_file={{file}}: unsupported file type; expected {ACCEPTED}"),
    "a.parquet.gz": ("a\n", f"train_file={{file}}: unsupported file type; expected {ACCEPTED}"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str, streaming: bool) -> None:
    content, message = BAD[name]
    file = write(tmp_path / name, content)
    assert error_of(train_file=file, streaming=streaming) == message.format(file=file)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_damaged_gzip(tmp_path: Path, streaming: bool) -> None:
    file = tmp_path / "a.txt.gz"
    compressed = gzip.compress(b"one\n" * 100)
    for content, reason in (
        (b"plain text\n", "Not a gzipped file (b'pl')"),
        (compressed[:-6], "Compressed file ended before the end-of-stream marker was reached"),
        (compressed[:10] + b"\xff" + compressed[11:], "Error -3 while decompressing data: invalid block type"),
    ):
        file.write_bytes(content)
        message = f"{file} cannot be read as .txt: {reason}"
        assert error_of(train_file=str(file), streaming=streaming) == message


def test_parquet_without_rows_and_with_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    file = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    assert error_of(train_file=file) == NO_TEXT.format(file=file)
    latin = pa.StringArray.from_buffers(1, pa.array([0, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xe9b"))
    pq.write_table(pa.table({"text": latin}), file)
    message = f"{file} cannot be read as .parquet: row 1, column 'text': is not UTF-8 (byte 0xe9)"
    assert error_of(train_file=file) == message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    file = tmp_path / "missing.txt"
    assert error_of(train_file=str(file)) == f"train_file={file}: no such file"
    assert error_of(train_file=str(tmp_path)) == (
        f"train_file={tmp_path}: the folder has no data files; expected {ACCEPTED}"
    )


def test_arguments() -> None:
    assert error_of() == (
        "exactly one of train_file and dataset_name is needed, got train_file=None and dataset_name=None"
    )
    assert error_of(train_file="a.txt", dataset_name="b") == (
        "exactly one of train_file and dataset_name is needed, got train_file=a.txt and dataset_name=b"
    )
    assert error_of(train_file="a.txt", max_train_samples=0) == "max_train_samples must be at least 1, got 0"


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_dataset_folder(tmp_path: Path, streaming: bool) -> None:
    for config in ("first", "second"):
        write(tmp_path / "data" / config / "train.jsonl", f'{{"text": "{config}"}}\n{{"text": " "}}\n')
    write(
        tmp_path / "data" / "README.md",
        "---\nconfigs:\n"
        "- config_name: first\n  data_files: first/train.jsonl\n"
        "- config_name: second\n  data_files: second/train.jsonl\n---\n",
    )
    name = str(tmp_path / "data")
    data = load_training_text(dataset_name=name, dataset_config="second", streaming=streaming)
    assert texts(data) == ["second"]
    assert data.source == f"{name}/second [train]"
    assert error_of(dataset_name=name, streaming=streaming) == (
        f"dataset_name={name} dataset_split=train: Config name is missing. "
        "Please pick one among the available configs: ['first', 'second']"
    )
    assert error_of(dataset_name=name, dataset_config="third", streaming=streaming) == (
        f"dataset_name={name} dataset_config=third dataset_split=train: "
        "BuilderConfig 'third' not found. Available: ['first', 'second']"
    )
    message = error_of(dataset_name=name, dataset_config="first", dataset_split="dev", streaming=streaming)
    assert message.startswith(f"dataset_name={name} dataset_config=first dataset_split=dev: ")
    assert "dev" in message.rpartition("dev: ")[2] or "['train']" in message


def test_missing_dataset(tmp_path: Path) -> None:
    assert error_of(dataset_name="nobody/nothing", dataset_config="plain") == (
        "dataset_name=nobody/nothing dataset_config=plain dataset_split=train: "
        "Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled); "
        "without a network, pass a train_file or a dataset that is in the cache"
    )
    missing = tmp_path / "missing"
    assert error_of(dataset_name=str(missing)) == f"dataset_name={missing}: no such folder"
    file = write(tmp_path / "a.txt", "a\n")
    assert error_of(dataset_name=file) == f"dataset_name={file} is a file: pass it as train_file"
    folder = tmp_path / "folder"
    folder.mkdir()
    assert error_of(dataset_name=str(folder)) == (
        f"dataset_name={folder} dataset_split=train: The directory at {folder} doesn't contain any data files"
    )
    write(folder / "folder.py", "")
    assert error_of(dataset_name=str(folder)) == (
        f"dataset_name={folder} dataset_split=train: Dataset scripts are no longer supported, but found folder.py"
    )


def test_datasets_does_not_log_the_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, (content, _) = "broken.jsonl", BAD["broken.jsonl"]
    logger, file = logging.getLogger("datasets"), write(tmp_path / name, content)
    before = logger.level
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(datasets.exceptions.DatasetGenerationError):
            datasets.load_dataset("json", data_files=file)
        assert "Failed to load JSON" in caplog.text
        caplog.clear()
        error_of(train_file=file)
        assert caplog.text == ""
    finally:
        logger.removeHandler(caplog.handler)
    assert logger.level == before


def test_a_null_at_the_start_of_a_block_does_not_crash_the_process(tmp_path):
    """The loader reads blocks of 10 MiB and the rest of a line. pyarrow crashes on a block that begins with null."""
    file, row = tmp_path / "rows.jsonl", '{"text": "' + "one " * 25_000 + '"}\n'
    num_rows = 10 * 2**20 // len(row) + 1
    file.write_text(row * num_rows + "null\n" + row)
    with pytest.raises(InputError, match=rf"line {num_rows + 1} is not an object"):
        load_training_text(str(file))
    array = [{"text": f"{i} " + "one " * 25_000} for i in range(num_rows + 10)]
    file.write_text(json.dumps(array, indent=1))
    assert len(load_training_text(str(file)).dataset) == num_rows + 10


def test_the_commit_of_data_from_the_hub_is_recorded():
    address = f"hf://datasets/someone/texts@{'0f' * 20}/train.txt"
    info = SimpleNamespace(download_checksums={address: {}})
    data = TextData(SimpleNamespace(info=info), ("text",), None, "s")
    assert data.metadata() == {"source": "s", "revision": "0f" * 20, "columns": "text"}
    info.download_checksums = None
    assert data.metadata() == {"source": "s", "columns": "text"}
