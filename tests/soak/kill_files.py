"""Kill a run before every single file operation in its output folder, resume it, and compare it with an uninterrupted
run.

    python tests/soak/kill_files.py                   # text, LoRA, and text into a symbolic link
    python tests/soak/kill_files.py --only lora --every 5

An audit hook counts the operations (opening for writing, creating, renaming, deleting). The exit status is 1 if a
resumed run ends with different weights, optimizer or log, or leaves anything unfinished in the folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from tests.soak.kill import differences, result, start, wait
from tests.support import recipe_flags, tiny_bert, write_recipe_data

SHORT = "--max_steps 4 --save_steps 2 --eval_steps 1 --logging_steps 1 --save_total_limit 2 --use_cpu True"
RUNS = {"text": "", "lora": "--lora_rank 2", "link": ""}
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Counter:
    """Counts the file operations of this process in a folder, and kills the process before one of them.

    Args:
        folder: The folder.
        kill_before: Number of the operation, from 1; 0 for none.
        log: File that the total is written to.
    """

    def __init__(self, folder: Path, kill_before: int, log: Path) -> None:
        self.folder, self.kill_before, self.log = str(folder), kill_before, log
        self.count = 0

    def install(self) -> None:
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in EVENTS or (event == "open" and not int(str(arguments[2] or 0)) & WRITES):
            return
        if not any(isinstance(path, str | os.PathLike) and self.is_inside(os.fspath(path)) for path in arguments[:2]):
            return
        self.count += 1
        if self.count == self.kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        self.log.write_text(str(self.count))

    def is_inside(self, path: str | bytes) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RUNS)
    parser.add_argument("--every", type=int, default=1, help="kill before every N-th operation only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    for name in [args.only] if args.only else RUNS:
        with tempfile.TemporaryDirectory() as folder:
            good &= kill_before_each(name, args.every, Path(folder).resolve())
    return 0 if good else 1


def kill_before_each(name: str, every: int, folder: Path) -> bool:
    """Whether all runs that are killed before an operation end like an uninterrupted one."""
    os.chdir(folder)
    write_recipe_data(folder)
    tiny_bert(folder / "bert")
    flags = [*recipe_flags("bert"), *SHORT.split(), *RUNS[name].split(), "--disable_tqdm", "True"]
    log, counted = folder / "log", folder / "count"

    def run(out: str, kill_before: int, place: Path) -> int:
        prepare: Callable[[], None] = Counter(place, kill_before, counted).install
        return start("simcse_fmicl.py", [*flags, "--output_dir", out, "--resume_from_checkpoint", "auto"], log, prepare)

    wait(run("whole", 0, folder / "whole"), log)
    total, failures = int(counted.read_text()), []
    whole = result(folder / "whole")
    for number in range(1, total + 1, every):
        place = folder / ("real" if name == "link" else "cut")
        if name == "link":
            (folder / "cut").symlink_to(place)
        os.waitpid(run("cut", number, place), 0)
        wait(run("cut", 0, place), log)
        wrong = differences(whole, result(place))
        left = [path.name for path in place.glob(".fmicl_text/*")] + [path.name for path in place.glob(".*unfinished")]
        if wrong or left or (name == "link" and not (folder / "cut").is_symlink()):
            failures.append(f"before operation {number}: {wrong or left or 'the link is gone'}")
        shutil.rmtree(place)
        (folder / "cut").unlink(missing_ok=True)
    killed = len(range(1, total + 1, every))
    print(f"{name}: {killed} kills before {total} file operations: {failures or 'all equal, nothing left'}", flush=True)
    return not failures


if __name__ == "__main__":
    sys.exit(main())
