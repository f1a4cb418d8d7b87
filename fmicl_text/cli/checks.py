"""Checks of values that users give on the command line."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fmicl_text.errors import InputError

PLOTS = (".png", ".pdf", ".svg")


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


def check_writable(flag: str, path: Path | None) -> None:
    """Raise `InputError` unless a file can be written to a path. Checked early, so that no long computation is lost."""
    if path is None:
        return
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(f"{flag} {path}: must be a file in an existing folder")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()  # permission bits do not cover root and read-only file systems
    except OSError as error:
        raise InputError(f"{flag} {path}: not writable ({error.strerror})") from error


def check_plottable(flag: str, path: Path | None) -> None:
    """Raise `InputError` unless a plot can be written to a path."""
    check_writable(flag, path)
    if path is not None and path.suffix.lower() not in PLOTS:
        raise InputError(f"{flag} {path}: the file name must end in {', '.join(PLOTS)}")
