"""The cached file of tokens: its content, and when it is reused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fmicl_text.errors import InputError
from fmicl_text.text.collator import token_id
from fmicl_text.text.data import load_training_text
from fmicl_text.text.tokenization import tokenize_dataset
from tests.support import sentences

TRIPLETS = [
    {"sent0": "a dog", "sent1": "the dog runs", "hard_neg": "a cat"},
    {"sent0": "a cat sleeps in the house", "sent1": "cat", "hard_neg": "a bird sings"},
]
TRIPLET_COLUMNS = ("sent0", "sent1", "hard_neg")


@pytest.fixture(autouse=True)
def cache_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def lines(tmp_path: Path) -> str:
    file = tmp_path / "a.txt"
    file.write_text("\n".join(sentences(20)))
    return str(file)


@pytest.fixture
def triplets(tmp_path: Path) -> str:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, TRIPLETS)))
    return str(file)


@pytest.fixture
def no_tokenizing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after whose call every call of a tokenizer is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the tokenizer was called")

    return lambda: monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", refuse)


def load(file: str) -> datasets.Dataset:
    return load_training_text(train_file=file).dataset


def file_of(dataset: datasets.Dataset) -> Path:
    (file,) = dataset.cache_files
    return Path(file["filename"])


def test_rows(bert_folder: str, triplets: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    tokens = tokenize_dataset(load(triplets), tokenizer, TRIPLET_COLUMNS, 6)
    expected = [[tokenizer(row[name])["input_ids"] for name in TRIPLET_COLUMNS] for row in TRIPLETS]
    assert [list(map(len, row)) for row in expected] == [[4, 5, 4], [8, 3, 5]]
    expected[1][0] = [*expected[1][0][:5], 3]
    assert tokens.to_list() == [
        {"input_ids": row, "text_ids": [token_id(np.array(text)) for text in row], "length": longest, "truncated": cut}
        for row, longest, cut in zip(expected, (5, 6), (0, 1), strict=True)
    ]


def test_columns_keep_their_order(bert_folder: str, triplets: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    tokens = tokenize_dataset(load(triplets), tokenizer, ("hard_neg", "sent0"), 32)
    assert tokens["input_ids"][0] == tokenizer(["a cat", "a dog"])["input_ids"]
    assert tokens["text_ids"][0] == [token_id(np.array(text)) for text in tokens["input_ids"][0]]


def test_types_in_the_file(bert_folder: str, triplets: str) -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(bert_folder, model_input_names=names)
    tokens = tokenize_dataset(load(triplets), tokenizer, TRIPLET_COLUMNS, 32)
    with pa.memory_map(str(file_of(tokens))) as source, pa.ipc.open_stream(source) as reader:
        types = dict(zip(reader.schema.names, reader.schema.types, strict=True))
    assert types == {
        "input_ids": pa.list_(pa.list_(pa.int32())),
        "token_type_ids": pa.list_(pa.list_(pa.int8())),
        "text_ids": pa.list_(pa.int64()),
        "length": pa.int32(),
        "truncated": pa.int32(),
    }
    assert file_of(tokens).parent == file_of(load(triplets)).parent


def test_many_rows_keep_their_order(bert_folder: str) -> None:
    texts = sentences(2500)
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    tokens = tokenize_dataset(datasets.Dataset.from_dict({"text": texts}), tokenizer, ("text",), 8)
    ids = tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    assert tokens["text_ids"][:] == [[token_id(np.array(row))] for row in ids]
    assert tokens["input_ids"][:] == [[row] for row in ids]
    assert tokens["length"][:] == list(map(len, ids))


def test_the_second_call_reads_the_file(bert_folder: str, lines: str, no_tokenizing: Callable[[], None]) -> None:
    first = tokenize_dataset(load(lines), AutoTokenizer.from_pretrained(bert_folder), ("text",), 8)
    # A fast tokenizer keeps the truncation and padding of its last call.
    used = AutoTokenizer.from_pretrained(bert_folder, padding_side="left")
    used(["a dog"], truncation=True, max_length=5, padding="max_length")
    assert used.backend_tokenizer.to_str() != AutoTokenizer.from_pretrained(bert_folder).backend_tokenizer.to_str()
    no_tokenizing()
    second = tokenize_dataset(load(lines), used, ["text"], 8)
    assert file_of(second) == file_of(first)
    assert second.to_list() == first.to_list()
    assert second.features == first.features


def test_the_file_of_a_slow_tokenizer_is_reused(lines: str, no_tokenizing: Callable[[], None]) -> None:
    first = tokenize_dataset(load(lines), ByT5Tokenizer(), ("text",), 8)
    other = tokenize_dataset(load(lines), ByT5Tokenizer(extra_ids=3), ("text",), 8)
    assert file_of(first) != file_of(other)
    no_tokenizing()
    assert file_of(tokenize_dataset(load(lines), ByT5Tokenizer(), ("text",), 8)) == file_of(first)


ANOTHER_PROCESS = """
import sys
from pathlib import Path
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from fmicl_text.text.data import load_training_text
from fmicl_text.text.tokenization import tokenize_dataset
PreTrainedTokenizerBase.__call__ = None
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = tokenize_dataset(load_training_text(train_file=sys.argv[2]).dataset, tokenizer, ("text",), 8)
Path(sys.argv[3]).write_text(tokens.cache_files[0]["filename"])
"""


@pytest.mark.slow
def test_another_process_reads_the_file(bert_folder: str, lines: str, tmp_path: Path) -> None:
    tokens = tokenize_dataset(load(lines), AutoTokenizer.from_pretrained(bert_folder), ("text",), 8)
    subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS, bert_folder, lines, str(tmp_path / "found")],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONHASHSEED": "1"},
        check=True,
    )
    assert (tmp_path / "found").read_text() == str(file_of(tokens))


class Subclass(PreTrainedTokenizerFast):
    """Could split texts differently before the backend."""


def test_settings_that_change_the_tokens_change_the_file(bert_folder: str, triplets: str) -> None:
    def tokenize(columns: tuple[str, ...] = ("sent0", "sent1"), length: int = 8, **options: object) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(bert_folder, **options)
        return file_of(tokenize_dataset(load(triplets), tokenizer, columns, length))

    bare = AutoTokenizer.from_pretrained(bert_folder)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    files = [
        tokenize(),
        tokenize(length=9),
        tokenize(columns=("sent1", "sent0")),
        tokenize(columns=("sent0",)),
        tokenize(truncation_side="left"),
        tokenize(split_special_tokens=True),
        tokenize(model_input_names=["input_ids", "token_type_ids", "attention_mask"]),
        tokenize(extra_special_tokens=["dog"]),
        file_of(tokenize_dataset(load(triplets), bare, ("sent0", "sent1"), 8)),
        file_of(tokenize_dataset(load(triplets), Subclass.from_pretrained(bert_folder), ("sent0", "sent1"), 8)),
        file_of(tokenize_dataset(load(triplets).select([0]), AutoTokenizer.from_pretrained(bert_folder), ["sent0"], 8)),
    ]
    assert len(set(files)) == len(files)
    Path(triplets).write_text("\n".join(map(json.dumps, TRIPLETS[::-1])))
    assert tokenize() not in files


def test_a_length_beyond_the_models_maximum(bert_folder: str, lines: str) -> None:
    with pytest.raises(InputError, match="max_seq_length=41 exceeds the model's maximum of 40 tokens"):
        tokenize_dataset(load(lines), AutoTokenizer.from_pretrained(bert_folder), ("text",), 41)
