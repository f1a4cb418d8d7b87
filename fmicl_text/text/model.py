"""What is wrapped and trained: a SentenceTransformer and a head that only training sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from fmicl_text.errors import InputError
from fmicl_text.loading import NO_CODE, folder_or_name, hub_commit, hub_name, refuse_links, translate_loading_errors
from fmicl_text.model import ContrastiveModel
from fmicl_text.text.dropout import cheapen_dropout
from fmicl_text.text.lora import add_lora, base_weights, is_adapter, merged, plain_saving, quantization

POOLINGS = Pooling.POOLING_MODES


def no_head(width: int) -> nn.Module:
    """The embeddings as they are."""
    return nn.Identity()


def simcse_head(width: int) -> nn.Module:
    """SimCSE's head: a dense layer of the same width and tanh, initialized as BERT's own layers."""
    dense = nn.Linear(width, width)
    nn.init.normal_(dense.weight, std=0.02)
    nn.init.zeros_(dense.bias)
    return nn.Sequential(dense, nn.Tanh())


HEADS = {"none": no_head, "simcse": simcse_head}


class TextContrastiveModel(ContrastiveModel):
    """A SentenceTransformer plus a training-only head.

    Args:
        encoder: The part that is evaluated, saved and exported. Its dropout layers are replaced by
            `dropout.CheapDropout`.
        head: A name in `HEADS`. Stored in checkpoints, never in the exported encoder.
    """

    modality, unit = "text", "tokens"

    def __init__(self, encoder: SentenceTransformer, head: str = "none") -> None:
        cheapen_dropout(encoder)
        width = int(encoder.get_embedding_dimension() or 0)
        super().__init__(encoder, HEADS[head](width), width)

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """Tokenized rows {input_ids, attention_mask, ...} [B, T] to embeddings [B, D]."""
        return self.encoder(features)["sentence_embedding"]

    def count(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["attention_mask"].sum()  # padding is not counted

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
        }

    def describe_training(self) -> dict[str, Any]:
        return super().describe_training() | {"adapters_over": base_weights(self.backbone)}

    def is_exported(self, name: str) -> bool:
        return super().is_exported(name) and not is_adapter(name)

    @property
    def loads_exported(self) -> bool:
        """With adapters, the exported weights are merged ones; the base weights do not change in training."""
        return not any(map(is_adapter, self.state_dict()))

    def save_encoder(self, folder: str, state: dict[str, Tensor]) -> None:
        """Write the encoder as a SentenceTransformer folder, with the weights in `state`, a state dict of this module;
        adapters are merged into the base weights."""
        refuse_links(folder)
        backbone, prefix = self.backbone, "encoder.0.model."
        weights = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
        with plain_saving(backbone, merged(backbone, weights)):
            self.encoder.save(folder, create_model_card=False)
        # transformers 5 names a tokenizer class that 4 does not know; both know it by its old name
        config = Path(folder) / "tokenizer_config.json"
        if config.is_file():
            said = config.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
            config.write_text(said, encoding="utf-8")

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
    """A SentenceTransformer in float32, whatever dtype the file has, without the pooler that BERT never uses.

    Args:
        model_name_or_path: Folder or Hub name of a sentence-transformers model or of any Hugging Face text encoder.
        revision: Branch, tag or commit on the Hub.
        pooling: One of `POOLINGS`. None keeps what the model says, and is cls, the paper's, where it says nothing.
        dropout: Sets every dropout probability of the model's config, in [0, 1). None keeps them.
        lora_rank: Train adapters of this rank only, >= 1; None trains all weights.
        load_in: With adapters, hold the other weights in `4bit` or `8bit`.
        trust_remote_code: Run Python code that comes with the model or that it names; else such a model is refused.

    Raises:
        InputError: The model is not there, cannot be had offline, is damaged, or needs code of its own.
    """
    model_name_or_path = folder_or_name(model_name_or_path)
    if load_in is not None and lora_rank is None:
        raise InputError(f"--load_in_{load_in} needs --lora_rank: weights of so few bits cannot be trained")
    few_bits = {} if load_in is None else {"quantization_config": quantization(load_in)}
    with translate_loading_errors(f"--model_name_or_path {model_name_or_path}"):
        encoder = SentenceTransformer(
            model_name_or_path,
            revision=revision,
            device="cuda" if few_bits and torch.cuda.is_available() else "cpu",
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": torch.float32, **NO_CODE, **few_bits},
            config_kwargs=dropout_settings(model_name_or_path, revision, dropout, trust_remote_code),
        )
    require_tokenizer(encoder, model_name_or_path)
    if not isinstance(encoder[0], Transformer) or not any(isinstance(module, Pooling) for module in encoder):
        raise InputError(f"--model_name_or_path {model_name_or_path} is not a transformer followed by pooling")
    backbone: Any = encoder[0].model
    if isinstance(getattr(backbone, "pooler", None), nn.Module):
        backbone.pooler = None  # no gradient reaches it, and DDP stops at step 2 on such parameters
    says_pooling = bool(encoder.module_kwargs)  # one entry per line of modules.json
    if pooling or not says_pooling:
        set_pooling(encoder, pooling or "cls")
    if lora_rank is not None:
        add_lora(encoder, lora_rank)
    return encoder


def require_tokenizer(encoder: SentenceTransformer, name: str) -> None:
    """InputError if the tokenizer knows no word (a folder without tokenizer files loads without complaint, and all
    sentences of one length then get the same embedding), or words that the model has no embedding for."""
    tokenizer = encoder.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{name}: its tokenizer files are missing, every word would be unknown")
    backbone: Any = encoder[0].model
    known, added = backbone.get_input_embeddings().num_embeddings, tokenizer.get_added_vocab()
    highest = max(number for word, number in tokenizer.get_vocab().items() if word not in added)
    if highest >= known:
        raise InputError(f"{name}: its tokenizer has ids up to {highest}, its model embeddings for {known}: no pair")


def set_pooling(encoder: SentenceTransformer, mode: str) -> None:
    """Replace the pooling of an encoder by one of `POOLINGS`."""
    (index,) = [i for i, module in enumerate(encoder) if isinstance(module, Pooling)]
    encoder[index] = Pooling(encoder[index].embedding_dimension, mode)


def dropout_settings(
    model_name_or_path: str, revision: str | None, dropout: float | None, trust_remote_code: bool = False
) -> dict[str, float]:
    """Every dropout probability in the model's config (BERT calls them hidden_dropout_prob, ModernBERT mlp_dropout,
    T5 dropout_rate, ...), set to `dropout`; empty for None.

    Raises:
        InputError: dropout outside [0, 1).
    """
    if dropout is None:
        return {}
    if not 0 <= dropout < 1:
        raise InputError(f"--dropout must be in [0, 1), got {dropout}")
    config = AutoConfig.from_pretrained(model_name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    return {
        key: dropout for key, value in config.to_dict().items() if "dropout" in key and isinstance(value, int | float)
    }
