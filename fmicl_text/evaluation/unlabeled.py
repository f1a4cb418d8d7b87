"""Evaluation without labels: the two halves of a held-out text, or its two columns, find each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmicl_text.losses.similarity import unit_rows
from fmicl_text.text.held_out import parts_of

BLOCK = 512  # rows of cosines at a time
TIE = 1e-6  # cosines that differ by less are equal; embeddings of one text differ by up to this between batches


def halves(text: str) -> tuple[str, str]:
    """The first and the second half of a text; of an odd number of words, the second has one more.

    >>> halves("A dog runs in the park.")
    ('A dog runs', 'in the park.')
    """
    parts, space = parts_of(text)
    middle = len(parts) // 2
    return space.join(parts[:middle]), space.join(parts[middle:])


def alternate_words(text: str) -> tuple[str, str]:
    """The words at odd and at even positions.

    >>> alternate_words("A dog runs in the park.")
    ('A runs the', 'dog in park.')
    """
    parts, space = parts_of(text)
    return space.join(parts[::2]), space.join(parts[1::2])


def random_crop(text: str, share: float = 0.5) -> str:
    """A random span of a share of the words. The same for the same text."""
    parts, space = parts_of(text)
    length = max(1, round(share * len(parts)))
    start = random.Random(text).randint(0, len(parts) - length)
    return space.join(parts[start : start + length])


def delete_words(text: str, share: float = 0.5) -> str:
    """The text without a random share of its words. The same for the same text."""
    parts, space = parts_of(text)
    kept = sorted(random.Random(text).sample(range(len(parts)), max(1, len(parts) - round(share * len(parts)))))
    return space.join(parts[i] for i in kept)


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
    harmonic = torch.cat([torch.zeros(1), (1 / torch.arange(1, len(documents) + 1)).cumsum(0)]).double()
    found = []
    for rows in torch.arange(len(queries)).split(BLOCK):
        cosines = queries[rows] @ documents.T
        right = (queries[rows] * documents[rows]).sum(-1, keepdim=True)
        others = (ids[0][rows, None] != ids[0]) & (ids[1][rows, None] != ids[1])
        better = ((cosines > right + TIE) & others).sum(-1)
        tied = (((cosines - right).abs() <= TIE) & others).sum(-1) + 1
        found.append(torch.stack([(harmonic[better + tied] - harmonic[better]) / tied, (better == 0) / tied]))
    return Found(*torch.cat(found, dim=1))


def number_texts(texts: Sequence[str]) -> list[int]:
    """Equal numbers for equal texts."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return [numbers[text] for text in texts]
