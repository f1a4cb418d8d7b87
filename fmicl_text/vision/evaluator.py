"""Evaluation of image encoders: the score during training, and the table of probes at the end of a run."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fmicl_text.errors import InputError
from fmicl_text.evaluation.geometry import describe_geometry
from fmicl_text.evaluation.probes import (
    MOST_FITTED,
    NearestNeighbors,
    few_label_accuracies,
    logistic_accuracy,
    nearest_shares,
    stratified_rows,
)
from fmicl_text.evaluation.sharing import assign_rows, gather_shared, own_rows, run_jobs
from fmicl_text.vision.data import Images
from fmicl_text.vision.encoding import VIEW_BLOCK, device_of, encode_blocks, encode_views
from fmicl_text.vision.preprocessing import Preprocessing, new_preprocessing
from fmicl_text.vision.views import ImageViews

logger = logging.getLogger(__name__)

KS, DRAWS = (20, 200), 5
RAW_SIZE = 32  # pixels; larger images are downscaled for the probes of raw pixels
MOST_KEPT = 2**30  # bytes; preprocessed images that need less memory are kept between evaluations
MOST_VIEWED = 2000  # maximum number of images for the scores that need no classes
GEOMETRY = ("alignment", "uniformity", "effective_rank")

Encode = Callable[[Images, Tensor], Iterator[tuple[Tensor, Tensor]]]  # images and rows to batches of rows and features


@dataclass
class ImageEvaluator:
    """Evaluates an image encoder on images that are not trained on.

    Calling it with an encoder returns the scores that the trainer logs. For images with classes it is knn_accuracy, the
    accuracy in percent of k-NN classification (k = 200, temperature 0.1, cosine). Without classes they are of two
    random views of up to 2,000 images: view_retrieval (percent of the images whose second view is the nearest of all
    second views to their first view), alignment, uniformity and effective_rank.

    With `table_row` a call also adds a row to `table`, the table of probes. Every process must call it; each encodes
    its share of the images. The memory does not depend on the number of training images.

    Args:
        train: The training images, of which those with a class are the neighbors.
        test: Images of the table, and of the scores if there are no validation images.
        preprocessing: What the encoder receives of a picture.
        views: Random views for the scores that need no classes.
        probes: False for scores only, without a table.
        validation: Images of the scores, if they are not those of the table.
        progress: Show a progress bar while encoding.
        batch_size: Images per forward pass.

    Attributes:
        observations: Of the last call, for every image of the primary metric: 1 if it is right and 0 if not, [N]; a
            share if several second views are equally near.

    Raises:
        InputError: There are no images to evaluate on, or none of their classes is among the training images;
            or batch_size is below 1.
    """

    train: Images
    test: Images | None
    preprocessing: Preprocessing
    views: ImageViews
    probes: bool = True
    validation: Images | None = None
    progress: bool = True
    batch_size: int = 512
    table: list[dict[str, Any]] = field(default_factory=list, init=False)
    row_name: str | None = field(default=None, init=False)
    observations: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)
    smallest_differences: ClassVar[dict[str, float]] = {"knn_accuracy": 0.1, "view_retrieval": 0.1}  # for the verdict

    def __post_init__(self) -> None:
        scored = self.test if self.validation is None else self.validation
        if scored is None:
            raise InputError("test=None: an evaluator needs held-out images; set held_out or validation")
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")
        self.scored = scored
        held_out = [images for images in (self.test, self.validation) if images is not None]
        self.has_classes = len(self.train.labels[self.train.labels >= 0].unique()) > 1 and all(
            bool((images.labels >= 0).any()) for images in held_out
        )
        for images in held_out:
            if self.has_classes:
                check_classes(self.train, images)
            elif len(images) < 2:
                raise InputError(f"{images.source}: at least 2 held-out images are needed, got {len(images)}")
        values = self.train.channels * self.preprocessing.size**2 * sum(map(len, (self.train, *held_out)))
        self.kept: dict[Any, Any] | None = {} if 4 * values <= MOST_KEPT else None
        self.greater_is_better, self.items = True, "held-out images"
        self.primary_metric = "knn_accuracy" if self.has_classes else "view_retrieval"

    def describe(self) -> dict[str, str]:
        """A hash of the evaluation data, which is compared when a run is resumed."""
        return {"evaluation_data": self.scored.fingerprint()}

    @contextmanager
    def table_row(self, name: str) -> Iterator[None]:
        """Within this context, a call of the evaluator also adds a row with this name to the table, from the same
        features. The first row is preceded by one of raw pixels. Without probes or test images nothing is added."""
        self.row_name = name
        try:
            yield
        finally:
            self.row_name = None

    def __call__(self, encoder: nn.Module) -> dict[str, float]:
        device, sets = device_of(encoder), [self.scored]
        if self.row_name is None or not self.probes or self.test is None:
            return self.evaluate(encoder, sets, False, device)[0]
        if self.test is not self.scored:
            sets.append(self.test)
        if not self.table:
            self.table.append({"features": "raw pixels"} | self.evaluate(RawPixels(), [self.test], True, device)[1])
        scores, row = self.evaluate(encoder, sets, True, device)
        self.table.append({"features": self.row_name} | row)
        return scores

    def evaluate(
        self, encoder: nn.Module, sets: Sequence[Images], add_row: bool, device: torch.device
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Scores on the first set of images, and a row of the table on the last."""
        if not self.has_classes:
            found = [self.label_free_scores(encoder, images, device) for images in sets]
            self.observations = found[0][1]
            return found[0][0], {name.replace("_", " "): value for name, value in found[-1][0].items()}
        encode = partial(self.encode, encoder)
        data = collect_features(encode, self.train, sets, max(KS), device, fit=add_row)
        (correct,) = data[0].neighbors.correct(data[0].test_labels, KS[-1:]).values()
        self.observations = correct.numpy().astype(float)
        return {"knn_accuracy": self.metric_of(self.observations)}, describe_probes(data[-1]) if add_row else {}

    @staticmethod
    def metric_of(observations: np.ndarray) -> float:
        """The primary metric of some of the images; see `bootstrap_difference`."""
        return 100 * float(observations.sum()) / len(observations)

    def encode(self, encoder: nn.Module, images: Images, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Features of pictures, or their pixels."""
        if isinstance(encoder, RawPixels):
            return encode_raw_pixels(images, rows, self.preprocessing, self.progress)
        return encode_blocks(encoder, images, rows, self.preprocessing, self.batch_size, self.progress, kept=self.kept)

    def label_free_scores(
        self, encoder: nn.Module, images: Images, device: torch.device
    ) -> tuple[dict[str, float], np.ndarray]:
        """Scores of two random views of the images, which need no classes, and the share of each image in the first."""
        rows = torch.linspace(0, len(images) - 1, min(len(images), MOST_VIEWED)).round().long()
        processes = assign_rows(len(rows), VIEW_BLOCK)
        blocks = encode_views(encoder, images, rows[own_rows(processes)], self.views, self.progress)
        pairs = gather_shared(concatenate(blocks), processes, device)
        x, y = pairs.unflatten(1, (2, -1)).unbind(1)
        geometry = describe_geometry(x, y) if pairs.isfinite().all() else dict.fromkeys(GEOMETRY, math.nan)
        shares = nearest_shares(x, y).cpu().numpy()
        return {"view_retrieval": self.metric_of(shares), **{name: geometry[name] for name in GEOMETRY}}, shares


class RawPixels(nn.Module):
    """The pixels of images of at most 32 x 32 pixels as features [B, C * S * S]; larger images are downscaled."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[-1] > RAW_SIZE:
            pixel_values = functional.interpolate(pixel_values, (RAW_SIZE, RAW_SIZE), mode="bilinear", antialias=True)
        return pixel_values.flatten(1)


def encode_raw_pixels(
    images: Images, rows: Tensor, preprocessing: Preprocessing, progress: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (rows [B], pixels [B, C * S * S]) of center crops of the size of the preprocessing, but at most 32."""
    size = min(preprocessing.size, RAW_SIZE)
    small = new_preprocessing(size, preprocessing.mean, preprocessing.std)
    return encode_blocks(RawPixels(), images, rows, small, progress=progress, draft=size)


@dataclass(frozen=True)
class ProbeData:
    """Features for the probes of one set of test images.

    Args:
        neighbors: The nearest of all training images.
        test, test_labels: Features [M, D] and classes [M] of the test images.
        fitted, fitted_labels: Features [F, D] and classes [F] of the training images on which classifiers are fitted,
            at most 50,000.
    """

    neighbors: NearestNeighbors
    test: Tensor
    test_labels: Tensor
    fitted: Tensor
    fitted_labels: Tensor

    def knn_accuracies(
        self, ks: Sequence[int], temperatures: Sequence[float] = (0.1,)
    ) -> dict[tuple[int, float], float]:
        """As `evaluation.probes.knn_accuracies`."""
        return self.neighbors.accuracies(self.test_labels, ks, temperatures)

    def for_classifiers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `logistic_accuracy` and `few_label_accuracies`."""
        return self.fitted, self.fitted_labels, self.test, self.test_labels


def collect_features(
    encode: Encode, train: Images, sets: Sequence[Images], k: int, device: torch.device, fit: bool = True
) -> list[ProbeData]:
    """Features for the probes of each set of test images, in one pass over the training images that have a class.

    Every process must call this. Each encodes its share, and all receive the same result.

    Args:
        encode: Maps images and rows to batches of rows and features.
        train: The training images.
        sets: The sets of test images; those without a class are not used.
        k: Largest number of neighbors.
        device: Device of the similarities.
        fit: Whether to keep features to fit classifiers on.
    """
    neighbors, tests = [], []
    for images in sets:
        rows = labeled_rows(images)
        processes = assign_rows(len(rows))
        features = gather_shared(concatenate(encode(images, rows[own_rows(processes)])), processes, device)
        tests.append((features, images.labels[rows]))
        on_device = features if device.type == "mps" else features.to(device)  # MPS has no float64
        neighbors.append(NearestNeighbors(on_device, k))
    rows, chosen = labeled_rows(train), torch.zeros(len(train), dtype=torch.bool)
    chosen[stratified_rows(train.labels, MOST_FITTED) if fit else []] = True
    processes, kept = assign_rows(len(rows)), []
    for batch, features in encode(train, rows[own_rows(processes)]):
        for one in neighbors:
            one.add(features, train.labels[batch])
        kept.append((batch, features[chosen[batch]]))
    for one in neighbors:
        one.gather()
    fitted = gather_shared(concatenate(kept), processes[chosen[rows]], device)
    return [ProbeData(one, *test, fitted, train.labels[chosen]) for one, test in zip(neighbors, tests, strict=True)]


def concatenate(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The features of batches of (rows, features) as one tensor [N, D]; [0, 0] without batches."""
    parts = [features.flatten(1) for _, features in batches]
    return torch.cat(parts) if parts else torch.empty(0, 0)


def describe_probes(data: ProbeData) -> dict[str, Any]:
    """One row of the table of probes: accuracies on the test images, in percent. Every process must call
    this, and fits its share of the classifiers."""
    fit = data.for_classifiers()
    jobs: list[Callable[[], list[float]]] = [lambda: [logistic_accuracy(*fit)]]
    jobs += [partial(few_label_accuracies, *fit, draws=[draw]) for draw in range(DRAWS)]
    logistic, *accuracies = [accuracy for (accuracy,) in run_jobs(jobs)]
    return {
        **{f"k-NN, k = {k}": accuracy for (k, _), accuracy in data.knn_accuracies(KS).items()},
        "logistic regression": logistic,
        "5 labels per class": f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}",
    }


def labeled_rows(images: Images) -> Tensor:
    """The rows of images that have a class."""
    return (images.labels >= 0).nonzero()[:, 0]


def check_classes(train: Images, test: Images) -> None:
    """Check that the classes of test images occur in training. If some do not, which a warning reports, their images
    count as errors.

    Raises:
        InputError: None occurs.
    """
    labels = test.labels[labeled_rows(test)]
    known = torch.isin(labels, train.labels)
    if not known.any():
        raise InputError(f"{test.source}: no training image has a class of the {len(labels)} held-out images")
    if not known.all():
        message = "%s: %d of %d held-out images are of classes without training images, and count as errors"
        logger.warning(message, test.source, int((~known).sum()), len(labels))
