"""Safe and quiet loading of third-party models and datasets, with errors in one line."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.csv.csv import CsvConfig
from huggingface_hub import try_to_load_from_cache
from transformers.utils import logging as transformers_logging

from fmicl_text.errors import InputError
from fmicl_text.files import DISK_FULL, content_hash, is_disk_full, read_json

# Override a model's own sentence_bert_config.json, which could ask to unpickle weights or to run third-party kernels.
NO_CODE = {"weights_only": True, "allow_all_kernels": False}


def resolve_model_path(model_name_or_path: str) -> str:
    """A folder with ~ expanded, or the name of a model on the Hub.

    Raises:
        InputError: It is the path of a folder that does not exist.
    """
    folder = os.path.expanduser(model_name_or_path)
    if model_name_or_path.startswith((".", "~", "/")) and not os.path.isdir(folder):
        raise InputError(f"model_name_or_path={model_name_or_path}: no such folder")
    check_model_folder(folder, f"model_name_or_path={model_name_or_path}")
    return folder if os.path.isdir(folder) else model_name_or_path


def check_model_folder(folder: str, source: str) -> None:
    """Check that an index of sharded weights names only files in its own folder.

    Args:
        folder: A folder, or the name of a model on the Hub.
        source: The argument, which begins the message.

    Raises:
        InputError: It names a file elsewhere.
    """
    if not os.path.isdir(folder):
        return
    for path in (*Path(folder).glob("*.index.json"), *Path(folder).glob("*/*.index.json")):
        with translate_loading_errors(f"{source}: {path.name}"):
            names = set(read_json(path)["weight_map"].values())
        if outside := sorted(name for name in names if Path(name).name != name):
            raise InputError(f"{source}: {path.name} names {outside[0]!r}, which is outside the folder and is not read")


@contextmanager
def translate_loading_errors(source: str) -> Iterator[None]:
    """Within this context, loading a model is quiet and its errors are raised as `InputError`. For invalid files,
    libraries raise almost any type: KeyError, TypeError, UnpicklingError, in tokenizers a bare Exception.

    Args:
        source: The argument and its value, which begin the message: `model_name_or_path=bert`.
    """
    try:
        with quiet_loading():
            yield
    except (InputError, Warning):  # a Warning is raised where filters turn warnings into errors
        raise
    except Exception as error:
        raise InputError(f"{source}: {loading_error_message(error)}") from error


def loading_error_message(error: BaseException) -> str:
    """The reason for an error that loading a model raised, in one line."""
    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return (
            "it requires custom Python code, which is not run by default: review the code and, if you trust it, pass "
            "trust_remote_code=True (not supported by the scripts in eval)"
        )
    if "`resnet_small_stem`" in message:  # the model type of `vision.architectures`, which is not imported
        return "it is an image encoder (resnet_small_stem); fmicl_text.vision.encoder.build_image_encoder opens it"
    if "ignore_mismatched_sizes" in message:
        return "its weights do not have the shapes that its config.json specifies"
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are corrupted, or a pickle that could run code, and are not loaded: use model.safetensors"
    clear = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
    return message[:300] if clear else f"{type(error).__name__}: {message[:300]}"


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Within this context, progress bars of transformers are hidden. So are load reports that list only unused weights
    (such as another task's head) or a missing pooler, which no embedding depends on."""

    def is_relevant(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        rows = [line for line in message.splitlines() if " | " in line][1:] if "LOAD REPORT" in message else []
        return not rows or any("UNEXPECTED" not in row and not ("MISSING" in row and "pooler" in row) for row in rows)

    logger, progress = logging.getLogger("transformers.modeling_utils"), transformers_logging.is_progress_bar_enabled()
    logger.addFilter(is_relevant)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(is_relevant)
        if progress:
            transformers_logging.enable_progress_bar()


def refuse_links(folder: str | Path) -> None:
    """Check that a folder contains no symbolic link, through which saving would write elsewhere. A snapshot in the
    Hub's cache consists of links.

    Raises:
        InputError: It contains one.
    """
    for path in (*Path(folder).glob("*"), *Path(folder).glob("*/*")):
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link, and saving would write to its target: use another folder")


@contextmanager
def explain_full_cache(dataset: Any = None) -> Iterator[None]:
    """Within this context, an error because the disk is full names the cache of `datasets`.

    Args:
        dataset: A dataset whose `map` is called. Its temporary file, which `datasets` leaves there, is removed.
    """
    folders = {Path(file["filename"]).parent for file in getattr(dataset, "cache_files", [])}
    before = {path for folder in folders for path in folder.glob("tmp*")}
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_disk_full(error):
            raise
        for path in {path for folder in folders for path in folder.glob("tmp*")} - before:
            path.unlink(missing_ok=True)
        cache = datasets.config.HF_DATASETS_CACHE
        raise InputError(f"{DISK_FULL}: data is cached in {cache}; set HF_DATASETS_CACHE to another disk") from error


@contextmanager
def translate_dataset_errors(explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Within this context, errors of `datasets` are raised as `InputError`, and its log, which repeats them, is silent.

    Args:
        explain: The message for an error. Where the error is only "An error occurred while generating the dataset", it
            is called with the cause.
    """
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        with explain_full_cache():
            yield
    except (InputError, Warning):  # a Warning is raised where filters turn warnings into errors
        raise
    except Exception as error:  # for invalid files, any type; see `translate_loading_errors`
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        if isinstance(cause, InputError):
            raise cause from error
        raise InputError(textwrap.shorten(explain(cause or error), width=400)) from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def cache_of(*files: str, root: str | None = None) -> str:
    """The cache folder of `datasets` for the content of local files. By default, the cache is keyed by path and
    modification time, which `cp -p`, rsync and tar preserve."""
    return os.path.join(datasets.config.HF_DATASETS_CACHE, "by_content", content_hash(*files, root=root))


def stream_fingerprint(name: str, config: str | None) -> str | None:
    """The content of a streamed dataset: a hash of the files of a local folder, or the commits on the Hub; None if
    unknown."""
    if os.path.isdir(name):
        return content_hash(*local_files(name, config), root=name)
    files: Any = datasets.load_dataset_builder(name, config).config.data_files
    commits = [list(found) for one in (files or {}).values() for found in one.origin_metadata]
    return json.dumps(commits) if commits else None


def local_files(name: str, config: str | None) -> list[str]:
    """The data files of a dataset in a local folder, of all splits.

    Raises:
        InputError: Its README references files outside the folder.
    """
    return sorted(chain.from_iterable(split_files(name, datasets.load_dataset_builder(name, config)).values()))


def split_files(name: str, builder: Any, argument: str = "dataset_name") -> dict[str, list[str]]:
    """The local data files of each split of a dataset in a local folder.

    Args:
        name: The folder.
        builder: Its builder.
        argument: The argument that names the folder, which begins the message.

    Raises:
        InputError: Its README references files outside the folder.
    """
    inside = os.path.realpath(name) + os.sep
    splits = {
        str(split): [file for file in files if "://" not in file]
        for split, files in (builder.config.data_files or {}).items()
    }
    for file in chain.from_iterable(splits.values()):
        if not os.path.realpath(file).startswith(inside):
            raise InputError(f"{argument}={name} references {file}, which is outside the folder and is not read")
    return splits


def load_named_dataset(
    name: str, config: str | None, split: str, streaming: bool = False, as_text: bool = False
) -> Any:
    """A dataset from the Hub or from a local folder.

    Args:
        as_text: Read all cells of .csv files as strings.

    Raises:
        InputError: The README of a local folder references files outside the folder.
    """
    files = local_files(name, config) if os.path.isdir(name) else []
    cache_dir = cache_of(*files, root=name) if files and not streaming else None
    options: dict[str, Any] = {}
    builder = datasets.load_dataset_builder(name, config) if as_text else None
    if builder is not None and isinstance(builder.config, CsvConfig):
        # With na_filter, pandas would read the cells null, NA and nan as None.
        options = {"keep_default_na": False, "na_filter": False}
        first: Any = next(iter(datasets.load_dataset(name, config, split=split, streaming=True, **options)), {})
        if first:
            options["features"] = datasets.Features({column: datasets.Value("string") for column in first})
    return datasets.load_dataset(name, config, split=split, streaming=streaming, cache_dir=cache_dir, **options)


def hub_revision(dataset: Any) -> str | None:
    """The commit of a dataset from the Hub, read from the URLs of its files; None for other datasets."""
    found = [re.search("@([0-9a-f]{40})/", address) for address in dataset.info.download_checksums or {}]
    return next((match[1] for match in found if match), None)


def hub_name(name_or_path: str) -> str | None:
    """The name of a model on the Hub; None for a folder."""
    return None if not name_or_path or os.path.exists(os.path.expanduser(name_or_path)) else name_or_path


def hub_commit(model: Any) -> str | None:
    """The commit of a Hugging Face model from the Hub, from its config or from the name of its snapshot in the cache;
    None for a folder."""
    name = hub_name(getattr(model, "name_or_path", ""))
    if name is None:
        return None
    if commit := getattr(getattr(model, "config", None), "_commit_hash", None):
        return str(commit)
    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None
