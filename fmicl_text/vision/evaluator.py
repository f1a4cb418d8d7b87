"""What training calls to score an image encoder, and the table of probes that a run ends with."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fmicl_text.evaluation.probes import few_label_accuracies, knn_accuracies, logistic_accuracy
from fmicl_text.vision.data import ImageRows, LabelledImages
from fmicl_text.vision.encoder import ImageEncoder
from fmicl_text.vision.model import encode_images
from fmicl_text.vision.views import plain_view

KS = (20, 200)


@dataclass
class KNNEvaluator:
    """Scores an image encoder by its nearest neighbours (k = 200, temperature 0.1, cosine, features before the head).

    Args:
        train: The neighbours.
        test: Images whose class they vote on, not among those trained on.
        size, mean, std: Of the plain view.
        progress: Show a bar while encoding.
    """

    train: LabelledImages
    test: LabelledImages
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    progress: bool = True

    @property
    def dataset(self) -> ImageRows:
        """What the base trainer asks for when it is to evaluate."""
        return ImageRows(self.test)

    def features(self, encoder: ImageEncoder) -> tuple[Tensor, Tensor]:
        """Features [N, D] of the training and of the test images."""
        train, test = (
            encode_images(encoder, images.pixels, self.size, self.mean, self.std, progress=self.progress)
            for images in (self.train, self.test)
        )
        return train, test

    def __call__(self, encoder: ImageEncoder) -> dict[str, float]:
        train, test = self.features(encoder)
        ((_, accuracy),) = knn_accuracies(train, self.train.labels, test, self.test.labels, KS[-1:]).items()
        return {"knn_accuracy": accuracy}

    def raw_pixels(self) -> tuple[Tensor, Tensor]:
        """The plain views themselves as features."""
        train, test = (
            plain_view(images.pixels, self.size, self.mean, self.std).flatten(1) for images in (self.train, self.test)
        )
        return train, test

    def probe(self, name: str, features: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """One row of the table of probes: percent of the test images whose class is found."""
        train, test = features
        data = (train, self.train.labels, test, self.test.labels)
        knn, few = knn_accuracies(*data, ks=KS), few_label_accuracies(*data)
        return {
            "features": name,
            **{f"k-NN, k = {k}": accuracy for (k, _), accuracy in knn.items()},
            "logistic regression": logistic_accuracy(*data),
            "5 labels a class": f"{statistics.mean(few):.2f} ± {statistics.stdev(few):.2f}",
        }
