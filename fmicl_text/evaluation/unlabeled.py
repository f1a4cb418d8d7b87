"""Evaluation without labels: a quarter of the words of a text finds it among all held-out texts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from datasets.fingerprint import Hasher
from numpy.typing import NDArray
from scipy.special import logsumexp
from sentence_transformers import SentenceTransformer
from torch import Tensor

from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.geometry import alignment, direction_shares, effective_rank, uniformity
from fmicl_text.losses.similarity import unit_rows
from fmicl_text.text.held_out import parts_of

BLOCK = 512  # rows of cosines at a time
GAMMAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
TIE = 1e-6  # cosines that differ by less are equal; embeddings of one text differ by up to this between batches


@dataclass
class UnlabeledEvaluator:
    """Scores an encoder without labels, on texts that are not trained on: each text is searched by a quarter of its
    words, drawn at random. In pairs, the second text is searched by the first.

    Calling it with a SentenceTransformer returns the metrics below, which the trainer logs as `eval_held_out_nats` and
    so on. The primary metric is the score without labels that agrees best with STS-B over encoders trained with good
    and bad settings (eval/README.md).

    - held_out_nats: mutual information of queries and texts, an estimate by the bound of Donsker and Varadhan with the
      log density ratio -gamma d^2 of their distance d: mean(-gamma d^2) of pairs - log mean e^(-gamma d^2) of others,
      at the gamma in `GAMMAS` where it is largest. With few texts it is too high: compare it on the same texts.
    - held_out_mrr: mean of 100/rank of the text, in (0, 100]; see `find_documents`.
    - held_out_recall@1: percent of the texts that are found first.
    - held_out_alignment, held_out_uniformity: of queries and texts, and of the texts; see `geometry`. Lower is better.
    - held_out_effective_rank: of the texts.

    Args:
        texts: N >= 2 texts of two words or more (characters, if written without spaces), or N pairs. Of longer tuples,
            only the first two texts are used.
        batch_size: Texts per forward pass.
        progress: Show a progress bar while encoding.
        max_seq_length: Tokens per query and document, at most the encoder's maximum, its default.
        prompts: Of queries, and of documents; a single one is for both. By default, the encoder's default prompt.

    Attributes:
        observations: After a call, [N, 1 + len(GAMMAS)] in float64: d^2 of every query and its text, and the log of
            the mean e^(-gamma d^2) of the query and the other texts, for each gamma.

    Raises:
        InputError: There are fewer than two texts, one is too short, or an option is not accepted.
    """

    texts: Sequence[str | Sequence[str]]
    batch_size: int = 64
    progress: bool = True
    max_seq_length: int | None = None
    prompts: Sequence[str] = ()
    primary_metric: ClassVar[str] = "held_out_nats"
    greater_is_better: ClassVar[bool] = True
    smallest_differences: ClassVar[dict[str, float]] = {  # for the verdict
        "held_out_nats": 0.01,
        "held_out_mrr": 0.1,
        "held_out_recall@1": 0.1,
    }

    def __post_init__(self) -> None:
        self.check_options()
        if isinstance(self.texts, str) or not isinstance(self.texts, Sequence):
            kind = type(self.texts).__name__
            raise InputError(f"texts must be a list of texts or pairs, or a column of a dataset; got {kind}")
        if len(self.texts) < 2:
            raise InputError(f"texts: at least 2 are needed, got {len(self.texts)}")
        rows = [(row,) if isinstance(row, str) else row for row in self.texts]
        for number, row in enumerate(rows):
            problem, is_row = "", isinstance(row, list | tuple)
            are_texts = is_row and all(isinstance(text, str) and text.strip() for text in row[:2])
            if not row or not are_texts or (len(row) == 1 and len(parts_of(row[0])[0]) < 2):
                problem = "a text of two words or more, or a pair of texts"
            elif len(row) != len(rows[0]):
                problem = "equally many texts per row"
            if problem:
                raise InputError(f"texts: expected {problem}, got {self.texts[number]!r:.80} at index {number}")
        self.queries = [some_words(row[0]) if len(row) == 1 else row[0] for row in rows]
        self.documents = [row[:2][-1] for row in rows]
        self.observations: NDArray[np.float64] = np.zeros((0, 1 + len(GAMMAS)))

    def check_options(self) -> None:
        """Raise `InputError` for an option that is not accepted."""
        for name, value in (("batch_size", self.batch_size), ("max_seq_length", self.max_seq_length)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be an integer of at least 1, got {value!r}")
        if isinstance(self.prompts, str) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise InputError(f"prompts must be a list of one or two texts, got {self.prompts!r}")

    def describe(self) -> dict[str, str]:
        """A hash of the evaluation data, which is compared when a run is resumed."""
        data = [self.queries, self.documents, self.max_seq_length, list(self.prompts)]
        return {"evaluation_data": Hasher.hash(data)}

    def metric_of(self, observations: NDArray[np.float64]) -> float:
        """The primary metric of some of the `observations` of a call."""
        pairs = -np.array(GAMMAS) * observations[:, 0].mean()
        others = logsumexp(observations[:, 1:], axis=0) - math.log(len(observations))
        return float((pairs - others).max()) if np.isfinite(others).all() else 0.0  # no two texts to compare

    def __call__(self, encoder: SentenceTransformer) -> dict[str, float]:
        x, y = self.embed(encoder)
        both = torch.cat([x, y])
        if num_bad := int((~both.isfinite().all(1) | ~both.any(1)).sum()):
            raise InputError(f"{num_bad} of {len(both)} embeddings contain NaN, infinity or only zeros")
        found = find_documents(x, y, self.queries, self.documents)
        self.observations = distances_to(x, y, self.queries, self.documents).numpy()
        return {
            "held_out_nats": self.metric_of(self.observations),
            "held_out_mrr": 100 * float(found.reciprocal_rank.mean()),
            "held_out_recall@1": 100 * float(found.first.mean()),
            "held_out_alignment": float(alignment(x, y)),
            "held_out_uniformity": float(uniformity(y)),
            "held_out_effective_rank": float(effective_rank(direction_shares(y))),
        }

    def embed(self, encoder: SentenceTransformer) -> tuple[Tensor, Tensor]:
        """Embeddings [N, D] of the queries and of the documents."""
        before = encoder.max_seq_length
        shorten = before != math.inf  # static embeddings have no maximum that can be set
        if shorten:
            encoder.max_seq_length = min(filter(None, (self.max_seq_length, before)), default=None)
        options: dict[str, Any] = {"batch_size": self.batch_size, "progress": self.progress}
        prompts = (self.prompts[0], self.prompts[:2][-1]) if self.prompts else (None, None)
        try:
            x, y = (
                encode_sentences(encoder, texts, prompt=prompt, **options)
                for texts, prompt in zip((self.queries, self.documents), prompts, strict=True)
            )
        finally:
            if shorten:
                encoder.max_seq_length = before
        return x, y


def some_words(text: str, share: float = 0.25) -> str:
    """A share of the words of a text, at least one, drawn at random: the same for the same text.

    >>> some_words("A dog runs in the park.")
    'A dog'
    """
    parts, space = parts_of(text)
    number = max(1, len(parts) - round((1 - share) * len(parts)))
    kept = sorted(random.Random(text).sample(range(len(parts)), number))
    return space.join(parts[i] for i in kept)


def halves(text: str) -> tuple[str, str]:
    """The first and the second half of a text; of an odd number of words, the second has one more."""
    parts, space = parts_of(text)
    middle = len(parts) // 2
    return space.join(parts[:middle]), space.join(parts[middle:])


class Found(NamedTuple):
    """How each query found its document, [N] each: 1/rank, and whether the rank is 1; expectations under ties."""

    reciprocal_rank: Tensor
    first: Tensor


def find_documents(
    queries: Tensor, documents: Tensor, query_texts: Sequence[str], document_texts: Sequence[str]
) -> Found:
    """Rank all documents by their cosine with each query, of which document i answers query i.

    Documents that tie with the right one are in random order, so that equal embeddings score no better than chance.
    Documents with the text of the right one, or of a query with the same text, are not ranked.

    Args:
        queries: Embeddings [N, D], finite, of nonzero norm.
        documents: Embeddings [N, D].
        query_texts: N texts.
        document_texts: N texts.
    """
    queries, documents = unit_rows(queries.double()), unit_rows(documents.double())
    ids = [torch.tensor(number_texts(texts)) for texts in (query_texts, document_texts)]
    harmonic = torch.tensor([0.0, *(1 / rank for rank in range(1, len(documents) + 1))], dtype=torch.float64).cumsum(0)
    found = []
    for rows in torch.arange(len(queries)).split(BLOCK):
        cosines = queries[rows] @ documents.T
        right = (queries[rows] * documents[rows]).sum(-1, keepdim=True)
        others = (ids[0][rows, None] != ids[0]) & (ids[1][rows, None] != ids[1])
        better = ((cosines > right + TIE) & others).sum(-1)
        tied = (((cosines - right).abs() <= TIE) & others).sum(-1) + 1
        found.append(torch.stack([(harmonic[better + tied] - harmonic[better]) / tied, (better == 0).double() / tied]))
    return Found(*torch.cat(found, dim=1))


def distances_to(
    queries: Tensor, documents: Tensor, query_texts: Sequence[str], document_texts: Sequence[str]
) -> Tensor:
    """The `observations` of `UnlabeledEvaluator`, [N, 1 + len(GAMMAS)]; arguments as for `find_documents`. A query
    without other documents has log 0."""
    queries, documents = unit_rows(queries.double()), unit_rows(documents.double())
    ids = [torch.tensor(number_texts(texts)) for texts in (query_texts, document_texts)]
    found = []
    for rows in torch.arange(len(queries)).split(BLOCK):
        squared = (2 - 2 * queries[rows] @ documents.T).clamp_min(0)
        others = (ids[0][rows, None] != ids[0]) & (ids[1][rows, None] != ids[1])
        own = (queries[rows] - documents[rows]).square().sum(-1)
        count = others.sum(-1).clamp_min(1).double()
        sums = [(-gamma * squared).masked_fill(~others, -torch.inf).logsumexp(-1) for gamma in GAMMAS]
        found.append(torch.stack([own, *(one - count.log() for one in sums)], dim=1))
    return torch.cat(found)


def number_texts(texts: Sequence[str]) -> list[int]:
    """Equal numbers for equal texts."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return [numbers[text] for text in texts]
