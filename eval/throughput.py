"""Compare the training throughput of FMICLTrainer with sentence-transformers' trainer.

    python eval/throughput.py                                        # bundled encoder and sentences, float32
    python eval/throughput.py --precision bf16 --model MODEL --train_file SENTENCES.txt.gz --output throughput.json
    python eval/throughput.py --size bert-base --texts mixed --max_seq_length 128 --batch_size 16 --steps 3

Both train the same encoder on dropout positives of the same sentences, with the same batch size, length, pooling,
precision and optimizer: `SentenceTransformerTrainer` with MultipleNegativesRankingLoss on the column given twice, and
`FMICLTrainer` with f-MICL, on batches of texts of similar length as in the recipe, and with the variants in --options.
Runs are interleaved so that background load affects all alike; ratios are medians over rounds. Padding tokens are not
counted.

The share of the limit is the time of 6 operations for each token that is not padding and each weight of a linear layer
inside the encoder, at the speed of one large matrix product in this precision, divided by the time of a step.
"""

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split
import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tqdm.auto import tqdm
from transformers import AutoModel, BertConfig, ModernBertConfig, PreTrainedConfig, TrainerCallback

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
    "FMICLTrainer, random batches": {"train_sampling_strategy": "random"},
    "FMICLTrainer, mini_batch_size 16": {"mini_batch_size": 16},
    "FMICLTrainer, torch_compile": {"torch_compile": True},
    "FMICLTrainer, CUDA graphs": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
    "FMICLTrainer, torch's dropout": {},
    "FMICLTrainer, random batches, padded": {"train_sampling_strategy": "random"},
}
# Sizes of encoders with random weights, which take as long as trained ones.
SIZES: dict[str, Callable[[int], PreTrainedConfig]] = {
    "bert-base": lambda vocabulary: BertConfig(vocab_size=vocabulary),
    "minilm": lambda vocabulary: BertConfig(
        vocab_size=vocabulary, hidden_size=384, num_hidden_layers=6, intermediate_size=1536, num_attention_heads=12
    ),
    "modernbert-base": lambda vocabulary: ModernBertConfig(
        vocab_size=vocabulary, attention_dropout=0.1, mlp_dropout=0.1
    ),
}
TEXTS = {"sentences": 1, "mixed": 6}  # the most sentences of a text; their number is drawn uniformly


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
    parser.add_argument("--size", choices=SIZES, help="an encoder of this size with random weights (default: none)")
    parser.add_argument(
        "--texts", choices=TEXTS, default="sentences", help="rows as they are, or 1 to 6 of them joined (mixed)"
    )
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
    parser.add_argument(
        "--train_sampling_strategy",
        choices=["group_by_length", "random"],
        default="group_by_length",
        help="batches of FMICLTrainer (default: group_by_length, as in the recipe)",
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


def joined(texts: list[str], most: int, column: str) -> Dataset:
    """Texts of 1 to `most` consecutive rows."""
    rows, draw, start = [], random.Random(0), 0
    while start < len(texts):
        number = draw.randint(1, most)
        rows.append(" ".join(texts[start : start + number]))
        start += number
    return Dataset.from_dict({column: rows})


def random_encoder(size: str, tokenizer: Any, folder: str) -> str:
    """A folder with an encoder of random weights."""
    config = SIZES[size](len(tokenizer))
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def matrix_product_speed(device: str, precision: str) -> float:
    """Operations per second of a product of matrices of 4,096 x 1,024 and 1,024 x 4,096, the best of ten."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = torch.randn(4096, 1024, device=device, dtype=dtype), torch.randn(1024, 4096, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        synchronize(torch.device(device))
        start = time.perf_counter()
        a @ b
        synchronize(torch.device(device))
        seconds.append(time.perf_counter() - start)
    return 2 * 4096 * 1024 * 4096 / min(seconds)


def main() -> None:
    with ExitStack() as stack:
        measure(parse_args(), stack)


def measure(args: argparse.Namespace, stack: ExitStack) -> None:
    """Run the trainers, and print the table."""
    cpu = not torch.cuda.is_available()
    text = load_training_text(train_file=args.train_file, max_train_samples=args.max_train_samples)
    rows: Dataset = text.dataset
    column = text.columns[0]
    if TEXTS[args.texts] > 1:
        rows = joined(rows[column], TEXTS[args.texts], column)
    shared = {
        "per_device_train_batch_size": args.batch_size, "max_steps": args.steps + args.warmup, "learning_rate": 3e-5,
        "save_strategy": "no", "logging_steps": 10**6, "disable_tqdm": True, "use_cpu": cpu, "report_to": "none",
        "bf16": args.precision == "bf16", "fp16": args.precision == "fp16", "dataloader_pin_memory": not cpu,
    }  # fmt: skip
    own = shared | {"train_sampling_strategy": args.train_sampling_strategy}

    def ours(name: str) -> Callable[[str], Clock]:
        def run(folder: str) -> Clock:
            encoder = build_text_encoder(args.model, pooling=args.pooling)
            settings = FMICLTrainingArguments(folder, **(own | OPTIONS[name]))
            tokens = tokenize_dataset(rows, encoder.tokenizer, [column], args.max_seq_length)
            model = TextContrastiveModel(encoder)
            if name.endswith("padded"):
                model.pass_cost = float("inf")
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
        encoder = build_text_encoder(args.model, pooling=args.pooling)
    if args.size is not None:
        args.model = random_encoder(args.size, encoder.tokenizer, stack.enter_context(tempfile.TemporaryDirectory()))
        encoder = build_text_encoder(args.model, pooling=args.pooling)
    weights = sum(layer.weight.numel() for layer in encoder.modules() if isinstance(layer, torch.nn.Linear))
    trainers = {PEER: peer} | {name: ours(name) for name in args.options}
    seconds_per_token: dict[str, list[float]] = {name: [] for name in trainers}
    seconds_per_step: dict[str, list[float]] = {name: [] for name in trainers}
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for name, run in trainers.items():
                clock = run(folder)
                seconds_per_token[name].append(clock.seconds / float(clock.tokens))
                seconds_per_step[name].append(clock.seconds / args.steps)
    limit = 6 * weights / matrix_product_speed("cpu" if cpu else "cuda", args.precision)  # seconds per token
    table = [
        {
            "trainer": name,
            "ms/step": 1000 * statistics.median(seconds_per_step[name]),
            "sentences/s": args.batch_size / statistics.median(seconds_per_step[name]),
            "tokens/s": 1 / statistics.median(seconds_per_token[name]),
            "share of the limit": limit / statistics.median(seconds_per_token[name]),
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
