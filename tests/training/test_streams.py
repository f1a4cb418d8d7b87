"""A stream of several shards has another order with another number of DataLoader workers: resuming warns."""

import warnings

import pytest
from datasets import Dataset

from fmicl_text.text.tokenization import RepeatedStream
from tests.support import SAVING, make_trainer, sentences


def trainer_of_shards(folder, output_dir, num_shards, workers):
    stream = Dataset.from_dict({"text": sentences(64)}).to_iterable_dataset(num_shards=num_shards)
    return make_trainer(
        folder, output_dir, dataset=RepeatedStream(stream), dataloader_num_workers=workers, **SAVING | {"max_steps": 4}
    )


def test_another_number_of_workers_is_warned_of(bert_folder, tmp_path):
    trainer_of_shards(bert_folder, tmp_path, 2, workers=0).train()
    resumed = trainer_of_shards(bert_folder, tmp_path, 2, workers=2)
    with pytest.warns(UserWarning, match="dataloader_num_workers 0 -> 2"):
        resumed.checkpointer.choose("auto")


def test_the_workers_of_one_shard_or_of_a_table_do_not_matter(bert_folder, tmp_path):
    trainer_of_shards(bert_folder, tmp_path / "stream", 1, workers=0).train()
    make_trainer(bert_folder, tmp_path / "table", **SAVING | {"max_steps": 4}).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer_of_shards(bert_folder, tmp_path / "stream", 1, workers=2).checkpointer.choose("auto")
        settings = SAVING | {"max_steps": 4, "dataloader_num_workers": 2}
        make_trainer(bert_folder, tmp_path / "table", **settings).checkpointer.choose("auto")
