"""Batches of any texts: emoji, right-to-left, control characters, special tokens in words, a thousand words."""

import datasets
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from fmicl_text.quickstart import ENCODER
from fmicl_text.text.collator import TextViewCollator, TokenCollator
from fmicl_text.text.tokenization import tokenize_dataset

# a warning of ByT5 for a text that ends with its closing token
pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has </s>")
COLUMNS = (("text",), ("sent0", "sent1"), ("sent0", "sent1", "hard_neg"))
AWKWARD = (
    "\x00",
    "\ufeff",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "שלום עולם",
    "مرحبا بالعالم",
    "e\u0301\u0301",
    "\u202eabc\u202c",
    "[PAD] [MASK] [CLS]",
    "<pad></s>",
)
WORDS = st.text() | st.sampled_from(AWKWARD) | st.text("ab dog,.!", max_size=40)
TEXTS = WORDS | st.builds(lambda word, count: f"{word} " * count, WORDS, st.integers(2, 1000))


@pytest.fixture(scope="module", params=["word pieces", "words", "words, left", "bytes"])
def tokenizer(request, bert_folder):
    """The tokenizers of the bundled encoder and of the tiny test model (39 words), and one of bytes, in Python."""
    side = "left" if request.param.endswith("left") else "right"
    if request.param == "bytes":
        return ByT5Tokenizer(model_max_length=512)
    folder = ENCODER if request.param == "word pieces" else bert_folder
    return AutoTokenizer.from_pretrained(folder, padding_side=side)


@st.composite
def tables(draw):
    """Columns and rows of texts, some of which are repeated."""
    columns = draw(st.sampled_from(COLUMNS))
    pool = draw(st.lists(TEXTS, min_size=1, max_size=4))
    pool += [f"{text}." for text in pool]  # different only at the end
    row = st.fixed_dictionaries({name: st.sampled_from(pool) for name in columns})
    return columns, draw(st.lists(row, min_size=1, max_size=8))


LENGTHS = st.integers(3, 40)  # the maximum of the tiny model


@given(tables(), LENGTHS)
def test_a_batch_is_its_texts_truncated_and_padded(tokenizer, table, length):
    columns, rows = table
    batch = TextViewCollator(tokenizer, columns, length)(rows)
    texts = [[row[name] for name in columns] for row in rows]
    expected = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for row in texts for text in row]
    num_views, num_tokens = max(2, len(columns)), max(map(len, expected))
    assert num_tokens <= length
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert all(batch[name].shape == (len(rows), num_views, num_tokens) for name in batch if name != "text_ids")
    if len(columns) == 1:
        assert all(torch.equal(batch[name][:, 0], batch[name][:, 1]) for name in batch if name != "text_ids")
    views = slice(None) if len(columns) > 1 else slice(1)
    sums = mask[:, views].sum(-1).flatten().tolist()
    assert sums == list(map(len, expected))
    assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    rising = mask if tokenizer.padding_side == "left" else mask.flip(-1)
    assert (rising.diff(dim=-1) >= 0).all()
    for found, kept, tokens in zip(ids[:, views].flatten(0, 1), mask[:, views].flatten(0, 1), expected, strict=True):
        assert found[kept.bool()].tolist() == tokens


@given(tables(), LENGTHS)
def test_ids_are_equal_where_the_tokens_are(tokenizer, table, length):
    columns, rows = table
    ids = TextViewCollator(tokenizer, columns, length)(rows)["text_ids"]
    assert ids.shape == (len(rows), len(columns)) and (ids >= 0).all()
    texts = [tokenizer(row[name], truncation=True, max_length=length)["input_ids"] for row in rows for name in columns]
    found = ids.flatten().tolist()
    assert [[a == b for b in found] for a in found] == [[a == b for b in texts] for a in texts]


@given(TEXTS, LENGTHS)
def test_a_truncated_text_is_the_start_of_the_text(tokenizer, text, length):
    """The first tokens and the closing token."""
    full = tokenizer(text)["input_ids"]
    assume(len(full) <= length or full[length - 2] != full[-1])  # ByT5 does not add a second closing token
    batch = TextViewCollator(tokenizer, ["text"], length)([{"text": text}])
    expected = full if len(full) <= length else [*full[: length - 1], full[-1]]
    assert batch["input_ids"][0, 0].tolist() == expected


@pytest.mark.slow
@settings(max_examples=25)
@given(tables(), LENGTHS, st.data())
def test_tokens_and_texts_give_the_same_batches(tokenizer, table, length, data):
    """Rows with a text without tokens of its own are not among the tokens."""
    columns, rows = table
    tokens = tokenize_dataset(datasets.Dataset.from_list(rows), tokenizer, columns, length)
    assert tokens.cache_files == []  # a dataset in memory stays in memory
    empty = tokenizer("")["input_ids"]
    rows = [row for row in rows if empty not in [tokenizer(text)["input_ids"] for text in row.values()]]
    assert len(tokens) == len(rows)
    assume(rows)
    chosen = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, max_size=6))
    got = TokenCollator(tokenizer)([tokens[i] for i in chosen])
    expected = TextViewCollator(tokenizer, columns, length)([rows[i] for i in chosen])
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    lengths = [max(len(tokens[i]["input_ids"][k]) for k in range(len(columns))) for i in range(len(rows))]
    assert tokens["length"][:] == lengths
