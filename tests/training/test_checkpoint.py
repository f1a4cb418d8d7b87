"""Checkpoint folders: corruption is detected, and nothing is written through a link."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, concatenate_datasets

from fmicl_text import InputError
from fmicl_text.files import move_files, write_atomic
from fmicl_text.training.checkpoint import (
    checkpoints_in,
    dataset_fingerprint,
    find_checkpoint,
    latest_valid_checkpoint,
    move_into_place,
    remove_checkpoint,
    saved_run,
    stopped_early,
    validate_checkpoint,
    write_manifest,
)


def checkpoint(folder, step):
    """A valid checkpoint folder."""
    place = folder / f"checkpoint-{step}"
    (place / "1_Pooling").mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json", "1_Pooling/config.json"):
        (place / name).write_text(f"{name} of step {step}")
    write_manifest(place, {"processes": 1})
    return place


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


UNREADABLE = "its manifest.json cannot be read"
DAMAGE = {
    "file missing": (lambda c: (c / "1_Pooling" / "config.json").unlink(), "1_Pooling/config.json is missing"),
    "cut short": (lambda c: (c / "model.safetensors").write_text("mod"), "model.safetensors has 3 bytes, expected 28"),
    "bit flipped": (lambda c: flip_a_bit(c / "model.safetensors"), "model.safetensors has changed"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "it has no manifest.json"),
    "empty manifest": (lambda c: (c / "manifest.json").write_text(""), UNREADABLE),
    "a list": (lambda c: (c / "manifest.json").write_text("[1]"), UNREADABLE),
    "files a list": (lambda c: (c / "manifest.json").write_text('{"files": [1], "run": {}}'), UNREADABLE),
    "not text": (lambda c: (c / "manifest.json").write_bytes(b"\xff\xfe"), UNREADABLE),
    "no state": (
        lambda c: (c / "manifest.json").write_text('{"files": {}, "run": {}}'),
        "trainer_state.json is missing",
    ),
    "no run": (lambda c: (c / "manifest.json").write_text('{"files": {}}'), UNREADABLE),
    "run a list": (
        lambda c: (c / "manifest.json").write_text('{"files": {}, "run": [1]}'),
        UNREADABLE,
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_the_newest_whole_one_taken(tmp_path, case):
    older, newer = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert validate_checkpoint(newer) is None and latest_valid_checkpoint(tmp_path) == newer
    harm, words = DAMAGE[case]
    harm(newer)
    assert validate_checkpoint(newer) == words
    found, skipped = find_checkpoint(tmp_path, "auto")
    assert found == older and skipped == [f"{newer} is corrupted and was skipped: {words}"]
    assert find_checkpoint(tmp_path, True) == (older, skipped)
    harm(older)
    with pytest.raises(InputError, match=r"resume_from_checkpoint=auto: .*checkpoint-10 .*checkpoint-9 "):
        find_checkpoint(tmp_path, "auto")


def test_the_checkpoint_to_go_on_from(tmp_path):
    assert find_checkpoint(tmp_path, "auto") == find_checkpoint(tmp_path, None) == (None, [])
    with pytest.raises(InputError, match=r"resume_from_checkpoint=True: .* contains no checkpoint"):
        find_checkpoint(tmp_path, True)
    for step in (100, 20):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-20", "checkpoint-100"]
    for named, name in (("auto", "checkpoint-100"), ("True", "checkpoint-100"), (tmp_path / "checkpoint-20",) * 2):
        assert find_checkpoint(tmp_path, named)[0] == tmp_path / name
    assert find_checkpoint(tmp_path, "false") == (None, [])
    with pytest.raises(InputError, match=r"resume_from_checkpoint=nope: .*no trainer_state.json"):
        find_checkpoint(tmp_path, "nope")
    flip_a_bit(tmp_path / "checkpoint-20" / "model.safetensors")
    with pytest.raises(InputError, match=r"checkpoint-20: .*model.safetensors has changed"):
        find_checkpoint(tmp_path, tmp_path / "checkpoint-20")


def test_a_checkpoint_replaces_one_of_its_name(tmp_path):
    place, new = checkpoint(tmp_path, 5), checkpoint(tmp_path / "unfinished", 5)
    (new / "model.safetensors").write_text("other")
    write_manifest(new, {"processes": 2})
    move_into_place(new, place)
    assert validate_checkpoint(place) is None and saved_run(place) == {"processes": 2} and not new.exists()


def test_a_link_is_removed_not_what_it_leads_to(tmp_path):
    outside = checkpoint(tmp_path / "outside", 7)
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "checkpoint-7"
    link.symlink_to(outside)
    remove_checkpoint(link)
    assert not link.exists() and validate_checkpoint(outside) is None
    remove_checkpoint(outside)
    assert not outside.exists()


def test_nothing_is_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    place, new, elsewhere = tmp_path / "run", tmp_path / "new", tmp_path / "elsewhere"
    for folder in (place / "1_Pooling", new / "1_Pooling", new / "2_Dense", elsewhere):
        folder.mkdir(parents=True)
    (place / "2_Dense").symlink_to(elsewhere)
    for name in ("config.json", "1_Pooling/config.json", "card.md", ".card.md.unfinished"):
        (place / name).symlink_to(precious)
    names = ("config.json", "1_Pooling/config.json", "2_Dense/config.json")
    for name in names:
        (new / name).write_text("ours")
    move_files(new, place)
    write_atomic(place / "card.md", "ours")
    assert precious.read_text() == "precious" and not list(elsewhere.iterdir())
    assert [(place / name).read_text() for name in (*names, "card.md")] == ["ours"] * 4
    assert not new.exists() and {path.name for path in place.iterdir()} == {
        "1_Pooling",
        "2_Dense",
        *names[:1],
        "card.md",
    }


def test_the_fingerprint_of_data_is_that_of_what_they_hold(tmp_path):
    rows = {"input_ids": [[[1, 2]], [[3]]], "length": [2, 1]}
    first = dataset_fingerprint(Dataset.from_dict(rows))
    Dataset.from_dict(rows).save_to_disk(tmp_path)
    assert dataset_fingerprint(Dataset.load_from_disk(str(tmp_path))) == first
    changed = [Dataset.from_dict(rows | {"length": [2, 2]}), Dataset.from_dict(rows).select([1, 0])]
    assert len({first, *map(dataset_fingerprint, changed)}) == 3
    assert dataset_fingerprint([1, 2, 3]) == "3 rows"
    assert dataset_fingerprint(Dataset.from_dict(rows).to_iterable_dataset()) is None


def test_how_data_are_cut_up_in_memory_does_not_matter():
    tokens = [[[i, i + 1], [i]] for i in range(30)]
    whole = Dataset.from_dict({"input_ids": tokens, "length": list(range(30))})
    longer = Dataset.from_dict({"input_ids": [[[7]], *tokens, [[8]]], "length": [-1, *range(30), 30]})
    layouts = {
        "one piece": whole,
        "three pieces": concatenate_datasets([whole.select(range(i, i + 10)) for i in (0, 10, 20)]),
        "a slice": longer.select(range(1, 31)),
        "rows picked": longer.select([*range(1, 20), *range(20, 31)]),
    }
    assert len({dataset_fingerprint(rows) for rows in layouts.values()}) == 1
    last = concatenate_datasets([whole.select(range(29)), Dataset.from_dict({"input_ids": [[[9]]], "length": [29]})])
    assert dataset_fingerprint(last) != dataset_fingerprint(whole)


def test_who_stopped_early():
    def state(said_stop, step):
        callbacks = {"TrainerControl": {"args": {"should_training_stop": said_stop}, "attributes": {}}}
        return SimpleNamespace(stateful_callbacks=json.loads(json.dumps(callbacks)), global_step=step, max_steps=10)

    assert [stopped_early(state(*case)) for case in ((True, 5), (True, 10), (False, 5))] == [True, False, False]
    assert not stopped_early(SimpleNamespace(stateful_callbacks={}, global_step=1, max_steps=10))


def test_the_newest_whole_one_for_messages(tmp_path):
    older, newer = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    flip_a_bit(newer / "model.safetensors")
    assert latest_valid_checkpoint(tmp_path) == older


def test_the_fingerprint_looks_at_the_last_row_too(tmp_path):
    texts = [str(i) for i in range(10_002)]
    first, second = (Dataset.from_dict({"text": rows}) for rows in (texts, [*texts[:-1], "other"]))
    assert dataset_fingerprint(first) != dataset_fingerprint(second)
    assert dataset_fingerprint(SimpleNamespace(fingerprint=lambda: 5)) == "5"


def test_a_removal_that_is_cut_short_leaves_nothing_that_passes_for_a_checkpoint(tmp_path, monkeypatch):
    place = checkpoint(tmp_path, 5)

    def dies(folder, ignore_errors=False):
        if not ignore_errors:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(place)
    assert checkpoints_in(tmp_path) == []
