"""Training text tokenized once, into Arrow files that later starts find again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, count
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from fmicl_text.text.collator import TextViewCollator, TokenCollator, check_max_seq_length, text_id
from fmicl_text.text.data import TextData

# Raise it when the rows change, so that files of older code are not found.
_FORMAT = 1


def tokenize_dataset(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], max_seq_length: int
) -> datasets.Dataset:
    """The rows of `dataset` as tokens, for `collator.TokenCollator`.

    Written to the cache beside the files of `dataset` and read by memory mapping; the next call with the same data,
    tokenizer, columns and length, in any process, opens that file and tokenizes nothing. A dataset that is in memory
    stays there.

    Args:
        dataset: such as `load_training_text` gives.
        tokenizer: The encoder's.
        columns: The C text columns, in the order of the views.
        max_seq_length: Longer texts are cut to this many tokens.

    Raises:
        InputError: max_seq_length is beyond what the model can read.

    The columns of the result:
        input_ids: C lists of int32.
        token_type_ids: C lists of int8, where the tokenizer gives them. There is no attention_mask, padding makes it.
        text_ids: C int64, `collator.text_id` of each text.
        length: int32, the most tokens that one of the C texts has.
    """
    check_max_seq_length(tokenizer, max_seq_length)
    tokenize = partial(_tokenize, tokenizer=tokenizer, columns=list(columns), max_seq_length=max_seq_length)
    # The fingerprint that map would make pickles the tokenizer, and a fast one is another after its first call.
    state = [dataset._fingerprint, _tokenizer_state(tokenizer), list(columns), max_seq_length, _FORMAT]
    tokens = dataset.with_format("arrow").map(
        tokenize, batched=True, new_fingerprint=Hasher.hash(state), desc="Tokenizing"
    )
    return tokens.with_format(None)


def _tokenize(table: pa.Table, tokenizer: PreTrainedTokenizerBase, columns: list[str], max_seq_length: int) -> pa.Table:
    texts = list(chain.from_iterable(zip(*(table[name].to_pylist() for name in columns), strict=True)))
    tokens = tokenizer(texts, truncation=True, max_length=max_seq_length, return_attention_mask=False)
    arrays = {
        key: pa.array(lists, pa.list_(pa.int32() if key == "input_ids" else pa.int8())) for key, lists in tokens.items()
    }
    lengths = pc.list_value_length(arrays["input_ids"]).to_numpy().reshape(len(table), len(columns))
    arrays["text_ids"] = pa.array(map(text_id, texts), pa.int64())
    # From one entry a text to one list a row.
    starts = np.arange(0, len(texts) + 1, len(columns), dtype=np.int32)
    rows = {key: pa.ListArray.from_arrays(starts, array) for key, array in arrays.items()}
    return pa.table({**rows, "length": lengths.max(axis=1)})


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides the tokens of a text. Padding is not in it: the collator pads."""
    rules: Any
    if tokenizer.is_fast:
        # A call leaves its truncation and padding behind in the backend.
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = json.dumps({**backend, "truncation": None, "padding": None})
    else:
        rules = tokenizer.get_vocab(), tokenizer.init_kwargs
    options = tokenizer.model_input_names, tokenizer.truncation_side, tokenizer.split_special_tokens
    return [type(tokenizer).__qualname__, *options, rules]


class RepeatedStream(IterableDataset):
    """A stream again and again, in another order each time if it is shuffled, without an end: that a resumed run, which
    skips what was read, then stands where it did, in whichever pass that was."""

    def __init__(self, stream: datasets.IterableDataset) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in count():
            self.stream.set_epoch(number)
            rows = iter(self.stream)
            first = next(rows, None)
            if first is None:  # a worker without a share of the files
                return
            yield first
            yield from rows


def training_rows(
    data: TextData, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, tokenize_once: bool
) -> tuple[Any, TextViewCollator | TokenCollator]:
    """What the trainer reads, and its collator: tokens where the text can be tokenized before training, else the text,
    tokenized batch by batch."""
    if tokenize_once and isinstance(data.dataset, datasets.Dataset):
        return tokenize_dataset(data.dataset, tokenizer, data.columns, max_seq_length), TokenCollator(tokenizer)
    rows = RepeatedStream(data.dataset) if isinstance(data.dataset, datasets.IterableDataset) else data.dataset
    return rows, TextViewCollator(tokenizer, data.columns, max_seq_length)
