"""What is known of a run, while it lasts and at its end: the content of results.json, from which the card is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fmicl_text.evaluation.report import library_versions


def scored_on(
    name: str,
    dataset_id: str | None = None,
    task: str | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> dict[str, str | None]:
    """What metrics are of, for the record and the card.

    Args:
        name: For people.
        dataset_id, task, split, revision: Where the data can be looked up on the Hub, and its commit; MTEB's name.
    """
    return {"name": name, "dataset_id": dataset_id, "task": task, "split": split, "revision": revision}


def scores_at(trainer: Any, step: int) -> dict[str, float]:
    """The evaluator's metrics that were logged at a step; {} if it was not run there."""
    scores = [entry for entry in trainer.state.log_history if entry.get("step") == step]
    return {name: value for entry in scores for name, value in entry.items() if name.startswith("eval_")}


def run_record(trainer: Any, after: Mapping[str, float]) -> dict[str, Any]:
    """Everything a reader, or the model card, may want to know of a run.

    Args:
        trainer: A `FMICLTrainer`. Its `facts` say what it cannot know: settings (as `arguments.resolved_settings` gives
            them), before (metrics before training), data and scored_on; a recipe sets them.
        after: Metrics of the encoder as it is now.
    """
    args, state = trainer.args, trainer.state
    settings = {name: getattr(args, name) for name in ("per_device_train_batch_size", "learning_rate")}
    facts = {
        "settings": settings,
        "before": {},
        "data": {"source": "not recorded"},
        "scored_on": scored_on("the evaluator's own data"),
    }
    facts |= trainer.metadata
    history = [{"step": 0, **facts["before"]}, *state.log_history]
    if after and not any(name in entry for entry in state.log_history for name in after):
        history.append({"step": state.global_step, **after})
    return {
        "objective": args.objective_name,
        "hyperparameters": trainer.loss.hyperparameters,
        "seed": args.seed,
        "steps": state.global_step,
        "engine": str(trainer.accelerator.distributed_type.value),
        "processes": args.world_size,
        "best_step": state.best_global_step if args.load_best_model_at_end else None,
        "before": facts["before"],
        "after": dict(after),
        "encoder": trainer.model.describe(),
        "scored_on": facts["scored_on"],
        "data": facts["data"],
        "settings": facts["settings"],
        "versions": library_versions(),
        "log_history": history,
    }
