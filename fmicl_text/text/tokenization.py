"""Tokenize training text once, into cached Arrow files that later runs reuse."""

from __future__ import annotations

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

from fmicl_text.loading import explain_full_cache, translate_dataset_errors
from fmicl_text.text.collator import TextViewCollator, TokenCollator, check_max_seq_length, text_id, tokenizer_state
from fmicl_text.text.data import TextData

# Increment this when the rows change, so that cached files of older versions are not reused.
_FORMAT = 1


def tokenize_dataset(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], max_seq_length: int
) -> datasets.Dataset:
    """Tokenize the rows of a dataset for `collator.TokenCollator`.

    The result is cached next to the files of `dataset` and memory-mapped. A later call with the same data, tokenizer,
    columns and length, in any process, reads the cached files instead. A dataset in memory stays in memory.

    Args:
        dataset: Text columns, as returned by `load_training_text`.
        tokenizer: The encoder's tokenizer.
        columns: The C text columns, in the order of the views.
        max_seq_length: Longer texts are truncated to this many tokens.

    Raises:
        InputError: max_seq_length exceeds the model's maximum, or the disk is full.

    Returns:
        A dataset with the columns input_ids (C lists of int32), token_type_ids (C lists of int8, if the tokenizer
        returns them), text_ids (C int64, `collator.text_id` of each text) and length (int32, the number of tokens of
        the longest of the C texts). The attention mask is created by padding.
    """
    check_max_seq_length(tokenizer, max_seq_length)
    tokenize = partial(_tokenize, tokenizer=tokenizer, columns=list(columns), max_seq_length=max_seq_length)
    # The default fingerprint of map pickles the tokenizer, and the pickle of a fast one changes with its first call.
    state = [dataset._fingerprint, tokenizer_state(tokenizer), list(columns), max_seq_length, _FORMAT]
    with explain_full_cache(dataset):
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
    # Group the entries of the texts into one list per row.
    starts = np.arange(0, len(texts) + 1, len(columns), dtype=np.int32)
    rows = {key: pa.ListArray.from_arrays(starts, array) for key, array in arrays.items()}
    return pa.table({**rows, "length": lengths.max(axis=1)})


class RepeatedStream(IterableDataset):
    """Repeats a stream without end, reshuffled in each epoch if it is shuffled. A resumed run, which skips the rows
    already read, then continues at the same row, whatever the epoch.

    Args:
        stream: The stream.
        content: Identifies its content and order; None if unknown.
        source: Name of the data in messages.

    Raises:
        InputError: While it is read, for a row that cannot be read.
    """

    def __init__(
        self, stream: datasets.IterableDataset, content: str | None = None, source: str = "train_dataset"
    ) -> None:
        self.stream, self.content, self.source = stream, content, source

    def fingerprint(self) -> str | None:
        """Identifies the content and order of the rows; None if unknown."""
        return self.content

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with translate_dataset_errors(lambda error: f"{self.source} cannot be read: {type(error).__name__}: {error}"):
            yield from self.rows()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows, without translation of errors."""
        for epoch in count():
            self.stream.set_epoch(epoch)
            rows = iter(self.stream)
            first = next(rows, None)
            if first is None:  # this worker has no shard of the data
                return
            yield first
            yield from rows


def training_rows(
    data: TextData, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, tokenize_once: bool
) -> tuple[Any, TextViewCollator | TokenCollator]:
    """The trainer's dataset and its collator. With `tokenize_once`, text that is not streamed is tokenized
    before training. Otherwise the collator tokenizes it batch by batch."""
    if tokenize_once and isinstance(data.dataset, datasets.Dataset):
        return tokenize_dataset(data.dataset, tokenizer, data.columns, max_seq_length), TokenCollator(tokenizer)
    rows: Any = data.dataset
    if isinstance(rows, datasets.IterableDataset):
        rows = RepeatedStream(rows, data.fingerprint, data.source)
    return rows, TextViewCollator(tokenizer, data.columns, max_seq_length)
