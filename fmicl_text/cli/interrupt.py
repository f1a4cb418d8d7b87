"""Imported first by scripts: Ctrl-C while other modules are imported prints one line instead of a traceback."""

import sys
from pathlib import Path
from types import TracebackType


def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an uncaught exception; Python then ends with the status of the signal."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write(f"{Path(sys.argv[0]).name}: stopped by SIGINT\n")
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = report
