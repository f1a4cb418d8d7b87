"""Text encoders: a SentenceTransformer, and the model that is trained, with its training-only head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from fmicl_text.errors import InputError
from fmicl_text.loading import NO_CODE, hub_commit, hub_name, refuse_links, resolve_model_path, translate_loading_errors
from fmicl_text.model import ContrastiveModel
from fmicl_text.text.columns import text_columns
from fmicl_text.text.data import TextData, as_text_dataset
from fmicl_text.text.dropout import replace_dropout
from fmicl_text.text.lora import (
    add_lora,
    base_weights_hash,
    is_adapter,
    merge_adapters,
    quantization_config,
    save_with_weights,
)
from fmicl_text.text.settings import encoder_settings
from fmicl_text.text.tokenization import training_rows

logger = logging.getLogger(__name__)
POOLINGS = Pooling.POOLING_MODES


def no_head(width: int) -> nn.Module:
    """No head: the identity."""
    return nn.Identity()


def simcse_head(width: int) -> nn.Module:
    """SimCSE's head: a dense layer of the same width, initialized like BERT's layers, and tanh."""
    dense = nn.Linear(width, width)
    nn.init.normal_(dense.weight, std=0.02)
    nn.init.zeros_(dense.bias)
    return nn.Sequential(dense, nn.Tanh())


HEADS = {"none": no_head, "simcse": simcse_head}


class TextContrastiveModel(ContrastiveModel):
    """A SentenceTransformer plus a training-only head.

    Args:
        encoder: The part that is evaluated, saved and exported. Its dropout layers are replaced with
            `dropout.CheapDropout`.
        head: Name of a head in `HEADS`. Stored in checkpoints, never in the exported encoder.
    """

    modality, unit = "text", "tokens"

    def __init__(self, encoder: SentenceTransformer, head: str = "none") -> None:
        replace_dropout(encoder)
        width = int(encoder.get_embedding_dimension() or 0)
        super().__init__(encoder, HEADS[head](width), width)

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """Embeddings [B, D] of tokenized texts {input_ids, attention_mask, ...} [B, T]."""
        return self.encoder(features)["sentence_embedding"]

    def count(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["attention_mask"].sum()  # without padding

    def prepare_data(self, train_dataset: Any) -> tuple[Any, Any]:
        """The tokens of texts, pairs or triplets, and their collator. Longer texts are truncated to the encoder's
        `max_seq_length`; its default prompt, if any, is prepended. A stream is repeated without end."""
        dataset = as_text_dataset(train_dataset)
        length = self.encoder.max_seq_length or self.encoder.tokenizer.model_max_length
        data = TextData(dataset, text_columns(dataset), None, "train_dataset")
        prompts = training_prompts(self.encoder, len(data.columns))
        rows, collator, data = training_rows(data, self.encoder.tokenizer, length, prompts)
        if data.num_skipped:
            logger.warning("%s: skipped %d rows with a text that has no tokens", data.source, data.num_skipped)
        return rows, collator

    @property
    def backbone(self) -> Any:
        return self.encoder[0].model

    def describe(self) -> dict[str, Any]:
        return {
            "modality": self.modality,
            "base_model": hub_name(self.backbone.name_or_path),
            "base_revision": hub_commit(self.backbone),
            "pooling": next(module.pooling_mode for module in self.encoder if isinstance(module, Pooling)),
            "size": self.encoder.max_seq_length,
            **encoder_settings(self.encoder),
        }

    def describe_training(self) -> dict[str, Any]:
        return super().describe_training() | {"adapters_over": base_weights_hash(self.backbone)}

    def is_exported(self, name: str) -> bool:
        return super().is_exported(name) and not is_adapter(name)

    @property
    def loads_exported(self) -> bool:
        """False with adapters: they are merged into the exported weights. Training does not change the base weights."""
        return not any(map(is_adapter, self.state_dict()))

    def save_encoder(self, folder: str, state: dict[str, Tensor]) -> None:
        """Write the encoder as a SentenceTransformer folder, with the weights in `state`, a state dict of this module.
        Adapters are merged into the base weights."""
        refuse_links(folder)
        backbone, prefix = self.backbone, "encoder.0.model."
        weights = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
        with save_with_weights(backbone, merge_adapters(backbone, weights)):
            self.encoder.save(folder, create_model_card=False)
        # transformers 5 writes a class name that transformers 4 does not know; both accept the old name
        config = Path(folder) / "tokenizer_config.json"
        if config.is_file():
            content = config.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
            config.write_text(content, encoding="utf-8")

    def open_encoder(self, folder: str) -> nn.Module:
        return build_text_encoder(folder, trust_remote_code=self.encoder.trust_remote_code)


def build_text_encoder(
    model_name_or_path: str,
    revision: str | None = None,
    pooling: str | None = None,
    dropout: float | None = None,
    lora_rank: int | None = None,
    load_in: str | None = None,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """Load a SentenceTransformer in float32, regardless of the dtype of its files, without BERT's unused pooler.

    Args:
        model_name_or_path: Folder or Hub name of a sentence-transformers model or of any Hugging Face text encoder.
        revision: Branch, tag or commit on the Hub.
        pooling: One of `POOLINGS`. None keeps the model's own pooling; a model that does not specify one gets cls, as
            in the paper.
        dropout: Sets every dropout probability in the model's config, in [0, 1). None keeps them.
        lora_rank: Train only LoRA adapters of this rank, >= 1. None trains all weights.
        load_in: Quantize the frozen weights to `4bit` or `8bit`; requires `lora_rank`.
        trust_remote_code: Run custom code that comes with the model. Otherwise such a model raises an error.

    Raises:
        InputError: An argument is invalid, a required package is not installed, or the model does not exist, is not
            available offline, is corrupted, or requires custom code.
    """
    model_name_or_path = resolve_model_path(model_name_or_path)
    source = f"model_name_or_path={model_name_or_path}"
    if load_in is not None and lora_rank is None:
        raise InputError(f"load_in={load_in} requires lora_rank: quantized weights cannot be trained directly")
    quantization = {} if load_in is None else {"quantization_config": quantization_config(load_in)}
    with translate_loading_errors(source):
        encoder = SentenceTransformer(
            model_name_or_path,
            revision=revision,
            device="cuda" if quantization and torch.cuda.is_available() else "cpu",
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": torch.float32, **NO_CODE, **quantization},
            config_kwargs=dropout_settings(model_name_or_path, revision, dropout, trust_remote_code),
        )
    require_tokenizer(encoder, source)
    if not isinstance(encoder[0], Transformer) or not any(isinstance(module, Pooling) for module in encoder):
        raise InputError(f"{source} is not a transformer followed by pooling")
    backbone: Any = encoder[0].model
    if isinstance(getattr(backbone, "pooler", None), nn.Module):
        backbone.pooler = None  # its parameters get no gradient, and DDP raises an error for such parameters
    specifies_pooling = bool(encoder.module_kwargs)  # one entry per module in modules.json
    if pooling or not specifies_pooling:
        set_pooling(encoder, pooling or "cls")
    if lora_rank is not None:
        add_lora(encoder, lora_rank)
    return encoder


def require_tokenizer(encoder: SentenceTransformer, source: str) -> None:
    """Check that the tokenizer has a vocabulary that the model has embeddings for. A folder without tokenizer files
    loads without an error, and all sentences of the same length then get the same embedding.

    Args:
        source: The argument and its value, which begin the message.

    Raises:
        InputError: The tokenizer has only special tokens, or has ids that the model has no embedding for.
    """
    tokenizer = encoder.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{source}: its tokenizer files are missing, so every word would be unknown")
    backbone: Any = encoder[0].model
    size, added = backbone.get_input_embeddings().num_embeddings, tokenizer.get_added_vocab()
    highest = max(number for word, number in tokenizer.get_vocab().items() if word not in added)
    if highest >= size:
        raise InputError(
            f"{source}: tokenizer and model do not match; the tokenizer has ids up to {highest}, the model {size} "
            "embeddings"
        )


def set_pooling(encoder: SentenceTransformer, mode: str) -> None:
    """Replace the pooling of an encoder with one of `POOLINGS`."""
    (index,) = [i for i, module in enumerate(encoder) if isinstance(module, Pooling)]
    encoder[index] = Pooling(encoder[index].embedding_dimension, mode)


def set_prompts(encoder: SentenceTransformer, prompts: Sequence[str]) -> None:
    """Store the prompts of a training run in the encoder, for `encode`: one as its default prompt; two, of queries and
    of documents, for `encode_query` and `encode_document`.

    Raises:
        InputError: More than two prompts.
    """
    if len(prompts) > 2:
        raise InputError(f"prompts takes one, or one for queries and one for documents, got {len(prompts)}")
    names = ("default",) if len(prompts) == 1 else ("query", "document")
    encoder.prompts = {**encoder.prompts, **dict(zip(names, prompts, strict=True))}
    encoder.default_prompt_name = "default" if len(prompts) == 1 else None


def training_prompts(
    encoder: SentenceTransformer, num_columns: int, prompts: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The prompts of the text columns, as `encode` prepends them; empty for none.

    Args:
        encoder: Its default prompt, if any, is used for all columns if `prompts` is None.
        num_columns: Number of text columns.
        prompts: One for all columns, or one for the first column and one for the others.

    Raises:
        InputError: There are more prompts than columns, or the pooling excludes the prompt.
    """
    if prompts is None:
        default = encoder.default_prompt_name
        prompts = [] if default is None else [encoder.prompts[default] or ""]
    if len(prompts) > num_columns:
        raise InputError(f"prompts: got {len(prompts)} for {num_columns} text column")
    if not any(prompts):
        return ()
    if any(isinstance(module, Pooling) and not module.include_prompt for module in encoder):
        raise InputError("prompts are not supported with a pooling that excludes them (include_prompt=False)")
    return (prompts[0], *[prompts[-1]] * (num_columns - 1))


def dropout_settings(
    model_name_or_path: str, revision: str | None, dropout: float | None, trust_remote_code: bool = False
) -> dict[str, float]:
    """Every dropout probability in the model's config (hidden_dropout_prob in BERT, mlp_dropout in ModernBERT,
    dropout_rate in T5, ...), set to `dropout`; empty for None.

    Raises:
        InputError: dropout outside [0, 1).
    """
    if dropout is None:
        return {}
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be in [0, 1), got {dropout}")
    config = AutoConfig.from_pretrained(model_name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    return {
        key: dropout for key, value in config.to_dict().items() if "dropout" in key and isinstance(value, int | float)
    }
