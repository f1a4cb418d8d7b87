"""Rows of text to a batch [examples, views, tokens]."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fmicl_text.errors import InputError


@dataclass
class TextViewCollator:
    """Tokenise text columns into views.

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
        limit = self.tokenizer.model_max_length
        if self.max_seq_length > limit:
            raise InputError(f"--max_seq_length {self.max_seq_length} is beyond the model's {limit} tokens")

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        texts = [row[column] for row in rows for column in self.columns]
        tokens = self.tokenizer(
            texts, truncation=True, max_length=self.max_seq_length, padding=True, return_tensors="pt"
        )
        batch = {key: value.unflatten(0, (len(rows), len(self.columns))) for key, value in tokens.items()}
        if len(self.columns) == 1:
            batch = {key: value.expand(-1, 2, -1) for key, value in batch.items()}
        batch["text_ids"] = torch.tensor([text_id(text) for text in texts]).view(len(rows), len(self.columns))
        return batch


def text_id(text: str) -> int:
    """A 63-bit hash of a text; Python's own differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
