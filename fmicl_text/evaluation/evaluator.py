"""Evaluation of an encoder during training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from datasets import Dataset
from datasets.fingerprint import Hasher
from sentence_transformers import SentenceTransformer

from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.sts import evaluate_sts

LOGGED = ("spearman", "pearson", "alignment", "uniformity")


@dataclass
class STSEvaluator:
    """Evaluates an encoder on sentence pairs with similarity scores.

    Calling it with a SentenceTransformer returns sts_spearman, sts_pearson, sts_alignment and sts_uniformity, which the
    trainer logs as `eval_sts_spearman` and so on.

    Args:
        dataset: Sentence pairs in the format of `load_pairs`: sentence1, sentence2, score.
        batch_size: Sentences per forward pass.
        progress: Show a progress bar while encoding.
    """

    dataset: Dataset
    batch_size: int = 64
    progress: bool = True

    def describe(self) -> dict[str, str]:
        """A hash of the evaluation data, which is compared when a run is resumed."""
        return {"evaluation_data": Hasher.hash(self.dataset.to_dict())}

    def __call__(self, encoder: SentenceTransformer) -> dict[str, float]:
        encode = partial(encode_sentences, encoder, batch_size=self.batch_size, progress=self.progress)
        scores = evaluate_sts(encode, self.dataset)
        return {f"sts_{name}": scores[name] for name in LOGGED if name in scores}
