"""Memory and CPU time of the vision recipe on a large folder of photographs, extrapolated to ImageNet-1k.

    python tests/soak/images.py WORK                  # generates the images in the folder WORK, 5 GB, and measures
    python tests/soak/images.py WORK --code OTHER     # the same with the code of another checkout

The JPEG files (about 500 x 375 pixels, 60 to 110 KB, in one subfolder per class) have the spectrum of photographs, and
shapes with sharp edges. They are generated once. The recipe runs in separate processes, with an encoder that costs
little, on two numbers of images: a first start with empty caches up to the end of the run, a second start up to the
first score, and a run of two processes. Further starts read 64-pixel images from parquet files, which are kept in
memory. A run is measured once: to repeat it, delete the folder WORK/run-NAME, where NAME is the name of the checkout.

Each phase gets the CPU time (of all threads and workers) and the largest memory of a process, sampled ten times per
second. Both are split in a constant part and a part per image by a line through the two numbers of images. Anonymous
memory is the part of the resident memory that is not in files, which the kernel can drop. A run is stopped if it would
leave less than 2 GiB of memory.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import importlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
IMAGENET = 1_281_167
BASES = 200  # generated pictures; the images are crops of these
HELD_OUT = 1000
STEPS, BATCH = 8, 64
# Logistic regression, instead of at most 50,000 rows and 200 steps: its cost must not depend on the number of images
# where that is small. 50,000 rows of 2,048 features add 0.4 GiB for each copy of them.
MOST_FITTED, FIT_STEPS = 2000, 20
SPARE = 2 * 2**30  # bytes of memory that other programs keep
TINY_IMAGENET = 100_000
# Functions whose time and memory are a phase: phase, module, class (* for all), function. Functions that a checkout
# does not have are part of the surrounding phase.
PHASES = (
    ("find, read and check", "fmicl_text.vision.data", "", "load_images"),
    ("mean and deviation", "fmicl_text.vision.data", "*", "mean_and_std"),
    *(("scores", "fmicl_text.vision.evaluator", "*", name) for name in ("__call__", "features", "raw_pixels", "probe")),
    ("logistic regression", "sklearn.linear_model", "LogisticRegression", "fit"),
    ("training", "transformers.trainer", "Trainer", "train"),
    ("input of training", "fmicl_text.vision.data", "*", "for_views"),
)


def picture(source: np.random.Generator, width: int = 900, height: int = 720) -> Image.Image:
    """Colored noise whose amplitude decreases as 1/frequency, as in photographs, and shapes with sharp edges."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    noise = source.normal(size=(3, height, width))
    mixed = np.fft.rfft2(0.75 * noise[:1] + 0.35 * noise) / np.maximum(frequency, 1 / width)
    pixels = np.fft.irfft2(mixed, s=(height, width))
    pixels = pixels / pixels.std() * 50 + source.uniform(70, 180, size=(3, 1, 1))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(12):
        x, y, r = source.uniform(0, width), source.uniform(0, height), source.uniform(20, 160)
        shape = draw.ellipse if source.random() < 0.5 else draw.rectangle
        shape((x - r, y - r / 2, x + r, y + r / 2), fill=(*source.integers(0, 256, 3).tolist(), 150))
    return image


@functools.cache
def bases() -> list[Image.Image]:
    """The pictures of which the images are crops."""
    source = np.random.default_rng(0)
    return [picture(source) for _ in range(BASES)]


def jpeg(number: int, size: tuple[int, int] | None = None) -> bytes:
    """The image of a number: a random crop of its base, near 500 x 375 pixels, or resized to `size`."""
    source = np.random.default_rng([1, number])
    base = bases()[number % BASES]
    sides = sorted((source.uniform(430, 560), source.uniform(320, 420)), reverse=source.random() < 0.75)
    width, height = (round(side) for side in sides)
    left, top = source.integers(0, base.width - width + 1), source.integers(0, base.height - height + 1)
    image = base.crop((int(left), int(top), int(left) + width, int(top) + height))
    buffer = io.BytesIO()
    (image.resize(size) if size else image).save(buffer, "JPEG", quality=int(source.integers(80, 93)))
    return buffer.getvalue()


def file_of(folder: Path, number: int, classes: int) -> Path:
    """The file of an image."""
    return folder / f"class-{number % classes:04d}" / f"{number:07d}.jpg"


def generate(work: Path, sizes: list[int], classes: int, small: list[int]) -> None:
    """Write the folders of images, of which the smaller ones contain hard links, and the parquet files of 64-pixel
    images; files that exist are kept."""
    largest = work / f"images-{max(sizes)}"
    for number in range(classes):
        file_of(largest, number, classes).parent.mkdir(parents=True, exist_ok=True)
    for number in range(max(sizes)):
        if not (path := file_of(largest, number, classes)).exists():
            path.write_bytes(jpeg(number))
    for size in set(sizes) - {max(sizes)}:
        for number in range(size):
            path = file_of(work / f"images-{size}", number, classes)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                os.link(file_of(largest, number, classes), path)
    for size in small:
        if not (path := work / f"small-{size}.parquet").exists():
            images = [{"bytes": jpeg(number, (64, 64)), "path": None} for number in range(size)]
            labels = [number % classes for number in range(size)]
            pq.write_table(pa.table({"image": images, "label": labels}), path)


def save_encoder(folder: Path, width: int) -> None:
    """A ResNet of few operations and features of the given width, without a processor."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 16, 16, width], depths=[1, 1, 1, 1])
    ResNetModel(config).save_pretrained(folder)


def mark_phases(marks: Path, stop: bool) -> None:
    """Write a line with time, process and phase to `marks` whenever a phase of this process begins or ends.

    Args:
        marks: File.
        stop: End the process when its trainer is built, before the first score.
    """
    import transformers

    phases = ["imports"]

    def write() -> None:
        with open(marks, "a") as file:
            file.write(f"{time.time()}\t{os.getpid()}\t{phases[-1]}\n")

    def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            phases.append(name)
            write()
            try:
                return function(*args, **kwargs)
            finally:
                phases.pop()
                write()

        return call

    write()
    for name, module_name, class_name, function_name in PHASES:
        module = importlib.import_module(module_name)
        classes = {k: v for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module_name}
        for owner in classes.values() if class_name == "*" else [getattr(module, class_name) if class_name else module]:
            if function := vars(owner).get(function_name):
                setattr(owner, function_name, marked(name, function))
    limited: Any = importlib.import_module("fmicl_text.evaluation.probes")
    limited.LOGISTIC_STEPS = FIT_STEPS
    limited = importlib.import_module("fmicl_text.vision.evaluator")
    limited.MOST_FITTED = MOST_FITTED
    if stop:
        build = transformers.Trainer.__init__

        def build_and_stop(*args: Any, **kwargs: Any) -> None:
            build(*args, **kwargs)
            phases.append("end")
            write()
            os._exit(0)

        transformers.Trainer.__init__ = build_and_stop  # type: ignore[method-assign]
    phases[0] = "other"
    write()


Sample = tuple[float, int, int, float, float, float]  # time, process, its parent, CPU seconds, RSS, anonymous MiB


def samples_of(command: list[str], environment: dict[str, str], log: Path) -> list[Sample]:
    """Run a command, and sample it and its descendants."""
    seen: list[Sample] = []
    with open(log, "w") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=log.parent)
        root = psutil.Process(running.pid)
        while running.poll() is None:
            if psutil.virtual_memory().available < SPARE:
                for process in root.children(recursive=True):
                    process.kill()
                running.kill()
                sys.exit(f"{' '.join(command)}\nstopped: it needs more than {max(s[4] for s in seen):.0f} MiB")
            for process in (root, *root.children(recursive=True)):
                try:
                    with process.oneshot():
                        memory, cpu = process.memory_info(), process.cpu_times()
                        sizes = memory.rss / 2**20, (memory.rss - memory.shared) / 2**20
                        seen.append((time.time(), process.pid, process.ppid(), cpu.user + cpu.system, *sizes))
                except psutil.Error:
                    continue  # it has ended
            time.sleep(0.1)
    if running.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return seen


Phases = dict[str, tuple[float, float, float]]  # CPU seconds, maximum RSS, maximum anonymous memory (MiB)


def by_phase(seen: list[Sample], marks: Path) -> Phases:
    """The CPU seconds of all processes, and the memory of the largest, in each phase, in the order of phases."""
    times: dict[int, list[float]] = defaultdict(list)
    names: dict[int, list[str]] = defaultdict(list)
    for line in marks.read_text().splitlines():
        began, marked, name = line.split("\t")
        times[int(marked)].append(float(began))
        names[int(marked)].append(name)
    cpu: dict[str, float] = defaultdict(float)
    memory: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    last: dict[int, float] = defaultdict(float)
    for when, process, parent, seconds, rss, anonymous in seen:
        owner = process if process in times else parent  # a worker belongs to the phase of its parent
        if owner not in times:
            continue  # the launcher
        name = names[owner][max(0, bisect.bisect(times[owner], when) - 1)]
        cpu[name] += seconds - last[process]
        last[process] = seconds
        memory[name] = (max(memory[name][0], rss), max(memory[name][1], anonymous))
    return {name: (cpu[name], *memory[name]) for name in cpu}


def measure(args: argparse.Namespace, data: Path, name: str, processes: int = 1, stop: bool = False) -> Phases:
    """Run the recipe on `data`; `name` is that of the log and the output. A run that was measured is not repeated."""
    work = args.work / args.name
    work.mkdir(exist_ok=True)
    if (result := work / f"{name}.json").exists():
        phases, text = json.loads(result.read_text())
        print(text, flush=True)
        return phases
    marks = work / f"{name}.marks"
    marks.unlink(missing_ok=True)
    shutil.rmtree(work / name, ignore_errors=True)
    caches = work / f"caches-{data.stem}"
    if not name.startswith("second"):
        shutil.rmtree(caches, ignore_errors=True)
    environment = os.environ | {
        "PYTHONPATH": str(args.code), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
        "HF_HOME": str(caches), "XDG_CACHE_HOME": str(caches),
    }  # fmt: skip
    launcher = [sys.executable]
    if processes > 1:
        config = args.code / "recipes" / "accelerate" / "two_cpus.yaml"
        launcher += ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    inside = [str(Path(__file__).resolve()), str(args.work), "--code", str(args.code), *(["--stop"] if stop else [])]
    flags = (
        f"--train_file {data} --model_name_or_path {args.work}/encoder-{args.width} --image_size {args.image_size} "
        f"--held_out {HELD_OUT} --max_steps {STEPS} --per_device_train_batch_size {BATCH} --use_cpu True "
        f"--eval_strategy no --disable_tqdm True --output_dir {work / name}"
    ).split() + (["--image_column", "image"] if data.suffix else [])
    command = [*launcher, *inside, "--inside", str(marks), *flags]
    began = time.time()
    phases = by_phase(samples_of(command, environment, work / f"{name}.log"), marks)
    total = sum(cpu for cpu, _, _ in phases.values())
    lines = [f"\n{name}: {total:.0f} CPU seconds in {time.time() - began:.0f} s\n    {' '.join(command)}\n"]
    lines.append("| phase | CPU, s | memory, MiB | anonymous, MiB |\n|---|---|---|---|")
    lines += [f"| {phase} | {cpu:.1f} | {rss:.0f} | {rest:.0f} |" for phase, (cpu, rss, rest) in phases.items()]
    print("\n".join(lines), flush=True)
    result.write_text(json.dumps([phases, "\n".join(lines)]))
    return phases


def extrapolate(title: str, sizes: list[int], runs: list[Phases], total: int) -> None:
    """Print a table of two runs, and a line through both at a total number of images."""
    (few, many), (small, large) = sizes, runs
    print(
        f"\n{title}\n\n| phase | CPU, s, {few:,} images | {many:,} | ms per image | hours, {total:,} images "
        f"| memory, MiB, {few:,} | {many:,} | KiB per image | GiB, {total:,} images | anonymous, GiB |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in large:
        if name not in small or name in ("imports", "end"):
            continue
        (cpu, rss, _), slopes = large[name], np.subtract(large[name], small[name]) / (many - few)
        hours, gibibytes, without_files = np.array(large[name]) + slopes.clip(0) * (total - many)
        print(
            f"| {name} | {small[name][0]:.1f} | {cpu:.1f} | {slopes[0] * 1000:.2f} | {hours / 3600:.2f} "
            f"| {small[name][1]:.0f} | {rss:.0f} | {slopes[1] * 1024:.2f} | {gibibytes / 1024:.1f} "
            f"| {without_files / 1024:.1f} |",
            flush=True,
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="Folder for images, caches and logs.")
    parser.add_argument("--code", type=Path, default=ROOT, help="Checkout to measure.")
    parser.add_argument("--sizes", type=int, nargs=2, default=[5000, 50_000], help="Two numbers of images.")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--small", type=int, nargs=2, default=[5000, 15_000], help="Two numbers of 64-pixel images.")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--width", type=int, default=2048, help="Width of the features.")
    parser.add_argument("--generate_only", action="store_true")
    parser.add_argument("--stop", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work, args.code = args.work.resolve(), args.code.resolve()
    args.name = f"run-{args.code.name}"
    return args


def main() -> int:
    args = parse()
    if args.inside:
        recipe = args.code / "recipes" / "vision_fmicl.py"
        mark_phases(Path(args.inside[0]), args.stop)
        sys.argv = [str(recipe), *args.inside[1:]]
        runpy.run_path(str(recipe), run_name="__main__")
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    generate(args.work, args.sizes, args.classes, args.small)
    if args.generate_only:
        return 0
    save_encoder(args.work / f"encoder-{args.width}", args.width)
    small, first, second = [], [], []
    for size in args.small:
        small.append(measure(args, args.work / f"small-{size}.parquet", f"small-{size}", stop=True))
    extrapolate("64-pixel images in a parquet file, up to the first score", args.small, small, TINY_IMAGENET)
    for size in args.sizes:
        first.append(measure(args, args.work / f"images-{size}", f"first-{size}"))
        second.append(measure(args, args.work / f"images-{size}", f"second-{size}", stop=True))
        if size == min(args.sizes):
            measure(args, args.work / f"images-{size}", f"two-processes-{size}", processes=2)
    extrapolate("First start and all scores, before and after training", args.sizes, first, IMAGENET)
    extrapolate("Second start, up to the first score", args.sizes, second, IMAGENET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
