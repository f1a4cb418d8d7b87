"""Compare settings of a recipe: every setting is run with every seed, and a table shows means, spreads and differences.

    python recipes/compare.py recipes/studies/digits.yaml --output_dir runs/digits
    python recipes/compare.py recipes/studies/temperature.yaml --variables data=/data --jobs 2
    python recipes/compare.py --list recipes/studies/*.yaml      # the studies, with their number of runs and cost

A study is a YAML file:

    about: Divergences on digits.
    cost: 15 s of one core per run
    recipe: vision_fmicl             # or simcse_fmicl
    seeds: [1, 2, 3]
    metrics: {knn_accuracy: k-NN}    # a metric of results.json or a column of its probes; its title in the table
    hyperparameters: [alpha]         # optional: shown as well, such as those that the recipe measures
    best_by: divergence              # optional: a second table with the best row of every value of an option
    choose_by: mutual_information    # optional: a table of the rows that this logged value would choose
    curves: {loss: loss}             # optional: logged values to plot along training; their titles in the plot
    baseline: infonce, temperature 0.5
    options: {max_steps: 100}        # options of the recipe, for all runs
    columns:                         # optional: settings that become columns of the table, such as data or encoders
      digits: {}
    rows:                            # settings that become rows; a list of values makes one row per value
      - divergence: [kl, js, "mine:power"]
        gamma: [5, 10]
      - {objective: infonce, temperature: 0.5, name: InfoNCE}

An option that takes several values is given as a list in `options` and `columns`, and as a list in a list in `rows`.
`{data}` in a value is replaced by --variables data=..., whose default the study can give (variables: {data: data}).

`mine:power` is the attribute `power` of a module mine.py beside the YAML file (or of an installed one), so a study can
run code: like a script, it has to be trusted.

The output folder contains the record of every run (runs/*.json), the output of the recipe (logs/), and table.md,
table.json, table.png and curves.png. Started again, a study continues: runs that are finished are not repeated, and a
run with checkpoints resumes from the last one. Encoders are deleted after their run unless keep_encoders is true.

Differences are paired by seed. Their 95% intervals are those of Student's t: a bootstrap over three to five seeds would
be too narrow.
"""

from __future__ import annotations

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import fmicl_text
from fmicl_text.cli.checks import whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.cli.streams import Stopped
from fmicl_text.cli.study import Run, Study, load_study
from fmicl_text.cli.study_tables import values_of, write_tables
from fmicl_text.cli.text import parse_args as parse_text_args
from fmicl_text.cli.vision import parse_vision_args
from fmicl_text.errors import InputError
from fmicl_text.evaluation.report import markdown_table, write_json
from fmicl_text.files import content_hash, read_json
from fmicl_text.training.checkpoint import checkpoints_in

PARSERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "simcse_fmicl": parse_text_args,
    "vision_fmicl": parse_vision_args,
}
IN_NAME = ("objective", "divergence")  # options whose value suffices in the name of a row
BEFORE = "before training"
RESERVED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "config")


# ---- runs


def check(study: Study, runs: Sequence[Run]) -> None:
    """Raise `InputError` for an option that the recipe does not accept."""
    for run in runs:
        try:
            PARSERS[study.recipe]([*run.arguments, "--output_dir=unused"])
        except InputError as error:
            raise InputError(f"{run.row}{run.column and f', {run.column}'}: {error}") from error
    names = [run.name for run in runs]
    if twice := [run.row for run in runs if names.count(run.name) > 1]:
        raise InputError(f"rows: the files of {twice[0]} would have the name of another row; give it another `name`")


def names_module(run: Run) -> bool:
    """Whether the objective or the divergence of a run is given as module:name. Only then is the folder of the study
    searched for modules, as one of them may have the name of a library."""
    return any(word.startswith(("--objective=", "--divergence=")) and ":" in word for word in run.arguments)


def record_of(run: Run, folder: Path) -> dict[str, Any] | None:
    """The record of a run; None if it is not finished."""
    path = folder / "runs" / f"{run.name}.json"
    try:
        record = read_json(path)
        arguments = record["arguments"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: not the record of a run ({error})") from error
    if arguments != run.arguments:
        changed = sorted({*arguments} ^ {*run.arguments})
        raise InputError(
            f"{path} is a run with other options ({' '.join(changed)}): choose another --output_dir, or delete it"
        )
    return record if isinstance(record, dict) else None


class Runner:
    """Runs the recipe in processes of its own.

    Args:
        study: The study.
        folder: The output folder.
        threads: Threads of each run.
        modules: Folder of modules that the study names.
    """

    def __init__(self, study: Study, folder: Path, threads: int, modules: Path) -> None:
        self.study, self.folder, self.threads, self.modules = study, folder, threads, modules
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def run(self, run: Run) -> None:
        """Run the recipe, from its last checkpoint if it has one, and write the record."""
        if self.stopped:
            return
        with self.locked_log(run) as log:
            if record_of(run, self.folder) is None:  # of a process that went on after this script was killed
                try:
                    self.execute(run, log)
                except BaseException:
                    self.stopped = True  # before this thread begins the next run
                    raise

    @contextmanager
    def locked_log(self, run: Run) -> Iterator[Any]:
        """The log of a run, locked. The run inherits the lock, so that a run that goes on after this script was killed
        is waited for."""
        path = self.folder / "logs" / f"{run.name}.log"
        with path.open("ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tqdm.write(f"{run.name} is still running in another process; waiting for it")
                fcntl.flock(log, fcntl.LOCK_EX)
            yield log

    def execute(self, run: Run, log: Any) -> None:
        encoder = self.folder / "encoders" / run.name
        results = encoder / "results.json"
        if not results.exists() and not checkpoints_in(encoder):
            shutil.rmtree(encoder, ignore_errors=True)
        resume = ["--resume_from_checkpoint=auto"] if encoder.exists() else []
        script = Path(__file__).with_name(f"{self.study.recipe}.py")
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        if names_module(run):
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self.modules), os.environ.get("PYTHONPATH")]))
        command = [
            sys.executable,
            str(script),
            *run.arguments,
            "--disable_tqdm=True",
            f"--output_dir={encoder}",
            *resume,
        ]
        start, position = time.monotonic(), log.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self.running.add(process)
        if self.stopped:
            process.terminate()
        status = process.wait()
        self.running.discard(process)
        if self.stopped:
            return
        if status:
            with open(log.name, "rb") as output:
                output.seek(position)
                lines = output.read().decode(errors="replace").strip().splitlines()
            raise InputError(f"{run.name} ended with status {status}: {lines[-1] if lines else log.name}")
        record = {
            "row": run.row,
            "column": run.column,
            "seed": run.seed,
            "arguments": run.arguments,
            "seconds": round(time.monotonic() - start, 1),
            "code": code_hash(),
            "results": read_json(results),
        }
        values_of(record, self.study.metrics)
        write_json(self.folder / "runs" / f"{run.name}.json", record)
        if not self.study.keep_encoders:
            shutil.rmtree(encoder)

    def stop(self) -> None:
        """Stop all runs; they save a checkpoint."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()
        for process in list(self.running):
            process.wait()


def code_hash() -> str:
    """A hash of the package and the recipes, by which runs of different versions are told apart."""
    package = Path(fmicl_text.__file__).parent
    files = [*package.rglob("*.py"), *(Path(__file__).with_name(f"{name}.py") for name in PARSERS)]
    return content_hash(*sorted(files))[:12]


def execute(study: Study, runs: Sequence[Run], folder: Path, jobs: int, threads: int, modules: Path) -> None:
    """Execute all runs that are not finished, `jobs` at a time. The first one that fails ends all."""
    if folder.is_dir() and any(folder.iterdir()) and not ((folder / "runs").is_dir() and (folder / "logs").is_dir()):
        raise InputError(f"--output_dir {folder}: contains other files; choose a new or empty folder")
    for name in ("runs", "logs", "encoders"):
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {folder}: {error.strerror}") from error
    missing = [run for run in runs if record_of(run, folder) is None]
    runner = Runner(study, folder, threads, modules)
    progress = tqdm(total=len(runs), initial=len(runs) - len(missing), desc="runs", smoothing=0)
    with progress, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(runner.run, run) for run in missing]
        try:
            for future in futures:
                future.add_done_callback(lambda one: progress.update(not (one.cancelled() or one.exception())))
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
    if not any((folder / "encoders").iterdir()):
        (folder / "encoders").rmdir()


# ---- table


def print_list(paths: Sequence[Path]) -> None:
    """Print the studies with their number of runs and cost."""
    studies = [(path, load_study(path)) for path in paths]
    rows = [{"study": path.stem, "runs": one.num_runs, "cost": one.cost, "about": one.about} for path, one in studies]
    print(markdown_table(rows))


# ----


def variable(argument: str) -> tuple[str, str]:
    name, equals, value = argument.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{argument}: must be NAME=VALUE")
    return name, value


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser("compare.py", __doc__)
    parser.add_argument("study", nargs="+", type=Path, help="YAML file of the study")
    parser.add_argument("--output_dir", type=Path, help="folder of the runs and the table (default: runs/STUDY)")
    parser.add_argument("--variables", nargs="+", type=variable, default=[], metavar="NAME=VALUE", help="of the study")
    parser.add_argument("--jobs", type=partial(whole_number, lowest=1), default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--threads", type=partial(whole_number, lowest=1), default=1, help="threads of each run (default: 1)"
    )
    parser.add_argument("--list", action="store_true", help="only print the studies, their runs and cost")
    parser.add_argument("--table", action="store_true", help="only print the table of the runs that are finished")
    args = parser.parse_args()
    if len(args.study) > 1 and not args.list:
        parser.error("several studies are accepted with --list only")
    return args


def stop(number: int, frame: Any) -> None:
    raise Stopped(number)


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, stop)
    if args.list:
        return print_list(args.study)
    path = args.study[0]
    study = load_study(path)
    folder = args.output_dir or Path("runs") / path.stem
    runs = study.runs(dict(args.variables))
    if not args.table:
        modules = path.parent.resolve()
        if any(map(names_module, runs)):
            sys.path.insert(0, str(modules))
        check(study, runs)
        execute(study, runs, folder, args.jobs, args.threads, modules)
    records = [record for run in runs if (record := record_of(run, folder)) is not None]
    if not records:
        raise InputError(f"--output_dir {folder}: contains no finished run of this study")
    print(write_tables(study, records, folder), end="")


if __name__ == "__main__":
    with cli_errors("compare.py"):
        main()
