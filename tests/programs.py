"""Programs as new interpreters run them, but forked after the imports, which take seven seconds."""

import atexit
import gc
import importlib
import io
import logging
import multiprocessing.process
import os
import signal
import subprocess
import sys
import threading
import traceback
import types
import warnings
import weakref
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

# of libraries, for messages and modules of their own; pytest removes those that imports add
FILTERS = [one for one in warnings.filters if one[0] == "ignore" and (one[1] or one[3])]
OWN_PATHS = ["", str(Path(__file__).parents[1]), *map(str, Path(__file__).parent.glob("**/"))]  # which pytest adds
OUTER_PATHS = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # of the tests' own interpreter
PATHS = [path for path in sys.path if path not in [*OWN_PATHS, *OUTER_PATHS]]  # before tests add others
LATE = ("matplotlib.backends.backend_agg", "matplotlib.figure", "fmicl_text.cli.recipe", "sklearn.linear_model")


def start_program(program, *flags, env=None, **options):
    """subprocess.Popen of `python PROGRAM FLAGS`, or of `python -c CODE FLAGS`, without an exec: the modules that this
    process has imported are not imported again, and patches of them remain. Environment variables that libraries read
    when they are imported have no effect, and memory and start-up differ: for these, use subprocess."""
    for module in LATE:  # which programs import when they need them
        importlib.import_module(module)
    arguments = [str(one) for one in (program, *flags)]
    environment = dict(os.environ if env is None else env)
    return subprocess.Popen(
        [sys.executable, *arguments], preexec_fn=lambda: become(arguments, environment), text=True, **options
    )


def run_program(program, *flags, cwd=None, env=None, timeout=300):
    """subprocess.run of such a program in a session of its own, with its output."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_program(program, *flags, cwd=cwd, env=env, start_new_session=True, **streams) as process:
        try:
            printed = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, *printed)


def become(arguments, environment):
    """Run a program in this process, which was forked for it, and end the process as an interpreter ends."""
    status = 1
    try:
        like_a_new_interpreter(environment)
        status = status_of(run_main, arguments)
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        atexit._run_exitfuncs()
        sys.stderr.flush()
        try:
            sys.stdout.flush()
        except OSError:
            status = 120
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            signal.raise_signal(-status)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def like_a_new_interpreter(environment):
    """Set what an interpreter sets at its start, and what tests or pytest have changed."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        if number > 2 and number != nowhere and os.path.exists(f"/dev/fd/{number}"):
            os.dup2(nowhere, number, False)  # if closed, garbage could close the next one
    os.environ.clear()
    os.environ.update(environment)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        before, lines = getattr(sys, f"__{name}__"), number == 2 or "PYTHONUNBUFFERED" in environment
        file = os.fdopen(number, "wb" if number else "rb", closefd=False)
        stream = io.TextIOWrapper(file, before.encoding, before.errors, line_buffering=lines)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    if sys.modules.pop("fmicl_text.cli.interrupt", None):  # its import sets the hook
        del sys.modules["fmicl_text.cli"].interrupt

    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
    warnings.filters[:0] = FILTERS
    warnings.showwarning = lambda *warning: sys.stderr.write(warnings.formatwarning(*warning[:4]))
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr
                vars(handler).pop("flush", None)  # of transformers: that of another stream

    atexit._clear()
    for registry in (weakref.finalize._registry, util._finalizer_registry, multiprocessing.process._children):
        registry.clear()
    for at_exit in (logging.shutdown, weakref.finalize._exitfunc, util._exit_function):
        atexit.register(at_exit)
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    server = forkserver._forkserver
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    torch.set_num_threads(1)
    gc.enable()
    gc.freeze()


def run_main(program, *flags):
    """Run a program as the module __main__."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    if program == "-c":
        (source, *flags), folder, name = flags, "", "<string>"
    else:
        source, folder = Path(program).read_text(encoding="utf-8"), Path(program).resolve().parent
        name = module.__file__ = os.path.abspath(program)
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [str(folder), *given, *(path for path in PATHS if path not in given)]
    sys.argv = [program, *flags]
    exec(compile(source, name, "exec"), vars(module))


def status_of(function, arguments):
    """The exit status of a call, whose exceptions are printed, or minus the number of the signal that ends it."""
    try:
        function(*arguments)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        sys.stderr.write(f"{stop.code}\n")
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0
