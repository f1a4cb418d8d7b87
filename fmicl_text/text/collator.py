"""Rows of text to a batch [examples, views, tokens]."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fmicl_text.errors import InputError


@dataclass
class TextViewCollator:
    """Tokenize text columns into views.

    One column gives two identical views of each text; the encoder's dropout makes them differ (SimCSE, arXiv
    2104.08821). Two columns are the views (x, y); three are (x, y, hard negative).

    Args:
        tokenizer: The encoder's.
        columns: One to three text columns.
        max_seq_length: Longer texts are cut to this many tokens; the paper's 32.

    Raises:
        InputError: max_seq_length is beyond what the model can read.

    A call takes rows {column: text} and returns token tensors [B, V, T] (V = 2 or 3, padded to the longest) and
    `text_ids` [B, number of columns], int64, equal where texts are equal, in every process.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: Sequence[str]
    max_seq_length: int = 32

    def __post_init__(self) -> None:
        check_max_seq_length(self.tokenizer, self.max_seq_length)

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        texts = [[row[column] for column in self.columns] for row in rows]
        tokens = self.tokenizer(
            list(chain.from_iterable(texts)),
            truncation=True,
            max_length=self.max_seq_length,
            padding=True,
            return_tensors="pt",
        )
        return _views(tokens, [list(map(text_id, row)) for row in texts])


@dataclass
class TokenCollator:
    """The batches of `TextViewCollator`, from rows that `tokens.tokenize_dataset` has made of the same texts.

    Args:
        tokenizer: The one that made the rows; it pads them to the longest of the batch.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name not in ("text_ids", "length")]
        tokens = self.tokenizer.pad(
            {name: list(chain.from_iterable(row[name] for row in rows)) for name in names}, return_tensors="pt"
        )
        return _views(tokens, [row["text_ids"] for row in rows])


def _views(tokens: Mapping[str, Tensor], text_ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The batch of tokens [B * C, T] and text_ids [B, C] of C columns: views [B, V, T], of one column two."""
    ids = torch.tensor(text_ids)
    batch = {key: value.unflatten(0, ids.shape) for key, value in tokens.items()}
    if ids.shape[1] == 1:
        batch = {key: value.expand(-1, 2, -1) for key, value in batch.items()}
    return {**batch, "text_ids": ids}


def check_max_seq_length(tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
    """Raise `InputError` for a length beyond what the model can read."""
    limit = tokenizer.model_max_length
    if max_seq_length > limit:
        raise InputError(f"--max_seq_length {max_seq_length} is beyond the model's {limit} tokens")


def text_id(text: str) -> int:
    """A 63-bit hash of a text; Python's own differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
