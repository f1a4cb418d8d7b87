"""A broken torchvision is named in one line, whatever is imported first."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_broken_torchvision_is_named(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text('raise RuntimeError("operator nms does not exist")')
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", "import fmicl_text.vision.encoder"]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1] == (
        "ImportError: torchvision is installed but broken (operator nms does not exist): uninstall it, or install the "
        "build that fits torch"
    )
    assert "The above exception" not in found.stderr and "During handling" not in found.stderr
