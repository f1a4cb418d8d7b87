"""What training calls to score an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from datasets import Dataset
from sentence_transformers import SentenceTransformer

from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.sts import evaluate_sts

LOGGED = ("spearman", "pearson", "alignment", "uniformity")


@dataclass
class STSEvaluator:
    """Scores an encoder on graded pairs; the trainer logs the result as `eval_sts_spearman` and so on.

    Args:
        dataset: sentence1, sentence2, score, as `evaluation.sts.load_pairs` gives them.
        batch_size: Sentences per forward pass.
        progress: Show a bar while encoding.
    """

    dataset: Dataset
    batch_size: int = 64
    progress: bool = True

    def __call__(self, encoder: SentenceTransformer) -> dict[str, float]:
        encode = partial(encode_sentences, encoder, batch_size=self.batch_size, progress=self.progress)
        scores = evaluate_sts(encode, self.dataset)
        return {f"sts_{name}": scores[name] for name in LOGGED if name in scores}
