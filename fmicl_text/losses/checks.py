"""Checks of arguments, and imports of objects that an argument names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import import_module
from numbers import Real
from typing import Any

from torch import Tensor


def require_choice(name: str, value: str, accepted: Iterable[str]) -> None:
    """Raise a ValueError that names the argument, unless the value is accepted."""
    accepted = list(accepted)
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")


def require_positive(name: str, value: Any, or_auto: bool = False) -> None:
    """Raise a ValueError that names the argument, unless the value is a finite number > 0 (or "auto", if accepted)."""
    if or_auto and isinstance(value, str) and value == "auto":
        return
    number = isinstance(value, Real | Tensor) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value > 0):
        shown = repr(value) if isinstance(value, str) else value
        auto = "auto or " if or_auto else ""
        raise ValueError(f"{name} must be {auto}a finite number > 0, got {shown}")


def import_attribute(argument: str, value: str, expected: str) -> Any:
    """Import the attribute that `package.module:attribute` names.

    Args:
        argument: Name of the argument, for messages.
        value: `package.module:attribute`.
        expected: Accepted values, for messages.

    Raises:
        ValueError: The value has another form, the module cannot be imported, or the attribute does not exist.
    """
    module_name, _, attribute = value.partition(":")
    if not (attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ValueError(f"{argument}={value}: expected {expected}")
    try:
        module = import_module(module_name)
    except Exception as error:  # any type, by the code of the module
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())
        raise ValueError(f"{argument}={value}: cannot import {module_name} ({reason}); expected {expected}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(f"{argument}={value}: {module_name} has no {attribute}; expected {expected}") from error
