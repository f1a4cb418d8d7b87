"""Whether memory grows during training: resident memory over 2,000 steps of each recipe, in a separate process.

    python tests/soak/memory.py

Prints the slope of a line through the samples of the last 70 % of the run, in MiB per 100 steps. The exit
status is 1 if a slope is 1 or more.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).parent.parent.parent
STEPS = 2000
FLAGS = f"--use_cpu True --disable_tqdm True --max_steps {STEPS} --save_strategy steps --save_steps 500"
TEXT = "--per_device_train_batch_size 8 --max_seq_length 16 --eval_steps 500"
IMAGES = "--per_device_train_batch_size 16 --eval_strategy no"
RUNS = {"simcse_fmicl.py": TEXT, "vision_fmicl.py": IMAGES}


def samples(recipe: str, flags: str, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Seconds and MiB of a complete run, sampled twice per second."""
    command = [sys.executable, str(ROOT / "recipes" / recipe), *flags.split(), "--output_dir", f"{folder}/run"]
    with open(f"{folder}/log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        )
        seen, began = [], time.time()
        while process.poll() is None:
            seen.append((time.time() - began, psutil.Process(process.pid).memory_info().rss / 2**20))
            time.sleep(0.5)
    if process.returncode:
        sys.exit(Path(f"{folder}/log").read_text()[-3000:])
    seconds, mebibytes = np.array([sample for sample in seen if sample[1]]).T
    return seconds, mebibytes


def main() -> int:
    slopes = []
    for recipe, flags in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds, mebibytes = samples(recipe, f"{FLAGS} {flags}", folder)
        late = seconds > 0.3 * seconds[-1]
        per_second, _ = np.polyfit(seconds[late], mebibytes[late], 1)
        slopes.append(per_second * seconds[-1] / STEPS * 100)
        print(
            f"{recipe}: {STEPS} steps in {seconds[-1]:.0f} s, {mebibytes.max():.0f} MiB at most, slope "
            f"{slopes[-1]:+.3f} MiB per 100 steps"
        )
    return 1 if max(slopes) >= 1 else 0


if __name__ == "__main__":
    sys.exit(main())
