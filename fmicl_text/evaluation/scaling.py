"""What one step of a loss costs each process: bytes communicated, memory and arithmetic, as formulas.

W processes of n rows each, N = W n; D wide embeddings; float32. f-MICL is meant with same-view negatives, InfoNCE with
cross-view ones, as by default. Terms of the size of a block, of the text ids' or of single numbers are left out of
memory; bytes count what a process receives, in a ring algorithm for all-reduces.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4  # bytes
ID = 8


@dataclass(frozen=True)
class Cost:
    """Of the loss alone, per step and process.

    Attributes:
        forward_bytes: Received in the forward pass: embeddings, and two text ids a row.
        backward_bytes: Received in the backward pass.
        memory_bytes: Held at the peak beyond the embeddings themselves.
        operations: Multiplications and additions of the matrix products.
    """

    forward_bytes: float
    backward_bytes: float
    memory_bytes: float
    operations: float


def fmicl_cost(world_size: int, rows: int, dim: int, block_size: int, strategy: str = "gather") -> Cost:
    """f-MICL's. Own pairs need three products of which symmetry saves half, but on the diagonal; pairs with foreign
    rows two, since the other process takes the third. `strategy` is gather or ring."""
    others, block = world_size - 1, min(block_size, rows)
    operations = (3 * rows + block + 4 * others * rows) * rows * dim
    visiting = {"gather": world_size * (world_size > 1), "ring": 2 * (world_size > 1)}[strategy]
    return Cost(
        forward_bytes=others * rows * (dim * FLOAT + 2 * ID),
        backward_bytes=0,
        memory_bytes=(3 + visiting) * rows * dim * FLOAT,  # unit rows x and y, the gradient in x; y's is in place
        operations=operations,
    )


def infonce_cost(world_size: int, rows: int, dim: int) -> Cost:
    """InfoNCE's, with a gather that carries gradients: every row meets all N columns, forward and twice backward."""
    others, total = world_size - 1, world_size * rows
    return Cost(
        forward_bytes=others * rows * (dim * FLOAT + 2 * ID),
        backward_bytes=2 * others / world_size * total * dim * FLOAT,
        memory_bytes=(3 * rows + 2 * total) * dim * FLOAT + 4 * rows * total * FLOAT,  # about four n x N matrices
        operations=6 * rows * total * dim,
    )


def ddp_bytes(world_size: int, parameters: int) -> float:
    """Received for the all-reduce of the encoder's float32 gradients, whatever the loss."""
    return 2 * (world_size - 1) / world_size * parameters * FLOAT
