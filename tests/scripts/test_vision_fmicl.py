"""The vision recipe, as a program in this process: digits by default, every objective, files, resuming, errors."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits as load_sklearn_digits
from transformers import AutoImageProcessor, AutoModel, ViTConfig, pipeline

from fmicl_text.cli.parser import resolved_settings
from fmicl_text.cli.vision import parse_vision_args
from fmicl_text.errors import InputError
from fmicl_text.vision.data import load_digits
from fmicl_text.vision.encoder import build_image_encoder, new_image_encoder
from fmicl_text.vision.encoding import encode_images
from fmicl_text.vision.preprocessing import open_preprocessing
from tests.support import TINY_VIT, image_parquet, picture, words_missing

SCRIPT = Path(__file__).parent.parent.parent / "recipes" / "vision_fmicl.py"
SHORT = ["--num_train_epochs", "1", "--per_device_train_batch_size", "32", "--disable_tqdm", "True"]


@pytest.fixture(autouse=True)
def few_digits(monkeypatch, request):
    """A fifth of the digits: enough to run on."""
    if "complete" in request.node.name:
        return
    digits = load_sklearn_digits()
    few = SimpleNamespace(images=digits.images[:400], target=digits.target[:400], target_names=digits.target_names)
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: few)


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["vision_fmicl.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT))["main"]()


@pytest.mark.slow
def test_digits_from_nothing_to_a_folder_that_opens(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    main(monkeypatch, "--divergence", "js", "--held_out", 100, "--output_dir", out, *SHORT)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "digits:" in line]
    assert not words_missing(line, "scikit-learn's 300 100 classes"), line
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows == ["features", "raw pixels", "before training", "after training"]
    results = json.loads((out / "results.json").read_text())
    assert (
        results["objective"] == "fmicl-js"
        and results["hyperparameters"]["alpha"] > 1
        and 5 <= results["hyperparameters"]["gamma"] <= 20
    )
    assert results["steps"] == 9 and [row["features"] for row in results["data"]["probes"]] == rows[1:]
    assert {"loss_positive", "alignment"} <= {key for entry in results["log_history"] for key in entry}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "settings.yaml", "training_curve.png"} <= {
        path.name for path in out.iterdir()
    }
    encoder = build_image_encoder(str(out))
    preprocessing = open_preprocessing(str(out), encoder.num_channels)
    features = encode_images(encoder, load_digits(encoder.num_channels).test.take(slice(5)), preprocessing)
    assert features.shape[0] == 5 and features.isfinite().all() and features.std(0).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["infonce", "align_uniform", "spectral"])
def test_the_baselines(monkeypatch, tmp_path, objective):
    out = tmp_path / "out"
    flags = ["--objective", objective, "--held_out", 100, "--probes", "False", "--max_steps", 1, "--output_dir", out]
    main(monkeypatch, *flags, *SHORT[2:])
    results = json.loads((out / "results.json").read_text())
    assert results["objective"] == objective
    if objective == "infonce":
        assert results["hyperparameters"]["temperature"] == 0.5


QUEUE_WARNING = ".*f-MICL.*queue"


@pytest.mark.slow
@pytest.mark.parametrize("objective", [["--divergence", "js"], ["--objective", "infonce"]], ids=str)
@pytest.mark.parametrize("method", ["moco", "mocov3"])
def test_moco(monkeypatch, capsys, tmp_path, method, objective):
    """The output folder, the run record, settings that can be run again, and an export without momentum encoder."""
    monkeypatch.chdir(tmp_path)
    flags = ["--method", method, *objective, "--held_out", 100, "--probes", "False", "--max_steps", 2, *SHORT[2:]]
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


def test_a_queue_with_a_given_alpha_warns(recwarn):
    parse_vision_args(["--method", "moco", "--objective", "infonce"])
    parse_vision_args(["--method", "mocov3", "--alpha", "40"])
    parse_vision_args(["--method", "moco"])
    assert not recwarn.list
    with pytest.warns(UserWarning, match=QUEUE_WARNING):
        parse_vision_args(["--method", "moco", "--alpha", "40"])


@pytest.mark.slow
def test_lars(monkeypatch, tmp_path):
    flags = ["--optim", "lars", "--held_out", 100, "--probes", "False", "--max_steps", 2, *SHORT[2:]]
    flags += ["--output_dir", tmp_path / "out"]
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
        tmp_path / "out", "--probes", "False", *SHORT[2:],
    ]  # fmt: skip
    main(monkeypatch, *flags)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "digits:" in line]
    assert not words_missing(line, "240 100"), line
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = {e["step"]: e["eval_knn_accuracy"] for e in results["log_history"] if "eval_knn_accuracy" in e}
    verdict, best = results["verdict"], max(scores[step] for step in (1, 2, 3))
    assert scores[verdict["step"]] == verdict["after"] == best and verdict["before"] == scores[0]
    assert scores[results["best_step"]] == results["after"]["eval_knn_accuracy"]
    assert results["best_step"] == (verdict["step"] if best - scores[0] > 2 * verdict["standard_error"] else 0)
    assert verdict["num_items"] == 60 and "on 60 held-out images)" in verdict["text"]


@pytest.mark.slow
def test_large_images_of_many_sizes_are_cropped_by_workers(monkeypatch, capsys, tmp_path):
    sizes = [(120, 100), (90, 140), (33, 40)]
    path = image_parquet(tmp_path, [picture(size=sizes[i % 3], seed=i, kind="JPEG") for i in range(40)])
    flags = [
        "--train_file", path, "--held_out", 10, "--architecture", "resnet-8-small", "--views", "mocov3",
        "--max_steps", 4, "--per_device_train_batch_size", 8, "--head_dim", 16, "--disable_tqdm", "True",
        "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", 2, "--dataloader_num_workers", 1,
        "--probes", "False",
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
    flags += [*SHORT[2:], "--probes", "False", "--save_total_limit", 5]
    for name in ("first", "second"):
        main(monkeypatch, *flags, "--output_dir", tmp_path / name)
    resumed = tmp_path / "first"
    main(monkeypatch, *flags, "--output_dir", resumed, "--resume_from_checkpoint", resumed / "checkpoint-2")
    weights = [build_image_encoder(str(tmp_path / name)).state_dict() for name in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    main(monkeypatch, *flags, "--output_dir", tmp_path / "third", "--seed", 7)
    other = build_image_encoder(str(tmp_path / "third")).state_dict()
    assert any(not torch.equal(weights[0][name], other[name]) for name in other)


@pytest.mark.slow
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


def test_defaults_are_the_papers_without_its_gamma_and_alpha():
    model, data, args = parse_vision_args(["--train_file", "x.parquet"])
    assert (model.architecture, model.head_dim, model.views) == ("resnet-18-small", 512, "cifar")
    assert (args.per_device_train_batch_size, args.learning_rate, args.num_train_epochs) == (512, 0.1, 800)
    assert (
        args.build_loss().hyperparameters["gamma"] == "auto"
        and args.build_loss().hyperparameters["alpha"] == "auto"
        and data.held_out is None
    )
    assert args.output_dir == "runs/vision-fmicl-kl"
    model, _, args = parse_vision_args([])
    assert (model.architecture, model.image_size, args.num_train_epochs) == ("digits", 32, 20)


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


SMALL = [
    "--architecture", "resnet-8-small", "--image_size", 16, "--head_dim", 16, "--per_device_train_batch_size", 8,
    "--disable_tqdm", "True",
]  # fmt: skip


def pets(folder, count=20, sizes=((40, 30), (30, 36)), nested=True):
    """A folder of two classes that differ in color; returns its path."""
    rng = np.random.default_rng(0)
    for name, color in (("cats", (200, 60, 40)), ("dogs", (30, 60, 200))):
        for i in range(count):
            pixels = (np.array(color) + rng.integers(-30, 30, (*sizes[i % 2][::-1], 3))).clip(0, 255)
            path = folder / name / f"{i}.jpg" if nested else folder / f"{name}{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def table_of(printed):
    """The printed table, as a list of dictionaries."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], row, strict=True)) for row in lines[2:]]


@pytest.mark.slow
def test_two_classes_in_folders(monkeypatch, capsys, tmp_path):
    """The rows of such a folder are sorted by class: images of both are held out, and both are trained on."""
    folder = pets(tmp_path / "pets")
    main(monkeypatch, "--train_file", folder, *SMALL, "--max_steps", 4, "--output_dir", tmp_path / "out")
    printed = capsys.readouterr().out
    assert not words_missing(printed, "32 8 cats dogs"), printed
    rows = table_of(printed)
    assert [row["features"] for row in rows] == ["raw pixels", "before training", "after training"]
    assert float(rows[0]["k-NN, k = 20"]) == 100 and float(rows[2]["k-NN, k = 20"]) >= 75
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["after"]["eval_knn_accuracy"] > 0 and results["data"]["rows"] == 32


@pytest.mark.slow
def test_images_without_classes(monkeypatch, capsys, tmp_path):
    folder = pets(tmp_path / "photos", nested=False)
    main(monkeypatch, "--train_file", folder, *SMALL, "--max_steps", 4, "--output_dir", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "no classes" in printed
    rows = table_of(printed)
    assert [row["features"] for row in rows] == ["raw pixels", "before training", "after training"]
    assert not any("k-NN" in name or "labels" in name for name in rows[0])
    assert all(0 <= float(row["view retrieval"]) <= 100 for row in rows)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["after"]["eval_view_retrieval"] == pytest.approx(results["data"]["probes"][2]["view retrieval"])


@pytest.mark.slow
def test_official_test_images_are_not_trained_on(monkeypatch, capsys, tmp_path):
    pets(tmp_path / "data" / "train", 12)
    pets(tmp_path / "data" / "val", 5)
    main(monkeypatch, "--train_file", tmp_path / "data", *SMALL, "--max_steps", 1, "--output_dir", tmp_path / "out")
    printed = capsys.readouterr().out
    assert not words_missing(printed, "24 10"), printed
    settings = [*SMALL, "--max_steps", 1, "--output_dir", tmp_path / "two"]
    main(monkeypatch, "--train_file", tmp_path / "data" / "train", "--test_file", tmp_path / "data" / "val", *settings)
    a, b = (build_image_encoder(str(tmp_path / name)).state_dict() for name in ("out", "two"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(InputError, match="held_out"):
        flags = ["--held_out", 3, "--output_dir", tmp_path / "three"]
        main(monkeypatch, "--train_file", tmp_path / "data", *SMALL, *flags)


@pytest.mark.slow
def test_probes_can_be_switched_off(monkeypatch, capsys, tmp_path):
    folder = pets(tmp_path / "pets")
    out = tmp_path / "out"
    main(monkeypatch, "--train_file", folder, *SMALL, "--max_steps", 2, "--probes", "False", "--output_dir", out)
    assert "raw pixels" not in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert "eval_knn_accuracy" in results["after"] and "probes" not in results["data"]
    nothing = ["--held_out", 0, "--output_dir", tmp_path / "all", "--max_steps", 2]
    main(monkeypatch, "--train_file", folder, *SMALL, *nothing)
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    assert results["after"] == {} and results["data"]["rows"] == 40


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--save_strategy", "best"], "save_strategy=best"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "lr_scheduler_type=reduce_lr_on_plateau"),
        (["--eval_on_start", "True"], "eval_on_start=True"),
        (["--metric_for_best_model", "knn_accuracy"], "metric_for_best_model=knn_accuracy"),
    ],
)
def test_scores_need_held_out_images(monkeypatch, tmp_path, flags, message):
    flags = ["--held_out", 0, *flags, *SMALL, "--max_steps", 1, "--output_dir", tmp_path / "out"]
    with pytest.raises(InputError, match=f"^{message} needs scores of held-out images"):
        main(monkeypatch, *flags)


@pytest.mark.slow
def test_save_strategy_best_selects_by_the_score_of_the_images(monkeypatch, tmp_path):
    folder = pets(tmp_path / "photos", nested=False)
    flags = ["--train_file", folder, *SMALL, "--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 1]
    main(monkeypatch, *flags, "--save_strategy", "best", "--output_dir", tmp_path / "out")
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-1")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["best_metric"] == state["log_history"][-1]["eval_view_retrieval"]


@pytest.mark.parametrize("metric, lowest", [("eval_alignment", True), ("uniformity", True), ("effective_rank", False)])
def test_metrics_of_which_lower_values_are_better(metric, lowest):
    *_, args = parse_vision_args(["--metric_for_best_model", metric, "--load_best_model_at_end", "True"])
    assert args.greater_is_better is not lowest
    flags = ["--metric_for_best_model", metric, "--greater_is_better", "True"]
    assert parse_vision_args(flags)[-1].greater_is_better is True


def test_the_best_checkpoint_needs_evaluations():
    with pytest.raises(InputError, match="load_best_model_at_end=True needs eval_strategy"):
        parse_vision_args(["--load_best_model_at_end", "True", "--eval_strategy", "no", "--validation", "10"])


@pytest.mark.slow
def test_disable_tqdm_hides_the_bar_of_the_check(monkeypatch, capfd, tmp_path):
    folder = pets(tmp_path / "pets", 8)
    main(monkeypatch, "--train_file", folder, *SMALL, "--max_steps", 1, "--output_dir", tmp_path / "out")
    assert "check images" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_stream_of_images(monkeypatch, capsys, tmp_path):
    path = image_parquet(tmp_path, [picture(size=(20 + i % 2, 20), seed=i) for i in range(60)])
    flags = ["--train_file", path, *SMALL, "--streaming", "True", "--max_steps", 4, "--held_out", 12]
    with pytest.raises(InputError, match="max_steps"):
        main(monkeypatch, *flags[:-4], "--output_dir", tmp_path / "none")
    flags += ["--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "no"]
    for name in ("first", "second"):
        main(monkeypatch, *flags, "--output_dir", tmp_path / name)
    first = tmp_path / "first"
    main(monkeypatch, *flags, "--output_dir", first, "--resume_from_checkpoint", first / "checkpoint-2")
    a, b = (build_image_encoder(str(tmp_path / name)).state_dict() for name in ("first", "second"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_training_on_the_complete_digits_helps_and_the_folder_opens_in_stock_classes(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    main(monkeypatch, "--divergence", "js", "--max_steps", 30, "--output_dir", out, "--disable_tqdm", "True")
    rows = {row["features"]: row for row in table_of(capsys.readouterr().out)}
    before, after = (float(rows[f"{when} training"]["5 labels per class"].split()[0]) for when in ("before", "after"))
    assert after > before + 5
    processor, model = AutoImageProcessor.from_pretrained(out), AutoModel.from_pretrained(out).eval()
    digit = Image.fromarray((load_sklearn_digits().images[0] * 255 / 16).astype(np.uint8))
    with torch.no_grad():
        features = model(**processor(digit, return_tensors="pt")).pooler_output.flatten(1)
        ours = build_image_encoder(str(out)).eval()(processor(digit, return_tensors="pt")["pixel_values"])
    assert features.shape[1] >= 64
    torch.testing.assert_close(features, ours, atol=1e-5, rtol=0)


def test_the_line_about_images_is_one_line_and_nothing_else_with_disable_tqdm(monkeypatch, tmp_path, capfd):
    for name in ("a\nb", "c\x1b[31md"):
        for i in range(6):
            path = tmp_path / "data" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(seed=len(name) * 10 + i)["bytes"])
    options = ["--train_file", tmp_path / "data", "--architecture", "resnet-8-small", "--image_size", 16]
    options += ["--max_steps", 1, "--per_device_train_batch_size", 4, "--probes", False, "--disable_tqdm", True]
    main(monkeypatch, "--divergence", "js", "--output_dir", tmp_path / "out", *options)
    printed = capfd.readouterr()
    assert r"10 images to train on, 2 test images, 2 classes (a\nb, c\x1b[31md)" in printed.out
    assert "check images" not in printed.err
