"""Tokenize training text once, into cached Arrow files that later runs reuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from fmicl_text.errors import InputError
from fmicl_text.loading import explain_full_cache
from fmicl_text.text.collator import (
    TokenCollator,
    check_max_seq_length,
    describe_tokens,
    empty_ids,
    token_id,
    tokenizer_state,
)
from fmicl_text.text.columns import no_text
from fmicl_text.text.data import TextData, reading_errors
from fmicl_text.text.views import TextViews

# Increment this when the rows change, so that cached files of older versions are not reused.
_FORMAT = 2


def tokenize_dataset(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    max_seq_length: int,
    prompts: Sequence[str] | None = None,
    read_length: int | None = None,
) -> Any:
    """Tokenize the rows of a dataset for `collator.TokenCollator`. Rows in which a text has no token of its own are
    skipped: for the encoder, they are blank.

    The result is cached next to the files of `dataset` and memory-mapped. A later call with the same data, tokenizer,
    columns, length and prompts, in any process, reads the cached files instead. A dataset in memory stays in memory;
    a stream is tokenized while it is read.

    Args:
        dataset: Text columns, as returned by `load_training_text`: a `Dataset` or `IterableDataset`.
        tokenizer: The encoder's tokenizer.
        columns: The C text columns, in the order of the views.
        max_seq_length: Longer texts are truncated to this many tokens.
        prompts: Prepended to the texts of each column. By default, nothing is prepended.
        read_length: Truncate to this many tokens instead, for `views.TextViews`.

    Raises:
        InputError: max_seq_length exceeds the model's maximum, a prompt leaves no token for the text, or the disk is
            full.

    Returns:
        A dataset of the same type with the columns input_ids (C lists of int32), token_type_ids (C lists of int8, if
        the tokenizer returns them), text_ids (C int64, `collator.token_id` of each text), length (int32, the number of
        tokens of the longest of the C texts) and truncated (int32, how many of the C texts were truncated). The
        attention mask is created by padding.
    """
    prompts = list(prompts or [""] * len(columns))
    check_max_seq_length(tokenizer, max_seq_length)
    empty_ids(tokenizer, max_seq_length, list(filter(None, prompts)))  # checks the prompts
    max_seq_length = read_length or max_seq_length
    tokenize = partial(
        _tokenize,
        tokenizer=tokenizer,
        columns=list(columns),
        max_seq_length=max_seq_length,
        prompts=prompts,
    )
    source = dataset.with_format("arrow")
    if isinstance(dataset, datasets.IterableDataset):
        return source.map(tokenize, batched=True, remove_columns=list(columns)).with_format(None)
    # The default fingerprint of map pickles the tokenizer, and the pickle of a fast one changes with its first call.
    state = [dataset._fingerprint, tokenizer_state(tokenizer), list(columns), max_seq_length, prompts, _FORMAT]
    with explain_full_cache(dataset):
        tokens = source.map(tokenize, batched=True, new_fingerprint=Hasher.hash(state), desc="Tokenizing")
    return tokens.with_format(None)


def _tokenize(
    table: pa.Table, tokenizer: PreTrainedTokenizerBase, columns: list[str], max_seq_length: int, prompts: list[str]
) -> pa.Table:
    cells = zip(*(table[name].to_pylist() for name in columns), strict=True)
    texts = [prompt + text for row in cells for prompt, text in zip(prompts, row, strict=True)]
    tokens = tokenizer(texts, truncation=True, max_length=max_seq_length, return_attention_mask=False)
    arrays = {
        key: pa.array(lists, pa.list_(pa.int32() if key == "input_ids" else pa.int8())) for key, lists in tokens.items()
    }
    shape = len(table), len(columns)
    ids = np.array([token_id(np.asarray(text)) for text in tokens["input_ids"]], dtype=np.int64).reshape(shape)
    lengths = pc.list_value_length(arrays["input_ids"]).to_numpy().reshape(shape)
    truncated = _truncated(tokenizer, tokens, texts, max_seq_length).reshape(shape)
    arrays["text_ids"] = pa.array(ids.ravel())
    # Group the entries of the texts into one list per row.
    starts = np.arange(0, len(texts) + 1, len(columns), dtype=np.int32)
    rows = {key: pa.ListArray.from_arrays(starts, array) for key, array in arrays.items()}
    rows |= {"length": pa.array(lengths.max(axis=1)), "truncated": pa.array(truncated.sum(axis=1, dtype=np.int32))}
    has_tokens = ids != empty_ids(tokenizer, max_seq_length, prompts)
    return pa.table(rows).filter(pa.array(has_tokens.all(axis=1)))


def _truncated(
    tokenizer: PreTrainedTokenizerBase, tokens: Any, texts: list[str], max_seq_length: int
) -> NDArray[np.bool_]:
    """Which texts were truncated. A slow tokenizer tokenizes those of the maximum length again."""
    if tokens.encodings is not None:
        return np.array([bool(encoding.overflowing) for encoding in tokens.encodings], dtype=bool)
    full = np.array([len(ids) == max_seq_length for ids in tokens["input_ids"]], dtype=bool)
    again = [texts[i] for i in full.nonzero()[0]]
    full[full] = [len(ids) > max_seq_length for ids in tokenizer(again)["input_ids"]] if again else []
    return full


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
        with reading_errors(self.source):
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
    data: TextData,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    prompts: Sequence[str] | None = None,
    views: TextViews | None = None,
) -> tuple[Any, TokenCollator, TextData]:
    """The tokenized rows of training text, their collator, and the text with the statistics of its tokens.

    Args:
        data, tokenizer: See `tokenize_dataset`.
        max_seq_length, prompts: See `tokenize_dataset`.
        views: Makes two views of each text of a batch, in the trainer. Texts are truncated to its `read_length`
            instead.

    Raises:
        InputError: See `tokenize_dataset`; or no row has tokens, or there are no negative pairs because every row
            contains the same text.
    """
    read_length = views.read_length if views else None
    rows: Any = tokenize_dataset(data.dataset, tokenizer, data.columns, max_seq_length, prompts, read_length)
    settings = describe_tokens(tokenizer, data.columns, max_seq_length, prompts, views)
    collator = TokenCollator(tokenizer, settings, views)
    data = replace(data, prompts=tuple(prompts or ()))
    if isinstance(rows, datasets.IterableDataset):
        return RepeatedStream(rows, data.fingerprint, data.source), collator, data
    if not len(rows):
        raise no_text(data.source)
    ids = _numbers(rows, "text_ids").reshape(len(rows), -1)
    without_hard = ids.shape[1] <= 2
    if len(ids) > 1 and without_hard and any((ids == text).any(axis=1).all() for text in ids[0]):
        raise InputError(
            f"{data.source}: the encoder sees the same text in all {len(ids)} rows, so there are no negative pairs "
            f"(max_seq_length={max_seq_length})"
        )
    factors = 2 * np.random.default_rng(0).integers(2**62, size=ids.shape[1]) + 1  # one number per row
    return (
        rows,
        collator,
        replace(
            data,
            num_skipped=(data.num_skipped or 0) + len(data.dataset) - len(rows),
            num_rows=len(rows),
            duplicate_share=(len(ids) - len(np.unique(ids @ factors))) / len(ids),
            truncated_share=int(_numbers(rows, "truncated").sum()) / ids.size,
        ),
    )


def _numbers(rows: datasets.Dataset, column: str) -> NDArray[Any]:
    """The numbers of a column of integers or of lists of integers, in one array."""
    chunks = rows.data.column(column).chunks
    return np.concatenate([(chunk.flatten() if column == "text_ids" else chunk).to_numpy() for chunk in chunks])
