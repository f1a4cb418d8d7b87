"""Evaluate the features of image encoders with k-NN, linear and few-shot probes.

    python eval/image_probe.py --model js=runs/digits-js kl=runs/digits-kl                       # scikit-learn's digits
    python eval/image_probe.py --model runs/cifar10 --images CIFAR10.parquet --image_size 32 --linear_epochs 100
    python eval/image_probe.py --model facebook/dinov2-small --images FOLDER --image_size 98 --held_out 1000

Prints a Markdown table with one row per encoder; --output also writes a JSON file. The probes are k-NN for every k and
temperature, logistic regression on all labels and on five labels per class, and with --linear_epochs a linear layer
trained on random views. Raw pixels and the same architecture with random weights are always included as baselines.
Features are those of the encoder without the projection head. eval/README.md describes the protocol.
"""

from __future__ import annotations

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmicl_text.cli.checks import check_output, positive_number, whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors, flags_called
from fmicl_text.evaluation.encoders import training_metadata
from fmicl_text.evaluation.probes import few_label_accuracies, knn_accuracies, linear_accuracy, logistic_accuracy
from fmicl_text.evaluation.report import (
    float32_products,
    library_versions,
    markdown_table,
    mean_std,
    named_model,
    write_json,
)
from fmicl_text.loading import hub_commit
from fmicl_text.vision.data import Images, check_channels, load_digits, load_images, split
from fmicl_text.vision.encoder import ImageEncoder, build_image_encoder, new_image_encoder, pixel_statistics
from fmicl_text.vision.evaluator import MOST_FITTED, RAW_SIZE, raw_pixels
from fmicl_text.vision.model import encode_images
from fmicl_text.vision.views import VIEWS, ImageViews

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse_args() -> argparse.Namespace:
    """Parse and validate the command line, before anything is loaded."""
    parser = ArgumentParser("image_probe.py", __doc__)
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="[NAME=]MODEL", help="encoders: folders or Hub IDs"
    )
    parser.add_argument(
        "--images", default="digits", help=".parquet file, folder with a subfolder per class, or digits (default)"
    )
    parser.add_argument("--image_column", default="img", help="column of images (default: img)")
    parser.add_argument("--label_column", default="label", help="column of classes (default: label)")
    parser.add_argument("--held_out", type=whole_number, help="final rows to test on (default: 5000; digits: 360)")
    parser.add_argument("--max_train_samples", type=whole_number, help="train the probes on the first N rows only")
    parser.add_argument("--image_size", type=whole_number, help="image size in pixels (default: 32; digits: 16)")
    parser.add_argument(
        "--ks", nargs="+", type=whole_number, default=[20, 200], help="numbers of neighbors k (default: 20 200)"
    )
    parser.add_argument(
        "--temperatures", nargs="+", type=positive_number, default=[0.1], help="k-NN temperatures (default: 0.1)"
    )
    parser.add_argument("--linear_epochs", type=whole_number, help="epochs of linear evaluation with augmentation")
    parser.add_argument("--views", choices=VIEWS, help="augmentation of --linear_epochs (default: cifar; digits: gray)")
    from_0 = partial(whole_number, lowest=0)
    parser.add_argument(
        "--seed", type=from_0, default=0, help="seed of weights, label draws and linear layer (default: 0)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    check_output("--output", args.output, args.images)
    digits = args.images == "digits"
    args.held_out = args.held_out or (360 if digits else 5000)
    args.image_size = args.image_size or (16 if digits else 32)
    args.views = args.views or ("gray" if digits else "cifar")
    return args


def probe(
    args: argparse.Namespace,
    train: Images,
    test: Images,
    encoder: ImageEncoder | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> dict[str, Any]:
    """Test accuracy in percent of each probe, on the features of an encoder or on raw pixels."""
    size = args.image_size

    def encode(images: Images) -> Tensor:
        if encoder is None:
            return raw_pixels(images, min(size, RAW_SIZE), mean, std)
        return encode_images(encoder, images, size, mean, std)

    data = (encode(train), train.labels, encode(test), test.labels)
    scores: dict[str, Any] = {
        f"k-NN, k {k}, T {temperature:g}": accuracy
        for (k, temperature), accuracy in knn_accuracies(*data, args.ks, args.temperatures).items()
    }
    scores["logistic regression"] = logistic_accuracy(data[0][:MOST_FITTED], data[1][:MOST_FITTED], *data[2:])
    scores["5 labels per class"] = few_label_accuracies(*data, seed=args.seed)
    if args.linear_epochs and encoder is not None:
        make, device = ImageViews(args.views, size, mean, std), next(encoder.parameters()).device

        def one_view(rows: Tensor, seed: int) -> Tensor:
            images = train.for_views(rows.tolist(), size, make.crop, (seed,)).to(device)
            return make(images, torch.Generator(device).manual_seed(seed))[:, 0]

        scores["linear layer"] = linear_accuracy(
            encoder.eval(), one_view, *data[1:], epochs=args.linear_epochs, seed=args.seed
        )
    return scores


def main() -> None:
    args = parse_args()
    results: list[dict[str, Any]] = []
    loaded: dict[int, tuple[Images, Images]] = {}

    def add(name: str, metadata: dict[str, Any], encoder: ImageEncoder | None, channels: int, path: str | None) -> None:
        train, test = loaded[channels]
        mean, std = (pixel_statistics(path, channels) if path else None) or train.mean_and_std()
        scores = probe(args, train, test, encoder, mean, std)
        setup = {"source": train.source, "fingerprint": train.fingerprint(), "layer": "encoder", "seed": args.seed}
        setup |= {"num_train": len(train.labels), "num_test": len(test.labels), "image_size": args.image_size}
        setup |= {"pixel_mean": mean, "pixel_std": std, "device": DEVICE, "float32_products": float32_products(DEVICE)}
        if encoder is not None:
            setup |= {"commit": hub_commit(encoder.backbone), "pooling": encoder.pooling}
        if args.linear_epochs:
            setup |= {"linear_epochs": args.linear_epochs, "views": args.views}
        results.append({"name": name, **metadata, **setup, "metrics": scores, "versions": library_versions()})

    for name, path in map(named_model, args.model):
        with flags_called(model_name_or_path="model"):
            encoder = build_image_encoder(path)
        encoder.width(args.image_size)  # raises if the model does not accept this size
        encoder = encoder.to(DEVICE)
        channels = encoder.num_channels
        if channels not in loaded:
            columns = (args.image_column, args.label_column)
            with flags_called(train_file="images"):
                images = (
                    load_digits()
                    if args.images == "digits"
                    else load_images(args.images, None, "train", *columns, channels)
                )
            check_channels(images, channels)
            loaded[channels] = split(images, args.held_out, args.max_train_samples)[:2]
            add("raw pixels", {}, None, channels, None)
        torch.manual_seed(args.seed)
        add(f"{name}, random weights", {}, new_image_encoder(encoder.backbone.config).to(DEVICE), channels, path)
        add(name, {"model": path, **training_metadata(Path(path).expanduser())}, encoder, channels, path)
    if args.output:
        write_json(args.output, results)
    rows = []
    for result in results:
        few = result["metrics"]["5 labels per class"]
        rows.append({"features": result["name"]} | result["metrics"] | {"5 labels per class": mean_std(few)})
    print(markdown_table(rows))


if __name__ == "__main__":
    with cli_errors("image_probe.py"):
        main()
