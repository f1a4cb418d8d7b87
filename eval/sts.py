"""Semantic textual similarity of one or several encoders: a Markdown table and, with --output, a JSON file.

    python eval/sts.py --model runs/bert-base-js --data_dir SentEval/data/downstream --split dev
    python eval/sts.py --model runs/js runs/kl bert-base-uncased --pooling cls --output results.json
    python eval/sts.py --model sentence-transformers/all-MiniLM-L6-v2 --file my_pairs.tsv

eval/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from fmicl_text.errors import InputError, one_line_errors
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.report import library_versions, markdown_table, write_json
from fmicl_text.evaluation.sts import STS_TASKS, evaluate_sts, load_pairs
from fmicl_text.model import LOADING_ERRORS, POOLINGS, quiet_loading, require_tokenizer, set_pooling


class OneLineParser(argparse.ArgumentParser):
    """ArgumentParser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_args() -> argparse.Namespace:
    """The command line, checked as far as it can be before anything is loaded."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("sts.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--model", nargs="+", required=True, metavar="M", help="folders or Hub names")
    parser.add_argument("--tasks", nargs="+", choices=STS_TASKS, help="default: all of these")
    parser.add_argument("--split", choices=("dev", "test"), help="default: test")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data_dir", type=Path, help="folder in SentEval's layout; default: the Hub's data sets")
    where.add_argument("--file", type=Path, help="graded pairs of your own: .tsv, .csv, .parquet")
    parser.add_argument("--pooling", choices=POOLINGS, help="default: what the model says, or mean")
    parser.add_argument("--batch_size", type=positive, default=64)
    parser.add_argument("--max_seq_length", type=positive, help="in tokens; default: what the model says")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.file and (args.tasks or args.split):
        parser.error("--file holds the pairs to score: leave out --tasks and --split")
    if args.output and (args.output.is_dir() or not args.output.parent.is_dir()):
        parser.error(f"--output {args.output}: name a file in a folder that exists")
    return args


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def open_model(name: str, pooling: str | None) -> SentenceTransformer:
    """The model in float32, on the GPU if there is one; a note on stderr where its pooling is not its own word."""
    if name.startswith((".", "~", "/")) and not Path(name).is_dir():
        raise InputError(f"--model {name}: no such folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with quiet_loading():
            model = SentenceTransformer(name, device=device, model_kwargs={"dtype": torch.float32})
    except LOADING_ERRORS as error:
        raise InputError(f"--model {name}: {str(error).strip().splitlines()[0]}") from error
    require_tokenizer(model, f"--model {name}")
    own = pooling_of(model)
    if pooling and own is None:
        raise InputError(f"--pooling {pooling}: {name} has no pooling layer")
    says_pooling = bool(model.module_kwargs)  # one entry per line of modules.json
    if pooling and pooling != own:
        set_pooling(model, pooling)
        if says_pooling:
            print(f"{name}: {pooling} pooling instead of its own, {own}", file=sys.stderr)
    elif not (says_pooling or pooling):
        print(f"{name}: says nothing of pooling, {own} is assumed (--pooling to choose)", file=sys.stderr)
    return model


def pooling_of(model: SentenceTransformer) -> Any:
    """cls, mean, ... (a tuple of these where they are joined); None without a pooling layer."""
    return next((module.pooling_mode for module in model if isinstance(module, Pooling)), None)


def hub_commit(model: SentenceTransformer) -> str | None:
    """The commit of a model from the Hub, as its snapshot folder in the cache is named; None for a folder."""
    name = getattr(model.transformers_model, "name_or_path", "")  # with the organisation that a short name leaves out
    cached = None if not name or Path(name).exists() else try_to_load_from_cache(name, "config.json")
    return Path(cached).parent.name if isinstance(cached, str) else None


def main() -> None:
    args = parse_args()
    jobs: list[tuple[str, str | None, str, Dataset]] = []  # task, split, source, pairs
    if args.file:
        jobs.append((args.file.name, None, str(args.file), load_pairs(args.file)))
    else:
        split = args.split or "test"
        for task in args.tasks or STS_TASKS:
            load, hub_dataset = STS_TASKS[task]
            jobs.append((task, split, str(args.data_dir or hub_dataset), load(split, args.data_dir)))
    models = [open_model(name, args.pooling) for name in args.model]
    results, table = [], []
    for name, model in zip(args.model, models, strict=True):
        model.max_seq_length = args.max_seq_length or model.max_seq_length
        setup = {
            "model": name,
            "commit": hub_commit(model),
            "pooling": pooling_of(model),
            "max_seq_length": model.max_seq_length,
            "precision": str(model.dtype).removeprefix("torch."),
            "similarity": "cosine",
            "aggregation": "all pairs",
            "versions": library_versions(),
        }
        for task, split_name, source, pairs in jobs:
            try:
                metrics = evaluate_sts(partial(encode_sentences, model, batch_size=args.batch_size), pairs)
            except InputError as error:
                raise InputError(f"--model {name}: {error}") from error
            results.append(setup | {"task": task, "split": split_name, "source": source, "metrics": metrics})
            shown = {key: metrics.get(key) for key in ("spearman", "pearson", "alignment", "uniformity")}
            table.append({"model": name, "task": task, "split": split_name, "pairs": len(pairs)} | shown)
    if args.output:
        write_json(args.output, results)
    print(markdown_table(table))


if __name__ == "__main__":
    with one_line_errors("sts.py"):
        main()
