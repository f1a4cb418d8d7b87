"""Shared helpers: tiny models and texts, pictures, trainers, comparisons, several processes."""

import hashlib
import io
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import traceback
from datetime import timedelta

import datasets
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BeitConfig,
    BeitImageProcessorPil,
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextV2Config,
    DeiTConfig,
    DeiTImageProcessorPil,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    EfficientNetConfig,
    EfficientNetImageProcessorPil,
    MobileNetV2Config,
    MobileNetV2ImageProcessorPil,
    MobileViTImageProcessorPil,
    PreTrainedTokenizerFast,
    RegNetConfig,
    ResNetConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SwinConfig,
    TrainerCallback,
    ViTConfig,
    ViTImageProcessorPil,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, TextContrastiveModel, build_text_encoder
from fmicl_text.cli.main import main
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.text.collator import TextViewCollator
from fmicl_text.training.momentum import MomentumModel, MomentumTrainer
from fmicl_text.vision.architectures import SmallStemResNetConfig


def one_fast(values):
    """Parameters of a test, all but the first marked slow. Tuples are values of several arguments."""
    first, *rest = values
    rest = [value if isinstance(value, tuple) else (value,) for value in rest]
    return [first, *(pytest.param(*value, marks=pytest.mark.slow) for value in rest)]


def peft_or_skip():
    """peft, in a version that the installed transformers accepts; else the test is skipped."""
    return pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)


def run_command(*arguments):
    """The exit status of `fmicl-text ARGUMENTS`, in this process."""
    sys.argv = ["fmicl-text", *arguments]
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def tree(folder):
    """All paths below a folder, with the hashes of files and the targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = hashlib.sha256(str(content).encode()).hexdigest()
    return found


# ---- texts and a tiny text model

WORDS = (
    *("a", "the", "one", "two", "three", "small", "big", "red", "blue", "old", "man", "woman", "child", "dog", "cat"),
    *("bird", "horse", "boat", "car", "tree", "house", "river", "sea", "runs", "walks", "sleeps", "eats", "sings"),
    *("reads", "holds", "sees", "near", "under", "over", "in", "on", "with", "by", "and", "then", "slowly", "today"),
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def sentences(count, seed=0):
    """Distinct strings of 4 to 12 of the tiny model's words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)) for length in lengths]


def tiny_tokenizer(model_max_length=40):
    """The tokenizer of the tiny models: a token per word. None for a tokenizer without a maximum length."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=model_max_length, **names)


def tiny_bert(folder, dropout=0.1, dtype=torch.float32):
    """Write a 2-layer BERT of width 32 with its tokenizer to a folder. With initializer_range 0.02, the default, a new
    BERT maps all sentences to one point: gradients vanish and a gradient test passes for almost any bug."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.25,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def sts_pairs():
    """12 sentence pairs with similarity scores."""
    first, second = sentences(12, seed=1), sentences(12, seed=2)
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": [i * 5 / 11 for i in range(12)]})


def write_recipe_data(folder):
    """Write the files that the text recipe needs: 40 sentences and two blank lines, and 12 STS pairs."""
    (folder / "train.txt").write_text("\n".join([*sentences(40), "", "   "]), encoding="utf-8")
    rows = [f"{row['score']}\t{row['sentence1']}\t{row['sentence2']}" for row in sts_pairs()]
    (folder / "dev.tsv").write_text("\n".join(["score\tsentence1\tsentence2", *rows]), encoding="utf-8")


def recipe_flags(model):
    """Flags for a short run of the text recipe on these files."""
    return [
        *("--model_name_or_path", model, "--train_file", "train.txt", "--sts_dev_file", "dev.tsv", "--pooling", "mean"),
        *("--per_device_train_batch_size", "8", "--gamma", "2", "--alpha", "4", "--learning_rate", "1e-3"),
        *("--eval_steps", "2", "--save_steps", "2"),
    ]


# ---- pictures and tiny image models

TINY_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}


def tiny_mocov3_vit():
    config = ViTConfig(**TINY_VIT)
    config.fixed_positions = True
    return config


def tiny_small_image_resnet():
    return SmallStemResNetConfig(embedding_size=8, layer_type="basic", **STAGES)


# family: config, pooling that `auto` selects
IMAGE_FAMILIES = {
    "resnet": (ResNetConfig(embedding_size=8, layer_type="basic", **STAGES), "pooler"),
    "resnet, small stem": (tiny_small_image_resnet(), "pooler"),
    "regnet": (RegNetConfig(embedding_size=8, groups_width=4, **STAGES), "pooler"),
    "convnext": (ConvNextConfig(num_stages=2, **STAGES), "pooler"),
    "convnextv2": (ConvNextV2Config(num_stages=2, **STAGES), "pooler"),
    "mobilenetv2": (MobileNetV2Config(depth_multiplier=0.25), "pooler"),
    "efficientnet": (EfficientNetConfig(width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128), "pooler"),
    "dinov3 convnext": (DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]), "pooler"),
    "vit": (ViTConfig(**TINY_VIT), "cls"),
    "vit, mocov3": (tiny_mocov3_vit(), "cls"),
    "deit": (DeiTConfig(**TINY_VIT), "cls"),
    "swin": (SwinConfig(image_size=32, embed_dim=16, window_size=4, depths=[1, 1], num_heads=[2, 2]), "pooler"),
    "dinov2": (Dinov2Config(**TINY_VIT), "pooler"),
    "dinov2 with registers": (Dinov2WithRegistersConfig(**TINY_VIT), "pooler"),
    "dinov3": (DINOv3ViTConfig(**TINY_VIT), "pooler"),
    "beit": (BeitConfig(**TINY_VIT), "pooler"),
    "clip": (CLIPVisionConfig(**TINY_VIT), "pooler"),
    "siglip": (SiglipVisionConfig(**TINY_VIT), "pooler"),
}


# variant: an image processor of models of this kind
IMAGE_PROCESSORS = {
    "vit: squashed": lambda: ViTImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]),
    "dinov2: shorter side and crop": lambda: BitImageProcessorPil(size={"shortest_edge": 256}),
    "clip": CLIPImageProcessorPil,
    "siglip": SiglipImageProcessorPil,
    "deit: squashed and cropped": DeiTImageProcessorPil,
    "convnext: its own crop": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 224}),
    "efficientnet: normalized twice": lambda: EfficientNetImageProcessorPil(rescale_offset=True, include_top=True),
    "mobilenetv2": MobileNetV2ImageProcessorPil,
    "mobilevit: BGR, no mean": MobileViTImageProcessorPil,
    "beit": BeitImageProcessorPil,
    "no rescale": lambda: ViTImageProcessorPil(do_rescale=False),
    "no crop": lambda: BitImageProcessorPil(do_center_crop=False),
    "no resize": lambda: ViTImageProcessorPil(do_resize=False),
}


def picture(mode="RGB", size=(8, 8), seed=0, kind="PNG"):
    """A random image of a size (width, height), encoded, as a row of a table of images."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": f"{seed}.png"}


def image_parquet(folder, pictures, labels=None, column="img"):
    """Write pictures and labels (by default 0, 1, 0, 1, ...) to a parquet file; returns its path."""
    labels = [i % 2 for i in range(len(pictures))] if labels is None else labels
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({column: pictures, "label": labels}, features=features)
    path = folder / "images.parquet"
    rows.to_parquet(str(path))
    return str(path)


class LabeledPictures:
    """Stand-in for `fmicl_text.vision.data.Images`: noise around a color that is the class (labels 0, 1, 0, 1, ...)."""

    def __init__(self, count, seed=0, labels=None, sizes=((8, 8),), noise=300):
        self.labels = torch.arange(count) % 2 if labels is None else torch.as_tensor(labels)
        self.classes, self.channels, self.source = ("dark", "light"), 3, "noise"
        self.drafts, random = set(), np.random.default_rng(seed)
        self.made = []
        for i in range(count):
            width, height = sizes[i % len(sizes)]
            pixels = 90 + 60 * (i % 2) + random.normal(0, noise, (height, width, 3))
            self.made.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))

    def __len__(self):
        return len(self.labels)

    def pictures(self, rows, draft=None):
        self.drafts.add(draft)
        return [self.made[row] for row in rows]

    def for_views(self, rows, size, crop, seed):
        return torch.stack([torch.from_numpy(np.array(self.made[row])).movedim(-1, 0) for row in rows])

    def fingerprint(self):
        return str(self.labels.tolist())


# ---- trainers

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "save_total_limit": 2}


def make_trainer(folder, output_dir, head="none", columns=("text",), dataset=None, evaluate=False, **settings):
    """A trainer of the model in a folder: by default 4 steps of 8 of 64 sentences, nothing saved."""
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "gamma": 2.0,
        "alpha": 4.0,
        "logging_steps": 1,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": 2,
        "save_strategy": "no",
        "metric_for_best_model": "sts_spearman" if evaluate else None,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = FMICLTrainingArguments(output_dir=str(output_dir), **(defaults | settings))
    torch.manual_seed(3)
    encoder = build_text_encoder(folder, pooling="mean")
    return FMICLTrainer(
        model=TextContrastiveModel(encoder, head),
        args=args,
        train_dataset=dataset or Dataset.from_dict({"text": sentences(64)}),
        data_collator=TextViewCollator(encoder.tokenizer, list(columns)),
        evaluator=STSEvaluator(sts_pairs(), progress=False) if evaluate else None,
    )


def make_momentum_trainer(folder, output_dir, method, rows=64, columns=("text",), **settings):
    """A trainer of MoCo or MoCo v3, `method` its arguments, on the model in a folder."""
    defaults = {
        "per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 1e-2, "gamma": 2.0, "alpha": 4.0,
        "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
        "use_cpu": True, "disable_tqdm": True, "optim": "sgd", "lr_scheduler_type": "constant",
    }  # fmt: skip
    args = FMICLTrainingArguments(output_dir=str(output_dir), **(defaults | settings))
    torch.manual_seed(3)
    encoder = build_text_encoder(folder, pooling="mean")
    data = Dataset.from_dict({column: sentences(rows, seed) for seed, column in enumerate(columns)})
    collator = TextViewCollator(encoder.tokenizer, list(columns))
    args.negatives = "queue" if "queue_size" in method else args.negatives
    model = MomentumModel(
        TextContrastiveModel(encoder, "simcse"), method.get("queue_size", 0), method.get("predictor", False)
    )
    schedule = {name: value for name, value in method.items() if name not in ("queue_size", "predictor")}
    return MomentumTrainer(model, args, train_dataset=data, data_collator=collator, **schedule)


def make_family_trainer(folder, pooling, output_dir, lora_rank=None, load_in=None, **settings):
    """A trainer of any text model in a folder, with dropout 0.1 and a head, for two steps."""
    defaults = {
        "max_steps": 2, "per_device_train_batch_size": 8, "eval_strategy": "no", "save_strategy": "no", "gamma": 2.0,
        "alpha": 8.0, "load_best_model_at_end": False, "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3,
        "logging_steps": 1,
    }  # fmt: skip
    args = FMICLTrainingArguments(str(output_dir), **(defaults | settings))
    torch.manual_seed(0)
    encoder = build_text_encoder(folder, pooling=pooling, dropout=0.1, lora_rank=lora_rank, load_in=load_in)
    data = Dataset.from_dict({"text": sentences(32)})
    return FMICLTrainer(
        TextContrastiveModel(encoder, "simcse"),
        args,
        train_dataset=data,
        data_collator=TextViewCollator(encoder.tokenizer, ["text"]),
    )


def trained(trainer):
    trainer.train()
    return trainer


class Signal(TrainerCallback):
    """Sends signals, by default SIGTERM, to this process before a step."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers or (signal.SIGTERM,)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def breaking(trainer, step, value=math.nan, gradient=False):
    """The trainer, its output (or only its gradient) multiplied by NaN or infinity in one forward pass."""
    forward, calls = trainer.model.forward, []

    def broken(features):
        calls.append(1)
        out = forward(features)
        if len(calls) != step:
            return out
        if gradient:
            out.register_hook(lambda g: g * value)
            return out
        return out * value

    trainer.model.forward = broken
    return trainer


# ---- weights and gradients, compared


def weights(trainer):
    """Copies of a trainer's parameters, by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(a, b):
    """Whether two dictionaries of weights are equal bit for bit."""
    return all(torch.equal(a[name], b[name]) for name in a)


def relative_error(measured, exact):
    """Norm of the difference, divided by the norm of the exact value, which must not vanish."""
    assert exact.norm() > 1e-2
    return ((measured - exact).norm() / exact.norm()).item()


class Gradients(TrainerCallback):
    """Keeps the gradient of every step, joined, as the optimizer receives it."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())


PAIR_COLUMNS = ("sent0", "sent1")


def padded_pairs(count):
    """Sentence pairs of which every other eight are short, so that two processes' batches of 8 differ in padding."""

    def texts(seed):
        return [" ".join(t.split()[: 3 if i // 8 % 2 else None]) for i, t in enumerate(sentences(count, seed))]

    return Dataset.from_dict({"sent0": texts(1), "sent1": texts(2)})


def run_trainer(folder, output_dir, rows=16, dtype=torch.float32, streaming=False, **settings):
    """Gradients of every step, final weights and logged losses of a run of plain SGD, by default of one step."""
    dataset = padded_pairs(rows).to_iterable_dataset() if streaming else padded_pairs(rows)
    trainer = make_trainer(
        folder, output_dir, columns=PAIR_COLUMNS, dataset=dataset, optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", **({"max_steps": 1} | settings),
    )  # fmt: skip
    trainer.model.to(dtype)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return gradients.steps, weights(trainer), losses


# ---- messages


def words_missing(message, words):
    """The words (a string is split at spaces) that do not occur in a message as words of their own, in any case."""
    words = words.split() if isinstance(words, str) else words
    return [word for word in words if not re.search(rf"(?<![\w.-]){re.escape(word)}(?!\w|[./]\w)", message, re.I)]


def child_processes():
    """The children of this process, without the resource tracker, which a worker of another test may have started."""
    return [one for one in psutil.Process().children() if "resource_tracker" not in " ".join(one.cmdline())]


# ---- several processes, forked after the imports, which takes a fifth of a second

TIMEOUT = 15


def run_ranks(world_size, function, *args):
    """Call function(rank, *args) in each of world_size gloo processes; returns the results in rank order."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=one_rank, args=(results, f"{folder}/meeting", rank, world_size, function, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            answers = dict(pickle.loads(results.get(timeout=TIMEOUT)) for _ in ranks)
        finally:
            for process in ranks:
                process.join(5)
                process.kill()
    failures = [answer for answer in answers.values() if isinstance(answer, str) and answer.startswith("Traceback")]
    assert not failures, failures[0]
    return [answers[rank] for rank in range(world_size)]


def one_rank(results, meeting, rank, world_size, function, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT),
        )
        results.put(pickle.dumps((rank, function(rank, *args))))  # by value: torch would share memory
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put(pickle.dumps((rank, traceback.format_exc())))


def run_trainers(world_size, *args, function=run_trainer, **settings):
    """Call function(*args, **settings) in each of world_size processes, in the environment that a launcher sets."""
    return run_ranks(world_size, as_rank, world_size, function, args, settings)


def as_rank(rank, world_size, function, args, settings):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    for state in (AcceleratorState, GradientState, PartialState):  # the parent's
        state._shared_state.clear()
    return function(*args, **settings)
