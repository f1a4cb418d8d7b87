"""Checks of a text encoder before training and evaluation: its modules, its tokenizer, and one dry pass."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from torch import nn
from transformers import PreTrainedTokenizerBase

from fmicl_text.errors import InputError
from fmicl_text.loading import loading_error_message

logger = logging.getLogger(__name__)

UNLIMITED = 2**31 - 1  # a maximum length that no text exceeds; tokenizers without one state 1e30
# Learned position embeddings, by the names that the text families of transformers use.
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe")
# Tokens of the long text of a dry pass: at most this many, and fewer in large models, where a pass takes at most this
# many floating-point operations. BERT-base is checked with 512 tokens forward and with 97 backward.
LONGEST, COST = 4096, 1e11
SHORT = 7  # tokens in another pass, for models that take only some lengths


def require_transformer(encoder: SentenceTransformer, source: str) -> None:
    """Check that an encoder is a transformer followed by one pooling layer, or a `StaticEmbedding`.

    Args:
        source: The argument and its value, which begin the message.

    Raises:
        InputError: It has other modules.
    """
    first, names = encoder[0], ", ".join(type(module).__name__ for module in encoder)
    if isinstance(first, StaticEmbedding):
        if (highest := max(first.tokenizer.get_vocab().values(), default=-1)) >= first.num_embeddings:
            raise InputError(
                f"{source}: tokenizer and model do not match; the tokenizer has ids up to {highest}, the model "
                f"{first.num_embeddings} embeddings"
            )
        return
    if isinstance(first, Router):
        raise InputError(f"{source} is a Router, which has several encoders: train each encoder on its own")
    if not isinstance(first, Transformer) or sum(isinstance(module, Pooling) for module in encoder) != 1:
        raise InputError(f"{source} is not a transformer followed by pooling: its modules are {names}")
    require_text(encoder, source)


def require_text(encoder: SentenceTransformer, source: str) -> None:
    """Raise `InputError` if the inputs of an encoder are images, for example, instead of texts.

    Args:
        source: The argument and its value, which begin the message.
    """
    inputs = getattr(encoder[0], "modality_config", None) or {"text": {}}
    if "text" not in inputs:
        raise InputError(f"{source} does not encode text: its inputs are {', '.join(map(str, inputs))}")


def prepare_tokenizer(encoder: SentenceTransformer, source: str) -> None:
    """Complete the tokenizer of an encoder in place, and check that it matches the model.

    A tokenizer without a padding token (GPT-2, Llama) pads with its end-of-text token, which the attention mask hides.
    For a model with learned positions it pads on the right: on the left, GPT-2 and BERT count the padding, and an
    embedding depends on the other texts of its batch. Its maximum length is reduced to the number of positions that
    the model has for tokens: in RoBERTa and related models, `max_position_embeddings - padding_idx - 1`. A folder
    without tokenizer files loads without an error, and all sentences of the same length then get the same embedding.
    Encoders without a transformer are not changed.

    Args:
        source: The argument and its value, which begin the message.

    Raises:
        InputError: The tokenizer has only special tokens or no token to pad with, or it has tokens that the model has
            no embedding for.
    """
    tokenizer = getattr(encoder, "tokenizer", None)
    if not isinstance(encoder[0], Transformer) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    backbone: Any = encoder[0].model
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"{source}: its tokenizer has neither a padding token nor an end-of-text token to pad with"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if (limit := position_limit(backbone)) is not None and tokenizer.model_max_length > limit:
        tokenizer.model_max_length = limit
    if position_tables(backbone):
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right"  # the latter is saved
    try:
        rows = getattr(backbone.get_input_embeddings(), "num_embeddings", UNLIMITED)
    except NotImplementedError:  # CANINE, which hashes characters
        return
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) <= len(tokenizer.all_special_ids):
        raise InputError(f"{source}: its tokenizer files are missing, so every word would be unknown")
    # Classes of tokenizers add these on their own (Qwen2's end-of-text token), whether or not texts contain them. The
    # dry pass has those that are part of every text.
    unused = {getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "cls", "sep", "mask")}
    unused -= {tokenizer.pad_token_id, tokenizer.unk_token_id}
    word, highest = max(((word, i) for word, i in vocabulary.items() if i not in unused), key=lambda item: item[1])
    if highest >= rows:
        raise InputError(
            f"{source}: tokenizer and model do not match; the tokenizer has ids up to {highest} ({word!r}), the model "
            f"{rows} embeddings; after adding tokens, call resize_token_embeddings and save the model"
        )


def require_plain_text(encoder: SentenceTransformer, source: str) -> None:
    """Check that `encode` makes the tokens of a text with the tokenizer alone, as training does.

    Raises:
        InputError: It does not, because it applies a chat template, for example.
    """
    if isinstance(encoder[0], StaticEmbedding):
        return
    text = ["a"]
    if encoder.preprocess(text)["input_ids"].tolist() != encoder.tokenizer(text)["input_ids"]:
        raise InputError(
            f"{source}: `encode` adds tokens that its tokenizer does not add, such as those of a chat template; this "
            "is not supported in training"
        )


def position_limit(backbone: Any) -> int | None:
    """The number of tokens that a model has positions for; None if they are not limited by a table (T5, ModernBERT).

    >>> from transformers import RobertaConfig, RobertaModel
    >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    >>> position_limit(RobertaModel(RobertaConfig(**size, max_position_embeddings=514, pad_token_id=1)))
    512
    """
    limits = []
    for table in position_tables(backbone):
        padding = getattr(table, "padding_idx", None)  # RoBERTa and related models count from padding_idx + 1
        first = getattr(table, "offset", 0) if padding is None else padding + 1
        limits.append(len(table.weight) - first)
    stated = getattr(backbone.config, "max_position_embeddings", None)
    if limits and isinstance(stated, int) and stated > 0:
        limits.append(stated)
    if isinstance(stated := getattr(backbone.config, "max_seq_len", None), int):  # of MPT, whose positions are biases
        limits.append(stated)
    return min(limits, default=None)


def position_tables(backbone: Any) -> list[Any]:
    """The layers with learned position embeddings, such as BERT's; empty for relative and rotary positions."""
    children = (child for module in backbone.modules() for child in module.named_children())
    named = [(getattr(table, "weight", None), table) for name, table in children if name in POSITION_TABLES]
    return [table for weight, table in named if isinstance(weight, torch.Tensor) and weight.dim() == 2]


def parameters_without_gradient(model: Any, source: str) -> list[str]:
    """The names of the trainable parameters that the embeddings do not depend on, found by dry passes: forward as in
    evaluation with a text as long as the model allows, forward and backward as in training with a long and a short one.
    Weights, gradients, buffers, training mode and random state stay as they are.

    Args:
        model: A `TextContrastiveModel`.
        source: The argument and its value, which begin the message.

    Raises:
        InputError: A pass fails, or no parameter gets a gradient.
    """
    encoder, name = model.encoder, type(model.backbone).__name__
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    limit = encoder.max_seq_length or UNLIMITED
    limit = min(limit, LONGEST if limit < UNLIMITED else 512)
    size = sum(weight.numel() for name, weight in model.named_parameters() if "embed" not in name) or 1
    forward, backward = (int(min(limit, max(16, COST / (size * times)))) for times in (2, 12))
    word = some_word(encoder.tokenizer)
    used: set[str] = set()
    mode, length = "evaluation", forward
    try:
        with unchanged_state(model):
            with torch.no_grad():
                model.eval()(dry_features(encoder, [f"{word} " * limit], forward))
            mode = "training"
            for length in (backward, min(limit, SHORT)):
                with torch.enable_grad():
                    output = model.train()(dry_features(encoder, [word, f"{word} " * limit], length))
                    if trainable:
                        output.sum().backward()
            used = {name for name, weight in trainable.items() if weight.grad is not None}
    except (InputError, Warning):
        raise
    except Exception as error:
        raise InputError(
            f"{source}: {name} cannot be trained; a pass with a text of {length} tokens fails in {mode} mode: "
            f"{type(error).__name__}: {loading_error_message(error)}"
        ) from error
    if not used:
        raise InputError(f"{source}: no trainable parameter of {name} gets a gradient")
    return [name for name in trainable if name not in used and "expert" not in name]  # others get other tokens


def is_causal(encoder: Any) -> bool:
    """Whether the first token's embedding is the same after a change of the last token. False if the pass fails, which
    the dry pass reports."""
    try:
        features = dry_features(encoder, ["a a a a", "a a a a"], SHORT)
        last = features["input_ids"][1, -1]
        features["input_ids"][1, -1] = last - 1 if last > 0 else 1
        with unchanged_state(encoder), torch.no_grad():
            first = encoder.eval()[0](features)["token_embeddings"][:, 0]
    except Exception:
        return False
    return torch.equal(first[0], first[1])


def has_dropout(encoder: Any) -> bool:
    """Whether the embeddings of two equal texts differ in training mode, by more than rounding."""
    if isinstance(encoder[0], StaticEmbedding):
        return False
    with unchanged_state(encoder), torch.no_grad():
        features = dry_features(encoder, [f"{some_word(encoder.tokenizer)} " * SHORT] * 2, SHORT)
        first, second = encoder.train()(features)["sentence_embedding"]
    return bool((first - second).norm() > 1e-3 * first.norm())


def some_word(tokenizer: PreTrainedTokenizerBase) -> str:
    """A word that has tokens of its own. A tokenizer without unknown token (of DNA, for example) may drop any other."""
    special = set(tokenizer.all_special_ids)
    words = (str(tokenizer.decode([i])).strip() for i in sorted(tokenizer.get_vocab().values()) if i not in special)
    empty = tokenizer("")["input_ids"]
    return next((word for word in ("a", *islice(words, 100)) if word and tokenizer(word)["input_ids"] != empty), "a")


def dry_features(encoder: Any, texts: list[str], length: int) -> dict[str, Any]:
    """Texts, truncated to a number of tokens, as the encoder's input."""
    full, encoder.max_seq_length = encoder.max_seq_length, length
    try:
        features = encoder.preprocess(texts)
    finally:
        encoder.max_seq_length = full
    return {
        key: value.to(encoder.device) if isinstance(value, torch.Tensor) else value for key, value in features.items()
    }


@contextmanager
def unchanged_state(module: nn.Module) -> Iterator[None]:
    """Within this context, passes of a module skip no layers at random (layerdrop), and leave its gradients, training
    mode, buffers and the random state as they were."""
    modes = [(part, part.training, part.__dict__.get("layerdrop")) for part in module.modules()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    part: Any
    for parameter, _ in gradients:
        parameter.grad = None
    for part, _, layerdrop in modes:
        if layerdrop is not None:
            part.layerdrop = 0.0
    others = random.getstate(), np.random.get_state()  # BigBird seeds numpy's
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])
            for part, training, layerdrop in modes:
                part.training = training
                if layerdrop is not None:
                    part.layerdrop = layerdrop
            for parameter, gradient in gradients:
                parameter.grad = gradient
            now = dict(module.named_buffers())
            for name, buffer in buffers.items():
                if name in now and now[name].shape == buffer.shape:
                    now[name].copy_(buffer)
