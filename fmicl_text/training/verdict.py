"""Whether training made the encoder better, beyond the noise of the measure; the encoder as it came is kept if not."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ExportableState

from fmicl_text.errors import InputError
from fmicl_text.evaluation.bootstrap import bootstrap_difference
from fmicl_text.training.ranks import on_main_process

if TYPE_CHECKING:
    from fmicl_text.training.trainer import FMICLTrainer

BETTER, NO_BETTER, WORSE = "better", "no better", "worse"
NOISE = 2.0  # standard errors; a smaller difference counts as noise
# A smaller difference is too small to matter, as a share of the metric's scale: 0.1 of scores in percent.
RELEVANT_SHARE = 0.001
ROUNDING = 1e-9  # of a difference that is exactly the smallest


@dataclass
class Scores:
    """The scores of an encoder, as JSON can store them.

    Args:
        step: The step at which the encoder was evaluated.
        metrics: The evaluator's metrics, without the prefix `eval_`.
        metric: The one that checkpoints are selected by; without selection, the evaluator's primary metric.
        greater_is_better: Whether it should rise.
        observations: The values of the evaluator's items, [N, ...]; None for an evaluator that does not keep them.
        digest: `encoder_digest` of the encoder, where it was computed.
    """

    step: int
    metrics: dict[str, float]
    metric: str
    greater_is_better: bool = True
    observations: list[Any] | None = None
    digest: str | None = None


@dataclass
class Verdict:
    """The encoder after training compared with the encoder before.

    Args:
        outcome: `better` or `worse` if the difference is above twice its standard error and at least
            `smallest_difference`, else `no better`. Without a standard error, the second alone decides.
        metric: Name of the metric.
        before: Its value before training.
        after: Its value for the trained encoder: that of the best step if checkpoints are selected, else the last.
        difference: `after - before`.
        standard_error: Of the difference, by a paired bootstrap over the items of the evaluation set; None if the
            evaluator does not keep their values (see `evaluation.bootstrap`).
        num_items: Number of items; None likewise.
        step: The step of the trained encoder.
        saved_step: The step of the encoder that is saved: 0 for the encoder before training.
        text: All of this in one line.
        smallest_difference: The smallest difference that counts; see `smallest_difference`.
    """

    outcome: str
    metric: str
    before: float
    after: float
    difference: float
    standard_error: float | None
    num_items: int | None
    step: int
    saved_step: int
    text: str = ""
    smallest_difference: float = 0.0


def compare(before: Scores, after: Scores, evaluator: Any, selects: bool) -> Verdict:
    """The verdict on two evaluations by one evaluator, without its text.

    Args:
        before: Scores before training.
        after: Scores of the trained encoder, whose `metric` is compared.
        evaluator: Has `metric_of` if its scores have observations.
        selects: Whether the encoder before training is saved unless training made it better.
    """
    old, new = (scores.metrics.get(after.metric, math.nan) for scores in (before, after))
    error = standard_error(before, after, evaluator)
    gain = 0.0 if new == old else (new - old) * (1 if after.greater_is_better else -1)  # also of infinities
    if math.isnan(gain):
        gain = -math.inf if math.isnan(new) else math.inf
    least = smallest_difference(evaluator, after.metric, old, new, after.greater_is_better)

    def counts(change: float) -> bool:
        return change > NOISE * (error or 0.0) and change >= least * (1 - ROUNDING)

    outcome = BETTER if counts(gain) else WORSE if counts(-gain) and not selects else NO_BETTER
    saved_step = 0 if selects and outcome != BETTER else after.step
    num_items = None if error is None else len(before.observations or ())
    return Verdict(outcome, after.metric, old, new, new - old, error, num_items, after.step, saved_step, "", least)


def smallest_difference(evaluator: Any, metric: str, before: float, after: float, rises: bool = True) -> float:
    """The smallest difference of a metric that matters: the evaluator's own, in `smallest_differences` by metric (0.1
    for scores in percent, 0.01 nats); else 0.1 % of the scale, which is 1 for scores in [0, 1] that should rise, as of
    most evaluators of sentence-transformers, and else the larger absolute value."""
    known = getattr(evaluator, "smallest_differences", {}).get(metric)
    if known is not None:
        return float(known)
    largest = max(abs(before), abs(after))
    is_share = rises and 0 <= before <= 1 and 0 <= after <= 1
    return RELEVANT_SHARE if is_share else RELEVANT_SHARE * largest if math.isfinite(largest) else 0.0


def standard_error(before: Scores, after: Scores, evaluator: Any) -> float | None:
    """The standard error of the difference of the metric; None if the observations are not those of this metric."""
    if before.observations is None or after.observations is None:
        return None
    old, new = (np.asarray(scores.observations, dtype=float) for scores in (before, after))
    known = [evaluator.metric_of(rows) for rows in (old, new)]
    reported = [scores.metrics.get(after.metric, math.nan) for scores in (before, after)]
    if len(old) < 2 or len(old) != len(new) or not np.allclose(known, reported):
        return None
    error = bootstrap_difference(old, new, evaluator.metric_of)[1]
    return None if math.isnan(error) else error


def give_verdict(trainer: FMICLTrainer, before: Scores, after: Scores, selects: bool = False) -> None:
    """Set `trainer.verdict`, the same in all processes; arguments as for `compare`."""
    args, evaluator = trainer.args, trainer.evaluator
    name = (trainer.metadata.get("scored_on") or {}).get("name")

    def decide() -> Verdict:
        verdict = compare(before, after, evaluator, selects)
        items = getattr(evaluator, "items", None) if verdict.num_items else None
        parts = [
            f"{verdict.num_items:,} {items}" if items else "",
            "" if not name or name.partition(" ")[2].startswith(items or " ") else name,
        ]
        advice = f"a smaller learning_rate (now {args.learning_rate:g})"
        if not args.load_best_model_at_end:
            advice = f"load_best_model_at_end=True, which keeps the better encoder, {advice}"
        if "held-out" not in f"{items} {name}":  # held-out rows are like the training data
            advice += ", or training data that is closer to the evaluation data"
        return replace(verdict, text=describe(verdict, " of ".join(filter(None, parts)), advice))

    trainer.verdict = on_main_process(decide)


def describe(verdict: Verdict, data: str, advice: str) -> str:
    """The verdict in one line.

    Args:
        verdict: Without text.
        data: The evaluation data, such as "1,500 pairs of dev.tsv"; may be empty.
        advice: What helps if the encoder got worse.
    """
    largest = max(abs(verdict.before), abs(verdict.after))
    digits = 2 if largest >= 10 or not math.isfinite(largest) else 4
    error, least = verdict.standard_error, verdict.smallest_difference
    noise = ", its noise is unknown" if error is None else f" +- {shown(error, digits)}"
    noise += f", on {data}" if data else ""
    step = f" at step {verdict.step}" if verdict.saved_step != verdict.step else ""
    line = (
        f"{verdict.outcome} than before training: {verdict.metric} {verdict.before:.{digits}f} -> "
        f"{verdict.after:.{digits}f}{step} ({shown(verdict.difference, digits, '+')}{noise})"
    )
    if verdict.outcome == BETTER:
        return line
    line += f"; the encoder {'is saved as it came' if verdict.saved_step == 0 else f'of step {verdict.step} is saved'}"
    limit = NOISE * (error or 0.0)
    if limit < least and abs(verdict.difference) < least:
        reason = f"a difference below {least:.2g} is too small to matter"
        return f"{line}. Try more steps, or a larger learning_rate: {reason}"
    if verdict.outcome == NO_BETTER and abs(verdict.difference) <= limit:
        reason = f": a difference below {NOISE:g} standard errors is noise" if error else ""
        return f"{line}. Try more steps, or more evaluation data{reason}"
    return f"{line}. Try {advice}"


def shown(value: float, digits: int, sign: str = "-") -> str:
    """A number with a given number of digits after the point, or more if it would read 0."""
    text = f"{value:{sign}.{digits}f}"
    return text if float(text) else f"{value:{sign}.1g}"


def encoder_digest(encoder: torch.nn.Module) -> str:
    """A hash of the weights that determine the embeddings of an encoder before training. The first factors of new
    adapters are random and have no effect, because the second ones are 0."""
    digest = hashlib.sha256()
    for name, weight in encoder.state_dict().items():
        if ".lora_A." not in name:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class ScoreRecord(TrainerCallback, ExportableState):
    """The scores that a verdict needs, stored in checkpoints.

    Attributes:
        start: `Scores` of the encoder before training, as a dict; None if it is not a candidate for the best.
        best: Likewise of the best step so far.
    """

    def __init__(self) -> None:
        self.start: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self))}


class StepZeroCallback(TrainerCallback):
    """Makes the encoder before training a candidate for the best: with `load_best_model_at_end` and an evaluator, it is
    evaluated before the first step, its weights are kept in CPU memory, and it is what a run ends with unless the best
    step is better by more than the noise.

    Args:
        trainer: The trainer.
        evaluates_itself: Whether its class has an `evaluate` of its own, whose metrics an evaluator may not have.

    Attributes:
        weights: The weights before training, {} if they are not needed.
        digest: Hash of the encoder before training.
        known: Scores of encoders that were evaluated outside of training, by digest, and the evaluator.
    """

    def __init__(self, trainer: FMICLTrainer, evaluates_itself: bool = False) -> None:
        self.trainer, self.evaluates_itself = trainer, evaluates_itself
        self.weights: dict[str, Tensor] = {}
        self.digest = ""
        self.known: tuple[dict[str, Scores], Any] = ({}, None)

    @property
    def is_candidate(self) -> bool:
        """Whether this training compares its best step with the encoder before training. Trials of a search do not: all
        that are not better by more than the noise would have one score."""
        trainer = self.trainer
        selects = trainer.args.load_best_model_at_end and trainer.evaluator is not None and not self.evaluates_itself
        selects = selects and trainer.hp_search_backend is None
        return selects and not trainer.is_fsdp_enabled and not is_deepspeed_zero3_enabled()

    def keep_weights(self) -> None:
        """Copy the weights that a checkpoint replaces. Called before training, or before a checkpoint is loaded."""
        self.weights = {}
        if self.is_candidate:
            model = self.trainer.model
            kept = {
                name: weight
                for name, weight in model.state_dict().items()
                if model.loads_exported or not model.is_exported(name)
            }
            self.weights = {name: weight.detach().to("cpu", copy=True) for name, weight in kept.items()}
            self.digest = encoder_digest(model.encoder)
            if "evaluation_data" in self.trainer.checkpointer.changes:
                self.trainer.run_evaluator()
                scores: Any = self.trainer.scores
                self.known = {self.digest: scores}, self.trainer.evaluator

    def known_scores(self) -> dict[str, Any] | None:
        """The scores of the encoder before training, if it was evaluated just before."""
        scores, evaluator = self.known[0].get(self.digest), self.known[1]
        return None if scores is None or evaluator is not self.trainer.evaluator else dict(vars(scores))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        record = trainer.score_record
        if trainer.checkpointer.resumed_from is not None:
            self.check(record)
            return
        record.start = record.best = None
        self.keep_weights()
        if self.weights:
            record.start = on_main_process(self.known_scores)
            if record.start is None:
                trainer.run_evaluator()
                record.start = dict(vars(trainer.scores))
            record.start["digest"] = self.digest

    def scores_of(self, metrics: Mapping[str, float]) -> Scores:
        """The scores of the encoder that the evaluator has just evaluated."""
        trainer = self.trainer
        evaluator: Any = trainer.evaluator
        found = getattr(evaluator, "observations", None) if hasattr(evaluator, "metric_of") else None
        try:
            rows = None if found is None else np.atleast_1d(np.asarray(found, dtype=float)).tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"observations of the evaluator must be an array of numbers [N, ...], got {found!r:.100}"
            ) from error
        if rows is not None and not isinstance(value := evaluator.metric_of(np.asarray(rows)), Number):
            raise InputError(f"metric_of of the evaluator must return a number, got {value!r:.100}")
        known = getattr(evaluator, "smallest_differences", {})
        if not isinstance(known, Mapping) or not all(isinstance(one, int | float) for one in known.values()):
            raise InputError(f"smallest_differences of the evaluator must be a dict of numbers, got {known!r:.100}")
        metric = trainer.args.metric_for_best_model or getattr(evaluator, "primary_metric", None)
        rises = trainer.args.greater_is_better
        scores = Scores(
            step=trainer.state.global_step,
            metrics={str(name): float(value) for name, value in metrics.items()},
            metric=str(metric or next(iter(metrics), "")).removeprefix("eval_"),
            greater_is_better=getattr(evaluator, "greater_is_better", True) if rises is None else bool(rises),
            observations=rows,
        )
        if self.is_candidate and not trainer.is_in_train:
            scores.digest = encoder_digest(trainer.model.encoder)
            self.known = {**(self.known[0] if self.known[1] is evaluator else {}), scores.digest: scores}, evaluator
        return scores

    def restore(self) -> None:
        """Restore the record of a finished run from its last checkpoint, and check it."""
        saved: Any = self.trainer.state.stateful_callbacks
        vars(self.trainer.score_record).update(saved.get(ScoreRecord.__name__, {}).get("attributes", {}))
        self.check(self.trainer.score_record)

    def check(self, record: ScoreRecord) -> None:
        """After a resume: the encoder must be the one that the run began with, else it is no candidate. With other
        evaluation data, the recorded scores are not used."""
        if not self.weights:
            return
        if not on_main_process(lambda: record.start is not None and record.start["digest"] == self.digest):
            self.weights, record.start = {}, None
            warnings.warn(
                f"{self.trainer.checkpointer.resumed_from} has no scores of this encoder before training: the run ends "
                "with its best checkpoint, even if that is worse",
                stacklevel=2,
            )
        elif "evaluation_data" in self.trainer.checkpointer.changes:
            found: Any = on_main_process(self.known_scores)
            record.start, record.best = found | {"digest": self.digest}, None

    def conclude(self) -> None:
        """At the end of training: compare the weights that it ends with, and restore those before it if they are not
        better."""
        trainer = self.trainer
        record, state = trainer.score_record, trainer.state
        if not self.weights or record.start is None:
            return
        if record.best is None or record.best["step"] != state.best_global_step:  # not evaluated, or its file is gone
            trainer.run_evaluator()
            record.best = vars(trainer.scores) | {"step": state.best_global_step or state.global_step}
        give_verdict(trainer, Scores(**record.start), Scores(**record.best), selects=True)
        verdict: Any = trainer.verdict
        if verdict.saved_step == 0:
            trainer.model.load_state_dict(self.weights, strict=False)
            state.best_global_step, state.best_model_checkpoint, state.best_metric = 0, None, verdict.before
        self.weights = {}
