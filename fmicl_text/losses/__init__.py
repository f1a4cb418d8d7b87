"""The losses, their divergences and similarities. Imports torch only."""

from fmicl_text.losses.balance import Balance
from fmicl_text.losses.contrastive import (
    OBJECTIVES,
    AlignUniformLoss,
    ContrastiveLoss,
    FMICLLoss,
    InfoNCELoss,
    SpectralLoss,
    load_objective,
)
from fmicl_text.losses.divergences import DIVERGENCES, FDivergence, load_divergence, tsallis, uniformity_holds
from fmicl_text.losses.objectives import PairObjective, Terms
from fmicl_text.losses.pairs import LossTerms
from fmicl_text.losses.similarity import SIMILARITIES, Similarity

__all__ = [
    "DIVERGENCES",
    "OBJECTIVES",
    "SIMILARITIES",
    "AlignUniformLoss",
    "Balance",
    "ContrastiveLoss",
    "FDivergence",
    "FMICLLoss",
    "InfoNCELoss",
    "LossTerms",
    "PairObjective",
    "Similarity",
    "SpectralLoss",
    "Terms",
    "load_divergence",
    "load_objective",
    "tsallis",
    "uniformity_holds",
]
