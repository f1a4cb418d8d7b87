"""The losses and their parts. Imports torch only."""

from fmicl_text.losses.contrastive import (
    OBJECTIVES,
    AlignUniformLoss,
    ContrastiveLoss,
    FMICLLoss,
    InfoNCELoss,
    SpectralLoss,
)
from fmicl_text.losses.divergences import DIVERGENCES, FDivergence, tsallis, uniformity_holds
from fmicl_text.losses.similarity import SIMILARITIES, Similarity

__all__ = [
    "DIVERGENCES",
    "OBJECTIVES",
    "SIMILARITIES",
    "AlignUniformLoss",
    "ContrastiveLoss",
    "FDivergence",
    "FMICLLoss",
    "InfoNCELoss",
    "Similarity",
    "SpectralLoss",
    "tsallis",
    "uniformity_holds",
]
