"""Collators: rows of text to batches [examples, views, tokens]."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fmicl_text.errors import InputError

if TYPE_CHECKING:
    from fmicl_text.text.views import TextViews

NOT_TOKENS = ("text_ids", "length", "truncated")  # columns of tokenized rows that the encoder does not receive


@dataclass
class TextViewCollator:
    """Tokenizes text columns into views.

    With one column, the two views of a text are identical, and the encoder's dropout makes their embeddings differ
    (SimCSE, arXiv 2104.08821), or the trainer changes them with `views`. Two columns are the views (x, y); the columns
    that follow are hard negatives.

    Args:
        tokenizer: The encoder's tokenizer.
        columns: The text columns, as returned by `data.text_columns`.
        max_seq_length: Longer texts are truncated to this many tokens. The paper uses 32.
        prompts: Prepended to the texts of each column. By default, nothing is prepended.
        views: Makes two views of each text of a batch, in the trainer. Texts are truncated to its `read_length`
            instead.

    Raises:
        InputError: max_seq_length exceeds the model's maximum, or it or a prompt leaves no token for the text.

    A call takes rows {column: text} and returns token tensors [B, V, T] (V >= 2, padded to the longest) and
    `text_ids` [B, number of columns], the `token_id` of each text: int64, equal where the encoder sees equal texts.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: Sequence[str]
    max_seq_length: int = 32
    prompts: Sequence[str] | None = None
    views: TextViews | None = None

    def __post_init__(self) -> None:
        check_max_seq_length(self.tokenizer, self.max_seq_length)
        empty_ids(self.tokenizer, self.max_seq_length, self.prompts or ())

    def describe(self) -> dict[str, Any]:
        """Settings that affect the batches, which are compared when a run is resumed."""
        return describe_tokens(self.tokenizer, self.columns, self.max_seq_length, self.prompts, self.views)

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        prompts = self.prompts or [""] * len(self.columns)
        padded = self.tokenizer(
            [prompt + row[column] for row in rows for prompt, column in zip(prompts, self.columns, strict=True)],
            truncation=True,
            max_length=self.views.read_length if self.views else self.max_seq_length,
            padding=True,
        )
        tokens = tensors_of(padded)
        own = zip(tokens["input_ids"], tokens["attention_mask"].bool(), strict=True)
        ids = torch.tensor([token_id(text[mask].numpy()) for text, mask in own])
        return _views(tokens, ids.view(len(rows), len(self.columns)))


@dataclass
class TokenCollator:
    """Makes the same batches as `TextViewCollator`, from the rows of `tokenization.tokenize_dataset`.

    Args:
        tokenizer: The tokenizer that made the rows. It pads them to the longest in the batch.
        settings: How the rows were made, compared in addition to the rows when a run is resumed.
        views: Makes two views of each text of a batch, in the trainer.
    """

    tokenizer: PreTrainedTokenizerBase
    settings: Mapping[str, Any] = field(default_factory=dict)
    views: TextViews | None = None

    @property
    def columns(self) -> list[str]:
        """The text columns, if they are known."""
        return list(self.settings.get("columns", ()))

    def describe(self) -> dict[str, Any]:
        """Settings that affect the batches, which are compared when a run is resumed."""
        return {**self.settings, **describe_padding(self.tokenizer)}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name not in NOT_TOKENS]
        tokens = self.tokenizer.pad({name: list(chain.from_iterable(row[name] for row in rows)) for name in names})
        return _views(tensors_of(tokens), torch.tensor([row["text_ids"] for row in rows]))


def tensors_of(tokens: Mapping[str, Any]) -> dict[str, Tensor]:
    """Padded lists of tokens as int64 tensors. With return_tensors="pt", the tokenizer takes four times as long."""
    return {name: torch.from_numpy(np.array(values, dtype=np.int64)) for name, values in tokens.items()}


def _views(tokens: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """A batch of views [B, V, T] and text_ids [B, C] from tokens [B * C, T] of C columns; a single column is
    used for both views."""
    batch = {key: value.unflatten(0, ids.shape) for key, value in tokens.items()}
    if ids.shape[1] == 1:
        batch = {key: value.repeat(1, 2, 1) for key, value in batch.items()}  # memory of a view cannot be pinned
    return {**batch, "text_ids": ids}


def check_max_seq_length(tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
    """Raise `InputError` if a length exceeds the model's maximum, or has no room for text."""
    if max_seq_length <= (num_special := tokenizer.num_special_tokens_to_add()):
        special = f" besides {num_special} special tokens" if num_special else ""
        raise InputError(f"max_seq_length={max_seq_length} leaves no token for the text{special}")
    limit = tokenizer.model_max_length
    if max_seq_length > limit:
        raise InputError(f"max_seq_length={max_seq_length} exceeds the model's maximum of {limit} tokens")


def empty_ids(tokenizer: PreTrainedTokenizerBase, max_seq_length: int, prompts: Sequence[str]) -> list[int]:
    """The `token_id` of an empty text after each prompt. A text with this id has no token of its own.

    Raises:
        InputError: A prompt leaves no token for the text.
    """
    ids = tokenizer(list(prompts))["input_ids"] if prompts else []
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) >= max_seq_length:
            raise InputError(
                f"prompts: {prompt!r} has {len(tokens)} tokens, which leaves none of max_seq_length={max_seq_length} "
                "for the text"
            )
    return [token_id(np.asarray(tokens)) for tokens in ids]


def describe_tokens(
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    max_seq_length: int,
    prompts: Sequence[str] | None,
    views: TextViews | None = None,
) -> dict[str, Any]:
    """How texts become tokens, for the comparison of runs."""
    settings: dict[str, Any] = {"columns": list(columns), "max_seq_length": max_seq_length}
    settings |= views.describe() if views else {"views": ["dropout"]} if len(columns) == 1 else {}
    settings |= {"prompts": list(prompts)} if prompts and any(prompts) else {}
    return settings | describe_padding(tokenizer) | {"tokenizer": Hasher.hash(tokenizer_state(tokenizer))}


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


def token_id(tokens: NDArray[Any]) -> int:
    """A 63-bit hash of the tokens of a text, without padding: equal where the encoder sees equal texts, after
    normalization and truncation; the same in all processes.

    Args:
        tokens: Integers [T].
    """
    return int.from_bytes(hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest()) >> 1
