"""What goes wrong by the user's hand, told in one line."""

from __future__ import annotations

from pathlib import Path


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
