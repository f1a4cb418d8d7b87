"""Text encoders: a SentenceTransformer, and the model that is trained, with its training-only head."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from fmicl_text.errors import InputError
from fmicl_text.loading import NO_CODE, hub_commit, hub_name, refuse_links, resolve_model_path, translate_loading_errors
from fmicl_text.model import ContrastiveModel, split_rows
from fmicl_text.text.checks import (
    UNLIMITED,
    is_causal,
    parameters_without_gradient,
    prepare_tokenizer,
    require_plain_text,
    require_transformer,
)
from fmicl_text.text.columns import text_columns
from fmicl_text.text.data import TextData, as_text_dataset
from fmicl_text.text.dropout import replace_dropout
from fmicl_text.text.export import write_older_spelling
from fmicl_text.text.layers import train_last_layers
from fmicl_text.text.lora import (
    adapter_base,
    add_lora,
    base_weights_hash,
    is_adapter,
    merge_adapters,
    open_adapters,
    quantization_config,
    save_with_weights,
)
from fmicl_text.text.padding import embed_in_groups, pass_cost
from fmicl_text.text.settings import applied_prompt, encoder_settings
from fmicl_text.text.static import is_static, static_features, tokenizer_of
from fmicl_text.text.tokenization import training_rows
from fmicl_text.text.views import TextViews, choose_views

logger = logging.getLogger(__name__)

POOLINGS = Pooling.POOLING_MODES
MULTIPLE = 16  # of tokens, to which `TextContrastiveModel.pad` pads


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

    A dry pass of two texts shows whether the model works. Parameters that the embeddings do not depend on, such as
    BERT's pooler or Longformer's global attention, are frozen: DDP raises an error for parameters without gradient.

    Args:
        encoder: The part that is evaluated, saved and exported. Its dropout layers are replaced with
            `dropout.CheapDropout`, and its tokenizer is completed: see `checks.prepare_tokenizer`.
        head: Name of a head in `HEADS`. Stored in checkpoints, never in the exported encoder.

    Raises:
        InputError: The encoder is neither a transformer followed by pooling nor a `StaticEmbedding`, its tokenizer does
            not match, or the dry pass fails.
    """

    modality, unit = "text", "tokens"

    def __init__(self, encoder: SentenceTransformer, head: str = "none") -> None:
        first: Any = encoder[0]
        source = f"model_name_or_path={getattr(getattr(first, 'model', None), 'name_or_path', None) or 'encoder'}"
        require_transformer(encoder, source)
        prepare_tokenizer(encoder, source)
        require_plain_text(encoder, source)
        replace_dropout(encoder)
        with encoder.truncate_embeddings(None):  # truncate_dim applies to encode only
            width = int(encoder.get_embedding_dimension() or 0)
        super().__init__(encoder, HEADS[head](width), width)
        self.pass_cost = pass_cost(encoder)
        unused = [] if is_static(encoder) else parameters_without_gradient(self, source)
        for name in unused:
            self.get_parameter(name).requires_grad_(False)
        if named := [name.removeprefix("encoder.0.model.") for name in unused if ".pooler." not in name]:
            logger.warning("%s: frozen, because the embeddings do not depend on them: %s", source, shortened(named))

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """Embeddings [B, D] of tokenized texts {input_ids, attention_mask, ...} [B, T]."""
        if is_static(self.encoder):
            return self.encoder(static_features(features))["sentence_embedding"]
        if not self.skips_padding or features["input_ids"].device.type != "cpu":
            return self.encoder(features)["sentence_embedding"]
        return embed_in_groups(lambda part: self.encoder(part)["sentence_embedding"], features, self.pass_cost)

    def count(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["attention_mask"].sum()  # without padding

    def make_views(self, views: Any, inputs: dict[str, Tensor], generator: Any) -> dict[str, Tensor]:
        text_ids = inputs.pop("text_ids")
        if text_ids.shape[1] > 1:
            raise InputError(f"views apply to one text column, got {text_ids.shape[1]}, which are views already")
        return {**views(inputs, generator), "text_ids": text_ids}

    def split(self, inputs: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
        """As in the base class; each part is padded to its own longest text, unless the batch has padding that all its
        texts have in common, as if padded to a fixed length."""
        parts = split_rows(inputs, size)
        fixed = not inputs["attention_mask"].flatten(0, 1).any(0).all()
        return parts if fixed else [without_padding(part) for part in parts]

    def join(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        longest = max(part["attention_mask"].shape[-1] for part in parts)
        return super().join(parts if len(parts) == 1 else [self.pad_to(part, longest) for part in parts])

    def pad(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tokens [B, V, T] with T a multiple of 16, unless the model's maximum is less."""
        length = inputs["attention_mask"].shape[-1]
        most = max(tokenizer_of(self.encoder).model_max_length, length)
        return self.pad_to(inputs, min(length + -length % MULTIPLE, most))

    def pad_to(self, inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        """A batch with tokens [B, V, length]."""
        tokenizer, missing = tokenizer_of(self.encoder), length - inputs["attention_mask"].shape[-1]
        sides = (missing, 0) if tokenizer.padding_side == "left" else (0, missing)
        values = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        return {
            name: pad(tokens, sides, value=values.get(name, 0)) if is_tokens(tokens) else tokens
            for name, tokens in inputs.items()
        }

    def prepare_data(self, train_dataset: Any, views: Any = None) -> tuple[Any, Any]:
        """The tokens of texts, pairs or triplets, and their collator. Longer texts are truncated to the encoder's
        `max_seq_length`; its default prompt, if any, is prepended. A stream is repeated without end. Without `views`,
        `choose_views` chooses."""
        dataset = as_text_dataset(train_dataset)
        length = int(min(self.encoder.max_seq_length or UNLIMITED, UNLIMITED))
        data = TextData(dataset, text_columns(dataset), None, "train_dataset")
        prompts = training_prompts(self.encoder, len(data.columns))
        if views is None:
            views, reason = choose_views(self.encoder, data, length, prompts)
            if views is not None:
                logger.warning("views of %s: %s", data.source, reason)
        elif len(data.columns) > 1:
            raise InputError(f"views apply to one text column, got {' '.join(data.columns)}")
        elif isinstance(views, TextViews) and views.prompt != (prompts[0] if prompts else ""):
            raise InputError(f"views are made for the prompt {views.prompt!r}; the encoder has {list(prompts)}")
        of_texts = views if isinstance(views, TextViews) else None
        rows, collator, data = training_rows(data, tokenizer_of(self.encoder), length, prompts, of_texts)
        if data.num_skipped:
            logger.warning("%s: skipped %d rows with a text that has no tokens", data.source, data.num_skipped)
        return rows, collator

    @property
    def backbone(self) -> Any:
        return self.encoder[0] if is_static(self.encoder) else self.encoder[0].model

    def describe(self) -> dict[str, Any]:
        return {
            "modality": self.modality,
            "base_model": hub_name(getattr(self.backbone, "name_or_path", "")),
            "base_revision": hub_commit(self.backbone),
            "pooling": pooling_of(self.encoder),
            "size": None if is_static(self.encoder) else self.encoder.max_seq_length,
            **encoder_settings(self.encoder),
        }

    def describe_training(self) -> dict[str, Any]:
        if is_static(self.encoder):
            return self.describe()
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
        if is_static(self.encoder):
            encoder = copy.deepcopy(self.encoder)
            encoder.load_state_dict({name: state[f"encoder.{name}"] for name in encoder.state_dict()})
            encoder.save(folder, create_model_card=False)
            return
        backbone, prefix = self.backbone, "encoder.0.model."
        weights = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
        with save_with_weights(backbone, merge_adapters(backbone, weights)):
            self.encoder.save(folder, create_model_card=False)
        write_older_spelling(folder, self.encoder.tokenizer)

    def open_encoder(self, folder: str) -> nn.Module:
        return build_text_encoder(folder, trust_remote_code=self.encoder.trust_remote_code)


def is_tokens(values: Tensor) -> bool:
    """Whether a tensor of a batch has one value per token, [B, V, T]."""
    return values.ndim == 3


def without_padding(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch without the padding that all its texts have in common."""
    used = inputs["attention_mask"].flatten(0, 1).any(0).nonzero()[:, 0]
    if not len(used):
        return inputs
    kept = slice(int(used[0]), int(used[-1]) + 1)
    return {name: values[..., kept] if is_tokens(values) else values for name, values in inputs.items()}


def shortened(names: list[str], most: int = 3) -> str:
    """The first names of a list, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} others" if len(names) > most else "")


def build_text_encoder(
    model_name_or_path: str,
    revision: str | None = None,
    pooling: str | None = None,
    dropout: float | None = None,
    lora_rank: int | None = None,
    load_in: str | None = None,
    trust_remote_code: bool = False,
    trained_layers: int | None = None,
) -> SentenceTransformer:
    """Load a SentenceTransformer in float32, regardless of the dtype of its files.

    Args:
        model_name_or_path: Folder or Hub name of a sentence-transformers model or of any Hugging Face text encoder.
        revision: Branch, tag or commit on the Hub.
        pooling: One of `POOLINGS`. None keeps the model's own pooling; for a model that does not specify one, see
            `assumed_pooling`.
        dropout: Sets every dropout probability in the model's config, in [0, 1). None keeps them.
        lora_rank: Train only LoRA adapters of this rank, >= 1; adapters that the model comes with are merged into its
            weights first. None trains all weights, or only the adapters that the model comes with.
        load_in: Quantize the frozen weights to `4bit` or `8bit`; requires `lora_rank`.
        trust_remote_code: Run custom code that comes with the model. Otherwise such a model raises an error.
        trained_layers: Train only the last layers, this many, >= 1; see `layers.train_last_layers`. Not with
            `lora_rank`.

    Raises:
        InputError: An argument is invalid, a required package is not installed, or the model does not exist, is not
            available offline, is corrupted, requires custom code, or is neither a transformer followed by pooling nor
            a `StaticEmbedding`.
    """
    model_name_or_path = resolve_model_path(model_name_or_path)
    source = f"model_name_or_path={model_name_or_path}"
    if load_in is not None and lora_rank is None:
        raise InputError(f"load_in={load_in} requires lora_rank: quantized weights cannot be trained directly")
    if trained_layers is not None and lora_rank is not None:
        raise InputError(f"trained_layers={trained_layers} and lora_rank={lora_rank} are mutually exclusive")
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
    require_transformer(encoder, source)
    prepare_tokenizer(encoder, source)
    if is_static(encoder):
        settings = {"pooling": pooling, "lora_rank": lora_rank, "trained_layers": trained_layers}
        if given := next((name for name, value in settings.items() if value is not None), None):
            raise InputError(f"{given} does not apply to {source}, a StaticEmbedding")
        static: Any = encoder[0]
        static.name_or_path = model_name_or_path
        return encoder.float()
    if pooling or not specifies_pooling(encoder):
        set_pooling(encoder, pooling or assumed_pooling(encoder))
    open_adapters(encoder[0].model, source, merge=lora_rank is not None)
    if lora_rank is not None:
        add_lora(encoder, lora_rank)
    if trained_layers is not None:
        train_last_layers(encoder, trained_layers)
    return encoder


def specifies_pooling(encoder: SentenceTransformer) -> bool:
    """Whether the files of the model specify its pooling, that is, include a modules.json."""
    return bool(encoder.module_kwargs)  # one entry per module in modules.json


def assumed_pooling(encoder: SentenceTransformer) -> str:
    """The pooling of a model that does not specify one, in training and evaluation: cls, as in the paper, or lasttoken
    for decoders, whose first token does not depend on the others, and for models with their CLS token at the end."""
    backbone: Any = encoder.transformers_model
    config = type(backbone.config)
    if config in MODEL_FOR_MASKED_LM_MAPPING:
        return "cls"
    return "lasttoken" if config in MODEL_FOR_CAUSAL_LM_MAPPING or is_causal(encoder) else "cls"


def pooling_of(encoder: SentenceTransformer) -> Any:
    """The pooling: cls, mean, ..., a tuple if several are concatenated, or None without a pooling layer."""
    return next((module.pooling_mode for module in encoder if isinstance(module, Pooling)), None)


def pooling_source(encoder: SentenceTransformer, pooling: str | None) -> str:
    """The pooling of an encoder and its origin, for a printed line.

    Args:
        encoder: The encoder.
        pooling: The argument with which it was loaded.
    """
    origin = "argument" if pooling else "the model's own" if specifies_pooling(encoder) else "assumed"
    return f"{pooling_of(encoder)} ({origin})"


def set_pooling(encoder: SentenceTransformer, mode: str) -> None:
    """Replace the pooling of an encoder with one of `POOLINGS`.

    Raises:
        InputError: The next layer takes embeddings of another width.
    """
    index, old = next((i, module) for i, module in enumerate(encoder) if isinstance(module, Pooling))
    pooling = Pooling(old.embedding_dimension, mode, old.include_prompt)
    for module in list(encoder)[index + 1 :]:  # in_features of Dense, dimension of LayerNorm
        width = getattr(module, "in_features", None) or getattr(module, "dimension", None)
        if width and width != pooling.pooling_output_dimension:
            raise InputError(
                f"pooling={mode} gives {pooling.pooling_output_dimension} dimensions, but the model's "
                f"{type(module).__name__} takes {width}: keep the model's own pooling, {old.pooling_mode}"
            )
        if width:
            break
    encoder[index] = pooling


def set_prompts(encoder: SentenceTransformer, prompts: Sequence[str]) -> None:
    """Store the prompts of a training run in the encoder: one for `encode`, `encode_query` and `encode_document`; two,
    of queries and of documents, for `encode_query` and `encode_document`.

    Raises:
        InputError: More than two prompts.
    """
    if len(prompts) > 2:
        raise InputError(f"prompts takes one, or one for queries and one for documents, got {len(prompts)}")
    stored = {"query": prompts[0], "document": prompts[-1]} | ({"default": prompts[0]} if len(prompts) == 1 else {})
    encoder.prompts = {**encoder.prompts, **stored}
    encoder.default_prompt_name = "default" if len(prompts) == 1 else None


def own_prompts(encoder: SentenceTransformer, search: bool) -> list[str]:
    """The prompts that an encoder comes with: its default prompt; or, for search, those of `encode_query` and
    `encode_document` if it has one of them. Stored, where it has none, for `encode_query` and `encode_document`."""
    documents = ("document", "passage", "corpus")  # in sentence-transformers' order
    both = [encoder.prompts.get("query") or "", next(filter(None, map(encoder.prompts.get, documents)), "")]
    default = applied_prompt(encoder)
    if search and any(both):
        encoder.prompts = {**encoder.prompts, "query": both[0], "document": both[1]}
        return both
    if default is not None:
        filled = {name: encoder.prompts.get(name) or default for name in ("query", "document")}
        encoder.prompts = {**encoder.prompts, **filled}
        return [default]
    if any(both):
        logger.warning("the model's prompts %s are not used in training: pass prompts to train with them", both)
    return []


def training_prompts(
    encoder: SentenceTransformer, num_columns: int, prompts: Sequence[str] | None = None, search: bool = False
) -> tuple[str, ...]:
    """The prompts of the text columns, as `encode` prepends them; empty for none.

    Args:
        encoder: Its own prompts are used if `prompts` is None; see `own_prompts`.
        num_columns: Number of text columns.
        prompts: One for all columns, or one for the first column and one for the others.
        search: Whether `encode_query` and `encode_document` are evaluated.

    Raises:
        InputError: There are more prompts than columns, or the pooling excludes the prompt.
    """
    if prompts is None:
        prompts = own_prompts(encoder, search and num_columns > 1)
    if len(prompts) > num_columns:
        raise InputError(f"prompts: got {len(prompts)} for {num_columns} text column")
    if not any(prompts):
        return ()
    if any(isinstance(module, Pooling) and not module.include_prompt for module in encoder):
        raise InputError(
            f"prompts={' '.join(prompts)!r} cannot be trained with a pooling that excludes them "
            "(include_prompt=False); prompts=none trains without"
        )
    return (prompts[0], *[prompts[-1]] * (num_columns - 1))


def dropout_settings(
    model_name_or_path: str, revision: str | None, dropout: float | None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Every dropout probability in the model's config (hidden_dropout_prob in BERT, resid_pdrop in GPT-2, dropout_rate
    in T5, ...) and in the configs inside it, set to `dropout`; empty for None. Layer dropout (layerdrop) is not
    changed: it skips entire layers.

    Raises:
        InputError: dropout outside [0, 1), or above 0 for a model whose config has no dropout probability.
    """
    if dropout is None:
        return {}
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be in [0, 1), got {dropout}")
    name, revision = adapter_base(model_name_or_path, revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "Unrecognized model" not in str(error):
            raise
        raise InputError(
            f"dropout={dropout} does not apply to model_name_or_path={model_name_or_path}, which has no config of "
            "transformers (a StaticEmbedding, for example)"
        ) from error
    settings = changed_dropout(config.to_dict(), dropout, config)
    if dropout and not settings:
        raise InputError(
            f"dropout={dropout}: the config of model_name_or_path={model_name_or_path} ({config.model_type}) has no "
            "dropout probability; train on pairs of texts, or with other views of a text (crops, repeat, delete)"
        )
    return settings


def changed_dropout(config: dict[str, Any], dropout: float, holder: Any = None) -> dict[str, Any]:
    """The entries of a config with all dropout probabilities in them changed.

    Args:
        config: The entries.
        dropout: The probability.
        holder: The config object, which is changed; None to accept any value. Entries of another type are kept: MPT
            declares attn_pdrop as an integer.

    >>> changed_dropout({"attn_pdrop": 0, "token_dropout": True, "layerdrop": 0.1, "inner": {"n": 2, "pdrop": 0}}, 0.3)
    {'attn_pdrop': 0.3, 'inner': {'n': 2, 'pdrop': 0.3}}
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            if inner := changed_dropout(value, dropout, getattr(holder, key, None)):
                changed[key] = value | inner
        elif re.search("dropout|pdrop", str(key)) and isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(StrictDataclassFieldValidationError):
                if isinstance(holder, PreTrainedConfig):
                    setattr(holder, key, dropout)
                changed[key] = dropout
    return changed
