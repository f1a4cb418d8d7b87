"""What records and model cards contain of a loss: its constructor's arguments, as JSON, and the formula of f-MICL."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from torch import Tensor

from fmicl_text.losses.divergences import FDivergence
from fmicl_text.losses.similarity import Similarity


def constructor_arguments(loss_class: type) -> list[str]:
    """Names of the arguments of a class's constructor, including those that it passes to its base as **kwargs."""
    names: dict[str, None] = {}
    for base in loss_class.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base).parameters.values()
            variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            names |= dict.fromkeys(parameter.name for parameter in parameters if parameter.kind not in variadic)
            if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                break
    return list(names)


def to_json(value: Any) -> Any:
    """A hyperparameter as a JSON-serializable value: divergences, similarities, functions and classes by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Tensor | np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, FDivergence):
        return value.source or value.name
    if isinstance(value, Similarity):
        return value.name
    return value.__name__ if inspect.isroutine(value) or isinstance(value, type) else type(value).__name__


def fmicl_formula(divergence: FDivergence, similarity: Similarity) -> str:
    """The loss, its score and conjugate as Markdown."""
    own = f"{divergence.name}, a user-defined convex function", "f'(e^r)", "(f* o f')(e^r)"
    f, score, conjugate = divergence.formulas or own
    symbol = similarity.symbol
    if not similarity.is_log_ratio:
        score, conjugate = symbol, f"f*({symbol})"
    definition = similarity.definition or f"{symbol} = {similarity.name} similarity of unit embeddings"
    return (
        f"    loss = -mean score({symbol} of positives) + alpha mean conjugate({symbol} of negatives)\n"
        f"    score({symbol}) = {score}\n    conjugate({symbol}) = {conjugate}\n\n"
        f"for f(u) = {f}, and {definition}."
    )
