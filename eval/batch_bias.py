"""Compare the gradient of a batch with the average of the gradients of its micro-batches, as in gradient accumulation.

    python eval/batch_bias.py --plot eval/batch_bias.png        # about 1 minute on 1 core

A batch of the bundled sentences is split at random into micro-batches. The gradient is averaged over them, and over
several such partitions. If it is an unbiased estimate of the gradient of the batch, the relative error
|average - gradient| / |gradient| goes to 0 with the number of partitions (like 1/sqrt for partitions drawn
independently); otherwise it stays above the bias. Gradients are those of all parameters of the encoder, for fixed
dropout masks. All negative pairs repel by the same kernel e^(-10 d^2) of their distance (InfoNCE: temperature 0.05);
alpha of f-MICL is `auto`, measured on the batch.
"""

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from fmicl_text import AlignUniformLoss, FMICLLoss, InfoNCELoss, TextContrastiveModel, build_text_encoder
from fmicl_text.cli.checks import check_output, check_plot, whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.evaluation.plots import save_figure
from fmicl_text.evaluation.report import library_versions, markdown_table, write_json
from fmicl_text.losses import ContrastiveLoss
from fmicl_text.quickstart import ENCODER, SENTENCES
from fmicl_text.text.data import load_training_text

LOSSES: dict[str, Callable[[], ContrastiveLoss]] = {
    "kl": partial(FMICLLoss, "kl", gamma=10.0),
    "pearson": partial(FMICLLoss, "pearson", gamma=5.0),
    "alignment + uniformity": partial(AlignUniformLoss, gamma=10.0, alpha=0.1),
    "InfoNCE": partial(InfoNCELoss, temperature=0.05),
}


def two_views(batch: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Embeddings of two dropout views of `batch` sentences, with their graph, and the parameters of the encoder."""
    torch.manual_seed(seed)
    model = TextContrastiveModel(build_text_encoder(str(ENCODER), pooling="mean")).train()
    texts = load_training_text(train_file=str(SENTENCES)).dataset["text"]
    chosen = [texts[i] for i in torch.randperm(len(texts))[:batch].tolist()]
    features = model.encoder.tokenizer(
        [*chosen, *chosen], padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    x, y = model.encoder(dict(features))["sentence_embedding"].chunk(2)
    return x, y, [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_gradient(x: Tensor, y: Tensor, gradients: tuple[Tensor, Tensor], parameters: list[Tensor]) -> Tensor:
    """The gradient of the parameters, given those of the embeddings, as one vector."""
    found = torch.autograd.grad([x, y], parameters, list(gradients), retain_graph=True, allow_unused=True)
    return torch.cat([part.flatten() for part in found if part is not None])


def embedding_gradient(loss: ContrastiveLoss, x: Tensor, y: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The gradient of the embeddings of the mean loss over parts of the batch, given by their rows."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    torch.stack([loss(x[rows], y[rows]) for rows in parts]).mean().backward()
    assert x.grad is not None and y.grad is not None
    return x.grad, y.grad


def errors(
    loss: ContrastiveLoss, views: tuple[Tensor, Tensor, list[Tensor]], size: int, partitions: list[int], seed: int
) -> list[float]:
    """Relative errors of the gradient averaged over micro-batches of `size` rows, after these numbers of partitions."""
    x, y, parameters = views
    loss(x.detach(), y.detach())  # measures alpha
    exact = parameter_gradient(x, y, embedding_gradient(loss, x, y, (torch.arange(len(x)),)), parameters)
    generator, found = torch.Generator().manual_seed(seed), []
    total = [torch.zeros_like(x), torch.zeros_like(y)]
    for number in range(1, partitions[-1] + 1):
        parts = torch.randperm(len(x), generator=generator).split(size)
        total = [
            sum_so_far + part for sum_so_far, part in zip(total, embedding_gradient(loss, x, y, parts), strict=True)
        ]
        if number in partitions:
            average = parameter_gradient(x, y, (total[0] / number, total[1] / number), parameters)
            found.append(float((average - exact).norm() / exact.norm()))
    return found


def plot(table: list[dict[str, float | str]], partitions: list[int], path: Path) -> None:
    """One panel per micro-batch size: relative error against the number of partitions."""
    sizes = list(dict.fromkeys(row["micro-batch"] for row in table))
    figure = Figure(figsize=(3.0 * len(sizes) + 1.8, 3.0), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for row in (row for row in table if row["micro-batch"] == size):
            values = [row[str(count)] for count in partitions]
            style = "--" if row["loss"] == "pearson" else "-"  # it coincides with kl
            axes.loglog(partitions, values, marker="o", markersize=3, linestyle=style, label=str(row["loss"]))
        axes.set_title(f"micro-batches of {size}", fontsize="medium")
        axes.set_xlabel("partitions averaged")
        axes.set_xticks(partitions, [str(count) for count in partitions])
        axes.minorticks_off()
        axes.grid(color="0.9")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("relative error of the gradient")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_figure(figure, path, dpi=150)


def parse_args() -> argparse.Namespace:
    parser, size = ArgumentParser("batch_bias.py", __doc__), partial(whole_number, lowest=2)
    parser.add_argument("--batch", type=size, default=64, help="examples of the batch (default: 64)")
    parser.add_argument(
        "--micro_batches", type=size, nargs="+", default=[8, 16, 32], help="sizes of the parts (default: 8 16 32)"
    )
    parser.add_argument(
        "--partitions", type=partial(whole_number, lowest=1), nargs="+", default=[1, 4, 16, 64], help="numbers of "
        "random partitions to average (default: 1 4 16 64)",
    )  # fmt: skip
    parser.add_argument("--seed", type=partial(whole_number, lowest=0), default=0, help="of the batch (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    args = parser.parse_args()
    if uneven := [size for size in args.micro_batches if args.batch % size]:
        parser.error(f"--micro_batches {uneven[0]} does not divide the batch of {args.batch}")
    args.partitions = sorted({*args.partitions})
    check_output("--output", args.output)
    check_plot("--plot", args.plot)
    return args


def main() -> None:
    args = parse_args()
    views = two_views(args.batch, args.seed)
    settings = [(size, name) for size in args.micro_batches for name in LOSSES]
    table: list[dict[str, float | str]] = []
    for size, name in tqdm(settings, desc="losses"):
        found = errors(LOSSES[name](), views, size, args.partitions, args.seed)
        of_counts = {str(count): error for count, error in zip(args.partitions, found, strict=True)}
        table.append({"micro-batch": size, "loss": name, **of_counts})
    print(markdown_table(table))
    if args.output:
        write_json(args.output, {"settings": vars(args), "versions": library_versions(), "table": table})
    if args.plot:
        plot(table, args.partitions, args.plot)


if __name__ == "__main__":
    with cli_errors("batch_bias.py"):
        main()
