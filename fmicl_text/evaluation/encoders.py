"""Load sentence encoders for evaluation, and describe them in results."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from fmicl_text.errors import InputError
from fmicl_text.evaluation.report import float32_products
from fmicl_text.files import read_json
from fmicl_text.loading import NO_CODE, check_model_folder, hub_commit, translate_loading_errors
from fmicl_text.text.checks import prepare_tokenizer, require_text
from fmicl_text.text.collator import check_max_seq_length
from fmicl_text.text.model import assumed_pooling, pooling_of, set_pooling, specifies_pooling
from fmicl_text.text.settings import encoder_settings

logger = logging.getLogger(__name__)


def open_encoder(
    model: str,
    pooling: str | None = None,
    revision: str | None = None,
    max_seq_length: int | None = None,
    strict: bool = False,
) -> SentenceTransformer:
    """Load an encoder in float32, on the GPU if there is one. Logs a warning if its pooling is assumed or overridden.

    Args:
        model: Folder or Hub ID.
        pooling: One of `text.model.POOLINGS`. None uses the pooling that the model specifies, else
            `text.model.assumed_pooling`, as training does. (sentence-transformers and MTEB assume mean.)
        revision: Branch, tag or commit on the Hub.
        max_seq_length: Maximum number of tokens. None uses the model's.
        strict: Raise an error instead of assuming a pooling.

    Raises:
        InputError: The model cannot be loaded, requires custom code, does not encode text, has no tokenizer, has no
            pooling layer to replace, or, if `strict`, does not specify its pooling; or `max_seq_length` exceeds the
            model's maximum.
    """
    folder = os.path.expanduser(model)
    if model.startswith((".", "~", "/")) and not os.path.isdir(folder):
        raise InputError(f"model={model}: no such folder")
    check_model_folder(folder, f"model={model}")
    with translate_loading_errors(f"model={model}"):
        encoder = SentenceTransformer(
            folder if os.path.isdir(folder) else model,
            revision=revision,
            device="cuda" if torch.cuda.is_available() else "cpu",
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32, **NO_CODE},
        )
    require_text(encoder, f"model={model}")
    prepare_tokenizer(encoder, f"model={model}")
    own = pooling_of(encoder)
    if pooling and own is None:
        raise InputError(f"pooling={pooling}: {model} has no pooling layer")
    if specifies_pooling(encoder) or own is None:
        if pooling and pooling != own:
            logger.warning("%s: using %s pooling instead of the model's own, %s", model, pooling, own)
            set_pooling(encoder, pooling)
    elif pooling:
        set_pooling(encoder, pooling)
    elif strict:
        raise InputError(
            f"model={model} does not specify its pooling: pass one, such as pooling=mean (required by strict=True)"
        )
    else:
        set_pooling(encoder, assumed_pooling(encoder))
        logger.warning(
            "%s does not specify its pooling: assuming %s, as in training; pass pooling to override",
            model,
            pooling_of(encoder),
        )
    if max_seq_length is not None:
        check_max_seq_length(encoder.tokenizer, max_seq_length)
        encoder.max_seq_length = max_seq_length
    return encoder


def encoder_metadata(model: str, encoder: SentenceTransformer, pooling: str | None = None) -> dict[str, Any]:
    """Description of an encoder for results.

    Args:
        model: Folder or Hub ID, as passed to `open_encoder`.
        encoder: The encoder that it returned.
        pooling: The pooling passed to it.

    Returns:
        model, commit (on the Hub), pooling, pooling_from ("the model", "argument" or "assumed"), head (layers after
        pooling), max_seq_length, precision, float32_products, device, and the items of `encoder_settings` and
        `training_metadata`.
    """
    settings = encoder_settings(encoder)
    modules = settings.pop("modules")
    metadata = {
        "model": model,
        "commit": hub_commit(encoder.transformers_model),
        "pooling": pooling_of(encoder),
        "pooling_from": "argument" if pooling else "the model" if specifies_pooling(encoder) else "assumed",
        "head": modules[modules.index("Pooling") + 1 :] if "Pooling" in modules else [],
        "max_seq_length": encoder.max_seq_length,
        "precision": str(encoder.dtype).removeprefix("torch."),
        "float32_products": float32_products(encoder.device.type),
        "device": encoder.device.type,
    }
    return metadata | settings | training_metadata(Path(model).expanduser())


# What is reported of the run that trained an encoder, besides its objective.
RUN_KEYS = ("seed", "hyperparameters", "precision", "processes", "data", "best_step", "scored_on")
RUN_SETTINGS = (
    *("model_name_or_path", "train_file", "dataset_name", "pooling", "head", "max_seq_length", "learning_rate"),
    *("num_train_epochs", "max_steps", "gradient_accumulation_steps", "per_device_train_batch_size", "lora_rank"),
)


def training_metadata(folder: Path) -> dict[str, Any]:
    """{trained: {objective, head, base_model, ...}} from the results.json of a recipe's output folder; {} for other
    folders."""
    try:
        run = read_json(folder / "results.json")
        trained = {"objective": run["objective"], "head": run["settings"].get("head")}
        trained |= {name: run["encoder"].get(name) for name in ("base_model", "base_revision")}
        trained |= {name: run[name] for name in RUN_KEYS if name in run}
        settings = {name: run["settings"][name] for name in RUN_SETTINGS if name in run["settings"]}
        return {"trained": trained | {"settings": settings}}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # not a folder, or a results.json of another program
