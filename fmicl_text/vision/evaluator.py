"""What training calls to score an image encoder, and the table of probes that a run ends with."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmicl_text.evaluation.probes import few_label_accuracies, knn_accuracies, logistic_accuracy
from fmicl_text.vision.data import Images, TrainingRows
from fmicl_text.vision.encoder import ImageEncoder
from fmicl_text.vision.model import encode_images
from fmicl_text.vision.views import plain_view

KS = (20, 200)
RAW_SIZE = 32  # pixels; larger images are shrunk to it, or a raw pixel would be a weight of many thousands
MOST_FITTED = 50_000  # rows that logistic regression is fitted to


@dataclass
class KNNEvaluator:
    """Scores an image encoder by its nearest neighbours (k = 200, temperature 0.1, cosine, features before the head).

    Args:
        train: The neighbours.
        test: Images whose class they vote on, not among those trained on.
        size, mean, std: Of the plain view.
        progress: Show a bar while encoding.
    """

    train: Images
    test: Images
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    progress: bool = True

    @property
    def dataset(self) -> TrainingRows:
        """What the base trainer asks for when it is to evaluate."""
        return TrainingRows(self.test, self.size, None, seed=0)

    def features(self, encoder: ImageEncoder) -> tuple[Tensor, Tensor]:
        """Features [N, D] of the training and of the test images."""
        train, test = (
            encode_images(encoder, images, self.size, self.mean, self.std, progress=self.progress)
            for images in (self.train, self.test)
        )
        return train, test

    def __call__(self, encoder: ImageEncoder) -> dict[str, float]:
        train, test = self.features(encoder)
        ((_, accuracy),) = knn_accuracies(train, self.train.labels, test, self.test.labels, KS[-1:]).items()
        return {"knn_accuracy": accuracy}

    def raw_pixels(self) -> tuple[Tensor, Tensor]:
        """The plain views themselves as features, of at most 32 pixels."""
        size = min(self.size, RAW_SIZE)
        train, test = (raw_pixels(images, size, self.mean, self.std) for images in (self.train, self.test))
        return train, test

    def probe(self, name: str, features: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """One row of the table of probes: percent of the test images whose class is found."""
        train, test = features
        data = (train, self.train.labels, test, self.test.labels)
        knn, few = knn_accuracies(*data, ks=KS), few_label_accuracies(*data)
        fitted = (train[:MOST_FITTED], self.train.labels[:MOST_FITTED], test, self.test.labels)
        return {
            "features": name,
            **{f"k-NN, k = {k}": accuracy for (k, _), accuracy in knn.items()},
            "logistic regression": logistic_accuracy(*fitted),
            "5 labels a class": f"{statistics.mean(few):.2f} ± {statistics.stdev(few):.2f}",
        }


def raw_pixels(images: Images, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Plain views [N, C * size * size]."""
    parts = torch.arange(len(images.labels)).split(512)
    return torch.cat([plain_view(images.plain(rows.tolist(), size), size, mean, std).flatten(1) for rows in parts])
