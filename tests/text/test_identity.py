"""Two texts are one where the encoder sees the same tokens: in batches, in statistics, at every door."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers.normalizers import BertNormalizer, Lowercase
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer

from fmicl_text import InputError, TextContrastiveModel, build_text_encoder
from fmicl_text.text.collator import TextViewCollator
from fmicl_text.text.data import load_training_text
from fmicl_text.text.model import set_prompts, training_prompts
from fmicl_text.text.settings import prompt_text
from fmicl_text.text.tokenization import training_rows

# Six words; only the first three are encoded at max_seq_length 5. Rows 0 and 2 differ after them, row 4 only in case,
# row 5 consists of a character that the tokenizer removes.
TEXTS = ["a dog runs", "the cat", "a dog runs near the sea", "big boat", "The  Cat", "\u200d"]
GROUPS = [0, 1, 0, 2, 1]


@pytest.fixture(autouse=True)
def cache_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def encoder(bert_folder: str) -> Any:
    """An encoder whose tokenizer normalizes as BERT's does."""
    encoder = build_text_encoder(bert_folder)
    encoder.tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=True)
    return encoder


@pytest.fixture
def tokenizer(encoder: Any) -> Any:
    tokenizer = encoder.tokenizer
    assert len(tokenizer("\u200d")["input_ids"]) == 2
    assert tokenizer("The  Cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    return tokenizer


def groups(ids: Any) -> list[int]:
    """0, 1, ... for the first, second, ... distinct number."""
    order: dict[int, int] = {}
    return [order.setdefault(int(number), len(order)) for number in ids.flatten().tolist()]


def batch(rows: Any, collator: Any, size: int) -> Any:
    """The first batch of rows, as the trainer loads it."""
    source = rows if isinstance(rows, datasets.Dataset) else list(islice(rows, size))
    return next(iter(DataLoader(source, batch_size=size, collate_fn=collator)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file(tokenizer: Any, tmp_path: Path, streaming: bool, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    lines = TEXTS if suffix == ".txt" else [json.dumps({"text": text}) for text in TEXTS]
    file.write_text("\n".join(lines), encoding="utf-8")
    data = load_training_text(train_file=str(file), streaming=streaming)
    rows, collator, data = training_rows(data, tokenizer, 5)
    assert groups(batch(rows, collator, 5)["text_ids"]) == GROUPS
    if streaming:
        assert (data.num_rows, data.num_skipped, data.duplicate_share, data.truncated_share) == (None,) * 4
    else:
        assert (data.num_rows, data.num_skipped, data.duplicate_share, data.truncated_share) == (5, 1, 2 / 5, 1 / 5)
        assert data.metadata()["share of duplicates"] == 0.4
        assert data.metadata()["blank rows skipped"] == 1
        assert data.metadata()["share of texts truncated"] == 0.2


def test_length_decides(tokenizer: Any, tmp_path: Path) -> None:
    """At full length, rows 0 and 2 differ."""
    file = tmp_path / "a.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    rows, collator, data = training_rows(load_training_text(train_file=str(file)), tokenizer, 32)
    assert groups(batch(rows, collator, 5)["text_ids"]) == [0, 1, 2, 3, 1]
    assert (data.duplicate_share, data.truncated_share) == (1 / 5, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_python_rows(encoder: Any, stream: bool) -> None:
    encoder.max_seq_length = 5
    rows: Any = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset() if stream else TEXTS
    prepared, collator = TextContrastiveModel(encoder).prepare_data(rows)
    assert groups(batch(prepared, collator, 5)["text_ids"]) == GROUPS


def test_a_collator_of_texts(tokenizer: Any) -> None:
    for side in ("left", "right"):
        tokenizer.padding_side = side
        ids = TextViewCollator(tokenizer, ["text"], 5)([{"text": text} for text in TEXTS[:5]])["text_ids"]
        alone = [TextViewCollator(tokenizer, ["text"], 5)([{"text": text}])["text_ids"].item() for text in TEXTS[:5]]
        assert groups(ids) == GROUPS and ids.flatten().tolist() == alone


def test_a_positive_or_a_hard_negative_that_is_the_text(tokenizer: Any, tmp_path: Path) -> None:
    """Columns share one identity: the hard negative of row 0 is the anchor of row 1 after truncation."""
    file = tmp_path / "a.jsonl"
    table = [
        ("a dog runs", "the dog", "big boat on the sea"),
        ("big boat on a river", "the boat", "a DOG runs under a tree"),
    ]
    lines = [json.dumps(dict(zip(("sent0", "sent1", "hard_neg"), row, strict=True))) for row in table]
    file.write_text("\n".join(lines), encoding="utf-8")
    rows, collator, data = training_rows(load_training_text(train_file=str(file)), tokenizer, 5)
    assert groups(batch(rows, collator, 2)["text_ids"]) == [0, 1, 2, 2, 3, 0]
    assert (data.duplicate_share, data.truncated_share) == (0, 3 / 6)


def test_duplicates_are_complete_rows(tokenizer: Any, tmp_path: Path) -> None:
    """The third row repeats the first; the second and the fourth have only single cells in common with it."""
    file = tmp_path / "a.csv"
    file.write_text("sent0,sent1\na,big\nthe,red\nA,BIG\nbig,a\n")
    assert training_rows(load_training_text(train_file=str(file)), tokenizer, 5)[2].duplicate_share == 1 / 4


@pytest.mark.parametrize("name", ["left truncation", "lowercase", "slow"])
def test_any_normalization_and_tokenizer(tokenizer: Any, tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.txt"
    if name == "slow":
        tokenizer = ByT5Tokenizer()
        lines, expected, cut = ["abcdef", "abcdeX", "abXdef", "abcd"], [0, 0, 1, 2], 3 / 4
    elif name == "lowercase":
        tokenizer.backend_tokenizer.normalizer = Lowercase()
        lines, expected, cut = ["A dog", "a DOG", "a cat"], [0, 0, 1], 0
    else:
        tokenizer.truncation_side = "left"
        lines, expected, cut = ["big a dog runs", "red a dog runs", "a dog runs"], [0, 0, 0], 2 / 3
    file.write_text("\n".join([*lines, "the sea"]))
    rows, collator, data = training_rows(
        load_training_text(train_file=str(file)), tokenizer, 5 if name != "slow" else 6
    )
    assert groups(batch(rows, collator, len(lines))["text_ids"]) == expected
    assert data.truncated_share == pytest.approx(cut * len(lines) / (len(lines) + 1) + (name == "slow") / 5)


def test_nothing_but_blank_texts(tokenizer: Any, encoder: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\u200d\n\u200b\u200d\n", encoding="utf-8")
    with pytest.raises(InputError, match="contains no text: it is empty or all its rows are blank"):
        training_rows(load_training_text(train_file=str(file)), tokenizer, 5)
    with pytest.raises(InputError, match="train_dataset contains no text"):
        TextContrastiveModel(encoder).prepare_data(["\u200d", "\u200b"])


@pytest.mark.parametrize(
    "table",
    [
        {"text": ["a dog runs by", "a dog runs on", "a dog runs in"]},
        {"query": ["a cat", "a cat"], "answer": ["the sea", "the river"]},
        {"sent0": ["a cat", "the dog", "a boat"], "sent1": ["the dog", "a bird", "the dog"]},
    ],
    ids=["truncated", "one query", "either column"],
)
def test_the_same_text_in_every_row(tokenizer: Any, tmp_path: Path, table: dict[str, list[str]]) -> None:
    """All rows share a text, so there is no negative pair."""
    file = tmp_path / "a.jsonl"
    file.write_text(
        "\n".join(json.dumps(dict(zip(table, row, strict=True))) for row in zip(*table.values(), strict=True))
    )
    with pytest.raises(InputError, match=r"a\.jsonl: .*same text in all [23] rows, so there are no negative pairs"):
        training_rows(load_training_text(train_file=str(file)), tokenizer, 5)


def test_one_query_with_hard_negatives(tokenizer: Any, tmp_path: Path) -> None:
    """All rows share the query, but the hard negatives are negatives of it."""
    file = tmp_path / "a.csv"
    file.write_text("sent0,sent1,hard_neg\na dog,the dog,a cat\na dog,old dog,big boat\n")
    assert training_rows(load_training_text(train_file=str(file)), tokenizer, 5)[2].num_rows == 2


def test_prompts_are_part_of_the_tokens(encoder: Any, tmp_path: Path) -> None:
    """Training sees what `encode` sees: the default prompt; a text without tokens is blank with a prompt too."""
    file = tmp_path / "a.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    set_prompts(encoder, ["big red "])
    prompts = training_prompts(encoder, 1)
    rows, _, data = training_rows(load_training_text(train_file=str(file)), encoder.tokenizer, 8, prompts)
    assert (data.num_rows, data.num_skipped, data.metadata()["prompts"]) == (5, 1, "'big red '")
    expected = encoder.preprocess(["a dog runs"], prompt=encoder.prompts["default"])["input_ids"][0].tolist()
    assert rows[0]["input_ids"] == [expected] == [encoder.tokenizer("big red a dog runs")["input_ids"]]
    prepared, _ = TextContrastiveModel(encoder).prepare_data(TEXTS)
    assert prepared[0]["input_ids"] == [expected]


def test_prompts_of_columns(encoder: Any) -> None:
    assert training_prompts(encoder, 3) == ()
    assert training_prompts(encoder, 2, ["red "]) == ("red ", "red ")
    assert training_prompts(encoder, 4, ["red ", "big "]) == ("red ", "big ", "big ", "big ")
    set_prompts(encoder, ["red "])
    assert encoder.prompts == {"query": "red ", "document": "red ", "default": "red "}
    assert encoder.default_prompt_name == "default"
    encoder.prompts = {}
    set_prompts(encoder, ["red ", "big "])
    assert encoder.prompts == {"query": "red ", "document": "big "} and encoder.default_prompt_name is None
    with pytest.raises(InputError, match="got 2 for 1 text column"):
        training_prompts(encoder, 1, ["red ", "big "])
    with pytest.raises(InputError, match="one for queries and one for documents, got 3"):
        set_prompts(encoder, ["a", "b", "c"])
    encoder[1].include_prompt = False
    with pytest.raises(InputError, match="include_prompt=False"):
        training_prompts(encoder, 1, ["red "])


def test_own_prompts_are_those_of_evaluation(encoder: Any, caplog: Any) -> None:
    """In search, encode_query and encode_document apply the prompts of training, whatever names the model has."""
    encoder.prompts = {"query": "red ", "document": "", "passage": "big "}
    assert training_prompts(encoder, 3, search=True) == ("red ", "big ", "big ")
    assert encoder.prompts["document"] == "big "
    assert not caplog.records
    assert training_prompts(encoder, 2) == () and "['red ', 'big ']" in caplog.text
    assert training_prompts(encoder, 1, search=True) == ()

    encoder.prompts, encoder.default_prompt_name = {"query": "", "document": "", "own": "the "}, "own"
    assert training_prompts(encoder, 2, search=True) == ("the ", "the ")
    assert encoder.prompts == {"query": "the ", "document": "the ", "own": "the "}

    encoder[1].include_prompt = False
    with pytest.raises(InputError, match=r"include_prompt=False.*prompts=none"):
        training_prompts(encoder, 2)
    set_prompts(encoder, [prompt_text(encoder, "none")])
    assert training_prompts(encoder, 2) == () and encoder.prompts["query"] == ""
    assert [prompt_text(encoder, prompt) for prompt in ("own", "other ")] == ["the ", "other "]


def test_a_prompt_that_fills_the_length(tokenizer: Any) -> None:
    with pytest.raises(
        InputError, match="'a big red ' has 5 tokens, which leaves none of max_seq_length=5 for the text"
    ):
        TextViewCollator(tokenizer, ["text"], 5, ["a big red "])
