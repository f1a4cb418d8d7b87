import math
import statistics
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset

from fmicl_text.errors import InputError
from fmicl_text.evaluation import sts
from fmicl_text.evaluation.sts import evaluate_sts, load_pairs, load_stsb, sts_metrics
from tests.support import words_missing

PAIRS = {
    "sentence1": ['"A man" sings.', "It's 5, maybe 6.", "Zoë runs."],
    "sentence2": ["A man is singing.", "six", "A dog, running"],
    "score": [5.0, 2.25, 0.0],
}
TSV = (
    "genre\tscore\tsentence1\tsentence2\n"
    'news\t5\t"A man" sings.\tA man is singing.\n'
    "news\t2.25\tIt's 5, maybe 6.\tsix\n"
    "forum\t0.0\tZoë runs.\tA dog, running\n"
)
CSV = (
    "sentence1,sentence2,score\n"
    '"""A man"" sings.",A man is singing.,5\n'
    '"It\'s 5, maybe 6.",six,2.25\n'
    'Zoë runs.,"A dog, running",0\n'
)
SENTEVAL = (
    'main-news\tMSRpar\t2012test\t0000\t5.000\t"A man" sings.\tA man is singing.\n'
    "main-news\tMSRpar\t2012test\t0002\t2.250\tIt's 5, maybe 6.\tsix\tsource\tlicence\n"
    "main-forums\tdeft\t2014\t0003\t0.000\tZoë runs.\tA dog, running\n"
)


def write(folder: Path, content: str | bytes, name: str = "pairs.txt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("content", [TSV, CSV, SENTEVAL], ids=["tsv", "csv", "senteval"])
@pytest.mark.parametrize("edit", ["", "bom", "crlf", "blank lines"])
def test_the_format_is_detected_from_the_content(tmp_path, content, edit):
    if edit == "bom":
        content = "\ufeff" + content
    if edit == "crlf":
        content = content.replace("\n", "\r\n")
    if edit == "blank lines":
        content = content.replace("\n", "\n\n")
    assert load_pairs(write(tmp_path, content)).to_dict() == PAIRS


def test_parquet(tmp_path):
    path = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"extra": [1, 2, 3], **PAIRS}), path)
    assert load_pairs(path).to_dict() == PAIRS


HEADER = "sentence1\tsentence2\tscore\n"
WRONG = {
    "empty": ("", ["empty"]),
    "blank": ("\n \n", ["empty"]),
    "no score column": ("sentence1\tsentence2\tgold\na\tb\t1\n", ["column score", "sentence1, sentence2, gold"]),
    "no header": ("a\tb\t1\nc\td\t2\n", ["column sentence1, sentence2, score", "a, b, 1"]),
    "commas, no header": ("x,x,x,x,1,a,b\n", ["column sentence1, sentence2, score", "x, x, x, x, 1, a, b"]),
    "too few cells": (HEADER + "a\tb\t1\na\tb\n", ["line 3", "3 cells", "2"]),
    "too many cells": (CSV + "3,a,b,c\n", ["line 5", "3 cells", "4"]),
    "too few senteval": (SENTEVAL + "x\tx\tx\tx\t1\ta\n", ["line 4", "7 cells", "6"]),
    "no number": (HEADER + "a\tb\t1\na\tb\tone\n", ["line 3", "score 'one'"]),
    "no score": (SENTEVAL + "x\tx\tx\tx\t\ta\tb\n", ["line 4", "score ''"]),
    "nan": (HEADER + "a\tb\tnan\n", ["line 2", "score nan", "[0, 5]"]),
    "infinite": (HEADER + "a\tb\tinf\n", ["line 2", "score inf", "[0, 5]"]),
    "too large": (HEADER + "a\tb\t5.1\n", ["line 2", "score 5.1", "[0, 5]"]),
    "negative": (HEADER + "a\tb\t-1\n", ["line 2", "score -1", "[0, 5]"]),
    "blank sentence": (HEADER + "a\tb\t1\n \tb\t2\n", ["line 3", "blank"]),
    "blank second": (HEADER + "a\t\t1\n", ["line 2", "blank"]),
    "undecodable": (TSV.encode() + b"x\t1\tcaf\xe9\tb\n", ["line 5", "UTF-8"]),
    "open quote": (CSV + '"a,b,1\n', ["line 5", "unexpected end of data"]),
    "header only": (HEADER, ["0 pairs"]),
    "one pair": (HEADER + "a\tb\t1\n", ["1 pairs"]),
    "constant": (HEADER + "a\tb\t3\nc\td\t3.0\n", ["scores are 3"]),
    "parquet": (b"PAR1 and no more", ["Parquet"]),
}  # fmt: skip


@pytest.mark.parametrize("content, words", WRONG.values(), ids=WRONG)
def test_errors_name_the_file_and_the_line(tmp_path, content, words):
    with pytest.raises(InputError) as error:
        load_pairs(write(tmp_path, content))
    assert not words_missing(str(error.value), words)
    assert str(error.value).startswith(str(tmp_path / "pairs.txt"))
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"absent\.tsv: No such file or directory"):
        load_pairs(tmp_path / "absent.tsv")
    with pytest.raises(InputError, match="Is a directory"):
        load_pairs(tmp_path)


def test_wrong_rows_of_parquet(tmp_path):
    path = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.table(PAIRS | {"score": [1.0, 2.0, None]}), path)
    with pytest.raises(InputError, match="row 3: the score '' is not a number"):
        load_pairs(path)
    pyarrow.parquet.write_table(pyarrow.table(PAIRS | {"sentence2": ["a", None, "b"]}), path)
    with pytest.raises(InputError, match=r"row 2: .*blank"):
        load_pairs(path)
    pyarrow.parquet.write_table(pyarrow.table({"score": [1.0], "text": ["a"]}), path)
    with pytest.raises(InputError, match=r"column sentence1, sentence2; .* score, text"):
        load_pairs(path)


def test_stsb_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(name: str, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_dict({"genre": ["a", "b", "c"], **PAIRS})

    monkeypatch.setattr(sts, "load_dataset", load_dataset)
    for split in ("train", "dev", "test"):
        assert load_stsb(split).to_dict() == PAIRS
    assert asked == [("mteb/stsbenchmark-sts", split) for split in ("train", "validation", "test")]
    with pytest.raises(InputError, match="train, dev, test, got 'validation'"):
        load_stsb("validation")


def test_the_hub_out_of_reach(monkeypatch):
    def load_dataset(name: str, split: str) -> Dataset:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nand so on")

    monkeypatch.setattr(sts, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"Couldn't reach 'mteb.*' on the Hub: .*sts_dev_file"):
        load_stsb("test")


def test_metrics_by_hand():
    """Cosines 1, 0.6, 0, -1 and scores 5, 4, 4.5, 0.5: the ranks differ by 0, 1, -1, 0, so Spearman is
    1 - 6 * 2 / (4 * 15) = 0.8. Deviations from the means 0.15 and 3.5: covariance 4.8, squares 2.27 and 12.5.
    Three pairs are positive, at squared distance 0, 0.8, 2. Four of the eight rows are distinct, at squared
    distances 0.8, 2, 4, 0.4, 3.2, 2."""
    x = torch.tensor([[1.0, 0.0]] * 4)
    y = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    metrics = sts_metrics(x, y, [5, 4, 4.5, 0.5])
    potentials = [math.exp(-2 * distance) for distance in (0.8, 2, 4, 0.4, 3.2, 2)]
    by_distance = [2.0 - math.sqrt(d) for d in (0, 0.8, 2, 4)]  # unit rows: the order of the cosines, other values
    pearson_euclidean = 100 * statistics.correlation(by_distance, [5, 4, 4.5, 0.5])
    assert metrics == {
        "spearman": pytest.approx(80),
        "pearson": pytest.approx(100 * 4.8 / math.sqrt(2.27 * 12.5)),
        "spearman_dot": pytest.approx(80),
        "pearson_dot": pytest.approx(100 * 4.8 / math.sqrt(2.27 * 12.5)),
        "spearman_euclidean": pytest.approx(80),
        "pearson_euclidean": pytest.approx(pearson_euclidean),
        "alignment": pytest.approx(2.8 / 3),
        "uniformity": pytest.approx(math.log(sum(potentials) / 6)),
    }
    assert all(type(value) is float for value in metrics.values())


def test_no_positive_pair_no_alignment():
    x, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert "alignment" not in sts_metrics(x, y, [0.0, 1, 2, 3, 3.99])
    assert "alignment" in sts_metrics(x, y, [0.0, 1, 2, 3, 4])


def test_only_direction_counts():
    x, y = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    scores = torch.linspace(0, 5, 30)
    lengths = torch.logspace(-3, 3, 30).unsqueeze(-1)
    of_cosine = ("spearman", "pearson", "alignment", "uniformity")
    expected = {name: value for name, value in sts_metrics(x, y, scores).items() if name in of_cosine}
    scaled, swapped = sts_metrics(x * lengths, y, scores), sts_metrics(y, x, scores)
    assert {name: scaled[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert {name: swapped[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert abs(scaled["spearman_dot"] - expected["spearman"]) > 1


def test_cosines_that_float32_would_call_equal():
    x = torch.tensor([[1.0, 0.0]] * 5)
    y = torch.tensor([[1.0, k * 1e-5] for k in range(5)])
    assert sts_metrics(x, y, [5, 4, 3, 2, 1])["spearman"] == pytest.approx(100)


def test_never_nan():
    x, y = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    scores = [0.0, 1, 2, 3]
    for value in (math.nan, math.inf):
        broken = x.clone()
        broken[1, 2] = value
        with pytest.raises(InputError, match=r"1 of 4 pairs have no cosine: .* NaN"):
            sts_metrics(y, broken, scores)
    with pytest.raises(InputError, match="4 of 4 pairs have no cosine"):
        sts_metrics(x, torch.zeros_like(x), scores)
    collapsed = x[:1] + 1e-7 * y
    with pytest.raises(InputError, match="the cosines of all 4 pairs are equal: Spearman and Pearson are undefined"):
        sts_metrics(collapsed, x[:1].expand(4, 3), scores)
    with pytest.raises(InputError, match="the scores of all 4 pairs are equal"):
        sts_metrics(x, y, [3.0] * 4)
    with pytest.raises(InputError, match="the cosines of all 1 pairs are equal"):
        sts_metrics(x[:1], y[:1], [3.0])
    with pytest.raises(ValueError, match=r"got \[4, 3\], \[3, 3\], \[4\]"):
        sts_metrics(x, y[:3], scores)


def test_each_distinct_sentence_is_encoded_once():
    pairs = Dataset.from_dict({"sentence1": ["b", "a", "c"], "sentence2": ["a", "d", "b"], "score": [5.0, 1.0, 2.0]})
    angle = {"a": 0.0, "b": 0.1, "c": 2.0, "d": 1.0}
    calls = []

    def encode(sentences: list[str]) -> torch.Tensor:
        calls.append(sentences)
        return torch.tensor([[math.cos(angle[sentence]), math.sin(angle[sentence])] for sentence in sentences])

    metrics = evaluate_sts(encode, pairs)  # cosines cos 0.1, cos 1, cos 1.9
    assert calls == [["b", "a", "c", "d"]]
    x = torch.tensor([[1.0, 0.0]] * 3)
    y = torch.tensor([[math.cos(a), math.sin(a)] for a in (0.1, 1.0, 1.9)])
    expected = sts_metrics(x, y, [5.0, 1.0, 2.0])
    assert metrics["num_pairs"] == 3
    assert {key: metrics[key] for key in ("spearman", "pearson", "alignment")} == pytest.approx(
        {key: expected[key] for key in ("spearman", "pearson", "alignment")}, rel=1e-5
    )
    with pytest.raises(ValueError, match="1 embeddings for 4 sentences"):
        evaluate_sts(lambda sentences: torch.ones(1, 2), pairs)
