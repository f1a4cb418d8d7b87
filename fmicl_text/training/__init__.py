"""The trainer: a `transformers.Trainer` for losses on pairs of embeddings."""

from fmicl_text.training.args import FMICLTrainingArguments
from fmicl_text.training.momentum import MomentumModel, MomentumTrainer
from fmicl_text.training.trainer import FMICLTrainer

__all__ = ["FMICLTrainer", "FMICLTrainingArguments", "MomentumModel", "MomentumTrainer"]
