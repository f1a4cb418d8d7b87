"""The Triton kernel of a block of pairs: the translation of `pair`, results in Triton's interpreter and on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fmicl_text import FDivergence, FMICLLoss
from fmicl_text.losses import blockwise, triton_kernel
from fmicl_text.losses.blockwise import BlockwiseConfig, pair_block
from fmicl_text.losses.contrastive import AlignUniformLoss, SpectralLoss
from fmicl_text.losses.divergences import DIVERGENCES, tsallis
from fmicl_text.losses.objectives import PairObjective, fmicl
from fmicl_text.losses.similarity import SIMILARITIES, Similarity
from fmicl_text.losses.triton_kernel import fused_pair_block, is_supported, translate

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:divergence .* fails the uniformity condition")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LAPLACE = Similarity("laplace", lambda product, gamma: -gamma * (2 - 2 * product).clamp_min(0).sqrt())


def on_gpu(test):
    return pytest.mark.gpu(needs_cuda(test))


def configured(pair, gamma=2.0, similarity=SIMILARITIES["gaussian"]):
    return BlockwiseConfig(PairObjective(pair, pair, pair), similarity, gamma, "same_view", 4096, "none")


# ---- translation


def test_the_statements_of_kl():
    """r = 2 gamma (x.y - 1), e^r as a square, and its derivative, the same tensor times 1."""
    translation = translate(configured(DIVERGENCES["kl"].conjugate, gamma=3.0))
    statements = ["v1 = v0 - (1.0)", "v1 = v1 * c0", "v3 = v1 * c1", "v3 = exp(v3)", "v3 = v3 * v3"]
    assert translation.statements == (*statements, "v6 = tl.zeros_like(v3) + 1.0", "v7 = v6 * v3")
    assert translation[1:] == ("v3", "v7", (6.0, 0.5))


def test_numbers_are_arguments_of_the_kernel():
    """A kernel is compiled once for all values of gamma and of parameters of the divergence."""
    first, second = (
        translate(configured(tsallis(order).conjugate, gamma)) for order, gamma in ((3.5, 5.0), (4.5, 7.0))
    )
    assert first[:3] == second[:3] and first.constants == (10.0, 3.5, 0.5, 3.5) != second.constants


def test_each_call_translates_the_present_function():
    state = {"order": 3.5}
    pair = configured(lambda r: torch.exp(state["order"] * r))
    before, state["order"] = translate(pair), 4.5
    assert (before.constants[-1], translate(pair).constants[-1]) == (3.5, 4.5)


def fails(r):
    raise RuntimeError("unexpected")


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(FDivergence.from_convex(lambda u: u**1.5).conjugate, id="float64"),
        pytest.param(fmicl(score=torch.exp, conjugate=DIVERGENCES["kl"].conjugate, alpha=1e31).pair, id="large alpha"),
        pytest.param(lambda r: torch.special.bessel_j0(r), id="unknown"),
        pytest.param(lambda r: r.softmax(1), id="not elementwise"),
        pytest.param(lambda r: r * r.mean(), id="a mean"),
        pytest.param(lambda r: r.exp().T.contiguous().T, id="transposed"),
        pytest.param(lambda r: r * torch.tensor(2.0), id="a tensor of its own"),
        pytest.param(lambda r: r * torch.rand_like(r), id="random"),
        pytest.param(lambda r: torch.nn.functional.dropout(r), id="dropout"),
        pytest.param(lambda r: r if r.min() > -1 else 2 * r, id="depends on data"),
        pytest.param(lambda r: torch.sub(r, r.exp(), alpha=2), id="keyword argument"),
        pytest.param(lambda r: torch.div(r, 3, rounding_mode="floor") + r, id="rounding mode"),
        pytest.param(lambda r: (1 - r) ** 1.3, id="power"),
        pytest.param(lambda r: r.clamp(max=-1.0) * 1e39, id="beyond float32"),
        pytest.param(lambda r: torch.zeros(2, 3), id="independent of r"),
        pytest.param(fails, id="error"),
    ],
)
def test_other_functions_are_not_translated(pair):
    assert translate(configured(pair)) is None


def test_rows_without_a_kernel():
    """On the CPU, in float64, of a similarity without a constant slope."""
    config = configured(DIVERGENCES["kl"].conjugate)
    assert translate(config) is not None and fused_pair_block(config, torch.zeros(2, 3)) is None
    meta = {dtype: torch.zeros(2, 3, dtype=dtype, device="meta") for dtype in (torch.float32, torch.float64)}
    assert [fused_pair_block(config, rows) for rows in meta.values()] == [None, None]
    assert fused_pair_block(configured(DIVERGENCES["kl"].conjugate, similarity=LAPLACE), torch.zeros(2, 3)) is None


def test_a_triton_that_does_not_work_is_a_warning(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("Failed to find\n C compiler")

    monkeypatch.setattr(triton_kernel, "launch", broken)
    monkeypatch.setattr(triton_kernel, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    with pytest.warns(UserWarning, match="uses PyTorch instead of its Triton kernel.*Failed to find C compiler"):
        assert not is_supported.__wrapped__(torch.device("cuda", 0))


# ---- the kernel in Triton's interpreter, on the CPU

CASES = {
    **{name: divergence.conjugate for name, divergence in DIVERGENCES.items()},
    "align_uniform": AlignUniformLoss(2.0).objective.pair,
    "spectral": SpectralLoss().objective.pair,
    "torch": lambda r: torch.where(r > -0.3, r.clamp(-4, -0.1).square(), (1 + r.abs()).sqrt().log() - 1 / (2 - r)),
}


def exact_rows():
    """Rows [70, 33] whose inner products with unit vectors e_k [45, 33] are exact in float32, and so is r: from 0, over
    -2e-6, to -80."""
    steps = torch.arange(70 * 33).remainder(2**10).reshape(70, 33)
    rows = 1 - steps / 2**9
    rows[::7, ::2] = 1 - 2.0**-24
    rows[3] = 1.0
    return rows, torch.eye(33)[torch.arange(45) % 33], 20.0


def unit_columns_of_a_wider_tensor():
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.nn.functional.normalize(torch.randn(n, 33, generator=generator)) for n in (70, 45))
    columns[:9] = torch.nn.functional.normalize(rows[:9] + 1e-3 * columns[:9])
    return rows, torch.cat([columns, columns.flip(0)], dim=1)[:, :33], 0.5


MATERIALS = {"exact": exact_rows, "random": unit_columns_of_a_wider_tensor}


FUNCTIONS = {"exp": torch.exp, "expm1": torch.expm1, "log1p": torch.log1p}


def error_of_function(name, device):
    """Largest relative error of a function of the kernel's source, from 1e-30 to 80 and from -1e-30 to -80."""
    points = torch.logspace(-30, 1.9, 4000)
    points = torch.cat([points, -points[: 3750 if name == "log1p" else 4000]])  # log1p: above -0.97
    # of 11 bits, which inner products with the unit vector keep in any precision
    points = (points.view(torch.int32) & ~0x1FFF).view(torch.float32).to(device)
    unit = torch.eye(16, device=device)[:1]
    translation = triton_kernel.Translation((f"v1 = {name}(v0)",), "v1", "v1", ())
    values = triton_kernel.launch(translation, points[:, None] * unit, unit, None)[1][:, 0].double()
    exact = FUNCTIONS[name](points.double())
    return ((values - exact) / exact).abs().max().item()


def error_of_losses():
    """Largest relative error of the gradient of whole losses with the kernel, on the CPU."""
    triton_kernel.is_supported = lambda device: True
    ids = torch.arange(70)[:, None] * 3 + torch.arange(3)
    ids[3, 0], ids[69, 0], ids[9, 1], ids[60, 2] = ids[2, 0], ids[1, 0], ids[20, 0], ids[7, 0]
    for negatives in ("same_view", "cross_view", "both"):
        loss = FMICLLoss("js", 1.0, 4.0, negatives=negatives, block_size=40)
        gradient = value_and_gradient(loss, material(20, 70), ids, "cpu")[1]
        exact = value_and_gradient(loss, material(20, 70), ids, "cpu", torch.float64)[1]
        yield ((gradient - exact).norm() / exact.norm()).item()


def in_the_interpreter():
    """Print the errors of the kernel against `pair_block` in float64, by case, material and mask."""
    triton_kernel.TILE = triton_kernel.Tile(32, 32, 16)
    errors = {name: error_of_function(name, "cpu") for name in FUNCTIONS}
    for name, pair in CASES.items():
        for material, make in MATERIALS.items():
            rows, columns, gamma = make()
            keep = torch.rand(70, 45, generator=torch.Generator().manual_seed(1)) > 0.3
            for mask in (None, keep):
                config = configured(pair, gamma)
                total, derivative = triton_kernel.launch(translate(config), rows, columns, mask)
                exact_total, exact = pair_block(rows.double(), columns.double(), mask, config)
                # of random rows, r has the rounding error of their inner product: relative to the largest derivative
                size = exact.abs() if material == "exact" else exact.abs().max()
                worst = ((derivative.double() - exact).abs() / (size + 1e-37)).max()
                masked = 0.0 if mask is None else derivative[~mask].abs().max().item()
                error = abs(total / exact_total - 1).item()
                errors[f"{name} {material} {mask is not None}"] = [worst.item(), error, masked]
    errors["losses"] = max(error_of_losses())
    sys.stdout.write(json.dumps(errors))


@pytest.fixture(scope="module")
def errors():
    """Of `in_the_interpreter` in a process of its own, because Triton reads the setting when it is imported."""
    code = "from tests.losses.test_triton_kernel import in_the_interpreter; in_the_interpreter()"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("material", MATERIALS)
@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernel_is_pair_block(errors, name, material, masked):
    """70 x 45 pairs in tiles of 32 x 32, 33 dimensions in steps of 16."""
    derivative, total, of_masked = errors[f"{name} {material} {masked}"]
    assert derivative < 2e-6 and total < 1e-6 and of_masked == 0


@needs_triton
def test_interpreted_functions_and_losses(errors):
    assert all(errors[name] < 5e-7 for name in FUNCTIONS) and errors["losses"] < 1e-6


# ---- on a GPU


def losses():
    for name in DIVERGENCES:
        yield pytest.param(lambda name=name, **kwargs: FMICLLoss(name, 1.0, 4.0, **kwargs), id=name)
    yield pytest.param(lambda **kwargs: FMICLLoss("kl", 20.0, 1e9, **kwargs), id="kl-large-gamma")
    yield pytest.param(lambda **kwargs: AlignUniformLoss(2.0, **kwargs), id="align_uniform")
    yield pytest.param(lambda **kwargs: SpectralLoss(**kwargs), id="spectral")


def material(dim, rows=700):
    generator = torch.Generator().manual_seed(dim)
    x, noise, hard = (torch.randn(rows, dim, generator=generator) for _ in range(3))
    return x, x + 0.4 * noise, hard


def value_and_gradient(loss, tensors, ids=None, device="cuda", dtype=torch.float32):
    leaves = [rows.to(device, dtype).requires_grad_() for rows in tensors]
    value = loss(*leaves, None if ids is None else ids.to(device)) if len(leaves) == 3 else loss(*leaves)
    return value.item(), torch.cat(torch.autograd.grad(value, leaves)).double().cpu()


@pytest.fixture
def fused(monkeypatch):
    """The kernels that losses used, in order; `fused.off()` replaces them by PyTorch."""

    class Fused(list):
        def off(self):
            monkeypatch.setattr(blockwise, "fused_pair_block", lambda config, rows: None)

    used = Fused()

    def watched(config, rows):
        used.append(fused_pair_block(config, rows))
        return used[-1]

    monkeypatch.setattr(blockwise, "fused_pair_block", watched)
    return used


@on_gpu
@pytest.mark.parametrize("dim", [64, 768])
@pytest.mark.parametrize("build", list(losses()))
def test_the_loss_is_that_of_float64_and_of_pytorch(fused, build, dim):
    loss, tensors = build(block_size=100), material(dim)[:2]
    value, gradient = value_and_gradient(loss, tensors)
    assert fused[0] is not None
    exact_value, exact = value_and_gradient(loss, tensors, device="cpu", dtype=torch.float64)
    assert value == pytest.approx(exact_value, rel=1e-5)
    assert (gradient - exact).norm() / exact.norm() < 1e-5
    fused.off()
    torch_value, torch_gradient = value_and_gradient(loss, tensors)
    assert value == pytest.approx(torch_value, rel=1e-5)
    assert (gradient - torch_gradient).norm() / exact.norm() < 1e-5


@on_gpu
@pytest.mark.parametrize("negatives", ["same_view", "both"])
@pytest.mark.parametrize("block_size", [100, 700])
def test_repeated_texts_and_hard_negatives(fused, block_size, negatives):
    ids = torch.arange(700)[:, None] * 3 + torch.arange(3)
    ids[3, 0], ids[699, 0], ids[9, 1], ids[600, 2] = ids[2, 0], ids[1, 0], ids[20, 0], ids[7, 0]
    loss = FMICLLoss("js", 1.0, 4.0, negatives=negatives, block_size=block_size)
    value, gradient = value_and_gradient(loss, material(64), ids)
    exact_value, exact = value_and_gradient(loss, material(64), ids, device="cpu", dtype=torch.float64)
    assert fused[0] is not None and value == pytest.approx(exact_value, rel=1e-5)
    assert (gradient - exact).norm() / exact.norm() < 1e-5


@on_gpu
def test_two_runs_are_equal_bit_for_bit():
    first, second = (value_and_gradient(FMICLLoss("js", 1.0, 4.0, block_size=300), material(64)[:2]) for _ in "ab")
    assert first[0] == second[0] and torch.equal(first[1], second[1])


@on_gpu
def test_a_divergence_without_a_kernel_uses_pytorch(fused):
    mine = FDivergence.from_convex(lambda u: u**1.5, "mine")
    loss = FMICLLoss(mine, 1.0, 4.0, block_size=300)
    value, gradient = value_and_gradient(loss, material(64)[:2])
    exact_value, exact = value_and_gradient(loss, material(64)[:2], device="cpu", dtype=torch.float64)
    assert fused[0] is None and value == pytest.approx(exact_value, rel=1e-5)
    assert (gradient - exact).norm() / exact.norm() < 1e-5


@on_gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("make", list(MATERIALS.values()), ids=MATERIALS)
def test_a_block_is_that_of_float64(name, make):
    rows, columns, gamma = make()
    config = configured(CASES[name], gamma)
    total, derivative = fused_pair_block(config, rows.cuda())(rows.cuda(), columns.cuda(), None, config)
    exact_total, exact = pair_block(rows.double(), columns.double(), None, config)
    size = exact.abs() if make is exact_rows else exact.abs().max()
    assert ((derivative.cpu().double() - exact).abs() / (size + 1e-32)).max() < 1e-5
    assert total.item() == pytest.approx(exact_total.item(), rel=1e-5)


@on_gpu
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_the_kernel(name):
    """The compiler fuses products and sums, which the interpreter does not."""
    assert error_of_function(name, "cuda") < 1e-6


@on_gpu
def test_memory_is_linear(fused):
    x, y = (torch.randn(16384, 64, device="cuda", requires_grad=True) for _ in range(2))
    FMICLLoss("js", 1.0, 4.0, block_size=1024)(x, y)  # compiles
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    FMICLLoss("js", 1.0, 4.0, block_size=1024)(x, y).backward()
    assert fused[-1] is not None
    assert torch.cuda.max_memory_allocated() - held < 16384**2 * 4 / 8
