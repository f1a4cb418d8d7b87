"""No downloaded code is executed: every payload here would create a file, the canary, which must not appear."""

import functools
import json
import os
import pickle
import shutil
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel, ViTConfig, ViTImageProcessorPil

from fmicl_text import InputError, TextContrastiveModel, build_text_encoder
from fmicl_text.cli.text import parse_args
from fmicl_text.evaluation.encoders import open_encoder
from fmicl_text.text.data import load_training_text
from fmicl_text.training import checkpoint as checkpoints
from fmicl_text.vision.data import load_images
from fmicl_text.vision.encoder import build_image_encoder, new_image_encoder
from fmicl_text.vision.model import open_head
from fmicl_text.vision.preprocessing import open_preprocessing
from tests.support import TINY_VIT, peft_or_skip, words_missing
from tests.support import make_family_trainer as make_trainer

CODE = """from transformers import BertConfig, BertModel
open({canary!r}, "w").close()
class Config(BertConfig): model_type = "custom"
class Model(BertModel): config_class = Config
"""
AUTO = {"auto_map": {"AutoConfig": "planted.Config", "AutoTokenizer": ["planted.Model", "planted.Model"]}}
AUTO["auto_map"] |= {"AutoModel": "planted.Model", "AutoImageProcessor": "planted.Model"}
CUSTOM_CODE = "Python code trust_remote_code=True"  # words of the errors
PICKLED = "weights pickle"
TEXT = [build_text_encoder, open_encoder]
LOADERS = {"plain": TEXT, "modules": TEXT, "image": [build_image_encoder]}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that no payload may create, whatever is answered to prompts."""
    monkeypatch.setattr("builtins.input", lambda prompt: "yes")
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


@pytest.fixture(scope="session")
def models(bert_folder, tmp_path_factory):
    """A plain text model, one of sentence-transformers, an image model."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(bert_folder, folder / "plain")
    build_text_encoder(bert_folder, pooling="mean").save(str(folder / "modules"), create_model_card=False)
    new_image_encoder(ViTConfig(**TINY_VIT)).save_pretrained(folder / "image", ViTImageProcessorPil())
    return folder


@pytest.fixture
def copy(models, tmp_path):
    """A copy of one of them, to be modified."""
    return lambda kind: Path(shutil.copytree(models / kind, tmp_path / kind))


class Payload:
    """Its pickle creates a file."""

    def __init__(self, path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


def plant(folder, path):
    """Code that creates a file when it is imported."""
    (folder / "planted.py").write_text(CODE.format(canary=str(path)))


def edit(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def rejected(function, *arguments, words="", **options):
    """Check that the call raises an error of one line that contains the words; returns the line."""
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message and not words_missing(message, words), message
    return message


def all_reject(folder, kind, words=""):
    [rejected(load, str(folder), words=words) for load in LOADERS[kind]]


def test_payloads_work(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("save", [torch.save, lambda it, path: path.write_bytes(pickle.dumps(it, protocol=2))])
@pytest.mark.parametrize("kind", LOADERS)
def test_pickled_weights(copy, canary, kind, save):
    folder = copy(kind)
    (folder / "model.safetensors").unlink()
    save({"weight": Payload(canary)}, folder / "pytorch_model.bin")
    all_reject(folder, kind, PICKLED)
    edit(folder / "sentence_bert_config.json", model_kwargs={"weights_only": False})
    all_reject(folder, kind, PICKLED)


def test_a_folder_cannot_allow_anything_itself(copy, monkeypatch):
    """The options that reach transformers are safe, whatever its version does with them."""
    folder, seen = copy("modules"), []
    asked = {"weights_only": False, "allow_all_kernels": True, "trust_remote_code": True}
    edit(folder / "sentence_bert_config.json", model_kwargs=asked, config_kwargs=asked, processor_kwargs=asked)
    load = AutoModel.from_pretrained
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *a, **options: seen.append(options) or load(*a, **options))
    for build in TEXT:
        build(str(folder))
    wanted = {"weights_only": True, "allow_all_kernels": False, "trust_remote_code": False}
    assert [{name: options[name] for name in wanted} for options in seen] == [wanted, wanted]


@pytest.mark.parametrize("kind", LOADERS)
def test_code_in_the_folder(copy, canary, kind):
    folder = copy(kind)
    plant(folder, canary)
    edit(folder / "config.json", **AUTO)
    assert [load(str(folder)) for load in LOADERS[kind]]  # as the stock class that config.json names
    edit(folder / "config.json", model_type="custom")
    all_reject(folder, kind, CUSTOM_CODE)
    if kind != "image":
        rejected(build_text_encoder, str(folder), dropout=0.1, words=CUSTOM_CODE)


def test_code_of_a_tokenizer(copy, canary):
    folder = copy("plain")
    plant(folder, canary)
    edit(folder / "tokenizer_config.json", tokenizer_class="Model", **AUTO)
    build_text_encoder(str(folder))  # tokenizer.json needs no class
    (folder / "tokenizer.json").unlink()
    all_reject(folder, "plain")


def test_code_of_an_image_processor(copy, canary, caplog):
    folder = copy("image")
    plant(folder, canary)
    edit(folder / "preprocessor_config.json", image_processor_type="Model", **AUTO)
    build_image_encoder(str(folder))
    assert open_preprocessing(str(folder), 3) is None and not words_missing(caplog.text, "image processor Python code")


def add_module(folder, kind, **config):
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2", "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("config.json", "router_config.json"):
        edit((folder / "2").mkdir(exist_ok=True) or folder / "2" / name, **config)


ROUTES = {"types": {"a": "planted.Model"}, "structure": {"query": ["a"]}, "parameters": {}}
DENSE = {"in_features": 32, "out_features": 32, "bias": True, "activation_function": "os.system"}
MODULES = [
    ("planted.Model", {}, CUSTOM_CODE), ("os.system", {}, CUSTOM_CODE), ("subprocess.Popen", {}, CUSTOM_CODE),
    ("antigravity", {}, CUSTOM_CODE), ("sentence_transformers.models.Router", ROUTES, CUSTOM_CODE),
    ("sentence_transformers.models.Dense", DENSE, PICKLED), ("sentence_transformers.base.model.pickle", {}, ""),
    ("sentence_transformers.util.import_from_string", {}, ""), (None, {}, ""), (5, {}, ""),
]  # fmt: skip


@pytest.mark.parametrize("kind, config, words", MODULES, ids=[str(kind) for kind, *_ in MODULES])
def test_a_module_of_any_type(copy, canary, kind, config, words):
    folder = copy("modules")
    plant(folder, canary)
    add_module(folder, kind, **config)
    torch.save({"linear.weight": Payload(canary)}, folder / "2" / "pytorch_model.bin")
    all_reject(folder, "modules", words)
    assert {"planted", "antigravity"}.isdisjoint(sys.modules)


ODD = [
    ("modules.json", '"text"'), ("modules.json", "[]"), ("modules.json", "{"), ("modules.json", '[{"path": "../up"}]'),
    ("config_sentence_transformers.json", '{"prompts": [1]}'), ("config_sentence_transformers.json", "[]"),
    ("config_sentence_transformers.json", '{"__version__": {"sentence_transformers": "x"}}'),
    ("sentence_bert_config.json", '{"model_name_or_path": "x"}'), ("sentence_bert_config.json", '{"model_args": [1]}'),
    ("sentence_bert_config.json", '{"transformer_task": "os.system"}'), ("1_Pooling/config.json", "[]"),
    ("tokenizer.json", "{"), ("tokenizer.json", '{"model": {"type": "os.system"}}'), ("tokenizer_config.json", "[]"),
    ("config.json", "[]"), ("config.json", "[" * 100_000), ("config.json", '{"model_type": "bert", "vocab_size": {}}'),
    ("config.json", "\0"), ("model.safetensors", ""), ("model.safetensors", struct.pack("<Q", 2**62).decode() + "{}"),
    ("model.safetensors", struct.pack("<Q", 2**25).decode() + "{" * 99), ("model.safetensors", "GGUF" + "~" * 60),
]  # fmt: skip


@pytest.mark.parametrize("name, content", ODD, ids=[f"{name}-{content[:20]!r}" for name, content in ODD])
def test_damaged_files(copy, name, content):
    for kind in ("modules", "image") if name in ("config.json", "model.safetensors") else ("modules",):
        folder = copy(kind)
        (folder / name).write_text(content)
        all_reject(folder, kind)


def test_a_template_is_not_run(copy, canary):
    folder = copy("modules")
    template = "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}{% for"
    (folder / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))
    for load in TEXT:
        load(str(folder)).encode(["a dog"])


def test_an_adapter_of_another_folder(copy, canary, tmp_path):
    peft_or_skip()
    base = copy("plain")
    adapter = shutil.copytree(base, tmp_path / "adapter", ignore=shutil.ignore_patterns("config.json", "model*"))
    build_text_encoder(str(base), lora_rank=2)[0].model.save_pretrained(adapter)
    build_text_encoder(str(adapter))
    (base / "model.safetensors").unlink()
    torch.save({"weight": Payload(canary)}, base / "pytorch_model.bin")
    all_reject(adapter, "plain", PICKLED)
    plant(base, canary)
    edit(base / "config.json", model_type="custom", **AUTO)
    all_reject(adapter, "plain", CUSTOM_CODE)
    edit(adapter / "adapter_config.json", peft_type="os.system")
    all_reject(adapter, "plain")


def test_code_runs_if_allowed(copy, tmp_path, monkeypatch):
    """One step of training and a checkpoint, which opens again; without the flag it does not."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder, out = copy("plain"), tmp_path / "out"
    plant(folder, tmp_path / "ran")
    edit(folder / "config.json", model_type="custom", **AUTO)
    build = functools.partial(build_text_encoder, trust_remote_code=True)
    monkeypatch.setattr("tests.support.build_text_encoder", build)
    trainer = make_trainer(str(folder), "mean", out, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / "ran").exists() and type(trainer.model.backbone).__name__ == "Model"
    ours, other = trainer.model.state_dict(), TextContrastiveModel(build(str(folder)), "simcse")
    other.load_checkpoint(str(out / "checkpoint-1"))
    assert all(torch.equal(weight, ours[name]) for name, weight in other.state_dict().items())
    all_reject(out / "checkpoint-1", "plain", CUSTOM_CODE)


@pytest.mark.slow
def test_pickles_in_a_checkpoint(bert_folder, canary, tmp_path):
    """The manifest matches, because the author of a payload can write that as well."""
    make = functools.partial(make_trainer, bert_folder, "mean", max_steps=2, save_strategy="steps", save_steps=1)
    make(tmp_path / "out").train()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_only.safetensors"):
        checkpoint = Path(shutil.copytree(tmp_path / "out" / "checkpoint-1", tmp_path / name / "checkpoint-1"))
        torch.save({"weight": Payload(canary)}, checkpoint / name)
        checkpoints.write_manifest(checkpoint, checkpoints.saved_run(checkpoint))
        assert str(checkpoint) in rejected(make(tmp_path / name).train, resume_from_checkpoint=str(checkpoint))
    rejected(open_head, str(checkpoint), 16, words="checkpoint-1 image training_only.safetensors")


LAUGHS = "".join(
    f"\n{flag}: &{'bcdefg'[i]} [{', '.join(['*' + 'abcdef'[i]] * 9)}]"
    for i, flag in enumerate(["run_name", "output_dir", "train_file", "sts_dev_file", "hub_model_id", "optim"])
)
YAML = {
    "output_dir: !!python/object/apply:os.system ['touch CANARY']": "constructor os.system",
    "report_to: &a [x, x, x, x, x, x, x, x, x]" + LAUGHS: "run.yaml aliases",
    "output_dir: " + "[" * 1000: "recursion",
}


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:20])
def test_yaml(canary, tmp_path, text):
    (tmp_path / "run.yaml").write_text(text.replace("CANARY", str(canary)))
    start = time.monotonic()
    rejected(parse_args, ["--config", str(tmp_path / "run.yaml")], words=YAML[text])
    assert time.monotonic() - start < 1


def test_a_dataset_that_is_a_script(canary, tmp_path):
    plant(tmp_path, canary)
    script = (tmp_path / "planted.py").rename(tmp_path / f"{tmp_path.name}.py")
    for read, words in ((load_training_text, "scripts"), (load_images, "images other files")):
        rejected(read, dataset_name=str(tmp_path), words=words)
        rejected(read, train_file=str(script))


@pytest.mark.parametrize("outside", ["../secret.txt", "{}/secret.txt", "../data-secret/secret.txt"])
def test_a_dataset_that_names_files_outside_of_it(tmp_path, outside):
    for folder in ("data", "data-secret"):
        (tmp_path / folder).mkdir()
    for secret in ("secret.txt", "data-secret/secret.txt"):
        (tmp_path / secret).write_text("one secret\nanother\n")
    names = f"configs:\n- config_name: default\n  data_files: {outside.format(tmp_path)}\n"
    (tmp_path / "data" / "README.md").write_text(f"---\n{names}---\n")
    for read in (load_training_text, load_images):
        rejected(read, dataset_name=f"{tmp_path}/data", words=f"dataset_name={tmp_path}/data secret.txt")
    (tmp_path / "data" / "README.md").unlink()
    shutil.copy(tmp_path / "secret.txt", tmp_path / "data" / "train.txt")
    assert len(load_training_text(dataset_name=f"{tmp_path}/data").dataset) == 2


def test_a_path_in_a_text_stays_text(tmp_path):
    (tmp_path / "texts.jsonl").write_text(f'{{"text": "{tmp_path}/texts.jsonl"}}\n{{"text": "a dog"}}\n')
    assert load_training_text(f"{tmp_path}/texts.jsonl").dataset["text"][0] == f"{tmp_path}/texts.jsonl"


@pytest.mark.parametrize("kind", LOADERS)
def test_saving_does_not_follow_links(copy, tmp_path, kind):
    """A model whose files are links opens, as those in the Hub's cache do; nothing is written into its folder."""
    folder, linked = copy(kind), tmp_path / "linked"
    shutil.copytree(folder, linked, copy_function=os.symlink)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    encoder = LOADERS[kind][0](str(linked))
    model = None if kind == "image" else TextContrastiveModel(encoder)
    save = functools.partial(model.save_encoder, state={}) if model else encoder.save_pretrained
    rejected(save, str(linked), words="symbolic link")
    assert before == {path: path.read_bytes() for path in before}
