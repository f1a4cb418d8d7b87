"""Imported before all else: a torchvision that does not fit torch stops transformers, text models included, with an
error that does not name it."""

from importlib import import_module
from importlib.util import find_spec

if find_spec("torchvision"):
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"torchvision is installed but broken ({error}): uninstall it, or install the build that fits torch"
        ) from None
