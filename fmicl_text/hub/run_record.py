"""The record of a run, during training and at its end: the content of results.json, and the input of the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmicl_text.evaluation.report import float32_products, library_versions


def scored_on(
    name: str,
    dataset_id: str | None = None,
    task: str | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> dict[str, str | None]:
    """The evaluation data, for the record and the model card.

    Args:
        name: Name to display.
        dataset_id, split, revision: Dataset on the Hub, its split and commit.
        task: Name of the task in MTEB.
    """
    return {"name": name, "dataset_id": dataset_id, "task": task, "split": split, "revision": revision}


def scores_at(trainer: Any, step: int) -> dict[str, float]:
    """The evaluator's metrics that were logged at a step; {} if there was no evaluation."""
    scores = [entry for entry in trainer.state.log_history if entry.get("step") == step]
    return {name: value for entry in scores for name, value in entry.items() if name.startswith("eval_")}


def run_record(trainer: Any, after: Mapping[str, float]) -> dict[str, Any]:
    """Settings, metrics and environment of a run, in a form that JSON can store.

    Args:
        trainer: A `FMICLTrainer`. Its `metadata` adds facts that the trainer does not know: settings, before (metrics
            before training), data, scored_on, and inputs, the hashes of files that the settings name.
        after: Metrics of the encoder in its current state.
    """
    args, state = trainer.args, trainer.state
    settings = {name: getattr(args, name) for name in ("per_device_train_batch_size", "learning_rate")}
    metadata = {
        "settings": settings,
        "before": {},
        "data": {"source": "not recorded"},
        "scored_on": scored_on("the evaluator's own data"),
    }
    metadata |= trainer.metadata
    described: dict[str, Any] = getattr(trainer.views, "describe", dict)()
    views = described.get("views")
    data = {"views": " ".join(views)} if isinstance(views, list) else {}
    history = [{"step": 0, **metadata["before"]}, *state.log_history]
    if after and not any(name in entry for entry in state.log_history for name in after):
        history.append({"step": state.global_step, **after})
    return {
        "objective": trainer.loss.objective_name,
        "formula": trainer.loss.formula,
        "hyperparameters": trainer.loss.hyperparameters,
        "seed": args.seed,
        "steps": state.global_step,
        "engine": str(trainer.accelerator.distributed_type.value),
        "device": args.device.type,
        "precision": trainer.accelerator.mixed_precision,  # also that of `accelerate launch`
        "float32_products": float32_products(args.device.type),
        "processes": args.world_size,
        "best_step": state.best_global_step if args.load_best_model_at_end else None,
        "before": metadata["before"],
        "after": dict(after),
        "encoder": trainer.model.describe(),
        "scored_on": metadata["scored_on"],
        "data": data | metadata["data"],
        "settings": metadata["settings"],
        "inputs": metadata.get("inputs", {}),
        "versions": library_versions(),
        "log_history": history,
    }
