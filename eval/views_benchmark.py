"""Compare the speed of image augmentations on a CPU core: this package, PIL, and kornia if it is installed.

    python eval/views_benchmark.py                                  # 512 images of 32 pixels
    python eval/views_benchmark.py --source 256 --size 224 --batch 64 --output views.json

All create SimCLR's views: random resized crop, flip, color jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, grayscale
with probability 0.2, normalization. Measured in CPU seconds of one thread, interleaved; ratios are medians over rounds.
The two views of an image count as two images.
"""

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split
import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from tqdm.auto import tqdm

from fmicl_text.cli.checks import check_output, whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.evaluation.benchmark import median_ratio
from fmicl_text.evaluation.report import library_versions, markdown_table, write_json
from fmicl_text.vision.views import ImageViews

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser("views_benchmark.py", __doc__)
    parser.add_argument("--source", type=whole_number, default=32, help="image size in pixels (default: 32)")
    parser.add_argument("--size", type=whole_number, default=32, help="view size in pixels (default: 32)")
    parser.add_argument("--batch", type=whole_number, default=512, help="images per batch (default: 512)")
    parser.add_argument("--rounds", type=whole_number, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    check_output("--output", args.output)
    return args


def pil_view(image: Image.Image, size: int) -> Tensor:
    """One random view [3, size, size] of a PIL image, with the operations of torchvision's PIL backend."""
    for _ in range(10):
        area = image.width * image.height * random.uniform(0.2, 1)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if width <= image.width and height <= image.height:
            break
    else:
        width, height = image.size
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if random.random() < 0.8:
        for step in random.sample(range(4), 4):
            image = pil_jitter(image, step)
    if random.random() < 0.2:
        image = image.convert("L").convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def pil_jitter(image: Image.Image, step: int) -> Image.Image:
    """Change brightness, contrast, saturation or hue at random."""
    if step < 3:
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
        return enhance(image).enhance(random.uniform(0.6, 1.4))
    hue, saturation, value = image.convert("HSV").split()
    shift = round(random.uniform(-0.1, 0.1) * 255)
    return Image.merge("HSV", (hue.point([(h + shift) % 256 for h in range(256)]), saturation, value)).convert("RGB")


def kornia_views(images: Tensor, size: int) -> Callable[[], object]:
    """A function that creates two views of each image with kornia and its default crop.

    Raises:
        ImportError: kornia is not installed.
    """
    import kornia.augmentation as augment

    make = torch.nn.Sequential(
        augment.RandomResizedCrop((size, size), scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)),
        augment.RandomHorizontalFlip(0.5),
        augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augment.RandomGrayscale(p=0.2),
        augment.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    return lambda: [make(images.float() / 255) for _ in range(2)]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(args.batch, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(smooth, (args.source, args.source), mode="bicubic").clamp(0, 1)
    images = (images * 255).to(torch.uint8)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    ours = {color: ImageViews("cifar", args.size, MEAN, STD, color) for color in ("fast", "exact")}
    makers: dict[str, Callable[[], object]] = {
        "ImageViews, color fast": lambda: ours["fast"](images),
        "ImageViews, color exact": lambda: ours["exact"](images),
        "PIL, one image at a time": lambda: torch.stack([pil_view(p, args.size) for p in pictures for _ in range(2)]),
    }
    try:
        makers["kornia"] = kornia_views(images, args.size)
    except ImportError:
        print("kornia is not installed and is skipped (pip install kornia)")

    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for turn in tqdm(range(args.rounds + 1), desc="rounds", leave=False):
        for name, make in makers.items():
            start = time.process_time()
            make()
            if turn:  # the first round is a warm-up
                seconds[name].append(time.process_time() - start)
    fastest = seconds["ImageViews, color fast"]
    rows = [
        {
            "views": name,
            "images/s per core": f"{2 * args.batch / statistics.median(taken):,.0f}",
            "relative to color fast": f"{median_ratio(fastest, taken):.2f}",
        }
        for name, taken in seconds.items()
    ]
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        write_json(args.output, {"settings": settings, "seconds": seconds, "versions": library_versions()})
    print(markdown_table(rows))


if __name__ == "__main__":
    with cli_errors("views_benchmark.py"):
        main()
