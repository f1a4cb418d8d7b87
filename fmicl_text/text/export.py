"""Saved encoders in the spelling of older libraries: sentence-transformers 5 and transformers 4 open them too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fmicl_text.files import read_json
from fmicl_text.text.checks import UNLIMITED

# Names of modules in sentence-transformers before 5.4; newer versions accept them.
OLDER_NAME = "sentence_transformers.models."
OLDER_MODULES = ("Transformer", "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout", "WeightedLayerPooling")
# Names of the poolings before 5.4, in the order in which several of them are concatenated.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Entries that older versions do not know, with the values that they assume.
TRANSFORMER_DEFAULTS = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
DENSE_DEFAULTS = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}


def write_older_spelling(folder: str, tokenizer: Any) -> None:
    """Rewrite the small files of a saved SentenceTransformer, in place, so that sentence-transformers 5.1 with
    transformers 4.57 opens it with the same embeddings. Modules that older versions do not have are not changed.

    Args:
        folder: The folder.
        tokenizer: The tokenizer that was saved in it.
    """
    place = Path(folder)
    modules = read_json(place / "modules.json")
    for module in modules:
        name = module["type"].rpartition(".")[2]
        if module["type"].startswith("sentence_transformers.") and name in OLDER_MODULES:
            module["type"] = OLDER_NAME + name
            path = place / module["path"] / "config.json"
            if name == "Transformer":
                write(place / "sentence_bert_config.json", older_transformer(place))
            elif name == "Pooling":
                write(path, older_pooling(read_json(path)))
            elif name == "Dense":
                write(path, without_defaults(read_json(path), DENSE_DEFAULTS))
    write(place / "modules.json", modules)
    config = read_json(place / "config_sentence_transformers.json")
    config["__version__"].pop("sentence_transformers", None)  # older versions would warn that the model is newer
    write(place / "config_sentence_transformers.json", config)
    if (path := place / "config.json").is_file():
        write(path, read_json(path) | older_rope(read_json(path)))
    if (path := place / "tokenizer_config.json").is_file():
        write(path, older_tokenizer(read_json(path), tokenizer))


def older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of rotary position embeddings under the names of transformers 4, which otherwise uses the default
    base without a warning. Models with two kinds of layers have two bases."""
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        modernbert = config["model_type"].startswith("modernbert")
        names = ("global_rope_theta", "local_rope_theta") if modernbert else ("rope_theta", "rope_local_base_freq")
        kinds = [rope["full_attention"], rope.get("sliding_attention")]
        return {name: kind["rope_theta"] for name, kind in zip(names, kinds, strict=True) if kind}
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"]} | (
        {} if rope.get("rope_type") == "default" else {"rope_scaling": scaling}
    )


def older_tokenizer(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The content of tokenizer_config.json with the names of transformers 4, which transformers 5 also accepts, and the
    inputs that a tokenizer of a general class returns: without their list, transformers 4 adds token_type_ids, which
    GPT-2 embeds as words."""
    config = {"model_input_names": list(tokenizer.model_input_names)} | config
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def older_transformer(place: Path) -> dict[str, Any]:
    """The content of sentence_bert_config.json, with the maximum length; newer versions read it from the tokenizer."""
    config = without_defaults(read_json(place / "sentence_bert_config.json"), TRANSFORMER_DEFAULTS)
    kinds = config.get("modality_config", {})
    if kinds.get("text") == TEXT and kinds.keys() <= {"text", "message"}:  # training on text says nothing about chats
        del config["modality_config"]
    tokenizer = place / "tokenizer_config.json"
    length = read_json(tokenizer).get("model_max_length") if tokenizer.is_file() else None
    known = isinstance(length, int) and length < UNLIMITED
    return {"max_seq_length": length if known else None} | config


def older_pooling(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a pooling layer with a flag for each mode. Several modes are concatenated in a fixed order, which
    the flags do not contain; a config in another order is returned as it is."""
    modes = config["pooling_mode"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if modes != [mode for mode in POOLING_FLAGS.values() if mode in modes]:
        return config
    flags = {flag: mode in modes for flag, mode in POOLING_FLAGS.items()}
    rest = {key: value for key, value in config.items() if key not in ("embedding_dimension", "pooling_mode")}
    return {"word_embedding_dimension": config["embedding_dimension"], **flags, **rest}


def without_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A config without the entries that have these values."""
    return {key: value for key, value in config.items() if key not in defaults or defaults[key] != value}


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
