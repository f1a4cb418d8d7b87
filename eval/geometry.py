"""Measure alignment, uniformity, effective rank and collapse of embeddings, and test the Gaussian-kernel assumption.

    python eval/geometry.py                                             # bundled encoder and sentences
    python eval/geometry.py --model before=BERT after=runs/js --text SENTENCES.txt --flow --plot geometry.png
    python eval/geometry.py --model runs/js --file PAIRS.tsv            # pairs with a score of 4 or more
    python eval/geometry.py --model before=digits after=runs/digits --images digits --views gray --image_size 16
    python eval/geometry.py --model js=runs/digits/checkpoint-100 --after_head --images digits ... # as in the loss
    python eval/geometry.py --embeddings FEATURES.npz                   # x and y [N, D], any encoder
    python eval/geometry.py --synthetic --flow                          # pairs with known density

Positive pairs are two dropout views of a sentence (--text), pairs with a high similarity score (--file), two random
views of an image (--images), or rows with the same index (--embeddings). eval/README.md explains the columns.
"""

from __future__ import annotations

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split

import argparse
import math
import sys
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fmicl_text.cli.checks import check_output, check_plot, whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors, flags_called
from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoders import encoder_metadata, open_encoder
from fmicl_text.evaluation.encoding import encode_dropout_views, encode_sentences
from fmicl_text.evaluation.geometry import describe_geometry, is_collapsed
from fmicl_text.evaluation.kernel import check_kernel
from fmicl_text.evaluation.plots import plot_geometry
from fmicl_text.evaluation.report import library_versions, markdown_table, named_model, write_json
from fmicl_text.evaluation.sts import POSITIVE_SCORE, embed_pairs, load_pairs
from fmicl_text.evaluation.synthetic import SYNTHETIC
from fmicl_text.files import check_regular
from fmicl_text.loading import hub_commit
from fmicl_text.losses.divergences import DIVERGENCES
from fmicl_text.quickstart import ENCODER, SENTENCES
from fmicl_text.text.data import load_training_text
from fmicl_text.text.model import POOLINGS
from fmicl_text.text.settings import log_encoding
from fmicl_text.vision.architectures import IMAGE_CONFIGS
from fmicl_text.vision.data import Images, load_digits, load_images
from fmicl_text.vision.encoder import build_image_encoder, new_image_encoder
from fmicl_text.vision.model import open_head
from fmicl_text.vision.preprocessing import new_preprocessing, open_preprocessing
from fmicl_text.vision.views import VIEWS, ImageViews


def parse_args() -> argparse.Namespace:
    """Parse and validate the command line, before anything is loaded."""
    parser = ArgumentParser("geometry.py", __doc__)
    parser.add_argument(
        "--model", nargs="+", metavar="[NAME=]MODEL", help="encoders: folders or Hub IDs (default: bundled)"
    )
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--text", help="sentences: .txt, .csv, .tsv, .jsonl (also .gz) or .parquet (default: bundled)")
    data.add_argument("--file", type=Path, help="sentence pairs with similarity scores: .tsv, .csv or .parquet")
    data.add_argument("--images", help="folder of images, .parquet file, or digits (scikit-learn)")
    data.add_argument("--embeddings", nargs="+", metavar="[NAME=]FILE", help=".npz files with arrays x and y, no model")
    data.add_argument("--synthetic", action="store_true", help="pairs with known density, no model")
    from_0, from_2, from_3 = (partial(whole_number, lowest=lowest) for lowest in (0, 2, 3))
    parser.add_argument("--num_pairs", type=from_2, default=5000, help="maximum number of pairs (default: 5000)")
    parser.add_argument("--flow", action="store_true", help="test the Gaussian kernel (half a minute per model)")
    parser.add_argument("--flow_dims", type=from_3, default=8, help="principal directions kept (default: 8)")
    parser.add_argument(
        "--divergence", nargs="+", choices=DIVERGENCES, default=["kl", "js"],
        help="divergences whose similarity is compared with the flow estimate (default: kl js)",
    )  # fmt: skip
    parser.add_argument("--views", choices=VIEWS, default="cifar", help="augmentation of --images (default: cifar)")
    parser.add_argument("--image_column", help="column of images (default: found by its type)")
    parser.add_argument("--image_size", type=whole_number, help="view size in pixels (default: the model's own, or 32)")
    parser.add_argument("--after_head", action="store_true", help="apply the head of image checkpoints")
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="pooling (default: the model's own, else as in training: cls, or lasttoken for decoders)",
    )
    parser.add_argument("--strict", action="store_true", help="fail if a model does not specify its pooling")
    parser.add_argument("--seed", type=from_0, default=0, help="seed of sampling, dropout and flow (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="plot to write: .png, .pdf or .svg")
    args = parser.parse_args()
    if args.model and (args.embeddings or args.synthetic):
        parser.error("--model cannot be combined with --embeddings or --synthetic, which need no model")
    if args.images and not args.model:
        parser.error("--images requires --model: an image model, or the name of an architecture (random weights)")
    if args.after_head and not args.images:
        parser.error("--after_head requires --images")
    for name in ("image_column", "image_size"):
        if getattr(args, name) is not None and not args.images:
            parser.error(f"--{name} requires --images")
    if args.pooling and (args.images or args.embeddings or args.synthetic):
        parser.error("--pooling applies to --text and --file only; image models have their own")
    read = [args.images, args.text, args.file, *(named_model(name)[1] for name in args.embeddings or ())]
    check_output("--output", args.output, *read)
    check_plot("--plot", args.plot, *read)
    args.model = args.model or [f"bundled={ENCODER}"]
    args.text = args.text or str(SENTENCES)
    return args


ZIP_ERRORS = (zipfile.BadZipFile, zlib.error)
Views = tuple[str, dict[str, Any], Tensor, Tensor]  # name, metadata, x and y [N, D]


def text_views(args: argparse.Namespace) -> Iterator[Views]:
    """Yield the embeddings of --text or --file by each model."""
    positives: Dataset | None = None
    if args.file:
        pairs = load_pairs(args.file).filter(lambda row: row["score"] >= POSITIVE_SCORE)
        positives = drop_repeats(pairs.shuffle(seed=args.seed), args.num_pairs)
        data = {"positive_pairs": f"score of {POSITIVE_SCORE:g} or more", "source": str(args.file)}
        if len(positives) < 2:
            needed = f"at least 2 pairs with a score of {POSITIVE_SCORE:g} or more are needed"
            raise InputError(f"--file {args.file}: {needed}, got {len(positives)}")
    else:
        with flags_called(train_file="text"):
            text = load_training_text(train_file=args.text)
        rows = text.dataset.shuffle(seed=args.seed)
        sentences = list(dict.fromkeys(rows[text.columns[0]]))[: args.num_pairs]
        data = {"positive_pairs": "dropout views", "source": args.text}
    for name, path in map(named_model, args.model):
        encoder = open_encoder(path, args.pooling, strict=args.strict)
        metadata = data | encoder_metadata(path, encoder, args.pooling)
        with log_encoding(encoder) as encoded:
            if positives is not None:
                x, y = embed_pairs(lambda texts: encode_sentences(encoder, texts), positives)  # noqa: B023  called here
            else:
                x, y = encode_dropout_views(encoder, sentences, args.seed)
                config = encoder.transformers_model.config.to_dict() if encoder.transformers_model else {}
                metadata |= {"dropout": {key: value for key, value in config.items() if "drop" in key}}
        if truncation := encoded.truncation():
            print(f"geometry.py: {path}: {truncation}", file=sys.stderr)
        yield name, metadata | encoded.describe(), x, y


def drop_repeats(pairs: Dataset, limit: int) -> Dataset:
    """The first pairs without a repeated sentence, which would count as a negative pair with itself."""
    seen: set[str] = set()
    kept = []
    for i, sentences in enumerate(zip(pairs["sentence1"], pairs["sentence2"], strict=True)):
        if seen.isdisjoint(sentences):
            seen.update(sentences)
            kept.append(i)
    return pairs.select(kept[:limit])


def image_views(args: argparse.Namespace) -> Iterator[Views]:
    """Yield the embeddings of two random views of --images by each model, normalized by its image processor; by the
    images if it has none."""
    loaded: dict[int, Images] = {}
    for name, path in map(named_model, args.model):
        with flags_called(train_file="images", model_name_or_path="model"):
            if path in IMAGE_CONFIGS:
                torch.manual_seed(args.seed)
                encoder, preprocessing = new_image_encoder(IMAGE_CONFIGS[path]()), None
            else:
                encoder = build_image_encoder(path)
                preprocessing = open_preprocessing(path, encoder.num_channels, args.image_size)
            channels = encoder.num_channels
            if channels not in loaded:
                column = {"image_column": args.image_column}
                digits = args.images == "digits"
                sets = (
                    load_digits(channels, 0)
                    if digits
                    else load_images(args.images, **column, channels=channels, held_out=0)
                )
                loaded[channels] = sets.train
            images = loaded[channels]
            if preprocessing is None:
                preprocessing = new_preprocessing(args.image_size or encoder.image_size or 32, *images.mean_and_std())
            size, width = preprocessing.size, encoder.width(preprocessing.size)
        mean, std = preprocessing.mean, preprocessing.std
        make = ImageViews(args.views, size, mean, std, channel_order=preprocessing.channel_order)
        generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(len(images), generator=generator)[: args.num_pairs]
        head = open_head(path, width) if args.after_head else torch.nn.Identity()
        embed = torch.nn.Sequential(encoder, head).eval()
        with torch.no_grad():
            batches = []
            for rows in order.split(256):
                pixels = images.for_views(rows.tolist(), size, make.crop, (args.seed,))
                batches.append(embed(make(pixels, generator).flatten(0, 1)))
        x, y = torch.cat(batches).unflatten(0, (-1, 2)).unbind(1)
        data: dict[str, Any] = {"positive_pairs": f"two {args.views} views", "source": images.source, "model": path}
        data |= {"commit": hub_commit(encoder.backbone), "pooling": encoder.pooling, "image_size": size}
        data |= {"pixel_mean": mean, "pixel_std": std, "layer": "projection head" if args.after_head else "encoder"}
        yield name, data, x, y


def check_array_sizes(path: str) -> None:
    """Raise `ValueError` if an array of an .npz file is larger, by its header, than its content."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                number = 1 if np.lib.format.read_magic(file) == (1, 0) else 2
                shape, _, dtype = getattr(np.lib.format, f"read_array_header_{number}_0")(file)
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"{member.filename} claims to have the shape {shape} in {member.file_size} bytes")


def file_views(args: argparse.Namespace) -> Iterator[Views]:
    """Yield the arrays x and y of each --embeddings file."""
    for name, path in map(named_model, args.embeddings):
        check_regular(path, f"--embeddings {path}")
        try:
            check_array_sizes(path)
            with np.load(path, allow_pickle=False) as arrays:
                sides = [arrays[side] for side in ("x", "y")]
            if kinds := [side.dtype.name for side in sides if side.dtype.kind not in "fiu"]:
                raise TypeError(f"expected numbers, got {kinds[0]}")
            x, y = (torch.from_numpy(side).float() for side in sides)
        except (OSError, ValueError, LookupError, TypeError, EOFError, MemoryError, RuntimeError, *ZIP_ERRORS) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--embeddings {path}: expected an .npz file with arrays x and y ({reason})") from error
        if x.ndim != 2 or x.shape != y.shape or len(x) < 2 or x.shape[1] < 1:
            raise InputError(
                f"--embeddings {path}: x and y must both be [N, D], N >= 2, D >= 1, got {[*x.shape]}, {[*y.shape]}"
            )
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed))[: args.num_pairs]
        yield name, {"positive_pairs": "rows of the file", "source": path}, x[order], y[order]


def synthetic_views(args: argparse.Namespace) -> Iterator[Views]:
    """Yield pairs from each synthetic distribution."""
    for name, draw in SYNTHETIC.items():
        pairs = draw(args.num_pairs, dims=args.flow_dims, seed=args.seed)
        yield name, {"positive_pairs": "synthetic", "source": draw.__name__}, pairs.x, pairs.y


def table_row(result: dict[str, Any]) -> dict[str, Any]:
    """The row of the printed table for a result."""
    row = {"encoder": result["name"], "pooling": result.get("pooling")} | result["metrics"]
    if kernel := result.get("kernel"):
        row |= {"gamma": kernel["joint"]["gamma"], "R2, pairs": kernel["joint"]["r2_pairs"]}
        row |= {"R2, bins": kernel["joint"]["r2_bins"]}
        row |= {f"to f'(u), {name}": distance for name, distance in kernel["distances"].items()}
    return row | {"verdict": "COLLAPSED" if result["collapsed"] else ""}


def main() -> None:
    args = parse_args()
    source = synthetic_views if args.synthetic else file_views if args.embeddings else text_views
    source = image_views if args.images else source
    results, views, kernels = [], {}, {}
    for name, metadata, x, y in source(args):
        both = torch.cat([x, y])
        if num_bad := int((~both.isfinite().all(1) | ~both.any(1)).sum()):
            raise InputError(f"{name}: {num_bad} of {len(both)} embeddings contain NaN, infinity or only zeros")
        if len(x) < 2:
            raise InputError(f"{name}: at least 2 pairs are needed, got {len(x)} from {metadata['source']}")
        if name in views:
            raise InputError(f"the name {name} is given twice")
        metrics = describe_geometry(x, y)
        result = {"name": name, **metadata, "num_pairs": len(x), "width": x.shape[1], "seed": args.seed}
        result |= {"metrics": metrics, "collapsed": is_collapsed(metrics, x.shape[1]), "versions": library_versions()}
        if args.flow:
            divergences = [DIVERGENCES[divergence] for divergence in args.divergence]
            result["kernel"] = kernels[name] = check_kernel(x, y, divergences, args.flow_dims, args.seed)
        results.append(result)
        views[name] = (x, y)
        if result["collapsed"]:
            share = f"{metrics['top_direction']:.0%} of the variance in one direction"
            print(f"{name}: collapsed, mean cosine {metrics['mean_cosine']:.2f}, {share}", file=sys.stderr)
    if args.output:
        write_json(args.output, results)
    if args.plot:
        source_name = "pairs with known density" if args.synthetic else Path(results[0]["source"]).name
        plot_geometry(views, kernels, args.plot, title=f"{results[0]['positive_pairs']}: {source_name}")
    print(markdown_table([table_row(result) for result in results]))


if __name__ == "__main__":
    with cli_errors("geometry.py"):
        main()
