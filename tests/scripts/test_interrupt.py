"""Ctrl-C while a script imports its modules."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import one_fast

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("script", one_fast(["recipes/simcse_fmicl.py", "recipes/vision_fmicl.py", "eval/sts.py"]))
def test_one_line(script):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / script), "--help"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        maps = Path(f"/proc/{run.pid}/maps")
        until = time.time() + 60
        while "libtorch" not in maps.read_text() and time.time() < until:  # torch is being imported
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        printed = run.stderr.read()
    assert run.returncode == -signal.SIGINT and printed == f"{Path(script).name}: stopped by SIGINT\n"
