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
from torch.nn import functional
from tqdm.auto import tqdm

from fmicl_text.losses.distributed import gather_rows, world_size
from fmicl_text.losses.similarity import unit_rows

LOGISTIC_STEPS = 200
MOST_FITTED = 50_000  # maximum number of rows for fitting logistic regression
TEST_BLOCK, TRAIN_BLOCK = 1024, 4096  # rows per block of similarities
VOTE_BLOCK = 256  # test rows per block of votes
UNIT, LABEL_BITS = 2.0**30, 31  # a key is round(cosine * 2^30) * 2^31 + (2^31 - 1 - label)
LABEL_MASK = 2**LABEL_BITS - 1
EMPTY = -(2**62)  # key of a missing neighbor


class NearestNeighbors:
    """The k training rows of largest cosine with every test row. The training rows are added in blocks and not kept.

    Of rows with equal cosines, the one with the smaller class index is nearer. The result does not depend on the order
    of the training rows or the size of the blocks. NaN is no neighbor. Memory: the test rows and 8 k bytes for each.

    >>> neighbors = NearestNeighbors(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), k=1)
    >>> neighbors.add(torch.tensor([[3.0, 0.1]]), torch.tensor([0]))
    >>> neighbors.add(torch.tensor([[0.1, 5.0]]), torch.tensor([1]))
    >>> neighbors.accuracies(torch.tensor([0, 1]), ks=[1])
    {(1, 0.1): 100.0}

    Args:
        test: Features of nonzero norm, [M, D], on the device where similarities are computed.
        k: Largest number of neighbors, >= 1.
    """

    def __init__(self, test: Tensor, k: int) -> None:
        self.test = unit_rows(test)
        self.keys = torch.full((len(test), k), EMPTY, device=test.device)  # int64, not sorted
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add training rows: features [B, D] of nonzero norm, class indices [B] >= 0."""
        self.waiting.append((features, labels))
        if sum(len(labels) for _, labels in self.waiting) >= TRAIN_BLOCK:
            self.compare()

    def compare(self) -> None:
        """Compare the rows that were added since the last call."""
        if not self.waiting:
            return
        device = self.test.device
        train, labels = (torch.cat(parts).to(device) for parts in zip(*self.waiting, strict=True))
        self.waiting = []
        for block, names in zip(train.split(TRAIN_BLOCK), labels.split(TRAIN_BLOCK), strict=True):
            # Matrix products of odd sizes sum the last columns in another order: equal rows would not be equally near.
            columns = functional.pad(unit_rows(block), (0, 0, 0, -len(block) % 64)).T
            for rows, keys in zip(self.test.split(TEST_BLOCK), self.keys.split(TEST_BLOCK), strict=True):
                keep_largest(keys, (rows @ columns)[:, : len(block)], names)

    def gather(self) -> None:
        """Combine the neighbors that all processes have found. Every process must call this, after its last row: the
        memory of the test rows is released."""
        self.compare()
        self.test = self.test[:0].clone()
        for keys in self.keys.split(TEST_BLOCK):
            everyone = torch.cat(gather_rows(keys, [len(keys)] * world_size())).unflatten(0, (-1, len(keys)))
            keys.copy_(everyone.movedim(0, 1).flatten(1).topk(keys.shape[1], dim=1).values)

    def accuracies(
        self, test_labels: Tensor, ks: Sequence[int], temperatures: Sequence[float] = (0.1,)
    ) -> dict[tuple[int, float], float]:
        """Accuracy in percent on the test rows, of classes [M], for every (k, temperature); see `knn_accuracies`."""
        right = self.correct(test_labels, ks, temperatures)
        return {which: 100 * int(rows.sum()) / len(self.keys) for which, rows in right.items()}

    def correct(
        self, test_labels: Tensor, ks: Sequence[int], temperatures: Sequence[float] = (0.1,)
    ) -> dict[tuple[int, float], Tensor]:
        """Whether each test row gets its own class, [M], for every (k, temperature); see `accuracies`."""
        self.compare()
        right: dict[tuple[int, float], list[Tensor]] = {
            (k, temperature): [] for k in ks for temperature in temperatures
        }
        for block, labels in zip(self.keys.split(VOTE_BLOCK), test_labels.split(VOTE_BLOCK), strict=True):
            keys = block.cpu().sort(dim=1, descending=True).values
            found = keys > EMPTY
            cosine, neighbors = (keys >> LABEL_BITS).double() / UNIT, (LABEL_MASK - (keys & LABEL_MASK)).where(found, 0)
            for k, temperature in right:
                votes = ((cosine[:, :k] - cosine[:, :1]) / temperature).exp() * found[:, :k]
                ballots = torch.zeros(len(keys), int(neighbors.max()) + 1, dtype=torch.float64)
                ballots.scatter_add_(1, neighbors[:, :k], votes)
                predicted = torch.from_numpy(ballots.numpy().argmax(1)).where(found[:, 0], -1)  # the first of equals
                right[k, temperature].append(predicted == labels)
        return {which: torch.cat(rows) for which, rows in right.items()}


def keep_largest(keys: Tensor, cosine: Tensor, labels: Tensor) -> None:
    """Keep the largest of the keys [M, k] and of those of training rows with cosines [M, B] and labels [B], in
    place."""
    least = ((keys.amin(1) >> LABEL_BITS) - 1) / UNIT
    rows, columns = (cosine >= least[:, None]).nonzero(as_tuple=True)
    if len(rows) == 0:
        return
    nearness = (cosine[rows, columns].double() * UNIT).round().long()
    counts = rows.bincount(minlength=len(keys))
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    candidates = keys.new_full((len(keys), int(counts.max())), EMPTY)
    candidates[rows, places] = (nearness << LABEL_BITS) + (LABEL_MASK - labels[columns])
    keys.copy_(torch.cat([keys, candidates], 1).topk(keys.shape[1], dim=1, sorted=False).values)


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
        train_labels: Class indices [N], >= 0.
        test: Features of nonzero norm, [M, D].
        test_labels: Class indices [M].
        ks: Numbers of neighbors, each >= 1; at most N are used.
        temperatures: Temperatures of the votes, each > 0.
    """
    neighbors = NearestNeighbors(test, min(max(ks), len(train)))
    neighbors.add(train, train_labels)
    return neighbors.accuracies(test_labels, ks, temperatures)


def stratified_rows(labels: Tensor, most: int) -> Tensor:
    """At most `most` of the rows with a class (label >= 0), ascending: all, or a random subset, always the same, with
    the same fraction of every class and at least five rows of each, if there are as many."""
    rows = np.random.default_rng(0).permutation(np.flatnonzero(labels.numpy() >= 0))
    if len(rows) > most:
        places, counts = places_in_class(labels.numpy()[rows])
        rows = rows[np.lexsort((places, np.where(places < 5, 0, (places + 0.5) / counts)))[:most]]
    return torch.from_numpy(np.sort(rows))


def places_in_class(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every row, the number of earlier rows of its class, and the number of all."""
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    places = np.empty(len(labels), np.int64)
    places[np.argsort(classes, kind="stable")] = np.arange(len(labels)) - np.repeat(sizes.cumsum() - sizes, sizes)
    return places, sizes[classes]


def logistic_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy in percent of logistic regression on standardized features; arguments as in `knn_accuracies`.

    L2 penalty of weight 1 and at most 200 steps of L-BFGS. On raw 32 x 32 color images this does not converge, but 2000
    steps take ten times as long, do not converge either, and are not more accurate."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=LOGISTIC_STEPS))
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        probe.fit(train.numpy(), train_labels.numpy())
    right = [
        (probe.predict(rows.numpy()) == labels.numpy()).sum()
        for rows, labels in zip(test.split(TRAIN_BLOCK), test_labels.split(TRAIN_BLOCK), strict=True)
    ]
    return 100 * float(sum(right)) / len(test)


def few_label_accuracies(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    per_class: int = 5,
    draws: Sequence[int] = range(5),
    seed: int = 0,
) -> list[float]:
    """`logistic_accuracy` with `per_class` random labeled rows of each class, one accuracy per draw, which are numbered
    from 0."""
    accuracies = []
    for draw in draws:
        order = np.random.default_rng([seed, draw]).permutation(len(train))
        labels = train_labels.numpy()[order]
        chosen = order[places_in_class(labels)[0] < per_class]
        rows = torch.from_numpy(chosen[np.argsort(train_labels.numpy()[chosen], kind="stable")])
        accuracies.append(logistic_accuracy(train[rows], train_labels[rows], test, test_labels))
    return accuracies


def view_retrieval(x: Tensor, y: Tensor) -> float:
    """Percent of rows of x whose own positive is the nearest row of y by cosine. Of n equally near, each counts 1/n.

    Needs no classes. 100/N for collapsed or unrelated features, up to 100.

    Args:
        x: Features of one view of every image, of nonzero norm, [N, D].
        y: Features of the other view, [N, D].
    """
    return 100 * float(nearest_shares(x, y).sum()) / len(x)


def nearest_shares(x: Tensor, y: Tensor) -> Tensor:
    """The terms [N] of `view_retrieval`, one per row of x: 1/n if its positive is one of n nearest rows, else 0."""
    x, y = unit_rows(x), functional.pad(unit_rows(y), (0, 0, 0, -len(y) % 64))  # see `NearestNeighbors.compare`
    shares = []
    for start, rows in zip(range(0, len(x), TEST_BLOCK), x.split(TEST_BLOCK), strict=True):
        cosine = (rows @ y.T)[:, : len(x)]
        nearest = cosine == cosine.amax(1, keepdim=True)
        own = nearest.diagonal(start)[: len(rows)]
        shares.append(own.double() / nearest.sum(1).clamp_min(1))
    return torch.cat(shares)


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
