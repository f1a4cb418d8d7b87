"""How well frozen features tell classes apart: k nearest neighbours, logistic regression, few labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from fmicl_text.similarity import unit_rows

CHUNK = 512  # test rows whose similarities to all training rows are held at once


def knn_accuracies(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, ks: Sequence[int], temperature: float = 0.1
) -> dict[int, float]:
    """Percent of test rows whose class wins the vote of their k nearest training rows, for each k, in one pass.

    Votes weigh e^(cosine/temperature), the protocol of Wu et al. (arXiv 1805.01978): k = 200, temperature 0.1.

    Args:
        train: Features of any length other than 0, [N, D].
        train_labels: Classes from 0 on, [N].
        test: Features [M, D].
        test_labels: Classes [M].
        ks: Numbers of neighbours, each at least 1; more than N count as N.
        temperature: Of the votes, > 0.
    """
    train, test = unit_rows(train), unit_rows(test)
    num_classes = int(train_labels.max()) + 1
    right = dict.fromkeys(ks, 0)
    most = min(max(ks), len(train))
    for rows, labels in zip(test.split(CHUNK), test_labels.split(CHUNK), strict=True):
        cosine, nearest = (rows @ train.T).topk(most, dim=1)
        votes = ((cosine - cosine[:, :1]) / temperature).exp()  # of which only ratios matter
        neighbours = train_labels[nearest]
        for k in ks:
            ballots = votes.new_zeros(len(rows), num_classes).scatter_add_(1, neighbours[:, :k], votes[:, :k])
            right[k] += int((ballots.argmax(1) == labels).sum())
    return {k: 100 * count / len(test) for k, count in right.items()}


def logistic_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Percent of test rows that logistic regression on the standardised features gets right; arguments as above."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(train.numpy(), train_labels.numpy())
    return 100 * float(probe.score(test.numpy(), test_labels.numpy()))


def few_label_accuracies(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    per_class: int = 5,
    draws: int = 5,
    seed: int = 0,
) -> list[float]:
    """`logistic_accuracy` with so many labelled rows of each class, one number for each random draw of them."""
    accuracies = []
    for draw in range(draws):
        order = np.random.default_rng([seed, draw]).permutation(len(train))
        labels = train_labels.numpy()[order]
        chosen = np.concatenate([order[labels == label][:per_class] for label in np.unique(labels)])
        rows = torch.from_numpy(chosen)
        accuracies.append(logistic_accuracy(train[rows], train_labels[rows], test, test_labels))
    return accuracies
