"""Every family of image models trains a step, saves, reloads bit for bit and opens in stock classes."""

import json
import warnings

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    pipeline,
)

from fmicl_text.errors import InputError
from fmicl_text.vision.architectures import IMAGE_CONFIGS, sincos_positions
from fmicl_text.vision.encoder import ImageEncoder, build_image_encoder, new_image_encoder
from fmicl_text.vision.preprocessing import Preprocessing, new_preprocessing, open_settings
from tests.support import IMAGE_FAMILIES, TINY_VIT, tiny_mocov3_vit

CLASSIFIERS = {"resnet", "convnext", "convnextv2", "vit", "vit, mocov3", "deit", "swin", "dinov2", "beit"}


def images(encoder: ImageEncoder, count: int = 6) -> torch.Tensor:
    return torch.randn(count, encoder.num_channels, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_a_family_from_training_to_stock_classes(family, tmp_path, caplog):
    config, pools = IMAGE_FAMILIES[family]
    encoder = new_image_encoder(type(config).from_dict(config.to_dict()))
    pixels = images(encoder)
    encoder.train()
    embeddings = encoder(pixels)
    assert embeddings.shape == (6, encoder.width(32)) and embeddings.isfinite().all()
    before = {name: weight.clone() for name, weight in encoder.named_parameters()}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    (embeddings * torch.randn_like(embeddings)).mean().backward()
    optimizer.step()
    for name, weight in encoder.named_parameters():
        assert weight.requires_grad == (weight.grad is not None), name  # DDP stops on a weight without a gradient
        moved = not torch.equal(weight, before[name])
        assert moved == weight.requires_grad or weight.numel() == 0 or weight.grad.abs().max() < 1e-5, name

    encoder.eval()
    encoder.save_pretrained(tmp_path)
    again = build_image_encoder(str(tmp_path)).eval()
    assert again.pooling == "auto" and [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in encoder.parameters()
    ]
    saved, read = encoder.state_dict(), again.state_dict()
    assert saved.keys() == read.keys() and all(torch.equal(saved[name], read[name]) for name in saved)
    with torch.no_grad():
        expected = encoder(pixels)
        assert_close(again(pixels), expected)  # the memory layout of the weights may select another kernel
        output = AutoModel.from_pretrained(tmp_path).eval()(pixel_values=pixels)
        pooled = output.last_hidden_state[:, 0] if pools == "cls" else output.pooler_output.flatten(1)
        assert_close(pooled, expected)
    if family in CLASSIFIERS:
        with warnings.catch_warnings(action="ignore"):  # a new head is intended here
            classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
        weights = dict(classifier.named_parameters())
        shared = [name for name in encoder.backbone.state_dict() if f"{classifier.base_model_prefix}.{name}" in weights]
        assert len(shared) > 4
        for name in shared:
            assert torch.equal(weights[f"{classifier.base_model_prefix}.{name}"], encoder.backbone.state_dict()[name])


def test_pooling_is_chosen_and_kept(tmp_path):
    encoder = new_image_encoder(ViTConfig(**TINY_VIT), pooling="mean").eval()
    pixels = images(encoder)
    with torch.no_grad():
        tokens = encoder.backbone(pixel_values=pixels).last_hidden_state
        assert torch.equal(encoder(pixels), tokens.mean(1))
        encoder.save_pretrained(tmp_path)
        assert torch.equal(build_image_encoder(str(tmp_path)).eval()(pixels), tokens.mean(1))
        assert torch.equal(build_image_encoder(str(tmp_path), pooling="cls").eval()(pixels), tokens[:, 0])
    convolutional = new_image_encoder(IMAGE_FAMILIES["resnet"][0], pooling="mean").eval()
    with torch.no_grad():
        maps = convolutional.backbone(pixel_values=pixels).last_hidden_state
        assert torch.equal(convolutional(pixels), maps.mean((2, 3)))


@pytest.mark.parametrize(
    "family, pooling, message",
    [
        ("swin", "cls", "pooling=cls: swin has no class token; use auto, mean or pooler"),
        ("siglip", "cls", "siglip_vision_model has no class token"),
        ("resnet", "cls", "resnet has no class token"),
        ("dinov3 convnext", "cls", "dinov3_convnext has no class token"),
        ("vit", "pooler", "pooling=pooler: the pooler of vit is random; use auto, cls or mean"),
    ],
)
def test_unsupported_pooling(family, pooling, message):
    with pytest.raises(InputError, match=message):
        new_image_encoder(IMAGE_FAMILIES[family][0], pooling=pooling)


@pytest.mark.parametrize("pooling", ["auto", "cls", "mean", "pooler"])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_features_as_an_expression(family, pooling):
    """Evaluated on the output of the backbone, it gives the features."""
    config, pools = IMAGE_FAMILIES[family]
    try:
        encoder = new_image_encoder(type(config).from_dict(config.to_dict()), pooling=pooling).eval()
    except InputError:
        return  # see test_unsupported_pooling
    expression = encoder.feature_expression(32)
    pixels = images(encoder)
    with torch.no_grad():
        output = encoder.backbone(pixel_values=pixels)
        assert torch.equal(eval(f"output.{expression}", {"output": output}), encoder(pixels))
    if pooling == "auto":
        assert expression == {"cls": "last_hidden_state[:, 0]", "pooler": "pooler_output.flatten(1)"}[pools]


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_every_trainable_weight_gets_a_gradient(family, pooling):
    """DDP stops at step 2 on a trainable weight without a gradient, such as CLIP's last layer norm or SigLIP's head."""
    config = IMAGE_FAMILIES[family][0]
    try:
        encoder = new_image_encoder(type(config).from_dict(config.to_dict()), pooling=pooling)
    except InputError as error:
        assert f"pooling={pooling}: " in str(error)
        return
    encoder(images(encoder)).square().sum().backward()
    assert not [name for name, weight in encoder.named_parameters() if weight.requires_grad and weight.grad is None]
    assert len([weight for weight in encoder.parameters() if weight.grad is not None]) > 10


def test_without_a_pooler_auto_is_the_mean():
    encoder = new_image_encoder(SiglipVisionConfig(**TINY_VIT, vision_use_head=False)).eval()
    pixels = images(encoder)
    with torch.no_grad():
        assert torch.equal(encoder(pixels), encoder.backbone(pixel_values=pixels).last_hidden_state.mean(1))
    with pytest.raises(InputError, match=r"^pooling=pooler: siglip_vision_model has no pooler"):
        new_image_encoder(encoder.backbone.config, pooling="pooler").width(32)


def test_a_class_token_is_the_first_one():
    for family in ("vit", "deit", "dinov2", "dinov2 with registers", "dinov3", "beit", "clip"):
        encoder = new_image_encoder(IMAGE_FAMILIES[family][0], pooling="cls").eval()
        pixels = images(encoder)
        with torch.no_grad():
            assert torch.equal(encoder(pixels), encoder.backbone(pixel_values=pixels).last_hidden_state[:, 0])


def test_weights_are_float32_whatever_the_dtype_of_the_file(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        AutoModel.from_config(ViTConfig(**TINY_VIT)).to(dtype).save_pretrained(tmp_path / str(dtype))
        encoder = build_image_encoder(str(tmp_path / str(dtype)))
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_a_folder_with_its_processor_opens_in_the_pipeline(tmp_path):
    """Without torchvision too: the processor falls back on PIL."""
    encoder = new_image_encoder(ViTConfig(**TINY_VIT)).eval()
    size = {"height": 32, "width": 32}
    processor = ViTImageProcessor(size=size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    encoder.save_pretrained(tmp_path, processor)
    reopened = AutoImageProcessor.from_pretrained(tmp_path)
    image = Image.effect_noise((40, 50), 60).convert("RGB")
    pixels = reopened(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and list(reopened.image_mean) == [0.5, 0.4, 0.3]
    extract = pipeline("image-feature-extraction", model=str(tmp_path), device="cpu")
    with torch.no_grad():
        assert_close(torch.tensor(extract(image))[:, 0], encoder(pixels))


@pytest.mark.parametrize("full, config", [(CLIPModel, CLIPConfig), (SiglipModel, SiglipConfig)])
def test_the_vision_tower_of_a_model_of_two(full, config, tmp_path):
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    whole = full(config(text_config=text, vision_config=TINY_VIT)).eval()
    whole.save_pretrained(tmp_path)
    encoder = build_image_encoder(str(tmp_path)).eval()
    pixels = images(encoder)
    with torch.no_grad():
        assert torch.equal(encoder(pixels), whole.vision_model(pixel_values=pixels).pooler_output)


def test_the_small_stem_sees_small_images():
    """The stock stem leaves an eighth of the height and width before the second stage, this one all."""
    config = IMAGE_CONFIGS["resnet-18-small"]()
    encoder = new_image_encoder(config)
    maps = encoder.backbone(pixel_values=images(encoder, 2)).last_hidden_state
    assert maps.shape == (2, 512, 4, 4)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(11.17e6, rel=1e-3)


def test_mocov3s_positions_by_the_formula():
    positions = sincos_positions(3, 5, 16)
    assert positions.shape == (1, 16, 16) and (positions[0, 0] == 0).all()
    for row, column in ((0, 0), (2, 4), (1, 3)):
        token = positions[0, 1 + 5 * row + column]
        for k in range(4):
            frequency = 10000 ** (-k / 4)
            angles = torch.tensor([column * frequency, row * frequency])
            found = token[[k, 4 + k, 8 + k, 12 + k]]
            expected = torch.stack([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()])
            assert torch.allclose(found, expected, atol=1e-6)


def test_frozen_weights_are_frozen_again_at_load(tmp_path):
    encoder = new_image_encoder(tiny_mocov3_vit())
    encoder.save_pretrained(tmp_path)
    again = build_image_encoder(str(tmp_path))
    frozen = [name for name, weight in again.named_parameters() if not weight.requires_grad]
    assert sorted(name.removeprefix("backbone.embeddings.") for name in frozen) == [
        "patch_embeddings.projection.bias",
        "patch_embeddings.projection.weight",
        "position_embeddings",
    ]
    assert torch.equal(again.backbone.embeddings.position_embeddings, sincos_positions(4, 4, 32))


def test_mocov3s_first_weights():
    config = ViTConfig(**TINY_VIT)
    config.fixed_positions = True
    backbone = new_image_encoder(config).backbone
    assert torch.equal(backbone.embeddings.position_embeddings.data, sincos_positions(4, 4, 32))
    assert backbone.embeddings.cls_token.abs().max() < 1e-4
    query = backbone.layers[0].attention.q_proj.weight
    bound = (6 / 64) ** 0.5
    assert 0.9 * bound < query.abs().max() <= bound
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    assert 0.9 * bound < backbone.embeddings.patch_embeddings.projection.weight.abs().max() <= bound
    assert IMAGE_CONFIGS["vit-small"]().num_attention_heads == 12
    trained = sum(p.numel() for p in new_image_encoder(IMAGE_CONFIGS["vit-small"]()).parameters() if p.requires_grad)
    assert trained == pytest.approx(21.29e6, rel=2e-3)


def test_invalid_models(tmp_path):
    with pytest.raises(InputError, match=r"model_name_or_path=\./absent: no such folder"):
        build_image_encoder("./absent")
    BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "bert"
    )
    with pytest.raises(InputError, match=r"^model_name_or_path=.*: bert is not an image model"):
        build_image_encoder(str(tmp_path / "bert"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match=r"no file named model\.safetensors"):
        build_image_encoder(str(tmp_path / "broken"))
    with pytest.raises(InputError, match="siglip2_vision_model is not supported: it takes patches with a mask"):
        new_image_encoder(Siglip2VisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    encoder = new_image_encoder(IMAGE_FAMILIES["vit"][0])
    with pytest.raises(InputError, match=r"image_size=4 .* vit: "):
        encoder.width(4)


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_other_numbers_of_channels(channels, tmp_path):
    """Refused when the model is built or opened, not at the first batch."""
    config = ViTConfig(**TINY_VIT, num_channels=channels)
    with pytest.raises(InputError, match=f"^vit: num_channels={channels} is not supported; use 1 or 3$"):
        new_image_encoder(config)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"num_channels={channels} is not supported"):
        build_image_encoder(str(tmp_path))


def test_features_of_vit_mae_are_of_the_whole_image(tmp_path):
    """Its stock settings leave out three quarters of the patches at random, in evaluation too."""
    AutoModel.from_config(ViTMAEConfig(**TINY_VIT, initializer_range=0.3)).save_pretrained(tmp_path / "start")
    encoder = build_image_encoder(str(tmp_path / "start")).eval()
    pixels = images(encoder)
    encoder.save_pretrained(tmp_path / "out")
    stock = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        for again in (encoder(pixels), stock(pixel_values=pixels).last_hidden_state[:, 0]):
            assert_close(again, encoder(pixels), atol=1e-4, rtol=0)  # patches are put in a random order


def test_a_processor_that_keeps_shapes_needs_a_model_that_accepts_them():
    keeping = open_settings({"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 32}})
    squares = new_preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    for family in IMAGE_FAMILIES:
        new_image_encoder(IMAGE_FAMILIES[family][0]).check_shapes(squares)
    new_image_encoder(IMAGE_FAMILIES["resnet"][0]).check_shapes(Preprocessing(keeping, 3))
    with pytest.raises(InputError, match=r"^image_size=32 x 48 .* by vit: .*; ViTImageProcessorPil does not crop") as e:
        new_image_encoder(IMAGE_FAMILIES["vit"][0]).check_shapes(Preprocessing(keeping, 3))
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match=r"^image_size=30 is not supported by vit: .*\)$"):  # the crop is not the cause
        new_image_encoder(IMAGE_FAMILIES["vit"][0]).check_shapes(new_preprocessing(30, (0.5,) * 3, (0.5,) * 3))


def test_the_config_of_a_new_encoder_is_a_copy():
    config = ViTConfig(**TINY_VIT)
    new_image_encoder(config, pooling="mean")
    assert not hasattr(config, "image_pooling") and new_image_encoder(config).pooling == "auto"


def test_only_poolers_with_weights_are_removed():
    encoder = new_image_encoder(IMAGE_FAMILIES["vit"][0])
    assert encoder.backbone.pooler is None
    assert isinstance(
        new_image_encoder(IMAGE_FAMILIES["resnet"][0], pooling="mean").backbone.pooler, nn.AdaptiveAvgPool2d
    )
