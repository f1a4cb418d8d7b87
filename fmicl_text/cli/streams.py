"""Signals and closed output outside of training: one line instead of a traceback, or of no message."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDS = (signal.SIGHUP, signal.SIGPIPE)
# Control characters. Progress bars move the cursor up, and libraries color their messages.
CONTROL = re.compile(r"(?P<shown>[\t\n\r]|\x1b\[(?:[0-9;]*m|A))|[\x00-\x1f\x7f-\x9f]")


class Stopped(BaseException):
    """A signal ended the program outside of training. Not an Exception, which the loaders translate.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Output:
    """A stream that raises SIGPIPE in this process when it is closed, as by `| head`, and discards what follows.
    Python itself would raise BrokenPipeError wherever something is printed, also during training.

    Args:
        stream: Standard output or standard error.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """As of the stream. Control characters, which files of others may contain, are written as escapes."""
        shown = CONTROL.sub(lambda match: match["shown"] or match[0].encode("unicode_escape").decode(), text)
        with self.discard_if_closed():
            try:
                self.stream.write(shown)
            except UnicodeEncodeError:  # a file name that is not UTF-8, or a terminal that is not
                encoding = self.stream.encoding or "ascii"
                self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """As of the stream."""
        with self.discard_if_closed():
            self.stream.flush()

    @contextmanager
    def discard_if_closed(self) -> Iterator[None]:
        """Within this context, a write to a closed pipe or terminal raises SIGPIPE instead of an exception.

        The signal, which the system sends as well, is held back until the stream discards what is in its buffer. Python
        would otherwise fail to write that when it exits."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise
            discard(self.stream)
            signal.raise_signal(signal.SIGPIPE)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def discard(stream: Any) -> None:
    """Discard what is in the buffer of a stream and what is written to it from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def raise_signals() -> Iterator[None]:
    """Within this context, SIGHUP and closed output raise `Stopped`. SIGHUP stays ignored under nohup."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in ENDS}
    for number, handler in before.items():
        if number == signal.SIGPIPE or handler == signal.SIG_DFL:
            signal.signal(number, stop)
    outputs: Any = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Output, outputs)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = outputs
        for number, handler in before.items():
            signal.signal(number, handler)
