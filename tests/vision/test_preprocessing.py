"""What image processors do to pictures: size, affine map, modes, and the saved processor."""

import doctest
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    DonutImageProcessorPil,
    EfficientNetImageProcessorPil,
    GLPNImageProcessorPil,
    GotOcr2ImageProcessorPil,
    MobileViTImageProcessorPil,
    NougatImageProcessorPil,
    PixtralImageProcessorPil,
    VideoMAEImageProcessorPil,
    ViTImageProcessorPil,
)

from fmicl_text.errors import InputError
from fmicl_text.vision import preprocessing as module
from fmicl_text.vision.preprocessing import new_preprocessing, open_preprocessing
from fmicl_text.vision.views import ImageViews
from tests.support import IMAGE_PROCESSORS

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")


def noise(size=(60, 40), mode="RGB"):
    """A picture of a size (width, height) in any mode, with transparent pixels if the mode has them."""
    colors = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    picture = Image.fromarray(colors, "RGBA")
    return picture.convert(mode) if mode in ("RGBA", "LA") else picture.convert("RGB").convert(mode)


def saved(folder, processor):
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("variant", IMAGE_PROCESSORS)
def test_the_affine_map_is_that_of_the_output(variant, tmp_path):
    """Random views of one color are what the processor makes of that color."""
    preprocessing = open_preprocessing(saved(tmp_path, IMAGE_PROCESSORS[variant]()), 3, image_size=32)
    make = ImageViews("cifar", 32, preprocessing.mean, preprocessing.std, channel_order=preprocessing.channel_order)
    make.steps = ((), ())
    for color in ((255, 0, 0), (0, 255, 0), (12, 130, 250), (90, 91, 92)):
        picture = Image.new("RGB", (40, 32), color)
        views = make(torch.tensor(color, dtype=torch.uint8)[None, :, None, None].repeat(1, 1, 32, 32))
        output = preprocessing([picture])[:, :, 12:20, 12:20]  # MobileViT's has a black border
        scale = max(1.0, float(output.abs().max()))
        assert_close(views[0, :, :, 12:20, 12:20] / scale, output.expand(2, -1, -1, -1) / scale, atol=1e-5, rtol=0)


OFFSET = {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}


@pytest.mark.parametrize(
    "processor, mean, std, order",
    [
        (ViTImageProcessorPil(), 0.5, 0.5, None),
        (ViTImageProcessorPil(do_normalize=False), 0.0, 1.0, None),
        (ViTImageProcessorPil(do_rescale=False, image_mean=[51.0] * 3, image_std=[127.5] * 3), 0.2, 0.5, None),
        (ViTImageProcessorPil(do_rescale=False, do_normalize=False), 0.0, 1 / 255, None),
        (ViTImageProcessorPil(rescale_factor=1 / 127.5, do_normalize=False), 0.0, 0.5, None),
        (EfficientNetImageProcessorPil(**OFFSET), 0.5, 0.25, None),
        (EfficientNetImageProcessorPil(include_top=False, **OFFSET), 0.5, 0.5, None),
        (MobileViTImageProcessorPil(), 0.0, 1.0, (2, 1, 0)),
        (MobileViTImageProcessorPil(do_flip_channel_order=False), 0.0, 1.0, None),
    ],
)  # fmt: skip
def test_every_switch_of_a_processor(processor, mean, std, order, tmp_path):
    preprocessing = open_preprocessing(saved(tmp_path, processor), 3, image_size=32)
    assert preprocessing.mean == pytest.approx((mean,) * 3, abs=1e-5)
    assert preprocessing.std == pytest.approx((std,) * 3, rel=1e-5) and preprocessing.channel_order == order


def test_mean_and_deviation_of_each_channel_without_rounding_errors(tmp_path):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    preprocessing = open_preprocessing(saved(tmp_path, ViTImageProcessorPil(image_mean=mean, image_std=std)), 3)
    assert (preprocessing.mean, preprocessing.std, preprocessing.size) == (mean, std, 224)


SQUARE, CROP = {"height": 224, "width": 224}, {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}


@pytest.mark.parametrize(
    "processor, own, size, crop",
    [  # the sizes of resize and crop for image_size 98
        (ViTImageProcessorPil(), 224, {"height": 98, "width": 98}, None),
        (BitImageProcessorPil(size={"shortest_edge": 256}, **CROP), 224, {"shortest_edge": 112}, 98),
        (DeiTImageProcessorPil(), 224, {"height": 112, "width": 112}, 98),
        (ViTImageProcessorPil(size=224), 224, {"height": 98, "width": 98}, None),
        (CLIPImageProcessorPil(size=224, crop_size=224), 224, {"shortest_edge": 98}, 98),
        (ConvNextImageProcessorPil(size={"shortest_edge": 384}), 384, {"shortest_edge": 98}, None),
        (ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875), 224, {"shortest_edge": 98}, None),
        (EfficientNetImageProcessorPil(), 346, {"height": 98, "width": 98}, None),
        (MobileViTImageProcessorPil(), 256, {"shortest_edge": 86}, 98),
        (ViTImageProcessorPil(do_resize=False, **CROP), 224, SQUARE, 98),
    ],
)
def test_another_size_keeps_the_proportion_of_resize_and_crop(processor, own, size, crop, tmp_path):
    folder = saved(tmp_path, processor)
    assert open_preprocessing(folder, 3).size == own
    preprocessing = open_preprocessing(folder, 3, image_size=98)
    settings = preprocessing.processor.to_dict()
    assert preprocessing.size == 98
    if settings["do_resize"]:
        assert settings["size"] == size
    if crop:
        assert settings["crop_size"] == {"height": 98, "width": 98}
    assert preprocessing([noise((70, 50)), noise((30, 300))]).shape == (2, 3, 98, 98)
    assert preprocessing.mean == open_preprocessing(folder, 3).mean


def test_a_processor_that_keeps_the_shape_of_pictures(tmp_path):
    """Square views; a list of outputs for pictures of different shapes."""
    shapes = {"shortest_edge": 64, "longest_edge": 128}
    for i, processor in enumerate(
        [BitImageProcessorPil(size=shapes, do_center_crop=False), ViTImageProcessorPil(size={"shortest_edge": 64})]
    ):
        folder = saved(tmp_path / str(i), processor)
        assert open_preprocessing(folder, 3).size == 64
        preprocessing = open_preprocessing(folder, 3, image_size=32)
        outputs = preprocessing([noise((60, 40)), noise((40, 60)), noise((60, 40))])
        assert [output.shape for output in outputs] == [(3, 32, 48), (3, 48, 32), (3, 32, 48)]
        assert preprocessing([noise((60, 40))] * 2).shape == (2, 3, 32, 48) and preprocessing.size == 32


def test_processors_without_a_square_size(tmp_path):
    """The shorter side is then resized to image_size, and the center cropped."""
    for i, processor in enumerate(
        [
            ViTImageProcessorPil(do_resize=False),
            DonutImageProcessorPil(size={"height": 64, "width": 48}),
            ViTImageProcessorPil(size={"height": 64, "width": 48}),
            PixtralImageProcessorPil(),
        ]
    ):
        folder = saved(tmp_path / str(i), processor)
        name = type(processor).__name__
        with pytest.raises(InputError, match=rf"^model_name_or_path=.*{name} has no square size; set image_size$"):
            open_preprocessing(folder, 3)
        assert open_preprocessing(folder, 3, image_size=32)([noise((32, 32))]).shape == (1, 3, 32, 32)


def test_processors_that_cannot_be_used_for_views(tmp_path):
    folder = saved(tmp_path / "glpn", GLPNImageProcessorPil())  # rounds the size of each picture
    with pytest.raises(InputError, match=r"^image_size=50: GLPNImageProcessorPil of .* does not accept it$"):
        open_preprocessing(folder, 3, image_size=50)
    folder = saved(tmp_path / "nougat", NougatImageProcessorPil())  # crops to the content of the page
    with pytest.raises(InputError, match=r"^model_name_or_path=.*: the output of NougatImageProcessorPil is not \(x"):
        open_preprocessing(folder, 3, image_size=64)


def test_a_model_without_a_processor_that_can_be_used(tmp_path, caplog):
    """None, with the reason in the log: the caller then takes the statistics of the data."""
    caplog.set_level(logging.WARNING)
    (tmp_path / "none").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "preprocessor_config.json").write_text("{")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Mine"}))
    (tmp_path / "odd").mkdir()
    odd = ViTImageProcessorPil().to_dict() | {"image_std": "wide"}
    (tmp_path / "odd" / "preprocessor_config.json").write_text(json.dumps(odd))
    saved(tmp_path / "video", VideoMAEImageProcessorPil())
    saved(tmp_path / "tiles", GotOcr2ImageProcessorPil(crop_to_patches=True))  # of large or wide pictures only
    saved(tmp_path / "rgb", ViTImageProcessorPil())
    for name, channels, reason in (
        ("none", 3, "no image processor"),
        ("broken", 3, "not a valid JSON file"),
        ("unknown", 3, "Unrecognized image processor"),
        ("odd", 3, "not used"),
        ("video", 3, "gives [1, 1, 3, 224, 224] instead of [1, 3, H, W]"),
        ("tiles", 3, ", 3, 384, 384] instead of [1, 3, H, W]"),
        ("rgb", 1, "mean must have 1 elements"),
    ):
        caplog.clear()
        assert open_preprocessing(str(tmp_path / name), channels, image_size=32) is None
        (record,) = caplog.records
        assert reason in record.getMessage() and "\n" not in record.getMessage(), name
        assert len(record.getMessage()) < 400, name  # not the names of all models
    with pytest.raises(InputError, match=r"model_name_or_path=\./absent: no such folder"):
        open_preprocessing("./absent", 3)


@pytest.mark.parametrize("image_size", [None, 32])
@pytest.mark.parametrize(
    "size", [{"height": 4_000_000, "width": 4_000_000}, {"shortest_edge": 1e9}, {"longest_edge": 1e9}]
)
def test_a_processor_of_an_absurd_size_is_not_tried(size, image_size, tmp_path, caplog):
    """It would take all the memory of the machine."""
    settings = {"image_processor_type": "ViTImageProcessor", "size": size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert open_preprocessing(str(tmp_path), 3, image_size) is None
    assert "pixels, more than 8192" in caplog.text
    for make in (
        lambda: open_preprocessing(str(tmp_path), 3, 4_000_000),
        lambda: new_preprocessing(4_000_000, (0.5,) * 3, (0.5,) * 3),
    ):
        with pytest.raises(InputError, match=r"^image_size=4000000 must be from 1 to 8192$"):
            make()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sizes_of_a_few_pixels(size, tmp_path):
    folder = saved(tmp_path, ViTImageProcessorPil())
    for preprocessing in (open_preprocessing(folder, 3, size), new_preprocessing(size, (0.5,) * 3, (0.5,) * 3)):
        assert (preprocessing.size, preprocessing.mean, preprocessing.std) == (size, (0.5,) * 3, (0.5,) * 3)


def test_gray_models_take_gray_pictures(tmp_path):
    preprocessing = new_preprocessing(16, (0.25,), (0.5,))
    assert (preprocessing.size, preprocessing.mean, preprocessing.std) == (16, (0.25,), (0.5,))
    assert_close(preprocessing([Image.new("L", (20, 30), 255)]), torch.full((1, 1, 16, 16), 1.5))
    folder = saved(tmp_path, ViTImageProcessorPil(image_mean=[0.5], image_std=[0.25], do_convert_rgb=True))
    again = open_preprocessing(folder, 1, image_size=8)
    assert (again.mean, again.std) == ((0.5,), (0.25,)) and again([noise(mode="L")]).shape == (1, 1, 8, 8)
    assert again.processor(noise(mode="L"), return_tensors="pt").pixel_values.shape == (1, 1, 8, 8)


@pytest.mark.parametrize("own", [True, False])
def test_the_saved_processor_sees_the_same_pixels_in_every_mode(own, tmp_path):
    """Also if the model's own processor does not convert, as ViT's."""
    if own:
        preprocessing = open_preprocessing(saved(tmp_path / "own", ViTImageProcessorPil()), 3, image_size=32)
    else:
        preprocessing = new_preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    preprocessing.processor.save_pretrained(tmp_path / "out")
    reopened = AutoImageProcessor.from_pretrained(tmp_path / "out")
    for mode in MODES:
        picture = noise(mode=mode)
        white = Image.new("RGBA", picture.size, "white")
        blended = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        pixels = reopened(picture, return_tensors="pt").pixel_values
        assert torch.equal(pixels, preprocessing([blended])) and pixels.std() > 0.1, mode


def test_the_saved_processor_names_nothing_that_is_not_saved(tmp_path):
    """Custom code that the stock class replaced, and the processor of a model of images and texts."""
    folder = saved(tmp_path / "start", CLIPImageProcessorPil())
    path = tmp_path / "start" / "preprocessor_config.json"
    others = {"auto_map": {"AutoImageProcessor": "mine.Processor"}, "processor_class": "CLIPProcessor"}
    path.write_text(json.dumps(json.loads(path.read_text()) | others))
    saved(tmp_path / "out", open_preprocessing(folder, 3, image_size=32).processor)
    settings = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert not settings.keys() & others.keys() and settings["crop_size"] == {"height": 32, "width": 32}


def test_the_stock_processor_resizes_the_shorter_side_and_crops_the_center():
    picture = Image.new("RGB", (60, 20))
    picture.paste(Image.new("RGB", (20, 20), "white"), (20, 0))
    preprocessing = new_preprocessing(20, (0.0,) * 3, (1.0,) * 3)
    assert_close(preprocessing([picture]), torch.ones(1, 3, 20, 20))
    large = noise((90, 60))
    expected = large.resize((48, 32), Image.Resampling.BILINEAR).crop((8, 0, 40, 32))
    pixels = new_preprocessing(32, (0.5,) * 3, (0.25,) * 3)([large])[0]
    assert_close(pixels * 0.25 + 0.5, torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255, atol=1e-6, rtol=0)


def test_docstring_example():
    assert doctest.testmod(module, extraglobs={"Image": Image}) == (0, 2)
