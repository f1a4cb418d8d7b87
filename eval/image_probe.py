"""Evaluate the features of image encoders with k-NN, linear and few-shot probes.

    python eval/image_probe.py --model js=runs/digits-js kl=runs/digits-kl                       # scikit-learn's digits
    python eval/image_probe.py --model runs/cifar10 --images TRAIN.parquet --test_file TEST.parquet --linear_epochs 100
    python eval/image_probe.py --model facebook/dinov2-small --images FOLDER --held_out 1000

Prints a Markdown table with one row per encoder; --output also writes a JSON file. The probes are k-NN for every k and
temperature, logistic regression on all labels and on five labels per class, and with --linear_epochs a linear layer
trained on random views. Raw pixels and the same architecture with random weights are always included as baselines.
Features are those of the encoder without the projection head, for pictures preprocessed by the model's own image
processor. eval/README.md describes the protocol.
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
from fmicl_text.cli.launched import launched_processes
from fmicl_text.cli.parser import ArgumentParser, cli_errors, flags_called
from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoders import training_metadata
from fmicl_text.evaluation.probes import few_label_accuracies, linear_accuracy, logistic_accuracy
from fmicl_text.evaluation.report import (
    float32_products,
    library_versions,
    markdown_table,
    mean_std,
    named_model,
    write_json,
)
from fmicl_text.evaluation.sharing import run_jobs
from fmicl_text.loading import hub_commit
from fmicl_text.vision.data import Images, load_digits, load_images
from fmicl_text.vision.encoder import ImageEncoder, build_image_encoder, new_image_encoder
from fmicl_text.vision.encoding import encode_blocks
from fmicl_text.vision.evaluator import RAW_SIZE, check_classes, collect_features, encode_raw_pixels, labeled_rows
from fmicl_text.vision.preprocessing import Preprocessing, new_preprocessing, open_preprocessing
from fmicl_text.vision.views import VIEWS, ImageViews

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse_args() -> argparse.Namespace:
    """Parse and validate the command line, before anything is loaded."""
    parser = ArgumentParser("image_probe.py", __doc__)
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="[NAME=]MODEL", help="encoders: folders or Hub IDs"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=["digits"],
        metavar="PATH",
        help="folder of images with a subfolder per class, .parquet files, a folder of them, or digits (default)",
    )
    parser.add_argument("--test_file", nargs="+", metavar="PATH", help="test images, instead of held-out ones")
    parser.add_argument("--image_column", help="column of images (default: found by its name or type)")
    parser.add_argument("--label_column", help="column of classes (default: found by its name or type)")
    parser.add_argument(
        "--held_out",
        type=whole_number,
        help="number of images to test on (default: a fifth, at most 5000; digits: 360)",
    )
    parser.add_argument("--max_train_samples", type=whole_number, help="train the probes on N images only")
    parser.add_argument("--image_size", type=whole_number, help="image size in pixels (default: the model's own)")
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
    check_output("--output", args.output, *args.images, *(args.test_file or []))
    digits = args.images == ["digits"]
    if digits and args.test_file:
        raise InputError("--test_file needs --images")
    args.views = args.views or ("gray" if digits else "cifar")
    return args


def load(args: argparse.Namespace, channels: int) -> tuple[Images, Images]:
    """Training and test images with classes.

    Raises:
        InputError: An argument or the data is invalid, or there are no classes or test images.
    """
    if args.images == ["digits"]:
        sets = load_digits(channels, args.held_out or 360, max_train_samples=args.max_train_samples)
    else:
        with flags_called(train_file="images"):
            sets = load_images(
                args.images if len(args.images) > 1 else args.images[0],
                image_column=args.image_column,
                label_column=args.label_column,
                test_file=args.test_file,
                channels=channels,
                held_out=args.held_out,
                max_train_samples=args.max_train_samples,
            )
    train, test = sets.train, sets.test
    if len(train.labels[labeled_rows(train)].unique()) < 2:
        raise InputError(
            f"--images {train.source}: probes need images of at least two classes: one subfolder per class, or a "
            "--label_column"
        )
    if test is None:
        raise InputError(f"--images {train.source}: {len(train)} images are too few to hold out any; pass --held_out")
    check_classes(train, test)
    return train.take(labeled_rows(train).numpy()), test.take(labeled_rows(test).numpy())


def preprocessing_of(args: argparse.Namespace, path: str, encoder: ImageEncoder, train: Images) -> Preprocessing:
    """The preprocessing of a model; for a model without an image processor, a new one with the statistics of the
    training images."""
    with flags_called(model_name_or_path="model"):
        own = open_preprocessing(path, encoder.num_channels, args.image_size)
    if own is not None:
        return own
    default = encoder.image_size or (16 if args.images == ["digits"] else 32)
    return new_preprocessing(args.image_size or default, *train.mean_and_std())


def probe(
    args: argparse.Namespace, train: Images, test: Images, encoder: ImageEncoder | None, preprocessing: Preprocessing
) -> dict[str, Any]:
    """Test accuracy in percent of each probe, on the features of an encoder or on raw pixels."""

    def encode(images: Images, rows: Tensor) -> Any:
        if encoder is None:
            return encode_raw_pixels(images, rows, preprocessing)
        return encode_blocks(encoder, images, rows, preprocessing)

    data = collect_features(encode, train, [test], min(max(args.ks), len(train)), torch.device(DEVICE))[0]
    scores: dict[str, Any] = {
        f"k-NN, k {k}, T {temperature:g}": accuracy
        for (k, temperature), accuracy in data.knn_accuracies(args.ks, args.temperatures).items()
    }
    fit = data.for_classifiers()
    jobs: list[Any] = [partial(logistic_accuracy, *fit), partial(few_label_accuracies, *fit, seed=args.seed)]
    scores["logistic regression"], scores["5 labels per class"] = run_jobs(jobs)
    if args.linear_epochs and encoder is not None:
        mean, std, order = preprocessing.mean, preprocessing.std, preprocessing.channel_order
        make = ImageViews(args.views, preprocessing.size, mean, std, channel_order=order)

        def one_view(rows: Tensor, seed: int) -> Tensor:
            images = train.for_views(rows.tolist(), make.size, make.crop, (seed,)).to(DEVICE)
            return make(images, torch.Generator(DEVICE).manual_seed(seed))[:, 0]

        scores["linear layer"] = linear_accuracy(
            encoder.eval(),
            one_view,
            train.labels,
            data.test,
            data.test_labels,
            epochs=args.linear_epochs,
            seed=args.seed,
        )
    return scores


def main(writes: bool = True) -> None:
    args = parse_args()
    results: list[dict[str, Any]] = []
    loaded: dict[int, tuple[Images, Images]] = {}

    def add(name: str, metadata: dict[str, Any], encoder: ImageEncoder | None, preprocessing: Preprocessing) -> None:
        train, test = loaded[preprocessing.channels]
        scores = probe(args, train, test, encoder, preprocessing)
        setup = {"source": train.source, "fingerprint": train.fingerprint(), "layer": "encoder", "seed": args.seed}
        setup |= {"test_source": test.source, "num_train": len(train), "num_test": len(test)}
        setup |= {"image_size": preprocessing.size, "pixel_mean": preprocessing.mean, "pixel_std": preprocessing.std}
        setup |= {"preprocessing": preprocessing.processor.to_dict()}
        setup |= {"device": DEVICE, "float32_products": float32_products(DEVICE)}
        if encoder is not None:
            setup |= {"commit": hub_commit(encoder.backbone), "pooling": encoder.pooling}
        if args.linear_epochs:
            setup |= {"linear_epochs": args.linear_epochs, "views": args.views}
        results.append({"name": name, **metadata, **setup, "metrics": scores, "versions": library_versions()})

    for name, path in map(named_model, args.model):
        with flags_called(model_name_or_path="model"):
            encoder = build_image_encoder(path)
        channels, is_first = encoder.num_channels, encoder.num_channels not in loaded
        if is_first:
            loaded[channels] = load(args, channels)
        train, _ = loaded[channels]
        preprocessing = preprocessing_of(args, path, encoder, train)
        encoder.width(preprocessing.size)  # raises if the model does not accept this size
        encoder.check_shapes(preprocessing)
        if is_first:
            add("raw pixels", {}, None, new_preprocessing(min(preprocessing.size, RAW_SIZE), *train.mean_and_std()))
        torch.manual_seed(args.seed)
        add(f"{name}, random weights", {}, new_image_encoder(encoder.backbone.config).to(DEVICE), preprocessing)
        metadata = {"model": path, **training_metadata(Path(path).expanduser())}
        add(name, metadata, encoder.to(DEVICE), preprocessing)
    if args.output and writes:
        write_json(args.output, results)
    rows = []
    for result in results:
        few = result["metrics"]["5 labels per class"]
        rows.append({"features": result["name"]} | result["metrics"] | {"5 labels per class": mean_std(few)})
    print(markdown_table(rows))


if __name__ == "__main__":
    with launched_processes() as is_first, cli_errors("image_probe.py"):
        main(writes=is_first)
