"""Measure the peak memory of a training step against batch size, with mini-batches of fixed size.

    python eval/batch_memory.py                                 # batches of 256, 1024, 8192; about 3 minutes on 2 cores

For each batch size, trains the bundled encoder for one step on the bundled sentences (repeated to fill a batch) with
--mini_batch_size, and prints the peak memory in addition to the memory in use before the step: resident memory on a
CPU, allocated memory on a GPU. Only embeddings and their gradients should grow with the batch.
"""

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split
import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, TextContrastiveModel, build_text_encoder
from fmicl_text.cli.checks import check_output, whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.evaluation.benchmark import MIB, peak_extra_mib
from fmicl_text.evaluation.report import library_versions, markdown_table, write_json
from fmicl_text.quickstart import ENCODER, SENTENCES
from fmicl_text.text.collator import TokenCollator
from fmicl_text.text.data import load_training_text
from fmicl_text.text.tokenization import tokenize_dataset


def one_step(folder: str, model: TextContrastiveModel, batch: int, mini_batch: int, progress: bool) -> None:
    encoder = model.encoder
    rows = tokenize_dataset(load_training_text(train_file=str(SENTENCES)).dataset, encoder.tokenizer, ["text"], 32)
    args = FMICLTrainingArguments(
        folder, alpha=4096.0, per_device_train_batch_size=batch, mini_batch_size=mini_batch, max_steps=1,
        eval_strategy="no", save_strategy="no", load_best_model_at_end=False, disable_tqdm=not progress,
        report_to="none", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    rows = rows.select([i % len(rows) for i in range(max(batch, len(rows)))])
    FMICLTrainer(model, args, train_dataset=rows, data_collator=TokenCollator(encoder.tokenizer)).train()


def parse_args() -> argparse.Namespace:
    parser, size = ArgumentParser("batch_memory.py", __doc__), partial(whole_number, lowest=2)
    parser.add_argument(
        "--batches", type=size, nargs="+", default=[256, 1024, 8192], help="batch sizes (default: 256 1024 8192)"
    )
    parser.add_argument("--mini_batch_size", type=size, default=64, help="examples per forward pass (default: 64)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.mini_batch_size > min(args.batches):
        parser.error(f"--mini_batch_size {args.mini_batch_size} exceeds the batch of {min(args.batches)}")
    check_output("--output", args.output)
    return args


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TextContrastiveModel(build_text_encoder(str(ENCODER), pooling="mean")).to(device)
    width = model.encoder.get_embedding_dimension()
    table: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        step = partial(one_step, folder, model, mini_batch=args.mini_batch_size, progress=False)
        step(batch=args.mini_batch_size)  # warm-up, for allocations that are made only once
        for batch in sorted(args.batches):
            peak = peak_extra_mib(partial(step, batch=batch), device)
            embeddings = 2 * 2 * batch * width * 4 / MIB  # two views and their gradients, float32
            row = {"batch": batch, "peak MiB": peak, "embeddings MiB": embeddings, "other MiB": peak - embeddings}
            row["other / first"] = row["other MiB"] / (table[0] if table else row)["other MiB"]
            table.append(row)
            print(markdown_table([row]), flush=True)
    if args.output:
        machine = {"device": str(device), "threads": torch.get_num_threads(), "versions": library_versions()}
        write_json(args.output, {"settings": vars(args), **machine, "table": table})


if __name__ == "__main__":
    with cli_errors("batch_memory.py"):
        main()
