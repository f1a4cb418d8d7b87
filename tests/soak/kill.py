"""Kill training at random times, resume it, and compare it bit for bit with an uninterrupted run.

    python tests/soak/kill.py                    # text, vision: 20 SIGKILLs each; seven more kinds of runs: 6 each
    python tests/soak/kill.py --kills 5 --only vision

Kills are at random times of a run, including its start; every fourth waits for a save. A run that alternates between
two processes and one, which have the same batch together, is compared up to rounding. The exit status is 1 if a resumed
run ends with different weights, optimizer or log, if no kill was during a save, or if a job outlives a killed rank by
more than 60 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import psutil
import torch
from safetensors.torch import load_file

from fmicl_text.cli.recipe import RESULTS_FILE  # imports the modules of the recipes once, before the forks
from fmicl_text.quickstart import ENCODER, PAIRS, SENTENCES
from fmicl_text.training.checkpoint import UNFINISHED, checkpoints_in

ROOT = Path(__file__).parent.parent.parent
SMALL = "--use_cpu True --disable_tqdm True --logging_steps 1 --save_total_limit 2 --save_strategy steps"
TEXT = "--max_steps 40 --save_steps 4 --eval_steps 4 --per_device_train_batch_size 16 --max_seq_length 16"
IMAGES = "--method moco --objective infonce --queue_size 256 --max_steps 30 --save_steps 3 --eval_strategy no"
IMAGES += " --per_device_train_batch_size 64"
LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
RUNS = {
    "text": ("simcse_fmicl.py", f"{SMALL} {TEXT}".split()),
    "vision": ("vision_fmicl.py", f"{SMALL} {IMAGES}".split()),
}
SHORT = f"{SMALL} --max_steps 12 --save_steps 2 --eval_steps 2 --per_device_train_batch_size 16 --max_seq_length 16"
SHORT += f" --model_name_or_path {ENCODER} --pooling mean --gamma 10 --alpha 4096 --sts_dev_file {PAIRS}"
SENTENCES_FILE = f"--train_file {SENTENCES}"
MORE = {  # killed fewer times
    "stream, workers, accumulation": f"{SENTENCES_FILE} --streaming True --dataloader_num_workers 2 "
    "--gradient_accumulation_steps 2",
    "mini-batches, length groups": f"{SENTENCES_FILE} --mini_batch_size 4 --train_sampling_strategy group_by_length",
    "triplets": "--train_file triplets.csv",
    "early stopping": f"{SENTENCES_FILE} --early_stopping_patience 2 --max_steps 30",
    "save_strategy best": f"{SENTENCES_FILE} --save_strategy best",
    "LoRA, head": f"{SENTENCES_FILE} --lora_rank 4 --head simcse",
}
RUNS |= {name: ("simcse_fmicl.py", f"{SHORT} {flags}".split()) for name, flags in MORE.items()}
ROUNDING = 1e-6  # of the weights of a run that alternates between two processes and one
MOCO_V3 = "--method mocov3 --max_steps 12 --save_steps 2 --eval_strategy no --per_device_train_batch_size 64"
RUNS["MoCo v3"] = ("vision_fmicl.py", f"{SMALL} {MOCO_V3}".split())


def start(recipe: str, flags: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Fork a process that runs a recipe as a main program, after `prepare`; returns its process ID."""
    if (child := os.fork()) > 0:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    prepare()
    sys.argv = [recipe, *flags]
    status = 0
    try:
        runpy.run_path(str(ROOT / "recipes" / recipe), run_name="__main__")
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    os._exit(status)


def wait(child: int, log: Path) -> None:
    """Wait until a child has ended; exit if it failed."""
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"a run ended with status {os.waitstatus_to_exitcode(status)}:\n{log.read_text()[-3000:]}")


def result(folder: Path) -> dict[str, object]:
    """The results that must be equal: weights, the last checkpoint's head, optimizer and log."""
    last = checkpoints_in(folder)[-1]
    tensors = {
        path.name: load_file(path)
        for path in (folder / "model.safetensors", last / "training_only.safetensors")
        if path.is_file()
    }
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    pace = ("tokens_per_second", "images_per_second")
    return {
        "weights": {f"{file}/{name}": weight for file, named in tensors.items() for name, weight in named.items()},
        "optimizer": {
            f"{i}/{name}": value
            for i, state in optimizer.items()
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        },
        "log": [{name: value for name, value in entry.items() if name not in pace} for entry in log],
    }


def differences(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """Which parts of two results are not equal."""
    differing = []
    for part in ("weights", "optimizer"):
        x, y = a[part], b[part]
        assert isinstance(x, dict) and isinstance(y, dict) and x, part
        if x.keys() != y.keys() or not all(torch.equal(x[name], y[name]) for name in x):
            differing.append(part)
    return differing + (["log"] if a["log"] != b["log"] else [])


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process died."""
    return (folder / UNFINISHED).is_dir() and any((folder / UNFINISHED).iterdir())


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, for at most a minute."""
    end = time.time() + 60
    while not condition() and time.time() < end:
        time.sleep(0.002)


def stop_in_a_save(child: int, folder: Path, moments: random.Random) -> None:
    """Suspend a child at a random time during a save, which may take only 10 ms. Return without suspending it if its
    run has ended."""
    for _ in range(100):
        until(lambda: is_saving(folder) or (folder / RESULTS_FILE).is_file())
        if (folder / RESULTS_FILE).is_file():
            return
        time.sleep(moments.uniform(0, 0.01))
        os.kill(child, signal.SIGSTOP)
        if is_saving(folder):
            return
        os.kill(child, signal.SIGCONT)


def kill_and_resume(name: str, kills: int, seed: int, folder: Path) -> bool:
    """Whether runs that are killed `kills` times in total end like an uninterrupted run."""
    recipe, flags = RUNS[name]
    log, whole, cut = folder / f"{name}.log", folder / "whole", folder / "cut"
    began = time.time()
    wait(start(recipe, [*flags, "--output_dir", str(whole)], log), log)
    seconds = time.time() - began
    last = checkpoints_in(whole)[-1].name
    resume = [*flags, "--output_dir", str(cut), "--resume_from_checkpoint", "auto"]
    moments, in_saves, runs, wrong = random.Random(seed), 0, 0, list[str]()
    progress: list[str] = []
    for number in range(1, kills + 1):
        child = start(recipe, resume, log)
        time.sleep(moments.uniform(0.2, 0.8) * seconds)
        if number % 4 == 0:
            stop_in_a_save(child, cut, moments)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        in_saves += is_saving(cut)
        found = [path.name for path in checkpoints_in(cut)]
        progress.append(found[-1].rpartition("-")[2] if found else "0")
        if last in found or number == kills:
            wait(start(recipe, resume, log), log)
            wrong += differences(result(whole), result(cut))
            runs += 1
            shutil.rmtree(cut)
            progress.append("|")
    print(
        f"{name}: {runs} runs of {seconds:.1f} s killed {kills} times, {in_saves} of them during a save; latest "
        f"checkpoint after each kill: {' '.join(progress)} "
        + (f"NOT EQUAL: {', '.join(wrong)}" if wrong else "weights, optimizer and log equal"),
        flush=True,
    )
    return not wrong and (in_saves > 0 or kills < 20)


def write_triplets(path: Path) -> None:
    """Write 200 triplets of the bundled sentences."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    rows = [", ".join(f'"{lines[(i + k) % 600]}"' for k in (0, 1, 300)).replace('", "', '","') for i in range(200)]
    path.write_text("\n".join(["sent0,sent1,hard_neg", *rows]), encoding="utf-8")


def launch(folder: Path, log: Path, processes: int = 2) -> subprocess.Popen[bytes]:
    """Start two processes with 16 examples each, or one with 32, as a user would."""
    recipe, flags = RUNS["text"]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *LAUNCH.split()]
    launcher = launcher if processes == 2 else [sys.executable]
    command = [*launcher, str(ROOT / "recipes" / recipe), *flags, "--output_dir", str(folder)]
    command += ["--resume_from_checkpoint", "auto", "--dataloader_pin_memory", "False"]
    command += ["--per_device_train_batch_size", str(32 // processes)]
    return subprocess.Popen(command, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True)


def kill_one_rank(folder: Path) -> bool:
    """Whether the job ends within 60 s after a rank is killed, reports it, and resumes exactly."""
    log = folder / "ranks.log"
    if launch(folder / "whole", log).wait():
        sys.exit(f"two processes did not train:\n{log.read_text()[-3000:]}")
    job = launch(folder / "cut", log)
    until(lambda: bool(checkpoints_in(folder / "cut")))
    ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if "--output_dir" in p.cmdline()]
    ranks[-1].kill()
    began = time.time()
    status = job.wait(timeout=60)
    seconds = time.time() - began
    told = [line for line in log.read_text().splitlines() if "SIGKILL" in line or "exitcode" in line]
    left = checkpoints_in(folder / "cut")[-1].name
    if launch(folder / "cut", log).wait():
        sys.exit(f"the job did not resume:\n{log.read_text()[-3000:]}")
    wrong = differences(result(folder / "whole"), result(folder / "cut"))
    print(
        f"two processes: one of {len(ranks)} killed, the job ended {seconds:.1f} s later with status {status}, "
        f"{len(told)} lines name the cause; resumed from {left}: "
        + (f"NOT EQUAL: {', '.join(wrong)}" if wrong else "weights, optimizer and log equal")
    )
    return status != 0 and bool(told) and not wrong


def alternate(kills: int, seed: int, folder: Path) -> bool:
    """Whether a run that is killed after some checkpoints, and goes on with one process in place of two and then with
    two again, ends like an uninterrupted run of two, up to rounding."""
    log, cut, moments = folder / "alternate.log", folder / "cut", random.Random(seed)
    if launch(folder / "whole", log).wait():
        sys.exit(f"two processes did not train:\n{log.read_text()[-3000:]}")
    progress: list[str] = []
    for number in range(kills):
        before = {path.name for path in checkpoints_in(cut)}
        job = launch(cut, log, 1 if number % 2 else 2)
        until(lambda before=before: bool({path.name for path in checkpoints_in(cut)} - before))  # type: ignore[misc]
        time.sleep(moments.uniform(0, 0.5))
        for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
            process.kill()
        job.wait()
        progress.append(checkpoints_in(cut)[-1].name.rpartition("-")[2])
    if launch(cut, log, 1 if kills % 2 else 2).wait():
        sys.exit(f"the job did not resume:\n{log.read_text()[-3000:]}")
    a, b = result(folder / "whole"), result(cut)
    apart = {part: distance(a[part], b[part]) for part in ("weights", "optimizer")}  # type: ignore[arg-type]
    losses = [[entry["loss"] for entry in one["log"] if "loss" in entry] for one in (a, b)]  # type: ignore[attr-defined]
    apart["loss"] = max(abs(x - y) / abs(x) for x, y in zip(*losses, strict=True))
    good = apart["weights"] < ROUNDING and len(set(progress)) == kills
    print(
        f"two processes and one: killed at checkpoints {' '.join(progress)}; relative differences "
        + ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
        + ("" if good else " NOT EQUAL")
    )
    return good


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all tensors together, relative to their norm."""
    apart = sum((a[name] - b[name]).double().square().sum().item() for name in a)
    return float((apart / sum(a[name].double().square().sum().item() for name in a)) ** 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="default: 20, and 6 for the shorter runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*RUNS, "ranks", "layouts"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    good = []
    for name in [*RUNS, "ranks", "layouts"]:
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                path, kills = Path(folder), args.kills or (20 if name in ("text", "vision") else 6)
                os.chdir(path)
                write_triplets(path / "triplets.csv")
                if name == "layouts":
                    good.append(alternate(min(kills, 6), args.seed, path))
                else:
                    good.append(
                        kill_one_rank(path) if name == "ranks" else kill_and_resume(name, kills, args.seed, path)
                    )
                os.chdir(ROOT)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
