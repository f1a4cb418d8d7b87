"""Time and memory to read and train on large and unusual text files.

    python tests/soak/files.py

Creates them in a temporary folder (3 GiB with the caches): a million lines; 1 GiB; a line of 100,000 characters; every
tenth line garbage, once as text and once as invalid UTF-8. Each case runs in a separate process; prints its time, peak
memory and result. The exit status is 1 if a result is not as expected.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, InputError, build_text_encoder
from fmicl_text.quickstart import ENCODER
from fmicl_text.text.data import load_training_text
from fmicl_text.text.tokenization import training_rows
from fmicl_text.training.checkpoint import dataset_fingerprint

WORDS = [
    "the",
    "a",
    "river",
    "city",
    "of",
    "in",
    "was",
    "built",
    "year",
    "music",
    "people",
    "first",
    "county",
    "school",
    "and",
    "film",
    "team",
    "war",
    "north",
    "song",
]


def sentence(source: random.Random) -> str:
    """Twelve to twenty words, and a number that makes it differ from others."""
    return " ".join([*source.choices(WORDS, k=source.randrange(12, 20)), str(source.randrange(10**9))])


def write(path: Path, count: int, garbage: Callable[[random.Random], bytes] | None = None) -> None:
    """Write `count` lines, every tenth of them garbage if given."""
    source = random.Random(0)
    with open(path, "wb") as file:
        for i in range(count):
            odd = garbage is not None and i % 10 == 9
            file.write((garbage(source) if odd and garbage else sentence(source).encode()) + b"\n")


def odd_text(source: random.Random) -> bytes:
    """Characters from all of Unicode, including control characters and whitespace."""
    codes = (source.choice((9, 11, 32, 0x85, 0x2028, source.randrange(1, 0xD800))) for _ in range(40))
    return "".join(chr(code) for code in codes if code not in (10, 13)).encode()


def train(path: Path, folder: Path, streaming: bool = False) -> str:
    """Read, tokenize, take five steps."""
    encoder = build_text_encoder(str(ENCODER))
    data = load_training_text(str(path), streaming=streaming, shuffle_seed=0)
    rows, collator, data = training_rows(data, encoder.tokenizer, 32)
    args = FMICLTrainingArguments(
        str(folder / "out"), per_device_train_batch_size=8, max_steps=5, eval_strategy="no", save_strategy="no",
        load_best_model_at_end=False, use_cpu=True, disable_tqdm=True, logging_steps=5,
    )  # fmt: skip
    trainer = FMICLTrainer(encoder, args, train_dataset=rows, data_collator=collator)
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    found = f"{data.num_rows or 'stream of'} rows, {data.num_skipped} blank; 5 steps, loss {loss:.1f}"
    return f"{found}; fingerprint {str(dataset_fingerprint(rows))[:8]}"


def refuse(path: Path, folder: Path) -> str:
    """The error for a file that is rejected."""
    try:
        load_training_text(str(path))
    except InputError as error:
        return f"rejected: {error}".replace(str(folder), "...")
    raise AssertionError("it was read")


def million(path: Path) -> None:
    write(path, 1_000_000)


def gibibyte(path: Path) -> None:
    write(path, 100_000)
    block = path.read_bytes()
    with open(path, "ab") as file:
        for i in range(2**30 // len(block)):
            file.write(block.replace(b"\n", b" %d\n" % i))


def long_line(path: Path) -> None:
    write(path, 1000)
    with open(path, "a") as file:
        file.write("word " * 20_000 + "\n")


CASES: dict[str, tuple[Callable[[Path], None], Callable[[Path, Path], str], str]] = {
    "a million lines": (million, train, "1000000 rows, 0 blank"),
    "1 GiB as a stream": (gibibyte, lambda path, folder: train(path, folder, streaming=True), "stream of rows"),
    "a line of 100,000 characters": (long_line, train, "1001 rows, 0 blank"),
    "a tenth odd text": (lambda path: write(path, 10_000, odd_text), train, "rows"),
    "a tenth no UTF-8": (
        lambda path: write(path, 10_000, lambda s: s.randbytes(30).replace(b"\n", b"") + b"\xff"),
        refuse,
        "line 10 is not UTF-8",
    ),
}


def main() -> int:
    good = True
    for name, (make, take, expected) in CASES.items():
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            make(folder / "text.txt")
            size = (folder / "text.txt").stat().st_size / 2**20
            began = time.time()
            reading, writing = os.pipe()
            if (child := os.fork()) == 0:
                torch.set_num_threads(1)
                import datasets

                datasets.config.HF_DATASETS_CACHE = folder / "cache"
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(1, 2)
                told = take(folder / "text.txt", folder)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
                os.write(writing, f"{peak:.0f} MiB at most; {told}".encode())
                os._exit(0)
            os.close(writing)
            with open(reading, "rb") as pipe:
                told = pipe.read().decode() or "it failed"
            os.waitpid(child, 0)
        good = good and expected in told
        print(f"{name} ({size:.1f} MiB): {time.time() - began:.1f} s, {told}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
