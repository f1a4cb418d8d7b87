"""Files that are there as they were, or as they are to be, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_files(folder: Path, place: Path) -> None:
    """Move every file of a folder to where it belongs in another: each is there as it was, or as it is to be. A link
    that is there is replaced, not followed."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = place / path.relative_to(folder)
        if target.parent.is_symlink():
            target.parent.unlink()
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(path)
        os.replace(path, target)
    shutil.rmtree(folder)


def write_atomic(path: Path, content: str) -> None:
    """Write a text file that is there as it was, or as it is to be."""
    beside = path.with_name(f".{path.name}.unfinished")
    beside.unlink(missing_ok=True)  # it may be a link
    beside.write_text(content, encoding="utf-8")
    sync(beside)
    os.replace(beside, path)
