"""Texts that are not trained on, so that an encoder can be scored on them without labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from fmicl_text.errors import InputError

FEWEST = 100  # held-out rows, below which the noise of a score is larger than what training changes
SHARE = 10  # at most a tenth of the rows is held out
FEWEST_PARTS = 4  # words of a text that is held out: it is searched by a quarter of them
LONGEST_WORD = 15  # texts with longer words on average are written without spaces
CHUNK = 10_000

Row = tuple[str, ...]


@dataclass(frozen=True)
class HeldOut:
    """Rows that are not trained on.

    Attributes:
        rows: The texts of each row, one per column, in an order that depends on nothing but the texts.
        num_repeats: Number of rows that are not trained on either because they contain a text of `rows`; None if
            unknown, of a stream.
        reason: Why there are too few rows to hold out some.
    """

    rows: tuple[Row, ...] = ()
    num_repeats: int | None = None
    reason: str | None = None


def parts_of(text: str) -> tuple[list[str], str]:
    """The words of a text, or its characters if it is written without spaces, and what joins them.

    >>> parts_of("two words")
    (['two', 'words'], ' ')
    """
    words = text.split()
    if len(words) > 1 and sum(map(len, words)) <= LONGEST_WORD * len(words):
        return words, " "
    return list("".join(words)), ""


def hold_out(dataset: Any, columns: Sequence[str], limit: int, at_least: int = 1) -> tuple[Any, HeldOut]:
    """Hold out rows for evaluation: those with the smallest hashes of their texts, so that the choice does not depend
    on the order or the format of the data.

    Rows to train on that contain a held-out text, in any column, are dropped. Texts are compared in lower case and
    without repeated spaces. Only the first two columns of a row are evaluated.

    Args:
        dataset: Rows of non-empty texts: a `Dataset`, or an `IterableDataset`, whose first 10 * limit rows are read.
        columns: Its text columns.
        limit: Maximum number of rows to hold out, at most a tenth of the distinct rows.
        at_least: Minimum number of rows that must remain.

    Returns:
        The rows to train on, and those held out. With too few rows, all rows and the reason.

    Raises:
        InputError: See `check_limit`.
    """
    check_limit(limit)
    if not limit:
        return dataset, HeldOut()
    stream = isinstance(dataset, datasets.IterableDataset)
    sample = datasets.Dataset.from_list(list(dataset.take(SHARE * limit))) if stream else dataset
    hashes = np.concatenate([text_hashes(batch, columns) for batch in sample.iter(CHUNK)])
    keys, first = np.unique(hashes @ (2 * np.arange(len(columns), dtype=np.uint64) + 1), return_index=True)
    if len(keys) < SHARE * FEWEST:
        needed = f"{SHARE * FEWEST:,} distinct rows are needed to hold out {FEWEST} of them"
        return dataset, HeldOut(reason=f"{needed}, got {len(keys):,}")
    chosen = long_enough(sample, columns, first, min(limit, len(keys) // SHARE))
    if len(chosen) < FEWEST:
        return dataset, HeldOut(reason=f"{len(chosen)} texts have {FEWEST_PARTS} words or more, {FEWEST} are needed")
    known = np.unique(hashes[chosen][:, :2])
    kept = np.flatnonzero(~np.isin(hashes, known).any(axis=1))
    if len(kept) < max(at_least, len(sample) // 2):
        return dataset, HeldOut(reason=f"only {len(kept):,} of {len(sample):,} rows would remain to train on")
    rows = tuple(zip(*(sample.select(chosen)[name] for name in columns), strict=True))
    if stream:
        without = partial(without_texts, columns=tuple(columns), known=known)
        return dataset.filter(without, batched=True), HeldOut(rows)
    return dataset.select(kept), HeldOut(rows, len(sample) - len(kept) - len(rows))


def check_limit(limit: int) -> None:
    """Raise `InputError` unless a maximum number of rows to hold out is 0 or at least `FEWEST`."""
    if limit < 0 or 0 < limit < FEWEST:
        raise InputError(f"held_out must be 0 or at least {FEWEST}, got {limit}")


def text_hashes(batch: dict[str, list[str]], columns: Sequence[str]) -> NDArray[np.uint64]:
    """Hashes [B, C] of the texts of B rows, the same on every machine."""
    return np.array([[text_hash(text) for text in batch[name]] for name in columns], dtype=np.uint64).T


def text_hash(text: str) -> int:
    """A 64-bit hash of a text in lower case with single spaces."""
    normal = " ".join(text.lower().split()).encode()
    return int.from_bytes(hashlib.blake2b(normal, digest_size=8, person=b"held out").digest(), "little")


def long_enough(sample: Any, columns: Sequence[str], order: NDArray[Any], wanted: int) -> list[int]:
    """The first rows, in the given order, that can be evaluated: pairs, or texts of some words."""

    def found() -> Iterator[int]:
        for start in range(0, len(order), CHUNK):
            rows = order[start : start + CHUNK]
            for row, text in zip(rows.tolist(), sample.select(rows)[columns[0]], strict=True):
                if len(columns) > 1 or len(parts_of(text)[0]) >= FEWEST_PARTS:
                    yield row

    return [row for row, _ in zip(found(), range(wanted), strict=False)]


def without_texts(batch: dict[str, list[str]], columns: Sequence[str], known: NDArray[np.uint64]) -> list[bool]:
    """Which rows contain none of the texts with the hashes `known`."""
    hashes, held_out = text_hashes(batch, columns).tolist(), set(known.tolist())
    return [held_out.isdisjoint(row) for row in hashes]
