"""Augmentations against their formulas, and against torchvision if it can be imported."""

import colorsys
import math

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from fmicl_text.vision.augmentations import (
    Draw,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    crop_boxes,
    jitter_by_matrix,
    random_affine,
    random_blur,
    random_erase,
    random_grayscale,
    random_jitter,
    random_noise,
    random_resized_crop,
    random_solarize,
    resize_weights,
)


def images(count=6, channels=3, height=20, width=24, seed=0):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def draw(pixels, seed=0):
    return Draw(pixels, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [7, 16, 32, 50])
def test_a_crop_is_interpolate_with_antialias(size):
    pixels = images(8, height=37, width=29)
    top, left, rows, columns = crop_boxes(draw(pixels), 37, 29, (0.1, 1.0), (3 / 4, 4 / 3))
    assert len({(t, w) for t, w in zip(top.tolist(), columns.tolist(), strict=True)}) > 4
    vertical, horizontal = resize_weights(top, rows, 37, size), resize_weights(left, columns, 29, size)
    for i in range(8):
        box = pixels[i : i + 1, :, int(top[i]) :, int(left[i]) :][:, :, : int(rows[i]), : int(columns[i])]
        expected = functional.interpolate(box, (size, size), mode="bilinear", antialias=True)
        assert_close(vertical[i] @ pixels[i] @ horizontal[i].T, expected[0], rtol=0, atol=1e-5)


def test_crops_are_inside_the_image_and_in_range():
    pixels = torch.zeros(4000, 1, 1, 1)
    top, left, rows, columns = crop_boxes(draw(pixels), 40, 60, (0.2, 0.9), (3 / 4, 4 / 3))
    assert (top >= 0).all() and (left >= 0).all() and (top + rows <= 40).all() and (left + columns <= 60).all()
    share = rows * columns / 2400
    assert share.min() > 0.17 and share.max() < 0.93
    assert (left + columns == 60).any() and (top + rows == 40).any()  # the last position is possible
    ratio = columns / rows
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert top.max() >= 20 and (top == 0).any()


def test_the_fallback_is_a_center_crop():
    """No crop of 90 % or more at a ratio of 3/4 to 4/3 fits into 10 x 100. The largest one, 10 x 13, is centered."""
    pixels = torch.zeros(3, 1, 1, 1)
    boxes = crop_boxes(draw(pixels), 10, 100, (0.9, 1.0), (3 / 4, 4 / 3))
    assert [column.tolist() for column in boxes] == [[0] * 3, [43] * 3, [10] * 3, [13] * 3]


def test_the_shape_of_a_crop_follows_from_area_and_ratio():
    """1/4 of 40 x 60, three times as wide as high: 600 pixels, 14 high and 42 wide."""
    pixels = torch.zeros(5, 1, 1, 1)
    _, _, rows, columns = crop_boxes(draw(pixels), 40, 60, (0.25, 0.25), (3.0, 3.0))
    assert rows.tolist() == [14] * 5 and columns.tolist() == [42] * 5


def test_a_flip_mirrors_the_crop():
    pixels = images(40)
    always, never = (random_resized_crop(pixels, draw(pixels), 16, (0.2, 1.0), flip=p) for p in (1.0, 0.0))
    assert_close(always, never.flip(-1))
    half = random_resized_crop(pixels, draw(pixels), 16, (0.2, 1.0), flip=0.5)
    flipped = [(half[i] - always[i]).abs().max() < 1e-6 for i in range(40)]
    assert 10 < sum(flipped) < 30


def test_brightness_contrast_and_saturation_by_hand():
    pixels = images(2, height=2, width=2)
    factor = torch.tensor([0.5, 1.7])
    gray = 0.299 * pixels[:, 0] + 0.587 * pixels[:, 1] + 0.114 * pixels[:, 2]
    for i, f in enumerate(factor.tolist()):
        assert_close(adjust_brightness(pixels, factor)[i], (pixels[i] * f).clamp(0, 1))
        assert_close(adjust_contrast(pixels, factor)[i], (f * pixels[i] + (1 - f) * gray[i].mean()).clamp(0, 1))
        assert_close(adjust_saturation(pixels, factor)[i], (f * pixels[i] + (1 - f) * gray[i]).clamp(0, 1))


def test_hue_is_that_of_colorsys():
    pixels = images(4, height=5, width=5)
    pixels[0, :, 0, 0], pixels[0, :, 0, 1], pixels[0, :, 0, 2] = 0, 1, 0.4  # no hue: black, white, gray
    shift = torch.tensor([0.1, -0.5, 0.37, 0.0])
    turned = adjust_hue(pixels, shift)
    for i in range(4):
        for row in range(5):
            for column in range(5):
                hue, saturation, value = colorsys.rgb_to_hsv(*pixels[i, :, row, column].double().tolist())
                expected = colorsys.hsv_to_rgb((hue + shift[i].item()) % 1, saturation, value)
                assert_close(turned[i, :, row, column], torch.tensor(expected).float(), rtol=0, atol=1e-5)


def test_the_order_of_the_jitter_is_random_for_each_image():
    pixels = images(1, height=3, width=3).repeat(200, 1, 1, 1)
    strengths = (0.4, 0.4, 0.4, 0.1)
    jittered = random_jitter(pixels, draw(pixels), strengths, 1.0, "exact")
    assert len(torch.unique(jittered, dim=0)) == 200
    generator = torch.Generator().manual_seed(0)
    same = Draw(pixels, generator)
    limits = ((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1))
    factors = [same.uniform(*limit) for limit in limits]
    same.chance(1.0)
    order = same.uniform(0, 1, 4).argsort(1)
    assert len({tuple(row) for row in order.tolist()}) == 24
    changes = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for i in range(20):
        expected = pixels[i : i + 1]
        for change in order[i].tolist():
            expected = changes[change](expected, factors[change][i : i + 1])
        assert_close(jittered[i], expected[0])


@pytest.mark.parametrize("color", ["exact", "fast"])
def test_the_jitter_is_applied_with_its_probability(color):
    pixels = images(500, height=2, width=2)
    same = random_jitter(pixels, draw(pixels), (0.4, 0.4, 0.4, 0.1), 0.8, color).eq(pixels).flatten(1).all(1)
    assert 70 < same.sum() < 130


def test_the_fast_jitter_is_the_exact_one_except_hue_and_clamping():
    pixels = 0.3 + 0.4 * images(5)
    one, zero = torch.ones(5), torch.zeros(5)
    factor = torch.tensor([0.8, 0.9, 1.0, 1.1, 1.2])
    assert_close(jitter_by_matrix(pixels, factor, one, one, zero), adjust_brightness(pixels, factor))
    assert_close(jitter_by_matrix(pixels, one, factor, one, zero), adjust_contrast(pixels, factor))
    assert_close(jitter_by_matrix(pixels, one, one, factor, zero), adjust_saturation(pixels, factor))
    three = adjust_saturation(adjust_contrast(adjust_brightness(pixels, factor), factor), factor)
    assert_close(jitter_by_matrix(pixels, factor, factor, factor, zero), three)
    shift = torch.full((5,), 0.05)
    moved, exact = jitter_by_matrix(pixels, one, one, one, shift) - pixels, adjust_hue(pixels, shift) - pixels
    assert torch.nn.functional.cosine_similarity(moved.flatten(), exact.flatten(), dim=0) > 0.5  # the same direction


def test_gray_and_solarized_images():
    pixels = images(400, height=2, width=2)
    gray = random_grayscale(pixels, draw(pixels), 0.2)
    turned = (gray[:, 0] == gray[:, 1]).flatten(1).all(1)
    assert 50 < turned.sum() < 110 and torch.equal(gray[~turned], pixels[~turned])
    luma = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    assert_close(gray[turned][:, 0], luma[turned])
    solarized = random_solarize(pixels, draw(pixels), 1.0)
    assert_close(solarized, torch.where(pixels < 0.5, pixels, 1 - pixels))


def test_blur_is_the_loop():
    pixels = images(2, height=60, width=60)
    blurred = random_blur(pixels, draw(pixels), 1.0)
    sigma = draw(pixels).uniform(0.1, 2.0)
    for i in range(2):
        weights = [math.exp(-(k**2) / (2 * sigma[i].item() ** 2)) for k in range(-3, 4)]
        total = sum(weights)
        for row, column in ((30, 30), (10, 50), (0, 59)):
            value = 0.0
            for a in range(-3, 4):
                for b in range(-3, 4):
                    r, c = (59 - abs(59 - abs(place)) for place in (row + a, column + b))  # reflected borders
                    value += weights[a + 3] * weights[b + 3] / total**2 * pixels[i, 1, r, c].item()
            assert blurred[i, 1, row, column].item() == pytest.approx(value, abs=1e-5)


def test_a_spot_is_rotated_scaled_sheared_and_translated():
    """A spot at s ends at d with s = R(angle) (1, slant; 0, 1) d / zoom + shift, coordinates from the center."""
    place = torch.arange(33) - 16.0
    spot = torch.exp(-((place[:, None] + 4) ** 2 + (place - 5) ** 2) / 8)  # at x = 5, y = -4
    pixels = spot.expand(30, 1, 33, 33)
    moved = random_affine(pixels, draw(pixels), degrees=30, zoom=0.3, shear=0.3, shift=0.1)[:, 0]
    same = draw(pixels)
    angle = same.uniform(-math.radians(30), math.radians(30))
    zoom, slant = same.uniform(0.7, 1.3), same.uniform(-0.3, 0.3)
    shift = [33 * same.uniform(-0.1, 0.1) for _ in "xy"]
    x, y = ((moved * axis).sum((1, 2)) / moved.sum((1, 2)) for axis in (place, place[:, None]))
    u, v = (x + slant * y) / zoom, y / zoom
    assert_close(angle.cos() * u - angle.sin() * v + shift[0], torch.full((30,), 5.0), rtol=0, atol=0.1)
    assert_close(angle.sin() * u + angle.cos() * v + shift[1], torch.full((30,), -4.0), rtol=0, atol=0.1)


def test_affine_noise_and_cutout():
    pixels = images(50, channels=1, height=16, width=16)
    still = random_affine(pixels, draw(pixels), degrees=0, zoom=0, shear=0, shift=0)
    assert_close(still, pixels, atol=1e-5, rtol=1e-5)
    moved = random_affine(pixels, draw(pixels), degrees=20, zoom=0.25, shear=0.2, shift=0.1)
    assert ((moved - pixels).abs().flatten(1).amax(1) > 0.1).all()
    noisy = random_noise(pixels, draw(pixels, seed=1), 0.1)
    inner = (pixels > 0.35) & (pixels < 0.65)
    assert (noisy - pixels)[inner].std().item() == pytest.approx(0.1, rel=0.05)
    holed = random_erase(torch.ones(50, 1, 16, 16), draw(pixels), 0.25)
    assert (holed.sum((1, 2, 3)) == 256 - 16).all() and len(torch.unique(holed, dim=0)) > 20


def torchvision():
    try:
        import torchvision.transforms.v2.functional as module
    except (ImportError, RuntimeError) as error:  # missing, or a build for another torch
        pytest.skip(f"torchvision cannot be imported: {error}")
    return module


def test_parity_with_torchvision():
    module = torchvision()
    pixels = images(1)
    for ours, theirs, value in (
        (adjust_brightness, module.adjust_brightness, 1.3),
        (adjust_contrast, module.adjust_contrast, 0.7),
        (adjust_saturation, module.adjust_saturation, 1.4),
        (adjust_hue, module.adjust_hue, 0.1),
    ):
        assert_close(ours(pixels, torch.tensor([value])), theirs(pixels, value), rtol=0, atol=1e-5)
    crop = module.resized_crop(pixels, 2, 3, 15, 11, [8, 8], antialias=True)
    vertical, horizontal = (
        resize_weights(torch.tensor([float(start)]), torch.tensor([float(length)]), source, 8)
        for start, length, source in ((2, 15, 20), (3, 11, 24))
    )
    assert_close(vertical[0] @ pixels @ horizontal[0].T, crop, rtol=0, atol=1e-5)
