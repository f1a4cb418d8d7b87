"""Numbers that a run measured, in its settings.yaml: used again for the same run, else measured again."""

import pytest
import yaml

from fmicl_text import InputError
from fmicl_text.cli.identity import settings_to_repeat
from fmicl_text.cli.parser import resolved_settings
from fmicl_text.cli.text import parse_args
from fmicl_text.cli.vision import parse_vision_args
from fmicl_text.training.output_dir import settings_text

NUMBERS = {"gamma": 12.5, "alpha": 34567.8}
AGAIN = "measured for other settings or data, and "


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A function that writes the settings.yaml of a finished run with some flags, and returns it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("a.txt", "b.txt", "dev.tsv", "model/config.json"):
        (tmp_path / name).write_text(name)

    def write(parse, *flags):
        data = ["--train_file", "a.txt"] if parse is parse_args else ["--train_file", "images"]
        given = parse([*data, "--model_name_or_path", "model", "--use_cpu", "True", *flags])
        settings = resolved_settings(*given)
        hyperparameters = given[-1].build_loss().hyperparameters
        run = {"settings": settings, "hyperparameters": hyperparameters | {
            name: number for name, number in NUMBERS.items() if hyperparameters.get(name) == "auto"}}  # fmt: skip
        (tmp_path / "settings.yaml").write_text(settings_text(settings_to_repeat(run, given[-1])))
        return tmp_path / "settings.yaml"

    return write


def numbers_of(parse, *flags):
    args = parse(["--config", "settings.yaml", *flags])[-1]
    return args.gamma, args.alpha


MEASURED = (12.5, 34567.8)


@pytest.mark.parametrize("parse", [parse_args, parse_vision_args])
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--learning_rate", "0.01", "--max_steps", "7", "--output_dir", "other", "--logging_steps", "1"),
        ("--gamma", "auto", "--alpha", "auto"),
        ("--weight_decay", "0", "--optim", "adamw_torch", "--save_strategy", "steps", "--num_train_epochs", "3"),
    ],
    ids=str,
)
def test_the_same_measurement_is_not_repeated(finished, capsys, parse, flags):
    content = yaml.safe_load(finished(parse).read_text())
    assert (content["gamma"], content["alpha"]) == MEASURED
    assert numbers_of(parse, *flags) == MEASURED and AGAIN not in capsys.readouterr().out


CHANGES = [
    (parse_args, "--divergence js"),
    (parse_args, "--divergence tsallis --tsallis_order 1.5"),
    (parse_args, "--train_file b.txt"),
    (parse_args, "--train_file a.txt b.txt"),
    (parse_args, "--max_train_samples 5"),
    (parse_args, "--model_name_or_path other"),
    (parse_args, "--model_revision v2"),
    (parse_args, "--pooling mean"),
    (parse_args, "--dropout 0.3"),
    (parse_args, "--head simcse"),
    (parse_args, "--views crops delete"),
    (parse_args, "--max_seq_length 64"),
    (parse_args, "--prompts query:"),
    (parse_args, "--sts_dev_file dev.tsv"),  # no texts are held out then
    (parse_args, "--negatives both"),
    (parse_args, "--similarity cosine"),
    (parse_args, "--per_device_train_batch_size 16"),
    (parse_args, "--seed 7"),
    (parse_vision_args, "--divergence js"),
    (parse_vision_args, "--views gray"),
    (parse_vision_args, "--image_size 48"),
    (parse_vision_args, "--head_dim 64"),
    (parse_vision_args, "--method mocov3"),
    (parse_vision_args, "--held_out 7"),
]


@pytest.mark.parametrize("parse, flags", CHANGES, ids=lambda value: getattr(value, "__name__", value))
def test_another_measurement_is_repeated(finished, capsys, parse, flags):
    finished(parse)
    assert numbers_of(parse, *flags.split()) == ("auto", "auto")
    lines = [line for line in capsys.readouterr().out.splitlines() if AGAIN in line]
    assert lines == [f"--config settings.yaml: its gamma and alpha were {AGAIN}are measured again"]


@pytest.mark.parametrize("parse", [parse_args, parse_vision_args])
def test_numbers_that_are_given_are_kept(finished, capsys, parse):
    finished(parse, "--alpha", "55")  # gamma alone was measured
    assert numbers_of(parse) == (12.5, 55.0)
    assert numbers_of(parse, "--alpha", "7") == (12.5, 7.0) and AGAIN not in capsys.readouterr().out
    assert numbers_of(parse, "--divergence", "js") == ("auto", 55.0)
    assert f"settings.yaml: its gamma was {AGAIN}is measured again" in capsys.readouterr().out
    finished(parse)
    assert numbers_of(parse, "--alpha", "34567.8", "--divergence", "js") == ("auto", 34567.8)
    assert numbers_of(parse, "--alpha", "7") == (12.5, 7.0)
    capsys.readouterr()
    assert numbers_of(parse, "--gamma", "10") == (10.0, "auto")  # alpha depends on gamma
    assert f"settings.yaml: its alpha was {AGAIN}is measured again" in capsys.readouterr().out
    assert numbers_of(parse, "--gamma", "10", "--alpha", "5", "--seed", "7") == (10.0, 5.0)
    assert AGAIN not in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["infonce", "align_uniform", "spectral"])
def test_another_objective_has_its_own_hyperparameters(finished, capsys, objective):
    finished(parse_args)
    args = parse_args(["--config", "settings.yaml", "--objective", objective])[-1]
    assert (args.gamma, args.alpha) == (None, None) and AGAIN not in capsys.readouterr().out


@pytest.mark.parametrize("edit", [("a.txt", "other"), ("model/config.json", "other")])
def test_other_content_of_the_same_files(finished, capsys, tmp_path, edit):
    finished(parse_args)
    (tmp_path / edit[0]).write_text(edit[1])
    assert numbers_of(parse_args) == ("auto", "auto") and AGAIN in capsys.readouterr().out


def test_a_moved_file_is_the_same_data(finished, capsys, tmp_path):
    finished(parse_args)
    (tmp_path / "a.txt").rename(tmp_path / "moved.txt")
    assert numbers_of(parse_args, "--train_file", "moved.txt") == MEASURED


def test_a_file_that_was_edited(finished, capsys):
    file = finished(parse_args)
    text = file.read_text()
    file.write_text(text.replace("divergence: kl", "divergence: js"))
    assert numbers_of(parse_args) == ("auto", "auto") and AGAIN in capsys.readouterr().out
    file.write_text(text.replace("alpha: 34567.8", "alpha: 9.0", 1).replace("max_seq_length: 32", "max_seq_length: 64"))
    assert numbers_of(parse_args) == ("auto", 9.0)


def test_another_number_of_processes(finished, monkeypatch):
    finished(parse_args)
    monkeypatch.setattr("fmicl_text.training.args.FMICLTrainingArguments.world_size", 2)
    assert numbers_of(parse_args) == ("auto", "auto")


@pytest.mark.parametrize("measured", ["7", "[gamma]", "{gamma: x}", "{alpha: -1.0}", "{seed: 4.0}", "{alpha: true}"])
def test_what_no_run_wrote_is_one_line(finished, measured):
    file = finished(parse_args, "--gamma", "10", "--alpha", "5")
    assert "measured" not in file.read_text()
    file.write_text(f"{file.read_text()}measured: {measured}\n")
    with pytest.raises(InputError, match=r"^--config settings.yaml: measured must be as a run wrote it, got "):
        numbers_of(parse_args)


def test_it_is_no_flag(finished):
    with pytest.raises(InputError, match=r"^--measured can only be in a settings.yaml"):
        parse_args(["--measured", "{}"])
