"""Merge result files of `fmicl-text sts` and eval/mteb_sts.py into one table and plot.

fmicl-text compare sts-kl.json sts-js.json mteb.json --plot scores.png
"""

from __future__ import annotations

from pathlib import Path

from fmicl_text.cli.checks import check_plot
from fmicl_text.cli.parser import ArgumentParser, cli_errors
from fmicl_text.evaluation.plots import plot_scores
from fmicl_text.evaluation.report import load_results, markdown_table, score_rows


def main() -> None:
    parser = ArgumentParser("fmicl-text compare", __doc__)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of `fmicl-text sts` and eval/mteb_sts.py")
    parser.add_argument("--sets", action="store_true", help="add columns for the subsets of each task, and their means")
    parser.add_argument("--plot", type=Path, help="plot to write: .png, .pdf or .svg")
    args = parser.parse_args()
    check_plot("--plot", args.plot)
    rows = score_rows([result for path in args.results for result in load_results(path)], args.sets)
    if args.plot:
        plot_scores(rows, args.plot)
    print(markdown_table(rows))


if __name__ == "__main__":
    with cli_errors("fmicl-text compare"):
        main()
