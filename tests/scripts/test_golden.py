"""The first 20 losses of four recipes, compared with a file, so that no change of the numbers goes unseen.

python tests/scripts/test_golden.py      # writes the file again, after a change that is meant to change them
"""

import hashlib
import json
import runpy
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fmicl_text.evaluation.report import library_versions
from fmicl_text.quickstart import PAIRS, SENTENCES

ROOT = Path(__file__).parent.parent.parent
FILE = Path(__file__).with_name("golden_losses.json")
SHORT = "--use_cpu True --max_steps 20 --logging_steps 1 --eval_strategy no --save_strategy no --disable_tqdm True"
FILES = f"--train_file {SENTENCES} --max_train_samples 160 --sts_dev_file {PAIRS}"
TEXT = f"{SHORT} {FILES} --per_device_train_batch_size 16 --max_seq_length 16"
IMAGES = f"{SHORT} --per_device_train_batch_size 64 --max_train_samples 256"
RECIPES = {
    "text, kl": f"simcse_fmicl.py {TEXT}",
    "text, js, mini-batches": f"simcse_fmicl.py {TEXT} --divergence js --mini_batch_size 4 --head simcse",
    "images, pearson": f"vision_fmicl.py {IMAGES} --divergence pearson",
    "images, InfoNCE, MoCo": f"vision_fmicl.py {IMAGES} --objective infonce --method moco --queue_size 128",
}


def losses_of(command, folder):
    """The losses of a run of a recipe in this process."""
    recipe, *flags = command.split()
    before = sys.argv
    sys.argv = [recipe, *flags, "--output_dir", str(folder)]
    try:
        runpy.run_path(str(ROOT / "recipes" / recipe), run_name="__main__")
    finally:
        sys.argv = before
    history = json.loads((folder / "results.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def environment():
    """What exact losses depend on."""
    names = ("python", "torch", "transformers", "sentence-transformers", "accelerate")
    versions = {name: version for name, version in library_versions().items() if name in names}
    return versions | {"cpu": torch.backends.cpu.get_cpu_capability(), "cpu_model": cpu_model()}


def cpu_model():
    """A hash of the model and features of the CPU, by which libraries choose their kernels."""
    names = ("vendor_id", "cpu family", "model", "stepping", "cache size", "flags")
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return None
    cells = [line.partition(":") for line in lines]
    known = sorted((name.strip(), value.strip()) for name, _, value in cells if name.strip() in names)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:12]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_first_losses_are_those_of_the_file(tmp_path, name):
    golden = json.loads(FILE.read_text())
    losses = losses_of(RECIPES[name], tmp_path / "out")
    assert len(losses) == 20
    if environment() == golden["environment"]:
        assert losses == golden["losses"][name]
    else:  # training amplifies differences in rounding, most of all that of a small convolutional network
        assert losses[:3] == pytest.approx(golden["losses"][name][:3], rel=1e-3)
        assert losses == pytest.approx(golden["losses"][name], rel=0.05)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: losses_of(command, Path(folder) / str(k)) for k, (name, command) in enumerate(RECIPES.items())}
    FILE.write_text(json.dumps({"environment": environment(), "losses": found}, indent=1) + "\n")
