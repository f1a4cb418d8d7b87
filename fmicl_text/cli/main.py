"""The `fmicl-text` command. Its sub-commands are the recipes and scripts of this project.

    fmicl-text train --divergence js
    fmicl-text train --config bert-base-js --num_processes 2
    fmicl-text sts --model runs/fmicl-js

Flags of `accelerate launch` that a recipe does not have, such as --num_processes, are passed to the launcher.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import fmicl_text
from fmicl_text.processes import LAUNCH

PACKAGE = Path(__file__).parents[1]


class Subcommand(NamedTuple):
    """A sub-command.

    Args:
        help: Its line in `fmicl-text --help`.
        script: File that it runs.
        arguments: Module with the options of a recipe as `GROUPS`; None for a script that accelerate does not launch.
    """

    help: str
    script: str
    arguments: str | None = None


SUBCOMMANDS = {
    "train": Subcommand("Train a sentence encoder.", "recipes/simcse_fmicl.py", "fmicl_text.cli.text"),
    "train-images": Subcommand("Train an image encoder.", "recipes/vision_fmicl.py", "fmicl_text.cli.vision"),
    "sts": Subcommand("Score sentence encoders on the STS tasks or on your own sentence pairs.", "eval/sts.py"),
    "compare": Subcommand("Merge result files into one table and plot.", "cli/compare.py"),
    "push": Subcommand("Upload a trained encoder to the Hugging Face Hub.", "cli/push.py"),
}


def main() -> None:
    """Run the sub-command that the command line names."""
    try:
        run_subcommand()
    except KeyboardInterrupt:  # while modules are imported
        print(f"{program_name('fmicl-text')}: stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


def run_subcommand() -> None:
    """As `main`."""
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"fmicl_text {fmicl_text.__version__}")
    elif name not in SUBCOMMANDS:
        problem = f"unknown command {name}" if name else "no command given"
        print(f"fmicl-text: error: {problem}; choose from {', '.join(SUBCOMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        script, module = shipped(SUBCOMMANDS[name].script), SUBCOMMANDS[name].arguments
        record_launch([name, *arguments])
        if module is None:
            run_script(script, arguments)
        else:
            from fmicl_text.cli.accelerate_launch import launch

            launch(script, arguments, import_module(module).GROUPS)


def usage() -> str:
    """The text of `fmicl-text --help`."""
    width = max(map(len, SUBCOMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.help}" for name, command in SUBCOMMANDS.items())
    return f"""usage: fmicl-text COMMAND [ARGUMENTS]

{commands}

`fmicl-text COMMAND --help` lists the options of a command, `fmicl-text --version` prints the version."""


def shipped(path: str) -> Path:
    """A file or folder of this project. A wheel has it inside the package, a clone next to the package.

    >>> shipped("recipes/simcse_fmicl.py").is_file()
    True
    """
    return next((folder / path for folder in (PACKAGE, PACKAGE.parent) if (folder / path).exists()), PACKAGE / path)


def find_yaml(name: str, folder: str) -> Path:
    """Resolve a path, or the name of a file under recipes/, to a YAML file.

    >>> find_yaml("bert-base-kl", "configs/*").parts[-2:]
    ('text', 'bert-base-kl.yaml')
    """
    path = Path(name)
    if os.path.exists(path) or path.name != name:
        return path
    return next(shipped("recipes").glob(f"{folder}/{name}.yaml"), path)


def run_script(script: Path, arguments: Sequence[str]) -> None:
    """Run a script in this process as `python SCRIPT ARGUMENTS` would."""
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def record_launch(command: Sequence[str], launcher: Sequence[str] = ()) -> None:
    """Record the command in the environment, for messages of this process and of those that it starts.

    Args:
        command: The sub-command and its arguments.
        launcher: The arguments that are passed to `accelerate launch`.
    """
    os.environ[LAUNCH] = json.dumps({"command": ["fmicl-text", *command], "launcher": list(launcher)})


def program_name(script: str | None = None) -> str:
    """`fmicl-text` and the sub-command if this process was started through them, else the name of the script.

    Args:
        script: Name of the script. None uses the running one.
    """
    if LAUNCH in os.environ:
        return " ".join(json.loads(os.environ[LAUNCH])["command"][:2])
    return script or Path(sys.argv[0]).name


if __name__ == "__main__":
    main()
