"""Checks of values that users give on the command line."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from fmicl_text.errors import InputError
from fmicl_text.files import read_json

PLOTS: dict[str, bytes | tuple[bytes, ...]] = {
    ".png": b"\x89PNG",
    ".pdf": b"%PDF",
    ".svg": (b"<?xml", b"<svg"),
}  # and how their content begins


def check_filled(arguments: Sequence[str]) -> None:
    """Raise `InputError` for an empty argument, typically from an unset shell variable, and for text that no file can
    store: a NUL character, or bytes that are not UTF-8."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if "\0" in argument or (not argument.isascii() and any("\ud800" <= char <= "\udfff" for char in argument)):
            raise InputError(f"{argument!r} is not accepted: expected UTF-8 without NUL characters")
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


def check_output(flag: str, path: Path | None, *data: str | Path | None) -> None:
    """Raise `InputError` unless a JSON file of results can be written to a path. Checked early, so that no long
    computation is lost.

    Args:
        flag: Name of the flag, for the message.
        path: Its value. An existing file is replaced, but not the record of a run or another JSON object.
        data: Files and folders that the program reads. An existing file among them is not replaced.
    """
    if path is None:
        return
    check_writable(flag, path)
    if path.is_file() and (is_among(path, data) or is_other_json(path) or is_of_a_model(path)):
        raise InputError(f"{flag} {path}: the file exists and was not written by an evaluation; choose another name")


def check_plot(flag: str, path: Path | None, *data: str | Path | None) -> None:
    """Raise `InputError` unless a plot can be written to a path.

    Args:
        flag: Name of the flag, for the message.
        path: Its value. An existing file is replaced if it is a plot of the same type.
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
        if is_among(path, data) or (start and not start.startswith(PLOTS[path.suffix.lower()])):
            raise InputError(f"{flag} {path}: the file exists and is not a plot of this program; choose another name")


def is_among(path: Path, data: Iterable[str | Path | None]) -> bool:
    """Whether a file is one of some files, or data in one of some folders, where .json files may be results."""
    found = [Path(one).resolve() for one in data if one is not None]
    in_folder = path.suffix.lower() != ".json" and any(path.resolve().is_relative_to(folder) for folder in found)
    return in_folder or path.resolve() in found


def check_writable(flag: str, path: Path) -> None:
    """Raise `InputError` unless a file can be written to a path."""
    try:
        if not path.parent.is_dir() or (path.exists() and not path.is_file()):
            raise InputError(f"{flag} {path}: must be a file in an existing folder")
        tempfile.TemporaryFile(dir=path.parent).close()  # permission bits do not cover root and read-only file systems
    except OSError as error:
        raise InputError(f"{flag} {path}: not writable ({error.strerror})") from error


def is_of_a_model(path: Path) -> bool:
    """Whether a file is in the folder of a model and is not a list of scores."""
    folder = path.resolve().parent
    if not any((folder / name).is_file() for name in ("config.json", "modules.json")):
        return False
    with suppress(ValueError):
        content = read_json(path)
        return not (isinstance(content, list) and all("metrics" in one or "missing" in one for one in content))
    return path.stat().st_size > 0


def is_other_json(path: Path) -> bool:
    """Whether a file is a JSON object that no evaluation wrote, such as the record of a run or the config of a model.
    Scores are written as lists, benchmarks as objects with versions."""
    try:
        content = read_json(path)
    except ValueError:
        return False
    return isinstance(content, dict) and bool(content) and ("versions" not in content or "log_history" in content)
