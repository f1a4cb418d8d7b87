"""Sentence encoders as they are scored: opened in float32, and what a result must say about them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from fmicl_text.errors import InputError
from fmicl_text.loading import NO_CODE, hub_commit, translate_loading_errors
from fmicl_text.text.collator import check_max_seq_length
from fmicl_text.text.model import require_tokenizer, set_pooling

logger = logging.getLogger(__name__)


def open_encoder(
    name: str,
    pooling: str | None = None,
    revision: str | None = None,
    max_seq_length: int | None = None,
    strict: bool = False,
) -> SentenceTransformer:
    """The encoder in float32, on the GPU if there is one. Where it says nothing of its pooling, or the caller overrules
    it, a line in the log tells.

    Args:
        name: Folder or Hub name.
        pooling: One of `model.POOLINGS`; None takes what the model says, or mean where it says nothing, as
            sentence-transformers and MTEB do.
        revision: Branch, tag or commit on the Hub.
        max_seq_length: In tokens; None takes what the model says.
        strict: Refuse a model that says nothing of its pooling instead of assuming one.

    Raises:
        InputError: It cannot be had, needs code of its own, has no tokenizer, no pooling layer to replace or, when
            strict, no word on it; or max_seq_length is beyond what it can read.
    """
    folder = Path(name).expanduser()
    if name.startswith((".", "~", "/")) and not folder.is_dir():
        raise InputError(f"--model {name}: no such folder")
    with translate_loading_errors(f"--model {name}"):
        encoder = SentenceTransformer(
            str(folder) if folder.is_dir() else name,
            revision=revision,
            device="cuda" if torch.cuda.is_available() else "cpu",
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32, **NO_CODE},
        )
    require_tokenizer(encoder, f"--model {name}")
    own = pooling_of(encoder)
    if pooling and own is None:
        raise InputError(f"--pooling {pooling}: {name} has no pooling layer")
    if not (says_pooling(encoder) or pooling):
        if strict:
            raise InputError(f"--model {name}: its files say nothing of pooling; --pooling must (--strict)")
        logger.warning("%s: says nothing of pooling, %s is assumed (--pooling to choose)", name, own)
    if pooling and pooling != own:
        if says_pooling(encoder):
            logger.warning("%s: %s pooling instead of its own, %s", name, pooling, own)
        set_pooling(encoder, pooling)
    if max_seq_length is not None:
        check_max_seq_length(encoder.tokenizer, max_seq_length)
        encoder.max_seq_length = max_seq_length
    return encoder


def pooling_of(encoder: SentenceTransformer) -> Any:
    """cls, mean, ... (a tuple of these where they are joined); None without a pooling layer."""
    return next((module.pooling_mode for module in encoder if isinstance(module, Pooling)), None)


def says_pooling(encoder: SentenceTransformer) -> bool:
    """Whether the model's own files say how it pools: it has a modules.json."""
    return bool(encoder.module_kwargs)  # one entry per line of modules.json


def encoder_facts(name: str, encoder: SentenceTransformer, pooling: str | None = None) -> dict[str, Any]:
    """What a result says about an encoder that `open_encoder(name, pooling)` gave.

    Returns:
        model, commit (on the Hub), pooling and who says so, head (names of the layers after pooling that are part of
        the encoder), max_seq_length, precision, and, for a folder that a recipe left, trained: objective, seed, and
        the head that only training saw.
    """
    modules = [type(module).__name__ for module in encoder]
    after_pooling = modules[modules.index("Pooling") + 1 :] if "Pooling" in modules else []
    facts = {
        "model": name,
        "commit": hub_commit(encoder.transformers_model),
        "pooling": pooling_of(encoder),
        "pooling_from": "--pooling" if pooling else "the model" if says_pooling(encoder) else "assumed",
        "head": after_pooling,
        "max_seq_length": encoder.max_seq_length,
        "precision": str(encoder.dtype).removeprefix("torch."),
    }
    return facts | training_facts(Path(name).expanduser())


def training_facts(folder: Path) -> dict[str, Any]:
    """{trained: objective, seed, head} of the run whose results.json lies in a folder; {} where none does."""
    try:
        run = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return {"trained": {key: run[key] for key in ("objective", "seed")} | {"head": run["settings"].get("head")}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no folder, or a file of that name that is not a recipe's
