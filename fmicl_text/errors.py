"""Exceptions that the command line reports in one line."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """An invalid argument or file. The message names it, the value received and the accepted values, in one line."""

    def __init__(self, message: object = "") -> None:
        lines = str(message).splitlines()
        if lines and lines[0].startswith("Caught ") and " in DataLoader worker process " in lines[0]:
            message = lines[-1].partition(": ")[2]  # torch raises the error again with a traceback as its message
        super().__init__(message)


class Interrupted(Exception):
    """A signal stopped training after a checkpoint was saved.

    Args:
        message: The checkpoint, and how to resume.
        signal_number: The signal that was received.
        checkpoint: Folder of the checkpoint.
    """

    def __init__(self, message: str, signal_number: int, checkpoint: Path) -> None:
        super().__init__(message)
        self.signal_number, self.checkpoint = signal_number, checkpoint
