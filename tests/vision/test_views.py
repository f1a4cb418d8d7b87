"""Batches of two views: shapes, independent parameters, reproducibility."""

import doctest

import pytest
import torch
from torch.testing import assert_close

from fmicl_text.vision import views as module
from fmicl_text.vision.views import VIEWS, ImageViews

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


COLORS = ("exact", "fast")


def batch(count=16, channels=3, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("preset", VIEWS)
def test_no_two_images_and_no_two_views_share_parameters(preset, color):
    channels = 1 if preset == "gray" else 3
    one = batch(1, channels).repeat(16, 1, 1, 1)  # identical images: only parameters can make views differ
    views = ImageViews(preset, 24, MEAN[:channels], STD[:channels], color)(one, torch.Generator().manual_seed(0))
    assert views.shape == (16, 2, channels, 24, 24) and views.dtype == torch.float32 and views.isfinite().all()
    assert len(torch.unique(views.flatten(0, 1), dim=0)) == 32
    pixels = views * torch.tensor(STD[:channels])[:, None, None] + torch.tensor(MEAN[:channels])[:, None, None]
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5


@pytest.mark.parametrize("preset", VIEWS)
def test_views_are_determined_by_the_generator(preset):
    channels = 1 if preset == "gray" else 3
    make = ImageViews(preset, 32, MEAN[:channels], STD[:channels])
    state = torch.get_rng_state()
    first, again, other = (make(batch(channels=channels), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


STEPS = {  # preset: augmentations of each view after the crop, with their probabilities
    "cifar": [{"random_jitter": 0.8, "random_grayscale": 0.2}] * 2,
    "imagenet": [{"random_jitter": 0.8, "random_grayscale": 0.2, "random_blur": 0.5}] * 2,
    "mocov3": [
        {"random_jitter": 0.8, "random_grayscale": 0.2, "random_blur": 1.0},
        {"random_jitter": 0.8, "random_grayscale": 0.2, "random_blur": 0.1, "random_solarize": 0.2},
    ],
}
SMALLEST = {"cifar": 0.2, "imagenet": 0.08, "mocov3": 0.08}


@pytest.mark.parametrize("preset", STEPS)
def test_presets_are_those_of_the_papers(preset):
    assert ImageViews(preset, 32, MEAN, STD).crop == (SMALLEST[preset], 1.0)
    for steps, expected in zip(ImageViews(preset, 32, MEAN, STD).steps, STEPS[preset], strict=True):
        assert {step.func.__name__: step.keywords["probability"] for step in steps} == expected


@pytest.mark.parametrize("preset", VIEWS)
def test_crops_made_before_are_not_cropped_again(monkeypatch, preset):
    """View k is crop k, and half of them are flipped, except for handwritten characters."""
    channels = 1 if preset == "gray" else 3
    make = ImageViews(preset, 24, (0.0,) * channels, (1.0,) * channels)
    monkeypatch.setattr(make, "steps", ((), ()))
    crops = batch(32, 2 * channels, 24).view(32, 2, channels, 24, 24)
    views = make(crops, torch.Generator().manual_seed(0))
    same = (views == crops / 255).flatten(2).all(-1)
    flipped = (views == crops.flip(-1) / 255).flatten(2).all(-1)
    assert (same ^ flipped).all() and (same.all() if preset == "gray" else 10 < same.sum() < 54)


def test_fast_colors_are_used():
    exact, fast = (ImageViews("cifar", 32, MEAN, STD, c)(batch(), torch.Generator().manual_seed(0)) for c in COLORS)
    assert 0.01 < (exact - fast).abs().mean() < 1.0


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("preset", VIEWS)
def test_autocast_and_gradients_do_not_reach_the_views(preset, color):
    channels = 1 if preset == "gray" else 3
    make = ImageViews(preset, 24, MEAN[:channels], STD[:channels], color)
    pixels = (batch(8, channels) / 255).requires_grad_()
    plain = make(pixels, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = make(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(plain, cast) and not plain.requires_grad and cast.dtype == torch.float32


@pytest.mark.parametrize("color", COLORS)
def test_one_channel_skips_color(color):
    views = ImageViews("imagenet", 24, (0.5,), (0.25,), color)(batch(channels=1), torch.Generator().manual_seed(0))
    assert views.shape == (16, 2, 1, 24, 24) and views.isfinite().all()


def test_bytes_are_divided_by_255():
    make = ImageViews("cifar", 32, MEAN, STD)
    of_bytes, of_floats = (make(x, torch.Generator().manual_seed(0)) for x in (batch(), batch().float() / 255))
    assert_close(of_bytes, of_floats)


def test_mocov3s_views_are_two_distributions():
    """The first view is always blurred, the second rarely."""
    views = ImageViews("mocov3", 32, MEAN, STD)(batch(64), torch.Generator().manual_seed(0))
    detail = (views[..., 1:] - views[..., :-1]).abs().mean((0, 2, 3, 4))
    assert detail[1] > 1.3 * detail[0]


def test_invalid_arguments():
    with pytest.raises(ValueError, match="preset must be one of cifar, imagenet, mocov3, gray; got 'simclr'"):
        ImageViews("simclr", 32, MEAN, STD)
    with pytest.raises(ValueError, match="color must be exact or fast; got 'slow'"):
        ImageViews("cifar", 32, MEAN, STD, "slow")
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \[16, 1, 32, 32\]"):
        ImageViews("cifar", 32, MEAN, STD)(batch(channels=1))
    with pytest.raises(ValueError, match=r"images must be uint8 or float in \[0, 1\], got torch.int64"):
        ImageViews("cifar", 32, MEAN, STD)(batch().long())
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        ImageViews("cifar", 0, MEAN, STD)
    with pytest.raises(ValueError, match="mean and std must have one or three values each; got 3 and 1"):
        ImageViews("cifar", 32, MEAN, (0.5,))


def test_channels_in_another_order():
    """Colors are jittered as RGB and then exchanged; mean and deviation are those of the output's channels."""
    flipped = ImageViews("cifar", 32, MEAN, STD, channel_order=(2, 1, 0))
    plain = ImageViews("cifar", 32, MEAN[::-1], STD[::-1])
    first, second = (make(batch(), torch.Generator().manual_seed(0)) for make in (flipped, plain))
    assert_close(first, second.flip(2))
    assert flipped.describe()["channel_order"] == [2, 1, 0] and plain.describe()["channel_order"] is None
    with pytest.raises(ValueError, match=r"channel_order must be an order of 3 channels; got \(0, 0, 1\)"):
        ImageViews("cifar", 32, MEAN, STD, channel_order=(0, 0, 1))


def test_docstring_example():
    assert doctest.testmod(module).attempted == 2
    assert doctest.testmod(module).failed == 0
