"""Programs that `programs.run_program` forks are like those that a new interpreter runs."""

import json
import os
import subprocess
import sys

import psutil
import pytest

from tests.programs import run_program

PROGRAM = """
import atexit, json, logging, os, signal, sys, threading, time, warnings
handlers = {str(number): str(signal.getsignal(number)) for number in signal.valid_signals()}
streams = [(stream.encoding, stream.errors, stream.isatty()) for stream in (sys.stdin, sys.stdout, sys.stderr)]
state = (sys.argv, sys.path, __name__, __file__, os.getcwd(), dict(os.environ), handlers, streams)
print(json.dumps(state))
for _ in range(2):
    warnings.warn("once")
    warnings.warn("of this module", DeprecationWarning)
logging.warning("logged")
atexit.register(print, "at exit")
threading.Thread(target=lambda: [time.sleep(0.1), print("thread")]).start()
if sys.argv[1] == "interrupted":
    raise KeyboardInterrupt
sys.exit({"status": 3, "message": "stopped"}.get(sys.argv[1]))
"""


@pytest.mark.parametrize("end", ["", "status", "message", "interrupted"])
def test_a_program_runs_and_ends_alike(tmp_path, monkeypatch, end):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path / "added")  # as transformers does for models with code of their own
    environment = os.environ | {"NAME": "value", "PYTHONPATH": str(tmp_path / "modules")}
    found = run_program("program.py", end, cwd=tmp_path, env=environment)
    command = [sys.executable, "program.py", end]
    expected = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    states = [json.loads(done.stdout.splitlines()[0]) for done in (found, expected)]
    assert states[0] == states[1]
    assert found.stdout.splitlines()[1:] == expected.stdout.splitlines()[1:] == ["thread", "at exit"]
    assert found.returncode == expected.returncode
    if end == "interrupted":  # the traceback has frames of the helper
        assert found.stderr.splitlines()[-1] == expected.stderr.splitlines()[-1] == "KeyboardInterrupt"
    else:
        assert found.stderr == expected.stderr


@pytest.mark.slow
def test_a_program_is_killed_with_its_children_at_the_end_of_its_time(tmp_path):
    code = "import os, sys, time; os.fork(); open(f'{sys.argv[1]}/{os.getpid()}', 'w').close(); time.sleep(60)"
    with pytest.raises(subprocess.TimeoutExpired):
        run_program("-c", code, tmp_path, timeout=1)
    numbers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(numbers) == 2
    left = [psutil.Process(number) for number in numbers if psutil.pid_exists(number)]
    _, alive = psutil.wait_procs(left, timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
