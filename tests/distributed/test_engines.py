"""Launched processes, and sharded parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fmicl_text import FMICLLoss
from tests.support import (
    make_trainer,
    recipe_flags,
    relative_error,
    run_ranks,
    sentences,
    words_missing,
    write_recipe_data,
)

ROOT = Path(__file__).parent.parent.parent
ENGINES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def small_encoder():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8)]
    return torch.nn.Sequential(*layers).double()


def rows(dtype=torch.float64):
    return torch.randn(11, 2, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def encoder_gradient(model, batch, global_batch):
    x, y = model(batch.flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
    FMICLLoss("js", 1.0, 4.0, global_batch=global_batch)(x, y).backward()


def sharded_gradient(rank, wrap, strategy):
    """The gradient of an encoder wrapped by DDP or FSDP2, and how many parameters this rank stores."""
    model = small_encoder()
    batch = rows()[:6] if rank == 0 else rows()[6:]
    if wrap == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer, mesh=mesh)
        encoder_gradient(model, batch, strategy)
        gradient = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        held = sum(p.to_local().numel() for p in model.parameters())
        return gradient, held, sum(weight.numel() for weight in whole.values())
    model = DistributedDataParallel(model)
    encoder_gradient(model, batch, strategy)
    number = sum(p.numel() for p in model.parameters())
    return torch.cat([p.grad.flatten() for p in model.parameters()]), number, number


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_the_loss_under_ddp_and_fsdp2(wrap, strategy):
    """Two processes with 6 and 5 rows, and an encoder whose parameters are actually sharded."""
    model = small_encoder()
    encoder_gradient(model, rows(), "none")
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    answers = run_ranks(2, sharded_gradient, wrap, strategy)
    for gradient, held, total in answers:
        assert relative_error(gradient, exact) < 1e-12
        assert held < total if wrap == "fsdp2" else held == total
    assert sum(held for _, held, _ in answers) == answers[0][2] * (1 if wrap == "fsdp2" else 2)


def sharded_score(rank, folder, output_dir):
    """The score of an encoder after a step, with its layers and remaining weights sharded by FSDP2."""
    trainer = make_trainer(folder, output_dir, evaluate=True)
    expected = trainer.run_evaluator()
    mesh = init_device_mesh("cpu", (2,))
    for layer in trainer.model.encoder[0].model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(trainer.model, mesh=mesh)
    tokens = trainer.model.encoder.tokenizer(sentences(4), return_tensors="pt", padding=True)
    trainer.model(dict(tokens)).sum().backward()
    return expected, trainer.run_evaluator()


@pytest.mark.slow
def test_a_sharded_encoder_can_be_scored(bert_folder, tmp_path):
    for expected, score in run_ranks(2, sharded_score, bert_folder, tmp_path):
        assert score == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_every_engine_file_is_read_by_accelerate(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text()
    names = {"fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED", "one_gpu": "NO"}
    assert config.distributed_type.value == names.get(path.stem, "MULTI_GPU")


def test_the_engine_files_are_there():
    assert {path.stem for path in ENGINES} >= {"one_gpu", "multi_gpu", "multi_node", "fsdp", "deepspeed_zero2"}


def launch(*launcher, flags, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launcher]
    return subprocess.run(
        [*command, str(ROOT / "recipes" / "simcse_fmicl.py"), *flags],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def flags(tmp_path, bert_folder):
    write_recipe_data(tmp_path)
    return [*recipe_flags(bert_folder), "--max_steps", "2", "--logging_steps", "1", "--output_dir", "out"]


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path, flags):
    config = ROOT / "recipes" / "accelerate" / "two_cpus.yaml"
    done = launch("--config_file", str(config), flags=flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["engine"], results["processes"], results["steps"]) == ("MULTI_CPU", 2, 2)
    assert results["hyperparameters"]["global_batch"] == "gather"
    assert done.stdout.count("| sts_spearman") == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate starts these processes where there are GPUs")
def test_fewer_processes_than_requested_are_an_error(tmp_path, flags):
    """accelerate starts one process."""
    rest = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    done = launch("--cpu", "--num_processes", "2", *rest, flags=flags, cwd=tmp_path)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("simcse_fmicl.py: error: ")]
    assert errors and not words_missing(errors[0], ("2 processes", "1", "--multi_gpu")), done.stderr
    assert not (tmp_path / "out").exists()
