"""Atomic file writes, and hashes of files."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import xxhash

from fmicl_text.errors import InputError

DISK_FULL = "No space left on device"
WORK_DIR = ".fmicl_text"  # subfolder of an output folder for the lock and for incomplete files; all of it is ours


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or its cause, was raised because the disk is full or a quota is exceeded. Libraries written in
    Rust raise other types than OSError, and torch's archive writer only names its source file."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in (DISK_FULL, "os error 28", "Disk quota exceeded", "inline_container.cc")):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_regular(path: str | Path, source: str) -> None:
    """Raise `InputError` for a pipe or a device, which reading would wait for, or never end.

    Args:
        path: A file, which may be missing.
        source: The argument, which begins the message.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # reading it will fail with a better message
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"{source} is a pipe or a device, not a file")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error


def matching(pattern: str) -> list[str]:
    """The paths that match a pattern, sorted. Where its folder exists, the name of the folder is no pattern."""
    folder, name = os.path.split(pattern)
    return sorted(
        glob.glob(os.path.join(glob.escape(folder), name) if os.path.isdir(folder) else pattern, recursive=True)
    )


def content_hash(*files: str | Path, root: str | None = None) -> str:
    """A hash of the contents of files, in this order, and of their paths relative to `root`; without it, only of their
    suffixes."""
    digest = xxhash.xxh3_128()
    for file in files:
        name = Path(file).suffix if root is None else os.path.relpath(file, root)
        digest.update(os.fsencode(f"{name}\0{os.path.getsize(file)}\0"))
        with open(file, "rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_files(folder: Path, target_folder: Path) -> None:
    """Move all files of a folder, and of its subfolders, to the same relative paths in another. Each file is replaced
    atomically; a symbolic link within the other folder is replaced, not followed."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = target_folder / path.relative_to(folder)
        if target.parent != target_folder and target.parent.is_symlink():
            target.parent.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(path)
        os.replace(path, target)
    shutil.rmtree(folder)


def write_atomic(path: Path, content: str) -> None:
    """Write a text file atomically: after an interruption, the file has either its old or its new content."""
    temporary = path.with_name(f".{path.name}.unfinished")
    temporary.unlink(missing_ok=True)  # it may be a symbolic link
    try:
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
