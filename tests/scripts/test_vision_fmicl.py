"""The vision recipe, as a program in this process: digits by default, every objective, files, resuming, errors."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoImageProcessor, ViTConfig, pipeline

from fmicl_text.cli.parser import resolved_settings
from fmicl_text.cli.vision import parse_vision_args
from fmicl_text.errors import InputError
from fmicl_text.vision.data import load_digits
from fmicl_text.vision.encoder import build_image_encoder, new_image_encoder
from fmicl_text.vision.model import encode_images
from tests.support import TINY_VIT, image_parquet, picture, words_missing

SCRIPT = Path(__file__).parent.parent.parent / "recipes" / "vision_fmicl.py"
SHORT = ["--num_train_epochs", "1", "--per_device_train_batch_size", "32", "--disable_tqdm", "True"]


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """A fifth of the digits: enough to run on."""
    digits = load_digits()
    few = type(digits)(digits.pixels[:400], digits.labels[:400], digits.source)
    monkeypatch.setattr("fmicl_text.vision.data.load_digits", lambda: few)


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["vision_fmicl.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT))["main"]()


def test_digits_from_nothing_to_a_folder_that_opens(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    main(monkeypatch, "--divergence", "js", "--held_out", 100, "--output_dir", out, *SHORT)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "digits:" in line]
    assert not words_missing(line, "scikit-learn's 300 100 0"), line
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["features", "raw pixels", "before training", "after training"]
    results = json.loads((out / "results.json").read_text())
    assert (
        results["objective"] == "fmicl-js"
        and results["hyperparameters"]["alpha"] == 40
        and results["hyperparameters"]["gamma"] == 1
    )
    assert results["steps"] == 9 and [row["features"] for row in results["data"]["probes"]] == rows[1:]
    assert {"loss_positive", "alignment"} <= {key for entry in results["log_history"] for key in entry}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "settings.yaml", "training_curve.png"} <= {
        path.name for path in out.iterdir()
    }
    encoder = build_image_encoder(str(out))
    processor = AutoImageProcessor.from_pretrained(out)
    assert processor.size["height"] == 16 and len(processor.image_mean) == 1
    with torch.no_grad():
        digits = load_digits()
        features = encode_images(
            encoder, digits.take(slice(5)), 16, tuple(processor.image_mean), tuple(processor.image_std)
        )
    assert features.shape == (5, 128) and features.isfinite().all() and features.std(0).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["infonce", "align_uniform", "spectral"])
def test_the_baselines(monkeypatch, tmp_path, objective):
    out = tmp_path / "out"
    main(monkeypatch, "--objective", objective, "--held_out", 100, "--max_steps", 1, "--output_dir", out, *SHORT[2:])
    results = json.loads((out / "results.json").read_text())
    assert results["objective"] == objective
    if objective == "infonce":
        assert results["hyperparameters"]["temperature"] == 0.5


QUEUE_WARNING = ".*f-MICL.*queue"


@pytest.mark.slow
@pytest.mark.filterwarnings(f"ignore:{QUEUE_WARNING}")
@pytest.mark.parametrize("objective", [["--divergence", "js"], ["--objective", "infonce"]], ids=str)
@pytest.mark.parametrize("method", ["moco", "mocov3"])
def test_moco(monkeypatch, capsys, tmp_path, method, objective):
    """The output folder, the run record, settings that can be run again, and an export without momentum encoder."""
    monkeypatch.chdir(tmp_path)
    flags = ["--method", method, *objective, "--held_out", 100, "--max_steps", 2, *SHORT[2:]]
    flags += ["--queue_size", 128] if method == "moco" else []
    main(monkeypatch, *flags)
    (out,) = (tmp_path / "runs").iterdir()
    assert out.name == f"vision-{method}-{'fmicl-js' if objective[1] == 'js' else 'infonce'}"
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["method"] == method and results["settings"]["encoder_momentum"] == 0.99
    assert results["hyperparameters"]["negatives"] == (
        "queue" if method == "moco" else results["settings"]["negatives"]
    )
    assert not any("momentum_encoder" in name for name in build_image_encoder(str(out)).state_dict())
    main(monkeypatch, "--config", out / "settings.yaml", "--output_dir", "again")
    a, b = (build_image_encoder(str(folder)).state_dict() for folder in (out, tmp_path / "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_queue_with_fmicl_warns(recwarn):
    parse_vision_args(["--method", "moco", "--objective", "infonce"])
    parse_vision_args(["--method", "mocov3"])
    assert not recwarn.list
    with pytest.warns(UserWarning, match=QUEUE_WARNING):
        parse_vision_args(["--method", "moco"])


@pytest.mark.slow
def test_lars(monkeypatch, tmp_path):
    flags = ["--optim", "lars", "--held_out", 100, "--max_steps", 2, *SHORT[2:], "--output_dir", tmp_path / "out"]
    main(monkeypatch, *flags)
    settings = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
    assert settings["optim"] == "lars"
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(InputError) as error:
        main(monkeypatch, *flags, "--overwrite_output_dir", "True")
    assert not words_missing(str(error.value), "optim=lars pytorch-optimizer"), error.value


@pytest.mark.slow
def test_the_best_checkpoint_by_images_kept_aside(monkeypatch, capsys, tmp_path):
    flags = [
        "--held_out", 100, "--validation", 60, "--load_best_model_at_end", "True", "--save_strategy", "steps",
        "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--max_steps", 3, "--output_dir",
        tmp_path / "out", *SHORT[2:],
    ]  # fmt: skip
    main(monkeypatch, *flags)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "digits:" in line]
    assert not words_missing(line, "240 100"), line
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = {e["step"]: e["eval_knn_accuracy"] for e in results["log_history"] if "eval_knn_accuracy" in e}
    assert (
        scores[results["best_step"]] == max(scores[step] for step in (1, 2, 3)) == results["after"]["eval_knn_accuracy"]
    )


@pytest.mark.slow
def test_large_images_of_many_sizes_are_cropped_by_workers(monkeypatch, capsys, tmp_path):
    sizes = [(120, 100), (90, 140), (33, 40)]
    path = image_parquet(tmp_path, [picture(size=sizes[i % 3], seed=i, kind="JPEG") for i in range(40)])
    flags = [
        "--train_file", path, "--held_out", 10, "--architecture", "resnet-8-small", "--views", "mocov3",
        "--max_steps", 4, "--per_device_train_batch_size", 8, "--head_dim", 16, "--disable_tqdm", "True",
        "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", 2, "--dataloader_num_workers", 1,
    ]  # fmt: skip
    for name in ("first", "second"):
        main(monkeypatch, *flags, "--output_dir", tmp_path / name)
    resumed = tmp_path / "first"
    main(monkeypatch, *flags, "--output_dir", resumed, "--resume_from_checkpoint", resumed / "checkpoint-2")
    a, b = (build_image_encoder(str(tmp_path / name)).state_dict() for name in ("first", "second"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_a_resumed_one_too(monkeypatch, tmp_path):
    flags = [
        "--held_out",
        100,
        "--max_steps",
        4,
        "--save_strategy",
        "steps",
        "--save_steps",
        2,
        "--eval_strategy",
        "no",
    ]
    flags += [*SHORT[2:], "--save_total_limit", 5]
    for name in ("first", "second"):
        main(monkeypatch, *flags, "--output_dir", tmp_path / name)
    resumed = tmp_path / "first"
    main(monkeypatch, *flags, "--output_dir", resumed, "--resume_from_checkpoint", resumed / "checkpoint-2")
    weights = [build_image_encoder(str(tmp_path / name)).state_dict() for name in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    main(monkeypatch, *flags, "--output_dir", tmp_path / "third", "--seed", 7)
    other = build_image_encoder(str(tmp_path / "third")).state_dict()
    assert any(not torch.equal(weights[0][name], other[name]) for name in other)


def test_a_vit_on_a_parquet_file_opens_in_the_pipeline(monkeypatch, tmp_path):
    """A model to start from, by its folder; stock classes open the result."""
    start, out = tmp_path / "vit", tmp_path / "out"
    new_image_encoder(ViTConfig(**TINY_VIT)).save_pretrained(start)
    path = image_parquet(tmp_path, [picture(size=(32, 32), seed=i) for i in range(40)])
    main(
        monkeypatch, "--train_file", path, "--held_out", 10, "--model_name_or_path", start, "--max_steps", 1,
        "--per_device_train_batch_size", 8, "--optim", "adamw_torch", "--learning_rate", "1e-3", "--head_dim", 16,
        "--views", "mocov3", "--output_dir", out, "--disable_tqdm", "True",
    )  # fmt: skip
    features = pipeline("image-feature-extraction", model=str(out), device="cpu")
    image = tmp_path / "one.png"
    image.write_bytes(picture(size=(32, 32))["bytes"])
    assert len(features(str(image))[0]) == 17  # class token and 4 x 4 patches


def test_defaults_are_the_papers():
    model, data, args = parse_vision_args(["--train_file", "x.parquet"])
    assert (model.architecture, model.head_dim, model.views) == ("resnet-18-small", 512, "cifar")
    assert (args.per_device_train_batch_size, args.learning_rate, args.num_train_epochs) == (512, 0.1, 800)
    assert (
        args.build_loss().hyperparameters["gamma"] == 1
        and args.build_loss().hyperparameters["alpha"] == 40
        and data.held_out == 5000
    )
    assert args.output_dir == "runs/vision-fmicl-kl"
    model, _, args = parse_vision_args([])
    assert (model.architecture, model.image_size, args.num_train_epochs) == ("digits", 16, 20)


CONFIGS = sorted((SCRIPT.parent / "configs" / "vision").rglob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_goes_with_a_baseline(config):
    _, _, args = parse_vision_args(["--config", str(config), "--train_file", "x.parquet", "--objective", "infonce"])
    assert args.build_loss().hyperparameters["temperature"] == 0.5


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("flags", [["--divergence", "vlc"], ["--divergence", "kl", "--similarity", "gaussian"]])
def test_every_config_parses(config, flags):
    model, _, args = parse_vision_args(["--config", str(config), "--train_file", "x.parquet", *flags])
    epochs = 1000 if config.stem.startswith("imagenet") else 800
    assert (args.gamma, args.alpha, args.num_train_epochs, model.head_dim) == (1, 40, epochs, 512)
    assert args.method == ("mocov3" if config.stem.startswith("imagenet") else "simclr")


def test_there_are_configs():
    assert len(CONFIGS) == 4


@pytest.mark.parametrize("flags", [["--divergence", "vlc", "--alpha", "7"], ["--objective", "infonce"]])
def test_resolved_settings_run_again_the_same(tmp_path, flags):
    given = parse_vision_args([*flags, "--train_file", "x.parquet", "--seed", "5", "--momentum", "0.8"])
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(resolved_settings(*given)))
    again = parse_vision_args(["--config", str(config)])
    assert again[:2] == given[:2]
    for name in ("seed", "momentum", "learning_rate", "optim", "weight_decay", "num_train_epochs", "lr_scheduler_type"):
        assert getattr(again[2], name) == getattr(given[2], name), name
    assert again[2].build_loss().hyperparameters == given[2].build_loss().hyperparameters
