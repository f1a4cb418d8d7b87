"""What goes wrong by the user's hand, told in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class InputError(ValueError):
    """A mistake in an argument or a file: says which one, what was received and what is accepted."""


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn an `InputError` into one line on stderr and exit status 2; every other exception keeps its traceback."""
    try:
        yield
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)


class OneLineParser(argparse.ArgumentParser):
    """The command line of a script: its help is the script's docstring, what is wrong with it one line.

    Args:
        program: The script's name.
        description: The script's `__doc__`.
    """

    def __init__(self, program: str, description: str | None, **kwargs: Any) -> None:
        kwargs |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(program, description=description, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def whole_number(text: str) -> int:
    """A flag's value that must be a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def check_writable(flag: str, path: Path | None) -> None:
    """InputError unless a file could be written there: said before an hour's work, not after it."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise InputError(f"{flag} {path}: name a file in a folder that exists")
