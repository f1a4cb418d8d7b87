"""The package: its public names, what importing them costs, and what it says of a broken torchvision."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fmicl_text

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers", "datasets", "sentence_transformers", "accelerate", "sklearn", "matplotlib", "scipy", "pandas")


def run_python(code: str, *extra_path: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*extra_path, str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "statement", ["from fmicl_text import FMICLLoss", "from fmicl_text.losses import SIMILARITIES"]
)
def test_losses_import_torch_only(statement):
    done = run_python(f"{statement}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])")
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_every_public_name_can_be_imported():
    assert all(getattr(fmicl_text, name) is not None for name in fmicl_text.__all__)
    assert set(fmicl_text.__all__) <= set(dir(fmicl_text))
    with pytest.raises(AttributeError, match="nothing"):
        fmicl_text.nothing  # noqa: B018


def test_a_broken_torchvision_is_named(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text('raise RuntimeError("operator nms does not exist")')
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    done = run_python("from fmicl_text import FMICLTrainer", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: torchvision is installed but broken (operator")
