"""Every family of image models trains a step, saves, reloads bit for bit and opens in stock classes."""

import json
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BeitConfig,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextV2Config,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    MobileNetV2Config,
    RegNetConfig,
    ResNetConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)

from fmicl_text.errors import InputError
from fmicl_text.vision import encoder as encoder_module
from fmicl_text.vision.architectures import IMAGE_CONFIGS, sincos_positions
from fmicl_text.vision.encoder import ImageEncoder, build_image_encoder, new_image_encoder

TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}


def mocov3() -> ViTConfig:
    config = ViTConfig(**TOKENS)
    config.fixed_positions = True
    return config


def small_resnet() -> ResNetConfig:
    config = ResNetConfig(embedding_size=8, layer_type="basic", **STAGES)
    config.small_image_stem = True
    return config


# family: config, what `auto` takes, whether stock classes open the folder
FAMILIES = {
    "resnet": (ResNetConfig(embedding_size=8, layer_type="basic", **STAGES), "pooler"),
    "resnet, small stem": (small_resnet(), "pooler"),
    "regnet": (RegNetConfig(embedding_size=8, groups_width=4, **STAGES), "pooler"),
    "convnext": (ConvNextConfig(num_stages=2, **STAGES), "pooler"),
    "convnextv2": (ConvNextV2Config(num_stages=2, **STAGES), "pooler"),
    "mobilenetv2": (MobileNetV2Config(depth_multiplier=0.25), "pooler"),
    "vit": (ViTConfig(**TOKENS), "cls"),
    "vit, mocov3": (mocov3(), "cls"),
    "deit": (DeiTConfig(**TOKENS), "cls"),
    "swin": (SwinConfig(image_size=32, embed_dim=16, window_size=4, depths=[1, 1], num_heads=[2, 2]), "pooler"),
    "dinov2": (Dinov2Config(**TOKENS), "pooler"),
    "dinov2 with registers": (Dinov2WithRegistersConfig(**TOKENS), "pooler"),
    "dinov3": (DINOv3ViTConfig(**TOKENS), "pooler"),
    "beit": (BeitConfig(**TOKENS), "pooler"),
    "clip": (CLIPVisionConfig(**TOKENS), "pooler"),
    "siglip": (SiglipVisionConfig(**TOKENS), "pooler"),
}  # fmt: skip
CLASSIFIERS = {"resnet", "convnext", "convnextv2", "vit", "vit, mocov3", "deit", "swin", "dinov2", "beit"}


def images(encoder: ImageEncoder, count: int = 6) -> torch.Tensor:
    return torch.randn(count, encoder.num_channels, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_from_training_to_stock_classes(family, tmp_path, caplog):
    config, pools = FAMILIES[family]
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
        assert_close(again(pixels), expected)  # where weights lie in memory may choose another kernel
        if family != "resnet, small stem":  # its stem has another shape than the stock one
            stock = AutoModel.from_pretrained(tmp_path).eval()
            output = stock(pixel_values=pixels)
            pooled = output.last_hidden_state[:, 0] if pools == "cls" else output.pooler_output.flatten(1)
            assert_close(pooled, expected)
    if family in CLASSIFIERS:
        with warnings.catch_warnings(action="ignore"):  # a fresh head is what one wants here
            classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
        weights = dict(classifier.named_parameters())
        shared = [name for name in encoder.backbone.state_dict() if f"{classifier.base_model_prefix}.{name}" in weights]
        assert len(shared) > 4
        for name in shared:
            assert torch.equal(weights[f"{classifier.base_model_prefix}.{name}"], encoder.backbone.state_dict()[name])


def test_pooling_is_chosen_and_kept(tmp_path):
    encoder = new_image_encoder(ViTConfig(**TOKENS), pooling="mean").eval()
    pixels = images(encoder)
    with torch.no_grad():
        tokens = encoder.backbone(pixel_values=pixels).last_hidden_state
        assert torch.equal(encoder(pixels), tokens.mean(1))
        encoder.save_pretrained(tmp_path)
        assert torch.equal(build_image_encoder(str(tmp_path)).eval()(pixels), tokens.mean(1))
        assert torch.equal(build_image_encoder(str(tmp_path), pooling="cls").eval()(pixels), tokens[:, 0])
    convolutional = new_image_encoder(FAMILIES["resnet"][0], pooling="mean").eval()
    with torch.no_grad():
        maps = convolutional.backbone(pixel_values=pixels).last_hidden_state
        assert torch.equal(convolutional(pixels), maps.mean((2, 3)))


@pytest.mark.parametrize(
    "family, pooling, message",
    [
        ("swin", "cls", "swin has no class token; accepted: auto, mean, pooler"),
        ("siglip", "cls", "siglip_vision_model has no class token"),
        ("resnet", "cls", "a convolutional network has no class token"),
        ("vit", "pooler", "vit has no pooler"),
    ],
)
def test_pooling_that_is_not_there(family, pooling, message):
    with pytest.raises(InputError, match=message):
        encoder = new_image_encoder(FAMILIES[family][0], pooling=pooling)
        encoder(images(encoder))


@pytest.mark.parametrize("full, config", [(CLIPModel, CLIPConfig), (SiglipModel, SiglipConfig)])
def test_the_vision_tower_of_a_model_of_two(full, config, tmp_path):
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    whole = full(config(text_config=text, vision_config=TOKENS)).eval()
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
    assert new_image_encoder(IMAGE_CONFIGS["digits"]()).num_channels == 1


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


def test_mocov3s_first_weights():
    config = ViTConfig(**TOKENS)
    config.fixed_positions = True
    backbone = new_image_encoder(config).backbone
    assert torch.equal(backbone.embeddings.position_embeddings.data, sincos_positions(4, 4, 32))
    assert backbone.embeddings.cls_token.abs().max() < 1e-4
    query = backbone.layers[0].attention.q_proj.weight
    bound = (6 / 64) ** 0.5
    assert 0.9 * bound < query.abs().max() <= bound
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    assert 0.9 * bound < backbone.embeddings.patch_embeddings.projection.weight.abs().max() <= bound
    trained = sum(p.numel() for p in new_image_encoder(IMAGE_CONFIGS["vit-small"]()).parameters() if p.requires_grad)
    assert trained == pytest.approx(21.29e6, rel=2e-3)


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"--model_name_or_path: no such folder \./absent"):
        build_image_encoder("./absent")
    BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "bert"
    )
    with pytest.raises(InputError, match="bert is no image model"):
        build_image_encoder(str(tmp_path / "bert"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match=r"no file named model\.safetensors"):
        build_image_encoder(str(tmp_path / "broken"))
    encoder = new_image_encoder(FAMILIES["vit"][0])
    with pytest.raises(InputError, match="--image_size 4 does not fit vit: "):
        encoder.width(4)

    def broken_torchvision(*args, **kwargs):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(encoder_module.AutoConfig, "from_pretrained", broken_torchvision)
    with pytest.raises(InputError, match=r"torchvision is installed but broken .*nms.*: uninstall it") as error:
        build_image_encoder(str(tmp_path))
    assert "\n" not in str(error.value)


def test_nothing_but_the_poolers_is_dropped():
    encoder = new_image_encoder(FAMILIES["vit"][0])
    assert encoder.backbone.pooler is None
    assert isinstance(new_image_encoder(FAMILIES["resnet"][0], pooling="mean").backbone.pooler, nn.AdaptiveAvgPool2d)
