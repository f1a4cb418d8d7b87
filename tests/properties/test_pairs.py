"""STS pairs survive a round trip through every file format; invalid bytes raise an error of one line."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fmicl_text.errors import InputError
from fmicl_text.evaluation.sts import COLUMNS, load_pairs
from fmicl_text.evaluation.tasks import SentEvalFiles, load_set, load_task
from tests.properties.files import damaged, encoded, load_or_input_error, parquet, write

SENTENCES = (st.text(min_size=1, max_size=12) | st.text("ab \",'", min_size=1, max_size=6)).filter(str.strip)
PAIRS = st.lists(st.tuples(SENTENCES, SENTENCES, st.floats(0, 5)), min_size=2, max_size=5)


@given(PAIRS, st.sampled_from([".csv", ".tsv", ".parquet"]))
def test_sts_pairs(folder, rows, suffix):
    assume(len({score for *_, score in rows}) > 1)
    if suffix == ".tsv":
        assume(not any(set("\t\r\n") & set(a + b) for a, b, _ in rows))
    scores = [row[2] for row in rows]
    if suffix == ".parquet":
        content = parquet(**dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)))
    else:
        content = encoded(suffix, COLUMNS, [(a, b, repr(score)) for a, b, score in rows])
    found = load_pairs(write(folder, suffix, content))
    assert [(row["sentence1"], row["sentence2"]) for row in found] == [row[:2] for row in rows]
    assert found["score"][:] == scores


TABLE = b'sentence1,sentence2,score\n"a, ""x""",b,1\nc,d,2.5\n'
SENTEVAL = b"main\tMSR\t2012\t1\t2.5\ta b\tc d\nmain\tMSR\t2012\t2\t0.0\te f\tg\n"
SICK = b"pair_ID\tsentence_A\tsentence_B\trelatedness_score\n1\ta\tb\t2.5\n2\tc\td\t3\n"
SENTENCE_FILES = b"a\tb\nc\td\n", b"1.0\n2.5\n"


PAIR_FILE = parquet(sentence1=["a", "b"], sentence2=["c", "d"], score=[1.0, 2.0])


@settings(max_examples=120)
@given(damaged([TABLE, TABLE.replace(b",", b"\t"), SENTEVAL, PAIR_FILE]))
def test_any_bytes_as_sts_pairs(folder, content):
    found = load_or_input_error(lambda: load_pairs(write(folder, ".tsv", content)))
    if found is not None:
        assert len(found) >= 2 and all(0 <= score <= 5 for score in found["score"])
        assert all(text.strip() for name in COLUMNS[:2] for text in found[name])


@given(damaged([SICK]), damaged([SENTENCE_FILES[0]]), damaged([SENTENCE_FILES[1]]))
def test_any_bytes_as_sentevals_files(folder, sick, sentences, grades):
    for name, content in (
        ("SICK/SICK_test_annotated.txt", sick),
        ("STS/STS.input.a.txt", sentences),
        ("STS/STS.gs.a.txt", grades),
    ):
        path = folder / "senteval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    files = SentEvalFiles(folder / "senteval")
    load_or_input_error(lambda: load_set("STS", "a", files))
    with pytest.raises(InputError):  # never has the number of pairs of the standard set
        load_task("SICKRelatedness", "test", files)
