"""f-MICL: contrastive training of encoders with any f-divergence (arXiv 2402.10150)."""

from fmicl_text import environment  # noqa: F401
from fmicl_text.divergences import DIVERGENCES, FDivergence, tsallis, uniformity_holds
from fmicl_text.errors import InputError, Interrupted
from fmicl_text.loss import OBJECTIVES, AlignUniformLoss, FMICLLoss, InfoNCELoss, SpectralLoss
from fmicl_text.model import ContrastiveModel, build_text_encoder
from fmicl_text.trainer import FMICLTrainer
from fmicl_text.training_args import FMICLTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "DIVERGENCES",
    "OBJECTIVES",
    "AlignUniformLoss",
    "ContrastiveModel",
    "FDivergence",
    "FMICLLoss",
    "FMICLTrainer",
    "FMICLTrainingArguments",
    "InfoNCELoss",
    "InputError",
    "Interrupted",
    "SpectralLoss",
    "build_text_encoder",
    "tsallis",
    "uniformity_holds",
]
