"""The text recipe as a main program: the files it writes, and its errors."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer

from fmicl_text.cli.text import parse_args
from fmicl_text.evaluation import plots
from fmicl_text.evaluation.encoding import encode_sentences
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.evaluation.sts import load_pairs
from fmicl_text.evaluation.unlabeled import UnlabeledEvaluator
from fmicl_text.text.data import load_training_text
from fmicl_text.text.model import build_text_encoder
from tests.programs import run_program
from tests.support import recipe_flags, sentences, words_missing, write_recipe_data

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "recipes" / "simcse_fmicl.py"
CONFIGS = sorted((ROOT / "recipes" / "configs" / "text").glob("*.yaml"))


@pytest.fixture(scope="module")
def material(tmp_path_factory, bert_folder):
    """A folder with the data of a short run, and the flags of the run."""
    folder = tmp_path_factory.mktemp("material")
    write_recipe_data(folder)
    return folder, [*recipe_flags(bert_folder), "--use_cpu", "True"]


@pytest.fixture(scope="module")
def finished(material):
    """One run with a head, launched by accelerate, in material/out."""
    folder, flags = material
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launcher, RECIPE, *flags, "--head", "simcse", "--output_dir", "out"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "out", done


@pytest.mark.slow
def test_a_run_leaves_encoder_settings_results_and_curve(finished):
    out, done = finished
    results = json.loads((out / "results.json").read_text())
    settings = yaml.safe_load((out / "settings.yaml").read_text())
    assert results["objective"] == "fmicl-kl" and results["steps"] == 5 and results["seed"] == 42
    assert results["data"]["rows"] == 40 and results["data"]["blank rows skipped"] == 2
    assert results["versions"]["torch"] == torch.__version__
    assert settings["gamma"] == 2.0 and settings["head"] == "simcse"
    assert (out / "training_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "| sts_spearman" in done.stdout and "blank rows skipped 2" in done.stdout
    assert not (out / "training_only.safetensors").exists() and not (out / "training_args.bin").exists()


@pytest.mark.slow
def test_the_saved_encoder_scores_what_the_results_say(finished, material):
    out, _ = finished
    results = json.loads((out / "results.json").read_text())
    evaluator = STSEvaluator(load_pairs(material[0] / "dev.tsv"), progress=False)
    reopened = SentenceTransformer(str(out), device="cpu")
    assert evaluator(reopened)["sts_spearman"] == pytest.approx(results["after"]["eval_sts_spearman"], abs=1e-9)
    own = encode_sentences(build_text_encoder(str(out)), sentences(20), progress=False)
    assert torch.equal(own, encode_sentences(reopened, sentences(20), progress=False))


@pytest.mark.slow
def test_a_run_resumes_from_its_newest_checkpoint(finished, material, monkeypatch, capsys):
    out, _ = finished
    folder, flags = material
    resumed = folder / "resumed"
    shutil.copytree(out, resumed)
    (resumed / "results.json").unlink()
    shutil.rmtree(max(resumed.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
    monkeypatch.chdir(folder)
    argv = [*flags, "--head", "simcse", "--output_dir", "resumed", "--resume_from_checkpoint", "True"]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv])
    runpy.run_path(str(RECIPE), run_name="__main__")
    first, second = (json.loads((path / "results.json").read_text()) for path in (out, resumed))
    assert second["steps"] == first["steps"]
    assert second["after"] == pytest.approx(first["after"], abs=1e-3)


@pytest.mark.slow
def test_views_are_printed_and_recorded(material, monkeypatch, capsys):
    """Sentences and an encoder with dropout: dropout views. Others are used if they are given."""
    folder, flags = material
    monkeypatch.chdir(folder)
    for views, words, card in (([], "dropout (a median of", "dropout views of a text"), (["--views", "crops", "delete"],
                               "crops delete (as given)", "random views of a text: crops delete")):  # fmt: skip
        argv = [*flags, *views, "--output_dir", f"views{len(views)}", "--max_steps", "2", "--save_strategy", "no"]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv])
        runpy.run_path(str(RECIPE), run_name="__main__")
        assert f"Views: {words}" in capsys.readouterr().out
        out = folder / f"views{len(views)}"
        assert json.loads((out / "results.json").read_text())["data"]["views"].startswith(words)
        assert f"| positives | two {card} |" in (out / "README.md").read_text()


def test_views_of_pairs(material, monkeypatch, capsys):
    folder, flags = material
    monkeypatch.chdir(folder)
    rows = "\n".join(f"{one}\t{other}" for one, other in zip(sentences(16), sentences(16, 1), strict=True))
    (folder / "pairs.tsv").write_text("sent0\tsent1\n" + rows)
    argv = [*flags, "--train_file", "pairs.tsv", "--views", "crops", "--output_dir", "views-of-pairs"]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.endswith("error: --views crops applies to one text column, got sent0 sent1")


@pytest.mark.slow
def test_a_finished_run_is_not_overwritten(finished, material):
    out, _ = finished
    folder, flags = material
    before = (out / "results.json").read_bytes()
    again = run_program(RECIPE, *flags, "--output_dir", "out", cwd=folder)
    assert again.returncode == 2
    (line,) = again.stderr.strip().splitlines()
    assert line.startswith("simcse_fmicl.py: error: ")
    assert not words_missing(line, "--output_dir out results.json --overwrite_output_dir"), line
    assert (out / "results.json").read_bytes() == before


@pytest.mark.slow
def test_bad_input_does_not_remove_the_run_to_be_overwritten(finished, material, monkeypatch, capsys):
    out, _ = finished
    before = sorted(path.name for path in out.iterdir())
    monkeypatch.chdir(material[0])
    argv = [*material[1], "--output_dir", "out", "--overwrite_output_dir", "True", "--train_file", "none.txt"]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(RECIPE), run_name="__main__")
    message = capsys.readouterr().err
    assert not words_missing(message, "--train_file none.txt"), message
    assert sorted(path.name for path in out.iterdir()) == before


@pytest.mark.slow
def test_early_stopping_ends_the_run(material, monkeypatch, capsys):
    """At learning rate 0 no evaluation is better than the first, at step 2: patience 2 ends it at step 6 of 40. Nor is
    it better than the encoder before training, which is saved."""
    monkeypatch.chdir(material[0])
    argv = [*material[1], "--learning_rate", "0", "--max_steps", "40", "--early_stopping_patience", "2"]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv, "--output_dir", "stopped"])
    runpy.run_path(str(RECIPE), run_name="__main__")
    results = json.loads((material[0] / "stopped" / "results.json").read_text())
    assert results["steps"] == 6 and results["best_step"] == 0 and results["before"] == results["after"]
    verdict = results["verdict"]
    assert verdict["outcome"] == "no better" and verdict["difference"] == verdict["standard_error"] == 0
    assert (verdict["metric"], verdict["num_items"], verdict["saved_step"]) == ("sts_spearman", 12, 0)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert (
        line == f"Verdict: {verdict['text']}".replace("learning_rate", "--learning_rate")
        and "on 12 pairs of dev.tsv); the encoder is saved as it came" in line
    )
    card = (material[0] / "stopped" / "README.md").read_text()
    assert "| best step (saved) | 0, the encoder before training |" in card
    assert "\nNo better than before training: sts_spearman" in card and "the encoder is saved as it came. The" in card


def test_search_data_selects_the_checkpoint(material, monkeypatch):
    """Pairs with two prompts, evaluated by NDCG@10 with these prompts; the negatives are cross-view."""
    folder, flags = material
    monkeypatch.chdir(folder)
    dev = folder / "search"
    dev.mkdir()
    texts = sentences(6)
    for name, rows in (("queries", texts[:3]), ("corpus", texts)):
        lines = [json.dumps({"_id": f"{name[0]}{i}", "text": text}) for i, text in enumerate(rows)]
        (dev / f"{name}.jsonl").write_text("\n".join(lines))
    (dev / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\tc{i}\t1\n" for i in range(3)))
    pairs = [json.dumps({"query": a, "answer": b}) for a, b in zip(sentences(40), sentences(40, 1), strict=True)]
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    argv = [flag for flag in flags if flag not in ("--sts_dev_file", "dev.tsv")]
    argv[argv.index("--train_file") + 1] = "pairs.jsonl"
    argv += ["--retrieval_dev_folder", "search", "--prompts", "one ", "two ", "--output_dir", "searched"]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv])
    plotted = []
    plot = plots.plot_training_curve
    monkeypatch.setattr("fmicl_text.cli.recipe.plot_training_curve", lambda *a: plotted.append(a[-1]) or plot(*a))
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert plotted == ["eval_cosine_ndcg@10"]
    results = json.loads((folder / "searched" / "results.json").read_text())
    verdict = results["verdict"]
    assert results["before"]["eval_cosine_ndcg@10"] == verdict["before"] <= 1 and verdict["num_items"] == 3
    assert results["best_step"] == verdict["saved_step"] and "on 3 queries of search" in verdict["text"]
    assert results["scored_on"]["name"] == "search" and len(results["inputs"]["retrieval_dev_folder"]) == 64
    assert results["data"]["prompts"] == "'one ' 'two '" and results["hyperparameters"]["negatives"] == "cross_view"
    settings = yaml.safe_load((folder / "searched" / "settings.yaml").read_text())
    assert settings["negatives"] is None  # so that --config chooses again
    assert "| prompts, in training | 'one ' 'two ' |" in (folder / "searched" / "README.md").read_text()
    assert SentenceTransformer(str(folder / "searched")).prompts == {"query": "one ", "document": "two "}


def without_pairs(flags, train_file):
    """The flags of a run without STS pairs, on another training file."""
    argv = [flag for flag in flags if flag not in ("--sts_dev_file", "dev.tsv")]
    argv[argv.index("--train_file") + 1] = train_file
    return [*argv, "--max_steps", "6"]


def run_in_process(folder, monkeypatch, *flags):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *flags])
    runpy.run_path(str(RECIPE), run_name="__main__")


@pytest.mark.slow
def test_settings_yaml_repeats_a_run_and_measures_for_another(material, monkeypatch, capsys):
    folder, flags = material
    argv = [*flags[: flags.index("--gamma")], *flags[flags.index("--gamma") + 4 :], "--max_steps", "2"]
    run_in_process(folder, monkeypatch, *argv, "--output_dir", "auto")
    config = ("--config", "auto/settings.yaml")
    run_in_process(folder, monkeypatch, *config, "--output_dir", "again")
    printed = capsys.readouterr().out
    config = ("--config", "again/settings.yaml")
    run_in_process(folder, monkeypatch, *config, "--output_dir", "js", "--divergence", "js")
    assert "measured again" not in printed and "are measured again" in capsys.readouterr().out
    first, second, js = (json.loads((folder / name / "results.json").read_text()) for name in ("auto", "again", "js"))
    assert first["hyperparameters"] == second["hyperparameters"] and first["after"] == second["after"]
    assert "alpha" in {name for entry in js["log_history"] for name in entry}
    assert js["hyperparameters"]["alpha"] != first["hyperparameters"]["alpha"]
    settings = [yaml.safe_load((folder / name / "settings.yaml").read_text()) for name in ("auto", "js")]
    assert [one["alpha"] for one in settings] == [one["hyperparameters"]["alpha"] for one in (first, js)]
    for output_dir in ("auto", "again"):
        run_in_process(folder, monkeypatch, *config, "--output_dir", output_dir, "--resume_from_checkpoint", "auto")
        assert "already contains this finished run" in capsys.readouterr().out


@pytest.mark.slow
def test_held_out_texts_select_the_checkpoint(material, monkeypatch, capsys):
    """Without graded pairs, offline. They are not trained on, and the saved encoder has the best score."""
    folder, flags = material
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    lines = [f"{text} {number}" for number, text in enumerate(sentences(1100))]
    (folder / "many.txt").write_text("\n".join([*lines, *lines[:200]]))
    run_in_process(folder, monkeypatch, *without_pairs(flags, "many.txt"), "--output_dir", "unlabeled")
    printed = capsys.readouterr().out
    assert "Evaluation: 110 held-out texts of the training data" in printed and "| held_out_nats" in printed
    out = folder / "unlabeled"
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["rows held out"] == 110 and results["scored_on"]["name"] in printed
    assert results["data"]["rows"] == 1300 - 110 - results["data"]["rows dropped with a held-out text"]
    scores = {row["step"]: row["eval_held_out_nats"] for row in results["log_history"] if "eval_held_out_nats" in row}
    assert len(scores) == 4  # before training and three evaluations
    trained = {step: score for step, score in scores.items() if step}
    assert results["verdict"]["step"] == max(trained, key=trained.get)
    assert results["best_step"] in (0, results["verdict"]["step"])
    texts = [text for (text,) in load_training_text(folder / "many.txt", held_out=2000).held_out.rows]
    evaluator = UnlabeledEvaluator(texts, progress=False, max_seq_length=32)
    score = evaluator(SentenceTransformer(str(out), device="cpu"))["held_out_nats"]
    assert score == pytest.approx(results["after"]["eval_held_out_nats"], abs=1e-6)
    card = (out / "README.md").read_text()
    assert "110 held-out texts of the training data: mutual information of each text and a quarter" in card
    assert "selected by held_out_nats." in card


@pytest.mark.slow
def test_held_out_pairs_are_searched_with_their_prompts(material, monkeypatch, capsys):
    folder, flags = material
    pairs = zip(sentences(1000), sentences(1000, seed=1), strict=True)
    rows = [{"query": f"{query} {i}", "answer": f"{answer} {i}"} for i, (query, answer) in enumerate(pairs)]
    (folder / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [*without_pairs(flags, "many.jsonl"), "--prompts", "one ", "two ", "--output_dir", "unlabeled-pairs"]
    seen, embed = [], UnlabeledEvaluator.embed
    monkeypatch.setattr(UnlabeledEvaluator, "embed", lambda self, encoder: seen.append(self) or embed(self, encoder))
    run_in_process(folder, monkeypatch, *argv)
    assert "Evaluation: 100 held-out pairs of the training data" in capsys.readouterr().out
    assert seen[0].prompts == ("one ", "two ") and len(seen[0].texts[0]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, reason",
    [
        ([], "1,000 distinct rows are needed to hold out 100 of them, got 40"),
        (["--held_out", "0"], "held_out=0"),
    ],
)
def test_without_evaluation_the_last_weights_are_saved(material, monkeypatch, capsys, more, reason):
    folder, flags = material
    name = f"last-{len(more)}"
    argv = [*without_pairs(flags, "train.txt"), *more, "--output_dir", name]
    run_in_process(folder, monkeypatch, *argv)
    printed = capsys.readouterr().out
    assert f"No evaluation, the last weights are saved ({reason}). To evaluate, pass --sts_dev_file" in printed
    results = json.loads((folder / name / "results.json").read_text())
    assert (results["before"], results["after"], results["best_step"], results["steps"]) == ({}, {}, None, 6)
    assert "Not evaluated." in (folder / name / "README.md").read_text()


def test_the_word_stsb_downloads_the_pairs(material, monkeypatch, capsys):
    """And nothing else does: without a network, the error names a way without one."""
    folder, flags = material
    argv = [*without_pairs(flags, "train.txt"), "--sts_dev_file", "stsb", "--output_dir", "word"]
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stopped:
        run_in_process(folder, monkeypatch, *argv)
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert stopped.value.code == 2 and not words_missing(line, "mteb/stsbenchmark-sts Hub --sts_dev_file"), line


def test_the_configs_are_all_there():
    names = [
        "kl",
        "js",
        "pearson",
        "sh",
        "tsallis",
        "vlc",
        "vlc_as_printed",
        "jeffrey",
        "rkl",
        "neyman",
        "infonce",
        "align_uniform",
        "spectral",
    ]
    papers = {f"{m}-{n}" for m in ("bert-base", "roberta-base") for n in names}
    others = {"modernbert-base-kl", "qwen3-0.6b-lora-js", "bert-base-nli-kl", "bert-base-search-kl", "adapt"}
    assert {path.stem for path in CONFIGS} == papers | others


def test_the_preset_adapt():
    """Its texts are the user's; gamma and alpha are measured."""
    path = next(path for path in CONFIGS if path.stem == "adapt")
    model_args, data_args, args = parse_args(["--config", str(path), "--train_file", "docs.jsonl", "--use_cpu", "True"])
    assert (data_args.views, model_args.trained_layers, args.negatives) == (["crops"], 2, "cross_view")
    assert args.gamma is None and args.alpha is None and data_args.sts_dev_file is None


@pytest.mark.filterwarnings("ignore:.*uniformity")
@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "adapt"], ids=lambda path: path.stem)
def test_every_preset_parses_and_contains_its_command(path):
    model_args, data_args, args = parse_args(["--config", str(path), "--use_cpu", "True"])
    model, _, objective = path.stem.rpartition("-")
    assert args.objective_name in (objective, f"fmicl-{objective}")
    assert model.split("-")[0] in model_args.model_name_or_path.lower()
    assert data_args.max_seq_length == (256 if "search" in model else 32)
    if model.endswith(("nli", "search")):
        assert (model_args.head, args.negatives, bool(data_args.prompts)) == ("none", None, "search" in model)
    elif model.startswith("qwen3"):
        assert (model_args.pooling, model_args.head, model_args.lora_rank) == ("lasttoken", "none", 16)
        assert args.activation_checkpointing
    else:
        assert (model_args.pooling, model_args.head, model_args.lora_rank) == ("cls", "simcse", None)
    assert re.search(rf"--config (\S*/)?{re.escape(path.stem)}(\.yaml)?\s", path.read_text())


@pytest.mark.slow
def test_held_out_paragraphs_are_read_as_far_as_their_crops(material, monkeypatch):
    """A query has words of the whole text, so a document that ends after the tokens of one crop would not have them."""
    folder, flags = material
    words = sentences(200, seed=7)
    lines = [f"{' '.join(words[(number + j) % 200] for j in range(6))} {number}" for number in range(1100)]
    (folder / "paragraphs.txt").write_text("\n".join(lines))
    lengths, original = [], UnlabeledEvaluator.__call__
    monkeypatch.setattr(
        UnlabeledEvaluator, "__call__", lambda self, *args: lengths.append(self.max_seq_length) or original(self, *args)
    )
    for views in ("crops", "dropout"):
        given = [*without_pairs(flags, "paragraphs.txt"), "--views", views, "--max_seq_length", "16"]
        run_in_process(folder, monkeypatch, *given, "--output_dir", f"length-{views}")
    assert lengths[0] == 256 and lengths[-1] == 16
