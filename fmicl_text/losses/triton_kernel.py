"""`pair_block` of `blockwise` as one Triton kernel for float32 on NVIDIA GPUs from compute capability 8.0.

PyTorch passes over the matrix of inner products once for each operation of `pair` and of its derivative; these passes
take longer than the product if D is small. Here, both are computed on a tile of the product before it is stored.

The kernel is generated from `pair` itself: it is called on a small tensor, its operations and those of its derivative
are recorded, and each is translated by `OPERATIONS`. Python numbers, such as gamma, become arguments of the kernel, so
that other values need no compilation. There is no kernel, and PyTorch is used, for functions with operations that are
not in the table, in float64 (`FDivergence.from_convex`, a very large alpha), or with tensors of their own; for
similarities without a constant slope; on other devices and in other dtypes; and without Triton.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from fmicl_text.losses.blockwise import BlockwiseConfig

PairBlock = Callable[..., tuple[Tensor, Tensor]]  # with the arguments and the result of `pair_block`


class Tile(NamedTuple):
    """Rows and columns of the part of a block that a program computes, in steps of `depth` dimensions; its warps, and
    the number of steps whose rows are loaded ahead."""

    rows: int = 64
    columns: int = 128
    depth: int = 32
    warps: int = 4
    stages: int = 3


TILE = Tile()  # 72 KiB of shared memory; the fastest of eight on an H100 at D = 128, 7% slower than the best at 768
PRECISION = "tf32x3"  # three products of the upper and lower bits, on tensor cores: an error like that of float32

# aten operation: Triton expression of its arguments. Functions without `tl.` are those of SOURCE.
OPERATIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "reciprocal": "1.0 / {0}",
    "square": "{0} * {0}",
    "sqrt": "tl.sqrt({0})",
    "exp": "exp({0})",
    "expm1": "expm1({0})",
    "log": "tl.log({0})",
    "log1p": "log1p({0})",
    "sigmoid": "1.0 / (1.0 + exp(-{0}))",
    "sigmoid_backward": "{0} * (1.0 - {1}) * {1}",
    "abs": "tl.abs({0})",
    "sgn": "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0))",
    "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})",
    "clamp_min": "tl.maximum({0}, {1})",
    "clamp_max": "tl.minimum({0}, {1})",
    "clamp": "tl.minimum(tl.maximum({0}, {1}), {2})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "logical_and": "{0} & {1}",
    "where": "tl.where({0}, {1}, {2})",
    "masked_fill": "tl.where({1}, {2}, {0})",
}
POWERS = {0.5: "tl.sqrt({0})", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", -1: "1.0 / {0}"}
# The same with keyword arguments: these set the dtype and the layout, which `Recorder` checks at the result.
CREATIONS = {
    "clone": "{0}",
    "_to_copy": "{0}.to(tl.float32)",
    "ones_like": "tl.zeros_like({0}) + 1.0",
    "zeros_like": "tl.zeros_like({0})",
    "full_like": "tl.zeros_like({0}) + {1}",
    "scalar_tensor": "tl.zeros_like(v0) + {0}",
}

SOURCE = '''
import triton
import triton.language as tl


@triton.jit
def exp(x):
    """tl.exp rounds x / log(2), an error of 5e-6 at x = -80; here, the integer part n of it is split off exactly."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.1219444005469057e-4  # x - n log(2)
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def expm1(x):
    """e^x - 1, near 0 by its Taylor series. The quotient of u - 1 and log(u) at u = e^x would have an error of 5% at
    x = 1e-6, because the compiler fuses the product in `exp` with the subtraction."""
    series = 1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))
    series = x + x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series)))
    return tl.where(tl.abs(x) < 0.5, series, exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x); the rounding of 1 + x cancels in the quotient."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def kernel(
    rows, columns, keep, derivatives, sums, num_rows, num_columns,
    row_stride, row_step, column_stride, column_step, derivative_stride, {constants}
    DIM: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    tiles = (num_columns + COLUMNS - 1) // COLUMNS
    i = (program // tiles) * ROWS + tl.arange(0, ROWS)
    j = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # Rows beyond the last are the last, whose pairs are masked below.
    row = rows + tl.minimum(i, num_rows - 1).to(tl.int64)[:, None] * row_stride + k[None, :] * row_step
    column = columns + tl.minimum(j, num_columns - 1).to(tl.int64)[None, :] * column_stride + k[:, None] * column_step
    v0 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, DIM, DEPTH):
        if DIM % DEPTH == 0:
            a = tl.load(row)
            b = tl.load(column)
        else:
            a = tl.load(row, mask=k[None, :] < DIM - start, other=0.0)
            b = tl.load(column, mask=k[:, None] < DIM - start, other=0.0)
        v0 = tl.dot(a, b, v0, input_precision=PRECISION)
        row += DEPTH * row_step
        column += DEPTH * column_step
{statements}
    inside = (i[:, None] < num_rows) & (j[None, :] < num_columns)
    place = i.to(tl.int64)[:, None] * derivative_stride + j[None, :]
    counted = inside
    if MASKED:
        counted = inside & (tl.load(keep + place, mask=inside, other=0) != 0)
    tl.store(derivatives + place, tl.where(counted, {derivative}, 0.0), mask=inside)
    tl.store(sums + program, tl.sum(tl.sum(tl.where(counted, {value}, 0.0), axis=1), axis=0))
'''


class NotTranslatable(Exception):
    """An operation that is not in `OPERATIONS`, or on a tensor that does not come from the argument."""


class Translation(NamedTuple):
    """Statements that compute v1, v2, ... from the inner product v0 and the constants c0, c1, ...; the names of `pair`
    and its derivative; the values of the constants. Equal up to the last are compiled once."""

    statements: tuple[str, ...]
    value: str
    derivative: str
    constants: tuple[float, ...]


class Recorder(TorchDispatchMode):
    """Records the operations on tensors that come from `product` as Triton statements.

    Tensors that share memory have one name, so an operation in place is an assignment to it."""

    def __init__(self, product: Tensor) -> None:
        super().__init__()
        self.shape, self.names = product.shape, {product.data_ptr(): "v0"}
        self.statements: list[str] = []
        self.constants: list[float] = []
        self.alive = [product]  # otherwise, their memory would be that of later tensors

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        expression = self.expression(function, args, kwargs)
        result = function(*args, **(kwargs or {}))
        shapes = (self.shape, ()) if "scalar_tensor" in str(function) else (self.shape,)
        if result.dtype not in (torch.float32, torch.bool) or result.shape not in shapes:
            raise NotTranslatable(f"{function}: {result.dtype}, {result.shape}")
        self.alive.append(result)
        if expression is not None:
            name = self.names.setdefault(result.data_ptr(), f"v{len(self.statements) + 1}")
            self.statements.append(f"{name} = {expression}")
        return result

    def expression(self, function: Any, args: Any, kwargs: Any) -> str | None:
        """An operation with its arguments in place, or None if it only returns its argument."""
        mutates = function._schema.is_mutable
        name = function._overloadpacket.__name__.removesuffix("_" if mutates else "")
        if function.namespace != "aten" or "out" in (kwargs or {}):
            raise NotTranslatable(str(function))
        if name in ("detach", "alias"):
            self.argument(args[0])
            return None
        if name == "pow" and isinstance(args[0], Tensor) and not isinstance(args[1], Tensor):
            args, template = args[:1], POWERS.get(args[1])
        else:
            template = CREATIONS.get(name) or (None if kwargs else OPERATIONS.get(name))
        if template is None or len(args) != len({field for _, field, *_ in Formatter().parse(template) if field}):
            raise NotTranslatable(str(function))
        return template.format(*map(self.argument, args))

    def argument(self, value: Any) -> str:
        """Name of a tensor; a number as a literal or as the name of a constant."""
        if isinstance(value, Tensor):
            if value.data_ptr() not in self.names:
                raise NotTranslatable("a tensor that does not come from the argument")
            return self.names[value.data_ptr()]
        if not isinstance(value, int | float) or abs(value) > torch.finfo(torch.float32).max:
            raise NotTranslatable(f"argument {value!r}")
        if value in (-1, 0, 1, 2):
            return f"({float(value)})"
        self.constants.append(float(value))
        return f"c{len(self.constants) - 1}"


def translate(config: BlockwiseConfig) -> Translation | None:
    """The objective's `pair` of inner products and its derivative with respect to the similarity as Triton statements;
    None if an operation has no translation."""
    product = torch.full((2, 3), 0.5, device="cpu")
    try:
        with torch.no_grad(), Recorder(product) as recorder:
            similarities = config.similarity.of_product(product, config.gamma).detach().requires_grad_()
            with torch.enable_grad():
                values = config.objective.pair(similarities)
            (derivative,) = torch.autograd.grad(values, similarities, torch.ones_like(values))
        names = [recorder.argument(result) for result in (values, derivative)]
    except Exception:  # of any type, by the code of `pair`; if it is an error in it, PyTorch will raise it too
        return None
    return Translation(tuple(recorder.statements), names[0], names[1], tuple(recorder.constants))


@functools.cache
def kernel_of(statements: tuple[str, ...], value: str, derivative: str, num_constants: int) -> Any:
    """The Triton kernel of a translation."""
    body = "\n".join(f"    {statement}" for statement in statements)
    constants = "".join(f"c{k}, " for k in range(num_constants))
    source = SOURCE.format(statements=body, value=value, derivative=derivative, constants=constants)
    # Triton reads the source of a function by the name of its file.
    file = f"<{__name__} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    namespace: dict[str, Any] = {"__name__": f"{__name__}_generated"}
    exec(compile(source, file, "exec"), namespace)
    return namespace["kernel"]


def launch(translation: Translation, rows: Tensor, columns: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of `pair`, in float64, and derivative, of a block; see `pair_block`."""
    tile, kernel = TILE, kernel_of(*translation[:3], len(translation.constants))
    num_rows, num_columns = len(rows), len(columns)
    num_tiles = -(-num_rows // tile.rows) * -(-num_columns // tile.columns)
    derivatives = rows.new_empty(num_rows, num_columns)
    sums = rows.new_empty(num_tiles)
    with torch.cuda.device_of(rows):
        kernel[(num_tiles,)](
            *(rows, columns, derivatives if keep is None else keep.contiguous().view(torch.uint8), derivatives, sums),
            *(num_rows, num_columns, *rows.stride(), *columns.stride(), derivatives.stride(0), *translation.constants),
            DIM=rows.shape[1], MASKED=keep is not None,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, PRECISION=PRECISION,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return sums.sum(dtype=torch.float64), derivatives


@functools.cache
def is_supported(device: torch.device) -> bool:
    """Whether the kernel can be used on a device. Warns where Triton should work but does not, for example without a C
    compiler."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if find_spec("triton") is None:
        return False
    try:
        rows = torch.zeros(16, 128, device=device)
        launch(Translation((), "v0", "v0", ()), rows, rows, None)
    except Exception as error:  # of any type, by Triton
        warnings.warn(
            "the loss uses PyTorch instead of its Triton kernel, which cannot be built: "
            + " ".join(str(error).split())[:300],
            stacklevel=2,
        )
        return False
    return True


def fused_pair_block(config: BlockwiseConfig, rows: Tensor) -> PairBlock | None:
    """`pair_block` as one kernel for blocks of such rows; None if there is none.

    `pair` is translated at each call (0.3 ms), that is once per loss, because it may depend on hyperparameters that
    have changed."""
    if rows.dtype != torch.float32 or config.similarity.slope is None or not is_supported(rows.device):
        return None
    if (translation := translate(config)) is None:
        return None
    return lambda rows, columns, keep, config: launch(translation, rows, columns, keep)
