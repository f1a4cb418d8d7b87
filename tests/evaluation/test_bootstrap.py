"""The noise of the difference of two scores, against closed forms and independent draws of evaluation sets."""

import numpy as np
import pytest
import torch
from scipy import stats

from fmicl_text.evaluation.bootstrap import bootstrap_difference
from fmicl_text.evaluation.encoders import open_encoder
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.evaluation.retrieval import RetrievalEvaluator
from tests.support import sentences, sts_pairs


def spearman(rows):
    return 100 * stats.spearmanr(rows[:, 0], rows[:, 1]).statistic


def test_the_difference_of_means_has_the_error_of_paired_values():
    """Closed form: the standard deviation of the differences, over sqrt(N). Values that rise together have none."""
    random = np.random.default_rng(0)
    before = random.normal(size=2000)
    after = before + 0.3 + 0.5 * random.normal(size=2000)
    difference, error = bootstrap_difference(before, after, np.mean)
    assert difference == pytest.approx(after.mean() - before.mean())
    assert error == pytest.approx((after - before).std(ddof=1) / np.sqrt(2000), rel=0.1)
    assert error < 0.5 * np.sqrt(before.var() / 2000 + after.var() / 2000)  # what unpaired draws would give
    difference, error = bootstrap_difference(before, before + 0.25, np.mean)
    assert difference == pytest.approx(0.25) and error == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_the_error_of_a_correlation_is_that_of_new_evaluation_sets():
    """An oracle: the spread of the difference over evaluation sets that are drawn anew."""

    def draw(seed):
        random = np.random.default_rng(seed)
        gold = random.normal(size=300)
        shared = random.normal(size=300)
        two = [gold + shared + noise * random.normal(size=300) for noise in (0.8, 0.4)]
        return [np.stack([similarity, gold], axis=1) for similarity in two]

    differences = [spearman(after) - spearman(before) for before, after in map(draw, range(1, 200))]
    errors = [bootstrap_difference(*draw(seed), spearman, resamples=200)[1] for seed in range(300, 305)]
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.2)


@pytest.mark.slow
def test_draws_are_those_of_the_seed_and_undefined_ones_do_not_count():
    rows = [np.array([[i, i % 3] for i in range(20)], float), np.array([[-i, i % 3] for i in range(20)], float)]
    assert bootstrap_difference(*rows, spearman, 1) == bootstrap_difference(*rows, spearman, 1)
    assert bootstrap_difference(*rows, spearman, 1)[1] != bootstrap_difference(*rows, spearman, 2)[1]
    two = np.array([[0.0, 0.0], [1.0, 1.0]])  # half of the draws have one pair twice, without a correlation
    _, error = bootstrap_difference(two, -two, spearman)
    assert np.isnan(error) or error == 0
    assert np.isnan(bootstrap_difference(two, two, lambda rows: np.nan)[1])


def test_the_items_must_be_the_same():
    with pytest.raises(ValueError, match="same N >= 2 items, got 3 and 2"):
        bootstrap_difference(np.zeros(3), np.zeros(2), np.mean)
    with pytest.raises(ValueError, match="N >= 2 items, got 1 and 1"):
        bootstrap_difference(np.zeros(1), np.zeros(1), np.mean)


def test_an_sts_score_is_that_of_its_observations(bert_folder):
    encoder, pairs = open_encoder(bert_folder, pooling="mean"), sts_pairs()
    evaluator = STSEvaluator(pairs, progress=False)
    scores = evaluator(encoder)
    assert evaluator.primary_metric == "sts_spearman" and evaluator.greater_is_better
    assert evaluator.observations.shape == (12, 2) and evaluator.observations[:, 1].tolist() == pairs["score"][:]
    assert evaluator.metric_of(evaluator.observations) == scores["sts_spearman"]
    some = [3, 3, 0, 7, 9, 11, 2]
    x, y = (encode_sentences(encoder, list(pairs[name]), progress=False) for name in ("sentence1", "sentence2"))
    cosine = torch.nn.functional.cosine_similarity(x, y).numpy()
    expected = 100 * stats.spearmanr(cosine[some], np.array(pairs["score"])[some]).statistic
    assert evaluator.metric_of(evaluator.observations[some]) == pytest.approx(expected)


def test_a_retrieval_score_is_that_of_its_observations(bert_folder):
    """Two relevant documents of a query, ties between equal documents, and a query that finds nothing."""
    queries = {f"q{i}": text for i, text in enumerate(sentences(8, seed=1))}
    texts = [*sentences(30, seed=2), *queries.values(), *list(queries.values())[:3]]
    corpus = {f"d{i}": text for i, text in enumerate(texts)}
    relevant = {f"q{i}": {f"d{30 + i}", f"d{i}"} for i in range(7)} | {"q7": {"d0"}}
    evaluator = RetrievalEvaluator(queries, corpus, relevant, write_csv=False)
    scores = evaluator(open_encoder(bert_folder, pooling="mean"))
    assert evaluator.observations.shape == (8,) and 0 < evaluator.observations.min() + 0.01 < 0.5
    assert evaluator.metric_of(evaluator.observations) == pytest.approx(scores[evaluator.primary_metric], abs=1e-12)
    only = RetrievalEvaluator({"q3": queries["q3"]}, corpus, {"q3": relevant["q3"]}, write_csv=False)
    (ndcg,) = (value for name, value in only(open_encoder(bert_folder, pooling="mean")).items() if "ndcg" in name)
    assert evaluator.observations[3] == pytest.approx(ndcg, abs=1e-6)
