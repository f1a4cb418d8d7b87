"""Information retrieval: a folder in BEIR's format as an evaluator of sentence-transformers."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets.fingerprint import Hasher
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from fmicl_text.errors import InputError
from fmicl_text.files import check_regular

HEADER = ["query-id", "corpus-id", "score"]


class RetrievalEvaluator(InformationRetrievalEvaluator):
    """sentence-transformers' evaluator of search, whose data is compared when a run is resumed. `encode_query` and
    `encode_document` apply the encoder's prompts of these names. Its `primary_metric` is the NDCG of the first ten
    documents, in [0, 1], with the encoder's similarity: `cosine_ndcg@10`.

    Attributes:
        observations: Of the last call: the NDCG of every query, [N].
    """

    observations: np.ndarray | None = None
    items = "queries"

    def describe(self) -> dict[str, str]:
        """A hash of queries, documents and their relevance."""
        relevant = {query: sorted(documents) for query, documents in self.relevant_docs.items()}
        return {"evaluation_data": Hasher.hash([self.queries, self.corpus_ids, self.corpus, relevant])}

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {name: float(value) for name, value in super().__call__(*args, **kwargs).items()}

    def compute_metrics(self, queries_result_list: Any) -> Any:
        """As in the base class, which keeps only the means over the queries."""
        self.observations = np.array(list(map(self.ndcg_of, self.queries_ids, queries_result_list)), dtype=float)
        return super().compute_metrics(queries_result_list)

    def ndcg_of(self, query: str, hits: list[dict[str, Any]]) -> float:
        """The NDCG of the documents that were found for a query, {corpus_id, score} each."""
        k, relevant = max(self.ndcg_at_k), self.relevant_docs[query]
        ranked = sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))[:k]
        found = [float(hit["corpus_id"] in relevant) for hit in ranked]
        return float(self.compute_dcg_at_k(found, k) / self.compute_dcg_at_k([1.0] * len(relevant), k))

    @staticmethod
    def metric_of(observations: np.ndarray) -> float:
        """The primary metric of some of the queries; see `bootstrap_difference`."""
        return float(observations.mean())


def load_retrieval(folder: Path, batch_size: int = 64, progress: bool = True) -> RetrievalEvaluator:
    """Load queries, documents and their relevance from a folder in BEIR's format.

    Args:
        folder: Contains queries.jsonl with {_id, text}, corpus.jsonl with {_id, text, title (optional, put before the
            text)}, and qrels.tsv, or qrels/dev.tsv, with the columns query-id, corpus-id and score; a document is
            relevant if its score is above 0. Queries without a relevant document are not used.
        batch_size: Texts per forward pass.
        progress: Show progress bars.

    Raises:
        InputError: A file is missing or invalid. The message names the line.
    """
    texts: list[dict[str, Any]] = [texts_by_id(folder / f"{name}.jsonl") for name in ("queries", "corpus")]
    queries, corpus = texts
    path = next((path for path in (folder / "qrels.tsv", folder / "qrels" / "dev.tsv") if path.is_file()), None)
    if path is None:
        raise InputError(f"{folder}: expected qrels.tsv or qrels/dev.tsv")
    relevant: dict[str, set[str]] = {}
    for number, line in lines_of(path):
        cells = line.split("\t")
        if number == 1 and cells == HEADER:
            continue
        if len(cells) != 3 or not cells[2].strip().removeprefix("-").isdecimal():
            raise InputError(
                f"{path}, line {number}: expected query-id, corpus-id and an integer score, got {line!r:.80}"
            )
        for known, name, file in ((queries, cells[0], "queries.jsonl"), (corpus, cells[1], "corpus.jsonl")):
            if name not in known:
                raise InputError(f"{path}, line {number}: {name!r} is not in {file}")
        if not cells[2].strip().startswith("-") and any(map(unicodedata.digit, cells[2].strip())):
            relevant.setdefault(cells[0], set()).add(cells[1])
    if not relevant:
        raise InputError(f"{path}: no query has a relevant document")
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": progress, "write_csv": False}
    return RetrievalEvaluator(queries, corpus, relevant, **options)


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file that are not blank, with their numbers."""
    check_regular(path, str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    lines = [line.rstrip("\r") for line in text.split("\n")]
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def texts_by_id(path: Path) -> dict[str, str]:
    """Texts of a .jsonl file by `_id`."""
    found: dict[str, str] = {}
    for number, line in lines_of(path):
        try:
            row = json.loads(line)
            name, text = row["_id"], f"{row.get('title') or ''} {row['text']}".strip()
            text.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: expected a JSON object with _id and text ({error})") from error
        if not isinstance(name, str) or not isinstance(row["text"], str):
            raise InputError(f"{path}, line {number}: _id and text must be strings")
        if not text and path.name == "queries.jsonl":  # some corpora of BEIR have blank documents
            raise InputError(f"{path}, line {number}: the text is blank")
        if name in found:
            raise InputError(f"{path}, line {number}: the _id {name!r} occurs twice")
        found[name] = text
    if not found:
        raise InputError(f"{path} is empty")
    return found
