"""Compare the training throughput of FMICLTrainer with sentence-transformers' trainer.

    python eval/throughput.py                                        # bundled encoder and sentences, float32
    python eval/throughput.py --precision bf16 --model MODEL --train_file SENTENCES.txt.gz --output throughput.json

Both train the same encoder on dropout positives of the same sentences, with the same batch size, length, pooling,
precision and optimizer: `SentenceTransformerTrainer` with MultipleNegativesRankingLoss on the column given twice, and
`FMICLTrainer` with f-MICL, with the recipe's settings and with the variants in --options. Runs are interleaved so that
background load affects all alike; ratios are medians over rounds. Padding tokens are not counted.
"""

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split
import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tqdm.auto import tqdm
from transformers import TrainerCallback

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, TextContrastiveModel, build_text_encoder
from fmicl_text.cli.checks import check_output, whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors, flags_called
from fmicl_text.evaluation.benchmark import median_ratio, synchronize
from fmicl_text.evaluation.report import library_versions, markdown_table, write_json
from fmicl_text.quickstart import ENCODER, SENTENCES
from fmicl_text.text.collator import TokenCollator
from fmicl_text.text.data import load_training_text
from fmicl_text.text.dropout import CheapDropout
from fmicl_text.text.model import POOLINGS
from fmicl_text.text.tokenization import tokenize_dataset

PEER = "SentenceTransformerTrainer"
OPTIONS: dict[str, dict[str, Any]] = {
    "FMICLTrainer": {},
    "FMICLTrainer, group_by_length": {"train_sampling_strategy": "group_by_length"},
    "FMICLTrainer, mini_batch_size 16": {"mini_batch_size": 16},
    "FMICLTrainer, torch_compile": {"torch_compile": True},
    "FMICLTrainer, CUDA graphs": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
    "FMICLTrainer, torch's dropout": {},
}


class Clock(TrainerCallback):
    """Measures the seconds and counts the tokens of the steps after the warm-up."""

    def __init__(self, trainer: Any, warmup: int) -> None:
        self.device, self.warmup, self.start, self.seconds = trainer.args.device, warmup, 0.0, 0.0
        self.tokens: Any = 0
        self.training_step = trainer.training_step
        trainer.training_step = self.count
        trainer.add_callback(self)

    def count(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.tokens += sum(value.sum() for name, value in inputs.items() if name.endswith("attention_mask"))
        return self.training_step(model, inputs, *args, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warmup:
            synchronize(self.device)
            self.tokens, self.start = 0, time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.start


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser("throughput.py", __doc__)
    parser.add_argument("--model", default=str(ENCODER), help="folder or Hub ID (default: the bundled encoder)")
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="pooling (default: mean)")
    parser.add_argument("--train_file", default=str(SENTENCES), help="training text (default: bundled)")
    parser.add_argument(
        "--max_train_samples", type=whole_number, default=20_000, help="use the first N rows (default: 20000)"
    )
    parser.add_argument(
        "--batch_size", type=partial(whole_number, lowest=2), default=64, help="sentences per step (default: 64)"
    )
    parser.add_argument(
        "--max_seq_length", type=partial(whole_number, lowest=3), default=32, help="tokens per text (default: 32)"
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="precision (default: fp32)"
    )
    parser.add_argument("--steps", type=whole_number, default=20, help="measured steps per run (default: 20)")
    parser.add_argument("--warmup", type=whole_number, default=3, help="warm-up steps before them (default: 3)")
    parser.add_argument("--rounds", type=whole_number, default=5, help="runs of each trainer (default: 5)")
    parser.add_argument(
        "--options",
        nargs="*",
        default=list(OPTIONS)[:2],
        choices=list(OPTIONS),
        help="variants (default: the first two)",
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.precision == "fp16" and not torch.cuda.is_available():
        parser.error("--precision fp16 needs a GPU")
    check_output("--output", args.output, args.train_file)
    return args


def main() -> None:
    args = parse_args()
    cpu = not torch.cuda.is_available()
    text = load_training_text(train_file=args.train_file, max_train_samples=args.max_train_samples)
    rows: Dataset = text.dataset
    column = text.columns[0]
    shared = {
        "per_device_train_batch_size": args.batch_size, "max_steps": args.steps + args.warmup, "learning_rate": 3e-5,
        "save_strategy": "no", "logging_steps": 10**6, "disable_tqdm": True, "use_cpu": cpu, "report_to": "none",
        "bf16": args.precision == "bf16", "fp16": args.precision == "fp16", "dataloader_pin_memory": not cpu,
    }  # fmt: skip

    def ours(name: str) -> Callable[[str], Clock]:
        def run(folder: str) -> Clock:
            encoder = build_text_encoder(args.model, pooling=args.pooling)
            settings = FMICLTrainingArguments(
                folder, eval_strategy="no", load_best_model_at_end=False, **shared, **OPTIONS[name]
            )
            tokens = tokenize_dataset(rows, encoder.tokenizer, [column], args.max_seq_length)
            model = TextContrastiveModel(encoder)
            if name.endswith("torch's dropout"):
                for module in model.modules():
                    if isinstance(module, CheapDropout):
                        module.__class__ = torch.nn.Dropout  # type: ignore[assignment]
            trainer = FMICLTrainer(
                model, settings, train_dataset=tokens, data_collator=TokenCollator(encoder.tokenizer)
            )
            return timed(trainer)

        return run

    def peer(folder: str) -> Clock:
        encoder = build_text_encoder(args.model, pooling=args.pooling)
        encoder.max_seq_length = args.max_seq_length
        settings = SentenceTransformerTrainingArguments(folder, **shared)
        twice = Dataset.from_dict({"anchor": rows[column], "positive": rows[column]})
        loss = MultipleNegativesRankingLoss(encoder)
        return timed(SentenceTransformerTrainer(encoder, settings, twice, loss=loss))

    def timed(trainer: Any) -> Clock:
        clock = Clock(trainer, args.warmup)
        trainer.train()
        return clock

    with flags_called(model_name_or_path="model"):  # check the model first
        build_text_encoder(args.model, pooling=args.pooling)
    trainers = {PEER: peer} | {name: ours(name) for name in args.options}
    seconds_per_token: dict[str, list[float]] = {name: [] for name in trainers}
    seconds_per_step: dict[str, list[float]] = {name: [] for name in trainers}
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for name, run in trainers.items():
                clock = run(folder)
                seconds_per_token[name].append(clock.seconds / float(clock.tokens))
                seconds_per_step[name].append(clock.seconds / args.steps)
    table = [
        {
            "trainer": name,
            "ms/step": 1000 * statistics.median(seconds_per_step[name]),
            "sentences/s": args.batch_size / statistics.median(seconds_per_step[name]),
            "tokens/s": 1 / statistics.median(seconds_per_token[name]),
            f"tokens/s, ratio to {PEER}": median_ratio(seconds_per_token[PEER], seconds_per_token[name]),
        }
        for name in trainers
    ]
    print(markdown_table(table))
    if args.output:
        machine = {"device": str(clock.device), "threads": torch.get_num_threads(), "versions": library_versions()}
        measured = {"seconds_per_token": seconds_per_token, "seconds_per_step": seconds_per_step}
        write_json(args.output, {"settings": vars(args), **machine, "table": table, **measured})


if __name__ == "__main__":
    with cli_errors("throughput.py"):
        main()
