"""Text: encoders, training data, tokenization."""

from fmicl_text.text.collator import TextViewCollator
from fmicl_text.text.data import load_training_text
from fmicl_text.text.model import TextContrastiveModel, build_text_encoder

__all__ = ["TextContrastiveModel", "TextViewCollator", "build_text_encoder", "load_training_text"]
