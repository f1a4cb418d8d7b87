"""Whole batches, written out."""

import pytest
import torch
from transformers import AutoTokenizer

from fmicl_text.errors import InputError
from fmicl_text.text.collator import TextViewCollator, text_id
from tests.conftest import SPECIAL, WORDS


def ids(text, length):
    """[CLS] words [SEP], padded."""
    tokens = [2, *(WORDS.index(word) + len(SPECIAL) for word in text.split()), 3]
    return tokens + [0] * (length - len(tokens))


def test_one_column_gives_two_identical_views(bert_folder):
    collate = TextViewCollator(AutoTokenizer.from_pretrained(bert_folder), ["text"])
    batch = collate([{"text": "a dog runs"}, {"text": "the cat"}])
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "text_ids"} or set(batch) == {
        "input_ids",
        "attention_mask",
        "text_ids",
    }
    expected = torch.tensor([[ids("a dog runs", 5)] * 2, [ids("the cat", 5)] * 2])
    assert torch.equal(batch["input_ids"], expected)
    assert torch.equal(batch["attention_mask"], (expected > 0).long())
    assert torch.equal(batch["text_ids"], torch.tensor([[text_id("a dog runs")], [text_id("the cat")]]))


def test_triplets_keep_their_order(bert_folder):
    collate = TextViewCollator(AutoTokenizer.from_pretrained(bert_folder), ["sent0", "sent1", "hard_neg"])
    rows = [
        {"sent0": "a dog", "sent1": "the dog runs", "hard_neg": "a cat"},
        {"sent0": "a cat", "sent1": "the cat", "hard_neg": "a bird sings"},
    ]
    batch = collate(rows)
    expected = [[ids(row[name], 5) for name in ("sent0", "sent1", "hard_neg")] for row in rows]
    assert torch.equal(batch["input_ids"], torch.tensor(expected))
    assert batch["text_ids"].shape == (2, 3)
    assert batch["text_ids"][0, 2] == batch["text_ids"][1, 0]
    assert batch["text_ids"].unique().numel() == 5


def test_long_texts_are_cut(bert_folder):
    collate = TextViewCollator(AutoTokenizer.from_pretrained(bert_folder), ["text"], max_seq_length=4)
    batch = collate([{"text": "a dog runs quickly today"}, {"text": "the cat"}])
    assert torch.equal(batch["input_ids"][:, 0], torch.tensor([ids("a dog", 4), ids("the cat", 4)]))


def test_a_length_beyond_the_model_is_refused(bert_folder):
    with pytest.raises(InputError, match="--max_seq_length 41 is beyond the model's 40 tokens"):
        TextViewCollator(AutoTokenizer.from_pretrained(bert_folder), ["text"], max_seq_length=41)


def test_text_id_is_stable():
    """In every process and on every machine: ranks compare their texts by it."""
    assert text_id("a dog") == 9151722581430185315
    assert 0 <= text_id("the cat") < 2**63
