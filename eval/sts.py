"""The seven STS tasks by SimCSE's protocol: a Markdown table, a row a model, and with --output a JSON file.

    python eval/sts.py --model runs/bert-base-js --data_dir SentEval/data/downstream
    python eval/sts.py --model js=runs/js-{1,2,3} kl=runs/kl-{1,2,3} bert-base-uncased --split dev --output r.json
    python eval/sts.py --model sentence-transformers/all-MiniLM-L6-v2 --file my_pairs.tsv

Models with the same NAME= are seeds of one run: one row, mean ± standard deviation. What cannot be scored is a line on
stderr and missing from the table; the rest is scored, and the exit status is 2. eval/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from fmicl_text.cli.checks import check_writable, whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoders import encoder_facts, open_encoder
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.report import library_versions, markdown_table, named_model, score_rows, write_json
from fmicl_text.evaluation.sts import load_pairs
from fmicl_text.evaluation.tasks import STS_TASKS, SentEvalFiles, evaluate_task, load_task
from fmicl_text.text.model import POOLINGS


def parse_args() -> argparse.Namespace:
    """The command line, checked as far as it can be before anything is loaded."""
    parser = ArgumentParser("sts.py", __doc__)
    parser.add_argument("--model", nargs="+", required=True, metavar="[NAME=]M", help="folders or Hub names")
    parser.add_argument("--tasks", nargs="+", choices=STS_TASKS, help="default: all that have the split")
    parser.add_argument("--split", choices=("train", "dev", "test"), help="default: test")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data_dir", type=Path, help="folder in SentEval's layout; default: SimCSE's, from the Hub")
    where.add_argument("--file", type=Path, help="graded pairs of your own: .tsv, .csv, .parquet")
    parser.add_argument("--pooling", choices=POOLINGS, help="default: what the model says, or mean")
    parser.add_argument("--strict", action="store_true", help="refuse a model that says nothing of its pooling")
    parser.add_argument("--revision", help="branch, tag or commit of the models, on the Hub")
    parser.add_argument("--sets", action="store_true", help="columns for each set of a year, and their two means")
    parser.add_argument("--batch_size", type=whole_number, default=64)
    parser.add_argument("--max_seq_length", type=whole_number, help="in tokens; default: what the model says")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    for flag, names in (("model", args.model), ("tasks", args.tasks or [])):
        if len(set(names)) < len(names):
            parser.error(f"--{flag}: the same {flag.removesuffix('s')} is named twice")
    if args.file and (args.tasks or args.split):
        parser.error("--file holds the pairs to score: leave out --tasks and --split")
    check_writable("--output", args.output)
    args.split = args.split or "test"
    args.tasks = args.tasks or [task for task, splits in STS_TASKS.items() if args.split in splits]
    return args


def say_missing(what: str, error: InputError) -> dict[str, str]:
    """Tell on stderr what could not be scored; the entry for the JSON file."""
    print(f"sts.py: missing: {what}{' '.join(str(error).split())}", file=sys.stderr)
    return {"missing": str(error)}


def load_jobs(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Dataset]]]]:
    """What is to be scored: {task, split, source, ...} and what loads its pairs."""
    if args.file:
        facts = {"protocol": "graded pairs", "task": args.file.name, "split": None, "source": str(args.file)}
        yield facts, lambda: {args.file.name: load_pairs(args.file)}
        return
    files = SentEvalFiles(args.data_dir)
    for task in args.tasks:
        facts = {"protocol": "SimCSE", "task": task, "split": args.split, "source": files.source}
        yield facts | {"source_commit": files.commit}, partial(load_task, task, args.split, files)


def main() -> None:
    args = parse_args()
    results: list[dict[str, Any]] = []
    jobs = []
    for facts, load in load_jobs(args):
        try:
            jobs.append((facts, load()))
        except InputError as error:
            results.append(facts | say_missing("", error))
    for name, path in map(named_model, args.model):
        try:
            encoder = open_encoder(path, args.pooling, args.revision, args.max_seq_length, args.strict)
        except InputError as error:
            results.append({"name": name, "model": path} | say_missing("", error))
            continue
        setup = {"name": name} | encoder_facts(path, encoder, args.pooling)
        setup |= {"similarity": "cosine", "aggregation": "all pairs", "versions": library_versions()}
        for facts, sets in jobs:
            try:
                metrics = evaluate_task(partial(encode_sentences, encoder, batch_size=args.batch_size), sets)
            except InputError as error:
                results.append(setup | facts | say_missing(f"--model {path}, {facts['task']}: ", error))
                continue
            results.append(setup | facts | {"metrics": metrics})
    scored = [result for result in results if "metrics" in result]
    if scored:
        if args.output:
            write_json(args.output, results)
        print(markdown_table(score_rows(scored, sets=args.sets)))
    if len(scored) < len(results):
        sys.exit(2)


if __name__ == "__main__":
    with cli_errors("sts.py"):
        main()
