"""Checks of values that users give on the command line."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fmicl_text.errors import InputError

PLOTS: dict[str, bytes | tuple[bytes, ...]] = {
    ".png": b"\x89PNG",
    ".pdf": b"%PDF",
    ".svg": (b"<?xml", b"<svg"),
}  # and how their content begins


def check_filled(arguments: Sequence[str]) -> None:
    """Raise `InputError` for an empty argument, typically from an unset shell variable."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("--") and argument.partition("=")[1:] == ("=", ""):
            raise InputError(f"{argument[:-1]} is empty")
        if not argument:
            raise InputError(f"{before if before.startswith('--') else 'an argument'} is empty")


def whole_number(text: str, lowest: int = 1) -> int:
    """The value of a flag that must be an integer of at least `lowest` that fits into 64 bits."""
    if not text.isdecimal() or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"must be an integer of at least {lowest}, got {text!r}")
    if int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2^63, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """The value of a flag that must be a finite number > 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number > 0, got {text!r}")
    return number


def check_output(flag: str, path: Path | None) -> None:
    """Raise `InputError` unless a JSON file of results can be written to a path. Checked early, so that no long
    computation is lost. An existing file is replaced only if one of the eval scripts wrote it."""
    if path is None:
        return
    check_writable(flag, path)
    if path.is_file() and not wrote_results(path):
        raise InputError(f"{flag} {path}: the file exists and was not written by an evaluation; choose another name")


def check_plot(flag: str, path: Path | None, *data: str | Path | None) -> None:
    """Raise `InputError` unless a plot can be written to a path.

    Args:
        flag: Name of the flag, for the message.
        path: Its value.
        data: Files and folders that the program reads. An existing file among them is not replaced.
    """
    if path is None:
        return
    check_writable(flag, path)
    if path.suffix.lower() not in PLOTS:
        raise InputError(f"{flag} {path}: the file name must end in {', '.join(PLOTS)}")
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(16).lstrip()
        is_plot = not start or start.startswith(PLOTS[path.suffix.lower()])
        is_data = any(path.resolve().is_relative_to(Path(one).resolve()) for one in data if one is not None)
        if is_data or not is_plot:
            raise InputError(f"{flag} {path}: the file exists and is not a plot of this program; choose another name")


def check_writable(flag: str, path: Path) -> None:
    """Raise `InputError` unless a file can be written to a path."""
    try:
        if not path.parent.is_dir() or (path.exists() and not path.is_file()):
            raise InputError(f"{flag} {path}: must be a file in an existing folder")
        tempfile.TemporaryFile(dir=path.parent).close()  # permission bits do not cover root and read-only file systems
    except OSError as error:
        raise InputError(f"{flag} {path}: not writable ({error.strerror})") from error


def wrote_results(path: Path) -> bool:
    """Whether a file is empty, or contains results of an eval script: a list of scores, or a benchmark."""
    try:
        content = json.loads(path.read_bytes() or b"[]")
    except (ValueError, RecursionError):
        return False
    if isinstance(content, list):
        return all(isinstance(one, dict) and not one.keys().isdisjoint(("metrics", "missing")) for one in content)
    return content == {} or ("versions" in content and "log_history" not in content)  # not the record of a run
