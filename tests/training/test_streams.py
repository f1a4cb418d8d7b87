"""A stream has another order with another number of DataLoader workers: resuming warns."""

import warnings

import pytest
from datasets import Dataset

from fmicl_text import FMICLTrainer, InputError, TextContrastiveModel, build_text_encoder
from fmicl_text.text.data import load_training_text
from fmicl_text.text.tokenization import RepeatedStream, training_rows
from tests.support import SAVING, make_trainer, same, sentences, weights


def trainer_of_shards(folder, output_dir, num_shards, workers):
    stream = Dataset.from_dict({"text": sentences(64)}).to_iterable_dataset(num_shards=num_shards)
    return make_trainer(
        folder, output_dir, dataset=RepeatedStream(stream), dataloader_num_workers=workers, **SAVING | {"max_steps": 4}
    )


@pytest.mark.parametrize("shards, workers", [(2, (0, 2)), (2, (1, 2)), (1, (0, 1))])
def test_another_number_of_workers_is_warned_of(bert_folder, tmp_path, shards, workers):
    before, now = workers
    trainer_of_shards(bert_folder, tmp_path, shards, workers=before).train()
    resumed = trainer_of_shards(bert_folder, tmp_path, shards, workers=now)
    with pytest.warns(UserWarning, match=f"dataloader_num_workers {before} -> {now}"):
        resumed.checkpointer.choose("auto")


@pytest.mark.slow
def test_more_workers_of_one_shard_and_those_of_a_table_do_not_matter(bert_folder, tmp_path):
    trainer_of_shards(bert_folder, tmp_path / "stream", 1, workers=1).train()
    make_trainer(bert_folder, tmp_path / "table", **SAVING | {"max_steps": 4}).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer_of_shards(bert_folder, tmp_path / "stream", 1, workers=2).checkpointer.choose("auto")
        settings = SAVING | {"max_steps": 4, "dataloader_num_workers": 2}
        make_trainer(bert_folder, tmp_path / "table", **settings).checkpointer.choose("auto")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_of_a_stream_that_cannot_be_read_is_one_line(bert_folder, tmp_path, workers):
    """In the second block that the loader reads, so that the start is valid."""
    path, count = tmp_path / "train.jsonl", 12_000
    path.write_text("".join(f'{{"text": "a {i} {"o" * 1024}"}}\n' for i in range(count)) + "{oops}\n")
    data = load_training_text(str(path), streaming=True)
    encoder = build_text_encoder(bert_folder, pooling="mean")
    rows, collator, _ = training_rows(data, encoder.tokenizer, 8)
    rows.stream = rows.stream.skip(count - 40)
    args = make_trainer(bert_folder, tmp_path / "out", max_steps=20, dataloader_num_workers=workers).args
    trainer = FMICLTrainer(TextContrastiveModel(encoder), args, train_dataset=rows, data_collator=collator)
    with pytest.raises(InputError, match=r"^\S*train\.jsonl cannot be read as \.jsonl: line 12001, ") as error:
        trainer.train()
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("strategy, steps", [("steps", 2), ("epoch", 4)])
def test_a_finite_stream_that_is_resumed_after_its_first_pass_is_warned_of(bert_folder, tmp_path, strategy, steps):
    """Of 4 batches per pass, up to step 4 the stream continues where it stopped."""
    settings = {"save_strategy": strategy, "save_steps": steps, "save_total_limit": 9, "max_steps": 12}

    def trainer():
        stream = Dataset.from_dict({"text": sentences(32)}).to_iterable_dataset(num_shards=2).shuffle(seed=0)
        return make_trainer(bert_folder, tmp_path, dataset=stream, **settings)

    whole = trainer()
    whole.train()
    for _ in range(2):  # the second time, from checkpoints that a resumed run wrote
        with pytest.warns(UserWarning, match=r"checkpoint-8 train_dataset, a stream, had been read to its end"):
            trainer().checkpointer.choose(str(tmp_path / "checkpoint-8"))
        resumed = trainer()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert same(weights(whole), weights(resumed))
