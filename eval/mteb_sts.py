"""Evaluate sentence encoders on tasks of MTEB, by default its STS tasks.

    python eval/mteb_sts.py --model runs/bert-base-js
    python eval/mteb_sts.py --model js=runs/js-{1,2,3} --tasks STS16 Banking77Classification --output mteb.json

Requires pip install 'fmicl_text[mteb]'. Scores are not comparable with those of eval/sts.py: MTEB uses raw sentences,
and 9,927 pairs for SICK-R. The result cache of MTEB cannot tell two local checkpoints apart, so it is off by default;
--cache uses a key that is unique to each encoder. Anything that cannot be scored is reported on stderr, everything else
is still scored, and the exit status is 2.
"""

from __future__ import annotations

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split

import argparse
import hashlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sentence_transformers import SentenceTransformer

from fmicl_text.cli.checks import check_output, whole_number
from fmicl_text.cli.parser import FLAGS, ArgumentParser, add_dashes, cli_errors
from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoders import encoder_metadata, open_encoder
from fmicl_text.evaluation.report import library_versions, markdown_table, named_model, score_rows, write_json
from fmicl_text.loading import quiet_loading
from fmicl_text.text.model import POOLINGS
from fmicl_text.text.settings import log_encoding, set_prompt

STS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICK-R")


def parse_args() -> argparse.Namespace:
    """Parse and validate the command line, before anything is loaded."""
    parser = ArgumentParser("mteb_sts.py", __doc__)
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="[NAME=]MODEL", help="encoders: folders or Hub IDs"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=STS, metavar="TASK", help=f"tasks of MTEB (default: {' '.join(STS)})"
    )
    parser.add_argument("--split", help="split, named as in MTEB (default: the task's own, mostly test)")
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="pooling (default: the model's own, else as in training: cls, or lasttoken for decoders)",
    )
    parser.add_argument("--prompt", help="put before every text: a text, the name of a prompt of the model, or none")
    parser.add_argument("--strict", action="store_true", help="fail if a model does not specify its pooling")
    parser.add_argument("--revision", help="branch, tag or commit of the models on the Hub")
    parser.add_argument("--batch_size", type=whole_number, default=64, help="texts per forward pass (default: 64)")
    parser.add_argument("--max_seq_length", type=whole_number, help="maximum tokens per text (default: the model's)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder in which results are cached and reused")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    for flag in ("model", "tasks"):
        if len(set(getattr(args, flag))) < len(getattr(args, flag)):
            parser.error(f"--{flag}: the same {flag.removesuffix('s')} is given twice")
    if args.cache and args.cache.is_file():
        parser.error(f"--cache {args.cache}: expected a folder, got a file")
    check_output("--output", args.output, args.cache)
    return args


def load_tasks(names: list[str], split: str | None) -> list[Any]:
    """Tasks of MTEB by name. Their data is loaded later.

    Raises:
        InputError: MTEB is not installed, or has no task with one of the names.
    """
    try:
        import mteb
    except ImportError as error:
        raise InputError("MTEB is not installed: pip install 'fmicl_text[mteb]'") from error
    except OSError as error:
        raise InputError(f"MTEB cannot create its folder ({error}); set MTEB_CACHE to another") from error
    logging.getLogger("mteb").setLevel(logging.CRITICAL)  # failures are reported here, in one line
    warnings.filterwarnings("ignore", module="mteb")  # about superseded tasks and deprecated methods
    try:
        return [mteb.get_task(name, eval_splits=[split] if split else None) for name in names]
    except KeyError as error:
        raise InputError(f"--tasks: {error.args[0].removeprefix('KeyError: ')}") from error


def with_cache_key(encoder: SentenceTransformer, path: str) -> Any:
    """The encoder wrapped for MTEB, with a unique name and revision as cache key. By default these would be the base
    model's, or none. The revision is a hash of the saved encoder, including --pooling and --max_seq_length, and of
    MTEB's version, because MTEB reuses results of other versions of itself and of the data.
    """
    import mteb
    from mteb.models import SentenceTransformerEncoderWrapper

    digest = hashlib.sha256(mteb.__version__.encode())
    with TemporaryDirectory() as saved, quiet_loading():
        encoder.save_pretrained(saved, create_model_card=False)
        for file in sorted(file for file in Path(saved).rglob("*") if file.is_file()):
            with file.open("rb") as content:
                digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    folder = Path(path).expanduser()
    name = "/".join(folder.resolve().parts[-2:]) if folder.is_dir() else path
    wrapped = SentenceTransformerEncoderWrapper(encoder)
    key = {"name": name, "revision": digest.hexdigest()}
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=key)
    return wrapped


def evaluate(model: Any, task: Any, batch_size: int, cache: Path | None) -> Iterator[dict[str, Any]]:
    """Yield an entry for the JSON file per split and subset, or one with the reason why the task has no score."""
    import mteb

    entry = {"protocol": f"MTEB {mteb.__version__}", "task": task.metadata.name}
    entry |= {"source": task.metadata.dataset["path"], "source_commit": task.metadata.dataset["revision"]}
    try:
        found = mteb.evaluate(
            model,
            task,
            cache=mteb.ResultCache(cache) if cache else None,
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": True},
        )
        if found.exceptions:  # a private dataset
            raise OSError(found.exceptions[0].exception)
        (result,) = found.task_results
        scored = {split: result.scores[split] for split in task.eval_splits}  # a cached result may contain others
    except Exception as error:  # tasks run their own code, may lack their data or not support the model
        yield entry | {"missing": reason(error, task)}
        return
    for split, subsets in scored.items():
        for scores in subsets:
            where = entry | {"split": split, "subset": scores["hf_subset"]}
            if math.isfinite(scores["main_score"]):
                yield where | score_entry(scores, task.metadata.main_score)
            else:
                yield where | {"missing": f"{task.metadata.main_score} is {scores['main_score']}"}


def reason(error: Exception, task: Any) -> str:
    """The reason why a task has no score, in one line."""
    if isinstance(error, KeyError) and str(error) in map(repr, task.eval_splits):
        return f"its data has no split {error}"
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def score_entry(scores: Mapping[str, Any], main_score: str) -> dict[str, Any]:
    """Metrics of MTEB, and the main score times 100, as `spearman` if it is the rank correlation of the cosine."""
    if main_score != "cosine_spearman":
        return {"metrics": {"main_score": 100 * scores["main_score"], "main_score_name": main_score, "mteb": scores}}
    metrics = {"spearman": 100 * scores["cosine_spearman"], "pearson": 100 * scores["cosine_pearson"], "mteb": scores}
    return {"similarity": "cosine", "aggregation": "all pairs", "metrics": metrics}


def main() -> None:
    args = parse_args()
    tasks = load_tasks(args.tasks, args.split)
    results: list[dict[str, Any]] = []
    for name, path in map(named_model, args.model):
        try:
            encoder = open_encoder(path, args.pooling, args.revision, args.max_seq_length, args.strict)
        except InputError as error:
            message = add_dashes(" ".join(str(error).split()), FLAGS)
            results.append({"name": name, "model": path, "missing": message})
            print(f"mteb_sts.py: missing: {message}", file=sys.stderr)
            continue
        if args.prompt is not None:
            set_prompt(encoder, args.prompt)
        setup = {"name": name} | encoder_metadata(path, encoder, args.pooling) | {"versions": library_versions()}
        model = with_cache_key(encoder, path) if args.cache else encoder
        for task in tasks:
            with log_encoding(encoder) as encoded:
                entries = list(evaluate(model, task, args.batch_size, args.cache))
            if truncation := encoded.truncation():
                print(f"mteb_sts.py: {path}, {task.metadata.name}: {truncation}", file=sys.stderr)
            for entry in entries:
                results.append(setup | {"from_cache": not encoded.num_texts} | encoded.describe() | entry)
                if "missing" in entry:
                    source = f"--model {path}, {task.metadata.name}"
                    print(f"mteb_sts.py: missing: {source}: {entry['missing']}", file=sys.stderr)
    scored = [result for result in results if "metrics" in result]
    if scored:
        if args.output:
            write_json(args.output, results)
        print(markdown_table(score_rows(scored)))
    if len(scored) < len(results):
        sys.exit(2)


if __name__ == "__main__":
    with cli_errors("mteb_sts.py"):
        main()
