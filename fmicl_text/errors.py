"""What goes wrong by the user's hand, told in one line."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

PLOTS = (".png", ".pdf", ".svg")


class InputError(ValueError):
    """A mistake in an argument or a file: says which one, what was received and what is accepted."""


class Interrupted(Exception):
    """A run was told to stop, and did, with everything saved that it takes to go on.

    Args:
        message: What was done, and how to go on.
        signal_number: What told it.
        checkpoint: What was saved.
    """

    def __init__(self, message: str, signal_number: int, checkpoint: Path) -> None:
        super().__init__(message)
        self.signal_number, self.checkpoint = signal_number, checkpoint


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn an `InputError` into one line on stderr and exit status 2, `Interrupted` into one and 128 + the signal's
    number, as shells do; every other exception keeps its traceback."""
    try:
        yield
    except InputError as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"{program}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal_number)


class OneLineParser(argparse.ArgumentParser):
    """The command line of a script: its help is the script's docstring, what is wrong with it one line.

    Args:
        program: The script's name.
        description: The script's `__doc__`.
    """

    def __init__(self, program: str, description: str | None, **kwargs: Any) -> None:
        kwargs |= {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(program, description=description, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        check_filled(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


@contextmanager
def flags_called(**names: str) -> Iterator[None]:
    """Turn `--train_file` in an `InputError` into `--images` where train_file="images" is given: what loads data and
    models names the recipes' flags."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for theirs, ours in names.items():
            message = message.replace(f"--{theirs}", f"--{ours}")
        raise InputError(message) from error


def check_filled(arguments: Sequence[str]) -> None:
    """InputError for an empty argument, which a variable of the shell leaves that is not set."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("--") and argument.partition("=")[1:] == ("=", ""):
            raise InputError(f"{argument[:-1]} is empty")
        if not argument:
            raise InputError(f"{before if before.startswith('--') else 'an argument'} is empty")


def whole_number(text: str, lowest: int = 1) -> int:
    """A flag's value that must be a whole number of at least `lowest`, and fit into 64 bits."""
    if not text.isdecimal() or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {lowest}, got {text!r}")
    if int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2^63, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """A flag's value that must be a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return number


def check_writable(flag: str, path: Path | None) -> None:
    """InputError unless a file could be written there: said before an hour's work, not after it."""
    if path is None:
        return
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise InputError(f"{flag} {path}: name a file in a folder that exists")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()  # permission bits do not tell: root, read-only file systems
    except OSError as error:
        raise InputError(f"{flag} {path}: nothing can be written there ({error.strerror})") from error


def check_plottable(flag: str, path: Path | None) -> None:
    """InputError unless a plot could be written there."""
    check_writable(flag, path)
    if path is not None and path.suffix.lower() not in PLOTS:
        raise InputError(f"{flag} {path}: its name must end in {', '.join(PLOTS)}")
