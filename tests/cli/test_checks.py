"""Which existing files a program may replace by its output."""

import json
from pathlib import Path

import pytest

from fmicl_text import InputError
from fmicl_text.cli.checks import check_output, check_plot
from fmicl_text.evaluation.plots import plot_scores

OURS = {
    "a file that does not exist": None,
    "an empty file": "",
    "scores": json.dumps([{"name": "a", "metrics": {}, "versions": {}}, {"missing": "no such file"}]),
    "text": "what an earlier run wrote",
    "a benchmark": json.dumps({"settings": {}, "versions": {}, "rows": []}),
}
THEIRS = {
    "another JSON file": '{"model_type": "bert"}',
    "the record of a run": json.dumps({"objective": "fmicl-kl", "versions": {}, "log_history": []}),
}


@pytest.mark.parametrize("text", OURS.values(), ids=OURS)
def test_results_are_replaced(tmp_path, text):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    check_output("--output", path)


@pytest.mark.parametrize("text", THEIRS.values(), ids=THEIRS)
def test_other_files_are_not_replaced(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text, errors="surrogatepass")
    (tmp_path / "link").symlink_to(path)
    for output in (path, tmp_path / "link"):
        with pytest.raises(InputError, match=rf"^--output {output}: "):
            check_output("--output", output)


@pytest.mark.parametrize("name", ["model.safetensors", "modules.json", "README.md", "tokenizer.json"])
def test_files_of_a_model_are_not_replaced(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / name).write_text('[{"idx": 0}]' if name == "modules.json" else "{}" if "json" in name else "bytes")
    with pytest.raises(InputError, match=rf"^--output .*{name}"):
        check_output("--output", tmp_path / name)
    (tmp_path / "scores.json").write_text('[{"metrics": {}}]')
    check_output("--output", tmp_path / "scores.json")


@pytest.mark.parametrize("text", OURS.values(), ids=OURS)
def test_what_is_read_is_not_replaced(tmp_path, text):
    path = tmp_path / "pairs.tsv"
    path.write_text(text or "")
    (tmp_path / "link").symlink_to(path)
    for output in (path, tmp_path / "link", tmp_path / "." / "pairs.tsv"):
        for data in (path, tmp_path, str(path)):
            with pytest.raises(InputError, match=r"^--output "):
                check_output("--output", output, None, data)
    for name in ("new.json", "old.json"):
        check_output("--output", tmp_path / name, tmp_path)
        (tmp_path / name).write_text("[]")


def test_plots(tmp_path, monkeypatch):
    rows = [{"model": "a", "protocol": "SimCSE", "pooling": "mean", "seeds": 1, "STS12": "50.0"}]
    for name in ("a.png", "a.pdf", "a.svg"):
        check_plot("--plot", tmp_path / name)
        plot_scores(rows, tmp_path / name)
        check_plot("--plot", tmp_path / name)
        monkeypatch.chdir(tmp_path)
        for data in (tmp_path, tmp_path / name, Path(name), "."):
            with pytest.raises(InputError, match=r"--plot .*exists"):
                check_plot("--plot", tmp_path / name, None, data)
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError, match=r"--plot .*exists"):
            check_plot("--plot", tmp_path / name)
    with pytest.raises(InputError, match=r"\.svg"):
        check_plot("--plot", tmp_path / "a.txt")
