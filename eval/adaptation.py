"""Adapt an encoder to documentation: make the corpus, train other methods for the same time, and score all of them.

    python eval/adaptation.py corpus --folder docs             # from the documentation of the packages installed here
    fmicl-text train --config adapt --model_name_or_path MODEL --train_file docs/train.jsonl --output_dir runs/adapt-1
    python eval/adaptation.py peer --folder docs --method tsdae --model MODEL --cpu_seconds 300 --output runs/tsdae-1
    python eval/adaptation.py score --folder docs --model before=MODEL adapt=runs/adapt-{1,2,3} --sts_dev_file DEV.tsv

The corpus has paragraphs of prose from .rst and .md files, descriptions and docstrings, with the package as label. The
scores are the k-NN accuracy of packages on paragraphs of files that training does not see, search of the second half of
such a paragraph by the first, and STS-B dev. The peers are
TSDAE and SimCSE of sentence-transformers, stopped after a given CPU time of the process. eval/README.md describes the
protocol.
"""

from __future__ import annotations

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split

import argparse
import ast
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import blake2b
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import DenoisingAutoEncoderLoss, MultipleNegativesRankingLoss
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

from fmicl_text.cli.checks import check_output, positive_number, whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoders import encoder_metadata, open_encoder
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.probes import knn_accuracies
from fmicl_text.evaluation.report import library_versions, markdown_table, mean_std, named_model, write_json
from fmicl_text.evaluation.sts import evaluate_sts, load_pairs
from fmicl_text.evaluation.unlabeled import find_documents, halves
from fmicl_text.files import write_atomic

SKIPPED_FOLDERS = {"tests", "test", "testing", "vendor", "_vendor", "vendored", "extern", "licenses"}
WORDS = range(20, 101)  # words of a paragraph
LEAST_LETTERS = 0.85  # share of letters and spaces in a paragraph of prose
PARTS = {"train": (60, 300), "dev": (20, 40), "test": (20, 40)}  # smallest and largest number of paragraphs per package
LABELED = 30  # training paragraphs per package among which neighbors are searched
K, TEMPERATURE = 10, 0.1
PEERS = {  # the settings of their authors
    "simcse": {"batch_size": 64, "max_seq_length": 32},
    "tsdae": {"batch_size": 8, "max_seq_length": 128},
}
DELETED = 0.6  # share of words that TSDAE deletes


# ---- the corpus


def documents(package: Distribution) -> Iterator[tuple[str, str]]:
    """Yield (file, text) of the documentation that a package has installed: its description, .rst and .md files, and
    the docstrings of its modules, each of them on its own."""
    yield "METADATA", str(package.metadata.json.get("description", ""))
    for path in sorted(package.files or [], key=str):
        if path.suffix not in (".py", ".rst", ".md") or SKIPPED_FOLDERS & set(path.parts):
            continue
        try:
            text = Path(str(path.locate())).read_text(encoding="utf-8")
            yield from ((str(path), one) for one in (docstrings(text) if path.suffix == ".py" else [text]))
        except (OSError, ValueError, SyntaxError):  # a file that is gone, in another encoding, or of another Python
            continue


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes and functions."""
    with warnings.catch_warnings(action="ignore"):  # of invalid escape sequences
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of prose of a text, each on one line: 20 to 100 words, mostly letters, ending like a sentence;
    without code blocks, examples and tables."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        prose = sum(char.isalpha() or char == " " for char in line) >= LEAST_LETTERS * len(line)
        if len(line.split()) in WORDS and prose and ">>>" not in line and line.endswith((".", ":", "!", "?")):
            yield line


def letters(paragraph: str) -> str:
    """What two paragraphs share that are counted as equal."""
    return "".join(char for char in paragraph.lower() if char.isalpha())


def order_of(*names: str) -> int:
    """A hash of names: the same everywhere."""
    return int.from_bytes(blake2b("\0".join(names).encode(), digest_size=8).digest())


def part_of(package: str, file: str) -> str:
    """The part that all paragraphs of a file belong to: test for two files of ten, dev for two, else train."""
    return ("test", "test", "dev", "dev", *["train"] * 6)[order_of(package, file) % 10]


def build_corpus(packages: Iterable[Distribution]) -> tuple[dict[str, list[dict[str, str]]], dict[str, str]]:
    """Rows {text, package, file} of the three parts, in an order that depends on their content only, and the versions
    of the packages in them.

    Of equal paragraphs of a package one is kept, and none if two packages have it. Packages with too few paragraphs in
    a part are skipped."""
    found: dict[str, dict[str, str]] = {}
    shared, versions = set(), {}
    described = (package for package in packages if package.read_text("METADATA"))  # not left over from an uninstall
    for package in tqdm(sorted(described, key=lambda one: one.name), desc="packages", leave=False):
        if package.name in versions:
            continue
        versions[package.name] = package.version
        for file, text in documents(package):
            for paragraph in paragraphs(text):
                row = {"text": paragraph, "package": package.name, "file": file}
                if found.setdefault(letters(paragraph), row)["package"] != package.name:
                    shared.add(letters(paragraph))
    parts: dict[str, list[dict[str, str]]] = {part: [] for part in PARTS}
    counts: Counter[tuple[str, str]] = Counter()
    for key in sorted(found.keys() - shared, key=order_of):
        part = part_of(found[key]["package"], found[key]["file"])
        counts[part, found[key]["package"]] += 1
        if counts[part, found[key]["package"]] <= PARTS[part][1]:
            parts[part].append(found[key])
    kept = {name for name in versions if all(counts[part, name] >= PARTS[part][0] for part in PARTS)}
    rows = {part: [row for row in rows if row["package"] in kept] for part, rows in parts.items()}
    return rows, {name: versions[name] for name in versions if name in kept}


def write_corpus(folder: Path, packages: Iterable[Distribution]) -> None:
    """Write train.jsonl, dev.jsonl, test.jsonl and corpus.json, with versions and numbers of paragraphs.

    Raises:
        InputError: The folder has files, or fewer than two packages have enough paragraphs."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"folder={folder}: must be a new or an empty folder")
    parts, versions = build_corpus(packages)
    if len(versions) < 2:
        least = ", ".join(f"{least} of {part}" for part, (least, _) in PARTS.items())
        raise InputError(f"fewer than two of the installed packages have enough documentation: {least} paragraphs")
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        write_atomic(folder / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    counts = {part: len(rows) for part, rows in parts.items()}
    write_json(folder / "corpus.json", {"paragraphs": counts, "packages": versions})
    print(
        f"{folder}: {len(versions)} packages, " + ", ".join(f"{n} paragraphs of {part}" for part, n in counts.items())
    )


def read_part(folder: Path, part: str) -> list[dict[str, str]]:
    """The rows of a part of a corpus."""
    try:
        return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"folder={folder}: no corpus ({error.strerror}); create one with `corpus`") from error


# ---- scores


class Neighbors:
    """k-NN accuracy of the packages of a part of a corpus.

    Args:
        folder: The corpus. Neighbors are searched among 30 training paragraphs of every package.
        part: dev or test.
    """

    def __init__(self, folder: Path, part: str) -> None:
        counts: Counter[str] = Counter()
        rows = []
        for row in read_part(folder, "train"):
            counts[row["package"]] += 1
            if counts[row["package"]] <= LABELED:
                rows.append(row)
        test = read_part(folder, part)
        labels = {package: i for i, package in enumerate(sorted(counts))}
        self.texts = [row["text"] for row in rows + test]
        self.labels = torch.tensor([labels[row["package"]] for row in rows + test])
        self.sizes = [len(rows), len(test)]

    def __call__(self, encoder: SentenceTransformer) -> float:
        """Percent of the paragraphs of the part whose package their nearest training paragraphs vote for."""
        (train, test), (a, b) = encode_sentences(encoder, self.texts).split(self.sizes), self.labels.split(self.sizes)
        return knn_accuracies(train, a, test, b, [K], [TEMPERATURE])[K, TEMPERATURE]


class Search:
    """Search of an encoder: the first half of a paragraph is the query, the second halves are the documents.

    Args:
        folder: The corpus.
        part: dev or test.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self.first, self.second = zip(*(halves(row["text"]) for row in read_part(folder, part)), strict=True)

    def __call__(self, encoder: SentenceTransformer) -> float:
        """Percent of the queries whose own second half is the nearest by cosine."""
        queries, found = encode_sentences(encoder, [*self.first, *self.second]).chunk(2)
        return 100 * float(find_documents(queries, found, self.first, self.second).first.mean())


def score(args: argparse.Namespace) -> None:
    """Print a table with one row per name, and write the scores of every model."""
    neighbors, search = Neighbors(args.folder, args.part), Search(args.folder, args.part)
    pairs = load_pairs(args.sts_dev_file) if args.sts_dev_file else None
    results: list[dict[str, Any]] = []
    for name, path in map(named_model, args.model):
        encoder = open_encoder(path)
        metrics = {f"k-NN, {args.part}": neighbors(encoder), f"search, {args.part}": search(encoder)}
        if pairs is not None:
            metrics["STS-B dev"] = evaluate_sts(partial(encode_sentences, encoder), pairs)["spearman"]
        setup = encoder_metadata(path, encoder) | {"versions": library_versions()}
        results.append({"name": name, **setup, "metrics": metrics})
        print(path, *(f"{metric} {value:.2f}" for metric, value in metrics.items()), flush=True)
    table = []
    for name in dict.fromkeys(result["name"] for result in results):
        seeds = [result["metrics"] for result in results if result["name"] == name]
        table.append({"model": name} | {metric: mean_std([one[metric] for one in seeds]) for metric in seeds[0]})
    print(markdown_table(table))
    if args.output:
        write_json(args.output, results)


# ---- peers


class CPUTime(TrainerCallback):
    """Stops training when this process has used some CPU seconds, those before training included, and decays the
    learning rate to 0 until then.

    Raises:
        InputError: They are used up before training.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.process_time()
        if self.start >= seconds:
            raise InputError(f"cpu_seconds={seconds:g}: loading took {self.start:.0f} CPU seconds")

    def left(self, step: int = 0) -> float:
        """The share of the training time that is left, the factor of the learning rate at every step."""
        return max(0.0, (self.seconds - time.process_time()) / (self.seconds - self.start))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = self.left() == 0


def delete_words(text: str, generator: torch.Generator) -> str:
    """The text without 60% of its words, but with at least one."""
    words = text.split()
    kept = (torch.rand(len(words), generator=generator) >= DELETED).tolist()
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep) or words[0]


def peer_data(method: str, texts: list[str], seed: int) -> Dataset:
    """The two columns that a method is trained on; TSDAE's words are deleted anew whenever a row is read."""
    if method == "simcse":
        return Dataset.from_dict({"anchor": texts, "positive": texts})
    generator = torch.Generator().manual_seed(seed)
    rows = Dataset.from_dict({"noisy": texts, "text": texts})
    return rows.with_transform(lambda batch: batch | {"noisy": [delete_words(t, generator) for t in batch["text"]]})


def train_peer(args: argparse.Namespace) -> None:
    """Train with sentence-transformers until the time is up, and save the encoder."""
    if args.output.exists():
        raise InputError(f"output={args.output}: exists; choose another name")
    data = peer_data(args.method, [row["text"] for row in read_part(args.folder, "train")], args.seed)
    set_seed(args.seed)
    encoder = open_encoder(args.model[0])
    length, encoder.max_seq_length = encoder.max_seq_length, args.max_seq_length
    loss: torch.nn.Module
    loss = DenoisingAutoEncoderLoss(encoder) if args.method == "tsdae" else MultipleNegativesRankingLoss(encoder)
    settings = SentenceTransformerTrainingArguments(
        str(args.output), per_device_train_batch_size=args.batch_size, learning_rate=args.learning_rate,
        seed=args.seed, num_train_epochs=1000, save_strategy="no", logging_steps=25, report_to="none",
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    clock = CPUTime(args.cpu_seconds)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, clock.left)
    trainer = SentenceTransformerTrainer(
        encoder, settings, data, loss=loss, callbacks=[clock], optimizers=(optimizer, schedule)
    )
    trainer.train()
    encoder.max_seq_length = length
    encoder.save_pretrained(str(args.output))
    steps = trainer.state.global_step
    print(f"{args.output}: {args.method}, {steps} steps, {time.process_time():.0f} CPU seconds")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser("adaptation.py", __doc__)
    parser.add_argument("task", choices=("corpus", "peer", "score"), help="create the corpus, train a peer, score")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--model", nargs="+", metavar="[NAME=]MODEL", help="encoders to score, or the one to train")
    parser.add_argument("--part", choices=("dev", "test"), default="test", help="part to score (default: test)")
    parser.add_argument("--sts_dev_file", type=Path, help="sentence pairs to score too: sentence1, sentence2, score")
    parser.add_argument("--method", choices=PEERS, help="peer to train")
    parser.add_argument("--cpu_seconds", type=positive_number, help="CPU time of the peer's process, start included")
    parser.add_argument("--learning_rate", type=positive_number, default=3e-5, help="of a peer (default: 3e-5)")
    parser.add_argument("--batch_size", type=partial(whole_number, lowest=2), help="of a peer (default: its authors')")
    parser.add_argument("--max_seq_length", type=partial(whole_number, lowest=3), help="of a peer")
    parser.add_argument("--seed", type=partial(whole_number, lowest=0), default=1, help="of a peer (default: 1)")
    parser.add_argument("--output", type=Path, help="JSON file of the scores, or folder of the peer")
    args = parser.parse_args()
    needed = {"corpus": (), "peer": ("model", "method", "cpu_seconds", "output"), "score": ("model",)}[args.task]
    if missing := [name for name in needed if getattr(args, name) is None]:
        parser.error(f"{args.task} needs --{missing[0]}")
    if args.task == "peer":
        if len(args.model) > 1:
            parser.error("peer trains one --model")
        for name, value in PEERS[args.method].items():
            setattr(args, name, getattr(args, name) or value)
    if args.task == "score":
        check_output("--output", args.output, args.sts_dev_file, args.folder)
    return args


def main() -> None:
    args = parse_args()
    if args.task == "corpus":
        write_corpus(args.folder, distributions())
    elif args.task == "peer":
        train_peer(args)
    else:
        score(args)


if __name__ == "__main__":
    with cli_errors("adaptation.py"):
        main()
