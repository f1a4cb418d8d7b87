"""How well frozen features tell classes apart: nearest neighbours, logistic regression, few labels, a linear layer."""

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
CHUNK = 512  # test rows whose similarities to all training rows are held at once


def knn_accuracies(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float] = (0.1,),
) -> dict[tuple[int, float], float]:
    """Percent of test rows whose class wins the vote of their k nearest training rows, for each (k, temperature), in
    one pass.

    Votes weigh e^(cosine/temperature), the protocol of Wu et al. (arXiv 1805.01978): k = 200, temperature 0.1.

    Args:
        train: Features of any length other than 0, [N, D].
        train_labels: Classes from 0 on, [N].
        test: Features [M, D].
        test_labels: Classes [M].
        ks: Numbers of neighbours, each at least 1; more than N count as N.
        temperatures: Of the votes, each > 0.
    """
    train, test = unit_rows(train), unit_rows(test)
    num_classes = int(train_labels.max()) + 1
    right = {(k, temperature): 0 for k in ks for temperature in temperatures}
    most = min(max(ks), len(train))
    for rows, labels in zip(test.split(CHUNK), test_labels.split(CHUNK), strict=True):
        cosine, nearest = (rows @ train.T).topk(most, dim=1)
        neighbours = train_labels[nearest]
        for k, temperature in right:
            votes = ((cosine[:, :k] - cosine[:, :1]) / temperature).exp()  # of which only ratios matter
            ballots = votes.new_zeros(len(rows), num_classes).scatter_add_(1, neighbours[:, :k], votes)
            right[k, temperature] += int((ballots.argmax(1) == labels).sum())
    return {which: 100 * count / len(test) for which, count in right.items()}


def logistic_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Percent of test rows that logistic regression on the standardized features gets right; arguments as above.

    L2 penalty of weight 1, at most 200 steps of L-BFGS: raw pixels of 32 x 32 colors have not converged after 2000,
    which take ten times as long and score no better."""
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
    """`logistic_accuracy` with so many labelled rows of each class, one number for each random draw of them."""
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
    """Percent of test images that a linear layer on frozen features gets right, after its last epoch.

    The usual protocol: random views of the training images, SGD with momentum 0.9, no weight decay, learning rate
    0.1 x batch/256 falling as a cosine; features of plain views of the test images.

    Args:
        features: Images [B, C, S, S] to features [B, D], a frozen encoder in eval mode.
        views: Numbers of training images [B] and a seed to one random view of each, [B, C, S, S], on any device.
        train_labels: Classes from 0 on, [N].
        test: Features of the test images [M, D].
        test_labels: Classes [M].
        epochs: At least 1.
        batch_size: At least 1.
        seed: Of the layer, the views and the order.
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
