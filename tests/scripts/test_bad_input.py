"""Bad input to every program: one line that names the cause, status 2, and no existing file changed.

To add a case, add a line to `CASES`: the arguments as typed, and the words that the error must contain: the flag, the
value, and a further term only where these do not identify the error (a line number, an accepted value). A string is
split at spaces; a tuple is for words that contain spaces. The wording is free.
The program runs in this process (a new one takes ten seconds to import its libraries), in the folder that `work`
makes, after `USUAL` flags, so that a case contains only the error: of a flag given twice the last one counts.
"""

import gc
import gzip
import hashlib
import io
import json
import logging
import math
import os
import re
import runpy
import shlex
import shutil
import sys
import zipfile
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
from fmicl_text.vision.data import check_channels, load_images
from fmicl_text.vision.encoder import new_image_encoder
from tests.support import picture, sentences, tiny_bert, words_missing

ROOT = Path(__file__).parent.parent.parent

# `out` contains a finished run, which a recipe may overwrite, but not when its input is bad.
USUAL = {
    "simcse_fmicl.py": "--model_name_or_path bert --train_file train.txt --sts_dev_file dev.tsv --pooling mean"
    " --per_device_train_batch_size 8 --gamma 2 --alpha 4 --max_steps 2 --eval_steps 2 --save_steps 2 --use_cpu True"
    " --disable_tqdm True --output_dir out --overwrite_output_dir True",
    "vision_fmicl.py": "--train_file images.parquet --held_out 8 --architecture resnet-8-small --head_dim 8"
    " --image_size 16 --per_device_train_batch_size 8 --max_steps 2 --use_cpu True --disable_tqdm True"
    " --output_dir out --overwrite_output_dir True",
    "sts.py": "--model bert --pooling mean --output out/scores.json",
    "mteb_sts.py": "--model bert --pooling mean --tasks STSBenchmark --output out/scores.json",
    "geometry.py": "--output out/scores.json",
    "image_probe.py": "--model vit --images images.parquet --held_out 8 --image_size 16 --output out/scores.json",
    "loss_benchmark.py": "--sizes 8 --dim 4 --repeats 1 --output out/scores.json",
    "views_benchmark.py": "--batch 4 --size 8 --source 8 --rounds 1 --output out/scores.json",
    "throughput.py": "--model bert --train_file train.txt --batch_size 4 --steps 1 --rounds 1 --output out/scores.json",
    "batch_memory.py": "--batches 4 --mini_batch_size 2 --output out/scores.json",
    "communication.py": "--processes 2 --rows 2 --width 4 --output out/scores.json",
    "batch_bias.py": "--batch 4 --micro_batches 2 --partitions 1 --output out/scores.json",
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
    "numbers.jsonl": '{"text": 1}\n{"text": 2}\n',
    "columns.csv": "title,body,author,year\na,b,c,2000\n",
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
    "semicolon.csv": "id;text\n1;a dog\n2;the cat\n" + "3;a;b\n" * 9,
    "pipe.tsv": "id|text\n1|a dog\n2|the cat\n" + "3|a|b\n" * 9,
    "texts/train.csv": "text\na dog\nthe cat\n",
    "commas.tsv": "id,text\n1,a dog\n2,the cat\n" + "3,a,b\n" * 9,
    "zero.yaml": 'train_file: "a\\0b.txt"\n',
    "surrogate.yaml": 'train_file: "a\\ud800b.txt"\n',
    "deep.json": "[" * 100_000,
    "escape/config.json": json.dumps({"model_type": "\x1b[31mred"}),
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
    "unlabeled/1.png": PNG,
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
        "--train_file none.txt": ("--train_file", "none.txt", "no such"),
        "--train_file ''": "--train_file empty",
        "--train_file": ("--train_file", "expected at least one argument"),
        "--train_file empty_folder": "--train_file empty_folder .txt",
        "--train_file empty.txt": "empty.txt empty",
        "--train_file blank.txt": "blank.txt blank",
        "--train_file utf16.txt": ("utf16.txt", "line 1", "UTF-8", "0xff"),
        "--train_file latin.txt": ("latin.txt", "line 2", "UTF-8", "0xef"),
        "--train_file png.txt": ("png.txt", "line 1", "UTF-8"),
        "--train_file png.jsonl": ("png.jsonl", "line 1", "UTF-8"),
        "--train_file png.txt.gz": "png.txt.gz gzipped",
        "--train_file cut.txt.gz": "cut.txt.gz compressed",
        "--train_file png.parquet": "png.parquet parquet",
        "--train_file cut.parquet": "cut.parquet parquet",
        "--train_file broken.jsonl": ("broken.jsonl", "line 2"),
        "--train_file nulls.jsonl": "nulls.jsonl blank",
        "--train_file unquoted.csv": ("unquoted.csv", "line 3", "quotes"),
        "--train_file numbers.jsonl": "numbers.jsonl text strings number",
        "--train_file columns.csv": "columns.csv title body --text_columns",
        "--train_file columns.csv --text_columns text": "columns.csv text --text_columns title body",
        "--train_file images.parquet": "images.parquet img label --text_columns",
        "--train_file same.txt": "same.txt 20",
        "--train_file null.jsonl": ("null.jsonl", "line 1", "object"),
        "--train_file few.txt": "few.txt 2 8",
        "--train_file repo/README.md": "--train_file repo/README.md .txt",
        "--train_file repo/LICENSE": "--train_file repo/LICENSE .txt",
        "--train_file repo/pyproject.toml": "--train_file repo/pyproject.toml .txt",
        "--train_file repo/simcse_fmicl.py": "--train_file repo/simcse_fmicl.py .txt",
        "--train_file repo/geometry.png": "--train_file repo/geometry.png .txt",
        "--train_file repo/model.safetensors": "--train_file repo/model.safetensors .txt",
        "--train_file semicolon.csv": "semicolon.csv id;text commas",
        "--train_file pipe.tsv": "pipe.tsv id|text tabs",
        "--train_file commas.tsv": "commas.tsv id,text tabs",
        "--train_file fifo.txt": "--train_file fifo.txt pipe",
        "--train_file fifo.txt --streaming True": "--train_file fifo.txt pipe",
        "--train_file /dev/zero": "--train_file /dev/zero device",
        f"--train_file {'a' * 300}.txt": ("--train_file", "no such"),
        "--train_file \udcff.txt": "UTF-8",
        "--train-file none.txt": ("--train_file", "none.txt", "no such"),
        "--dataset_name nobody/nothing": "--train_file train.txt --dataset_name nobody/nothing",
        "--dataset_config plain": "--dataset_config --dataset_name",
        "--dataset_split dev": "--dataset_split --dataset_name",
        "--max_train_samples -1": "--max_train_samples -1",
        "--max_train_samples many": "--max_train_samples many",
        "--max_seq_length 2": "--max_seq_length 2 3",
        "--max_seq_length 999": "--max_seq_length 999 40",
        "--streaming True --max_steps -1": "--streaming --max_steps -1",
        "--streaming True --train_file few.txt": "few.txt 2 8",
        # sentence pairs with similarity scores
        "--sts_dev_file none.tsv": ("none.tsv", "No such file"),
        "--sts_dev_file empty_folder": "empty_folder directory",
        "--sts_dev_file empty.tsv": "empty.tsv empty",
        "--sts_dev_file latin.tsv": ("latin.tsv", "line 2", "UTF-8"),
        "--sts_dev_file utf16.tsv": ("utf16.tsv", "line 1", "UTF-8"),
        "--sts_dev_file nul.tsv": "nul.tsv sentence1 sentence2 score",
        "--sts_dev_file one.tsv": "one.tsv 1 2",
        "--sts_dev_file six.tsv": ("six.tsv", "line 3", "6", "[0, 5]"),
        "--sts_dev_file nan.tsv": ("nan.tsv", "line 3", "nan", "[0, 5]"),
        "--sts_dev_file word.tsv": ("word.tsv", "line 3", "six"),
        "--sts_dev_file equal.tsv": "equal.tsv 1",
        "--sts_dev_file cells.tsv": ("cells.tsv", "line 3", "2"),
        "--sts_dev_file columns.tsv": "columns.tsv sentence1 sentence2 score grade left right",
        "--sts_dev_file lists.parquet": ("lists.parquet", "row 1", "sentence1", "['a']"),
        "--sts_dev_file cut.parquet": "cut.parquet parquet",
        "--sts_dev_file fifo.txt": "fifo.txt pipe",
        f"--sts_dev_file {'a' * 300}": ("too long",),
        "--sts_dev_file repo/README.md": "repo/README.md sentence1",
        "--sts_dev_file repo/LICENSE": "repo/LICENSE sentence1",
        "--sts_dev_file repo/simcse_fmicl.py": "repo/simcse_fmicl.py sentence1",
        "--sts_dev_file repo/geometry.png": ("repo/geometry.png", "line 1", "UTF-8"),
        "--sts_dev_file repo/model.safetensors": ("repo/model.safetensors", "line 1", "UTF-8"),
        # model
        f"--model_name_or_path {'a' * 300}": "--model_name_or_path",
        "--model_name_or_path ~nobody": ("--model_name_or_path", "~nobody", "no such"),
        "--model_name_or_path escape": "--model_name_or_path escape",
        "--model_name_or_path bert_outside": "--model_name_or_path bert_outside ../bert/model.safetensors",
        "--model_name_or_path bert_other_sizes": "--model_name_or_path bert_other_sizes shapes",
        "--model_name_or_path bert_deep_config": "--model_name_or_path bert_deep_config",
        # arguments of transformers
        "--label_smoothing_factor 0.1": "--label_smoothing_factor 0.1",
        "--fsdp full_shard": ("--fsdp", "accelerate launch"),
        "--eval_delay nan": "--eval_delay nan finite",
        "--warmup_steps 1e400": "--warmup_steps inf finite",
        "--optim_args foo=1": "--optim_args foo=1 --optim",
        "--torch_compile_mode x": "--torch_compile_mode x default",
        f"--per_device_train_batch_size {LARGE}": f"--per_device_train_batch_size {LARGE} 2^63",
        "--report_to wandb": "--report_to wandb",
        "--dataloader_persistent_workers True": "--dataloader_persistent_workers --dataloader_num_workers",
        "--dataloader-prefetch-factor 2": "--dataloader_prefetch_factor --dataloader_num_workers",
        "--use_liger_kernel True": "--use_liger_kernel",
        "--config zero.yaml": "UTF-8 NUL",
        "--config surrogate.yaml": "UTF-8",
        "--config fifo.txt": "--config fifo.txt pipe",
        "--model_name_or_path ./none": ("--model_name_or_path", "./none", "no such"),
        "--model_name_or_path nobody/nothing": "--model_name_or_path nobody/nothing connect",
        "--model_name_or_path ''": "--model_name_or_path empty",
        "--model_name_or_path empty_folder": "--model_name_or_path empty_folder config.json",
        "--model_name_or_path repo": "--model_name_or_path repo config.json",
        "--model_name_or_path repo/README.md": "--model_name_or_path repo/README.md file",
        "--model_name_or_path repo/model.safetensors": "--model_name_or_path repo/model.safetensors file",
        "--model_name_or_path vit": "--model_name_or_path vit",
        "--model_name_or_path bert_no_config": "--model_name_or_path bert_no_config config.json",
        "--model_name_or_path bert_bad_config": "--model_name_or_path bert_bad_config/config.json JSON",
        "--model_name_or_path bert_odd_config": "--model_name_or_path bert_odd_config hidden_size",
        "--model_name_or_path bert_no_weights": "--model_name_or_path bert_no_weights model.safetensors",
        "--model_name_or_path bert_cut_weights": "--model_name_or_path bert_cut_weights",
        "--model_name_or_path bert_text_weights": "--model_name_or_path bert_text_weights",
        "--model_name_or_path bert_no_tokenizer": "--model_name_or_path bert_no_tokenizer",
        "--model_name_or_path bert_bad_tokenizer": "--model_name_or_path bert_bad_tokenizer",
        "--model_name_or_path bert_other_tokenizer": "bert_other_tokenizer 9999 46",
        "--model_name_or_path bert_bad_modules": "--model_name_or_path bert_bad_modules",
        "--dropout nan": ("--dropout", "nan", "[0, 1)"),
        "--lora_rank 0": "--lora_rank 0 1",
        "--head mlp": "--head mlp simcse",
        "--pooling sum": "--pooling sum lasttoken",
        # flags
        "junk": "junk",
        "--gama 2": "--gama",
        "--gam 2": "--gam",
        "--gamma": ("--gamma", "expected one argument"),
        "--gamma abc": "--gamma abc",
        "--gamma 1e999": "--gamma inf",
        "--alpha 0": "--alpha 0.0",
        "--learning_rate nan": "--learning_rate nan",
        "--learning_rate inf": "--learning_rate inf",
        "--weight_decay nan": "--weight_decay nan",
        "--max_grad_norm -1": "--max_grad_norm -1.0",
        "--adam_beta1 2": ("--adam_beta1", "2.0", "[0, 1)"),
        "--adam_epsilon 0": "--adam_epsilon 0.0",
        "--seed 1.5": "--seed 1.5",
        f"--seed {LARGE}": f"--seed {LARGE} 4294967295",
        "--data_seed -1": "--data_seed -1 4294967295",
        "--max_steps 0": "--max_steps --num_train_epochs 0",
        "--max_steps -1 --num_train_epochs 0": "--num_train_epochs 0.0",
        "--max_steps -1 --num_train_epochs nan": "--num_train_epochs nan",
        "--logging_steps -1": "--logging_steps -1.0",
        "--save_steps 0": "--save_steps 0.0",
        "--save_steps 3": "--load_best_model_at_end 3 2",
        "--save_total_limit -1": "--save_total_limit -1",
        "--gradient_accumulation_steps 0": "--gradient_accumulation_steps 0",
        "--dataloader_num_workers -1": "--dataloader_num_workers -1",
        "--dataloader_num_workers 1 --dataloader_prefetch_factor 0": "--dataloader_prefetch_factor 0",
        "--per_device_train_batch_size 1": "--per_device_train_batch_size 1 2",
        "--per_device_train_batch_size -8": "--per_device_train_batch_size -8",
        "--per_device_train_batch_size 1e9": "--per_device_train_batch_size 1e9",
        "--per_device_train_batch_size 1000000": "train.txt 40 1000000",
        "--mini_batch_size 9": "--mini_batch_size 9 8",
        "--optim nosuch": "--optim nosuch adamw_torch",
        "--optim lomo": "--optim lomo lomo_optim",
        "--optim_args x": "--optim_args x",
        "--lr_scheduler_type cosine_with_min_lr": "--lr_scheduler_type cosine_with_min_lr min_lr",
        "--lr_scheduler_kwargs [1]": "--lr_scheduler_kwargs [1]",
        "--lr_scheduler_kwargs {bad": "--lr_scheduler_kwargs {bad",
        "--accelerator_config none.json": ("none.json", "No such file"),
        "--eval_strategy sometimes": "sometimes steps epoch",
        "--metric_for_best_model nosuch": "--metric_for_best_model nosuch sts_spearman",
        "--report_to nosuch": "nosuch tensorboard",
        "--train_sampling_strategy nosuch": "--train_sampling_strategy nosuch random",
        # devices
        "--use_cpu maybe": "--use_cpu maybe",
        "--use_cpu 2": "--use_cpu 2",
        "--fp16 True": "fp16 GPU",
        "--fp16 True --bf16 True": ("fp16", "bf16", "at most one"),
        "--tf32 True": "--tf32 Ampere",
        "--torch_compile_backend nosuch": "--torch_compile_backend nosuch inductor",
        # output
        "--output_dir ''": "--output_dir empty",
        "--dataset_name texts --output_dir texts/out": "--output_dir texts/out --dataset_name texts",
        "--output_dir few.txt": "--output_dir few.txt",
        "--output_dir few.txt/new": "--output_dir few.txt/new",
        "--output_dir /proc --overwrite_output_dir False": "--output_dir /proc",
        "--output_dir bert --overwrite_output_dir False": "--output_dir bert config.json --overwrite_output_dir",
        "--overwrite_output_dir False": "--output_dir out results.json --overwrite_output_dir",
        "--overwrite_output_dir False --resume_from_checkpoint none": (
            "--resume_from_checkpoint",
            "none",
            "trainer_state.json",
        ),
        "--overwrite_output_dir False --resume_from_checkpoint True": (
            "--resume_from_checkpoint",
            "True",
            "out/checkpoint-2",
            "manifest.json",
        ),
        "--resume_from_checkpoint True": "--overwrite_output_dir --resume_from_checkpoint",
        "--push_to_hub True --hub_model_id a/b/c": "a/b/c repository",
        # --config
        "--config none.yaml": ("--config", "none.yaml", "No such file"),
        "--config ''": "--config empty",
        "--config": ("--config", "expected one argument"),
        "--config empty_folder": "--config empty_folder directory",
        "--config empty.yaml": "--config empty.yaml",
        "--config list.yaml": "--config list.yaml list",
        "--config unknown.yaml": "--config unknown.yaml divergnce",
        "--config twice.yaml": "--config twice.yaml gamma",
        "--config date.yaml": "--config date.yaml month",
        "--config latin.yaml": "--config latin.yaml UTF-8 0xef",
        "--config utf16.yaml": "--config utf16.yaml UTF-8 0xff",
        "--config nul.yaml": "--config nul.yaml #x0000",
        "--config tab.yaml": ("--config", "tab.yaml", "line 2"),
        "--config deep.yaml": "--config deep.yaml recursion",
        "--config tag.yaml": "--config tag.yaml python/object/apply:os.getcwd",
        "--config nested.yaml": ("--seed", '{"train": 1}'),
        "--config list_value.yaml": ("--seed", "[1, 2]"),
        "--config word_value.yaml": "--seed large",
        "--config empty_value.yaml": "--head empty",
        "--config repo/README.md": "--config repo/README.md line",
        "--config repo/LICENSE": "--config repo/LICENSE line",
        "--config repo/pyproject.toml": "--config repo/pyproject.toml line",
        "--config repo/simcse_fmicl.py": "--config repo/simcse_fmicl.py line",
        "--config repo/geometry.png": "--config repo/geometry.png UTF-8",
        "--config repo/model.safetensors": "--config repo/model.safetensors UTF-8",
    },
    "vision_fmicl.py": {
        "--train_file none.parquet": ("--train_file", "none.parquet", "no such"),
        "--train_file ''": "--train_file empty",
        "--train_file png.parquet": "png.parquet parquet",
        "--train_file cut.parquet": "cut.parquet parquet",
        "--train_file no_rows.parquet": "no_rows.parquet images",
        "--train_file text.parquet": "text.parquet images --image_column text",
        "--train_file broken.parquet": "broken.parquet 20",
        "--train_file null_images.parquet": "null_images.parquet 20",
        "--train_file fractions.parquet": "fractions.parquet label --label_column float64",
        "--train_file empty_folder": "empty_folder images",
        "--train_file no_images": "no_images images",
        "--train_file broken_images": "broken_images 2",
        "--train_file unlabeled": "--held_out unlabeled image 8",
        "--train_file repo/README.md": "--train_file repo/README.md .parquet",
        "--train_file repo/LICENSE": "--train_file repo/LICENSE .parquet",
        "--train_file repo/geometry.png": "--train_file repo/geometry.png .parquet",
        "--train_file repo/model.safetensors": "--train_file repo/model.safetensors .parquet",
        "--dataset_name b": "--train_file --dataset_name",
        "--dataset_split dev": "--dataset_split --dataset_name",
        "--image_column label": "images.parquet label --image_column int64",
        "--label_column img": "images.parquet img --label_column image",
        "--label_column y": "images.parquet y --label_column img label",
        "--held_out 40": "images.parquet --held_out 40 38",
        "--validation 35": "images.parquet --validation 35 30",
        "--max_train_samples 4": ("4 training", "8"),
        "--image_size 0": "--image_size 0",
        "--image_size 4 --model_name_or_path vit": "--image_size 4 vit",
        "--image_size 24 --model_name_or_path vit": "--image_size 24 vit",
        "--model_name_or_path ./none": ("--model_name_or_path", "./none", "no such"),
        "--model_name_or_path bert": "--model_name_or_path bert image",
        "--model_name_or_path repo": "--model_name_or_path repo config.json",
        "--model_name_or_path repo/README.md": "--model_name_or_path repo/README.md JSON",
        "--model_name_or_path repo/model.safetensors": "--model_name_or_path repo/model.safetensors JSON",
        "--model_name_or_path vit_bad_config": "--model_name_or_path vit_bad_config/config.json JSON",
        "--model_name_or_path vit_odd_config": "--model_name_or_path vit_odd_config hidden_size",
        "--model_name_or_path vit_no_weights": "--model_name_or_path vit_no_weights model.safetensors",
        "--model_name_or_path vit_cut_weights": "--model_name_or_path vit_cut_weights",
        "--pooling cls": "--pooling cls resnet_small_stem mean pooler",
        "--architecture resnet-99": "--architecture resnet-99 resnet-18",
        "--views simclr": "--views simclr cifar",
        "--divergence chi": "--divergence chi kl",
        "--gama 1": "--gama",
        "--sts_dev_file dev.tsv": "--sts_dev_file",
        "--temperature 0.1": "--temperature fmicl",
        "--per_device_train_batch_size 1": "--per_device_train_batch_size 1 2",
        "--mini_batch_size 8": "--mini_batch_size images",
        "--momentum nan": ("--momentum", "nan", "[0, 1)"),
        "--optim nosuch": "nosuch adamw_torch",
        "--optim adamw_bnb_8bit": "--optim adamw_bnb_8bit bitsandbytes",
        "--train_sampling_strategy group_by_length": "--train_sampling_strategy group_by_length images",
        "--queue_size 64": "--queue_size --method simclr",
        "--encoder_momentum 0.9": "--encoder_momentum --method simclr",
        "--method mocov3 --encoder_momentum 1.5": ("--encoder_momentum", "1.5", "[0, 1]"),
        "--method moco --objective infonce --queue_size 0": "--queue_size 0",
        f"--method moco --objective infonce --queue_size {10**13}": f"--queue_size {10**13} memory",
        "--method moco --objective infonce --queue_size 15": "--queue_size 15 16",
        "--method moco --objective infonce --negatives both": "--negatives both --method moco",
        "--load_best_model_at_end True": "--load_best_model_at_end --validation",
        "--metric_for_best_model sts_spearman": "--metric_for_best_model sts_spearman knn_accuracy",
        "--fp16 True": "fp16 GPU",
        "--activation_checkpointing True": "--activation_checkpointing True",
        "--overwrite_output_dir False": "--output_dir out results.json --overwrite_output_dir",
        "--config repo/README.md": "--config repo/README.md line",
        "--config repo/geometry.png": "--config repo/geometry.png UTF-8",
        "--config unknown.yaml": "--config unknown.yaml divergnce",
    },
    "sts.py": {
        "--file none.tsv": ("none.tsv", "No such file"),
        "--file ''": "--file empty",
        "--file lists.parquet": ("lists.parquet", "row 1", "sentence1", "['a']"),
        "--file six.tsv": ("six.tsv", "line 3", "6", "[0, 5]"),
        "--file repo/README.md": "repo/README.md sentence1 sentence2 score",
        "--file repo/geometry.png": ("repo/geometry.png", "line 1", "UTF-8"),
        "--file repo/simcse_fmicl.py": "repo/simcse_fmicl.py sentence1",
        "--file dev.tsv --data_dir sick": "--data_dir --file",
        "--file dev.tsv --split dev": "--file --split",
        "--file dev.tsv --model vit": "--model vit",
        "--file dev.tsv --model ''": "--model empty",
        "--file dev.tsv --model kl=": "kl= NAME=MODEL",
        "--file dev.tsv --model =bert": "=bert NAME=MODEL",
        "--file dev.tsv --model bert bert": "--model twice",
        "--file dev.tsv --model repo/README.md": "--model repo/README.md file",
        "--file dev.tsv --model repo/model.safetensors": "--model repo/model.safetensors file",
        "--file dev.tsv --model bert_odd_config": "--model bert_odd_config hidden_size",
        "--file dev.tsv --model bert_bad_modules": "--model bert_bad_modules",
        "--file dev.tsv --model bert_other_tokenizer": "--model bert_other_tokenizer 9999 46",
        "--file dev.tsv --pooling sum": "--pooling sum lasttoken",
        "--file dev.tsv --pool cls": "--pool cls",
        "--file dev.tsv --strict maybe": "maybe",
        "--file dev.tsv --batch_size 0": "--batch_size 0 1",
        f"--file dev.tsv --batch_size {LARGE}": f"--batch_size {LARGE} 2^63",
        "--file dev.tsv --max_seq_length 999": "--max_seq_length 999 40",
        "--file fifo.txt": "fifo.txt pipe",
        "--file dev.tsv --max-seq-length 999": "--max_seq_length 999 40",
        "--file dev.tsv --model bert_outside": "--model bert_outside ../bert/model.safetensors",
        "--file dev.tsv --output dev.tsv": "--output dev.tsv",
        "--file dev.tsv --output out/none.json/x": "--output out/none.json/x",
        "--file dev.tsv --output none/r.json": "--output none/r.json folder",
        "--file dev.tsv --output out": "--output out folder",
        "--file dev.tsv --output /proc/r.json": "--output /proc/r.json",
        "--tasks STS13 STS13": "--tasks twice",
        "--data_dir none": "--data_dir none STS/ SICK/",
        "--data_dir few.txt": "--data_dir few.txt STS/ SICK/",
        "--data_dir sick --tasks STS13 --split dev": "STS13 test dev",
        "--data_dir sick --tasks SICKRelatedness": "SICKRelatedness sick 2 4,927",
    },
    "mteb_sts.py": {
        "--tasks STS13 STS13": "--tasks twice",
        "--tasks STS13 STS133": "--tasks STS133 STS13",
        "--model m m": "--model twice",
        "--model ./none": ("--model", "./none", "no such"),
        "--model repo/LICENSE": "--model repo/LICENSE file",
        "--model vit": "--model vit",
        "--cache few.txt": "--cache few.txt",
        "--batch_size 0": "--batch_size 0 1",
        "--output none/r.json": "--output none/r.json folder",
    },
    "geometry.py": {
        "--embeddings none.npz": ("--embeddings", "none.npz", "No such file"),
        "--embeddings ''": "--embeddings empty",
        "--embeddings empty.npz": "--embeddings empty.npz .npz",
        "--embeddings cut.npz": "--embeddings cut.npz zip",
        "--embeddings one_array.npy": "--embeddings one_array.npy .npz",
        "--embeddings other_names.npz": "--embeddings other_names.npz x y",
        "--embeddings objects.npz": "--embeddings objects.npz allow_pickle",
        "--embeddings words.npz": "--embeddings words.npz str32",
        "--embeddings complex.npz": "--embeddings complex.npz complex128",
        "--embeddings no_width.npz": ("--embeddings", "no_width.npz", "[5, 0]"),
        "--embeddings one_row.npz": ("--embeddings", "one_row.npz", "[1, 3]"),
        "--embeddings other_shapes.npz": ("--embeddings", "other_shapes.npz", "[5, 3]", "[4, 3]"),
        "--embeddings nan.npz": "nan.npz 5 10 NaN",
        "--embeddings zeros.npz": ("zeros.npz", "10 of 10"),
        "--embeddings huge.npz": "huge.npz 5 10 infinity",
        "--embeddings repo/README.md": "--embeddings repo/README.md .npz",
        "--embeddings repo/model.safetensors": "--embeddings repo/model.safetensors .npz",
        "--embeddings a=e.npz a=e.npz": ("name a", "twice"),
        "--embeddings e.npz --model bert": "--model --embeddings",
        "--embeddings e.npz --synthetic": "--synthetic --embeddings",
        "--embeddings e.npz --num_pairs 1": "--num_pairs 1 2",
        "--embeddings e.npz --seed -1": "--seed -1 0",
        f"--embeddings e.npz --seed {LARGE}": f"--seed {LARGE} 2^63",
        "--embeddings e.npz --divergence chi": "--divergence chi kl",
        "--embeddings e.npz --flow": ("4 pairs", "200"),
        "--embeddings lies.npz": ("--embeddings lies.npz", "shape"),
        "--embeddings fifo.txt": "--embeddings fifo.txt pipe",
        "--embeddings e.npz --output e.npz": "--output e.npz",
        "--file dev.tsv --output dev.tsv": "--output dev.tsv",
        "--embeddings e.npz --plot out/p.txt": "--plot out/p.txt .png",
        "--embeddings e.npz --plot none/p.png": "--plot none/p.png folder",
        "--embeddings e.npz --output /proc/r.json": "--output /proc/r.json",
        "--embedding e.npz": "--embedding e.npz",
        "--synthetic --flow --num_pairs 150": ("150 pairs", "200"),
        "--synthetic --flow --flow_dims 2": "--flow_dims 2 3",
        "--model bert --text none.txt": ("--text", "none.txt", "no such"),
        "--model bert --text repo/README.md": "--text repo/README.md .txt",
        "--model bert --text png.txt": ("png.txt", "line 1", "UTF-8"),
        "--model bert --text single.txt": "bert single.txt 1 2",
        "--model bert --text train.txt --strict": "--model bert --pooling --strict",
        "--model bert --file low.tsv": "--file low.tsv 0 4 2",
        "--model vit --text train.txt": "--model vit",
        "--model ./none --text train.txt": ("--model", "./none", "no such"),
        "--images images.parquet": "--images --model",
        "--images images.parquet --model bert": "--model bert image",
        "--images images.parquet --model repo/README.md": "--model repo/README.md JSON",
        "--images images.parquet --model vit --image_size 4": "--image_size 4 vit",
        "--images images.parquet --model vit --image_size 16 --after_head": "vit training_only.safetensors",
        "--images none.parquet --model vit --image_size 16": ("--images", "none.parquet", "no such"),
        "--images repo/geometry.png --model vit --image_size 16": "--images repo/geometry.png .parquet",
        "--images broken.parquet --model vit --image_size 16": "broken.parquet 20",
        "--after_head": "--after_head --images",
    },
    "image_probe.py": {
        "--images none.parquet": ("--images", "none.parquet", "no such"),
        "--images repo/README.md": "--images repo/README.md .parquet",
        "--images repo/geometry.png": "--images repo/geometry.png .parquet",
        "--images broken.parquet": "broken.parquet 20",
        "--images unlabeled": "--held_out unlabeled image 8",
        "--image_size 4": "--image_size 4 vit",
        "--model ./none": ("--model", "./none", "no such"),
        "--model bert": "--model bert image",
        "--model repo/model.safetensors": "--model repo/model.safetensors JSON",
        "--model vit_cut_weights": "--model vit_cut_weights",
        "--temperatures nan": "--temperatures nan",
        "--temperatures 0": "--temperatures 0",
        "--ks 0": "--ks 0 1",
        "--seed -1": "--seed -1 0",
        "--held_out 40": "images.parquet --held_out 40 38",
        "--label_column img": "images.parquet img --label_column image",
        "--output none/r.json": "--output none/r.json folder",
    },
    "loss_benchmark.py": {
        "--sizes 1": "--sizes 1 2",
        "--size 8": "--size 8",
        "--dim 0": "--dim 0 1",
        "--gamma nan": "--gamma nan",
        "--alpha -1": "--alpha -1",
        "--block_size 0": "--block_size 0 1",
        "--max_memory inf": "--max_memory inf",
        "--divergence chi": "--divergence chi kl",
        "--output none/r.json": "--output none/r.json folder",
        "--plot out/p.txt": "--plot out/p.txt .png",
    },
    "views_benchmark.py": {
        "--source 0": "--source 0 1",
        "--size abc": "--size abc",
        "--rounds -1": "--rounds -1 1",
        "--plot p.png": "--plot p.png",
        "--output /proc/r.json": "--output /proc/r.json",
    },
    "throughput.py": {
        "--train_file none.txt": ("--train_file", "none.txt", "no such"),
        "--train_file repo/README.md": "--train_file repo/README.md .txt",
        "--model ./none": ("--model", "./none", "no such"),
        "--model vit": "--model vit",
        "--model repo/LICENSE": "--model repo/LICENSE file",
        "--pooling sum": "--pooling sum lasttoken",
        "--precision fp16": "--precision fp16 GPU",
        "--batch_size 1": "--batch_size 1 2",
        "--steps 0": "--steps 0 1",
        "--warmup 0": "--warmup 0 1",
        "--rounds 0": "--rounds 0 1",
        "--options nosuch": "--options nosuch FMICLTrainer",
        "--train none.txt": "--train none.txt",
        "--output none/r.json": "--output none/r.json folder",
    },
    "batch_memory.py": {
        "--batches 1": "--batches 1 2",
        "--batches": ("--batches", "expected at least one argument"),
        "--mini_batch_size 8": "--mini_batch_size 8 4",
        "--batch 4": "--batch 4",
        "--output out": "--output out folder",
    },
    "communication.py": {
        "--processes 1": "--processes 1 2",
        "--processes": ("--processes", "expected at least one argument"),
        "--rows 0": "--rows 0 1",
        "--width 0": "--width 0 1",
        "--output out": "--output out folder",
    },
    "batch_bias.py": {
        "--batch 1": "--batch 1 2",
        "--micro_batches": ("--micro_batches", "expected at least one argument"),
        "--micro_batches 3": "--micro_batches 3 4",
        "--partitions 0": "--partitions 0 1",
        "--plot none/r.png": "--plot none/r.png folder",
        "--output out": "--output out folder",
    },
    "fmicl-text push": {
        "none you/x": "none folder",
        "repo/README.md you/x": "repo/README.md folder",
        "empty_folder you/x": "empty_folder config.json",
        "out you/x": "out config.json",
        "bert_bad_modules you/x": "bert_bad_modules/modules.json modules",
        "bert ''": "argument empty",
        "bert you/x --revision ''": "--revision empty",
        "bert you/x --revison v2": "--revison v2",
        "bert": "required repo_id",
    },
    "fmicl-text compare": {
        "": "required results",
        "none.json": ("none.json", "No such file"),
        "empty_folder": "empty_folder directory",
        "empty.json": "empty.json eval/sts.py",
        "object.json": "object.json score",
        "deep.json": "deep.json eval/sts.py",
        "fifo.txt": "fifo.txt pipe",
        "numbers.json": "numbers.json eval/sts.py",
        "nothing.json": "nothing.json score",
        "repo/README.md": "repo/README.md eval/sts.py",
        "repo/geometry.png": "repo/geometry.png eval/sts.py",
        "good.json good.json": "a STS13 SimCSE two",
        "good.json --plot out/p.txt": "--plot out/p.txt .png",
        "good.json --plot none/p.png": "--plot none/p.png folder",
    },
}

COMMANDS = [
    pytest.param(program, flags, words, id=f"{program} {flags}")
    for program, cases in CASES.items()
    for flags, words in cases.items()
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
    """A copy of it to work in, made again if the previous test has changed it."""
    folder, whole = material
    copy = folder.parent / "copy of material"
    if not copy.exists() or contents(copy) != whole:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("fifo.txt"))
        os.mkfifo(copy / "fifo.txt")
    return copy


def make_texts(folder):
    (folder / "train.txt").write_text("\n".join(sentences(40)))
    (folder / "single.txt").write_text("a dog\n")
    os.mkfifo(folder / "fifo.txt")
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
        damaged(folder, model, "deep_config", "config.json", b"[" * 100_000)
        wide = json.dumps(config | {"intermediate_size": 24}).encode()
        damaged(folder, model, "other_sizes", "config.json", wide)
        index = {"weight_map": {"weight": f"../{model}/model.safetensors"}}
        damaged(folder, model, "outside", "model.safetensors.index.json", json.dumps(index).encode())
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
        "broken": ([{"bytes": b"no image", "path": None}] * 20, label[:20], whole),
        "null_images": ([None] * 20, label[:20], whole),
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
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 64)})
    with zipfile.ZipFile(folder / "lies.npz", "w") as archive:
        for name in ("x.npy", "y.npy"):
            archive.writestr(name, header.getvalue() + bytes(64))
    np.save(folder / "one_array.npy", x)
    (folder / "cut.npz").write_bytes((folder / "e.npz").read_bytes()[:-100])


def contents(folder):
    """Hashes of all files, and the folders; not the lock that a run leaves in its folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


@pytest.mark.parametrize("program, flags, words", COMMANDS)
def test_one_line_names_the_cause_and_no_file_changes(
    work, material, program, flags, words, monkeypatch, capfd, caplog
):
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
    message = re.fullmatch(rf"{re.escape(program)}: (?:error|missing): (.*)", line)[1]
    assert not words_missing(message, words), message
    assert "Traceback" not in printed.out + printed.err + caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert contents(work) == material[1]


def path_of(program):
    """The file of a recipe, of an eval script, or of a sub-command."""
    if program.startswith("fmicl-text "):
        return ROOT / "fmicl_text" / "cli" / f"{program.split()[1]}.py"
    return ROOT / ("recipes" if program.endswith("_fmicl.py") else "eval") / program


@pytest.mark.slow
def test_the_usual_flags_alone_are_good_input(work, monkeypatch, capfd):
    """Otherwise they could be the cause of the errors."""
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


IN_PYTHON = {
    "divergence": (lambda: FMICLLoss("kld"), "divergence kld kl"),
    "gamma": (lambda: FMICLLoss("kl", gamma=math.nan), "gamma nan"),
    "alpha": (lambda: FMICLLoss("kl", alpha=math.inf), "alpha inf"),
    "block size": (lambda: FMICLLoss("kl", block_size=0), "block_size 0 1"),
    "similarity": (lambda: FMICLLoss("kl", similarity="dot"), "similarity dot gaussian"),
    "widths": (lambda: FMICLLoss("kl")(torch.ones(4, 4), torch.ones(4, 5)), ("x", "y", "(4, 4)", "(4, 5)")),
    "arguments": (
        lambda: FMICLTrainingArguments("x", use_cpu=True, objective="infonce", alpha=2),
        "alpha infonce",
    ),
    "batch": (
        lambda: FMICLTrainingArguments("x", use_cpu=True, per_device_train_batch_size=1),
        "per_device_train_batch_size 1 2",
    ),
    "momentum": (
        lambda: VisionTrainingArguments("x", use_cpu=True, momentum=1.0),
        ("momentum", "1.0", "[0, 1)"),
    ),
    "text of nothing": (lambda: load_training_text("none.txt"), "train_file=none.txt"),
    "no text": (lambda: load_training_text(), "train_file dataset_name"),
    "pairs of nothing": (lambda: load_pairs("none.tsv"), ("none.tsv", "No such file")),
    "images of nothing": (lambda: load_images("none.parquet"), "train_file=none.parquet"),
    "channels": (lambda: check_channels(4), "model 4 1 3"),
    "a device": (lambda: check_writable("--output", Path("/dev/full")), "--output /dev/full"),
    "name": (lambda: named_model("=x"), "=x NAME=MODEL"),
}


@pytest.mark.parametrize("call, words", IN_PYTHON.values(), ids=IN_PYTHON)
def test_in_python_it_is_a_value_error_of_one_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value) and not words_missing(str(error.value), words), error.value
