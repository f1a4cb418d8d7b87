"""Probes of frozen features: k-NN, logistic regression, few-shot and linear classification."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm

from fmicl_text.losses.similarity import unit_rows

LOGISTIC_STEPS = 200
CHUNK = 512  # test rows per block of similarities to all training rows


def knn_accuracies(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float] = (0.1,),
) -> dict[tuple[int, float], float]:
    """Accuracy in percent of k-NN classification on the test rows, for every (k, temperature), in one pass.

    Votes are weighted by e^(cosine/temperature), as in Wu et al. (arXiv 1805.01978) with k = 200, temperature 0.1.

    Args:
        train: Features of nonzero norm, [N, D].
        train_labels: Class indices [N].
        test: Features of nonzero norm, [M, D].
        test_labels: Class indices [M].
        ks: Numbers of neighbors, each >= 1; at most N are used.
        temperatures: Temperatures of the votes, each > 0.
    """
    train, test = unit_rows(train), unit_rows(test)
    num_classes = int(train_labels.max()) + 1
    right = {(k, temperature): 0 for k in ks for temperature in temperatures}
    most = min(max(ks), len(train))
    for rows, labels in zip(test.split(CHUNK), test_labels.split(CHUNK), strict=True):
        cosine, nearest = (rows @ train.T).topk(most, dim=1)
        neighbors = train_labels[nearest]
        for k, temperature in right:
            votes = ((cosine[:, :k] - cosine[:, :1]) / temperature).exp()  # only ratios matter
            ballots = votes.new_zeros(len(rows), num_classes).scatter_add_(1, neighbors[:, :k], votes)
            right[k, temperature] += int((ballots.argmax(1) == labels).sum())
    return {which: 100 * count / len(test) for which, count in right.items()}


def logistic_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy in percent of logistic regression on standardized features; arguments as in `knn_accuracies`.

    L2 penalty of weight 1 and at most 200 steps of L-BFGS. On raw 32 x 32 color images this does not converge, but 2000
    steps take ten times as long, do not converge either, and are not more accurate."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=LOGISTIC_STEPS))
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
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
    """`logistic_accuracy` with `per_class` random labeled rows of each class, one accuracy per draw."""
    accuracies = []
    for draw in range(draws):
        order = np.random.default_rng([seed, draw]).permutation(len(train))
        labels = train_labels.numpy()[order]
        chosen = np.concatenate([order[labels == label][:per_class] for label in np.unique(labels)])
        rows = torch.from_numpy(chosen)
        accuracies.append(logistic_accuracy(train[rows], train_labels[rows], test, test_labels))
    return accuracies


def linear_accuracy(
    features: Callable[[Tensor], Tensor],
    views: Callable[[Tensor, int], Tensor],
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """Accuracy in percent of a linear classifier on frozen features, after its last epoch.

    The standard protocol: random views of the training images, SGD with momentum 0.9, no weight decay, learning rate
    0.1 x batch/256 with cosine decay, and plain views of the test images.

    Args:
        features: Maps images [B, C, S, S] to features [B, D]; a frozen encoder in eval mode.
        views: Maps indices [B] of training images and a seed to one random view of each, [B, C, S, S].
        train_labels: Class indices [N].
        test: Features of the test images [M, D].
        test_labels: Class indices [M].
        epochs: Number of epochs, >= 1.
        batch_size: Images per step, >= 1.
        seed: Seed of the initialization, the views and the order.
    """
    generator = torch.Generator().manual_seed(seed)
    num_classes = int(train_labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(test.shape[1], num_classes)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 * batch_size / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(train_labels) // batch_size))
    for _ in tqdm(range(epochs), desc="linear probe", leave=False):
        for rows in torch.randperm(len(train_labels), generator=generator).split(batch_size):
            with torch.no_grad():
                inputs = features(views(rows, int(torch.randint(2**31, (), generator=generator)))).float()
            loss = torch.nn.functional.cross_entropy(
                layer.to(inputs.device)(inputs), train_labels[rows].to(inputs.device)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return 100 * (layer.cpu()(test).argmax(1) == test_labels).double().mean().item()
