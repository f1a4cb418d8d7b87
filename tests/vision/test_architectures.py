"""The digits' architecture opens in stock classes; the stem for small images has a model type of its own."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    ResNetConfig,
    ResNetModel,
    ViTImageProcessorPil,
    pipeline,
)

from fmicl_text.vision.architectures import IMAGE_CONFIGS, SmallStemResNet, SmallStemResNetConfig
from fmicl_text.vision.encoder import build_image_encoder, new_image_encoder
from fmicl_text.vision.model import ImageContrastiveModel
from tests.support import STAGES, tiny_small_image_resnet

SMALL = [name for name in IMAGE_CONFIGS if name.endswith("-small") and name.startswith("resnet")]


def pixels(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def in_a_process_without_fmicl_text(code: str, *arguments: object) -> subprocess.CompletedProcess:
    script = f"import sys, torch\n{code}\nassert 'fmicl_text' not in sys.modules"
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def small(tmp_path):
    """A folder of an encoder with the small stem, whose batch statistics are not the initial ones."""
    torch.manual_seed(0)
    encoder = new_image_encoder(tiny_small_image_resnet())
    with torch.no_grad():
        encoder.train()(pixels())
    size = {"height": 32, "width": 32}
    encoder.eval().save_pretrained(tmp_path / "small", ViTImageProcessorPil(size=size))
    return encoder, tmp_path / "small"


@pytest.mark.slow
def test_the_digits_encoder_opens_where_transformers_is_installed(tmp_path):
    """In a process that does not import fmicl_text, with pictures of every mode."""
    torch.manual_seed(0)
    config = IMAGE_CONFIGS["digits"]()
    assert type(config) is ResNetConfig and config.num_channels == 3
    encoder = new_image_encoder(config).eval()
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(0.31e6, rel=0.01)
    size = {"height": 32, "width": 32}
    encoder.save_pretrained(tmp_path / "out", ViTImageProcessorPil(size=size, do_convert_rgb=True))
    picture = Image.effect_noise((8, 8), 60)
    picture.save(tmp_path / "picture.png")
    code = """from transformers import AutoImageProcessor, AutoModel
processor, model = AutoImageProcessor.from_pretrained(sys.argv[1]), AutoModel.from_pretrained(sys.argv[1])
picture = __import__("PIL.Image").Image.open(sys.argv[2])
modes = [picture.convert(mode) for mode in ("L", "RGB", "RGBA", "P", "1")]
inputs = processor(modes, return_tensors="pt")
with torch.no_grad():
    features = model.eval()(**inputs).pooler_output.flatten(1)
torch.save((inputs["pixel_values"], features), sys.argv[3])"""
    done = in_a_process_without_fmicl_text(code, tmp_path / "out", tmp_path / "picture.png", tmp_path / "features.pt")
    assert done.returncode == 0, done.stderr
    inputs, features = torch.load(tmp_path / "features.pt")
    with torch.no_grad():
        assert_close(encoder(inputs), features)
    assert_close(features[1], features[0])
    extracted = torch.tensor(pipeline("image-feature-extraction", model=str(tmp_path / "out"), device="cpu")(picture))
    assert_close(extracted.mean((2, 3))[0], features[0])


@pytest.mark.parametrize("name", SMALL)
def test_the_small_stem_in_auto_classes(name, tmp_path):
    torch.manual_seed(0)
    config = IMAGE_CONFIGS[name]()
    assert (type(config), config.model_type) == (SmallStemResNetConfig, "resnet_small_stem")
    backbone = AutoModel.from_config(config).eval()
    assert type(backbone) is SmallStemResNet
    backbone.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is SmallStemResNet and type(AutoConfig.from_pretrained(tmp_path)) is SmallStemResNetConfig
    for weight, expected in zip(again.state_dict().items(), backbone.state_dict().items(), strict=True):
        assert weight[0] == expected[0] and torch.equal(weight[1], expected[1])
    assert again.embedder.embedder.convolution.weight.shape == (config.embedding_size, 3, 3, 3)


def test_the_small_stem_reloads_exactly(small):
    encoder, folder = small
    for again in (build_image_encoder(str(folder)).backbone, AutoModel.from_pretrained(folder)):
        assert isinstance(again, SmallStemResNet)
        with torch.no_grad():
            assert torch.equal(again.eval()(pixels()).pooler_output.flatten(1), encoder(pixels()))
    assert isinstance(AutoImageProcessor.from_pretrained(folder), ViTImageProcessorPil)


def test_a_model_without_a_processor_file_has_the_one_of_resnet(small):
    """A folder whose preprocessor_config.json does not name a class: it is that of the model type."""
    _, folder = small
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}}))
    assert isinstance(AutoImageProcessor.from_pretrained(folder), ConvNextImageProcessorPil)


def test_a_classifier_starts_from_the_weights(small):
    encoder, folder = small
    classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=3)
    saved = encoder.backbone.state_dict()
    loaded = classifier.resnet.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    classifier(pixels(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert classifier.resnet.embedder.embedder.convolution.weight.grad.abs().max() > 0
    classifier.save_pretrained(folder.with_name("classifier"))
    again = AutoModelForImageClassification.from_pretrained(folder.with_name("classifier")).eval()
    with torch.no_grad():
        assert torch.equal(again(pixels()).logits, classifier.eval()(pixels()).logits)


def test_pipelines_with_the_small_stem(small):
    encoder, folder = small
    picture = Image.effect_noise((40, 32), 60).convert("RGB")
    inputs = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")
    extracted = torch.tensor(pipeline("image-feature-extraction", model=str(folder), device="cpu")(picture))
    with torch.no_grad():
        assert_close(extracted.mean((2, 3)), encoder(inputs["pixel_values"]))
    AutoModelForImageClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    assert len(pipeline("image-classification", model=str(folder), device="cpu")(picture)) == 3


@pytest.mark.slow
def test_without_fmicl_text_the_type_is_named(small):
    code = """from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers import AutoModelForImageClassification, pipeline
AutoImageProcessor.from_pretrained(sys.argv[1])
for kind in (AutoConfig, AutoModel, AutoModelForImageClassification, pipeline):
    try:
        kind("image-feature-extraction", sys.argv[1]) if kind is pipeline else kind.from_pretrained(sys.argv[1])
    except ValueError as error:
        print(error)"""
    done = in_a_process_without_fmicl_text(code, small[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("has model type `resnet_small_stem` but Transformers does not recognize this") == 4


def as_written_before(folder, **changes):
    """Rewrite config.json as earlier versions wrote it: type resnet, with a field for the stem."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "resnet", "small_image_stem": True}
    path.write_text(json.dumps(config | {"architectures": ["SmallStemResNet"]} | changes))


def test_a_folder_of_an_earlier_version_opens_and_is_saved_as_new(small, tmp_path):
    encoder, folder = small
    as_written_before(folder, image_pooling="mean")
    again = build_image_encoder(str(folder)).eval()
    assert (again.pooling, type(again.backbone)) == ("mean", SmallStemResNet)
    assert again.backbone.config.model_type == "resnet_small_stem"
    saved, read = encoder.state_dict(), again.state_dict()
    assert saved.keys() == read.keys() and all(torch.equal(saved[name], read[name]) for name in saved)
    again.save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (written["model_type"], written["image_pooling"]) == ("resnet_small_stem", "mean")
    assert "small_image_stem" not in written
    with torch.no_grad():
        assert torch.equal(build_image_encoder(str(tmp_path / "new")).eval()(pixels()), again(pixels()))


def test_a_stock_resnet_of_an_earlier_version_stays_stock(tmp_path):
    """They were written with `small_image_stem: false`."""
    config = ResNetConfig(embedding_size=8, layer_type="basic", **STAGES)
    config.small_image_stem = False
    new_image_encoder(config).save_pretrained(tmp_path)
    backbone = build_image_encoder(str(tmp_path)).backbone
    assert (type(backbone), backbone.embedder.embedder.convolution.kernel_size) == (ResNetModel, (7, 7))


def test_a_checkpoint_of_an_earlier_version_is_resumed(small, tmp_path):
    def model(encoder):
        return ImageContrastiveModel(encoder, 32, head_dim=8)

    wrapped = model(small[0])
    wrapped.save_encoder(str(tmp_path), wrapped.state_dict())
    wrapped.save_training_only(str(tmp_path), wrapped.state_dict())
    as_written_before(tmp_path)
    other = model(new_image_encoder(tiny_small_image_resnet()))
    other.load_checkpoint(str(tmp_path))
    assert all(torch.equal(other.state_dict()[name], weight) for name, weight in wrapped.state_dict().items())


@pytest.mark.slow
def test_the_command_line_tools_with_the_small_stem(small, tmp_path):
    """In a process that has not imported the architecture: it can be pushed, and the text tools name it."""
    code = """import os, sys
from fmicl_text.cli.main import main
from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoders import open_encoder
from fmicl_text.text.model import build_text_encoder
for opener in (open_encoder, build_text_encoder):
    try:
        opener(sys.argv[1])
    except InputError as error:
        print(error)
sys.argv = ["fmicl-text", "push", sys.argv[1], "user/images", "--dry-run"]
main()"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(small[1])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("it is an image encoder (resnet_small_stem); fmicl_text.vision.encoder.build_image_") == 2
    assert "config.json" in done.stdout and "model.safetensors" in done.stdout
