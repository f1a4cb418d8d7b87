"""Evaluate sentence encoders on the seven STS tasks with SimCSE's protocol, or on your own sentence pairs.

    python eval/sts.py --model runs/bert-base-js --data_dir SentEval/data/downstream
    python eval/sts.py --model js=runs/js-{1,2,3} kl=runs/kl-{1,2,3} bert-base-uncased --split dev --output r.json
    python eval/sts.py --model sentence-transformers/all-MiniLM-L6-v2 --file my_pairs.tsv

Prints a Markdown table with one row per model; --output also writes a JSON file. Models with the same NAME= are seeds
of one run and share a row with mean ± standard deviation. Anything that cannot be scored is reported on stderr and left
blank, everything else is still scored, and the exit status is 2. eval/README.md describes the protocol.
"""

from __future__ import annotations

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher

from fmicl_text.cli.checks import check_output, whole_number
from fmicl_text.cli.launched import launched_processes
from fmicl_text.cli.main import program_name
from fmicl_text.cli.parser import FLAGS, ArgumentParser, add_dashes, cli_errors
from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoders import encoder_metadata, open_encoder
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.report import library_versions, markdown_table, named_model, score_rows, write_json
from fmicl_text.evaluation.sharing import sum_of_processes
from fmicl_text.evaluation.sts import load_pairs
from fmicl_text.evaluation.tasks import STS_TASKS, SentEvalFiles, evaluate_task, load_task
from fmicl_text.text.model import POOLINGS
from fmicl_text.text.settings import log_encoding, set_prompt


def parse_args() -> argparse.Namespace:
    """Parse and validate the command line, before anything is loaded."""
    parser = ArgumentParser("sts.py", __doc__)
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="[NAME=]MODEL", help="encoders: folders or Hub IDs"
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=STS_TASKS, help="tasks to evaluate (default: all that have the split)"
    )
    parser.add_argument("--split", choices=("train", "dev", "test"), help="split of the tasks (default: test)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data_dir", type=Path, help="SentEval's data folder (default: downloaded from the Hub)")
    where.add_argument("--file", type=Path, help="your own pairs: sentence1, sentence2, score as .tsv, .csv, .parquet")
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="pooling (default: the model's own, else as in training: cls, or lasttoken for decoders)",
    )
    parser.add_argument("--prompt", help="put before every text: a text, the name of a prompt of the model, or none")
    parser.add_argument("--strict", action="store_true", help="fail if a model does not specify its pooling")
    parser.add_argument("--revision", help="branch, tag or commit of the models on the Hub")
    parser.add_argument("--sets", action="store_true", help="add columns for the subsets of each task, and their means")
    parser.add_argument("--batch_size", type=whole_number, default=64, help="sentences per forward pass (default: 64)")
    parser.add_argument("--max_seq_length", type=whole_number, help="maximum tokens per text (default: the model's)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    for flag, names in (("model", args.model), ("tasks", args.tasks or [])):
        if len(set(names)) < len(names):
            parser.error(f"--{flag}: the same {flag.removesuffix('s')} is given twice")
    if args.file and (args.tasks or args.split):
        parser.error("--file cannot be combined with --tasks or --split")
    check_output("--output", args.output, args.file, args.data_dir)
    args.split = args.split or "test"
    args.tasks = args.tasks or [task for task, splits in STS_TASKS.items() if args.split in splits]
    return args


def report_missing(error: InputError, source: str = "") -> dict[str, str]:
    """Report a missing score on stderr, and return its entry for the JSON file."""
    message = add_dashes(" ".join(str(error).split()), FLAGS)
    print(f"{program_name('sts.py')}: missing: {source}{message}", file=sys.stderr)
    return {"missing": message}


def load_jobs(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Dataset]]]]:
    """Yield for each task {task, split, source, ...} and a function that loads its pairs."""
    if args.file:
        task = {"protocol": "STS pairs", "task": args.file.name, "split": None, "source": str(args.file)}
        yield task, lambda: {args.file.name: load_pairs(args.file)}
        return
    files = SentEvalFiles(args.data_dir)
    for name in args.tasks:
        task = {"protocol": "SimCSE", "task": name, "split": args.split, "source": files.source}
        yield task | {"source_commit": files.commit}, partial(load_task, name, args.split, files)


def main(writes: bool = True) -> None:
    args = parse_args()
    results: list[dict[str, Any]] = []
    jobs = []
    for task, load in load_jobs(args):
        try:
            sets = load()
            jobs.append((task | {"evaluation_data": Hasher.hash([pairs.to_dict() for pairs in sets.values()])}, sets))
        except InputError as error:
            results.append(task | report_missing(error))
    for name, path in map(named_model, args.model):
        try:
            encoder = open_encoder(path, args.pooling, args.revision, args.max_seq_length, args.strict)
        except InputError as error:
            results.append({"name": name, "model": path} | report_missing(error))
            continue
        if args.prompt is not None:
            set_prompt(encoder, args.prompt)
        setup = {"name": name} | encoder_metadata(path, encoder, args.pooling)
        setup |= {"similarity": "cosine", "aggregation": "all pairs", "versions": library_versions()}
        for task, sets in jobs:
            try:
                with log_encoding(encoder) as encoded:
                    metrics = evaluate_task(partial(encode_sentences, encoder, batch_size=args.batch_size), sets)
                encoded.num_texts, encoded.num_truncated = sum_of_processes(encoded.num_texts, encoded.num_truncated)
            except InputError as error:
                results.append(setup | task | report_missing(error, f"--model {path}, {task['task']}: "))
                continue
            if truncation := encoded.truncation():
                print(f"{program_name('sts.py')}: {path}, {task['task']}: {truncation}", file=sys.stderr)
            results.append(setup | task | encoded.describe() | {"metrics": metrics})
    scored = [result for result in results if "metrics" in result]
    if scored:
        if args.output and writes:
            write_json(args.output, results)
        print(markdown_table(score_rows(scored, sets=args.sets)))
    if len(scored) < len(results):
        sys.exit(2)


if __name__ == "__main__":
    with launched_processes() as is_first, cli_errors("sts.py"):
        main(writes=is_first)
