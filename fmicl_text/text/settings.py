"""Settings of an encoder that decide its embeddings and are not visible in its weights, for records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import PreTrainedTokenizerBase


def encoder_settings(encoder: SentenceTransformer) -> dict[str, Any]:
    """What `encoder.encode` does besides calling the model.

    Returns:
        prompt: The text that is put before every text, by `default_prompt_name`; None without one.
        prompt_is_pooled: Whether the tokens of a prompt are pooled.
        do_lower_case: Whether texts are lowercased before they are tokenized.
        truncation_side: The side on which the tokenizer cuts long texts.
        truncate_dim: The number of dimensions that are kept; None for all.
        similarity_fn_name: The similarity that `encoder.similarity` computes.
        modules: Names of the modules' classes, such as Normalize.
    """
    first: Any = encoder[0]
    return {
        "prompt": applied_prompt(encoder),
        "prompt_is_pooled": all(module.include_prompt for module in encoder if isinstance(module, Pooling)),
        "do_lower_case": bool(getattr(first, "do_lower_case", False)),
        "truncation_side": getattr(encoder.tokenizer, "truncation_side", None),
        "truncate_dim": encoder.truncate_dim,
        "similarity_fn_name": encoder.similarity_fn_name,
        "modules": [type(module).__name__ for module in encoder],
    }


def applied_prompt(encoder: SentenceTransformer) -> str | None:
    """The prompt that `encoder.encode` puts before every text; None without one."""
    return encoder.prompts.get(encoder.default_prompt_name or "") or None


def truncated_share(encoder: SentenceTransformer, texts: Sequence[str], prompt: str | None = None) -> float | None:
    """The share of texts that the encoder truncates, in [0, 1]; None if its tokenizer is not one of transformers.

    Args:
        encoder: Any SentenceTransformer.
        texts: N >= 1 texts.
        prompt: Put before every text. None uses the encoder's own.
    """
    tokenizer, longest = encoder.tokenizer, encoder.max_seq_length
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or longest is None:
        return None
    prompt = applied_prompt(encoder) or "" if prompt is None else prompt
    lengths = map(len, tokenizer([prompt + text for text in texts], verbose=False)["input_ids"])
    return sum(length > longest for length in lengths) / len(texts)
