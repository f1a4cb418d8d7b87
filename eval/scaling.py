"""Plan a run past this machine: bytes, memory and arithmetic of the loss per step and GPU, f-MICL beside InfoNCE.

    python eval/scaling.py                                     # 8, 256 and 4,096 GPUs, 64 and 1,024 examples on each
    python eval/scaling.py --world_sizes 16 --rows 512 --dim 1024 --parameters 335000000

The formulas (fmicl_text/evaluation/scaling.py) are held against counters of bytes and operations in one and two
processes by tests/evaluation/test_scaling.py; beyond that they are extrapolated.
"""

from fmicl_text.cli.checks import whole_number
from fmicl_text.cli.parser import OneLineParser, one_line_errors
from fmicl_text.evaluation.report import markdown_table
from fmicl_text.evaluation.scaling import ddp_bytes, fmicl_cost, infonce_cost


def main() -> None:
    parser = OneLineParser("scaling.py", __doc__)
    parser.add_argument("--world_sizes", type=whole_number, nargs="+", default=[1, 8, 256, 4096])
    parser.add_argument("--rows", type=whole_number, nargs="+", default=[64, 1024], help="examples per GPU")
    parser.add_argument("--dim", type=whole_number, default=768)
    parser.add_argument("--parameters", type=whole_number, default=110_000_000, help="of the encoder (BERT-base)")
    parser.add_argument("--block_size", type=whole_number, default=4096)
    args = parser.parse_args()
    table = []
    for rows in args.rows:
        for world_size in args.world_sizes:
            for name, cost in {
                "f-MICL, gather": fmicl_cost(world_size, rows, args.dim, args.block_size),
                "f-MICL, ring": fmicl_cost(world_size, rows, args.dim, args.block_size, "ring"),
                "InfoNCE": infonce_cost(world_size, rows, args.dim),
            }.items():
                table.append(
                    {
                        "rows per GPU": rows,
                        "GPUs": world_size,
                        "global batch": rows * world_size,
                        "loss": name,
                        "forward MB": cost.forward_bytes / 1e6,
                        "backward MB": cost.backward_bytes / 1e6,
                        "DDP MB": ddp_bytes(world_size, args.parameters) / 1e6,
                        "memory MB": cost.memory_bytes / 1e6,
                        "GFLOP": cost.operations / 1e9,
                    }
                )
    print(markdown_table(table))


if __name__ == "__main__":
    with one_line_errors("scaling.py"):
        main()
