"""GPU-only tests: NCCL, sharding by FSDP and DeepSpeed in the trainer, fp16, the loss on CUDA."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmicl_text import FMICLLoss
from fmicl_text.quickstart import SENTENCES
from tests.support import sentences

ROOT = Path(__file__).parent.parent.parent
NO_DEVICE = "needs a CUDA device, and pytest -m gpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_DEVICE)]
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

TRAIN = """
import sys
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor
from fmicl_text import TextContrastiveModel, FMICLTrainer, FMICLTrainingArguments, build_text_encoder
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.text.collator import TextViewCollator

engine, folder, text, output = sys.argv[1:]
encoder = build_text_encoder(folder, pooling="mean")
args = FMICLTrainingArguments(output, per_device_train_batch_size=8, gamma=2.0, alpha=4.0, max_steps=2, bf16=True,
                              eval_strategy="steps", eval_steps=2, save_strategy="no", load_best_model_at_end=False)
rows = Dataset.from_dict({"text": open(text).read().splitlines()})
graded = Dataset.from_dict({"sentence1": rows["text"][:9], "sentence2": rows["text"][9:18], "score": list(range(9))})
trainer = FMICLTrainer(encoder, args, train_dataset=rows, data_collator=TextViewCollator(encoder.tokenizer, ["text"]),
                       evaluator=STSEvaluator(graded, progress=False))
trainer.train()
assert trainer.accelerator.distributed_type == DistributedType[engine], trainer.accelerator.distributed_type
assert torch.distributed.get_backend() == "nccl" and args.world_size == 2
if engine == "FSDP":
    parameters = list(trainer.model_wrapped.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    assert sum(p.to_local().numel() for p in parameters) < sum(p.numel() for p in parameters)
if engine == "DEEPSPEED":
    held = sum(p.numel() for group in trainer.optimizer.optimizer.param_groups for p in group["params"])
    assert held < sum(p.numel() for p in trainer.model.parameters())
trainer.save_model(output)
if args.process_index == 0:
    assert build_text_encoder(output).encode(["a dog runs"]).shape == (1, 32)
"""


@several
@pytest.mark.parametrize("config", ["multi_gpu", "fsdp", "deepspeed_zero2"])
def test_the_engine_trains_and_shards(tmp_path, bert_folder, config):
    if config == "deepspeed_zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    engine = {"multi_gpu": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[config]
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "text.txt").write_text("\n".join(sentences(64)))
    file = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    command += ["--num_processes", "2", str(tmp_path / "train.py"), engine, bert_folder]
    done = subprocess.run(
        [*command, str(tmp_path / "text.txt"), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block_size", [None, 100])
def test_the_loss_on_cuda_is_that_of_the_cpu(block_size):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(700, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = FMICLLoss("js", 1.0, 40.0, block_size=block_size)
    gradients = []
    for device in ("cpu", "cuda"):
        a, b = (rows.to(device).requires_grad_() for rows in (x, y))
        gradients.append(torch.cat(torch.autograd.grad(loss(a, b), (a, b))).cpu())
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 1e-12


def test_memory_of_the_loss_on_cuda_is_linear():
    x, y = (torch.randn(16384, 64, device="cuda", requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    FMICLLoss(block_size=1024)(x, y).backward()
    assert torch.cuda.max_memory_allocated() - held < 16384**2 * 4 / 8


SHORT = "--max_steps 6 --save_steps 3 --eval_steps 3 --save_strategy steps --disable_tqdm True"
DETERMINISTIC = "--full_determinism True"  # without it, two runs of a convolution or of compiled code differ
TEXT = f"simcse_fmicl.py {SHORT} --per_device_train_batch_size 16"
IMAGES = f"vision_fmicl.py {SHORT} --per_device_train_batch_size 64 {DETERMINISTIC}"
RUNS = [
    TEXT,
    f"{TEXT} --bf16 True",
    f"{TEXT} --fp16 True",
    f"{TEXT} --tf32 True --train_sampling_strategy group_by_length",
    f"{TEXT} --mini_batch_size 4",
    f"{TEXT} --gradient_accumulation_steps 2 --dataloader_num_workers 2",
    f"{TEXT} --objective infonce --head simcse",
    f"{TEXT} --activation_checkpointing True",
    f"{TEXT} --lora_rank 4",
    f"{TEXT} --torch_compile True {DETERMINISTIC}",
    f"{TEXT} --torch_compile True --torch_compile_mode reduce-overhead --bf16 True {DETERMINISTIC}",
    f"{TEXT} --train_file {SENTENCES} --streaming True --dataloader_num_workers 2",
    IMAGES,
    f"{IMAGES} --bf16 True",
    f"{IMAGES} --method moco --queue_size 256",
    f"{IMAGES} --method mocov3",
    f"{IMAGES} --torch_compile True",
]


def run_recipe(flags, folder):
    recipe, *flags = flags.split()
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / recipe), *flags, "--output_dir", str(folder)],
        cwd=folder.parent,
        # one thread, as tests run in parallel
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.parametrize("flags", RUNS, ids=lambda flags: flags.replace(f" {SHORT}", ""))
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, flags):
    done = run_recipe(flags, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert "cuda" in (tmp_path / "whole" / "results.json").read_text()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    done = run_recipe(f"{flags} --resume_from_checkpoint auto", tmp_path / "resumed")
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "whole" / "checkpoint-6").glob("*.safetensors"):
        whole, resumed = load_file(path), load_file(tmp_path / "resumed" / "checkpoint-6" / path.name)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
