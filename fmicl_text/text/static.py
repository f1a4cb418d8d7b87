"""Static embeddings: encoders that average one embedding per token (StaticEmbedding of sentence-transformers)."""

from __future__ import annotations

import json
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def is_static(encoder: SentenceTransformer) -> bool:
    """Whether the first module of an encoder is a `StaticEmbedding`."""
    return isinstance(encoder[0], StaticEmbedding)


def tokenizer_of(encoder: SentenceTransformer) -> PreTrainedTokenizerBase:
    """The tokenizer of an encoder. A `StaticEmbedding` has one of another library, which is wrapped: it gives the same
    tokens, without special tokens, and pads, which the attention mask hides."""
    tokenizer: Any = encoder.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        return tokenizer
    rules = json.loads(tokenizer.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
    pad_token = min(tokenizer.get_vocab().items(), key=lambda item: item[1])[0]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), pad_token=pad_token)


def static_features(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padded tokens {input_ids, attention_mask} [B, T] as the input of a `StaticEmbedding`: the token ids of all texts
    in one row, and where each text begins."""
    mask = features["attention_mask"].bool()
    lengths = mask.sum(1)
    return {"input_ids": features["input_ids"][mask], "offsets": lengths.cumsum(0) - lengths}
