"""Flags override the YAML file; every error is one line that names the argument."""

import re

import pytest
import yaml

from fmicl_text.cli.parser import FLAGS, add_dashes, resolved_settings
from fmicl_text.cli.text import announce, parse_args, without_evaluation
from fmicl_text.errors import InputError
from fmicl_text.losses import ContrastiveLoss
from fmicl_text.quickstart import ENCODER, PAIRS, PRESET, SENTENCES

MODEL = ["--model_name_or_path", "some-model", "--train_file", "a.txt", "--use_cpu", "True"]


def test_nothing_named_is_the_embedded_default_and_says_so_first():
    model, data, args = parse_args(["--divergence", "kl"])
    named = (model.model_name_or_path, data.train_file, data.sts_dev_file)
    assert named == (str(ENCODER), [str(SENTENCES)], str(PAIRS))
    preset = yaml.safe_load(PRESET.read_text())
    assert (model.pooling, args.max_steps, args.learning_rate) == ("mean", preset["max_steps"], preset["learning_rate"])
    first = announce(model, data, args).splitlines()[0]
    assert first.startswith("Training the bundled small BERT")
    assert first.endswith("fmicl-text train --config bert-base-kl")


def test_several_files_and_columns():
    flags = ["--train_file", "a.csv", "b.csv", "--text_columns", "x", "y", "z"]
    _, data, _ = parse_args(["--model_name_or_path", "some-model", *flags, "--use_cpu", "True"])
    assert (data.train_file, data.text_columns) == (["a.csv", "b.csv"], ["x", "y", "z"])
    small = parse_args(["--train_file", "a.csv", "b.csv"])
    assert announce(*small).startswith("Training the bundled small BERT on a.csv b.csv. ")


class WithoutNegatives(ContrastiveLoss):
    """An objective of a user that has no argument `negatives`."""

    def __init__(self):
        super().__init__(gamma=1.0, negatives="same_view")


def test_an_objective_without_negatives_is_announced():
    settings = parse_args(["--objective", f"{__name__}:WithoutNegatives", "--output_dir", "out"])
    assert f"{__name__}:WithoutNegatives  | pooling mean" in announce(*settings)


def test_configurations_are_found_by_name():
    model, _, args = parse_args(["--config", "bert-base-js", "--train_file", "a.txt", "--use_cpu", "True"])
    assert (model.model_name_or_path, args.divergence) == ("google-bert/bert-base-uncased", "js")


def test_defaults_with_a_model_are_the_papers_without_its_alpha():
    model, data, args = parse_args(MODEL)
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (3e-5, 64, 1)
    assert (data.max_seq_length, model.pooling, data.sts_dev_file) == (32, None, None)
    assert args.build_loss().hyperparameters == {
        "divergence": "kl",
        "gamma": "auto",
        "alpha": "auto",
        "negatives": "same_view",
        "similarity": "gaussian",
        "global_batch": "gather",
    }
    assert args.load_best_model_at_end and data.num_held_out == 2000


def test_command_line_wins_over_the_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "divergence: js\ngamma: 5\nmodel_name_or_path: m\ntrain_file: t.txt\nbf16: null\nstreaming: false"
    )
    _, _, args = parse_args(["--config", str(config), "--gamma", "7.5"])
    assert (args.divergence, args.gamma) == ("js", 7.5)


def test_resolved_settings_run_again_the_same(tmp_path):
    given = parse_args([*MODEL, "--divergence", "tsallis", "--tsallis_order", "1.5", "--seed", "7", "--alpha", "10"])
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(resolved_settings(*given)))
    again = parse_args(["--config", str(config), "--use_cpu", "True"])
    assert again[:2] == given[:2]
    for name in ("seed", "divergence", "tsallis_order", "alpha", "learning_rate", "output_dir", "max_steps"):
        assert getattr(again[2], name) == getattr(given[2], name), name
    assert again[2].build_loss().hyperparameters == given[2].build_loss().hyperparameters


def test_no_token_is_written():
    message = mistake([*MODEL, "--hub_token", "hf_SECRET"])
    assert message.startswith("--hub_token ") and "hf auth login" in message and "SECRET" not in message


def test_epochs_asked_for_win_over_the_presets_steps():
    _, _, args = parse_args(["--num_train_epochs", "2"])
    assert (args.max_steps, args.num_train_epochs) == (-1, 2)


def test_an_unquoted_no_in_yaml_is_no(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("eval_strategy: no\nsave_strategy: no\nload_best_model_at_end: false\n")
    assert parse_args(["--config", str(config)])[2].eval_strategy == "no"


@pytest.mark.parametrize("objective", ["infonce", "align_uniform", "spectral"])
def test_baselines_resolve_too(objective, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(resolved_settings(*parse_args([*MODEL, "--objective", objective]))))
    assert parse_args(["--config", str(config)])[2].objective == objective


def mistake(argv):
    """The one-line error of the command line."""
    with pytest.raises(InputError) as error:
        parse_args(argv)
    message = add_dashes(str(error.value), FLAGS)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--divergence", "kld"], "--divergence kld.*kl, js"),
        (["--objective", "x"], "--objective x.*fmicl, infonce"),
        (["--alpha", "0"], r"--alpha .* 0\.0"),
        (["--alpha=-1"], r"--alpha .* -1\.0"),
        (["--gamma", "inf"], "--gamma .* inf"),
        (["--gamma", "nan"], "--gamma .* nan"),
        (["--gamma", "x"], "--gamma must be auto or a finite number > 0, got 'x'"),
        (["--divergence", "tsallis", "--tsallis_order", "0"], r".*order .* 0\.0"),
        (["--tsallis_order", "2"], r"--tsallis_order 2\.0 .*--divergence tsallis"),
        (["--objective", "infonce", "--divergence", "js"], "--divergence js .*--objective infonce"),
        (["--objective", "infonce", "--alpha", "2"], r"--alpha 2\.0 .*--objective infonce"),
        (["--temperature", "0.1"], r"--temperature 0\.1 .*--objective fmicl"),
        (["--objective", "infonce", "--temperature", "0"], r"--temperature .* 0\.0"),
        (["--similarity", "cosine", "--gamma", "2"], r"--gamma 2\.0 .*--similarity cosine"),
        (["--learning_rate=-1"], r"--learning_rate .* -1\.0"),
        (["--seed=-1"], "--seed .* 4294967295.* -1"),
        (["--report_to", "foo"], "--report_to foo .*wandb"),
        (["--early_stopping_patience", "0"], "--early_stopping_patience .* 0"),
        (["--logging_nan_inf_filter", "True"], "--logging_nan_inf_filter True .*False"),
        (["--ignore_data_skip", "True"], "--ignore_data_skip True .*False"),
        (
            ["--overwrite_output_dir", "True", "--resume_from_checkpoint", "True"],
            "--overwrite_output_dir True .*--resume_from_checkpoint True",
        ),
        (["--per_device_train_batch_size", "1"], "--per_device_train_batch_size .* 1"),
        (["--no_such_flag", "1"], "unknown argument --no_such_flag"),
        (["--diverg", "kl"], "unknown argument --diverg"),
        (["--model_name_or_path", "m"], "--model_name_or_path .*--train_file FILE"),
        (["--config", "missing.yaml"], "--config missing.yaml: "),
        ([*MODEL, "--streaming", "True"], "--streaming .*--max_steps"),
        (["--max_seq_length", "0"], "--max_seq_length .* 0"),
        (["--early_stopping_patience", "3"], "--early_stopping_patience 3 .*--load_best_model_at_end True"),
        (["--views", "crop"], "argument --views: .*'crop'"),
        (["--views", "auto", "crops"], "--views .* dropout, crops, repeat, delete; got auto crops"),
        (["--views", "crops", "dropout"], "--views crops dropout: "),
        (["--views", "delete", "delete"], "--views delete delete "),
        (["--dataset_split", "dev"], "--dataset_split .*--dataset_name"),
        ([*MODEL, "--mini_batch_size", "65"], "--mini_batch_size .* 64.* 65"),
        ([*MODEL, "--block_size", "0"], "--block_size .* 0"),
        ([*MODEL, "--global_batch", "all"], "argument --global_batch.*'all'"),
        ([*MODEL, "--objective", "infonce", "--global_batch", "ring"], "--global_batch .*none, gather.*'ring'"),
    ],
)
def test_mistakes_are_named_in_one_line(argv, named):
    assert re.match(named, mistake(argv))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("divergnce: kl\n", "unknown key divergnce"),
        ("- kl\n", "expected `flag: value` lines, got list"),
        ("a: [\n", "while parsing"),
        ("config: other.yaml\n", "unknown key config"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    with pytest.raises(InputError) as error:
        parse_args(["--config", str(config)])
    assert str(error.value).startswith(f"--config {config}: {message}")


def test_search_data_selects_by_their_primary_metric():
    _, data, args = parse_args([*MODEL, "--retrieval_dev_folder", "dev", "--eval_strategy", "steps"])
    assert (data.retrieval_dev_folder, args.metric_for_best_model, args.greater_is_better) == ("dev", "loss", True)
    named = ["--retrieval_dev_folder", "dev", "--metric_for_best_model", "cosine_map@100"]
    assert parse_args([*MODEL, *named])[2].metric_for_best_model == "cosine_map@100"
    message = mistake([*MODEL, "--retrieval_dev_folder", "dev", "--sts_dev_file", "dev.tsv"])
    assert "mutually exclusive" in message and "--sts_dev_file" in message
    assert parse_args(["--retrieval_dev_folder", "dev"])[1].sts_dev_file is None  # bundled sentences, other evaluation


@pytest.mark.parametrize(
    "content, views", [("views: crops", ["crops"]), ("views: [repeat, delete]", ["repeat", "delete"])]
)
def test_views_from_a_file(content, views, tmp_path):
    assert parse_args(MODEL)[1].views == ["auto"]
    config = tmp_path / "run.yaml"
    config.write_text(content)
    given = parse_args([*MODEL, "--config", str(config)])
    assert given[1].views == views
    config.write_text(yaml.safe_dump(resolved_settings(*given)))
    assert parse_args(["--config", str(config)])[1].views == views


def test_the_data_decide_the_metric(tmp_path):
    """Also over that of a settings.yaml of a run on other data. A metric that is named stays."""
    file = tmp_path / "settings.yaml"
    file.write_text("metric_for_best_model: loss")
    for config in ([], ["--config", str(file)]):
        assert parse_args([*MODEL, *config])[2].metric_for_best_model == "loss"  # the evaluator's primary metric
        assert parse_args([*MODEL, *config, "--sts_dev_file", "stsb"])[2].metric_for_best_model == "sts_spearman"
    assert parse_args([])[2].metric_for_best_model == "sts_spearman"  # bundled pairs
    named = [*MODEL, "--metric_for_best_model", "held_out_recall@1"]
    assert parse_args(named)[2].metric_for_best_model == "held_out_recall@1"


def test_held_out_texts_are_instead_of_other_data():
    assert parse_args([*MODEL, "--held_out", "500"])[1].num_held_out == 500
    assert parse_args([*MODEL, "--held_out", "0"])[1].num_held_out == 0
    for flag, value in (("--sts_dev_file", "dev.tsv"), ("--retrieval_dev_folder", "dev")):
        assert parse_args([*MODEL, flag, value])[1].num_held_out == 0
        assert f"--held_out 500 has no effect with {flag} {value}" in mistake(
            [*MODEL, flag, value, "--held_out", "500"]
        )
    assert parse_args([])[1].num_held_out == 0  # the bundled pairs
    _, bundled, args = parse_args(["--held_out", "500"])
    assert (bundled.sts_dev_file, bundled.num_held_out, args.metric_for_best_model) == (None, 500, "loss")


@pytest.mark.parametrize("number", ["1", "99", "-1"])
def test_too_few_held_out_texts(number):
    assert f"--held_out must be 0 or at least 100, got {number}" in mistake([*MODEL, "--held_out", number])


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--early_stopping_patience", "3"], "early_stopping_patience=3"),
        (["--save_strategy", "best"], "save_strategy=best"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "lr_scheduler_type=reduce_lr_on_plateau"),
        (["--eval_on_start", "True"], "eval_on_start=True"),
        (["--metric_for_best_model", "sts_pearson"], "metric_for_best_model=sts_pearson"),
    ],
)
def test_options_that_need_evaluations(flags, named):
    _, _, args = parse_args([*MODEL, *flags])
    with pytest.raises(InputError) as error:
        without_evaluation(args, "held_out=0")
    assert str(error.value) == f"{named} needs evaluations: pass sts_dev_file (held_out=0)"
    assert args.eval_strategy == "steps"


def test_a_run_without_evaluation():
    _, _, args = parse_args(MODEL)
    without_evaluation(args, "held_out=0")
    assert (args.eval_strategy, args.load_best_model_at_end) == ("no", False)


@pytest.mark.parametrize(
    ("flags", "columns", "streaming", "expected"),
    [
        ([], 1, False, "group_by_length"),
        (["--train_sampling_strategy", "auto"], 1, False, "group_by_length"),
        ([], 2, False, "random"),
        ([], 1, True, "random"),
        (["--train_sampling_strategy", "group_by_length"], 2, False, "group_by_length"),
        (["--train_sampling_strategy", "sequential"], 1, False, "sequential"),
    ],
)
def test_single_texts_are_in_batches_of_similar_length(flags, columns, streaming, expected):
    args = parse_args([*MODEL, *flags])[2]
    args.choose_sampling(columns, streaming)
    assert args.train_sampling_strategy == expected


def test_length_grouping_needs_lengths():
    grouped, stream = ["--train_sampling_strategy", "group_by_length"], ["--streaming", "True", "--max_steps", "5"]
    assert parse_args([*MODEL, *grouped])[2].train_sampling_strategy == "group_by_length"
    streamed = mistake([*MODEL, *stream, *grouped])
    assert re.match("--train_sampling_strategy group_by_length .*--streaming False", streamed)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--eval_strategy", "no"], (False, 125, 125)),
        (["--eval_steps", "50"], (True, 50, 50)),
        (["--eval_steps", "25"], (True, 25, 125)),
        ([], (True, 125, 125)),
    ],
)
def test_evaluation_and_checkpoints_fit_each_other(flags, expected):
    usual = ["--model_name_or_path", "m", "--train_file", "t.txt", "--use_cpu", "True"]
    _, _, args = parse_args([*usual, *flags])
    assert (args.load_best_model_at_end, args.eval_steps, args.save_steps) == expected


@pytest.mark.parametrize(
    "flags, load_best, save_strategy",
    [
        (["--eval_strategy", "epoch"], True, "epoch"),
        (["--save_strategy", "no"], False, "no"),
        (["--save_strategy", "best"], True, "best"),
    ],
)
def test_strategies_fit_each_other(flags, load_best, save_strategy):
    usual = ["--model_name_or_path", "m", "--train_file", "t.txt", "--use_cpu", "True"]
    _, _, args = parse_args([*usual, *flags])
    assert (args.load_best_model_at_end, args.save_strategy) == (load_best, save_strategy)


def test_settings_keep_what_was_not_given_and_dictionaries(tmp_path):
    """Negatives that the columns decide stay open, so that --config decides again; options that are JSON objects."""
    given = parse_args([*MODEL, "--accelerator_config", '{"use_seedable_sampler": false}',
                        "--activation_checkpointing", "True",
                        "--activation_checkpointing_kwargs", '{"use_reentrant": false}'])  # fmt: skip
    settings = resolved_settings(*given)
    assert settings["negatives"] is None and settings["accelerator_config"] == {"use_seedable_sampler": False}
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    again = parse_args(["--config", str(config)])
    assert resolved_settings(*again) == settings and again[-1].negatives is None
    assert again[-1].accelerator_config.use_seedable_sampler is False
    assert again[-1].activation_checkpointing_kwargs == {"use_reentrant": False}
    assert "accelerator_config" not in resolved_settings(*parse_args(MODEL))


@pytest.mark.parametrize(
    ("preset", "flags", "expected"),
    [
        ("sts_dev_file: stsb", ["--held_out", "100"], (None, None, 100)),
        ("sts_dev_file: stsb", ["--held_out=0"], (None, None, 0)),
        ("sts_dev_file: stsb", ["--retrieval-dev-folder", "search"], (None, "search", None)),
        ("retrieval_dev_folder: search", ["--sts_dev_file", "dev.tsv"], ("dev.tsv", None, None)),
        ("held_out: 500", ["--sts_dev_file", "dev.tsv"], ("dev.tsv", None, None)),
        ("sts_dev_file: stsb", [], ("stsb", None, None)),
    ],
)
def test_data_that_select_the_checkpoint_replace_those_of_a_file(preset, flags, expected, tmp_path):
    config = tmp_path / "preset.yaml"
    config.write_text(preset + "\nmodel_name_or_path: model\ntrain_file: a.txt\n")
    _, data, _ = parse_args(["--config", str(config), *flags])
    assert (data.sts_dev_file, data.retrieval_dev_folder, data.held_out) == expected
