"""Evaluation of image encoders: k-NN accuracy during training, and the probes at the end of a run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmicl_text.evaluation.probes import few_label_accuracies, knn_accuracies, logistic_accuracy
from fmicl_text.vision.data import Images
from fmicl_text.vision.encoder import ImageEncoder
from fmicl_text.vision.model import encode_images
from fmicl_text.vision.views import plain_view

KS = (20, 200)
RAW_SIZE = 32  # pixels; larger images are downscaled for the probes of raw pixels
MOST_FITTED = 50_000  # maximum number of rows for fitting logistic regression


@dataclass
class KNNEvaluator:
    """Evaluates an image encoder by k-NN classification of its features (k = 200, temperature 0.1, cosine).

    Args:
        train: Labeled images from which the neighbors are taken.
        test: Images to classify, which are not trained on.
        size, mean, std: Settings of the plain view.
        progress: Show a progress bar while encoding.
        batch_size: Images per forward pass.
    """

    train: Images
    test: Images
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    progress: bool = True
    batch_size: int = 512

    def features(self, encoder: ImageEncoder) -> tuple[Tensor, Tensor]:
        """Features [N, D] of the training images and of the test images."""
        train, test = (
            encode_images(encoder, images, self.size, self.mean, self.std, self.batch_size, self.progress)
            for images in (self.train, self.test)
        )
        return train, test

    def describe(self) -> dict[str, str]:
        """A hash of the evaluation data, which is compared when a run is resumed."""
        return {"evaluation_data": self.test.fingerprint()}

    def __call__(self, encoder: ImageEncoder) -> dict[str, float]:
        train, test = self.features(encoder)
        ((_, accuracy),) = knn_accuracies(train, self.train.labels, test, self.test.labels, KS[-1:]).items()
        return {"knn_accuracy": accuracy}

    def raw_pixels(self) -> tuple[Tensor, Tensor]:
        """The pixels of plain views of at most 32 x 32 pixels as features."""
        size = min(self.size, RAW_SIZE)
        train, test = (raw_pixels(images, size, self.mean, self.std) for images in (self.train, self.test))
        return train, test

    def probe(self, name: str, features: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """One row of the table of probes: accuracies on the test images, in percent."""
        train, test = features
        data = (train, self.train.labels, test, self.test.labels)
        knn, few = knn_accuracies(*data, ks=KS), few_label_accuracies(*data)
        fitted = (train[:MOST_FITTED], self.train.labels[:MOST_FITTED], test, self.test.labels)
        return {
            "features": name,
            **{f"k-NN, k = {k}": accuracy for (k, _), accuracy in knn.items()},
            "logistic regression": logistic_accuracy(*fitted),
            "5 labels per class": f"{statistics.mean(few):.2f} ± {statistics.stdev(few):.2f}",
        }


def raw_pixels(images: Images, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Flattened plain views [N, C * size * size]."""
    parts = torch.arange(len(images.labels)).split(512)
    return torch.cat([plain_view(images.plain(rows.tolist(), size), size, mean, std).flatten(1) for rows in parts])
