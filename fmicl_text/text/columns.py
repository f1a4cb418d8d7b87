"""Which columns of a table are trained on: one text, a pair, or a pair with hard negatives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from fmicl_text.errors import InputError

STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
DIGITS = "digits"  # the kind of a CSV column in which every cell is a number; it is text if it is selected by name
_PAIRS = (("sent0", "sent1"), ("sentence1", "sentence2"), ("premise", "hypothesis"))
_FIRST, _SECOND = ("anchor", "query", "question"), ("positive", "passage", "answer", "document", "response")
_NEGATIVE = re.compile(r"(hard_negatives?|hard_neg|negatives?|neg)(?:_?(\d+))?")
_RATED = re.compile(
    r"is_.*|(.*_)?(label|score|similarity|relevance|relatedness|rating|gold|class|duplicate|paraphrase|entailment|"
    r"judge?ment|quality|correct|relevant)s?"
)
_NOT_TEXT = re.compile(r"id|idx|index|(pos|positive)s?(_?\d+)?")
_SENTENCE = re.compile(r"\s*(\S+\s+){8,}\S+.*|\s*(\S+\s+){2,}\S+[.!?]\s*", re.DOTALL)  # a text, not a name
_UNNAMED = re.compile(r"\s*|unnamed: ?\d+", re.IGNORECASE)  # the index that pandas writes


def text_columns(
    dataset: datasets.Dataset | datasets.IterableDataset,
    names: Sequence[str] | None = None,
    source: str = "train_dataset",
) -> tuple[str, ...]:
    """The columns to train on: one (dropout positives), two (positive pairs) or more (pairs with hard negatives).

    The first rule that applies is used: `names`; a pair (sent0, sent1; anchor, query or question with positive,
    passage, answer, document or response; sentence1, sentence2; premise, hypothesis), followed by its negatives
    (negative, hard_neg, or negative_1 ... negative_n) in the order of their numbers; text; sentence; the only column;
    the two or three columns of a dataset in which all columns are strings, in their order, as in sentence-transformers.
    Upper case is ignored. Other columns are not read.

    Args:
        dataset: Its columns are the candidates.
        names: The columns to train on. None applies the other rules.
        source: Name of the dataset in messages.

    Raises:
        InputError: There are no columns, none of the rules applies, the pairs have labels or scores and may not all be
            positive, or a selected column does not contain strings.
    """
    return select_columns({name: _kind(feature) for name, feature in features_of(dataset).items()}, names, source)


def features_of(dataset: Any) -> datasets.Features:
    """The columns and their types, from the first row if a streamed dataset does not declare them."""
    if dataset.features is not None:
        return dataset.features
    first = next(dataset.with_format("arrow").iter(batch_size=1), None)
    return datasets.Features() if first is None else datasets.Features.from_arrow_schema(first.schema)


def _kind(feature: Any) -> str:
    """The type of a column: string, int64, List, ..."""
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def select_columns(kinds: Mapping[str, str], names: Sequence[str] | None, source: str) -> tuple[str, ...]:
    """The rules of `text_columns`.

    Args:
        kinds: The type of each column: one of `STRINGS`, `DIGITS`, null, or another one, which is not accepted.
        names: The columns to train on, or None.
        source: Name of the data in messages.
    """
    if not kinds:
        raise no_text(source)
    columns = _named(kinds, names, source) if names is not None else _recognized(kinds, source)
    for name in columns:
        if (kind := kinds[name]) not in (*STRINGS, DIGITS, "null"):
            hint = "; write one text per column, such as negative_1 and negative_2" if "list" in kind.lower() else ""
            raise InputError(f"{source}: column {name!r} must contain strings, got {kind}{hint}")
    return columns


def _named(kinds: Mapping[str, str], names: Sequence[str], source: str) -> tuple[str, ...]:
    columns = (names,) if isinstance(names, str) else tuple(names)
    if not columns or len(set(columns)) < len(columns):
        raise InputError(f"text_columns must be one or more different columns, got {list(columns)}")
    if missing := [name for name in columns if name not in kinds]:
        raise InputError(f"{source} has no column {missing[0]!r} (text_columns); its columns are {list(kinds)}")
    return columns


def _recognized(kinds: Mapping[str, str], source: str) -> tuple[str, ...]:
    found = list(kinds)
    spelled = {name.strip().lower(): name for name in reversed(found)} | {name: name for name in found}
    if pair := _pair(kinds, spelled, source):
        return (*(spelled[name] for name in pair), *_negatives(spelled, source))
    for name in ("text", "sentence"):
        if name in spelled:
            return (spelled[name],)
    texts = [name for name in found if not _UNNAMED.fullmatch(name)]
    lost = [name for name in found[1:] if name not in texts and kinds[name] in STRINGS]  # not the index, but text
    if len(found) == 1 or (len(texts) == 1 and not lost):
        return _names((texts or found)[:1], source)
    not_text = [
        name for name in texts if any(p.fullmatch(name.strip().lower()) for p in (_NEGATIVE, _RATED, _NOT_TEXT))
    ]
    if len(texts) <= 3 and not (not_text or lost) and all(kinds[name] in STRINGS for name in texts):
        return _names(texts, source)
    raise InputError(
        f"{source} has the columns {found}: select one, two (pairs) or more (pairs with hard negatives) with "
        "text_columns"
    )


def _names(columns: Sequence[str], source: str) -> tuple[str, ...]:
    """The columns, if their names are not texts, which are the first row of a file without a header."""
    if texts := [name for name in columns if _SENTENCE.fullmatch(name)]:
        raise InputError(
            f"{source} has the column {texts[0][:80]!r}, which seems to be a text: write the names of the columns in "
            "the first line, or select columns with text_columns"
        )
    return tuple(columns)


def _pair(kinds: Mapping[str, str], spelled: Mapping[str, str], source: str) -> tuple[str, str] | None:
    """The recognized names of a pair."""
    first, second = ([name for name in names if name in spelled] for names in (_FIRST, _SECOND))
    pairs = [pair for pair in _PAIRS if set(pair) <= set(spelled)]
    pairs += [(one, other) for one in first for other in second]
    if len(pairs) > 1:
        choices = ", or ".join(" ".join(pair) for pair in pairs)
        raise InputError(f"{source} has several pairs of columns: select one with text_columns, such as {choices}")
    if not pairs:
        return None
    pair = pairs[0]
    rated = [
        name
        for key, name in spelled.items()
        if _RATED.fullmatch(key) or kinds[name] in ("bool", "ClassLabel") or (key == "target" and kinds[name] == DIGITS)
    ]
    if rated and pair[1] not in ("sent1", "positive"):
        raise InputError(
            f"{source} has the column {rated[0]!r}, so that its pairs may not all be positive: keep those that are, "
            f"and pass text_columns={' '.join(spelled[name] for name in pair)}"
        )
    return pair


def _negatives(spelled: Mapping[str, str], source: str) -> list[str]:
    """The columns of hard negatives, in the order of their numbers."""
    found = {name: match for key, name in spelled.items() if (match := _NEGATIVE.fullmatch(key))}
    if len({match[1] for match in found.values()}) > 1:
        raise InputError(f"{source} has several kinds of negatives, {sorted(found)}: select columns with text_columns")
    return sorted(found, key=lambda name: int(found[name][2] or 0))


def no_text(source: str) -> InputError:
    """The error for data without text."""
    return InputError(f"{source} contains no text: it is empty or all its rows are blank")
