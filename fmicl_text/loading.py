"""How models and data that anyone may have made are opened: quietly, none of their code run, what is wrong with them
in one line."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import try_to_load_from_cache
from transformers.utils import logging as transformers_logging

from fmicl_text.errors import InputError

# Against what a model's own sentence_bert_config.json may ask for: to unpickle anything, and to run anyone's kernels.
NO_CODE = {"weights_only": True, "allow_all_kernels": False}


def folder_or_name(name: str) -> str:
    """--model_name_or_path as the libraries take it; InputError if it looks like a folder and there is none."""
    folder = Path(name).expanduser()
    if name.startswith((".", "~", "/")) and not folder.is_dir():
        raise InputError(f"--model_name_or_path: no such folder {name}")
    return str(folder) if folder.is_dir() else name


@contextmanager
def translate_loading_errors(what: str) -> Iterator[None]:
    """Within, loading is quiet, and what goes wrong is an InputError. Of files that anyone may have written, libraries
    raise whatever comes: a KeyError, a TypeError, an UnpicklingError, of tokenizers a bare Exception.

    Args:
        what: The flag and the model, for the message.
    """
    try:
        with quiet_loading():
            yield
    except (InputError, Warning):  # of warnings those that are made errors
        raise
    except Exception as error:
        raise InputError(f"{what}: {explain(error)}") from error


def explain(error: BaseException) -> str:
    """The reason in one line."""
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return (
            "it needs Python code that comes with it or that it names, which is not run: read that code and, if you "
            "trust it, train with --trust_remote_code True"
        )
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are damaged, or a pickle that would run code, and are not read: ask for model.safetensors"
    tells = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
    return said[:300] if tells else f"{type(error).__name__}: {said[:300]}"


def refuse_links(folder: str | Path) -> None:
    """InputError for a folder with a symbolic link in it, through which saving would write elsewhere: a snapshot in the
    Hub's cache is made of them."""
    for path in (*Path(folder).glob("*"), *Path(folder).glob("*/*")):
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link, and saving would write through it: name another folder")


def load_named_dataset(name: str, config: str | None, split: str, streaming: bool = False) -> Any:
    """A data set of the Hub, or of a folder; InputError if the folder's README names files that are not in it."""
    if Path(name).is_dir():
        inside = os.path.realpath(name) + os.sep
        named: Any = datasets.load_dataset_builder(name, config).config.data_files
        for file in chain.from_iterable((named or {}).values()):
            if "://" not in file and not os.path.realpath(file).startswith(inside):
                raise InputError(f"--dataset_name {name} names {file}, which is not in it, and is not opened")
    return datasets.load_dataset(name, config, split=split, streaming=streaming)


def hub_revision(rows: Any) -> str | None:
    """The commit that a data set from the Hub is of, as the addresses of its files name it; None of others."""
    found = [re.search("@([0-9a-f]{40})/", address) for address in rows.info.download_checksums or {}]
    return next((match[1] for match in found if match), None)


def hub_name(name_or_path: str) -> str | None:
    """The name of a model on the Hub; None of a folder."""
    return None if not name_or_path or Path(name_or_path).expanduser().exists() else name_or_path


def hub_commit(model: Any) -> str | None:
    """The commit of a Hugging Face model from the Hub, else as its snapshot folder in the cache is named; None of a
    folder."""
    name = hub_name(getattr(model, "name_or_path", ""))
    if name is None:
        return None
    if commit := getattr(getattr(model, "config", None), "_commit_hash", None):
        return str(commit)
    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide what is noise when an encoder is loaded: progress of a second's work, the note that a plain model gets
    mean pooling (set right afterwards), and reports in which nothing is missing but the pooler we drop."""

    def report_matters(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        rows = re.findall(r"^(\S+)\s*\|\s*(\w+)", message, re.MULTILINE)
        return "LOAD REPORT" not in message or any(
            "pooler" not in key and status in ("MISSING", "MISMATCH", "CONVERSION") for key, status in rows
        )

    loader, framework = logging.getLogger("transformers.modeling_utils"), logging.getLogger("sentence_transformers")
    level, progress = framework.level, transformers_logging.is_progress_bar_enabled()
    loader.addFilter(report_matters)
    framework.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        loader.removeFilter(report_matters)
        framework.setLevel(level)
        if progress:
            transformers_logging.enable_progress_bar()
