"""Settings of an encoder that decide its embeddings and are not visible in its weights, for records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


def prompt_text(encoder: SentenceTransformer, prompt: str) -> str:
    """The text of a prompt that a user names: one of the model's prompts by its name, `none` for no prompt, or any
    other text as it is."""
    named = encoder.prompts.get(prompt)
    return "" if prompt == "none" else prompt if named is None else named


def set_prompt(encoder: SentenceTransformer, prompt: str) -> None:
    """Make `encoder.encode` put a prompt before every text, instead of the model's own.

    Args:
        encoder: Any SentenceTransformer.
        prompt: The name of one of the model's prompts, or a text; `none` for no prompt.
    """
    encoder.prompts, encoder.default_prompt_name = {"given": prompt_text(encoder, prompt)}, "given"


def truncated_share(encoder: SentenceTransformer, texts: Sequence[str], prompt: str = "") -> float | None:
    """The share of texts that the encoder truncates, in [0, 1]; None if its tokenizer is not one of transformers.

    Args:
        encoder: Any SentenceTransformer.
        texts: N >= 1 texts.
        prompt: Put before every text.
    """
    tokenizer, longest = encoder.tokenizer, encoder.max_seq_length
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or longest is None:
        return None
    lengths = map(len, tokenizer([prompt + text for text in texts], verbose=False)["input_ids"])
    return sum(length > longest for length in lengths) / len(texts)


class EncodingLog:
    """What an encoder was given: its prompts, and how many texts it truncated.

    Attributes:
        prompts: The prompts that were applied, None where there was none.
        num_texts: Number of texts.
        num_truncated: Number of truncated texts.
    """

    def __init__(self, max_seq_length: int | None) -> None:
        self.max_seq_length = max_seq_length
        self.prompts: set[str | None] = set()
        self.num_texts = self.num_truncated = 0

    def describe(self) -> dict[str, Any]:
        """{prompt, truncated: share of the texts}; several prompts are a list. Empty if nothing was encoded."""
        if not self.num_texts:
            return {}
        prompts = sorted(self.prompts, key=str)
        return {"prompt": prompts if len(prompts) > 1 else prompts[0], "truncated": self.num_truncated / self.num_texts}

    def truncation(self) -> str | None:
        """The share of truncated texts in words; None if there are none."""
        if not self.num_truncated:
            return None
        share = f"{self.num_truncated / self.num_texts:.1%} of the texts"
        return f"{share} are truncated to {self.max_seq_length} tokens"


@contextmanager
def log_encoding(encoder: SentenceTransformer) -> Iterator[EncodingLog]:
    """Within this context, an `EncodingLog` records what the encoder is given, by whichever method."""
    log, preprocess = EncodingLog(encoder.max_seq_length), encoder.preprocess

    def logged(inputs: Any, prompt: str | None = None, **kwargs: Any) -> Any:
        texts = [text for text in inputs if isinstance(text, str)]
        log.prompts.add(prompt or None)
        log.num_texts += len(texts)
        log.num_truncated += round(len(texts) * (truncated_share(encoder, texts, prompt or "") or 0)) if texts else 0
        return preprocess(inputs, prompt=prompt, **kwargs)

    encoder.preprocess = logged  # type: ignore[method-assign]
    try:
        yield log
    finally:
        del encoder.preprocess
