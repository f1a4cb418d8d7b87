"""An encoder on MTEB's own tasks: its STS tasks unless others are named. Needs pip install 'fmicl_text[mteb]'.

    python eval/mteb_sts.py --model runs/bert-base-js
    python eval/mteb_sts.py --model js=runs/js-{1,2,3} --tasks STS16 Banking77Classification --output mteb.json

MTEB's numbers are not those of eval/sts.py: raw sentences, and a SICK-R of 9,927 pairs. MTEB's result cache, which
takes two local checkpoints for one model, is never used. What cannot be scored is a line on stderr, and the exit status
is 2.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from fmicl_text.errors import InputError, OneLineParser, check_writable, one_line_errors, whole_number
from fmicl_text.evaluation.encoders import encoder_facts, open_encoder
from fmicl_text.evaluation.report import library_versions, markdown_table, named_model, score_rows, write_json
from fmicl_text.model import POOLINGS

STS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICK-R")


def parse_args() -> argparse.Namespace:
    """The command line, checked as far as it can be before anything is loaded."""
    parser = OneLineParser("mteb_sts.py", __doc__)
    parser.add_argument("--model", nargs="+", required=True, metavar="[NAME=]M", help="folders or Hub names")
    parser.add_argument("--tasks", nargs="+", default=STS, metavar="T", help=f"default: {' '.join(STS)}")
    parser.add_argument("--split", help="default: what MTEB evaluates, for most tasks test")
    parser.add_argument("--pooling", choices=POOLINGS, help="default: what the model says, or mean")
    parser.add_argument("--strict", action="store_true", help="refuse a model that says nothing of its pooling")
    parser.add_argument("--revision", help="branch, tag or commit of the models, on the Hub")
    parser.add_argument("--batch_size", type=whole_number, default=64)
    parser.add_argument("--max_seq_length", type=whole_number, help="in tokens; default: what the model says")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if len(set(args.model)) < len(args.model):
        parser.error("--model: the same model is named twice")
    check_writable("--output", args.output)
    return args


def load_tasks(names: list[str], split: str | None) -> list[Any]:
    """MTEB's tasks of these names.

    Raises:
        InputError: MTEB is not installed, or has no task of a name.
    """
    try:
        import mteb
    except ImportError as error:
        raise InputError("MTEB is not installed: pip install 'fmicl_text[mteb]'") from error
    logging.getLogger("mteb").setLevel(logging.CRITICAL)  # what fails is said here, in a line
    try:
        return [mteb.get_task(name, eval_splits=[split] if split else None) for name in names]
    except KeyError as error:
        raise InputError(f"--tasks: {error.args[0].removeprefix('KeyError: ')}") from error


def evaluate(encoder: SentenceTransformer, task: Any, batch_size: int) -> Iterator[dict[str, Any]]:
    """Entries for the JSON file: one for each split and subset, or one that says why there is none."""
    import mteb

    facts = {"protocol": f"MTEB {mteb.__version__}", "task": task.metadata.name}
    facts |= {"source": task.metadata.dataset["path"], "source_commit": task.metadata.dataset["revision"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # superseded tasks, its use of names that sentence-transformers has changed
        found = mteb.evaluate(
            encoder,
            task,
            cache=None,
            raise_error=False,
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
        )
    for failed in found.exceptions or []:
        yield facts | {"missing": " ".join(str(failed.exception).split())}
    for result in found.task_results:
        for split, subsets in result.scores.items():
            for scores in subsets:
                where = {"split": split, "subset": scores["hf_subset"]}
                if math.isfinite(scores["main_score"]):
                    yield facts | where | {"metrics": metrics_of(scores, task.metadata.main_score)}
                else:
                    yield facts | where | {"missing": f"{task.metadata.main_score} is {scores['main_score']}"}


def metrics_of(scores: Mapping[str, Any], main_score: str) -> dict[str, Any]:
    """MTEB's scores, and the main one as a percentage: as spearman where it is the cosine's rank correlation."""
    if main_score == "cosine_spearman":
        return {"spearman": 100 * scores["cosine_spearman"], "pearson": 100 * scores["cosine_pearson"], "mteb": scores}
    return {"main_score": 100 * scores["main_score"], "main_score_name": main_score, "mteb": scores}


def main() -> None:
    args = parse_args()
    tasks = load_tasks(args.tasks, args.split)
    results: list[dict[str, Any]] = []
    for name, path in map(named_model, args.model):
        try:
            encoder = open_encoder(path, args.pooling, args.revision, args.max_seq_length, args.strict)
        except InputError as error:
            results.append({"name": name, "model": path, "missing": str(error)})
            print(f"mteb_sts.py: missing: {error}", file=sys.stderr)
            continue
        setup = {"name": name} | encoder_facts(path, encoder, args.pooling) | {"versions": library_versions()}
        for task in tasks:
            for entry in evaluate(encoder, task, args.batch_size):
                results.append(setup | entry)
                if "missing" in entry:
                    print(f"mteb_sts.py: missing: {path}, {task.metadata.name}: {entry['missing']}", file=sys.stderr)
    scored = [result for result in results if "metrics" in result]
    if scored:
        if args.output:
            write_json(args.output, results)
        print(markdown_table(score_rows(scored)))
    if len(scored) < len(results):
        sys.exit(2)


if __name__ == "__main__":
    with one_line_errors("mteb_sts.py"):
        main()
