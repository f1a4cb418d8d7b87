"""The public names and their parameters, what importing them costs, and the message for a broken torchvision.

A change of the interface changes public_api.txt: regenerate it with `python tests/test_public_api.py`, and mention the
change in CHANGELOG.md.
"""

import dataclasses
import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from transformers import TrainingArguments

import fmicl_text

ROOT = Path(__file__).parents[1]
SNAPSHOT = Path(__file__).with_name("public_api.txt")
MODULES = ("", ".losses", ".text", ".vision", ".training", ".evaluation", ".integrations.sentence_transformers")
HEAVY = ("transformers", "datasets", "sentence_transformers", "accelerate", "sklearn", "matplotlib", "scipy", "pandas")


def run_python(code: str, *extra_path: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*extra_path, str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement", ["from fmicl_text import FMICLLoss", "from fmicl_text.losses import SIMILARITIES"]
)
def test_losses_import_torch_only(statement):
    done = run_python(f"{statement}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])")
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.slow
def test_importing_the_image_modules_prints_nothing():
    """Without torchvision, transformers warns at the import of an image processor that falls back on PIL."""
    done = run_python("import fmicl_text.vision as vision\nfor name in vision.__all__: getattr(vision, name)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def public_api() -> str:
    """A line for each public name: its module and, of what can be called, its parameters."""
    lines = []
    for suffix in MODULES:
        module = import_module(f"fmicl_text{suffix}")
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        for name in sorted(getattr(module, "__all__", None) or [name for name in own if name.endswith("Loss")]):
            value = getattr(module, name)
            if dataclasses.is_dataclass(value) and issubclass(value, TrainingArguments):
                parameters = f"({', '.join(value.__annotations__)})"
            elif inspect.isfunction(value) or (
                isinstance(value, type) and vars(value).keys() & {"__init__", "_fields"}
            ):
                signature = inspect.signature(value)
                plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
                parameters = str(signature.replace(parameters=plain, return_annotation=signature.empty))
            else:
                parameters = f": {', '.join(value)}" if isinstance(value, dict) else ""
            lines.append(f"{module.__name__}.{name}{parameters}")
    return "\n".join(lines) + "\n"


def test_the_public_api_is_the_snapshot():
    assert public_api() == SNAPSHOT.read_text(encoding="utf-8")


def test_every_public_name_can_be_imported():
    assert all(getattr(fmicl_text, name) is not None for name in fmicl_text.__all__)
    assert set(fmicl_text.__all__) <= set(dir(fmicl_text))
    with pytest.raises(AttributeError, match="nothing"):
        fmicl_text.nothing  # noqa: B018


@pytest.mark.slow
def test_a_broken_torchvision_is_named(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text('raise RuntimeError("operator nms does not exist")')
    (tmp_path / "torchvision-0.28.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.28.0.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    done = run_python("from fmicl_text import FMICLTrainer", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: torchvision is installed but broken (operator")


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api(), encoding="utf-8")
