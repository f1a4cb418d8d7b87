"""Probes of features: votes by hand, and features with and without class information."""

import math

import pytest
import torch

from fmicl_text.evaluation import probes
from fmicl_text.evaluation.probes import few_label_accuracies, knn_accuracies, linear_accuracy, logistic_accuracy


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


def test_one_pass_is_each_k_alone_and_chunks_do_not_show(monkeypatch):
    (train, labels), (test, truth) = clouds(60, distance=1.5), clouds(50, seed=1, distance=1.5)
    sweep = {"ks": (1, 5, 20, 500), "temperatures": (0.07, 0.1)}
    together = knn_accuracies(train, labels, test, truth, **sweep)
    assert len(together) == 8 and len(set(together.values())) > 1
    for k, temperature in together:
        alone = knn_accuracies(train, labels, test, truth, (k,), (temperature,))
        assert alone == {(k, temperature): together[k, temperature]}
    monkeypatch.setattr(probes, "CHUNK", 7)
    assert knn_accuracies(train, labels, test, truth, **sweep) == together


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
    assert few_label_accuracies(*data, per_class=4, draws=3) == [0.0] * 3
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
