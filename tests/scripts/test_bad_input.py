"""Bad input to every program: one line that names the culprit, status 2, and nothing that was there is touched.

To add a case, add a line to `CASES`: what is typed after the program's name, and a fragment of the line it must give.
The program runs in this process (a fresh one takes ten seconds to import its libraries), in the folder that `work`
makes, with `USUAL` flags first, so that a case names only what is wrong: of a flag given twice the last one counts.
"""

import gc
import gzip
import hashlib
import json
import logging
import math
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import ViTConfig

from fmicl_text import FMICLLoss, FMICLTrainingArguments
from fmicl_text.cli.checks import check_writable
from fmicl_text.cli.vision import VisionTrainingArguments
from fmicl_text.evaluation.report import named_model
from fmicl_text.evaluation.sts import load_pairs
from fmicl_text.text.data import load_training_text
from fmicl_text.vision.data import LabelledImages, check_channels, load_images
from fmicl_text.vision.encoder import new_image_encoder
from tests.conftest import sentences, tiny_bert
from tests.vision.test_data import picture

ROOT = Path(__file__).parent.parent.parent

# `out` holds a finished run. A recipe may overwrite it; bad input must not make it do so.
USUAL = {
    "simcse_fmicl.py": "--model_name_or_path bert --train_file train.txt --sts_dev_file dev.tsv --pooling mean"
    " --per_device_train_batch_size 8 --gamma 2 --alpha 4 --max_steps 2 --eval_steps 2 --save_steps 2 --use_cpu True"
    " --disable_tqdm True --output_dir out --overwrite_output_dir True",
    "vision_fmicl.py": "--train_file images.parquet --held_out 8 --architecture resnet-8-small --head_dim 8"
    " --image_size 16 --per_device_train_batch_size 8 --max_steps 2 --use_cpu True --disable_tqdm True"
    " --output_dir out --overwrite_output_dir True",
    "sts.py": "--model bert --pooling mean --output out/results.json",
    "mteb_sts.py": "--model bert --pooling mean --tasks STSBenchmark --output out/results.json",
    "geometry.py": "--output out/results.json",
    "image_probe.py": "--model vit --images images.parquet --held_out 8 --image_size 16 --output out/results.json",
    "loss_benchmark.py": "--sizes 8 --dim 4 --repeats 1 --output out/results.json",
    "views_benchmark.py": "--batch 4 --size 8 --source 8 --rounds 1 --output out/results.json",
    "throughput.py": "--model bert --train_file train.txt --batch_size 4 --steps 1 --rounds 1"
    " --output out/results.json",
    "batch_memory.py": "--batches 4 --mini_batch_size 2 --output out/results.json",
    "fmicl-text push": "",
    "fmicl-text compare": "",
}

PNG = picture()["bytes"]
HEADER = "score\tsentence1\tsentence2\n"
FILES = {
    "few.txt": "a dog\nthe cat\n",
    "null.jsonl": "null\n",
    "same.txt": "a dog\n" * 20,
    "utf16.txt": "a dog\nthe cat\n".encode("utf-16"),
    "latin.txt": "a dog\nna\u00efve\n".encode("latin-1"),
    "empty.txt": "",
    "blank.txt": "\n  \n",
    "png.txt": PNG,
    "png.jsonl": PNG,
    "png.txt.gz": PNG,
    "cut.txt.gz": gzip.compress(b"a dog\n" * 999)[:40],
    "png.parquet": PNG,
    "cut.parquet": b"PAR1" + bytes(99),
    "broken.jsonl": '{"text": "a"}\n{oops}\n',
    "nulls.jsonl": '{"text": null}\n',
    "unquoted.csv": "text\na dog\nhello, you, there\n",
    "numbers.csv": "text\n1\n2\n",
    "columns.csv": "title,body\na,b\n",
    "empty.tsv": "",
    "latin.tsv": (HEADER + "1\tna\u00efve\tb\n").encode("latin-1"),
    "utf16.tsv": (HEADER + "1\ta\tb\n").encode("utf-16"),
    "nul.tsv": bytes(100),
    "one.tsv": HEADER + "1\ta\tb\n",
    "six.tsv": HEADER + "1\ta\tb\n6\tc\td\n",
    "nan.tsv": HEADER + "1\ta\tb\nnan\tc\td\n",
    "word.tsv": HEADER + "1\ta\tb\nsix\tc\td\n",
    "equal.tsv": HEADER + "1\ta\tb\n1\tc\td\n",
    "low.tsv": HEADER + "1\ta\tb\n2\tc\td\n",
    "cells.tsv": HEADER + "1\ta\tb\n2\tc\n",
    "columns.tsv": "grade\tleft\tright\n1\ta\tb\n",
    "empty.yaml": "",
    "list.yaml": "- kl\n",
    "unknown.yaml": "divergnce: kl\n",
    "twice.yaml": "gamma: 2\ngamma: 3\n",
    "date.yaml": "seed: 2024-99-99\n",
    "latin.yaml": "head: na\u00efve\n".encode("latin-1"),
    "utf16.yaml": "gamma: 2\n".encode("utf-16"),
    "nul.yaml": "gamma: \0\n",
    "tab.yaml": "alpha: 4\n\tgamma: 2\n",
    "deep.yaml": "gamma: " + "[" * 500,
    "tag.yaml": "gamma: !!python/object/apply:os.getcwd []\n",
    "nested.yaml": "seed:\n  train: 1\n",
    "list_value.yaml": "seed: [1, 2]\n",
    "word_value.yaml": "seed: large\n",
    "empty_value.yaml": "head: ''\n",
    "object.json": '{"a": 1}',
    "numbers.json": "[1, 2]",
    "empty.json": "",
    "nothing.json": '[{"missing": "x"}]',
    "empty.npz": b"",
    "sick/SICK/SICK_test_annotated.txt": "sentence_A\tsentence_B\trelatedness_score\na\tb\t1\nc\td\t2\n",
    "no_images/a/x.txt": "x",
    "broken_images/a/1.png": "no image",
    "broken_images/b/2.png": "no image",
    "unlabelled/1.png": PNG,
    "empty_folder/x/.keep": "",
    "out/results.json": "{}",
    "out/modules.json": "[]",
    "out/config.json": "{}",
    "out/notes.txt": "mine",
    "out/checkpoint-2/trainer_state.json": "{}",
}
OF_THE_REPOSITORY = (
    *("README.md", "LICENSE", "pyproject.toml", "recipes/simcse_fmicl.py", "eval/geometry.png"),
    "fmicl_text/quickstart/encoder/model.safetensors",
)

LARGE = "9" * 30
CASES = {
    "simcse_fmicl.py": {
        # training text
        "--train_file none.txt": "--train_file none.txt: no such file",
        "--train_file ''": "--train_file is empty",
        "--train_file": "argument --train_file/--train-file: expected one argument",
        "--train_file empty_folder": "--train_file empty_folder is a folder, accepted is one file",
        "--train_file empty.txt": "empty.txt has no sentences",
        "--train_file blank.txt": "blank.txt has no sentences",
        "--train_file utf16.txt": "utf16.txt cannot be read as .txt: line 1 is not UTF-8 (byte 0xff)",
        "--train_file latin.txt": "latin.txt cannot be read as .txt: line 2 is not UTF-8 (byte 0xef)",
        "--train_file png.txt": "png.txt cannot be read as .txt: line 1 is not UTF-8",
        "--train_file png.jsonl": "png.jsonl cannot be read as .jsonl: line 1 is not UTF-8",
        "--train_file png.txt.gz": "png.txt.gz cannot be read as .txt: Not a gzipped file",
        "--train_file cut.txt.gz": "cut.txt.gz cannot be read as .txt: Compressed file ended",
        "--train_file png.parquet": "png.parquet cannot be read as .parquet: Parquet magic bytes not found",
        "--train_file cut.parquet": "cut.parquet cannot be read as .parquet: ",
        "--train_file broken.jsonl": "broken.jsonl cannot be read as .jsonl: line 2, character 2",
        "--train_file nulls.jsonl": "nulls.jsonl has no sentences",
        "--train_file unquoted.csv": "Expected 1 fields in line 3, saw 3; cells that hold a comma",
        "--train_file numbers.csv": "numbers.csv: column 'text' must hold strings, got int64",
        "--train_file columns.csv": "columns.csv has the columns ['title', 'body']: say with --text_column which",
        "--train_file columns.csv --text_column text": "no column 'text' (--text_column), its columns are ['title',",
        "--train_file images.parquet": "images.parquet has the columns ['img', 'label']",
        "--train_file same.txt": "same.txt: all 20 rows hold the same text",
        "--train_file null.jsonl": "null.jsonl cannot be read as .jsonl: line 1 is not an object",
        "--train_file few.txt": "2 training examples do not fill one batch of 8",
        "--train_file repo/README.md": "--train_file repo/README.md: unknown kind of file, accepted are .txt",
        "--train_file repo/LICENSE": "--train_file repo/LICENSE: unknown kind of file",
        "--train_file repo/pyproject.toml": "--train_file repo/pyproject.toml: unknown kind of file",
        "--train_file repo/simcse_fmicl.py": "--train_file repo/simcse_fmicl.py: unknown kind of file",
        "--train_file repo/geometry.png": "--train_file repo/geometry.png: unknown kind of file",
        "--train_file repo/model.safetensors": "--train_file repo/model.safetensors: unknown kind of file",
        "--dataset_name nobody/nothing": "exactly one of --train_file and --dataset_name is needed",
        "--dataset_config plain": "--dataset_config means nothing without --dataset_name",
        "--dataset_split dev": "--dataset_split means nothing without --dataset_name",
        "--max_train_samples -1": "--max_train_samples must be at least 1, got -1",
        "--max_train_samples many": "invalid int value: 'many'",
        "--max_seq_length 2": "--max_seq_length must be at least 3, got 2",
        "--max_seq_length 999": "--max_seq_length 999 is beyond the model's 40 tokens",
        "--streaming True --max_steps -1": "--streaming needs --max_steps",
        "--streaming True --train_file few.txt": "do not fill one batch of 8",
        # graded pairs
        "--sts_dev_file none.tsv": "none.tsv: No such file or directory",
        "--sts_dev_file empty_folder": "empty_folder: Is a directory",
        "--sts_dev_file empty.tsv": "empty.tsv is empty",
        "--sts_dev_file latin.tsv": "latin.tsv, line 2: not UTF-8 text",
        "--sts_dev_file utf16.tsv": "utf16.tsv, line 1: not UTF-8 text",
        "--sts_dev_file nul.tsv": "nul.tsv: no column sentence1, sentence2, score",
        "--sts_dev_file one.tsv": "one.tsv: 1 pairs; a rank correlation needs at least 2",
        "--sts_dev_file six.tsv": "six.tsv, line 3: the score 6 is not in [0, 5]",
        "--sts_dev_file nan.tsv": "nan.tsv, line 3: the score nan is not in [0, 5]",
        "--sts_dev_file word.tsv": "word.tsv, line 3: the score 'six' is not a number",
        "--sts_dev_file equal.tsv": "equal.tsv: every score is 1",
        "--sts_dev_file cells.tsv": "cells.tsv, line 3: 2 cells where 3 are needed",
        "--sts_dev_file columns.tsv": "columns.tsv: no column sentence1, sentence2, score; it has grade, left, right",
        "--sts_dev_file lists.parquet": "lists.parquet, row 1: sentence1 must be text, got ['a']",
        "--sts_dev_file cut.parquet": "cut.parquet: Could not open Parquet",
        "--sts_dev_file repo/README.md": "repo/README.md: no column sentence1, sentence2, score; it has # fmicl_text",
        "--sts_dev_file repo/LICENSE": "repo/LICENSE: no column sentence1",
        "--sts_dev_file repo/simcse_fmicl.py": "repo/simcse_fmicl.py: no column sentence1",
        "--sts_dev_file repo/geometry.png": "repo/geometry.png, line 1: not UTF-8 text",
        "--sts_dev_file repo/model.safetensors": "repo/model.safetensors, line 1: not UTF-8 text",
        # model
        "--model_name_or_path ./none": "no such folder ./none",
        "--model_name_or_path nobody/nothing": "--model_name_or_path nobody/nothing: We couldn't connect",
        "--model_name_or_path ''": "--model_name_or_path is empty",
        "--model_name_or_path empty_folder": "--model_name_or_path empty_folder: ",
        "--model_name_or_path repo": "--model_name_or_path repo: Unrecognized model",
        "--model_name_or_path repo/README.md": "--model_name_or_path repo/README.md: ",
        "--model_name_or_path repo/model.safetensors": "--model_name_or_path repo/model.safetensors: ",
        "--model_name_or_path vit": "--model_name_or_path vit: ",
        "--model_name_or_path bert_no_config": "--model_name_or_path bert_no_config: Unrecognized model",
        "--model_name_or_path bert_bad_config": "'bert_bad_config/config.json' is not a valid JSON file",
        "--model_name_or_path bert_odd_config": "--model_name_or_path bert_odd_config: ",
        "--model_name_or_path bert_no_weights": "no file named model.safetensors",
        "--model_name_or_path bert_cut_weights": "--model_name_or_path bert_cut_weights: ",
        "--model_name_or_path bert_text_weights": "--model_name_or_path bert_text_weights: ",
        "--model_name_or_path bert_no_tokenizer": "--model_name_or_path bert_no_tokenizer: ",
        "--model_name_or_path bert_bad_tokenizer": "--model_name_or_path bert_bad_tokenizer: ",
        "--model_name_or_path bert_other_tokenizer": "bert_other_tokenizer",
        "--model_name_or_path bert_bad_modules": "--model_name_or_path bert_bad_modules: ",
        "--dropout nan": "--dropout must be in [0, 1), got nan",
        "--lora_rank 0": "--lora_rank must be at least 1, got 0",
        "--head mlp": "argument --head: invalid choice: 'mlp'",
        "--pooling sum": "argument --pooling: invalid choice: 'sum'",
        # flags
        "junk": "unknown argument junk",
        "--gama 2": "unknown argument --gama",
        "--gam 2": "unknown argument --gam",
        "--gamma": "argument --gamma: expected one argument",
        "--gamma abc": "argument --gamma: invalid float value: 'abc'",
        "--gamma 1e999": "gamma must be a finite number > 0, got inf",
        "--alpha 0": "alpha must be a finite number > 0, got 0.0",
        "--learning_rate nan": "--learning_rate must be finite and at least 0, got nan",
        "--learning_rate inf": "--learning_rate must be finite and at least 0, got inf",
        "--weight_decay nan": "--weight_decay must be finite and at least 0, got nan",
        "--max_grad_norm -1": "--max_grad_norm must be finite and at least 0, got -1.0",
        "--adam_beta1 2": "--adam_beta1 must be in [0, 1), got 2.0",
        "--adam_epsilon 0": "--adam_epsilon must be finite and above 0, got 0.0",
        "--seed 1.5": "argument --seed: invalid int value: '1.5'",
        f"--seed {LARGE}": f"--seed must be from 0 to 4294967295, got {LARGE}",
        "--data_seed -1": "--data_seed must be from 0 to 4294967295, got -1",
        "--max_steps 0": "--max_steps must be at least 1, or -1 for --num_train_epochs, got 0",
        "--max_steps -1 --num_train_epochs 0": "--num_train_epochs must be finite and above 0, got 0.0",
        "--max_steps -1 --num_train_epochs nan": "--num_train_epochs must be finite and above 0, got nan",
        "--logging_steps -1": "--logging_steps must be finite and above 0, got -1.0",
        "--save_steps 0": "--save_steps must be finite and above 0, got 0.0",
        "--save_steps 3": "found 3, which is not a round multiple of 2",
        "--save_total_limit -1": "--save_total_limit must be at least 1, got -1",
        "--gradient_accumulation_steps 0": "--gradient_accumulation_steps must be at least 1, got 0",
        "--dataloader_num_workers -1": "--dataloader_num_workers must be at least 0, got -1",
        "--dataloader_num_workers 1 --dataloader_prefetch_factor 0": "--dataloader_prefetch_factor must be at least 1",
        "--per_device_train_batch_size 1": "--per_device_train_batch_size must be at least 2, got 1",
        "--per_device_train_batch_size -8": "--per_device_train_batch_size must be at least 2, got -8",
        "--per_device_train_batch_size 1e9": "invalid int value: '1e9'",
        "--per_device_train_batch_size 1000000": "40 training examples do not fill one batch of 1000000",
        "--mini_batch_size 9": "--mini_batch_size must be from 1 to the batch of 8, got 9",
        "--optim nosuch": "argument --optim: invalid choice: 'nosuch'",
        "--optim lomo": "--optim lomo --lr_scheduler_type linear: You need to install `lomo_optim`",
        "--optim_args x": "--optim_args x: not enough values to unpack",
        "--lr_scheduler_type cosine_with_min_lr": "--lr_scheduler_type cosine_with_min_lr: One of min_lr or",
        "--lr_scheduler_kwargs [1]": "--lr_scheduler_kwargs [1]: ",
        "--lr_scheduler_kwargs {bad": "--lr_scheduler_kwargs {bad: Expecting property name",
        "--accelerator_config none.json": "No such file or directory: 'none.json'",
        "--eval_strategy sometimes": "sometimes is not a valid IntervalStrategy, please select one of",
        "--metric_for_best_model nosuch": "--metric_for_best_model nosuch is not measured; there are sts_spearman",
        "--report_to nosuch": "nosuch is not supported, only",
        "--train_sampling_strategy nosuch": "invalid choice: 'nosuch' (choose from 'random',",
        # devices
        "--use_cpu maybe": "argument --use_cpu/--use-cpu: Truthy value expected: got maybe",
        "--use_cpu 2": "argument --use_cpu/--use-cpu: Truthy value expected: got 2",
        "--fp16 True": "fp16 needs a GPU",
        "--fp16 True --bf16 True": "At most one of fp16 and bf16 can be True",
        "--tf32 True": "--tf32 requires Ampere",
        "--torch_compile_backend nosuch": "nosuch",
        # output
        "--output_dir ''": "--output_dir is empty",
        "--output_dir few.txt": "--output_dir few.txt is a file, not a folder",
        "--output_dir few.txt/new": "--output_dir few.txt/new",
        "--output_dir /proc --overwrite_output_dir False": "--output_dir /proc",
        "--output_dir bert --overwrite_output_dir False": "--output_dir bert already holds config.json",
        "--overwrite_output_dir False": "--output_dir out already holds results.json: name another folder",
        "--overwrite_output_dir False --resume_from_checkpoint none": "--resume_from_checkpoint none",
        "--overwrite_output_dir False --resume_from_checkpoint True": "--resume_from_checkpoint True: ",
        "--resume_from_checkpoint True": "--overwrite_output_dir would remove what --resume_from_checkpoint reads",
        "--push_to_hub True --hub_model_id a/b/c": "'a/b/c' is no name of a repository",
        # --config
        "--config none.yaml": "--config none.yaml: [Errno 2] No such file",
        "--config ''": "--config is empty",
        "--config": "argument --config: expected one argument",
        "--config empty_folder": "--config empty_folder: [Errno 21] Is a directory",
        "--config empty.yaml": "--config empty.yaml: expected `flag: value` lines, got NoneType",
        "--config list.yaml": "--config list.yaml: expected `flag: value` lines, got list",
        "--config unknown.yaml": "--config unknown.yaml: unknown key divergnce",
        "--config twice.yaml": "--config twice.yaml: gamma is there twice",
        "--config date.yaml": "--config date.yaml: month must be in 1..12",
        "--config latin.yaml": "--config latin.yaml: 'utf-8' codec can't decode byte 0xef",
        "--config utf16.yaml": "--config utf16.yaml: 'utf-8' codec can't decode byte 0xff",
        "--config nul.yaml": "--config nul.yaml: unacceptable character #x0000",
        "--config tab.yaml": "--config tab.yaml: while scanning",
        "--config deep.yaml": "--config deep.yaml: maximum recursion depth",
        "--config tag.yaml": "--config tag.yaml: could not determine a constructor for the tag",
        "--config nested.yaml": """argument --seed: invalid int value: '{"train": 1}'""",
        "--config list_value.yaml": "argument --seed: invalid int value: '[1, 2]'",
        "--config word_value.yaml": "argument --seed: invalid int value: 'large'",
        "--config empty_value.yaml": "--head is empty",
        "--config repo/README.md": "--config repo/README.md: mapping values are not allowed here",
        "--config repo/LICENSE": "--config repo/LICENSE: mapping values are not allowed here",
        "--config repo/pyproject.toml": "--config repo/pyproject.toml: expected '<document start>'",
        "--config repo/simcse_fmicl.py": "--config repo/simcse_fmicl.py: expected '<document start>'",
        "--config repo/geometry.png": "--config repo/geometry.png: 'utf-8' codec can't decode",
        "--config repo/model.safetensors": "--config repo/model.safetensors: 'utf-8' codec can't decode",
    },
    "vision_fmicl.py": {
        "--train_file none.parquet": "--train_file none.parquet: no such folder or .parquet file",
        "--train_file ''": "--train_file is empty",
        "--train_file png.parquet": "png.parquet: Parquet magic bytes not found",
        "--train_file cut.parquet": "cut.parquet: ",
        "--train_file no_rows.parquet": "no_rows.parquet: it holds no images",
        "--train_file text.parquet": "text.parquet has no column 'img' (--image_column), its columns are ['text']",
        "--train_file one_class.parquet": "one_class.parquet: one class only in 12 images",
        "--train_file broken.parquet": "broken.parquet: none of 20 images can be read",
        "--train_file null_images.parquet": "null_images.parquet: none of 20 images can be read",
        "--train_file null_labels.parquet": "row 2 of column 'label' (--label_column) is empty",
        "--train_file fractions.parquet": "'label' (--label_column) must hold whole numbers or names, got float64",
        "--train_file empty_folder": "empty_folder: it holds no images",
        "--train_file no_images": "no_images: it holds no images",
        "--train_file broken_images": "broken_images: none of 2 images can be read",
        "--train_file unlabelled": "a folder must hold a folder of images for each of two or more classes",
        "--train_file repo/README.md": "--train_file repo/README.md: no such folder or .parquet file",
        "--train_file repo/LICENSE": "--train_file repo/LICENSE: no such folder or .parquet file",
        "--train_file repo/geometry.png": "--train_file repo/geometry.png: no such folder or .parquet file",
        "--train_file repo/model.safetensors": "--train_file repo/model.safetensors: no such folder or .parquet file",
        "--dataset_name b": "exactly one of --train_file and --dataset_name is needed, got both",
        "--dataset_split dev": "--dataset_split means nothing without --dataset_name",
        "--image_column label": "column 'label' (--image_column) must hold images, got int64",
        "--label_column img": "column 'img' (--label_column) must hold whole numbers or names, got Image",
        "--label_column y": "images.parquet has no column 'y' (--label_column), its columns are ['img', 'label']",
        "--held_out 40": "images.parquet: --held_out must be from 1 to 39, got 40",
        "--validation 35": "images.parquet: --validation must be below 32, got 35",
        "--max_train_samples 4": "4 training examples do not fill one batch of 8",
        "--image_size 0": "--image_size must be at least 1, got 0",
        "--image_size 4 --model_name_or_path vit": "--image_size 4 does not fit vit: ",
        "--image_size 24 --model_name_or_path vit": "--image_size 24 does not fit vit: ",
        "--model_name_or_path ./none": "no such folder ./none",
        "--model_name_or_path bert": "--model_name_or_path bert: bert is no image model",
        "--model_name_or_path repo": "--model_name_or_path repo: Unrecognized model",
        "--model_name_or_path repo/README.md": "--model_name_or_path repo/README.md: ",
        "--model_name_or_path repo/model.safetensors": "--model_name_or_path repo/model.safetensors: ",
        "--model_name_or_path vit_bad_config": "'vit_bad_config/config.json' is not a valid JSON file",
        "--model_name_or_path vit_odd_config": "--model_name_or_path vit_odd_config: ",
        "--model_name_or_path vit_no_weights": "no file named model.safetensors",
        "--model_name_or_path vit_cut_weights": "--model_name_or_path vit_cut_weights: ",
        "--pooling cls": "--pooling cls: resnet has no class token",
        "--architecture resnet-99": "argument --architecture: invalid choice: 'resnet-99'",
        "--views simclr": "argument --views: invalid choice: 'simclr'",
        "--divergence chi": "argument --divergence: invalid choice: 'chi'",
        "--gama 1": "unknown argument --gama",
        "--sts_dev_file dev.tsv": "unknown argument --sts_dev_file",
        "--temperature 0.1": "--temperature means nothing to objective fmicl",
        "--per_device_train_batch_size 1": "--per_device_train_batch_size must be at least 2, got 1",
        "--mini_batch_size 8": "--mini_batch_size is not possible with images",
        "--momentum nan": "--momentum must be in [0, 1), got nan",
        "--optim nosuch": "nosuch is not a valid OptimizerNames, please select one of",
        "--optim adamw_bnb_8bit": "--optim adamw_bnb_8bit --lr_scheduler_type cosine: You need to install",
        "--train_sampling_strategy group_by_length": "--train_sampling_strategy group_by_length: images have no length",
        "--queue_size 64": "--queue_size means nothing to --method simclr",
        "--encoder_momentum 0.9": "--encoder_momentum means nothing to --method simclr",
        "--method mocov3 --encoder_momentum 1.5": "--encoder_momentum must be in [0, 1], got 1.5",
        "--method moco --objective infonce --queue_size 0": "--queue_size must be at least 1, got 0",
        f"--method moco --objective infonce --queue_size {10**13}": "--queue_size",
        "--method moco --objective infonce --queue_size 15": "--queue_size must be at least the 16 embeddings of one",
        "--method moco --objective infonce --negatives both": "--negatives both means nothing to --method moco",
        "--load_best_model_at_end True": "would choose the checkpoint by the images that the run is scored on",
        "--metric_for_best_model sts_spearman": "sts_spearman is not measured; there are knn_accuracy",
        "--fp16 True": "fp16 needs a GPU",
        "--activation_checkpointing True": "activation_checkpointing=True is not supported",
        "--overwrite_output_dir False": "--output_dir out already holds results.json",
        "--config repo/README.md": "--config repo/README.md: mapping values are not allowed here",
        "--config repo/geometry.png": "--config repo/geometry.png: 'utf-8' codec can't decode",
        "--config unknown.yaml": "--config unknown.yaml: unknown key divergnce",
    },
    "sts.py": {
        "--file none.tsv": "none.tsv: No such file or directory",
        "--file ''": "--file is empty",
        "--file lists.parquet": "lists.parquet, row 1: sentence1 must be text, got ['a']",
        "--file six.tsv": "six.tsv, line 3: the score 6 is not in [0, 5]",
        "--file repo/README.md": "repo/README.md: no column sentence1, sentence2, score",
        "--file repo/geometry.png": "repo/geometry.png, line 1: not UTF-8 text",
        "--file repo/simcse_fmicl.py": "repo/simcse_fmicl.py: no column sentence1",
        "--file dev.tsv --data_dir sick": "argument --data_dir: not allowed with argument --file",
        "--file dev.tsv --split dev": "--file holds the pairs to score: leave out --tasks and --split",
        "--file dev.tsv --model vit": "--model vit: ",
        "--file dev.tsv --model ''": "--model is empty",
        "--file dev.tsv --model kl=": "kl=: must be NAME=MODEL, or MODEL alone",
        "--file dev.tsv --model =bert": "=bert: must be NAME=MODEL, or MODEL alone",
        "--file dev.tsv --model bert bert": "--model: the same model is named twice",
        "--file dev.tsv --model repo/README.md": "--model repo/README.md: ",
        "--file dev.tsv --model repo/model.safetensors": "--model repo/model.safetensors: ",
        "--file dev.tsv --model bert_odd_config": "--model bert_odd_config: ",
        "--file dev.tsv --model bert_bad_modules": "--model bert_bad_modules: ",
        "--file dev.tsv --model bert_other_tokenizer": "bert_other_tokenizer",
        "--file dev.tsv --pooling sum": "argument --pooling: invalid choice: 'sum'",
        "--file dev.tsv --pool cls": "unrecognized arguments: --pool cls",
        "--file dev.tsv --strict maybe": "unrecognized arguments: maybe",
        "--file dev.tsv --batch_size 0": "argument --batch_size: must be a whole number of at least 1, got '0'",
        f"--file dev.tsv --batch_size {LARGE}": f"argument --batch_size: must be below 2^63, got '{LARGE}'",
        "--file dev.tsv --max_seq_length 999": "--max_seq_length 999 is beyond the model's 40 tokens",
        "--file dev.tsv --output none/r.json": "--output none/r.json: name a file in a folder that exists",
        "--file dev.tsv --output out": "--output out: name a file in a folder that exists",
        "--file dev.tsv --output /proc/r.json": "--output /proc/r.json: nothing can be written there",
        "--tasks STS13 STS13": "--tasks: the same task is named twice",
        "--data_dir none": "--data_dir none: must hold STS/ or SICK/",
        "--data_dir few.txt": "--data_dir few.txt: must hold STS/ or SICK/",
        "--data_dir sick --tasks STS13 --split dev": "STS13 has the splits test, got 'dev'",
        "--data_dir sick --tasks SICKRelatedness": "SICKRelatedness test has 2 pairs in sick, the standard set 4,927",
    },
    "mteb_sts.py": {
        "--tasks STS13 STS13": "--tasks: the same task is named twice",
        "--tasks STS13 STS133": "--tasks: 'STS133' not found. Did you mean: 'STS13'?",
        "--model m m": "--model: the same model is named twice",
        "--model ./none": "no such folder",
        "--model repo/LICENSE": "--model repo/LICENSE: ",
        "--model vit": "--model vit: ",
        "--cache few.txt": "--cache few.txt: is a file, must be a folder",
        "--batch_size 0": "argument --batch_size: must be a whole number of at least 1, got '0'",
        "--output none/r.json": "--output none/r.json: name a file in a folder that exists",
    },
    "geometry.py": {
        "--embeddings none.npz": "--embeddings none.npz: must be an .npz file of arrays x and y ([Errno 2]",
        "--embeddings ''": "--embeddings is empty",
        "--embeddings empty.npz": "--embeddings empty.npz: must be an .npz file",
        "--embeddings cut.npz": "--embeddings cut.npz: must be an .npz file of arrays x and y (File is not a zip file)",
        "--embeddings one_array.npy": "--embeddings one_array.npy: must be an .npz file",
        "--embeddings other_names.npz": "--embeddings other_names.npz: must be an .npz file of arrays x and y",
        "--embeddings objects.npz": "--embeddings objects.npz: must be an .npz file of arrays x and y",
        "--embeddings words.npz": "--embeddings words.npz: must be an .npz file of arrays x and y (of numbers, got str",
        "--embeddings complex.npz": "arrays x and y (of numbers, got complex128)",
        "--embeddings no_width.npz": "x and y must both be [N, D], N >= 2, D >= 1, got [5, 0], [5, 0]",
        "--embeddings one_row.npz": "x and y must both be [N, D], N >= 2, D >= 1, got [1, 3], [1, 3]",
        "--embeddings other_shapes.npz": "x and y must both be [N, D], N >= 2, D >= 1, got [5, 3], [4, 3]",
        "--embeddings nan.npz": "nan.npz: 5 of 10 embeddings hold NaN, infinity or only 0",
        "--embeddings zeros.npz": "zeros.npz: 10 of 10 embeddings hold NaN, infinity or only 0",
        "--embeddings huge.npz": "huge.npz: 5 of 10 embeddings hold NaN, infinity or only 0",
        "--embeddings repo/README.md": "--embeddings repo/README.md: must be an .npz file",
        "--embeddings repo/model.safetensors": "--embeddings repo/model.safetensors: must be an .npz file",
        "--embeddings a=e.npz a=e.npz": "the name a is given twice",
        "--embeddings e.npz --model bert": "--model embeds --text, --file or --images",
        "--embeddings e.npz --synthetic": "argument --synthetic: not allowed with argument --embeddings",
        "--embeddings e.npz --num_pairs 1": "argument --num_pairs: must be a whole number of at least 2, got '1'",
        "--embeddings e.npz --seed -1": "argument --seed: must be a whole number of at least 0, got '-1'",
        f"--embeddings e.npz --seed {LARGE}": "argument --seed: must be below 2^63",
        "--embeddings e.npz --divergence chi": "argument --divergence: invalid choice: 'chi'",
        "--embeddings e.npz --flow": "pairs that differ are too few to estimate a density, 200 are needed",
        "--embeddings e.npz --plot out/p.txt": "--plot out/p.txt: its name must end in .png, .pdf, .svg",
        "--embeddings e.npz --plot none/p.png": "--plot none/p.png: name a file in a folder that exists",
        "--embeddings e.npz --output /proc/r.json": "--output /proc/r.json: nothing can be written there",
        "--embedding e.npz": "unrecognized arguments: --embedding e.npz",
        "--synthetic --flow --num_pairs 150": "150 pairs that differ are too few to estimate a density",
        "--synthetic --flow --flow_dims 2": "argument --flow_dims: must be a whole number of at least 3, got '2'",
        "--model bert --text none.txt": "--text none.txt: no such file",
        "--model bert --text repo/README.md": "--text repo/README.md: unknown kind of file",
        "--model bert --text png.txt": "png.txt cannot be read as .txt: line 1 is not UTF-8",
        "--model bert --text single.txt": "bert: 1 pair of single.txt, 2 are needed",
        "--model bert --text train.txt --strict": "--model bert: its files say nothing of pooling",
        "--model bert --file low.tsv": "--file low.tsv: 0 pairs graded 4 or more, 2 are needed",
        "--model vit --text train.txt": "--model vit: ",
        "--model ./none --text train.txt": "no such folder",
        "--images images.parquet": "--images needs --model: an image model",
        "--images images.parquet --model bert": "--model bert: bert is no image model",
        "--images images.parquet --model repo/README.md": "--model repo/README.md: ",
        "--images images.parquet --model vit --image_size 4": "--image_size 4 does not fit vit",
        "--images images.parquet --model vit --image_size 16 --after_head": "vit is no checkpoint of an image model",
        "--images none.parquet --model vit --image_size 16": "--images none.parquet: no such folder or .parquet file",
        "--images repo/geometry.png --model vit --image_size 16": "--images repo/geometry.png: no such folder",
        "--images broken.parquet --model vit --image_size 16": "broken.parquet: none of 20 images can be read",
        "--images digits --model vit --image_size 16": "digits: images of 1 channels, the model takes 3",
        "--after_head": "--after_head needs --images",
    },
    "image_probe.py": {
        "--images none.parquet": "--images none.parquet: no such folder or .parquet file",
        "--images repo/README.md": "--images repo/README.md: no such folder or .parquet file",
        "--images repo/geometry.png": "--images repo/geometry.png: no such folder or .parquet file",
        "--images broken.parquet": "broken.parquet: none of 20 images can be read",
        "--images null_labels.parquet": "row 2 of column 'label' (--label_column) is empty",
        "--images digits": "scikit-learn's digits: images of 1 channels, the model takes 3",
        "--image_size 4": "--image_size 4 does not fit vit",
        "--model ./none": "no such folder ./none",
        "--model bert": "--model bert: bert is no image model",
        "--model repo/model.safetensors": "--model repo/model.safetensors: ",
        "--model vit_cut_weights": "--model vit_cut_weights: ",
        "--temperatures nan": "argument --temperatures: must be a finite number above 0, got 'nan'",
        "--temperatures 0": "argument --temperatures: must be a finite number above 0, got '0'",
        "--ks 0": "argument --ks: must be a whole number of at least 1, got '0'",
        "--seed -1": "argument --seed: must be a whole number of at least 0, got '-1'",
        "--held_out 40": "images.parquet: --held_out must be from 1 to 39, got 40",
        "--label_column img": "column 'img' (--label_column) must hold whole numbers or names, got Image",
        "--output none/r.json": "--output none/r.json: name a file in a folder that exists",
    },
    "loss_benchmark.py": {
        "--sizes 1": "argument --sizes: must be a whole number of at least 2, got '1'",
        "--size 8": "unrecognized arguments: --size 8",
        "--dim 0": "argument --dim: must be a whole number of at least 1, got '0'",
        "--gamma nan": "argument --gamma: must be a finite number above 0, got 'nan'",
        "--alpha -1": "argument --alpha: must be a finite number above 0, got '-1'",
        "--block_size 0": "argument --block_size: must be a whole number of at least 1, got '0'",
        "--max_memory inf": "argument --max_memory: must be a finite number above 0, got 'inf'",
        "--divergence chi": "argument --divergence: invalid choice: 'chi'",
        "--output none/r.json": "--output none/r.json: name a file in a folder that exists",
        "--plot out/p.txt": "--plot out/p.txt: its name must end in .png, .pdf, .svg",
    },
    "views_benchmark.py": {
        "--source 0": "argument --source: must be a whole number of at least 1, got '0'",
        "--size abc": "argument --size: must be a whole number of at least 1, got 'abc'",
        "--rounds -1": "argument --rounds: must be a whole number of at least 1, got '-1'",
        "--plot p.png": "unrecognized arguments: --plot p.png",
        "--output /proc/r.json": "--output /proc/r.json: nothing can be written there",
    },
    "throughput.py": {
        "--train_file none.txt": "--train_file none.txt: no such file",
        "--train_file repo/README.md": "--train_file repo/README.md: unknown kind of file",
        "--model ./none": "no such folder ./none",
        "--model vit": "--model vit: ",
        "--model repo/LICENSE": "--model repo/LICENSE: ",
        "--pooling sum": "argument --pooling: invalid choice: 'sum'",
        "--precision fp16": "--precision fp16 needs a GPU",
        "--batch_size 1": "argument --batch_size: must be a whole number of at least 2, got '1'",
        "--steps 0": "argument --steps: must be a whole number of at least 1, got '0'",
        "--warmup 0": "argument --warmup: must be a whole number of at least 1, got '0'",
        "--rounds 0": "argument --rounds: must be a whole number of at least 1, got '0'",
        "--options nosuch": "argument --options: invalid choice: 'nosuch'",
        "--train none.txt": "unrecognized arguments: --train none.txt",
        "--output none/r.json": "--output none/r.json: name a file in a folder that exists",
    },
    "batch_memory.py": {
        "--batches 1": "argument --batches: must be a whole number of at least 2, got '1'",
        "--batches": "argument --batches: expected at least one argument",
        "--mini_batch_size 8": "--mini_batch_size 8 is more than a batch, 4",
        "--batch 4": "unrecognized arguments: --batch 4",
        "--output out": "--output out: name a file in a folder that exists",
    },
    "fmicl-text push": {
        "none you/x": "none is no folder",
        "repo/README.md you/x": "repo/README.md is no folder",
        "empty_folder you/x": "empty_folder holds no encoder (config.json and *.safetensors)",
        "out you/x": "out holds no encoder (config.json and *.safetensors)",
        "bert_bad_modules you/x": "bert_bad_modules/modules.json: not a list of modules",
        "bert ''": "an argument is empty",
        "bert you/x --revision ''": "--revision is empty",
        "bert you/x --revison v2": "unrecognized arguments: --revison v2",
        "bert": "the following arguments are required: repo_id",
    },
    "fmicl-text compare": {
        "": "the following arguments are required: results",
        "none.json": "none.json: No such file or directory",
        "empty_folder": "empty_folder: Is a directory",
        "empty.json": "empty.json: not what eval/sts.py or eval/mteb_sts.py writes",
        "object.json": "object.json: holds no score",
        "numbers.json": "numbers.json: not what eval/sts.py or eval/mteb_sts.py writes",
        "nothing.json": "nothing.json: holds no score",
        "repo/README.md": "repo/README.md: not what eval/sts.py or eval/mteb_sts.py writes",
        "repo/geometry.png": "repo/geometry.png: not what eval/sts.py or eval/mteb_sts.py writes",
        "good.json good.json": "a has two scores for STS13 (SimCSE)",
        "good.json --plot out/p.txt": "--plot out/p.txt: its name must end in .png, .pdf, .svg",
        "good.json --plot none/p.png": "--plot none/p.png: name a file in a folder that exists",
    },
}

COMMANDS = [
    pytest.param(program, flags, said, id=f"{program} {flags}")
    for program, cases in CASES.items()
    for flags, said in cases.items()
]

# The csv loader of datasets leaves its file to the garbage collector when it is not read to the end.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with good and bad files, models, images and arrays, and a finished run in `out`."""
    folder, patch = tmp_path_factory.mktemp("material"), pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "repo").mkdir()
    for name in OF_THE_REPOSITORY:
        (folder / "repo" / Path(name).name).write_bytes((ROOT / name).read_bytes()[:50_000])
    make_texts(folder)
    make_models(folder)
    make_images(folder)
    make_arrays(folder)
    yield folder, contents(folder)
    patch.undo()
    gc.collect()


@pytest.fixture
def work(material):
    """A copy of it to work in, made anew where the test before has changed it."""
    folder, whole = material
    copy = folder.parent / "copy of material"
    if not copy.exists() or contents(copy) != whole:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
    return copy


def make_texts(folder):
    (folder / "train.txt").write_text("\n".join(sentences(40)))
    (folder / "single.txt").write_text("a dog\n")
    rows = [f"{i / 3}\t{a}\t{b}\n" for i, (a, b) in enumerate(zip(sentences(12, 1), sentences(12, 2), strict=True))]
    (folder / "dev.tsv").write_text(HEADER + "".join(rows))
    pairs = {"sentence1": [["a"], ["b"]], "sentence2": ["c", "d"], "score": [1.0, 2.0]}
    pa.parquet.write_table(pa.table(pairs), folder / "lists.parquet")
    entry = {"name": "a", "model": "a", "protocol": "SimCSE", "pooling": "cls", "pooling_from": "the model"}
    entry |= {"task": "STS13", "split": "test", "metrics": {"spearman": 70.0}}
    (folder / "good.json").write_text(json.dumps([entry]))


def make_models(folder):
    """A text model and an image model, and each with one thing wrong."""
    tiny_bert(folder / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    new_image_encoder(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folder / "vit")
    for model in ("bert", "vit"):
        weights = (folder / model / "model.safetensors").read_bytes()
        damaged(folder, model, "no_config", "config.json", None)
        damaged(folder, model, "bad_config", "config.json", b"{oops")
        config = json.loads((folder / model / "config.json").read_text())
        damaged(folder, model, "odd_config", "config.json", json.dumps(config | {"hidden_size": "wide"}).encode())
        damaged(folder, model, "no_weights", "model.safetensors", None)
        damaged(folder, model, "cut_weights", "model.safetensors", weights[:-100])
        damaged(folder, model, "text_weights", "model.safetensors", b"no weights at all, only text")
    tokenizer = json.loads((folder / "bert" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"dog": 9999}
    damaged(folder, "bert", "no_tokenizer", "tokenizer.json", None)
    damaged(folder, "bert", "bad_tokenizer", "tokenizer.json", b"{oops")
    damaged(folder, "bert", "other_tokenizer", "tokenizer.json", json.dumps(tokenizer).encode())
    damaged(folder, "bert", "bad_modules", "modules.json", b'{"a": 1}')


def damaged(folder, model, fault, name, content):
    """A copy of a model of which one file has another content, or is missing."""
    copy = folder / f"{model}_{fault}"
    shutil.copytree(folder / model, copy)
    (copy / name).unlink(missing_ok=True)
    if content is not None:
        (copy / name).write_bytes(content)


def make_images(folder):
    pictures = [picture(size=(16, 16), seed=i) for i in range(40)]
    label, whole = [i % 2 for i in range(40)], datasets.Value("int64")
    images = {
        "images": (pictures, label, whole),
        "one_class": (pictures[:20], [0] * 20, whole),
        "broken": ([{"bytes": b"no image", "path": None}] * 20, label[:20], whole),
        "null_images": ([None] * 20, label[:20], whole),
        "null_labels": (pictures[:20], [0, None] * 10, whole),
        "fractions": (pictures[:20], [i / 2 for i in range(20)], datasets.Value("float64")),
    }
    for name, (img, labels, kind) in images.items():
        features = datasets.Features({"img": datasets.Image(), "label": kind})
        rows = datasets.Dataset.from_dict({"img": img, "label": labels}, features=features)
        pa.parquet.write_table(rows.data.table, folder / f"{name}.parquet")
    pa.parquet.write_table(pa.table({"img": pa.array([], pa.string())}), folder / "no_rows.parquet")
    pa.parquet.write_table(pa.table({"text": ["a", "b"]}), folder / "text.parquet")


def make_arrays(folder):
    x = np.random.default_rng(0).standard_normal((5, 3))
    arrays = {
        "e": (x, x[::-1]),
        "objects": (np.array([{}] * 5), x),
        "words": (np.array(["a", "b"]), np.array(["a", "b"])),
        "complex": (x + 1j, x),
        "no_width": (x[:, :0], x[:, :0]),
        "one_row": (x[:1], x[:1]),
        "other_shapes": (x, x[:4]),
        "nan": (x * math.nan, x),
        "zeros": (x * 0, x * 0),
        "huge": (x * 1e300, x),
    }
    for name, (first, second) in arrays.items():
        np.savez(folder / f"{name}.npz", x=first, y=second)
    np.savez(folder / "other_names.npz", a=x, b=x)
    np.save(folder / "one_array.npy", x)
    (folder / "cut.npz").write_bytes((folder / "e.npz").read_bytes()[:-100])


def contents(folder):
    """Hashes of all files, and the folders; not the lock that a run leaves in its folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


@pytest.mark.parametrize("program, flags, said", COMMANDS)
def test_one_line_names_it_and_nothing_is_touched(work, material, program, flags, said, monkeypatch, capfd, caplog):
    if program == "mteb_sts.py":
        pytest.importorskip("mteb", reason="MTEB is an optional extra")
    for library in ("datasets", "transformers"):  # their handlers write to a stderr of their own
        monkeypatch.setattr(logging.getLogger(library), "handlers", [caplog.handler])
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", [program, *shlex.split(USUAL[program]), *shlex.split(flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path_of(program)), run_name="__main__")
    printed = capfd.readouterr()
    assert stop.value.code == 2
    (line,) = [line for line in printed.err.splitlines() if "error:" in line or "missing:" in line]
    assert line.startswith((f"{program}: error: ", f"{program}: missing: ")) and said in line
    assert "Traceback" not in printed.out + printed.err + caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert contents(work) == material[1]


def path_of(program):
    """The file of a recipe, of an eval script, or of a sub-command."""
    if program.startswith("fmicl-text "):
        return ROOT / "fmicl_text" / "cli" / f"{program.split()[1]}.py"
    return ROOT / ("recipes" if program.endswith("_fmicl.py") else "eval") / program


def test_the_usual_flags_alone_are_good_input(work, monkeypatch, capfd):
    """Else every case would be refused for what is in them."""
    monkeypatch.chdir(work)
    rest = {
        "sts.py": "--file dev.tsv",
        "geometry.py": "--embeddings e.npz",
        "fmicl-text compare": "good.json",
    }
    rest |= {"fmicl-text push": "bert you/x --dry-run"}
    for program in ("simcse_fmicl.py", "vision_fmicl.py", "image_probe.py", *rest):
        monkeypatch.setattr(sys, "argv", [program, *shlex.split(f"{USUAL[program]} {rest.get(program, '')}")])
        runpy.run_path(str(path_of(program)), run_name="__main__")
    assert json.loads((work / "out" / "results.json").read_text())


digits = LabelledImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), "digits")
IN_PYTHON = {
    "divergence": (lambda: FMICLLoss("kld"), "divergence"),
    "gamma": (lambda: FMICLLoss("kl", gamma=math.nan), "gamma must be a finite number > 0, got nan"),
    "alpha": (lambda: FMICLLoss("kl", alpha=math.inf), "alpha must be a finite number > 0, got inf"),
    "block size": (lambda: FMICLLoss("kl", block_size=0), "block_size must be at least 1, got 0"),
    "similarity": (lambda: FMICLLoss("kl", similarity="dot"), "similarity must be one of gaussian, cosine; got 'dot'"),
    "one example": (lambda: FMICLLoss("kl")(torch.ones(1, 4), torch.ones(1, 4)), "a batch needs at least 2 examples"),
    "widths": (lambda: FMICLLoss("kl")(torch.ones(4, 4), torch.ones(4, 5)), "must all be [N, D]"),
    "arguments": (
        lambda: FMICLTrainingArguments("x", use_cpu=True, objective="infonce", alpha=2),
        "--alpha means nothing",
    ),
    "batch": (lambda: FMICLTrainingArguments("x", use_cpu=True, per_device_train_batch_size=1), "at least 2, got 1"),
    "momentum": (
        lambda: VisionTrainingArguments("x", use_cpu=True, momentum=1.0),
        "--momentum must be in [0, 1), got 1",
    ),
    "text of nothing": (lambda: load_training_text("none.txt"), "--train_file none.txt: no such file"),
    "no text": (lambda: load_training_text(), "exactly one of --train_file and --dataset_name is needed"),
    "pairs of nothing": (lambda: load_pairs("none.tsv"), "none.tsv: No such file"),
    "images of nothing": (lambda: load_images("none.parquet"), "--train_file none.parquet: no such folder"),
    "channels": (lambda: check_channels(digits, 3), "digits: images of 1 channels, the model takes 3"),
    "a device": (lambda: check_writable("--output", Path("/dev/full")), "--output /dev/full: name a file in a folder"),
    "name": (lambda: named_model("=x"), "=x: must be NAME=MODEL, or MODEL alone"),
}


@pytest.mark.parametrize("call, said", IN_PYTHON.values(), ids=IN_PYTHON)
def test_in_python_it_is_a_value_error_of_one_line(call, said):
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value) and "\n" not in str(error.value)
