"""Public names of `fmicl_text.text` and `fmicl_text.vision`, which are imported on first use."""

import subprocess
import sys
from importlib import import_module

import pytest

PACKAGES = ("fmicl_text.text", "fmicl_text.vision")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_can_be_imported(package):
    module = import_module(package)
    assert module.__all__ == dir(module) and all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


def test_importing_the_packages_imports_no_libraries():
    libraries = ("torch", "transformers", "datasets", "sentence_transformers", "sklearn", "matplotlib")
    code = f"import sys, {', '.join(PACKAGES)}; print(*[name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
