"""Where training text comes from: files, patterns, folders, datasets on the Hub."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DataFilesNotFoundError

from fmicl_text.errors import InputError
from fmicl_text.files import content_hash, matching
from fmicl_text.loading import cache_of, load_named_dataset, split_files, stream_fingerprint
from fmicl_text.text.columns import text_columns
from fmicl_text.text.opening import ACCEPTED, FORMATS, suffix_of
from fmicl_text.text.readers import TextRows, inspect_file

_TEXT_BUILDERS = ("text", "csv", "json", "parquet", "arrow")
# Files of `datasets` that are not data.
_NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def find_files(paths: Sequence[str]) -> list[str]:
    """The files that `train_file` names: files, patterns, and the training split of folders, in this order.

    Raises:
        InputError: A pattern matches no file, a folder contains no files of text or several formats, or a file is
            named twice.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            splits = folder_files(path, None, "train_file")
            if splits is None:
                raise InputError(f"train_file={path}: its README.md has options, pass it as dataset_name={path}")
            if not (files := splits.get("train", [])):
                raise InputError(f"train_file={path}: the folder has no files of the split train")
            found += files
        elif not os.path.lexists(path) and glob.has_magic(path):
            if not (files := [file for file in matching(path) if not os.path.isdir(file)]):
                raise InputError(f"train_file={path}: no file matches this pattern")
            found += files
        else:
            found.append(path)
    count = Counter(map(os.path.realpath, found))
    if twice := [file for file in found if count[os.path.realpath(file)] > 1]:
        raise InputError(f"train_file={twice[0]} is given twice")
    if not found:
        raise InputError("train_file must be one or more files, got none")
    return found


def read_files(
    splits: Mapping[str, Sequence[str]],
    split: str,
    names: Sequence[str] | None,
    streaming: bool,
    root: str | None = None,
) -> tuple[Any, tuple[str, ...], str]:
    """The rows of local files, their columns, and a hash of their content."""
    found = {name: [inspect_file(path, names) for path in paths] for name, paths in splits.items()}
    inspected = [one for files in found.values() for one in files]
    columns = inspected[0][1]
    for file, others in inspected:
        if others != columns:
            first = f"{inspected[0][0].path} has {' '.join(columns)}"
            raise InputError(f"{first} but {file.path} has {' '.join(others)}: select columns with text_columns")
    paths = [file.path for file, _ in inspected]
    content, cache_dir = content_hash(*paths, root=root), None if streaming else cache_of(*paths, root=root)
    files = {name: [file for file, _ in some] for name, some in found.items()}
    how = [(name, file.suffix, file.separator, file.skip) for name, some in files.items() for file in some]
    builder = TextRows(files, columns, f"{content} {how}", cache_dir)
    if streaming:
        return builder.as_streaming_dataset(split), columns, content
    builder.download_and_prepare()
    return builder.as_dataset(split), columns, content


def read_dataset(
    name: str, config: str | None, split: str, names: Sequence[str] | None, streaming: bool, source: str
) -> tuple[Any, tuple[str, ...], str | None]:
    """The rows of a dataset, as `read_files`. Files of text in a local folder are read as `train_file` reads them."""
    if os.path.isdir(name):
        splits = folder_files(name, config, "dataset_name") or {}
        wanted = {part.partition("[")[0].strip() for part in split.split("+")}
        splits = {part: files for part, files in splits.items() if part in wanted or "all" in wanted}
        if wanted - {"all"} <= set(splits) and splits and all(map(suffix_of, chain.from_iterable(splits.values()))):
            return read_files(splits, split, names, streaming, root=name)
    raw = load_named_dataset(name, config, split, streaming, as_text=True)
    columns = text_columns(raw, names, source)
    return raw, columns, stream_fingerprint(name, config) if streaming else None


def folder_files(name: str, config: str | None, argument: str) -> dict[str, list[str]] | None:
    """The data files of each split of a dataset in a local folder; None if its README gives options for reading them,
    which only `datasets` knows.

    Args:
        name: The folder.
        config: Configuration in its README.
        argument: The argument that names the folder, which begins the messages.

    Raises:
        InputError: Its README references files outside the folder, or without a README `datasets` would ignore some of
            its files, for example those of a second format.
    """
    if any(mark in os.path.abspath(name) for mark in ("[", "::")):
        raise InputError(f"{argument}={name}: a folder with [ or :: in its path cannot be read: pass its files")
    try:
        builder = datasets.load_dataset_builder(name, config)
    except DataFilesNotFoundError:
        if not (files := [str(path) for path in _text_files(name) if suffix_of(str(path))]):
            raise
        return {"train": files}  # with suffixes in upper case, which `datasets` does not know
    splits = split_files(name, builder, argument)
    used, default = builder.config, type(builder.config)()
    given = {item.name for item in fields(used) if getattr(used, item.name) != getattr(default, item.name)}
    remote = any("://" in file for files in (used.data_files or {}).values() for file in files)
    options = given - {"name", "version", "data_dir", "data_files", "description", "features"}
    if remote or (options and not (options == {"sep"} and used.sep == "\t")):
        return None
    files = list(chain.from_iterable(splits.values()))
    odd = [file for file in files if suffix_of(file) is None]
    if odd and (argument == "train_file" or (any(map(suffix_of, files)) and builder.name in _TEXT_BUILDERS)):
        raise InputError(f"{argument}={name}: unsupported file type of {odd[0]}; expected {ACCEPTED}")
    readme = Path(name, "README.md")
    if not (readme.is_file() and "configs:" in readme.read_text(encoding="utf-8", errors="replace")):
        _check_nothing_ignored(name, argument, files)
    return splits


def _text_files(folder: str) -> list[Path]:
    """The files in a folder that may be text, without hidden ones."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name not in _NO_DATA]
    visible = [file for file in files if not any(p.startswith((".", "__")) for p in file.relative_to(folder).parts)]
    return [file for file in visible if _format(str(file))]


def _check_nothing_ignored(name: str, argument: str, read: Sequence[str]) -> None:
    """Raise `InputError` if a folder has files of text that are not read as a part of any split."""
    formats, paths = sorted({_format(file) for file in read}), {os.path.realpath(file) for file in read}
    if "" in formats:  # images, for example, with a table of metadata
        return
    for file in _text_files(name):
        found, which = _format(str(file)), f"such as train_file={name}/*{formats[0]}"
        if found not in formats:
            raise InputError(
                f"{argument}={name} has files of several formats, {formats[0]} and {found}: pass those of one format, "
                f"{which}"
            )
        if os.path.realpath(file) not in paths:
            raise InputError(
                f"{argument}={name}: by its name, {file.relative_to(name)} is not in any split: pass the files, {which}"
            )


def _format(file: str) -> str:
    return next((suffix for suffix in Path(file.lower()).suffixes[::-1] if suffix in FORMATS), "")
