"""f-MICL: contrastive training of encoders with any f-divergence (arXiv 2402.10150).

The public names, in __init__.pyi, are imported on first use: `from fmicl_text import FMICLLoss` does not import
transformers.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_import_on_first_use, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _import_on_first_use(name)
    except ImportError:
        _check_torchvision()
        raise


def _check_torchvision() -> None:
    """Raise ImportError if torchvision does not match torch. Otherwise the import of transformers fails, even for text
    models, without naming the cause."""
    if find_spec("torchvision"):
        try:
            import_module("torchvision")
        except (ImportError, RuntimeError) as error:
            raise ImportError(
                f"torchvision is installed but broken ({error}): uninstall it, or install the build that matches torch"
            ) from None
