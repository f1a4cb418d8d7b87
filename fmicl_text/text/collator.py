"""Collators: rows of text to batches [examples, views, tokens]."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fmicl_text.errors import InputError


@dataclass
class TextViewCollator:
    """Tokenizes text columns into views.

    With one column, the two views of a text are identical, and the encoder's dropout makes their embeddings differ
    (SimCSE, arXiv 2104.08821). Two columns are the views (x, y); three are (x, y, hard negative).

    Args:
        tokenizer: The encoder's tokenizer.
        columns: One to three text columns, as returned by `data.text_columns`.
        max_seq_length: Longer texts are truncated to this many tokens. The paper uses 32.

    Raises:
        InputError: max_seq_length exceeds the model's maximum.

    A call takes rows {column: text} and returns token tensors [B, V, T] (V = 2 or 3, padded to the longest) and
    `text_ids` [B, number of columns], int64, which are equal where texts are equal, in every process.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: Sequence[str]
    max_seq_length: int = 32

    def __post_init__(self) -> None:
        check_max_seq_length(self.tokenizer, self.max_seq_length)

    def describe(self) -> dict[str, Any]:
        """Settings that affect the batches, which are compared when a run is resumed."""
        settings = {"columns": list(self.columns), "max_seq_length": self.max_seq_length}
        return settings | describe_padding(self.tokenizer) | {"tokenizer": Hasher.hash(tokenizer_state(self.tokenizer))}

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
    """Makes the same batches as `TextViewCollator`, from the rows of `tokenization.tokenize_dataset`.

    Args:
        tokenizer: The tokenizer that made the rows. It pads them to the longest in the batch.
    """

    tokenizer: PreTrainedTokenizerBase

    def describe(self) -> dict[str, Any]:
        """Settings that affect the batches, which are compared when a run is resumed. The rows contain the others."""
        return describe_padding(self.tokenizer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name not in ("text_ids", "length")]
        tokens = self.tokenizer.pad(
            {name: list(chain.from_iterable(row[name] for row in rows)) for name in names}, return_tensors="pt"
        )
        return _views(tokens, [row["text_ids"] for row in rows])


def _views(tokens: Mapping[str, Tensor], text_ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A batch of views [B, V, T] and text_ids [B, C] from tokens [B * C, T] of C columns; a single column is
    used for both views."""
    ids = torch.tensor(text_ids)
    batch = {key: value.unflatten(0, ids.shape) for key, value in tokens.items()}
    if ids.shape[1] == 1:
        batch = {key: value.expand(-1, 2, -1) for key, value in batch.items()}
    return {**batch, "text_ids": ids}


def check_max_seq_length(tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
    """Raise `InputError` if a length exceeds the model's maximum."""
    limit = tokenizer.model_max_length
    if max_seq_length > limit:
        raise InputError(f"max_seq_length={max_seq_length} exceeds the model's maximum of {limit} tokens")


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Everything that affects the tokens of a text. Padding does not: the collator pads."""
    rules: Any
    if tokenizer.is_fast:
        # The backend keeps the truncation and padding of the last call.
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = json.dumps({**backend, "truncation": None, "padding": None})
    else:
        rules = tokenizer.get_vocab(), tokenizer.init_kwargs
    options = tokenizer.model_input_names, tokenizer.truncation_side, tokenizer.split_special_tokens
    return [type(tokenizer).__qualname__, *options, rules]


def describe_padding(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How a tokenizer pads."""
    return {"padding_side": tokenizer.padding_side, "pad_token_id": tokenizer.pad_token_id}


def text_id(text: str) -> int:
    """A 63-bit hash of a text. Python's own hash differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
