"""eval/adaptation.py: the corpus of a folder of packages, its scores, and the peers."""

import json
import runpy
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from fmicl_text.cli.text import parse_args
from fmicl_text.errors import InputError
from fmicl_text.text.data import load_training_text
from tests.support import WORDS, one_fast, sentences, tiny_bert

SCRIPT = Path(__file__).parents[2] / "eval" / "adaptation.py"
ADAPTATION = runpy.run_path(str(SCRIPT))
PROSE = "The dog and the cat walk slowly to the old house by the river, where a child reads under a tall tree."
FILES = 40


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["adaptation.py", *map(str, arguments)])
    monkeypatch.setattr("fmicl_text.cli.parser.FLAGS", set())
    runpy.run_path(str(SCRIPT), run_name="__main__")


def install(site, name, files, version="1.0"):
    """A package in a folder like site-packages."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n# {name}\n")
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text, encoding="utf-8")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in [*files, f"{info.name}/METADATA"]))


def paragraph(name, number):
    """Distinct prose of the tiny model's words, in which every third word is one of the package's."""
    own = [word for i, word in enumerate(WORDS) if i % 3 == len(name) % 3]
    words = sentences(3, seed=number)
    return " ".join(f"{text} {own[number % len(own)]} {own[number // 7 % len(own)]}" for text in words * 2) + "."


def package_files(name, first):
    """Modules with four paragraphs each in docstrings, and a page."""
    files = {}
    for i in range(FILES):
        a, b, c, d = (paragraph(name, first + 4 * i + k) for k in range(4))
        files[f"{name}/m{i}.py"] = f'"""{a}\n\n{b}\n"""\n\ndef function():\n    """{c}"""\n\nclass A:\n    """{d}"""\n'
    return files | {f"{name}/page.rst": f"Title\n=====\n\n{paragraph(name, first - 1)}\n"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    for first, name in enumerate(("one", "pair", "seven")):
        shared = {f"{name}/shared.md": f"{PROSE}\n"}
        install(site, name, package_files(name, 1000 * (first + 1)) | shared, version=f"{first}.5")
    (site / "gone-1.0.dist-info").mkdir()  # without METADATA
    install(site, "tiny", {"tiny/__init__.py": f'"""{paragraph("tiny", 9)}"""\n'})
    return site


@pytest.fixture(scope="module")
def corpus(site):
    return ADAPTATION["build_corpus"](distributions(path=[str(site)]))


def test_paragraphs():
    text = f"""Title

    {PROSE.replace("slowly to", "slowly" + chr(10) + "    to")}

```py
{PROSE}
```

Too short to be a paragraph.

>>> print("{PROSE}")

{PROSE.removesuffix(".")}

| {" | ".join("12345 67890" for _ in range(20))} |.

{" ".join([PROSE] * 6)}
"""
    assert list(ADAPTATION["paragraphs"](text)) == [PROSE]


def test_documents(tmp_path):
    tests = {"pack/tests/a.py": '"""Test."""', "pack/_vendor/b.rst": "Vendor", "pack/c.txt": "Text"}
    module = '"""Module."""\nclass A:\n    """Class.\n\n    Indented.\n    """\n    async def f(self):\n        "f."\n'
    broken = {"pack/broken.py": '"""Two', "pack/page.md": "Page"}
    install(tmp_path, "pack", {"pack/a.py": module, **tests, **broken})
    (tmp_path / "pack" / "latin.py").write_bytes(b'"""\xff"""')
    record = tmp_path / "pack-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text() + "pack/latin.py,,\npack/gone.py,,\n")
    (package,) = distributions(path=[str(tmp_path)])
    found = [(file, text) for file, text in ADAPTATION["documents"](package) if text]
    assert found == [
        ("METADATA", "# pack\n"),
        ("pack/a.py", "Module."),
        ("pack/a.py", "Class.\n\nIndented."),
        ("pack/a.py", "f."),
        ("pack/page.md", "Page"),
    ]


def test_the_parts_share_no_file_and_no_paragraph(corpus):
    parts, versions = corpus
    assert versions == {"one": "0.5", "pair": "1.5", "seven": "2.5"}  # tiny has too few
    files = {part: {(row["package"], row["file"]) for row in rows} for part, rows in parts.items()}
    texts = [ADAPTATION["letters"](row["text"]) for rows in parts.values() for row in rows]
    assert len(set(texts)) == len(texts) and ADAPTATION["letters"](PROSE) not in texts  # all have it
    assert not (files["train"] & files["test"] or files["train"] & files["dev"] or files["dev"] & files["test"])
    for part, (least, most) in ADAPTATION["PARTS"].items():
        assert {row["package"] for row in parts[part]} == set(versions)
        assert all(least <= sum(row["package"] == name for row in parts[part]) <= most for name in versions)
    assert sum(map(len, files.values())) == len(files["train"] | files["dev"] | files["test"])


def test_the_corpus_depends_on_content_only(site, corpus, tmp_path, monkeypatch):
    """Not on the order or place of packages."""
    moved = tmp_path / "elsewhere"
    site.rename(moved)
    try:
        packages = list(distributions(path=[str(moved)]))[::-1]
        assert ADAPTATION["build_corpus"]([*packages, *packages]) == corpus
    finally:
        moved.rename(site)


@pytest.fixture(scope="module")
def folder(site, tmp_path_factory):
    """A corpus, as `corpus` writes it."""
    folder = tmp_path_factory.mktemp("corpus") / "docs"
    ADAPTATION["write_corpus"](folder, distributions(path=[str(site)]))
    return folder


def test_files_of_the_corpus(folder, corpus, site):
    parts, versions = corpus
    record = json.loads((folder / "corpus.json").read_text())
    assert record == {"paragraphs": {part: len(rows) for part, rows in parts.items()}, "packages": versions}
    assert all(ADAPTATION["read_part"](folder, part) == rows for part, rows in parts.items())
    assert not [path for path in folder.iterdir() if str(site) in path.read_text()]


def test_a_folder_with_files_is_not_overwritten(folder, site):
    before = (folder / "train.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"folder=.*docs: must be a new or an empty folder"):
        ADAPTATION["write_corpus"](folder, distributions(path=[str(site)]))
    assert (folder / "train.jsonl").read_bytes() == before


def test_too_little_documentation(tmp_path):
    install(tmp_path, "small", {"small.py": f'"""{PROSE}"""'})
    with pytest.raises(InputError, match=r"fewer than two .* 60 of train, 20 of dev, 20 of test paragraphs"):
        ADAPTATION["write_corpus"](tmp_path / "docs", distributions(path=[str(tmp_path)]))
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize("wrong", [0, 5])
def test_knn_accuracy(folder, corpus, monkeypatch, wrong):
    """Of an encoder that knows the package of all but some paragraphs of the test part."""
    parts, versions = corpus
    names = list(versions)
    classes = {row["text"]: names.index(row["package"]) for rows in parts.values() for row in rows}
    for row in parts["test"][:wrong]:
        classes[row["text"]] = (classes[row["text"]] + 1) % len(names)
    neighbors = {part: ADAPTATION["Neighbors"](folder, part) for part in ("dev", "test")}
    assert neighbors["test"].sizes == [3 * ADAPTATION["LABELED"], len(parts["test"])]
    encode = lambda encoder, texts: torch.eye(3)[[classes[text] for text in texts]]  # noqa: E731
    monkeypatch.setitem(ADAPTATION["Neighbors"].__call__.__globals__, "encode_sentences", encode)
    assert neighbors["dev"](None) == 100
    assert neighbors["test"](None) == pytest.approx(100 - 100 * wrong / len(parts["test"]))


@pytest.mark.parametrize("wrong", [0, 5])
def test_search_of_the_second_half_by_the_first(folder, corpus, monkeypatch, wrong):
    """With an encoder that knows the paragraph of all but some first halves."""
    search = ADAPTATION["Search"](folder, "test")
    texts = [row["text"] for row in corpus[0]["test"]]
    assert [f"{first} {second}" for first, second in zip(search.first, search.second, strict=True)] == texts
    assert all(0 <= len(b.split()) - len(a.split()) <= 1 for a, b in zip(search.first, search.second, strict=True))
    first = torch.eye(len(texts))
    first[:wrong] = first[:wrong].roll(1, dims=1)
    monkeypatch.setitem(
        ADAPTATION["Search"].__call__.__globals__,
        "encode_sentences",
        lambda encoder, rows: torch.cat([3 * first, torch.eye(len(texts))]),
    )
    assert search(None) == pytest.approx(100 - 100 * wrong / len(texts))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("method", one_fast(["tsdae", "simcse"]))
def test_a_peer_trains_for_some_seconds_and_is_scored(folder, tmp_path, monkeypatch, capsys, method):
    plain = tiny_bert(tmp_path / "plain")
    before = SentenceTransformer(plain, device="cpu")
    seconds = time.process_time() + 1
    train = ("peer", "--folder", folder, "--method", method, "--model", plain, "--batch_size", 8)
    main(monkeypatch, *train, "--cpu_seconds", seconds, "--max_seq_length", 16, "--output", tmp_path / "peer")
    assert seconds <= time.process_time() < seconds + 20
    assert "steps" in capsys.readouterr().out
    after = SentenceTransformer(str(tmp_path / "peer"), device="cpu")
    assert after.max_seq_length == before.max_seq_length == 40
    old = dict(before.named_parameters())
    kept = {name for name, value in after.named_parameters() if value.equal(old[name])}
    assert kept == {name for name in old if "pooler" in name}  # the mean pooling does not use it

    models = [f"peer={tmp_path / 'peer'}", f"before={plain}"]
    main(monkeypatch, "score", "--folder", folder, "--model", *models, "--output", tmp_path / "scores.json")
    results = json.loads((tmp_path / "scores.json").read_text())
    assert [result["name"] for result in results] == ["peer", "before"]
    assert all(0 < result["metrics"]["k-NN, test"] <= 100 for result in results)
    assert "| before | " in capsys.readouterr().out


def test_time_that_is_used_up():
    with pytest.raises(InputError, match=r"cpu_seconds=0.01: loading took \d+ CPU seconds"):
        ADAPTATION["CPUTime"](0.01)


def test_the_learning_rate_decays_with_the_time(monkeypatch):
    seconds = iter([10.0, 10.0, 20.0, 30.0, 31.0])
    monkeypatch.setattr(time, "process_time", lambda: next(seconds))
    clock = ADAPTATION["CPUTime"](30.0)
    assert [clock.left(step) for step in range(4)] == [1, 0.5, 0, 0]


def test_deleted_words():
    generator = torch.Generator().manual_seed(0)
    text = " ".join(map(str, range(1000)))
    kept = [int(word) for word in ADAPTATION["delete_words"](text, generator).split()]
    assert kept == sorted(set(kept)) and 350 < len(kept) < 450  # 40% of them, in order
    assert {ADAPTATION["delete_words"]("one", generator) for _ in range(9)} == {"one"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["peer", "--model", "a", "--method", "tsdae", "--output", "b"], "peer needs --cpu_seconds"),
        (["peer", "--method", "tsdae"], "peer needs --model"),
        (["score"], "score needs --model"),
        (["score", "--model", "a"], "--folder docs: no corpus (No such file or directory)"),
        (["peer", "--model", "a", "b", "--method", "tsdae", "--output", "c", "--cpu_seconds", "1"], "peer trains one"),
        (["peer", "--model", "a", "--method", "mlm"], "invalid choice: 'mlm'"),
    ],
)
def test_one_line_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, arguments[0], "--folder", "docs", *arguments[1:])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.iterdir())


def test_the_preset_reads_the_corpus(folder):
    model_args, data_args, args = parse_args(["--config", "adapt", "--train_file", str(folder / "train.jsonl")])
    assert (model_args.trained_layers, data_args.views, args.negatives) == (2, ["crops"], "cross_view")
    data = load_training_text(data_args.train_file)
    assert list(data.columns) == ["text"]
    assert data.dataset["text"][:] == [row["text"] for row in ADAPTATION["read_part"](folder, "train")]
