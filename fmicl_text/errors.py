"""What goes wrong by the user's hand, told in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
