"""Complete batches, compared with their expected tensors."""

import datasets
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer

from fmicl_text.errors import InputError
from fmicl_text.text.collator import TextViewCollator, TokenCollator, token_id
from fmicl_text.text.tokenization import tokenize_dataset
from tests.support import SPECIAL, WORDS, sentences


def ids(text, length):
    """Token ids of [CLS] words [SEP], padded."""
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
    assert torch.equal(
        batch["text_ids"], torch.tensor([[token_id(np.array(ids(text, 0)))] for text in ("a dog runs", "the cat")])
    )


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


def test_long_texts_are_truncated(bert_folder):
    collate = TextViewCollator(AutoTokenizer.from_pretrained(bert_folder), ["text"], max_seq_length=4)
    batch = collate([{"text": "a dog runs quickly today"}, {"text": "the cat"}])
    assert torch.equal(batch["input_ids"][:, 0], torch.tensor([ids("a dog", 4), ids("the cat", 4)]))


def test_a_length_beyond_the_models_maximum(bert_folder):
    with pytest.raises(InputError, match="max_seq_length=2 leaves no token for the text"):
        TextViewCollator(AutoTokenizer.from_pretrained(bert_folder), ["text"], max_seq_length=2)
    with pytest.raises(InputError, match="max_seq_length=41 exceeds the model's maximum of 40 tokens"):
        TextViewCollator(AutoTokenizer.from_pretrained(bert_folder), ["text"], max_seq_length=41)


def test_rows_of_tokens_are_padded_to_the_longest(bert_folder):
    rows = [
        {"input_ids": [[2, 5, 3], [2, 7, 8, 9, 3]], "text_ids": [11, 12], "length": 5},
        {"input_ids": [[2, 6, 6, 3], [2, 3]], "text_ids": [13, 11], "length": 4},
    ]
    batch = TokenCollator(AutoTokenizer.from_pretrained(bert_folder))(rows)
    assert set(batch) == {"input_ids", "attention_mask", "text_ids"}
    expected = torch.tensor([[[2, 5, 3, 0, 0], [2, 7, 8, 9, 3]], [[2, 6, 6, 3, 0], [2, 3, 0, 0, 0]]])
    assert torch.equal(batch["input_ids"], expected)
    assert torch.equal(batch["attention_mask"], (expected > 0).long())
    assert torch.equal(batch["text_ids"], torch.tensor([[11, 12], [13, 11]]))


def plain(folder):
    return AutoTokenizer.from_pretrained(folder)


def left_padding(folder):
    return AutoTokenizer.from_pretrained(folder, padding_side="left")


def left_truncation(folder):
    return AutoTokenizer.from_pretrained(folder, truncation_side="left")


def second_segment(folder):
    """Token type 1 for all tokens except [CLS] and padding."""
    tokenizer = AutoTokenizer.from_pretrained(
        folder, model_input_names=["input_ids", "token_type_ids", "attention_mask"], padding_side="left"
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def slow(folder):
    """A tokenizer of bytes, in Python."""
    return ByT5Tokenizer()


@pytest.mark.parametrize("columns", [["text"], ["sent0", "sent1"], ["sent0", "sent1", "hard_neg"]], ids=len)
@pytest.mark.parametrize("make", [plain, left_padding, left_truncation, second_segment, slow])
def test_tokens_and_texts_give_the_same_batches(bert_folder, make, columns):
    texts = iter([*sentences(34), "dog", "a cat"] * len(columns))
    rows = [{name: next(texts) for name in columns} for _ in range(36)]
    tokenized = tokenize_dataset(datasets.Dataset.from_list(rows), make(bert_folder), columns, 9)
    from_tokens, from_texts = TokenCollator(make(bert_folder)), TextViewCollator(make(bert_folder), columns, 9)
    for chosen in (range(36), [35, 3, 3, 20], [34]):
        got, expected = from_tokens([tokenized[i] for i in chosen]), from_texts([rows[i] for i in chosen])
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert got[key].dtype == value.dtype == torch.int64
            assert torch.equal(got[key], value), key
            assert got[key].is_contiguous() and value.is_contiguous()  # else its memory cannot be pinned
        if len(chosen) == 36:
            num_tokens = expected["attention_mask"].sum(-1)
            assert num_tokens.min() < num_tokens.max() == 9
            if make is second_segment:
                assert torch.equal(expected["token_type_ids"].sum(-1), num_tokens - 1)


def test_token_id_is_stable():
    """Equal in every process and on every machine, because processes compare their texts by it."""
    assert token_id(np.array([2, 5, 6, 3])) == token_id(np.array([2, 5, 6, 3], dtype=np.int32)) == 6352955776998409117
    assert token_id(np.array([2, 5, 6, 3])) != token_id(np.array([2, 6, 5, 3]))
    assert 0 <= token_id(np.array([2, 3])) < 2**63
