"""Probes of features: votes by hand, and features with and without class information."""

import math

import pytest
import torch

from fmicl_text.evaluation import probes
from fmicl_text.evaluation.probes import (
    NearestNeighbors,
    few_label_accuracies,
    knn_accuracies,
    linear_accuracy,
    logistic_accuracy,
    stratified_rows,
    view_retrieval,
)
from tests.support import run_ranks


def clouds(count, seed=0, distance=6.0):
    """Rows of three classes around distant points."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return distance * torch.eye(3, 8)[labels] + torch.randn(count, 8, generator=generator), labels


def test_votes_by_hand():
    """To (1, 0) the cosines are 0.96 (class 0), 0.8 and 0.8 (class 1), -1 (class 0). One neighbor votes
    for 0. Three vote for 1 at temperature 1 (e^0.96 = 2.61 < 2 e^0.8 = 4.45) and for 0 at 0.1 (e^9.6 = 14,765 >
    2 e^8 = 5,962)."""
    train = torch.tensor([[0.96, 0.28], [1.6, 1.2], [0.4, -0.3], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    test, truth = torch.tensor([[5.0, 0.0]]), torch.tensor([1])
    assert 2 * math.exp(0.8) > math.exp(0.96) and 2 * math.exp(8) < math.exp(9.6)
    found = knn_accuracies(train, labels, test, truth, ks=(1, 3), temperatures=(1.0, 0.1))
    assert found == {(1, 1.0): 0, (1, 0.1): 0, (3, 1.0): 100, (3, 0.1): 0}


SWEEP = {"ks": (1, 5, 20, 500), "temperatures": (0.07, 0.1)}


def with_ties(count, seed=0):
    """Rows of which half are copies of others in another class, so that neighbors tie at every k."""
    rows, labels = clouds(count // 2, seed, distance=1.5)
    return torch.cat([rows, rows]), torch.cat([labels, (labels + seed + 1) % 3])


def plain_loop(train, labels, test, truth, ks, temperatures):
    """One test row at a time in float64. Of equally near rows, those of the smaller class come first."""
    accuracies = {}
    for k in ks:
        for temperature in temperatures:
            right = 0
            for row, label in zip(test.double(), truth.tolist(), strict=True):
                cosines = [float(row @ other / row.norm() / other.norm()) for other in train.double()]
                nearest = sorted(zip(cosines, labels.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))[:k]
                votes = [0.0] * (max(labels.tolist()) + 1)
                for cosine, name in nearest:
                    votes[name] += math.exp(cosine / temperature)
                right += votes.index(max(votes)) == label
            accuracies[k, temperature] = 100 * right / len(test)
    return accuracies


@pytest.mark.slow
@pytest.mark.parametrize("data", [clouds, with_ties])
def test_neighbors_are_those_of_a_plain_loop_for_blocks_of_any_size_and_order(monkeypatch, data):
    (train, labels), (test, truth) = data(60), clouds(50, seed=1, distance=1.5)
    if data is clouds:
        train = train - 4 * torch.eye(3, 8)[labels]
    expected = plain_loop(train, labels, test, truth, **SWEEP)
    assert len(expected) == 8 and len(set(expected.values())) > 1
    assert knn_accuracies(train, labels, test, truth, **SWEEP) == expected
    for k, temperature in expected:
        alone = knn_accuracies(train, labels, test, truth, (k,), (temperature,))
        assert alone == {(k, temperature): expected[k, temperature]}
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    for size in (1, 7, 60):
        for name in ("TEST_BLOCK", "TRAIN_BLOCK", "VOTE_BLOCK"):
            monkeypatch.setattr(probes, name, size)
        neighbors = NearestNeighbors(test, max(SWEEP["ks"]))
        for rows in order.split(11):
            neighbors.add(train[rows], labels[rows])
        assert neighbors.accuracies(truth, **SWEEP) == expected


def test_equal_rows_are_equally_near_wherever_they_are():
    """Of 400 copies of a row in two classes the smaller class wins, in blocks of odd sizes too."""
    row = torch.randn(1, 384, generator=torch.Generator().manual_seed(0))
    train, labels = row.repeat(403, 1), torch.arange(403) % 2
    for size in (1, 7, 67, 403):
        neighbors = NearestNeighbors(row + 0.1, k=201)
        for rows in torch.arange(403).split(size):
            neighbors.add(train[rows], labels[rows])
            neighbors.compare()
        assert neighbors.keys.unique().tolist() == neighbors.keys.max().repeat(1).tolist()  # 202 rows are of class 0
        assert neighbors.accuracies(torch.tensor([0]), [201]) == {(201, 0.1): 100}


def test_more_neighbors_than_rows_and_rows_that_are_not_numbers():
    (train, labels), (test, truth) = clouds(30), clouds(20, seed=1)
    neighbors = NearestNeighbors(torch.cat([test, torch.full((2, 8), math.nan)]), k=500)
    neighbors.add(torch.cat([train, torch.full((5, 8), math.nan)]), torch.cat([labels, torch.zeros(5, dtype=int)]))
    found = neighbors.accuracies(torch.cat([truth, torch.tensor([0, 0])]), [30, 500])
    assert (
        found[30, 0.1]
        == found[500, 0.1]
        == pytest.approx(knn_accuracies(train, labels, test, truth, [30])[30, 0.1] * 20 / 22)
    )


def share(rank, world, train, labels, test):
    neighbors = NearestNeighbors(test, k=25)
    neighbors.add(train[rank::world], labels[rank::world])
    neighbors.gather()
    return neighbors.keys.sort().values


def test_two_processes_find_the_neighbors_of_one():
    train, labels = with_ties(90)
    test, _ = clouds(50, seed=1)
    (alone,) = run_ranks(1, share, 1, train, labels, test)
    first, second = run_ranks(2, share, 2, train, labels, test)
    assert torch.equal(first, alone) and torch.equal(second, alone)


def test_the_rows_to_fit_are_a_stratified_subset_of_all():
    labels = torch.cat([torch.zeros(600), torch.ones(300), torch.full((90,), -1), torch.full((10,), 2)]).long()
    assert stratified_rows(labels, most=910).tolist() == (labels >= 0).nonzero()[:, 0].tolist()
    rows = stratified_rows(labels, most=91)
    assert rows.tolist() == sorted(set(rows.tolist())) == stratified_rows(labels, most=91).tolist()
    assert labels[rows].bincount().tolist() == pytest.approx([58, 28, 5], abs=1)
    assert 250 < rows[labels[rows] == 0].double().mean() < 350 and rows[labels[rows] == 0].max() > 500
    assert len(stratified_rows(torch.arange(50), most=20)) == 20  # more classes than rows


def test_retrieval_of_views_by_hand():
    """The second row of x is nearer to the first row of y; ties count by their number."""
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    y = torch.tensor([[2.0, 0.1], [0.1, 0.2], [0.0, 3.0]])
    assert view_retrieval(x, y) == pytest.approx(200 / 3)
    assert view_retrieval(torch.ones(10, 4), torch.ones(10, 4)) == pytest.approx(10)
    assert view_retrieval(torch.full((3, 2), math.nan), y) == 0
    many = torch.randn(2500, 16, generator=torch.Generator().manual_seed(0))
    assert view_retrieval(many, 3 * many) == 100


def test_separated_classes_are_found():
    data = (*clouds(100), *clouds(60, seed=1))
    assert knn_accuracies(*data, ks=(10,)) == {(10, 0.1): 100}
    assert logistic_accuracy(*data) == 100
    assert few_label_accuracies(*data) == pytest.approx([100] * 5, abs=5)
    lost = (torch.randn(100, 8), data[1], torch.randn(60, 8), data[3])
    assert knn_accuracies(*lost, ks=(10,))[10, 0.1] < 60 and logistic_accuracy(*lost) < 60


def test_few_label_accuracies_draw_per_class(monkeypatch):
    seen = []

    def record(train, labels, test, truth):
        seen.append((len(train), labels.bincount().tolist()))
        return 0.0

    monkeypatch.setattr(probes, "logistic_accuracy", record)
    data = (*clouds(100), *clouds(10, seed=1))
    assert few_label_accuracies(*data, per_class=4, draws=range(3)) == [0.0] * 3
    assert seen == [(12, [4, 4, 4])] * 3


def test_a_linear_layer_separates_linear_classes():
    """Images of 1 x 2 pixels whose difference is the class; the features are the pixels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(300, 1, 1, 2, generator=generator)
    labels = (images[:, 0, 0, 0] > images[:, 0, 0, 1]).long()
    seen, seeds = [], []

    def views(rows, seed):
        seen.append(len(rows))
        seeds.append(seed)
        return images[rows] + 0.01 * torch.randn(len(rows), 1, 1, 2, generator=torch.Generator().manual_seed(seed))

    def features(x):
        return 10 * x.flatten(1)

    data = (views, labels[:200], features(images[200:]), labels[200:])
    state = torch.get_rng_state()
    accuracy = linear_accuracy(features, *data, epochs=20, batch_size=64)
    assert accuracy > 95 and seen == [64, 64, 64, 8] * 20 and len(set(seeds)) == 80
    assert torch.equal(torch.get_rng_state(), state)
    assert linear_accuracy(features, *data, epochs=20, batch_size=64) == accuracy
    assert linear_accuracy(lambda x: 0 * x.flatten(1), *data, epochs=1) < 65
