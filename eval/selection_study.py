"""Which score without labels finds the best checkpoint? Train with good and bad settings, score every checkpoint
without labels and on STS pairs, and compare.

    python eval/selection_study.py --model small=SMALL_BERT minilm=ALL_MINILM --text stsb=stsb_train.txt \\
        wiki=wiki_en_sentences_100k.txt.gz --sts_dev_file stsb-en-dev.tsv --output_dir runs/selection
    python eval/selection_study.py --table --output_dir runs/selection       # the table of the runs that are finished

Every model is trained on every text with eight objectives, whose settings are drawn at random, good and bad ones. The
scores without labels are computed on texts that are not trained on. Each run is a JSON file in the output folder; a
second call continues with the runs that are missing.
"""

from __future__ import annotations

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split

import argparse
import math
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, build_text_encoder
from fmicl_text.cli.checks import whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors, flags_called
from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoding import encode_dropout_views, encode_sentences
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.evaluation.geometry import alignment, direction_shares, effective_rank, uniformity
from fmicl_text.evaluation.report import library_versions, markdown_table, named_model, write_json
from fmicl_text.evaluation.sts import load_pairs
from fmicl_text.evaluation.unlabeled import GAMMAS, find_documents, halves, some_words
from fmicl_text.files import read_json
from fmicl_text.losses import AlignUniformLoss, ContrastiveLoss, FMICLLoss, InfoNCELoss
from fmicl_text.losses.similarity import unit_rows
from fmicl_text.text.data import load_training_text
from fmicl_text.text.held_out import parts_of, text_hash
from fmicl_text.training.callbacks import NonFiniteError

OBJECTIVES = ("kl", "js", "pearson", "vlc", "sh", "tsallis", "infonce", "align_uniform")
ALPHAS, WIDTHS = ("auto", "auto", 409600.0, 4096.0, 40.0), ("auto", "auto", 5.0, 80.0)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
VIEWS = ("dropout", "dropout", "crops")
LOWER_IS_BETTER = ("uniformity", "alignment of halves", "alignment of dropout views", "alignment + uniformity")
NUM_COSINES, NUM_DROPOUT, BATCH = 2000, 100, 32

Pairs = tuple[Sequence[str], Sequence[str], Tensor, Tensor]


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser("selection_study.py", __doc__)
    parser.add_argument("--model", nargs="+", metavar="[NAME=]MODEL", help="encoders to train: folders or Hub IDs")
    parser.add_argument("--text", nargs="+", metavar="[NAME=]FILE", help="training text, one text per row")
    parser.add_argument("--sts_dev_file", type=Path, help="sentence pairs with scores")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="only print the table of the results")
    for name, default, lowest, text in (
        ("num_texts", 400, 2, "texts to score on"),
        ("steps", 12, 3, "training steps"),
        ("max_seq_length", 32, 3, "tokens per text"),
        ("seed", 0, 0, "seed"),
    ):
        number = partial(whole_number, lowest=lowest)
        parser.add_argument(f"--{name}", type=number, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision, in training and evaluation")
    args = parser.parse_args()
    if not args.table and not (args.model and args.text and args.sts_dev_file):
        parser.error("--model, --text and --sts_dev_file are required without --table")
    return args


# ---- runs


def settings_of(objective: str, model: str, text: str, seed: int) -> dict[str, Any]:
    """Settings of a run, good or bad, drawn by its name."""
    draw = random.Random(f"{objective} {model} {text} {seed}")
    views = draw.choice(VIEWS)
    settings: dict[str, Any] = {"objective": objective, "learning_rate": draw.choice(RATES), "views": views}
    if objective == "infonce":
        return settings | {"temperature": draw.choice((0.01, 0.05, 0.1, 0.5))}
    if objective == "align_uniform":
        return settings | {"gamma": draw.choice((2.0, 10.0, 20.0)), "alpha": draw.choice((0.05, 1.0))}
    return settings | {"gamma": draw.choice(WIDTHS), "alpha": draw.choice(ALPHAS)}


def loss_of(settings: Mapping[str, Any]) -> ContrastiveLoss:
    """The loss with the settings of a run."""
    negatives = "same_view" if settings["views"] == "dropout" else "cross_view"
    if settings["objective"] == "infonce":
        return InfoNCELoss(settings["temperature"])
    options = {"gamma": settings["gamma"], "alpha": settings["alpha"], "negatives": negatives}
    if settings["objective"] == "align_uniform":
        return AlignUniformLoss(**options)
    return FMICLLoss(settings["objective"], **options)


def rows_of(texts: Sequence[str], views: str, seed: int) -> Any:
    """Texts, or pairs of random spans of half of the words of each text."""
    if views == "dropout":
        return list(texts)
    draw, pairs = random.Random(seed), []
    for text in texts:
        words, space = parts_of(text)
        starts = [draw.randint(0, len(words) - len(words) // 2) for _ in range(2)]
        pairs.append(tuple(space.join(words[start : start + len(words) // 2]) for start in starts))
    return pairs


class Scores:
    """An evaluator that collects the scores of every checkpoint of a run."""

    def __init__(self, texts: Sequence[str], sts: STSEvaluator, came: Tensor | None, bf16: bool) -> None:
        self.texts, self.sts, self.came, self.bf16 = texts, sts, came, bf16
        self.checkpoints: list[dict[str, Any]] = []

    def __call__(self, encoder: Any) -> dict[str, float]:
        length = encoder.max_seq_length
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.bf16):
            encoder.max_seq_length = 128
            sts = self.sts(encoder)["sts_spearman"]
            encoder.max_seq_length = length
            whole = encode_sentences(encoder, list(self.texts), progress=False)
            self.came = whole if self.came is None else self.came
            pairs = pairs_of(encoder, self.texts, whole)
            dropout = encode_dropout_views(encoder, list(self.texts[:NUM_DROPOUT]), progress=False)
        scores = unlabeled_scores(pairs, dropout, whole, self.came)
        self.checkpoints.append({"sts": sts, "scores": scores, "cosines": some_cosines(whole)})
        return {"sts": sts}


def run(
    path: str, rows: Any, texts: Sequence[str], sts: STSEvaluator, came: Tensor | None, settings: Any, args: Any
) -> Scores:
    """Train a model with the settings, and score it at three steps; without settings, score it as it came."""
    encoder = build_text_encoder(path, pooling=None if (Path(path) / "modules.json").exists() else "mean")
    encoder.max_seq_length = args.max_seq_length
    scores = Scores(texts, sts, came, args.bf16)
    if settings is None:
        scores(encoder.eval())
        return scores
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # settings that may collapse are part of the study
        arguments = FMICLTrainingArguments(
            folder,
            max_steps=args.steps,
            learning_rate=settings["learning_rate"],
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=args.steps // 3,
            logging_strategy="no",
            metric_for_best_model="sts",
            disable_tqdm=True,
            report_to="none",
            seed=args.seed,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = FMICLTrainer(encoder, arguments, train_dataset=rows, loss=loss_of(settings), evaluator=scores)
        trainer.remove_callback(PrinterCallback)
        with suppress(NonFiniteError):  # the checkpoints before it count
            trainer.train()
    return scores


# ---- scores without labels


def alternate_words(text: str) -> tuple[str, str]:
    """The words at odd and at even positions."""
    parts, space = parts_of(text)
    return space.join(parts[::2]), space.join(parts[1::2])


def random_crop(text: str, share: float = 0.5) -> str:
    """A random span of a share of the words. The same for the same text."""
    parts, space = parts_of(text)
    length = max(1, round(share * len(parts)))
    start = random.Random(text).randint(0, len(parts) - length)
    return space.join(parts[start : start + length])


def pairs_of(encoder: Any, texts: Sequence[str], whole: Tensor) -> dict[str, Pairs]:
    """Queries and documents, as texts and as embeddings [N, D]. Embeddings `whole` of the texts are given."""
    encode = partial(encode_sentences, encoder, progress=False)
    pairs: dict[str, Pairs] = {}
    for name, split in {"halves": halves, "alternate words": alternate_words}.items():
        first, second = map(list, zip(*map(split, texts), strict=True))
        pairs[name] = first, second, encode(first), encode(second)
    changes: dict[str, Callable[[str], str]] = {
        "crop": random_crop,
        "half of the words": partial(some_words, share=0.5),
        "quarter of the words": some_words,
    }
    for name, change in changes.items():
        queries = list(map(change, texts))
        pairs[name] = queries, texts, encode(queries), whole
    return pairs


def unlabeled_scores(
    pairs: Mapping[str, Pairs], dropout: tuple[Tensor, Tensor], whole: Tensor, came: Tensor
) -> dict[str, float]:
    """The candidates. Embeddings of whole texts [N, D], now and of the encoder as it came."""
    scores = {}
    for name, (queries, documents, x, y) in pairs.items():
        found = find_documents(x, y, queries, documents)
        scores[f"recall@1, {name}"] = 100 * float(found.first.mean())
        scores[f"MRR, {name}"] = 100 * float(found.reciprocal_rank.mean())
        scores[f"nats, {name}"] = nats(x, y)
        scores[f"nats at best gamma, {name}"] = max(nats(x, y, gamma) for gamma in GAMMAS)
        scores[f"InfoNCE at best gamma, {name}"] = max(infonce_bound(x, y, gamma) for gamma in GAMMAS)
    scores["nats, dropout views"] = nats(*dropout)
    scores["alignment of dropout views"] = float(alignment(*dropout))
    scores["alignment of halves"] = float(alignment(*pairs["halves"][2:]))
    scores["uniformity"] = float(uniformity(whole))
    scores["alignment + uniformity"] = scores["alignment of halves"] + scores["uniformity"]
    scores["effective rank"] = float(effective_rank(direction_shares(whole)))
    scores["predicts the encoder as it came"] = sufficiency(whole, came)
    return scores


def nats(x: Tensor, y: Tensor, gamma: float = 20.0) -> float:
    """The mutual information of pairs, by the Donsker-Varadhan bound."""
    return float(FMICLLoss("kl", gamma, 1.0, "cross_view").mutual_information(x.double(), y.double()))


def infonce_bound(x: Tensor, y: Tensor, gamma: float) -> float:
    """The mutual information of pairs, by the bound of InfoNCE."""
    logits = 2 * gamma * unit_rows(x.double()) @ unit_rows(y.double()).T
    return float((logits.diagonal() - logits.logsumexp(1)).mean()) + math.log(len(x))


def sufficiency(x: Tensor, y: Tensor, penalty: float = 0.1) -> float:
    """How much x tells about y in nats per dimension, if both are Gaussian: -log(1 - R2)/2 of ridge regression on one
    half of the rows, on the other. A linear form of FLARE (arXiv 2604.17344), which fits flows."""
    x, y = ((rows - rows.mean(0)) for rows in map(unit_rows, (x.double(), y.double())))
    half = len(x) // 2
    gram = x[:half].T @ x[:half]
    scale = penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram + scale, x[:half].T @ y[:half])
    residual = (y[half:] - x[half:] @ weights).square().mean(0) / y[half:].var(0, unbiased=False).clamp_min(1e-12)
    return float(-residual.clamp_min(1e-6).log().mean() / 2)


def some_cosines(x: Tensor) -> list[float]:
    """Cosines of random pairs, the same for every encoder."""
    draw = torch.Generator().manual_seed(0)
    i, j = torch.randint(len(x), (2, NUM_COSINES), generator=draw)
    x = unit_rows(x)
    return [round(value, 5) for value in (x[i] * x[j]).sum(-1).tolist()]


# ---- table


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: for every score, the Spearman correlation with STS over the checkpoints of a model and a text,
    and how far the checkpoint that it chooses is below the best one: in a run and over all runs, step 0 included."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one["model"], one["text"]), []).append(one)
    found: dict[str, dict[str, list[float]]] = {}

    def add(name: str, column: str, value: float) -> None:
        found.setdefault(name, {}).setdefault(column, []).append(value)

    for (model, text), members in sorted(groups.items()):
        start = [one["checkpoints"][0] for one in members if one["settings"] is None]
        trained = [start + one["checkpoints"] for one in members if one["settings"] is not None and one["checkpoints"]]
        if not start or not trained:
            continue
        everything = start + [checkpoint for one in trained for checkpoint in one[1:]]
        add_agreement(everything)
        sts = [checkpoint["sts"] for checkpoint in everything]
        for name in everything[0]["scores"]:
            scores = [signed(name, checkpoint) for checkpoint in everything]
            constant = min(len(set(scores)), len(set(sts))) < 2
            add(name, f"{model}, {text}", 0.0 if constant else float(stats.spearmanr(scores, sts).statistic))
            add(name, "regret over all", max(sts) - max(everything, key=partial(signed, name))["sts"])
            for one in trained:
                add(name, "regret in a run", best_of(one) - max(one, key=partial(signed, name))["sts"])
        for one in trained:
            add("(the last checkpoint)", "regret in a run", best_of(one) - one[-1]["sts"])
            add("(the encoder as it came)", "regret in a run", best_of(one) - one[0]["sts"])
    rows: list[dict[str, Any]] = []
    for name, columns in found.items():
        means = {column: float(np.mean(values)) for column, values in columns.items()}
        correlations = {column: value for column, value in means.items() if not column.startswith("regret")}
        row = {"score": name, "mean": float(np.mean(list(correlations.values()))) if correlations else None}
        row |= correlations | {column: means.get(column) for column in ("regret in a run", "regret over all")}
        rows.append(row | {"largest regret in a run": max(columns["regret in a run"])})
    return sorted(rows, key=lambda row: -math.inf if row["mean"] is None else row["mean"], reverse=True)


def signed(name: str, checkpoint: Mapping[str, Any]) -> float:
    """A score without labels, of which higher is better."""
    return float(-checkpoint["scores"][name] if name in LOWER_IS_BETTER else checkpoint["scores"][name])


def best_of(checkpoints: Sequence[Mapping[str, Any]]) -> float:
    """The best STS score."""
    return float(max(checkpoint["sts"] for checkpoint in checkpoints))


def add_agreement(checkpoints: Sequence[Any]) -> None:
    """Add the mean correlation of the cosines of a checkpoint with those of all others, which a single run does not
    have, and with those of the encoder as it came."""
    ranks = np.array([stats.rankdata(checkpoint["cosines"]) for checkpoint in checkpoints])
    correlations = np.corrcoef(ranks)
    for own, checkpoint in zip(correlations, checkpoints, strict=True):
        checkpoint["scores"]["agrees with all checkpoints"] = (own.sum() - 1) / max(1, len(own) - 1)
        checkpoint["scores"]["agrees with the encoder as it came"] = own[0]


def finished(folder: Path) -> dict[Path, Any]:
    """The runs in the output folder, by file."""
    return {path: read_json(path) for path in sorted(folder.glob("run-*.json"))}


def print_table(folder: Path) -> None:
    """Print the table of the finished runs, and write it to selection.json."""
    runs = list(finished(folder).values())
    rows = summary(runs)
    if not rows:
        raise InputError(f"--output_dir {folder}: no finished runs of a model on a text")
    num_checkpoints = sum(len(one["checkpoints"]) for one in runs)
    write_json(
        folder / "selection.json", {"checkpoints": num_checkpoints, "rows": rows, "versions": library_versions()}
    )
    print(f"{num_checkpoints} checkpoints of {len(runs)} runs")
    print(markdown_table(rows))


# ----


def texts_of(path: str, num_texts: int, num_rows: int) -> tuple[list[str], list[str]]:
    """Texts to train on, and those to score on."""
    with flags_called(train_file="text"):
        data = load_training_text(path)
    if len(data.columns) != 1:
        raise InputError(f"--text {path}: expected one text per row, got the columns {' '.join(data.columns)}")
    column = data.columns[0]
    texts = sorted({text for text in data.dataset[column] if len(parts_of(text)[0]) >= 4}, key=text_hash)
    if len(texts) < 2 * num_texts:
        raise InputError(f"--text {path}: {len(texts)} texts of four words or more, fewer than {2 * num_texts}")
    return texts[num_texts : num_texts + num_rows], texts[:num_texts]


def main() -> None:
    args = parse_args()
    folder = args.output_dir
    if args.table:
        return print_table(folder)
    options = {name: getattr(args, name) for name in ("num_texts", "steps", "max_seq_length", "seed", "bf16")}
    for path, one in finished(folder).items():
        if one["options"] != options:
            raise InputError(f"--output_dir {folder}: {path.name} is a run with other options, {one['options']}")
    folder.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    sts = STSEvaluator(load_pairs(args.sts_dev_file), progress=False)
    models, texts = [list(map(named_model, names)) for names in (args.model, args.text)]
    rows = {name: texts_of(path, args.num_texts, BATCH * args.steps) for name, path in texts}
    cells = list(product((None, *OBJECTIVES), models, texts))
    came: dict[tuple[str, str], Tensor] = {}
    for objective, (model, path), (text, _) in tqdm(cells, desc="runs"):
        file = folder / re.sub(r"[^\w.-]", "_", f"run-{model}-{text}-{objective or 'before'}.json")
        trained_on, scored_on = rows[text]
        settings = objective and settings_of(objective, model, text, args.seed)
        if file.exists() and objective:
            continue
        given = rows_of(trained_on, settings["views"], args.seed) if settings else None
        scores = run(path, given, scored_on, sts, came.get((model, text)), settings, args)
        came.setdefault((model, text), scores.came)
        facts = {"model": model, "text": text, "settings": settings, "options": options}
        write_json(file, facts | {"checkpoints": scores.checkpoints})
    print_table(folder)


if __name__ == "__main__":
    with cli_errors("selection_study.py"):
        main()
