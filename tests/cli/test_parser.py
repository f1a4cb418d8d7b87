"""Errors of the library, which name arguments, become errors of the command line, which name flags."""

import pytest

from fmicl_text.cli.parser import add_dashes

FLAGS = {"train_file", "gamma", "model", "max_steps", "dataset_name", "output_dir"}


@pytest.mark.parametrize(
    "message, expected",
    [
        ("train_file=a.txt: no such file", "--train_file a.txt: no such file"),
        ("gamma must be > 0, got -1", "--gamma must be > 0, got -1"),
        ("streaming needs max_steps", "streaming needs --max_steps"),
        ("the model needs gamma=2", "the model needs --gamma 2"),
        ("output_dir=/a/train_file/x: no", "--output_dir /a/train_file/x: no"),
        ("/a/train_file: no", "/a/train_file: no"),
        ("train_file.txt and 'train_file': no", "train_file.txt and 'train_file': no"),
        ("train_file, dataset_name.", "--train_file, --dataset_name."),
        ("betas=0.9 is not a flag", "betas=0.9 is not a flag"),
    ],
)
def test_names_of_arguments_become_flags(message, expected):
    assert add_dashes(message, FLAGS) == expected
