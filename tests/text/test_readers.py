"""Files of text: `train_file`, a folder, `dataset_name`, streaming and .gz give the same rows, or the same message."""

from __future__ import annotations

import bz2
import gc
import gzip
import json
import lzma
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmicl_text.errors import InputError
from fmicl_text.text.data import TextData, load_training_text
from fmicl_text.text.opening import ACCEPTED

QUOTES = "; cells that contain a separator, a quote or a line break must be in double quotes"
TABS = "; cells cannot contain a tab"
LOUD = "the café is loud"
ROWS = ["one, two", 'say "hi"', "three"]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
PAIR = [("a dog", "the dog"), ("a cat", "the cat")]


@pytest.fixture(autouse=True)
def cache_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def digits_later(separator: str) -> str:
    """Words in the first 20,000 rows, then cells that a type would change."""
    lines = [f"word {i}{separator}{i}" for i in range(20_000)]
    return "\n".join([f"text{separator}id", *lines, *(f"{cell}{separator}x" for cell in ODD_CELLS)]) + "\n"


ODD_CELLS = ["007", "1.10", "TRUE", "2001-02-03", "1e5", "NA", "null", "None", "nan", "+49 30", "0x1F", "-0", "12:30"]

# name: content, and the rows (texts, or tuples) or the message; {fault} is "{file} cannot be read as {suffix}:"
VARIANTS: dict[str, tuple[str | bytes, list[Any] | str]] = {
    # separators
    "comma.csv": ('text,id\n"one, two",1\n"say ""hi""",2\nthree,3\n', ROWS),
    "semicolon.csv": ('id;text\n1;one, two\n2;"say ""hi"""\n3;three\n', ROWS),
    "quoted_semicolon.csv": ('"id";"text"\n"1";"one, two"\n"2";"say ""hi"""\n"3";"three"\n', ROWS),
    "tab.csv": ('id\ttext\n1\tone, two\n2\t"say ""hi"""\n3\tthree\n', ROWS),
    "pipe.csv": ("id|text\n1|one, two\n2|three\n", ["one, two", "three"]),
    "comma.tsv": ('id,text\n1,"one, two"\n2,three\n', ["one, two", "three"]),
    "semicolon.tsv": ("id;text\n1;one, two\n2;three\n", ["one, two", "three"]),
    "declared.csv": ("sep=;\r\ntext;id\r\none, two;1\r\nthree;2\r\n", ["one, two", "three"]),
    "declared.tsv": ("sep=,\ntext,id\none,1\ntwo,2\n", ["one", "two"]),
    "mixed.csv": (
        "id;text\n1;a;b\n2,c\n",
        "{file}: its first line is 'id;text'; separate cells by commas, not by ';'",
    ),
    "one_column.csv": ("text\na; b\nc | d\ne\tf\n", ["a; b", "c | d", "e\tf"]),
    "trailing.csv": ("text,id,\none,1,\ntwo,2,,\n", ["one", "two"]),
    "both.csv": (
        "id;text, raw\n1;a b, c\n2;d, e\n",
        "{file}: its first line is 'id;text, raw'; separate cells by commas, not by ';'",
    ),
    "tabs_and_commas.csv": (
        "m\t0.5\tA man, a guitar\tb\nm\t0.6\tA dog, a cat\td\n",
        "{file}: its first line is 'm\\t0.5\\tA man, a guitar\\tb'; separate cells by commas, not by '\\t'",
    ),
    "caret.csv": (
        "text^id\none^1\ntwo^2\n",
        "{fault} its first line is 'text^id'; separate cells by commas or tabs, not by '^'",
    ),
    "spelled_tab.csv": ("sep=\\t\r\ntext\tid\r\none, two\t1\r\n", ["one, two"]),
    "space_after.csv": ("sep=; \ntext;id\none, two;1\n", ["one, two"]),
    "word.csv": ("sep=tab\ntext\tid\none\t1\n", "{fault} its first line is 'sep=tab'; expected sep= and one separator"),
    # the start of a file
    "blank_rows.csv": (",,\n,,\ntext,id,\none,1,\n", ["one"]),
    "blanks.csv": ("   \n\ntext,id\none,1\n", ["one"]),
    "title.csv": (
        "My export,,\n\nsentence1,sentence2,x\na,b,1\n",
        "{file} has the columns ['My export', '']: select one, two (pairs) or more (pairs with hard negatives) with "
        "text_columns",
    ),
    "no_header.tsv": (
        "what is a dog\tA dog is an animal, which barks.\tA cat.\n" * 3,
        "{file} has the column 'A dog is an animal, which barks.', which seems to be a text: write the names of the "
        "columns in the first line, or select columns with text_columns",
    ),
    "no_header.csv": (
        "The dog ran home.\nThe cat sleeps.\n",
        "{file} has the column 'The dog ran home.', which seems to be a text: write the names of the columns in the "
        "first line, or select columns with text_columns",
    ),
    "latin_header.csv": ("text,pr\xe9nom\none,x\n".encode("latin1"), "{fault} line 1 is not UTF-8 (byte 0xe9)"),
    # files of another kind
    "objects.txt": ('{"text": "one"}\n', "{fault} its lines are JSON objects: name it .jsonl"),
    "objects.csv": ('{"text": "one", "x": 1}\n' * 2, "{fault} its lines are JSON objects: name it .jsonl"),
    "objects.tsv": ('{"text": "one", "x": 1}\n' * 2, "{fault} its lines are JSON objects: name it .jsonl"),
    "numbered.txt": (
        "1\tone\n2\ttwo\n",
        "{fault} its lines have 2 cells separated by tabs: name it .tsv, with the names of the columns in the "
        "first line",
    ),
    "some_tabs.txt": ("one\ttwo\nthree\n", ["one\ttwo", "three"]),
    "pointer.csv": (LFS, "{fault} it is a Git LFS pointer: get the file with `git lfs pull`"),
    "pointer.txt": (LFS, "{fault} it is a Git LFS pointer: get the file with `git lfs pull`"),
    "pointer.jsonl": (LFS, "{fault} it is a Git LFS pointer: get the file with `git lfs pull`"),
    "page.txt": ("<!DOCTYPE html>\n<html>\n", "{fault} it is a web page"),
    "workbook.csv": (b"PK\x03\x04\x14\0\x06\0", "{fault} it is a ZIP archive or an Excel workbook"),
    "packed.csv": (gzip.compress(b"text\none\n"), "{fault} it is compressed (gzip)"),
    # quotes
    "stray_quotes.tsv": ('text\tid\n"one\t1\ntwo"\t2\nthree "3"\t3\n', ['"one', 'two"', 'three "3"']),
    "line_break.csv": ('text,id\n"one\ntwo",1\nthree,2\n', ["one\ntwo", "three"]),
    "open_quote.csv": ('text,id\none,1\n"two,2\nthree,3\n', "{fault} line 3: a quote is not closed" + QUOTES),
    "bad_quote.csv": ('text,id\none,1\n"two" or,2\n', "{fault} line 3: ',' expected after '\"'" + QUOTES),
    "unquoted.csv": ('text,id\n"a\nb",1\none, two,1\n', "{fault} line 4 has 3 cells, but the header has 2" + QUOTES),
    "extra_tab.tsv": ("text\tid\none\t1\ntwo\tthree\t2\n", "{fault} line 3 has 3 cells, but the header has 2" + TABS),
    # text stays text
    "typed_cells.csv": ("text,id\n" + "".join(f"{cell},1\n" for cell in ODD_CELLS), ODD_CELLS),
    "digits_first.csv": ("text\n1\n2\nthree\n", ["1", "2", "three"]),
    "only_digits.csv": ("text\n007\n08\n", ["007", "08"]),
    "digits_later.csv": (digits_later(","), [*(f"word {i}" for i in range(20_000)), *ODD_CELLS]),
    "digits_later.tsv": (digits_later("\t"), [*(f"word {i}" for i in range(20_000)), *ODD_CELLS]),
    "dates.jsonl": (
        jsonl({"text": "2001-02-03"}, {"text": "2001-02-03T04:05:06Z"}),
        ["2001-02-03", "2001-02-03T04:05:06Z"],
    ),
    # encodings and line ends
    "bom.csv": ("\ufefftext,id\r\none,1\r\ntwo,2\r\n", ["one", "two"]),
    "cr.csv": ("text,id\rone,1\rtwo,2\r", ["one", "two"]),
    "cr.txt": ("one\rtwo\r\nthree", ["one", "two", "three"]),
    "inside.txt": ("a\u2028b\x0cc\x85d\n\n\u3000\nz", ["a\u2028b\x0cc\x85d", "z"]),
    "latin.csv": (f"text,id\none,1\n{LOUD},2\n".encode("latin1"), "{fault} line 3 is not UTF-8 (byte 0xe9)"),
    "latin_unused.csv": (f"text,note\none,x\ntwo,{LOUD}\n".encode("latin1"), ["one", "two"]),
    "latin.jsonl": (
        b'{"text": "one"}\n\n' + f'{{"text": "{LOUD}"}}\n'.encode("latin1"),
        "{fault} line 3 is not UTF-8 (byte 0xe9)",
    ),
    "utf16.csv": (
        "text,id\none,1\n".encode("utf-16"),
        "{fault} line 1 is not UTF-8 (byte 0xff) but UTF-16: save it as UTF-8",
    ),
    "utf16_no_mark.txt": ("one\ntwo\n".encode("utf-16-le"), "{fault} line 1 is not UTF-8 but UTF-16: save it as UTF-8"),
    "surrogate.jsonl": (
        '{"text": "one"}\n{"text": "a\\ud83d"}\n',
        "{fault} line 2 has one half of a surrogate pair (\\ud83d), which is not a character",
    ),
    "surrogate_unused.jsonl": (
        '{"text": "one", "note": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n',
        ["one", "\U0001f600"],
    ),
    # missing and unused cells
    "missing.csv": ("text,id\none,1\n,2\n  ,3\ntwo\n", ["one", "two"]),
    "missing_pair.tsv": ("sent0\tsent1\na dog\tthe dog\nx\n\ty\na cat\tthe cat\n", PAIR),
    "nulls_first.jsonl": (
        jsonl(*[{"text": None, "id": i} for i in range(30_000)], {"text": "one"}, {"text": "two"}),
        ["one", "two"],
    ),
    "absent_first.jsonl": (
        jsonl(*[{"id": i} for i in range(30_000)], {"text": "one"}, {"text": "two"}),
        ["one", "two"],
    ),
    "null_column.jsonl": (
        jsonl({"sent0": "a dog", "sent1": "the dog", "hard_neg": None}),
        "{file} contains no text: it is empty or all its rows are blank",
    ),
    "unused_types.jsonl": (
        '{"text": "one", "x": 1}\n{"text": "two", "x": "a"}\n{"text": "three", "x": [1, {"y": []}]}\n'
        + '{"text": "four", "x": 1'
        + "0" * 5000
        + "}\n",
        ["one", "two", "three", "four"],
    ),
    "unused_types.csv": ("text,x\n" + "a,1\n" * 12_000 + "b,x\n", ["a"] * 12_000 + ["b"]),
    "number.jsonl": (
        jsonl({"text": "one"}, {"text": None}, {"text": 3}),
        "{file}: column 'text' must contain strings, line 3 has 3",
    ),
    "late_column.jsonl": (
        jsonl(
            {"sent0": "a", "sent1": "b"},
            *[{"sent0": "c", "sent1": "d"}] * 2000,
            {"sent0": "e", "sent1": "f", "hard_neg": "g"},
        ),
        "{file}: line 2002 has the column 'hard_neg', which the lines before do not have: select the columns with "
        "text_columns",
    ),
    # JSON arrays
    "array.json": (json.dumps([{"text": text} for text in ROWS]), ROWS),
    "pretty.json": (json.dumps([{"id": i, "text": text} for i, text in enumerate(ROWS)], indent=2), ROWS),
    "strings.json": (json.dumps(ROWS), ROWS),
    "lines.json": (jsonl(*({"text": text} for text in ROWS)), ROWS),
    "split_object.json": (
        '{"text":\n"one"}\n',
        "{fault} line 1, character 9: Expecting value; expected an object per line, or an array of objects",
    ),
    "broken_array.json": ('[\n {"text": "one"},\n {"text": two}\n]\n', "{fault} line 3: Expecting value"),
    "cut_array.json": ('[\n {"text": "one"},\n', "{fault} line 3: the array is cut off"),
    "two_arrays.json": ('[{"text": "one"}]\n["x"]\n', "{fault} line 1 or later has '[' after the end of the array"),
    "numbers.json": ("[\n1, 2]", '{fault} line 2 is not an object such as {{"text": "a sentence"}}'),
    # columns
    "twice.csv": ("text,text\na,b\n", "{file}: its header has the column 'text' twice"),
    "index.csv": (",text\n0,one\n1,two\n", ["one", "two"]),
    "scored.csv": (
        "sentence1,sentence2,score\na,b,0.1\n",
        "{file} has the column 'score', so that its pairs may not all be positive: keep those that are, and pass "
        "text_columns=sentence1 sentence2",
    ),
}


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def rows_of(data: TextData) -> list[Any]:
    rows = [tuple(row[name] for name in data.columns) for row in data.dataset]
    return [row[0] for row in rows] if len(data.columns) == 1 else rows


def rows_or_message(**arguments: Any) -> list[Any] | str:
    try:
        return rows_of(load_training_text(**arguments))
    except InputError as error:
        assert "\n" not in str(error)
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_door_gives_the_same(tmp_path: Path, name: str) -> None:
    content, expected = VARIANTS[name]
    file = write(tmp_path / "data" / name, content)
    packed = str(tmp_path / "packed" / f"{name}.gz")
    write(Path(packed), gzip.compress(Path(file).read_bytes()))
    folder = str(tmp_path / "data")
    doors: list[dict[str, Any]] = [
        *({"train_file": file}, {"train_file": folder}, {"dataset_name": folder}, {"train_file": packed}),
        *({"train_file": file, "streaming": True}, {"dataset_name": folder, "streaming": True}),
    ]
    for door in doors:
        found = rows_or_message(**door)
        if isinstance(expected, str):
            source = packed if packed in door.values() else file
            if "contains no text" in expected and source not in str(found):
                source = door.get("train_file", f"{folder} [train]")
            fault = f"{source} cannot be read as {Path(name).suffix}:"
            assert found == expected.format(file=source, fault=fault), door
        else:
            assert found == expected, door


PACKED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda b: pa.compress(b, "zstd", True),
}


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_files(tmp_path: Path, suffix: str, streaming: bool) -> None:
    content, _ = VARIANTS["digits_later.csv"]
    assert isinstance(content, str)
    expected = VARIANTS["digits_later.csv"][1]
    file = write(tmp_path / "data" / f"a.csv{suffix}", PACKED[suffix](content.encode()))
    assert rows_or_message(train_file=file, streaming=streaming) == expected
    assert rows_or_message(dataset_name=str(tmp_path / "data"), streaming=streaming) == expected
    write(tmp_path / f"cut.csv{suffix}", Path(file).read_bytes()[:1000])
    message = rows_or_message(train_file=str(tmp_path / f"cut.csv{suffix}"), streaming=streaming)
    assert str(message).startswith(f"{tmp_path}/cut.csv{suffix} cannot be read as .csv: ")


ARROW = {
    "string": pa.array(["one", None, "two "]),
    "large_string": pa.array(["one", None, "two"], pa.large_string()),
    "string_view": pa.array(["one", None, "two"], pa.string_view()),
    "binary": pa.array([b"one", None, b"two"]),
    "binary_view": pa.array([b"one", None, b"two"], pa.binary_view()),
    "dictionary": pa.array(["one", None, "two"]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", ARROW)
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "stream"])
def test_types_of_strings(tmp_path: Path, kind: str, suffix: str) -> None:
    table = pa.table({"id": [1, 2, 3], "text": ARROW[kind], "nested": [[], [{"a": 1}], None]})
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / ("a.parquet" if suffix == "parquet" else "a.arrow")
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        write_ipc = pa.ipc.new_stream if suffix == "stream" else pa.ipc.new_file
        with write_ipc(str(path), table.schema) as writer:
            writer.write_table(table)
    for door in ({"train_file": str(path)}, {"train_file": str(folder)}, {"dataset_name": str(folder)}):
        for streaming in (False, True):
            assert rows_or_message(**door, streaming=streaming) == ["one", "two"]


def test_bytes_and_numbers_of_parquet(tmp_path: Path) -> None:
    file = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [b"one"] * 12_000 + [b"caf\xe9"]}), file)
    assert rows_or_message(train_file=file) == (
        f"{file} cannot be read as .parquet: row 12001, column 'text': is not UTF-8 (byte 0xe9)"
    )
    for values, kind in (([1, 2], "int64"), ([["a"]], "list<element: string>")):
        pq.write_table(pa.table({"text": values}), file)
        assert f"{file}: column 'text' must contain strings, got {kind}" in str(rows_or_message(train_file=file))


def test_several_files_patterns_and_folders(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.csv", "text,id\none,1\n"), write(tmp_path / "two.jsonl", jsonl({"text": "two"}))
    write(tmp_path / "more/a.txt", "three\n")
    write(tmp_path / "more/sub/b.txt.gz", gzip.compress(b"four\n"))
    more = str(tmp_path / "more")
    for streaming in (False, True):
        assert rows_or_message(train_file=[two, one], streaming=streaming) == ["two", "one"]
        assert rows_or_message(train_file=[one, f"{more}/*.txt"], streaming=streaming) == ["one", "three"]
        assert rows_or_message(train_file=[more], streaming=streaming) == ["three", "four"]
        assert rows_or_message(train_file=f"{more}/**/*.t*", streaming=streaming) == ["three", "four"]
    data = load_training_text(train_file=(one, two))
    assert data.source == f"{one} {two}"
    assert rows_or_message(train_file=f"{more}/*.csv") == f"train_file={more}/*.csv: no file matches this pattern"
    assert rows_or_message(train_file=[one, f"{tmp_path}/*.csv"]) == f"train_file={one} is given twice"
    assert rows_or_message(train_file=[]) == "train_file must be one or more files, got none"
    assert rows_or_message(train_file=[one, more + "/none.txt"]) == f"train_file={more}/none.txt: no such file"


def test_files_must_have_the_same_columns(tmp_path: Path) -> None:
    one = write(tmp_path / "one.csv", "text,title\none,first\n")
    two = write(tmp_path / "two.csv", "sentence,title\ntwo,second\n")
    assert rows_or_message(train_file=[one, two]) == (
        f"{one} has text but {two} has sentence: select columns with text_columns"
    )
    assert rows_or_message(train_file=[one, two], text_columns=["title"]) == ["first", "second"]
    assert rows_or_message(train_file=[one, two], text_columns=["text"]) == (
        f"{two} has no column 'text' (text_columns); its columns are ['sentence', 'title']"
    )


def test_a_folder_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    """Only the training split; a file of another format is not ignored silently."""
    folder = str(tmp_path / "data")
    write(tmp_path / "data/train.csv", "text\none\ntwo\n")
    write(tmp_path / "data/test.csv", "text\nthree\n")
    write(tmp_path / "data/README.md", "Texts.\n")
    for door in ({"train_file": folder}, {"dataset_name": folder}):
        assert rows_or_message(**door) == ["one", "two"]
    assert rows_or_message(dataset_name=folder, dataset_split="train+test") == ["one", "two", "three"]
    assert rows_or_message(dataset_name=folder, dataset_split="train[1:]") == ["two"]
    write(tmp_path / "data/more.jsonl", jsonl({"text": "four"}))
    for argument in ("train_file", "dataset_name"):
        assert rows_or_message(**{argument: folder}) == (
            f"{argument}={folder} has files of several formats, .csv and .jsonl: pass those of one format, such as "
            f"train_file={folder}/*.csv"
        )


def test_no_file_of_a_folder_is_ignored_silently(tmp_path: Path) -> None:
    """`datasets` ignores files without a split in their names next to others with one, and suffixes in upper case."""
    folder = str(tmp_path / "data")
    write(tmp_path / "data/A.TXT", "one\n")
    for argument in ("train_file", "dataset_name"):
        assert rows_or_message(**{argument: folder}) == ["one"]
    write(tmp_path / "data/b.txt", "two\n")
    write(tmp_path / "more/train.txt", "one\n")
    write(tmp_path / "more/extra.txt", "two\n")
    for argument in ("train_file", "dataset_name"):
        for place, name in ((folder, "A.TXT"), (str(tmp_path / "more"), "extra.txt")):
            assert rows_or_message(**{argument: place}) == (
                f"{argument}={place}: by its name, {name} is not in any split: pass the files, such as "
                f"train_file={place}/*.txt"
            )
    assert rows_or_message(train_file=f"{folder}/*.[tT]*") == ["one", "two"]
    relative = os.path.relpath(folder)
    assert "is given twice" in str(rows_or_message(train_file=[f"{relative}/b.txt", f"{folder}/*.txt"]))


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
def test_backups_are_not_read_as_training_text(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "data"
    write(folder / "train.csv", "text\none\n")
    backup = write(folder / "train.csv.bak", "text\none\n")
    for door in ("train_file", "dataset_name"):
        message = rows_or_message(**{door: str(folder)}, streaming=streaming)
        assert message == f"{door}={folder}: unsupported file type of {backup}; expected {ACCEPTED}"


@pytest.mark.parametrize("name", ["a[1]", "a::b"])
def test_folders_that_datasets_reads_as_patterns(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    file = write(folder / "train.csv", "text\none\n")
    for door in ("train_file", "dataset_name"):
        message = f"{door}={folder}: a folder with [ or :: in its path cannot be read: pass its files"
        assert rows_or_message(**{door: str(folder)}) == message
    if name == "a[1]":
        assert rows_or_message(train_file=file) == rows_or_message(train_file=f"{folder}/*.csv") == ["one"]


def test_a_pointer_to_a_parquet_file(tmp_path: Path) -> None:
    for suffix in (".parquet", ".arrow"):
        file = write(tmp_path / f"a{suffix}", LFS)
        message = f"{file} cannot be read as {suffix}: it is a Git LFS pointer: get the file with `git lfs pull`"
        assert rows_or_message(train_file=file) == message


@pytest.mark.parametrize("value", [3, [None], b"a.txt"], ids=str)
def test_paths_of_other_types(value: Any) -> None:
    assert str(rows_or_message(train_file=value)).startswith("train_file must be one or more paths, got ")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # `datasets` does not close a file
def test_options_in_a_readme_are_used(tmp_path: Path) -> None:
    write(tmp_path / "data/a.csv", "text~id\n007~1\nNA~2\n")
    write(tmp_path / "data/README.md", '---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  sep: "~"\n---\n')
    for streaming in (False, True):
        assert rows_or_message(dataset_name=str(tmp_path / "data"), streaming=streaming) == ["007", "NA"]
    gc.collect()
    folder = str(tmp_path / "data")
    message = f"train_file={folder}: its README.md has options, pass it as dataset_name={folder}"
    assert rows_or_message(train_file=folder) == message


def test_the_cache_depends_on_the_columns_and_not_on_the_path(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "text,title\none,first\ntwo,second\n")
    copy = write(tmp_path / "other" / "b.csv", Path(file).read_bytes())
    first, again = (load_training_text(train_file=path).dataset for path in (file, copy))
    assert first.cache_files == again.cache_files
    assert first._fingerprint == again._fingerprint
    assert rows_or_message(train_file=file, text_columns="title") == ["first", "second"]


def test_the_cache_depends_on_the_format(tmp_path: Path) -> None:
    """The same bytes, the same last suffix, and the same column, read in another way."""
    for suffix, expected in ((".txt", ["text", "one"]), (".csv", ["one"])):
        file = write(tmp_path / f"a{suffix}.gz", gzip.compress(b"text\none\n", mtime=0))
        assert rows_or_message(train_file=file) == expected


def test_a_stream_can_be_sent_to_workers_and_resumed(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.txt", "".join(f"{i} {j}\n" for j in range(50))) for i in range(2)]
    stream = load_training_text(train_file=files, streaming=True).dataset
    assert stream.num_shards == 2
    assert len(list(pickle.loads(pickle.dumps(stream)))) == 100
    rows = iter(stream)
    before = [next(rows)["text"] for _ in range(60)]
    state = stream.state_dict()
    stream.load_state_dict(state)
    assert before + [row["text"] for row in stream] == [f"{i} {j}" for i in range(2) for j in range(50)]


def test_a_long_cell_and_an_array_of_several_blocks(tmp_path: Path) -> None:
    cell = "word " * 100_000
    assert rows_or_message(train_file=write(tmp_path / "a.csv", f'text,id\n"{cell}",1\n')) == [cell.strip()]
    rows = [f"{i} " + "a \u00e9" * 1000 for i in range(1500)]
    file = write(tmp_path / "a.json", json.dumps([{"text": row} for row in rows], indent=1, ensure_ascii=False))
    assert rows_or_message(train_file=file) == rows
