"""Call every program with random flags: no call may end in a traceback or hang.

    python tests/soak/fuzz_flags.py                              # 500 calls
    python tests/soak/fuzz_flags.py --calls 50 --only sts.py --seed 3

Each call has valid flags and one to three random ones, spelled with underscores or dashes, with values that are valid,
out of range, of another type, paths of other files, or text that no terminal would send. It may succeed, or print one
line and exit with status 2. The exit status of this script is 1 if a call did neither within 120 seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from fmicl_text.cli import text, vision
from fmicl_text.cli.parser import ArgumentParser
from fmicl_text.vision.encoder import new_image_encoder
from tests.support import IMAGE_FAMILIES, image_parquet, picture, recipe_flags, tiny_bert, write_recipe_data

ROOT = Path(__file__).parents[2]
SHORT = ["--use_cpu", "True", "--max_steps", "2", "--disable_tqdm", "True", "--output_dir", "out"]
IMAGES = ["--train_file", "images.parquet", "--held_out", "8", "--image_size", "16"]
PROGRAMS = {
    "simcse_fmicl.py": [*recipe_flags("bert"), *SHORT],
    "vision_fmicl.py": [*IMAGES, "--per_device_train_batch_size", "8", *SHORT],
    "sts.py": ["--model", "bert", "--file", "dev.tsv", "--output", "scores.json"],
    "geometry.py": ["--model", "bert", "--file", "dev.tsv", "--output", "scores.json"],
    "image_probe.py": ["--images", "images.parquet", "--held_out", "8", "--image_size", "16", "--model", "vit"],
    "loss_benchmark.py": ["--sizes", "8", "--dim", "4", "--repeats", "1"],
    "views_benchmark.py": ["--batch", "4", "--size", "8", "--source", "8", "--rounds", "1"],
    "throughput.py": ["--model", "bert", "--train_file", "train.txt", "--steps", "1", "--rounds", "1"],
    "batch_memory.py": ["--batches", "4", "--mini_batch_size", "2"],
    "communication.py": ["--processes", "2", "--rows", "2", "--width", "4"],
    "batch_bias.py": ["--batch", "4", "--micro_batches", "2", "--partitions", "1"],
    "fmicl-text push": ["bert", "a/b", "--dry-run"],
    "fmicl-text compare": ["scores.json"],
}
TWO = {"recipes": ("simcse_fmicl.py", "vision_fmicl.py")}
NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "7",
    "-1",
    "1.5",
    "1e-3",
    "0.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "999999999999999999999999999999",
    "1_000",
]
VALUES = [
    *NUMBERS,
    *("0x10", "True", "no", "none", "", " ", "a", "a" * 300, "a/b", "a;b", "\x1b[31mred", "caf\u00e9", "\udcff"),
    *("{}", '{"a": 1}', '{"a":', "[1]", '{"a":' * 10_000, "foo=1", "train.txt", "dev.tsv", "images.parquet"),
    *("bert", "vit", "settings.yaml", "empty", "folder", ".", "..", "/", "/dev/null", "/dev/zero", "/proc/self/mem"),
    *("fifo.txt", "fifo.parquet", "fifo.tsv", "loop.txt", "binary.txt", "binary.npz", "no such.txt", "kl", "js"),
    *("mean", "cls", "steps", "epoch", "best", "cosine", "adamw_torch", "auto", "wandb", "tensorboard", "os:system"),
    *("json:loads", "fmicl_text.losses.divergences:kl", "fp16", "bf16", "full_shard", "4bit"),
]
SKIPPED = {  # they write elsewhere, start services or print to the terminal for long
    *("help", "help_all", "hub_token", "push_to_hub_token", "deepspeed", "debug", "torch_compile", "ddp_backend"),
    *("max_steps", "num_train_epochs", "steps", "rounds", "repeats", "batch", "source", "sizes", "max_seconds"),
}


def path_of(program: str) -> Path:
    """The file of a program."""
    if program.startswith("fmicl-text "):
        return ROOT / "fmicl_text" / "cli" / f"{program.split()[1]}.py"
    return ROOT / ("recipes" if program in TWO["recipes"] else "eval") / program


def material(folder: Path) -> None:
    """Write models and data."""
    os.chdir(folder)
    write_recipe_data(folder)
    tiny_bert(folder / "bert")
    os.rename(image_parquet(folder, [picture(seed=i) for i in range(40)]), "images.parquet")
    new_image_encoder(IMAGE_FAMILIES["vit"][0]).backbone.save_pretrained("vit")
    for name in ("empty", "folder/a", "folder/b"):
        Path(name).mkdir(parents=True)
    Path("settings.yaml").write_text("divergence: js\n")
    Path("binary.txt").write_bytes(bytes(range(256)) * 10)
    Path("binary.npz").write_bytes(bytes(range(256)) * 10)
    Path("scores.json").write_text('[{"missing": "x"}]')
    for name in ("fifo.txt", "fifo.parquet", "fifo.tsv"):
        os.mkfifo(name)
    Path("loop.txt").symlink_to("loop.txt")


def actions_of(program: str) -> list[Any]:
    """The options of a program."""
    if program in TWO["recipes"]:
        groups = text.GROUPS if program == "simcse_fmicl.py" else vision.GROUPS
        return [one for one in ArgumentParser(program, groups=groups)._actions if one.option_strings]
    found: list[Any] = []

    class Found(Exception):
        pass

    def catch(parser: Any, *args: Any) -> Any:
        found.extend(parser._actions)
        raise Found

    before, ArgumentParser.parse_known_args = ArgumentParser.parse_known_args, catch  # type: ignore[method-assign]
    sys.argv = [program]
    try:
        runpy.run_path(str(path_of(program)), run_name="__main__")
    except Found:
        pass
    finally:
        ArgumentParser.parse_known_args = before  # type: ignore[method-assign]
    return [one for one in found if one.option_strings]


def random_flags(source: random.Random, actions: list[Any]) -> list[str]:
    """One to three flags with values."""
    flags = []
    for action in source.sample(actions, min(len(actions), source.choice((1, 1, 1, 2, 3)))):
        flag = max(action.option_strings, key=len)
        flags.append(flag.replace("_", "-") if source.random() < 0.5 else flag)
        if action.nargs != 0:
            good = [str(value) for value in action.choices or ()]
            count = source.choice((1, 2)) if action.nargs in ("+", "*") else 1
            kind = str(getattr(action.type, "__name__", action.type))
            if "bool" in kind:
                good = ["True", "False"]
            elif any(word in kind for word in ("int", "float", "number")):
                good = NUMBERS
            flags += [source.choice(good if good and source.random() < 0.9 else VALUES) for _ in range(count)]
    return flags


def call(program: str, flags: list[str], log: Path) -> int | None:
    """Run a program in a child; returns its exit status, or None if it did not end in time."""
    if (child := os.fork()) == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        sys.argv = [str(path_of(program)), *flags]
        status: Any = 0
        try:
            runpy.run_path(str(path_of(program)), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stdout.flush()
        os._exit(int(status))
    until = time.time() + 120
    while time.time() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PROGRAMS)
    parser.add_argument("--verbose", action="store_true", help="print every call and its last line")
    args = parser.parse_args()
    source, counts, failures = random.Random(args.seed), Counter[str](), 0
    programs = {args.only: PROGRAMS[args.only]} if args.only else PROGRAMS
    folder = Path(tempfile.mkdtemp(prefix="fuzz_flags"))
    os.environ["HF_HOME"] = str(folder / "cache")
    material(folder)
    actions = {name: [one for one in actions_of(name) if one.dest not in SKIPPED] for name in programs}
    names = [*programs] if len(programs) == 1 else [*programs, *TWO["recipes"] * 5]
    for _ in range(args.calls):
        program = source.choice(names)
        flags = random_flags(source, actions[program])
        shutil.rmtree("out", ignore_errors=True)
        status = call(program, [*PROGRAMS[program], *flags], folder / "log")
        printed = (folder / "log").read_text(errors="replace")
        lines = [line for line in printed.splitlines() if "error:" in line or "missing:" in line]
        ended_well = status == 0 or (status == 2 and len(lines) >= 1)
        counts["succeeded" if status == 0 else "one line" if ended_well else "failed"] += 1
        if args.verbose:
            print(program, status, flags, *(lines or printed.splitlines())[-1:], sep=" | ", flush=True)
        if not ended_well or "Traceback" in printed:
            failures += 1
            print(f"{program} {flags}: status {status}\n    " + "\n    ".join(printed.splitlines()[-4:]), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{args.calls} calls of {len(programs)} programs, seed {args.seed}: {dict(counts)}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
