"""Texts that are held out: a choice by content, and no copy of them among the rows to train on."""

import gc
import gzip

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmicl_text.errors import InputError
from fmicl_text.text.data import load_training_text
from fmicl_text.text.held_out import HeldOut, hold_out, parts_of, text_hash

TEXTS = [f"This is the sentence of number {i} here." for i in range(1500)]
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    gc.collect()


def columns_of(rows, names=("text",)):
    return datasets.Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(names)})


def split(rows, limit=2000, names=("text",), **options):
    kept, apart = hold_out(columns_of(rows, names), names, limit, **options)
    return list(zip(*(kept[name] for name in names), strict=True)), apart


def test_parts_of_a_text():
    assert parts_of("  a  dog\nruns ") == (["a", "dog", "runs"], " ")
    assert parts_of("我们在公园里散步") == (list("我们在公园里散步"), "")  # written without spaces
    assert (
        parts_of("我们在公园里散步，然后回家吃饭，之后我们一起看电视。 天气很好，大家都非常高兴，明天我们还会再来。")[1]
        == ""
    )
    assert parts_of("word") == (list("word"), "")


def test_a_tenth_at_most_the_limit_of_the_texts():
    kept, apart = split([(text,) for text in TEXTS])
    assert len(apart.rows) == 150 and len(kept) == 1350 and apart == HeldOut(apart.rows, 0, None)
    assert {*kept, *apart.rows} == {(text,) for text in TEXTS}
    assert [row for (row,) in apart.rows] == sorted(TEXTS, key=text_hash)[:150]
    assert split([(text,) for text in TEXTS], limit=100)[1].rows == apart.rows[:100]


def test_the_choice_does_not_depend_on_order_or_copies():
    rows = [(text,) for text in TEXTS]
    apart = split(rows)[1].rows
    assert split(rows[::-1])[1].rows == apart
    kept, found = split(rows * 2 + [(f"  {text.upper()}".replace(" ", "  "),) for (text,) in rows[:300]])
    held = {text for (text,) in apart}
    assert {text.lower() for (text,) in found.rows} == {text.lower() for text in held}
    spelled = {" ".join(text.lower().split()) for (text,) in kept}
    assert spelled.isdisjoint(text.lower() for text in held)  # neither copies nor other spellings are trained on
    assert (
        found.num_repeats == 150 + sum(text in held for text in TEXTS[:300]) and len(kept) + found.num_repeats == 3150
    )


def test_the_hash_is_the_same_on_every_machine():
    assert text_hash("A  Dog runs.") == text_hash("a dog runs.") == 7103449392007075905


def write(path, texts):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
        return str(path)
    content = "text\n" * (path.name != "a.txt" and path.suffix != ".gz") + "".join(f"{text}\n" for text in texts)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_format_holds_out_the_same_texts(tmp_path, streaming):
    found = set()
    for name in ("a.txt", "a.csv", "a.parquet", "b.txt.gz"):
        options = {"streaming": streaming, "shuffle_seed": 3, "held_out": 2000}
        data = load_training_text(write(tmp_path / name, TEXTS), **options)
        kept = [row["text"] for row in data.dataset]
        assert len(kept) == 1350 and {(text,) for text in kept}.isdisjoint(data.held_out.rows)
        assert data.metadata()["rows held out"] == 150
        assert data.num_rows == (None if streaming else 1350)
        found.add(data.held_out.rows)
    assert len(found) == 1


def test_a_stream_holds_out_some_of_its_first_rows(tmp_path):
    """A tenth of the first ten times as many, whatever follows; all their copies are dropped, also later ones."""
    file = write(tmp_path / "a.txt", TEXTS[:1000] + [f"Another {text}" for text in TEXTS] + TEXTS[:1000])
    data = load_training_text(file, streaming=True, held_out=100)
    assert {text for (text,) in data.held_out.rows} < set(TEXTS[:1000]) and len(data.held_out.rows) == 100
    assert len(list(data.dataset)) == 900 + 1500 + 900
    other = load_training_text(file, streaming=True)
    assert data.fingerprint != other.fingerprint and other.held_out == HeldOut()


def test_the_first_rows_are_chosen_before_some_are_held_out(tmp_path):
    file = write(tmp_path / "a.txt", TEXTS)
    for streaming in (False, True):
        data = load_training_text(file, max_train_samples=1100, held_out=2000, streaming=streaming)
        texts = [row["text"] for row in data.dataset] + [text for (text,) in data.held_out.rows]
        assert set(texts) == set(TEXTS[:1100]) and len(data.held_out.rows) == 110


def test_the_rows_are_cached_under_the_same_name(tmp_path):
    file = write(tmp_path / "a.txt", TEXTS)
    first, second = (load_training_text(file, held_out=2000).dataset for _ in range(2))
    assert first._fingerprint == second._fingerprint != load_training_text(file).dataset._fingerprint


def test_rows_that_contain_a_held_out_text_are_dropped():
    """In any column: as question, as answer or as hard negative."""
    names = "sent0", "sent1", "hard_neg"
    rows = [(f"question {i}", f"answer {i}", f"other {i}") for i in range(1500)]
    _, apart = split(rows, names=names)
    question, answer, other = apart.rows[0]
    more = [(question, "new", "new 1"), ("new 2", "new 3", answer), ("new 4", other, "new 5"), ("n", "m", "o")]
    kept, found = split([*rows, *more], names=names)
    assert found.rows == apart.rows and found.num_repeats == 2
    assert set(more) & set(kept) == set(more[2:])  # the hard negatives of held-out rows are not evaluated


@pytest.mark.parametrize(
    "rows, words",
    [
        ([("One more sentence here.",)] * 5000, "1,000 distinct rows 100 got 1"),
        ([(text,) for text in TEXTS[:999]], "1,000 distinct rows 100 got 999"),
        ([(f"number {i}",) for i in range(1500)], "0 texts 4 words 100"),
    ],
)
def test_too_few_rows(rows, words):
    kept, apart = split(rows)
    assert kept == rows and apart.rows == () and not [word for word in words.split() if word not in apart.reason]


def test_too_few_rows_would_remain():
    pairs = [(f"question {i}", "yes" if i % 2 else "no") for i in range(1500)]
    kept, apart = split(pairs, names=("sent0", "sent1"))
    assert kept == pairs and apart.reason == "only 0 of 1,500 rows would remain to train on"
    kept, apart = split([(text,) for text in TEXTS], at_least=1400)  # a batch
    assert len(kept) == 1500 and apart.reason == "only 1,350 of 1,500 rows would remain to train on"


@pytest.mark.parametrize("limit", [-1, 1, 99])
def test_a_limit_that_is_too_small(limit):
    with pytest.raises(InputError, match=f"held_out must be 0 or at least 100, got {limit}"):
        load_training_text("none.txt", held_out=limit)


def test_nothing_is_held_out_by_default(tmp_path):
    data = load_training_text(write(tmp_path / "a.txt", TEXTS))
    assert len(data.dataset) == 1500 and data.held_out == HeldOut() and "rows held out" not in data.metadata()
