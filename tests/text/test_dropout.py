"""CheapDropout: fraction of dropped values, scale, gradient, and the replacement of nn.Dropout."""

import copy

import pytest
import torch
from torch import nn

from fmicl_text.text.dropout import CheapDropout, replace_dropout
from fmicl_text.text.model import build_text_encoder


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_share_and_scale(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    y = CheapDropout(p)(x)
    assert y.dtype == dtype
    dropped = (y == 0).float().mean().item()
    assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16)
    assert y.detach().unique().tolist() == pytest.approx(
        [0.0, 1 / (1 - p)], rel=1e-2 if dtype == torch.bfloat16 else 1e-3
    )
    y.float().sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_draws_are_independent_of_their_neighbors():
    """One number yields four draws. The fraction of neighbors at distance 1 to 4 that are both dropped is p^2."""
    torch.manual_seed(0)
    gone = CheapDropout(0.5)(torch.ones(4_000_000)) == 0
    for distance in (1, 2, 3, 4):
        assert (gone[distance:] & gone[:-distance]).float().mean().item() == pytest.approx(0.25, abs=2e-3)


def test_seeded_and_off_in_evaluation():
    layer, x = CheapDropout(0.5), torch.randn(50, 50)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(layer(x))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(layer.eval()(x), x)
    for p, expected in [(0.0, x), (1.0, torch.zeros_like(x))]:
        assert torch.equal(CheapDropout(p)(x), expected)


def test_every_dropout_of_an_encoder_is_replaced_and_its_weights_are_the_same(bert_folder):
    encoder = build_text_encoder(bert_folder)
    before = copy.deepcopy(encoder.state_dict())
    replace_dropout(encoder)
    kinds = {type(part) for part in encoder.modules() if isinstance(part, nn.Dropout)}
    assert kinds == {CheapDropout}
    assert encoder.state_dict().keys() == before.keys()
    assert sum(isinstance(part, nn.Dropout) for part in encoder.modules()) > 3


@pytest.mark.parametrize("training", [True, False])
def test_a_replaced_dropout_keeps_its_mode(training):
    layers = nn.Sequential(nn.Dropout(0.5)).train(training)
    replace_dropout(layers)
    assert type(layers[0]) is CheapDropout and layers[0].training == training
