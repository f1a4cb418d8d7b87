"""Coverage-guided fuzzing of the readers: for any bytes, a reader returns rows or raises an `InputError`.

    pip install atheris
    python tests/soak/fuzz_readers.py --seconds 60
    python tests/soak/fuzz_readers.py --seconds 600 --target images

Targets: `text` (load_training_text, every suffix), `pairs` (sentence pairs with scores and SentEval's files), `yaml`
(--config of both recipes) and `images` (encoded images, parquet files of images); without --target, all of them. Prints
each kind of crash with the bytes that caused it, and for each target the numbers of executions, covered edges of Python
code and crashes. The exit status is 1 if there was a crash. Writes to a temporary folder only, and needs no network.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

# Instrumented packages: the Python code that these readers use. pandas and pyarrow are not Python code.
INSTRUMENTED = ["fmicl_text", "yaml", "PIL", "datasets.packaged_modules", "transformers.hf_argparser"]
SUFFIXES = (
    *(".txt", ".csv", ".tsv", ".jsonl", ".parquet", ".txt.gz", ".csv.gz", ".jsonl.gz"),
    *(".json", ".arrow", ".csv.bz2", ".jsonl.xz", ".tsv.zst"),
)
Run = Callable[[bytes], None]
Target = tuple[Run, list[bytes], list[str]]  # one execution, seed inputs, dictionary of words to insert
COUNT, COVERAGE = re.compile(r"stat::number_of_executed_units:\s*(\d+)"), re.compile(r"\bcov: (\d+)")


def parquet(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(file, kind)
    return file.getvalue()


def text_target() -> Target:
    """The first byte chooses suffix (its low bits), streaming (64) and whether a .gz file is compressed here (128)."""
    import datasets

    from fmicl_text.text.data import load_training_text

    cache = Path("cache").absolute()
    datasets.config.HF_DATASETS_CACHE = cache
    runs = 0

    def run(data: bytes) -> None:
        nonlocal runs
        if (runs := runs + 1) % 500 == 0:
            shutil.rmtree(cache, ignore_errors=True)
        choice, content = data[0] if data else 0, data[1:]
        suffix = SUFFIXES[choice % 64 % len(SUFFIXES)]
        if suffix.endswith(".gz") and choice & 128:
            content = gzip.compress(content, 1)
        file = Path(f"{runs % 1000}{suffix}")  # the cache knows a file by its name, time and size
        file.write_bytes(content)
        found = load_training_text(train_file=str(file), streaming=bool(choice & 64)).dataset
        if not choice & 64:  # of a stream only the start is checked
            texts = [text for row in found for text in row.values()]
            assert all(isinstance(text, str) and text.strip() and text.encode() for text in texts), texts

    lines, table = b"one\ntwo\r\n\n \xc3\xa9\n", b'text,label\n"a, ""b""\nc",1\nd,2\n'
    rows = b'{"text": "a", "id": [1, {"b": null}]}\n\n{"text": "\\u00e9"}\n{"text": null}\n'
    triplets = b'{"sent0": "a", "sent1": "b", "hard_neg": "c"}\n{"sent0": "d", "sent1": "e", "hard_neg": "f"}\n'
    contents = [lines, table, table.replace(b",", b"\t"), rows, parquet({"text": ["a", None, "b"]}), lines, table, rows]
    seeds = [bytes([i + flag]) + content for i, content in enumerate(contents) for flag in (0, 64)]
    seeds += [*(bytes([i + 128]) + contents[i] for i in (5, 6, 7)), b"\x03" + triplets]
    seeds += [b"\x08" + b'[\n {"text": "a"},\n {"text": "b", "id": [1]}\n]\n', b"\x08" + rows, b'\x08["a", "b"]']
    seeds += [b"\x01sep=;\n" + table.replace(b",", b";"), b"\x02" + table, b"\x01" + table.replace(b",", b"|")]
    return run, seeds, ["text", "sentence", "sent0", "sent1", "hard_neg", "negative_1", "anchor", "null", "sep=;"]


def pairs_target() -> Target:
    """The first byte chooses: a file of pairs, SICK's, or a year's two files, which a byte 0 separates."""
    from fmicl_text.evaluation.sts import load_pairs
    from fmicl_text.evaluation.tasks import SentEvalFiles, load_set, load_task

    for folder in ("STS", "SICK"):
        Path("data", folder).mkdir(parents=True, exist_ok=True)
    files = SentEvalFiles(Path("data"))

    def run(data: bytes) -> None:
        content = data[1:]
        if not data or data[0] % 3 == 0:
            Path("pairs.tsv").write_bytes(content)
            load_pairs("pairs.tsv")
        elif data[0] % 3 == 1:
            for name in ("SICK_trial.txt", "SICK_train.txt", "SICK_test_annotated.txt"):
                Path("data/SICK", name).write_bytes(content)
            load_task("SICKRelatedness", "test", files)
        else:
            sentences, _, grades = content.partition(b"\0")
            Path("data/STS/STS.input.a.txt").write_bytes(sentences)
            Path("data/STS/STS.gs.a.txt").write_bytes(grades)
            load_set("STS", "a", files)

    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [1.0, 2.5]}
    table = b'sentence1,sentence2,score\n"a, ""x""","b",1\nc,d,2.5\n'
    senteval = b"main\tMSR\t2012\t1\t2.5\ta b\tc d\nmain\tMSR\t2012\t2\t0.0\te f\tg\n"
    sick = b"pair_ID\tsentence_A\tsentence_B\trelatedness_score\n1\ta\tb\t2.5\n2\tc\td\t3\n"
    files_of_pairs = [table, table.replace(b",", b"\t"), senteval, parquet(columns)]
    seeds = [*(b"\0" + content for content in files_of_pairs), b"\1" + sick, b"\2a\tb\nc\td\n\x001.0\n2.5\n"]
    return run, seeds, ["sentence1", "sentence2", "score", "nan", "1e9", "1_0"]


def yaml_target() -> Target:
    """The first byte chooses the recipe."""
    from fmicl_text.cli.text import DataArguments, ModelArguments, parse_args
    from fmicl_text.cli.vision import VisionTrainingArguments, parse_vision_args

    environment = dict(os.environ)

    def run(data: bytes) -> None:
        Path("a.yaml").write_bytes(data[1:])
        parse = parse_vision_args if data and data[0] % 2 else parse_args
        try:
            parse(["--config", "a.yaml", "--use_cpu", "True"])
        finally:
            os.environ.clear()
            os.environ.update(environment)

    configs = [
        b"divergence: js\ngamma: 5\nalpha: 1e3\nseed: 7\n",
        b"eval_strategy: no\nload_best_model_at_end: false\n",
    ]
    configs += [b"report_to: [none]\noutput_dir: 'a b'\nbf16: null\n", b"accelerator_config: {split_batches: true}\n"]
    configs += [b"a: &x [1, 2001-02-03, !!binary aGk=, 0x1f, .inf, ~]\nb: *x\n? {c: d}\n: |\n  e\n", b"{seed: 1_000}\n"]
    names = [item.name for kind in (ModelArguments, DataArguments, VisionTrainingArguments) for item in fields(kind)]
    tags = [f"!!{tag} " for tag in ("int", "float", "bool", "binary", "timestamp", "set", "omap", "null")]
    seeds = [bytes([recipe]) + content for content in configs for recipe in (0, 1)]
    return run, seeds, [*(f"{name}: " for name in names), *tags, "2001-02-03", "true", "None", "1e400"]


def images_target() -> Target:
    """The first byte chooses: an image, or a parquet file of images."""
    import datasets

    from fmicl_text.vision.data import load_images
    from fmicl_text.vision.decoding import UnreadableImageError, open_image

    cache = Path("cache").absolute()
    datasets.config.HF_DATASETS_CACHE = cache
    small = picture("PNG")

    def run(data: bytes) -> None:
        choice, content = data[0] if data else 0, data[1:]
        if choice % 2:
            shutil.rmtree(cache, ignore_errors=True)
            Path("a.parquet").write_bytes(content)
            load_images("a.parquet", held_out=0, progress=False).train.pictures([0])
            return
        encoded, channels = {"bytes": content, "path": "b"}, 1 if choice & 128 else 3
        try:
            open_image(encoded, channels, draft=1)
        except UnreadableImageError:
            return
        open_image(encoded, channels)  # images that could be decoded are decoded again in training

    kinds = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "ICNS")
    pictures = [picture(kind) for kind in kinds]
    pictures += [picture("PNG", mode) for mode in ("P", "LA", "RGBA", "1", "I;16")] + [picture("TIFF", "CMYK")]
    table = {"img": [{"bytes": small, "path": None}] * 2, "label": [0, 1]}
    return (
        run,
        [*(bytes([mode]) + content for content in pictures for mode in (0, 128)), b"\1" + parquet(table)],
        ["IDAT", "Exif", "PAR1"],
    )


TARGETS = {"text": text_target, "pairs": pairs_target, "yaml": yaml_target, "images": images_target}


def child(name: str, seconds: int) -> None:
    """Fuzz one target in this process, in the working folder; never returns."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from fmicl_text.errors import InputError

        run, seeds, words = TARGETS[name]()
    import datasets

    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    Path("corpus").mkdir()
    for i, seed in enumerate(seeds):
        Path("corpus", str(i)).write_bytes(seed)
    Path("words").write_text("".join(f'"{word}"\n' for word in words))
    known: set[tuple[str, ...]] = set()

    def one(data: bytes) -> None:
        try:
            run(data)
        except InputError:
            pass
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "fmicl_text" in Path(frame.filename).parts]
            kind = (type(error).__name__, *(f"{Path(f.filename).name}:{f.lineno}" for f in (ours[-1:] + frames[-1:])))
            if kind not in known:
                known.add(kind)
                message = " ".join(str(error).split())[:120]
                print(f"{name}: crash {' '.join(kind)}: {message} <- {data[:400]!r}", flush=True)

    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-rss_limit_mb=6000", "-timeout=60"]
    atheris.Setup([name, "corpus", "-dict=words", "-max_len=2048", "-artifact_prefix=./", *options], one)
    atheris.Fuzz()


def fuzz(name: str, seconds: int) -> int:
    """Fuzz one target in another process, which native code may crash; returns the number of crashes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    start, crashes = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}.log", "w+") as log:
        os.unlink(log.name)
        command = [
            sys.executable,
            str(Path(__file__).absolute()),
            "--child",
            "--target",
            name,
            "--seconds",
            str(seconds),
        ]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace"
        )
        for line in process.stdout or ():
            if line.startswith(f"{name}: crash "):
                crashes += 1
                print(line, end="", flush=True)
        status = process.wait()
        log.seek(0)
        said = log.read()
    count, covered = COUNT.findall(said), COVERAGE.findall(said)
    if status or not count:
        crashes += 1
        print(f"{name}: crash of the process, status {status}: {' '.join(said[-600:].split())}")
    print(
        f"{name}: {int(count[-1]) if count else 0:,} executions in {time.monotonic() - start:.0f} s, "
        f"{covered[-1] if covered else 0} edges covered, {crashes} crashes",
        flush=True,
    )
    return crashes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", choices=list(TARGETS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.target, arguments.seconds)
    names = [arguments.target] if arguments.target else list(TARGETS)
    sys.exit(bool(sum(fuzz(name, arguments.seconds) for name in names)))
