"""The verdict of a run, and the encoder before training as a candidate for the best."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from fmicl_text.errors import InputError, Interrupted
from fmicl_text.evaluation import STSEvaluator, UnlabeledEvaluator
from fmicl_text.evaluation.retrieval import RetrievalEvaluator
from fmicl_text.training.checkpoint import checkpoints_in, saved_run, write_manifest
from fmicl_text.training.verdict import Scores, Verdict, compare, describe, encoder_digest
from fmicl_text.vision.evaluator import ImageEvaluator
from tests.support import Signal, make_family_trainer, make_trainer, peft_or_skip, same, sts_pairs, trained, weights

MEAN = SimpleNamespace(metric_of=lambda rows: float(rows.mean()))


class Scripted:
    """An evaluator with the k-th of some scores in its k-th call: means of 100 values whose noise is 1, so that the
    standard error of a difference is about sqrt(2) / 10. Without noise, it keeps no values."""

    primary_metric, greater_is_better, items = "score", True, "texts"

    def __init__(self, *scores, noise=1.0, calls=0):
        self.scores, self.calls, self.noise = scores, calls, noise
        if noise:
            self.metric_of = MEAN.metric_of

    def __call__(self, encoder):
        self.calls += 1
        score = self.scores[min(self.calls, len(self.scores)) - 1]
        noise = np.random.default_rng(self.calls).normal(size=100)
        self.observations = score + self.noise * (noise - noise.mean())
        return {"score": score, "other": -score}


def selecting(folder, output_dir, evaluator, **settings):
    """Eight steps, evaluated and saved after every second."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True} | settings
    trainer = make_trainer(folder, output_dir, evaluate=True, **{"metric_for_best_model": None} | settings)
    trainer.evaluator = evaluator
    return trainer


def scores(step, values, metrics=None, metric="score", rises=True):
    values = np.asarray(values, dtype=float)
    return Scores(step, metrics or {"score": float(values.mean())}, metric, rises, values.tolist())


# ---- two evaluations compared


def test_a_difference_counts_from_twice_its_standard_error():
    noise = np.tile([-1.0, 1.0], 50)  # paired with 0: a standard error of 0.1
    before = scores(0, np.zeros(100))
    cases = [(0.25, "better", "better"), (0.15, "no better", "no better"), (-0.15, "no better", "no better"),
             (-0.25, "worse", "no better")]  # fmt: skip
    for difference, without_selection, with_selection in cases:
        after = scores(7, noise + difference)
        last, best = (compare(before, after, MEAN, selects) for selects in (False, True))
        assert (last.outcome, best.outcome) == (without_selection, with_selection)
        assert last.difference == pytest.approx(difference) and last.standard_error == pytest.approx(0.1, rel=0.15)
        assert (last.saved_step, best.saved_step) == (7, 7 if with_selection == "better" else 0)
        assert last.num_items == 100 and (last.before, last.step) == (0.0, 7)
        falling = compare(scores(0, np.zeros(100)), scores(7, noise - difference, rises=False), MEAN, True)
        assert falling.outcome == with_selection


RISES, FALLS, PERCENT = True, False, "sts_spearman"


@pytest.mark.parametrize(
    "evaluator, metric, rises, before, least",
    [
        (STSEvaluator, "sts_spearman", RISES, 60.0, 0.1),
        (STSEvaluator, "sts_pearson", RISES, 0.5, 0.1),  # percent, although it is below 1
        (STSEvaluator, "sts_uniformity", FALLS, -2.5, 0.0025),
        (UnlabeledEvaluator, "held_out_nats", RISES, 4.0, 0.01),
        (UnlabeledEvaluator, "held_out_mrr", RISES, 40.0, 0.1),
        (UnlabeledEvaluator, "held_out_effective_rank", RISES, 40.0, 0.04),
        (ImageEvaluator, "knn_accuracy", RISES, 40.0, 0.1),
        (ImageEvaluator, "view_retrieval", RISES, 40.0, 0.1),
        (ImageEvaluator, "alignment", FALLS, 0.4, 0.0004),
        (RetrievalEvaluator, "cosine_ndcg@10", RISES, 0.3, 0.001),
        (EmbeddingSimilarityEvaluator, "spearman_cosine", RISES, 0.1, 0.001),
        (SimpleNamespace, "loss", FALLS, 1e-4, 1e-7),
        (SimpleNamespace, "score", RISES, 60.0, 0.06),
        (SimpleNamespace, "score", RISES, -60.0, 0.06),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_difference_that_is_too_small_to_matter_is_no_better(evaluator, metric, rises, before, least):
    """Also without noise, and in both directions."""
    for share, outcomes in ((0.9, ("no better", "no better")), (1.05, ("better", "worse"))):
        for sign, outcome in zip((1, -1), outcomes, strict=True):
            after = before + sign * share * least * (1 if rises else -1)
            start, end = (Scores(step, {metric: value}, metric, rises) for step, value in ((0, before), (3, after)))
            verdict = compare(start, end, evaluator, False)
            assert verdict.outcome == outcome and verdict.smallest_difference == pytest.approx(least, rel=0.01)
            assert compare(start, end, evaluator, True).saved_step == (3 if outcome == "better" else 0)


def test_exactly_the_smallest_difference_counts():
    start, end = (Scores(step, {PERCENT: value}, PERCENT) for step, value in ((0, 60.4), (3, 60.5)))
    assert compare(start, end, STSEvaluator, True).outcome == "better"  # 60.5 - 60.4 is 0.1 only up to rounding


def test_a_tiny_difference_beyond_its_noise_is_no_better():
    """Every item is better by the same amount, so that the noise is 0."""
    rows = np.linspace(0, 1, 100)
    verdict = compare(scores(0, rows), scores(4, rows + 4e-4), MEAN, True)
    assert verdict.outcome == "no better" and verdict.standard_error < 1e-9 and verdict.saved_step == 0
    line = describe(verdict, "", "X")
    assert "0.5000 -> 0.5004 at step 4 (+0.0004 +- " in line and " +- 0.0" not in line
    assert line.endswith(
        "the encoder is saved as it came. Try more steps, or a larger learning_rate: a difference below 0.001 is too "
        "small to matter"
    )


def test_noise_and_difference_never_read_zero():
    values = {"metric": "m", "num_items": 9, "step": 2, "saved_step": 0, "smallest_difference": 0.1}
    small = Verdict("no better", before=60.0, after=60.0 + 2e-3, difference=2e-3, standard_error=4e-4, **values)
    assert "60.00 -> 60.00 at step 2 (+0.002 +- 0.0004)" in describe(small, "", "X")
    none = Verdict("no better", before=60.0, after=60.0, difference=0.0, standard_error=0.0, **values)
    assert "(+0 +- 0)" in describe(none, "", "X")


@pytest.mark.parametrize("least", [0.1, {"score": "x"}], ids=str)
def test_smallest_differences_that_are_no_numbers_end_the_run_before_training(bert_folder, tmp_path, least):
    evaluator = Scripted(0.5)
    evaluator.smallest_differences = least
    trainer = selecting(bert_folder, tmp_path, evaluator)
    with pytest.raises(InputError, match=r"^smallest_differences of the evaluator must be a dict of numbers, got"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_observations_of_another_metric_give_no_standard_error():
    metrics = [{"score": 0.0, "other": 5.0}, {"score": 0.5, "other": 5.1}]
    before, after = (
        scores(step, [value] * 10, one) for step, value, one in zip((0, 3), (0, 0.5), metrics, strict=True)
    )
    assert compare(before, after, MEAN, True).standard_error == 0
    after.metric = "missing"
    assert compare(before, after, MEAN, True).standard_error is None
    after.metric = "other"
    verdict = compare(before, after, MEAN, True)
    assert verdict.standard_error is None and verdict.num_items is None and verdict.outcome == "better"
    for rows in (None, [1.0] * 9):
        after.metric, after.observations = "score", rows
        assert compare(before, after, MEAN, True).standard_error is None


@pytest.mark.parametrize("values, outcome", [((1.0, 1.0), "no better"), ((1.0, math.nan), "worse"),
                                             ((math.nan, 1.0), "better"), ((math.nan, math.nan), "worse")])  # fmt: skip
def test_equal_and_missing_values(values, outcome):
    before, after = (Scores(step, {"score": value}, "score") for step, value in enumerate(values))
    assert compare(before, after, None, False).outcome == outcome


def test_the_line():
    values = {"metric": "m", "before": 60.481, "after": 69.52, "difference": 9.039, "num_items": 1500, "step": 25}
    better = Verdict("better", **values, standard_error=0.513, saved_step=25)
    assert describe(better, "1,500 pairs of dev.tsv", "X") == (
        "better than before training: m 60.48 -> 69.52 (+9.04 +- 0.51, on 1,500 pairs of dev.tsv)"
    )
    values |= {"before": 0.5, "after": 0.45, "difference": -0.05}
    kept = Verdict("no better", **values, standard_error=0.01, saved_step=0)
    assert describe(kept, "", "a smaller X") == (
        "no better than before training: m 0.5000 -> 0.4500 at step 25 (-0.0500 +- 0.0100); the encoder is saved as it "
        "came. Try a smaller X"
    )
    worse = Verdict("worse", **values, standard_error=None, saved_step=25)
    assert describe(worse, "f", "a smaller X") == (
        "worse than before training: m 0.5000 -> 0.4500 (-0.0500, its noise is unknown, on f); the encoder of step 25 "
        "is saved. Try a smaller X"
    )
    noise = Verdict("no better", **values | {"difference": 0.01}, standard_error=0.01, saved_step=0)
    assert describe(noise, "", "X").endswith("Try more steps, or more evaluation data: a difference below 2 standard "
                                             "errors is noise")  # fmt: skip


# ---- the encoder before training


@pytest.mark.parametrize("head", ["none", "simcse"])
def test_a_run_that_makes_nothing_better_ends_with_the_encoder_as_it_came(bert_folder, tmp_path, head):
    trainer = selecting(bert_folder, tmp_path, Scripted(80.0, 70.0, 79.0, 75.0, 60.0), head=head, save_total_limit=9)
    before = weights(trainer)
    trainer.train()
    assert same(before, weights(trainer)) and trainer.state.best_global_step == 0
    assert trainer.state.best_metric == 80.0 and trainer.state.best_model_checkpoint is None
    verdict = trainer.verdict
    assert (verdict.outcome, verdict.before, verdict.after) == ("no better", 80.0, 79.0)
    assert (verdict.step, verdict.saved_step, verdict.num_items) == (4, 0, 100)
    assert verdict.standard_error == pytest.approx(math.sqrt(2) / 10, rel=0.2)
    assert verdict.text.startswith("no better than before training: score 80.00 -> 79.00 at step 4 (-1.00 +- 0.1")
    assert "on 100 texts); the encoder is saved as it came. Try a smaller learning_rate (now 0.001)" in verdict.text
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert trainer.evaluator.calls == 5  # once before training, and four times in it


@pytest.mark.parametrize("gain, kept", [(0.2, 0), (0.4, 6)], ids=["within the noise", "above it"])
def test_the_best_step_must_be_better_by_more_than_the_noise(bert_folder, tmp_path, gain, kept):
    trainer = selecting(bert_folder, tmp_path, Scripted(80.0, 70.0, 79.0, 80.0 + gain, 60.0))
    before = weights(trainer)
    trainer.train()
    assert trainer.state.best_global_step == trainer.verdict.saved_step == kept
    assert same(before, weights(trainer)) == (kept == 0)
    assert trainer.verdict.outcome == ("better" if kept else "no better")


@pytest.mark.slow
def test_without_noise_a_gain_counts_unless_it_is_too_small(bert_folder, tmp_path):
    trainer = trained(selecting(bert_folder, tmp_path / "a", Scripted(80.0, 80.1, 79.0, noise=0)))
    assert trainer.verdict.outcome == "better" and trainer.state.best_global_step == 2
    assert trainer.verdict.standard_error is None and "its noise is unknown" in trainer.verdict.text
    small = Scripted(80.0, 80.05, 79.0, noise=0)
    too_small = trained(selecting(bert_folder, tmp_path / "c", small))
    assert too_small.verdict.outcome == "no better" and too_small.state.best_global_step == 0
    small.smallest_differences, small.calls = {"score": 0.05}, 0  # the evaluator's own
    assert trained(selecting(bert_folder, tmp_path / "d", small)).verdict.outcome == "better"
    same_score = trained(selecting(bert_folder, tmp_path / "b", Scripted(80.0, noise=0)))
    assert same_score.verdict.outcome == "no better" and same_score.state.best_global_step == 0


def test_a_metric_that_should_fall(bert_folder, tmp_path):
    settings = {"metric_for_best_model": "other", "greater_is_better": False}
    rising = trained(selecting(bert_folder, tmp_path / "a", Scripted(80.0, 81.0, 85.0, 83.0, 83.0), **settings))
    assert rising.verdict.outcome == "better" and rising.state.best_global_step == 4  # -85 is the lowest
    assert (rising.verdict.before, rising.verdict.after) == (-80.0, -85.0)
    falling = trained(selecting(bert_folder, tmp_path / "b", Scripted(80.0, 70.0), **settings))
    assert falling.verdict.outcome == "no better" and falling.state.best_global_step == 0


@pytest.mark.parametrize("saving", [{"save_strategy": "best"}, {"eval_strategy": "epoch", "save_strategy": "epoch"}])
def test_strategies_of_saving(bert_folder, tmp_path, saving):
    trainer = selecting(bert_folder, tmp_path, Scripted(80.0, 70.0), **saving)
    before = weights(trainer)
    assert same(before, weights(trained(trainer))) and trainer.state.best_global_step == 0


def test_early_stopping_counts_as_without_it(bert_folder, tmp_path):
    """The first evaluation in training always counts as an improvement, whatever the encoder was before."""
    trainer = selecting(
        bert_folder, tmp_path, Scripted(80.0, 70.0, 69.0, 72.0, 71.0, 70.0), max_steps=20, early_stopping_patience=2
    )
    trainer.train()
    assert trainer.state.global_step == 10 and trainer.verdict.step == 6 and trainer.state.best_global_step == 0


@pytest.mark.slow
def test_a_run_without_an_evaluation_in_training_is_judged_by_its_last_step(bert_folder, tmp_path):
    trainer = trained(selecting(bert_folder, tmp_path, Scripted(80.0, 85.0), eval_delay=100))
    assert trainer.verdict.outcome == "better" and trainer.verdict.step == trainer.verdict.saved_step == 8
    trainer = selecting(bert_folder, tmp_path / "b", Scripted(80.0, 75.0), eval_delay=100)
    before = weights(trainer)
    assert same(before, weights(trained(trainer))) and trainer.state.best_global_step == 0


def test_without_selection_nothing_is_evaluated_or_restored(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, evaluate=True, metric_for_best_model=None)
    trainer.evaluator = Scripted(80.0, 70.0)
    before = weights(trainer)
    trainer.train()
    assert trainer.evaluator.calls == 2 and trainer.verdict is None and not same(before, weights(trainer))


def test_an_evaluator_without_metrics_has_no_verdict(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path)
    trainer.evaluator = lambda encoder: {}
    assert trainer.run_evaluator() == {} and trainer.scores.metric == "" and trainer.scores.observations is None


@pytest.mark.slow
def test_an_encoder_that_was_just_evaluated_is_not_evaluated_again(bert_folder, tmp_path):
    trainer = selecting(bert_folder, tmp_path, Scripted(80.0, 70.0, 90.0))
    trainer.run_evaluator()
    trainer.train()
    assert trainer.evaluator.calls == 5 and trainer.verdict.before == 80.0
    other = selecting(bert_folder, tmp_path / "b", Scripted(80.0, 70.0))
    other.run_evaluator()
    next(other.model.encoder.parameters()).data.add_(1e-3)  # and is another encoder now
    other.train()
    assert other.evaluator.calls == 6 and other.verdict.before == 70.0


# ---- interrupted runs


SCORES = [80.0, 70.0, 79.0, 75.0, 60.0]


@pytest.mark.slow
@pytest.mark.parametrize("middle", [79.0, 90.0], ids=["as it came", "better"])
@pytest.mark.parametrize("stopped_at", [1, 3, 6])
def test_a_run_in_two_parts_ends_alike(bert_folder, tmp_path, middle, stopped_at):
    results = []
    for stop in (None, stopped_at):
        evaluator, folder = Scripted(80.0, 70.0, middle, 75.0, 60.0), tmp_path / str(stop)
        if stop is not None:
            trainer = selecting(bert_folder, folder, evaluator, save_total_limit=9)
            trainer.add_callback(Signal(stop))
            with pytest.raises(Interrupted):
                trainer.train()
        trainer = selecting(bert_folder, folder, evaluator, save_total_limit=9)
        trainer.train(resume_from_checkpoint="auto")
        results.append((weights(trainer), trainer.state.best_global_step, trainer.verdict, evaluator.calls))
    (whole, *facts), (parts, *others) = results
    assert same(whole, parts) and facts == others and facts[0] == (4 if middle == 90 else 0)


@pytest.mark.slow
def test_a_finished_run_is_loaded_with_its_verdict(bert_folder, tmp_path):
    whole = trained(selecting(bert_folder, tmp_path / "a", Scripted(*SCORES), save_total_limit=9))
    shutil.move(tmp_path / "a", tmp_path / "b")
    again = selecting(bert_folder, tmp_path / "b", Scripted(1.0, 2.0), save_total_limit=9)
    again.train(resume_from_checkpoint="auto")
    assert again.verdict == whole.verdict and again.evaluator.calls == 0
    assert same(weights(whole), weights(again)) and again.state.best_global_step == 0


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True])
def test_another_encoder_at_a_resume_is_no_candidate(bert_folder, tmp_path, finished):
    trainer = selecting(bert_folder, tmp_path, Scripted(*SCORES), save_total_limit=9)
    if finished:
        trainer.train()
    else:
        trainer.add_callback(Signal(5))
        with pytest.raises(Interrupted):
            trainer.train()
    resumed = selecting(bert_folder, tmp_path, Scripted(*SCORES, calls=3), save_total_limit=9)
    next(resumed.model.encoder.parameters()).data.add_(1e-3)
    with pytest.warns(UserWarning, match=r"checkpoint-\d has no scores of this encoder before training"):
        resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.best_global_step == 4 and resumed.verdict is None


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_has_no_scores(bert_folder, tmp_path):
    """A run that stopped early is still finished; the encoder before training is no candidate."""
    settings = {"max_steps": 20, "early_stopping_patience": 2, "save_total_limit": 9}
    evaluator = Scripted(80.0, 70.0, 69.0, 68.0)
    whole = trained(selecting(bert_folder, tmp_path, evaluator, **settings))
    assert whole.state.global_step == 6 and whole.state.best_global_step == 0
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["ScoreRecord"]
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(tmp_path / "checkpoint-6", saved_run(tmp_path / "checkpoint-6"))
    again = selecting(bert_folder, tmp_path, evaluator, **settings)
    with pytest.warns(UserWarning, match="checkpoint-6 has no scores of this encoder before training"):
        again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 6 and again.state.best_global_step == 2 and evaluator.calls == 4


@pytest.mark.slow
def test_other_evaluation_data_at_a_resume_are_used_for_both(bert_folder, tmp_path):
    """The encoder before training is evaluated again, and the best one too."""

    class Described(Scripted):
        def describe(self):
            return {"evaluation_data": str(self.scores)}

    trainer = selecting(bert_folder, tmp_path, Described(80.0, 79.0), save_total_limit=9)
    trainer.add_callback(Signal(5))
    with pytest.raises(Interrupted):
        trainer.train()
    resumed = selecting(bert_folder, tmp_path, Described(10.0, 5.0, 4.0, 30.0), save_total_limit=9)
    with pytest.warns(UserWarning, match="evaluation_data"):
        resumed.train(resume_from_checkpoint="auto")
    assert resumed.evaluator.calls == 4 and (resumed.verdict.before, resumed.verdict.after) == (10.0, 30.0)
    assert resumed.verdict.outcome == "better" and resumed.state.best_global_step == resumed.verdict.step == 2


# ---- kinds of models


def test_adapters_are_restored(bert_folder, tmp_path):
    peft_or_skip()
    trainer = make_family_trainer(bert_folder, "mean", tmp_path, lora_rank=2, save_strategy="steps", save_steps=1)
    trainer.evaluator, trainer.args.load_best_model_at_end = Scripted(80.0, 70.0), True
    before = weights(trainer)
    trainer.train()
    assert trainer.verdict.outcome == "no better" and trainer.state.best_global_step == 0
    assert same(before, weights(trainer))
    assert any(".lora_B." in name and not before[name].any() for name in before)


def test_the_digest_is_that_of_the_embeddings(bert_folder, tmp_path):
    first, second = (make_trainer(bert_folder, tmp_path, head="simcse").model for _ in range(2))
    torch.nn.init.normal_(next(second.head.parameters()))
    assert encoder_digest(first.encoder) == encoder_digest(second.encoder)
    next(second.encoder.parameters()).data[0, 0] += 1e-6
    assert encoder_digest(first.encoder) != encoder_digest(second.encoder)


@pytest.mark.slow
def test_real_scores_of_a_learning_rate_that_is_far_too_large(bert_folder, tmp_path):
    """STS pairs whose scores are the encoder's own order: training can only get worse."""
    trainer = make_trainer(
        bert_folder, tmp_path, evaluate=True, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=0.3,
        load_best_model_at_end=True,
    )  # fmt: skip
    pairs = sts_pairs()
    x, y = (torch.tensor(trainer.model.encoder.encode(list(pairs[name]))) for name in ("sentence1", "sentence2"))
    order = torch.nn.functional.cosine_similarity(x, y).argsort().argsort()
    trainer.evaluator.dataset = pairs.remove_columns("score").add_column("score", (order * 5 / 11).tolist())
    before = weights(trainer)
    trainer.train()
    assert trainer.verdict.before == pytest.approx(100) and trainer.verdict.outcome == "no better"
    assert "on 12 pairs" in trainer.verdict.text and same(before, weights(trainer))


@pytest.mark.parametrize("rows", [[{"a": 1}], ["one"], [[1], [1, 2]], torch.ones(2, requires_grad=True)], ids=str)
def test_observations_that_are_no_numbers_are_one_line(bert_folder, tmp_path, rows):
    evaluator = Scripted(1.0, noise=0)
    evaluator.metric_of = MEAN.metric_of
    odd = SimpleNamespace(primary_metric="score", metric_of=MEAN.metric_of, observations=rows)
    trainer = selecting(bert_folder, tmp_path, evaluator)
    trainer.evaluator = type("Odd", (), vars(odd) | {"__call__": lambda self, encoder: {"score": 1.0}})()
    with pytest.raises(InputError, match=r"^observations of the evaluator must be an array of numbers"):
        trainer.train()


def test_a_single_observation_has_no_noise(bert_folder, tmp_path):
    class One(Scripted):
        def __call__(self, encoder):
            found = super().__call__(encoder)
            self.observations = found["score"]
            return found

    trainer = trained(selecting(bert_folder, tmp_path, One(0.5, 0.6, noise=1.0)))
    assert trainer.verdict.outcome == "better" and trainer.verdict.standard_error is None


def test_names_of_metrics_that_are_no_text(bert_folder, tmp_path):
    scores = iter([0.5, 0.6, 0.7, 0.6, 0.6])
    evaluator = lambda encoder: {1: next(scores)}  # noqa: E731
    trainer = trained(selecting(bert_folder, tmp_path, evaluator, metric_for_best_model="1"))
    verdict = trainer.verdict
    assert (verdict.outcome, verdict.before, verdict.after, verdict.saved_step) == ("better", 0.5, 0.7, 4)


def test_equal_infinite_scores_are_no_better(bert_folder, tmp_path):
    trainer = trained(selecting(bert_folder, tmp_path, Scripted(math.inf, noise=0)))
    assert (trainer.verdict.outcome, trainer.verdict.saved_step) == ("no better", 0)


def test_a_metric_of_that_fails_ends_the_run_before_training(bert_folder, tmp_path):
    evaluator = Scripted(0.5)
    evaluator.metric_of = lambda rows: None
    trainer = selecting(bert_folder, tmp_path, evaluator)
    with pytest.raises(InputError, match=r"^metric_of of the evaluator must return a number, got None"):
        trainer.train()
    evaluator.metric_of = lambda rows: rows["score"]
    with pytest.raises(IndexError):
        trainer.train()
    assert trainer.state.global_step == 0
