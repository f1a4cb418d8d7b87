"""f-MICL: contrastive training of encoders with any f-divergence (arXiv 2402.10150).

The public names are imported on first use (PEP 562), so that `from fmicl_text import FMICLLoss` costs what torch does.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmicl_text.errors import InputError as InputError
    from fmicl_text.errors import Interrupted as Interrupted
    from fmicl_text.losses import DIVERGENCES as DIVERGENCES
    from fmicl_text.losses import OBJECTIVES as OBJECTIVES
    from fmicl_text.losses import AlignUniformLoss as AlignUniformLoss
    from fmicl_text.losses import FDivergence as FDivergence
    from fmicl_text.losses import FMICLLoss as FMICLLoss
    from fmicl_text.losses import InfoNCELoss as InfoNCELoss
    from fmicl_text.losses import SpectralLoss as SpectralLoss
    from fmicl_text.losses import tsallis as tsallis
    from fmicl_text.losses import uniformity_holds as uniformity_holds
    from fmicl_text.text import TextContrastiveModel as TextContrastiveModel
    from fmicl_text.text import build_text_encoder as build_text_encoder
    from fmicl_text.training import FMICLTrainer as FMICLTrainer
    from fmicl_text.training import FMICLTrainingArguments as FMICLTrainingArguments

__version__ = "0.1.0"

_MODULES = {
    "errors": ("InputError", "Interrupted"),
    "losses": (
        *("DIVERGENCES", "OBJECTIVES", "AlignUniformLoss", "FDivergence", "FMICLLoss", "InfoNCELoss", "SpectralLoss"),
        *("tsallis", "uniformity_holds"),
    ),
    "text": ("TextContrastiveModel", "build_text_encoder"),
    "training": ("FMICLTrainer", "FMICLTrainingArguments"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_MODULE_OF[name]}")
    except ImportError:
        _check_torchvision()
        raise
    return getattr(module, name)


def _check_torchvision() -> None:
    """ImportError for a torchvision that does not match torch: transformers then fails to import, text models
    included, without naming the cause."""
    if find_spec("torchvision"):
        try:
            import_module("torchvision")
        except (ImportError, RuntimeError) as error:
            raise ImportError(
                f"torchvision is installed but broken ({error}): uninstall it, or install the build that matches torch"
            ) from None


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
