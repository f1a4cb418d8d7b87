"""Compare time and memory of the loss with other implementations and a lower bound.

    python eval/loss_benchmark.py                              # N = 512 ... 65536; about 12 minutes on 2 cores
    python eval/loss_benchmark.py --sizes 8192 --repeats 5 --output loss.json --plot loss.png
    python eval/loss_benchmark.py --sizes 4096 --busy          # also beside one busy process per core

Implementations: `blockwise` and `plain` (FMICLLoss), on a GPU also `without Triton` (`blockwise` in PyTorch), `pdist`
(the formula of the paper with torch.pdist), `MNRL` and `cached MNRL` (sentence-transformers). The lower bound is the
time of the three matrix products per pair of blocks that an exact value and gradient require (3 N^2 D operations), with
blocks of the same size. Every round runs each implementation once, forward and backward; ratios are medians over
rounds. Peak memory is in addition to the inputs. An implementation that is expected to exceed --max_memory, or
--max_seconds by extrapolation from smaller sizes, is skipped, with the reason in the table.
"""

from fmicl_text.cli import interrupt  # noqa: F401  # before the imports that take long

# isort: split
import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from fmicl_text import DIVERGENCES, FMICLLoss
from fmicl_text.cli.checks import check_output, check_plot, positive_number, whole_number
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.evaluation.benchmark import interleaved_seconds, median_ratio, peak_extra_mib
from fmicl_text.evaluation.plots import plot_scaling
from fmicl_text.evaluation.report import library_versions, markdown_table, write_json
from fmicl_text.losses.blockwise import blocks
from fmicl_text.losses.pairs import CPU_BLOCK, GPU_BLOCK, Batch, whole_matrix
from fmicl_text.losses.similarity import log_ratio, unit_rows

QUADRATIC = ("plain", "pdist", "MNRL")  # implementations with N x N matrices
BUSY = ", busy"
Run = Callable[[], object]


@contextmanager
def busy_processes(number: int) -> Iterator[Callable[[Run], Run]]:
    """Processes that keep a core busy each, but only during the functions that are given to the result."""
    processes = [psutil.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]

    def beside(run: Run) -> Run:
        def timed() -> object:
            for process in processes:
                process.resume()
            try:
                return run()
            finally:
                for process in processes:
                    process.suspend()

        return timed

    try:
        for process in processes:
            process.suspend()
        yield beside
    finally:
        for process in processes:
            process.kill()


def implementations(args: argparse.Namespace, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """Functions that compute value and gradient of a loss at embeddings x, y [N, D]."""
    divergence, kwargs = DIVERGENCES[args.divergence], {"gamma": args.gamma, "alpha": args.alpha}
    blockwise = FMICLLoss(args.divergence, **kwargs, block_size=args.block_size)
    plain = FMICLLoss(args.divergence, **kwargs)
    no_model: Any = nn.Sequential(nn.Identity())  # the losses are called on embeddings
    ranking = MultipleNegativesRankingLoss(no_model)
    cached = CachedMultipleNegativesRankingLoss(no_model, mini_batch_size=args.block_size)

    def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def run() -> object:
            a, b = x.detach().requires_grad_(), y.detach().requires_grad_()
            return torch.autograd.grad(loss(a, b), (a, b))

        return run

    def pdist(a: Tensor, b: Tensor) -> Tensor:
        u, v = unit_rows(a), unit_rows(b)
        negative = divergence.conjugate(-args.gamma * torch.pdist(u).square()).mean()
        return -divergence.score(log_ratio(u, v, args.gamma)).mean() + args.alpha * negative

    def cached_ranking() -> object:
        a, b = x.detach().requires_grad_(), y.detach().requires_grad_()
        return cached.calculate_loss([[a], [b]], with_backward=True)

    def lower_bound() -> object:
        gradient = torch.empty_like(x)
        for i in blocks(len(x), args.block_size):
            for j in blocks(len(x), args.block_size, start=i.start):
                product = x[i] @ x[j].T
                gradient[i].addmm_(product, x[j])
                gradient[j].addmm_(product.T, x[i])
        return gradient

    def without_triton() -> object:
        with patch("fmicl_text.losses.blockwise.fused_pair_block", lambda *_: None):
            return gradients(blockwise)()

    return {
        "blockwise": gradients(blockwise),
        **({"without Triton": without_triton} if x.is_cuda else {}),
        "plain": gradients(lambda a, b: whole_matrix(plain.objective, plain.pair_settings, Batch(a, b)).loss),
        "pdist": gradients(pdist),
        "MNRL": gradients(lambda a, b: ranking.compute_loss_from_embeddings([a, b], x)),
        "cached MNRL": cached_ranking,
        "lower bound": lower_bound,
    }


def embeddings(size: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two views [N, D] with a mean cosine of 0.3 between examples, typical of sentence embeddings in training."""
    generator = torch.Generator().manual_seed(0)
    common, first, second = (torch.randn(rows, dim, generator=generator) for rows in (1, size, size))
    x = unit_rows(first + 0.65 * common)
    return x.to(device), unit_rows(x + 0.5 * unit_rows(second)).to(device)


def affordable(
    name: str, size: int, args: argparse.Namespace, last: dict[str, tuple[int, float]], device: torch.device
) -> str | None:
    """The reason to skip an implementation at this size, or None."""
    # About four float32 matrices exist at the peak; torch.pdist's gradient on CUDA needs one for each dimension.
    gib = (args.dim if name == "pdist" and device.type == "cuda" else 4) * size**2 * 4 / 2**30
    if name in QUADRATIC and gib > args.max_memory:
        return f"would need about {gib:.0f} GiB"
    if name in last and name not in ("blockwise", "without Triton", "lower bound"):
        seconds = last[name][1] * (size / last[name][0]) ** 2
        if seconds > args.max_seconds:
            return f"would take about {seconds:.0f} s"
    return None


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser("loss_benchmark.py", __doc__)
    sizes, size = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536], partial(whole_number, lowest=2)
    parser.add_argument("--sizes", type=size, nargs="+", default=sizes, help="batch sizes N (default: 512 to 65536)")
    parser.add_argument("--dim", type=whole_number, default=768, help="embedding dimension D (default: 768)")
    parser.add_argument("--divergence", default="kl", choices=list(DIVERGENCES), help="f-divergence (default: kl)")
    parser.add_argument("--gamma", type=positive_number, default=20.0, help="gamma of FMICLLoss (default: 20)")
    parser.add_argument("--alpha", type=positive_number, default=409600.0, help="alpha of FMICLLoss (default: 409600)")
    parser.add_argument("--block_size", type=whole_number, help="rows per block (default: that of FMICLLoss)")
    parser.add_argument("--repeats", type=whole_number, default=5, help="rounds (default: 5; one for N > 8192)")
    parser.add_argument(
        "--max_memory", type=positive_number, default=6.0, help="skip runs that need more memory, in GiB (default: 6)"
    )
    parser.add_argument(
        "--max_seconds", type=positive_number, default=60.0, help="skip runs that take longer, in seconds (default: 60)"
    )
    parser.add_argument("--busy", action="store_true", help="measure each also beside one busy process per core")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="plot to write: .png, .pdf or .svg")
    args = parser.parse_args()
    check_output("--output", args.output)
    check_plot("--plot", args.plot)
    return args


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.block_size = args.block_size or (CPU_BLOCK if device.type == "cpu" else GPU_BLOCK)

    rows: list[dict[str, object]] = []
    last: dict[str, tuple[int, float]] = {}
    for size in sorted(args.sizes):
        functions = implementations(args, *embeddings(size, args.dim, device))
        reasons = {name: affordable(name, size, args, last, device) for name in functions}
        running = {name: run for name, run in functions.items() if reasons[name] is None}
        with busy_processes(psutil.cpu_count(logical=False) or 1 if args.busy else 0) as beside:
            also = {name + BUSY: beside(run) for name, run in running.items()} if args.busy else {}
            seconds = interleaved_seconds(running | also, device, args.repeats if size <= 8192 else 1)
        for name in functions:
            row: dict[str, object] = {"N": size, "implementation": name, "skipped": reasons[name]}
            if name in running:
                last[name] = (size, statistics.median(seconds[name]))
                row["ms"] = 1000 * last[name][1]
                row["x lower bound"] = median_ratio(seconds[name], seconds["lower bound"])
                if "MNRL" in running:
                    row["x MNRL"] = median_ratio(seconds[name], seconds["MNRL"])
                if args.busy:
                    row["x idle, beside busy processes"] = median_ratio(seconds[name + BUSY], seconds[name])
                row["rounds"] = seconds[name]
            rows.append(row)
    for size in sorted(args.sizes):  # after all timings, because peak_extra_mib slows allocation down
        functions = implementations(args, *embeddings(size, args.dim, device))
        for row in [row for row in rows if row["N"] == size and row["skipped"] is None]:
            row["peak MiB"] = peak_extra_mib(functions[str(row["implementation"])], device)
        table = [{k: v for k, v in row.items() if k != "rounds"} for row in rows if row["N"] == size]
        print(markdown_table(table), flush=True)
    if args.output:
        machine = {"device": str(device), "threads": torch.get_num_threads(), "versions": library_versions()}
        write_json(args.output, {"settings": vars(args), **machine, "rows": rows})
    if args.plot:
        plot_scaling(rows, args.plot, f"{args.divergence}, D = {args.dim}, float32, {device.type}")


if __name__ == "__main__":
    with cli_errors("loss_benchmark.py"):
        main()
