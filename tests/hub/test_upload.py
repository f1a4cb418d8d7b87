"""Pushing an encoder to a local server: the uploaded files, loading them, and all ways to fail."""

import hashlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BertModel,
    PhobertTokenizer,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
)

from fmicl_text import InputError, TextContrastiveModel, build_text_encoder
from fmicl_text.cli.parser import cli_errors
from fmicl_text.cli.push import main
from fmicl_text.hub.upload import BackgroundPush, HubError, files_to_push, push
from fmicl_text.vision.encoder import build_image_encoder, new_image_encoder
from tests.hub_server import TOKEN, Handler
from tests.support import TINY_VIT, image_parquet, peft_or_skip, picture, sentences

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes")  # huggingface_hub's own


@pytest.fixture
def folder(bert_folder, tmp_path):
    """Output folder of a run: an encoder, and files that are not part of it."""
    path = tmp_path / "run"
    model = TextContrastiveModel(build_text_encoder(bert_folder, pooling="cls"), head="simcse")
    model.save_encoder(str(path), model.state_dict())
    model.save_training_only(str(path), model.state_dict())
    (path / "README.md").write_text("---\nlibrary_name: sentence-transformers\n---\n# Encoder\n")
    (path / "training_curve.png").write_bytes(b"\x89PNG")
    for name in ("results.json", "settings.yaml", "trainer_state.json", "optimizer.pt", "rng_state.pth", "train.txt"):
        (path / name).write_text(f"{tmp_path} private")
    (path / "checkpoint-1").mkdir()
    (path / "checkpoint-1" / "model.safetensors").write_bytes(b"no")
    return path


ENCODER_FILES = {
    "1_Pooling/config.json", "README.md", "config.json", "config_sentence_transformers.json", "model.safetensors",
    "modules.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "training_curve.png",
}  # fmt: skip


def digest(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_only_the_encoder_its_card_and_its_curve_are_pushed(folder):
    assert set(files_to_push(folder)) == ENCODER_FILES
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "STSBenchmark.yaml").write_text("[]")
    assert set(files_to_push(folder)) == {*ENCODER_FILES, ".eval_results/STSBenchmark.yaml"}


@pytest.mark.slow
def test_a_pushed_encoder_opens_with_the_same_vectors(hub, folder, tmp_path):
    url = push(folder, "user/encoder", private=True)
    assert "/user/encoder/commit/" in url and hub.private["user/encoder"]
    assert set(hub.repos["user/encoder"]["main"]) == ENCODER_FILES
    texts = sentences(6)
    here = SentenceTransformer(str(folder), device="cpu").encode(texts)
    fetched = snapshot_download("user/encoder", cache_dir=tmp_path / "cache")
    assert (SentenceTransformer(fetched, device="cpu").encode(texts) == here).all()
    opened = SentenceTransformer("user/encoder", device="cpu", cache_folder=str(tmp_path / "other"))
    assert (opened.encode(texts) == here).all() and opened[1].pooling_mode == "cls"


def save(folder, *modules):
    SentenceTransformer(modules=list(modules), device="cpu").save_pretrained(str(folder), create_model_card=False)


def phobert(folder, bert):
    """PhoBERT's tokenizer reads vocab.txt and bpe.codes and has no tokenizer.json."""
    (folder / "source").mkdir(parents=True)
    (folder / "source" / "bpe.codes").write_text("a t</w> 5\nc at</w> 4\nd o 3\ndo g</w> 2\n")
    (folder / "source" / "vocab.txt").write_text("cat</w> 5\ndog</w> 4\na</w> 3\nd 2\n".replace("</w>", ""))
    tokenizer = PhobertTokenizer(str(folder / "source" / "vocab.txt"), str(folder / "source" / "bpe.codes"))
    config = RobertaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=64, max_position_embeddings=40)  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    module = Transformer(str(folder / "source"), max_seq_length=30)
    save(folder, module, Pooling(32, "mean"))
    shutil.rmtree(folder / "source")


def with_chat_templates(folder, bert):
    module = Transformer(bert)
    module.tokenizer.chat_template = {"default": "{{ messages }}", "search": "search {{ messages }}"}
    save(folder, module, Pooling(32, "mean"))


def with_dense(folder, bert):
    save(folder, Transformer(bert), Pooling(32, "mean"), Dense(32, 16), Normalize())


def static_embedding(folder, bert):
    save(folder, StaticEmbedding(Tokenizer.from_file(f"{bert}/tokenizer.json"), embedding_dim=8))


def router(folder, bert):
    query, document = ([Transformer(bert), Pooling(32, mode)] for mode in ("mean", "cls"))
    save(folder, Router.for_query_document(query, document))


def sharded(folder, bert):
    save(folder, Transformer(bert), Pooling(32, "mean"))
    BertModel.from_pretrained(bert, add_pooling_layer=False).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def adapter(folder, bert):
    peft_or_skip()
    from peft import LoraConfig

    save(folder / "base", Transformer(bert), Pooling(32, "mean"))
    module = Transformer(str(folder / "base"))
    module.model.add_adapter(LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    save(folder, module, Pooling(32, "mean"))


KINDS = {
    phobert: {"bpe.codes", "vocab.txt"},
    with_chat_templates: {"chat_template.jinja", "additional_chat_templates/search.jinja"},
    with_dense: {"2_Dense/model.safetensors", "2_Dense/config.json", "modules.json"},
    static_embedding: {"tokenizer.json", "model.safetensors"},
    router: {"router_config.json", "query_0_Transformer/model.safetensors", "document_1_Pooling/config.json"},
    sharded: {"model.safetensors.index.json", "model-00001-of-00005.safetensors"},
}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_every_file_of_an_encoder_is_pushed(hub, bert_folder, tmp_path, make):
    """The copy from the Hub opens with the same vectors."""
    torch.manual_seed(0)
    make(tmp_path / "run", bert_folder)
    texts = ["a cat", "a dog", *sentences(2)]
    here = SentenceTransformer(str(tmp_path / "run"), device="cpu").encode_query(texts)
    push(tmp_path / "run", "user/encoder")
    files = hub.repos["user/encoder"]["main"]
    names = {name.partition("/")[2] if make is static_embedding and "/" in name else name for name in files}
    assert names >= KINDS[make], names
    fetched = snapshot_download("user/encoder", cache_dir=tmp_path / "cache")
    there = SentenceTransformer(fetched, device="cpu").encode_query(texts)
    assert np.array_equal(here, there) and not np.allclose(here[0], here[1], atol=1e-4)


def test_an_adapter_is_pushed_without_the_path_of_a_local_base(hub, bert_folder, tmp_path):
    adapter(tmp_path / "run", bert_folder)
    with pytest.raises(InputError, match=r"adapter_config\.json contains the local path"):
        push(tmp_path / "run", "user/encoder")
    assert hub.requests == []


CODE = """
from transformers import BertModel
from .scale import factor


class ScaledBert(BertModel):
    config_class = ScaledConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * factor
        return output
"""


def test_custom_code_is_pushed_and_run_only_if_it_is_trusted(hub, folder, tmp_path, monkeypatch, capsys):
    (folder / "modeling_scaled.py").write_text(CODE)
    (folder / "scale.py").write_text("factor = -3.0\n")
    (folder / "private.py").write_text("")
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "modeling_scaled.ScaledConfig", "AutoModel": "modeling_scaled.ScaledBert"}
    config |= {"auto_map": mapped, "model_type": "scaled"}
    header = "from transformers import BertConfig\nclass ScaledConfig(BertConfig):\n    model_type = 'scaled'\n"
    (folder / "modeling_scaled.py").write_text(header + CODE)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="trust_remote_code=True"):
        push(folder, "user/encoder")
    assert hub.requests == []
    command(monkeypatch, folder, "user/encoder", "--trust_remote_code")
    assert set(hub.repos["user/encoder"]["main"]) == {*ENCODER_FILES, "modeling_scaled.py", "scale.py"}


def test_files_of_other_names_stay(folder):
    """Also JSON files and weights that a user put there."""
    for name in ("sts.json", "pairs.jsonl", "embeddings.safetensors", "secret.txt", "notes.md", "curve.png"):
        (folder / name).write_text("{}")
    assert set(files_to_push(folder)) == ENCODER_FILES
    (folder / "assets").mkdir()
    (folder / "assets" / "map.png").write_bytes(b"\x89PNG")
    (folder.parent / "outside.png").write_bytes(b"\x89PNG")
    card = '# Mine\n![a map](assets/map.png) <img src="curve.png"> ![o](../outside.png) ![w](https://x.y/z.png)\n'
    (folder / "README.md").write_text(card)
    assert set(files_to_push(folder)) == {*ENCODER_FILES, "assets/map.png", "curve.png"}


def test_a_copy_that_does_not_open_is_not_pushed(hub, folder, monkeypatch):
    """A file that the encoder needs and the list lacks, or whose absence changes the vectors."""
    files = files_to_push(folder)
    for missing, message in (("model.safetensors", "do not open"), ("1_Pooling/config.json", "do not open|embeddings"),
                             ("modules.json", "other embeddings")):  # fmt: skip
        kept = [name for name in files if name != missing]
        monkeypatch.setattr("fmicl_text.hub.upload.files_to_push", lambda *_, kept=kept: kept)
        with pytest.raises(InputError, match=message) as error:
            push(folder, "user/encoder")
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert hub.requests == []


def test_a_push_does_not_change_the_random_state(hub, folder):
    state = torch.get_rng_state()
    push(folder, "user/encoder")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_revision_a_second_push_and_a_pull_request(hub, folder):
    push(folder, "encoder", revision="v2")
    assert set(hub.repos["user/encoder"]["v2"]) == ENCODER_FILES and hub.repos["user/encoder"]["main"] == {}
    (folder / "README.md").write_text("---\nlibrary_name: sentence-transformers\n---\n# Another\n")
    push(folder, "user/encoder", exist_ok=True)
    assert b"Another" in hub.repos["user/encoder"]["main"]["README.md"]
    url = push(folder, "user/encoder", create_pr=True)
    assert url.endswith("/discussions/1") and len(hub.pull_requests) == 1


FAILURES = [
    ({"repos/create": 401}, "hf auth login or set HF_TOKEN"),
    ({"repos/create": 403}, "no write access"),
    ({"repos/create": 500}, "the Hub returned 500"),
    ({"preupload": 503}, "the Hub returned 503"),
    ({"blob": "close"}, "connection failed"),
    ({"commit": "close"}, "connection failed"),
    ({"commit": 403}, "no write access"),
    ({"commit": 429}, "the Hub returned 429"),
]


@pytest.mark.parametrize("fail, message", FAILURES, ids=str)
def test_a_failed_push_is_one_line_and_the_folder_stays(hub, folder, fail, message):
    before = digest(folder)
    hub.fail = fail
    with pytest.raises(HubError) as error:
        push(folder, "user/encoder", private=True)
    line = str(error.value)
    assert line.startswith("user/encoder: ") and message in line and "\n" not in line
    assert line.endswith(f": fmicl-text push {folder} user/encoder --exist_ok --private")
    assert TOKEN not in line and digest(folder) == before
    hub.fail = {}
    push(folder, "user/encoder", exist_ok=True)  # as the printed command does
    assert set(hub.repos["user/encoder"]["main"]) == ENCODER_FILES


def test_no_connection_at_all(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="user/encoder: connection failed"):
        push(folder, "user/encoder")


def test_a_repository_that_exists_is_not_changed(hub, folder):
    push(folder, "user/encoder")
    with pytest.raises(HubError, match=r"user/encoder: .*exists.* exist_ok"):
        push(folder, "user/encoder")


def test_no_token(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match=r"user/encoder: .*HF_TOKEN"):
        push(folder, "user/encoder")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["a/b/c", "user/../x", "-x", "user/name.git", "übung", ""])
def test_names_that_are_not_allowed(hub, folder, name):
    with pytest.raises(InputError, match=f"^{name!r} .*repository name") as error:
        push(folder, name)
    assert "\n" not in str(error.value) and hub.requests == []


SENTENCE = "A sentence that was trained on and that nobody may read."


def plant_token(folder):
    (folder / "config.json").write_text('{"token": "' + TOKEN + '"}')


def plant_path(folder):
    (folder / "tokenizer_config.json").write_text(f'{{"name_or_path": "{folder}"}}')


def plant_home(folder):
    (folder / "README.md").write_text(f"trained on {Path.home()}/texts")


def plant_link(folder):
    (folder.parent / "secret.json").write_text("{}")
    (folder / "vocab.txt").symlink_to(folder.parent / "secret.json")


def plant_module(folder):
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "../other", "type": "x"}]')


PLANTED = {
    plant_token: "config.json .* token",
    plant_path: "tokenizer_config.json .* local path",
    plant_home: "README.md .* local path",
    plant_link: "vocab.txt .* link .* outside",
    plant_module: "modules.json .*'../other'",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_private_content_is_not_pushed(hub, folder, plant):
    plant(folder)
    with pytest.raises(InputError, match=PLANTED[plant]):
        push(folder, "user/encoder")
    assert hub.requests == []


def test_no_encoder(tmp_path):
    with pytest.raises(InputError, match="no encoder"):
        files_to_push(tmp_path)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fmicl-text push", *map(str, arguments)])
    with cli_errors("fmicl-text push"):
        main()


def test_the_command(hub, folder, monkeypatch, capsys):
    command(monkeypatch, folder, "user/encoder", "--dry-run")
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert set(listed) == ENCODER_FILES and hub.requests == []
    command(monkeypatch, folder, "user/encoder", "--private")
    assert "/user/encoder/commit/" in capsys.readouterr().out and hub.private["user/encoder"]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, folder, "user/encoder")
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("fmicl-text push: error: user/encoder: ")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, folder / "absent", "user/encoder")
    assert stop.value.code == 2 and "absent" in capsys.readouterr().err


def recipe(monkeypatch, texts, out, *flags):
    arguments = ["--train_file", texts, "--output_dir", out, *flags]
    monkeypatch.setattr(sys, "argv", ["simcse_fmicl.py", *map(str, arguments)])
    script = Path(__file__).parents[2] / "recipes" / "simcse_fmicl.py"
    with cli_errors("simcse_fmicl.py"):
        runpy.run_path(str(script))["main"]()


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "secret-texts.txt"
    path.write_text("\n".join([*sentences(40), SENTENCE]))
    return path


@pytest.fixture
def flags(bert_folder, tmp_path):
    pairs = tmp_path / "pairs.tsv"
    rows = [f"{a}\t{b}\t{i % 6}" for i, (a, b) in enumerate(zip(sentences(12, 1), sentences(12, 2), strict=True))]
    pairs.write_text("sentence1\tsentence2\tscore\n" + "\n".join(rows))
    return [
        "--model_name_or_path", bert_folder, "--sts_dev_file", pairs, "--pooling", "mean", "--head", "simcse",
        "--per_device_train_batch_size", 8, "--max_steps", 4, "--eval_steps", 2, "--save_steps", 2, "--use_cpu", "True",
        "--disable_tqdm", "True", "--push_to_hub", "True", "--hub_model_id", "user/encoder", "--logging_steps", 1,
    ]  # fmt: skip


def secrets_in(files, private):
    """Names of the files that contain a private text, or are pickles or torch archives."""
    return [
        name
        for name, content in files.items()
        if any(text.encode() in content for text in private) or content.startswith((b"\x80\x02", b"\x80\x04", b"PK"))
    ]


@pytest.mark.slow
def test_the_recipe_pushes_during_training_and_at_its_end(hub, monkeypatch, capsys, texts, flags, tmp_path):
    """Each push is a complete folder, the last one with results, and contains no training sentence, path or token."""
    commits, commit = [], Handler.commit

    def record(self, hub, repo, revision, lines, base):
        commits.append((lines[0]["value"]["summary"], {line["value"]["path"] for line in lines[1:]}))
        commit(self, hub, repo, revision, lines, base)

    monkeypatch.setattr(Handler, "commit", record)
    recipe(monkeypatch, texts, tmp_path / "out", *flags, "--hub_private_repo", "True", "--hub_always_push", "True")
    assert "/user/encoder/commit/" in capsys.readouterr().out and hub.private["user/encoder"]
    assert [summary for summary, _ in commits] == [
        "Training in progress, step 2", "Training in progress, step 4", "End of training"
    ]  # fmt: skip
    assert commits[0][1] == ENCODER_FILES - {"training_curve.png"}
    files = hub.repos["user/encoder"]["main"]
    assert set(files) == ENCODER_FILES
    private = [*texts.read_text().splitlines(), str(tmp_path), str(Path.home()), TOKEN]
    assert secrets_in(files, private) == []
    for planted in (*private, "\x80\x04"):
        assert secrets_in(files | {"planted": f"{planted} .".encode("latin-1")}, private) == ["planted"]
    card = files["README.md"].decode()
    assert "# user/encoder" in card and "| data | secret-texts.txt |" in card and "| sts_spearman " in card
    fetched = snapshot_download("user/encoder", cache_dir=tmp_path / "cache")
    here = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(sentences(3))
    assert (SentenceTransformer(fetched, device="cpu").encode(sentences(3)) == here).all()


@pytest.mark.slow
def test_training_outlives_pushes_that_fail(hub, monkeypatch, capsys, caplog, texts, flags, tmp_path):
    """During training, a warning. At the end, one line, status 2, and a complete folder."""
    hub.fail = {"preupload": 503}
    with pytest.raises(SystemExit) as stop:
        recipe(monkeypatch, texts, tmp_path / "out", *flags)
    printed = capsys.readouterr()
    warned = [record.message for record in caplog.records if "was not pushed" in record.message]
    assert warned and re.search("checkpoint-2 was not pushed.*: user/encoder: the Hub returned 503", warned[0])
    assert "fmicl-text push" not in warned[0]
    assert stop.value.code == 2 and "| sts_spearman" in printed.out
    error = printed.err.strip().splitlines()[-1]
    assert error.startswith("simcse_fmicl.py: error: user/encoder: the Hub returned 503")
    assert f": fmicl-text push {tmp_path / 'out'} user/encoder --exist_ok" in error
    assert (tmp_path / "out" / "results.json").is_file() and set(files_to_push(tmp_path / "out")) == ENCODER_FILES


@pytest.mark.parametrize(
    "change, message",
    [
        (["--hub_token", "hf_x"], "--hub_token"),
        (["--hub_strategy", "checkpoint"], "--hub_strategy checkpoint"),
        (["--hub_model_id", "a/b/c"], "'a/b/c'"),
    ],
)
def test_errors_before_training(hub, monkeypatch, capsys, texts, flags, tmp_path, change, message):
    with pytest.raises(SystemExit) as stop:
        recipe(monkeypatch, texts, tmp_path / "out", *flags, *change)
    assert stop.value.code == 2 and message in capsys.readouterr().err and hub.repos == {}


def test_an_expired_token_stops_before_training(hub, monkeypatch, capsys, texts, flags, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(SystemExit):
        recipe(monkeypatch, texts, tmp_path / "out", *flags)
    printed = capsys.readouterr()
    assert "user/encoder: " in printed.err and "HF_TOKEN" in printed.err and "loss" not in printed.out


def test_a_checkpoint_that_is_removed_during_its_push(hub, folder):
    background = BackgroundPush()
    background.start(folder, "user/encoder", exist_ok=True)
    shutil.rmtree(folder)
    background.wait()
    assert set(hub.repos["user/encoder"]["main"]) == ENCODER_FILES and not background.busy


@pytest.mark.slow
def test_an_image_encoder_is_pushed_with_its_processor(hub, monkeypatch, capsys, tmp_path):
    path = image_parquet(tmp_path, [picture(size=(32, 32), seed=i) for i in range(40)])
    new_image_encoder(ViTConfig(**TINY_VIT)).save_pretrained(tmp_path / "vit")
    arguments = [
        "--train_file", path, "--held_out", 10, "--model_name_or_path", tmp_path / "vit", "--max_steps", 1,
        "--head_dim", 8, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "out", "--disable_tqdm", "True",
        "--push_to_hub", "True", "--hub_model_id", "user/images", "--eval_strategy", "no",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["vision_fmicl.py", *map(str, arguments)])
    runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "vision_fmicl.py"))["main"]()
    files = hub.repos["user/images"]["main"]
    assert set(files) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training_curve.png",
    }
    assert secrets_in(files, [str(tmp_path), str(Path.home()), TOKEN]) == []
    card = files["README.md"].decode()
    assert 'AutoModel.from_pretrained("user/images")' in card and "| after training " in card
    fetched = snapshot_download("user/images", cache_dir=tmp_path / "cache")
    ours, stock = build_image_encoder(str(tmp_path / "out")).eval(), AutoModel.from_pretrained(fetched).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(pixels), stock(pixel_values=pixels).last_hidden_state[:, 0])
    assert AutoImageProcessor.from_pretrained(fetched).crop_size["height"] == 32


def test_an_image_encoder_without_a_processor_is_pushed(hub, tmp_path):
    """Trained on views of the user's own."""
    new_image_encoder(ViTConfig(**TINY_VIT)).save_pretrained(tmp_path)
    push(tmp_path, "user/images")
    assert set(hub.repos["user/images"]["main"]) == {"config.json", "model.safetensors"}
