"""alpha=auto in the trainer: the number, and that measuring it changes nothing else."""

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset

from fmicl_text import FMICLTrainer, FMICLTrainingArguments, InputError, build_text_encoder
from fmicl_text.cli.vision import VisionTrainingArguments
from fmicl_text.hub.run_record import run_record
from fmicl_text.losses import FDivergence, FMICLLoss, balance
from fmicl_text.text.data import load_training_text
from fmicl_text.text.tokenization import training_rows
from fmicl_text.training import calibration
from fmicl_text.training.checkpoint import saved_run
from fmicl_text.training.search import default_space
from fmicl_text.vision.data import Images, TrainingRows, collate_images
from fmicl_text.vision.encoder import new_image_encoder
from fmicl_text.vision.model import ImageContrastiveModel
from fmicl_text.vision.views import ImageViews
from tests.support import (
    PAIR_COLUMNS,
    SAVING,
    make_momentum_trainer,
    make_trainer,
    padded_pairs,
    run_trainers,
    same,
    sentences,
    tiny_small_image_resnet,
    weights,
)

AUTO = {"alpha": "auto", "gamma": "auto"}


@pytest.fixture(autouse=True)
def each_batch_by_itself(monkeypatch):
    monkeypatch.setattr(calibration, "JOINED_ROWS", 1)


def unit(rows):
    return [[value / math.hypot(*row) for value in row] for row in rows.double().tolist()]


def balances(x, y, gamma, slope, score_slope=lambda r: 1.0):
    """Means of the two derivatives over the pairs (x_i, y_i) and (x_i, x_j), by loops in float64."""
    xs, ys = unit(x), unit(y)
    r = [[-gamma * sum((a - b) ** 2 for a, b in zip(xs[i], xs[j], strict=True)) for j in range(len(xs))] for i in
         range(len(xs))]  # fmt: skip
    positive = [
        score_slope(-gamma * sum((a - b) ** 2 for a, b in zip(u, v, strict=True))) for u, v in zip(xs, ys, strict=True)
    ]
    negative = [slope(r[i][j]) for i in range(len(xs)) for j in range(len(xs)) if i != j]
    return sum(positive) / len(positive), sum(negative) / len(negative)


def recording(trainer):
    """The embeddings of every batch that the loss measures."""
    seen, measure = [], trainer.loss.balance

    def balance(x, y, *more, **named):
        seen.append((x, y))
        return measure(x, y, *more, **named)

    object.__setattr__(trainer.loss, "balance", balance)
    return seen


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "divergence, slope, score_slope",
    [
        ("kl", math.exp, lambda r: 1.0),
        ("pearson", lambda r: 2 * math.exp(2 * r), lambda r: 2 * math.exp(r)),
        ("js", lambda r: 1 / (1 + math.exp(-r)), lambda r: 1 / (1 + math.exp(r))),
    ],
)
def test_alpha_is_the_median_ratio_of_the_two_means(bert_folder, tmp_path, divergence, slope, score_slope):
    trainer = make_trainer(bert_folder, tmp_path, divergence=divergence, max_steps=1, alpha="auto")
    seen = recording(trainer)
    trainer.train()
    assert len(seen) == 8 and seen[0][0].shape == (8, 32)
    means = [balances(x, y, 2.0, slope, score_slope) for x, y in seen]
    ratios = sorted(positive / negative for positive, negative in means)
    assert trainer.loss.alpha == pytest.approx(math.sqrt(ratios[3] * ratios[4]), rel=1e-9)
    assert logged(trainer, "alpha") == [trainer.loss.alpha] and logged(trainer, "alpha_relative_error")[0] > 0
    assert run_record(trainer, {})["hyperparameters"]["alpha"] == trainer.loss.alpha


def test_a_user_defined_divergence_and_a_given_loss(bert_folder, tmp_path):
    """f(u) = u log u by its values alone, in a loss that is passed to the trainer."""
    encoder = build_text_encoder(bert_folder, pooling="mean")
    alphas = []
    for divergence in ("kl", FDivergence.from_convex(lambda u: u * u.log(), "mine")):
        args = FMICLTrainingArguments(str(tmp_path), per_device_train_batch_size=8, max_steps=1, save_strategy="no",
                                      use_cpu=True, learning_rate=0.0)  # fmt: skip
        loss = FMICLLoss(divergence, "auto", "auto")
        FMICLTrainer(encoder, args, train_dataset=sentences(64), loss=loss).train()
        alphas.append((loss.gamma, loss.alpha))
    assert alphas[1] == pytest.approx(alphas[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mini_batch_size": 3},
        {"gradient_accumulation_steps": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    ],
    ids=str,
)
def test_measuring_does_not_change_training(bert_folder, tmp_path, settings):
    """With the measured number given, weights and log are the same bit by bit; with dropout, over two epochs."""

    def run(folder, **more):
        encoder = build_text_encoder(bert_folder, pooling="mean")
        rows, collator, _ = training_rows(
            load_training_text(train_file=write(tmp_path)), encoder.tokenizer, max_seq_length=32
        )
        args = FMICLTrainingArguments(str(tmp_path / folder), per_device_train_batch_size=8, num_train_epochs=2.0,
                                      learning_rate=1e-3, logging_steps=1, save_strategy="no", use_cpu=True,
                                      **(settings | more))  # fmt: skip
        trainer = FMICLTrainer(encoder, args, train_dataset=rows, data_collator=collator)
        trainer.train()
        return trainer

    first = run("a", alpha="auto")
    second = run("b", alpha=first.loss.alpha)
    assert same(weights(first), weights(second))
    for name in ("loss", "mutual_information", "effective_rank"):
        assert logged(first, name) == logged(second, name) != []


def write(folder):
    path = folder / "text.txt"
    path.write_text("\n".join(sentences(40)) + "\n")
    return str(path)


def image_trainer(folder, **settings):
    """A small ResNet, which has batch statistics, on random views of 48 random images."""
    args = VisionTrainingArguments(str(folder), per_device_train_batch_size=8, max_steps=3, use_cpu=True,
                                   logging_steps=1, eval_strategy="no", **settings)  # fmt: skip
    torch.manual_seed(0)
    model = ImageContrastiveModel(new_image_encoder(tiny_small_image_resnet()), 32, head_dim=8)
    pixels = torch.randint(0, 256, (48, 3, 32, 32), dtype=torch.uint8)
    images = Images(torch.arange(48) % 3, ("a", "b", "c"), 3, "noise", np.arange(48, dtype=np.uint64), pixels=pixels)
    rows, views = TrainingRows(images, 32, None, seed=0), ImageViews("cifar", 32, [0.5] * 3, [0.25] * 3)
    return FMICLTrainer(model, args, train_dataset=rows, data_collator=collate_images, views=views)


@pytest.mark.slow
def test_batch_statistics_are_those_of_training_alone(tmp_path):
    first = image_trainer(tmp_path / "a", alpha="auto")
    first.train()
    second = image_trainer(tmp_path / "b", alpha=first.loss.alpha)
    second.train()
    (a, b) = (trainer.model.state_dict() for trainer in (first, second))
    assert any("running_mean" in name for name in a) and same(a, b)


@pytest.mark.parametrize("alpha", ["auto", 30.0])
def test_gamma_is_that_of_the_separation(bert_folder, tmp_path, monkeypatch, alpha):
    """1.25 (mean squared distance of negative pairs - that of positive pairs) / variance / k, over four batches. With
    the numbers given, weights are the same."""
    monkeypatch.setattr(balance, "AUTO_GAMMA_TIMES_EXPONENT", 200.0)
    monkeypatch.setattr(balance, "LEAST_GAMMA_TIMES_EXPONENT", 0.1)
    settings = {"divergence": "pearson", "max_steps": 3, "learning_rate": 1e-3}
    first = make_trainer(bert_folder, tmp_path / "a", gamma="auto", alpha=alpha, **settings)
    seen, measure = [], first.loss.distances

    def distances(x, y, *more):
        seen.append((unit(x), unit(y)))
        return measure(x, y, *more)

    object.__setattr__(first.loss, "distances", distances)
    first.train()
    far = lambda u, v: sum((a - b) ** 2 for a, b in zip(u, v, strict=True))  # noqa: E731
    positive = [far(u, v) for x, y in seen for u, v in zip(x, y, strict=True)]
    negative = [far(u, v) for x, _ in seen for i, u in enumerate(x) for j, v in enumerate(x) if i != j]
    center = sum(negative) / len(negative)
    variance = sum((value - center) ** 2 for value in negative) / len(negative)
    separation = (center - sum(positive) / len(positive)) / variance
    assert len(seen) == 4 and first.loss.gamma == pytest.approx(1.25 * separation / 2, rel=1e-6)
    assert logged(first, "gamma") == [first.loss.gamma]
    assert run_record(first, {})["hyperparameters"]["gamma"] == first.loss.gamma
    second = make_trainer(bert_folder, tmp_path / "b", gamma=first.loss.gamma, alpha=first.loss.alpha, **settings)
    second.train()
    assert same(weights(first), weights(second))
    before = first.loss.gamma
    first.train()  # measures again
    assert first.loss.gamma != before and (first.loss.alpha == 30.0) == (alpha == 30.0)


def test_measuring_gamma_leaves_batch_statistics(tmp_path):
    first = image_trainer(tmp_path / "a", gamma="auto", alpha=30.0)
    first.train()
    second = image_trainer(tmp_path / "b", gamma=first.loss.gamma, alpha=30.0)
    second.train()
    assert first.loss.gamma == 5 and same(first.model.state_dict(), second.model.state_dict())


@pytest.mark.parametrize("method", [{"queue_size": 16}, {"predictor": True}], ids=["moco", "mocov3"])
def test_momentum_encoders_and_queues_are_measured_with_real_keys(bert_folder, tmp_path, method):
    """The queue begins with random directions, at which alpha would be e^(2 gamma)."""
    trainer = make_momentum_trainer(bert_folder, tmp_path / "a", method, alpha="auto", gamma=20.0)
    trainer.train()
    assert 1 < trainer.loss.alpha < 1e12
    again = make_momentum_trainer(bert_folder, tmp_path / "b", method, alpha=trainer.loss.alpha, gamma=20.0)
    again.train()
    assert same(weights(trainer), weights(again))


@pytest.mark.parametrize("method", [{"queue_size": 16}, {"predictor": True}], ids=["moco", "mocov3"])
def test_both_directions_of_a_batch_are_one_entry(bert_folder, tmp_path, monkeypatch, method):
    """They share all embeddings. As two entries, they would make the standard error too small, and two batches would
    count as four."""
    totals = []
    measure = calibration.measure_balance
    monkeypatch.setattr(calibration, "measure_balance", lambda *given: totals.append(measure(*given)) or totals[-1])
    monkeypatch.setattr(calibration, "STABLE", 1e9)  # the fewest batches
    trainer = make_momentum_trainer(bert_folder, tmp_path, method, alpha="auto", gamma="auto")
    calls = {"balance": [], "distances": []}
    for name, found in calls.items():
        own = getattr(trainer.loss, name)
        record = lambda *given, own=own, found=found: found.append(own(*given)) or found[-1]  # noqa: E731
        object.__setattr__(trainer.loss, name, record)
    trainer.train()
    (total,) = totals
    count = len(total.positive)
    assert count == (7 if "queue_size" in method else 8)  # the queue is empty at the first batch
    assert [len(calls["balance"]), len(calls["distances"])] == [2 * count, 8]
    for name in ("positive", "negative"):
        values = np.array([getattr(one, name)[0] for one in calls["balance"]])
        assert getattr(total, name) == pytest.approx(tuple(values.reshape(count, 2).mean(1)))
    ratios = np.sort(np.log(total.positive) - np.log(total.negative))
    assert trainer.loss.alpha == pytest.approx(np.exp(np.median(ratios)))
    assert logged(trainer, "alpha_relative_error") == [pytest.approx((ratios[count - 3] - ratios[2]) / 2)]


@pytest.mark.slow
@pytest.mark.parametrize("automatic", [{"alpha": "auto"}, {"gamma": "auto"}, AUTO], ids=str)
def test_a_resumed_run_takes_the_recorded_number(bert_folder, tmp_path, monkeypatch, automatic):
    settings = SAVING | {"columns": PAIR_COLUMNS, "dataset": padded_pairs(64)} | automatic
    whole = make_trainer(bert_folder, tmp_path / "a", **settings)
    whole.train()
    half = make_trainer(bert_folder, tmp_path / "a", **settings)
    checkpoint = min((tmp_path / "a").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert [saved_run(checkpoint)[name] for name in AUTO] == [whole.loss.alpha, whole.loss.gamma]
    monkeypatch.setattr(calibration, "measure_balance", lambda *_: pytest.fail("measured again"))
    half.train(resume_from_checkpoint=str(checkpoint))
    assert (half.loss.alpha, half.loss.gamma) == (whole.loss.alpha, whole.loss.gamma)
    assert same(weights(half), weights(whole)) and not getattr(half.checkpointer, "changes", {})
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    for name in automatic:
        assert [entry[name] for entry in history if name in entry] == [getattr(whole.loss, name)]


def test_a_second_training_measures_again_and_a_changed_number_stays(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, alpha="auto", learning_rate=0.1)
    trainer.train()
    first = trainer.loss.alpha
    trainer.train()
    assert trainer.loss.alpha != first
    trainer.loss.alpha = 7.0
    trainer.train()
    assert trainer.loss.alpha == 7.0


@pytest.mark.slow
def test_a_training_after_a_resume_measures_again(bert_folder, tmp_path):
    """Numbers of the checkpoint were measured too: they are those of other weights, and no numbers to search around."""
    settings = SAVING | {"learning_rate": 0.1} | AUTO
    make_trainer(bert_folder, tmp_path, **settings).train()
    checkpoint = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    trainer = make_trainer(bert_folder, tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    resumed = trainer.loss.alpha
    trial = SimpleNamespace(suggest_float=lambda name, *between, log: between)
    assert list(default_space(trainer)(trial)) == ["learning_rate"]
    trainer.args.overwrite_output_dir = True
    trainer.train()
    assert trainer.loss.alpha != resumed == saved_run(checkpoint)["alpha"]


@pytest.mark.slow
def test_several_processes_have_one_alpha(no_dropout_folder, tmp_path):
    (one,) = [alpha_of(no_dropout_folder, tmp_path, per_device_train_batch_size=16)]
    for strategy in ("gather", "ring"):
        for two in run_trainers(2, no_dropout_folder, tmp_path, function=alpha_of, global_batch=strategy):
            assert two == pytest.approx(one, rel=1e-9)
    first, second = run_trainers(2, no_dropout_folder, tmp_path, function=alpha_of, global_batch="none")
    assert first == second


def alpha_of(folder, output_dir, **settings):
    trainer = make_trainer(
        folder, output_dir, columns=PAIR_COLUMNS, dataset=padded_pairs(64), max_steps=1, alpha="auto",
        train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    trainer.model.to(torch.float64)
    trainer.train()
    return trainer.loss.alpha


class Once(IterableDataset):
    """A stream that can be read only once."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


def test_a_stream_that_can_be_read_once_loses_no_rows(bert_folder, tmp_path):
    rows = [{"text": text} for text in sentences(32)]
    trainer = make_trainer(bert_folder, tmp_path, dataset=Once(rows), alpha="auto", max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4 and isinstance(trainer.loss.alpha, float)


def test_an_alpha_without_effect_is_reported(bert_folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "fmicl_text"):
        make_trainer(bert_folder, tmp_path, gamma=20.0, alpha=1.0).train()
    (line,) = [record.getMessage() for record in caplog.records if "repulsion" in record.getMessage()]
    assert line.startswith("alpha=1 with gamma=20 leaves almost no repulsion at this encoder, ")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fmicl_text"):
        make_trainer(bert_folder, tmp_path, gamma=20.0, alpha="auto").train()
        make_trainer(bert_folder, tmp_path, objective="infonce", gamma=None, alpha=None).train()
    assert not [record for record in caplog.records if "repulsion" in record.getMessage()]


@pytest.mark.parametrize("name", ["rkl", "jeffrey", "neyman"])
def test_no_alpha_without_a_tail(tmp_path, name):
    for settings in ({}, AUTO, {"gamma": 20.0}):
        with pytest.raises(ValueError, match=f"=auto needs a divergence .*that of {name} is .*: pass gamma and alpha"):
            FMICLTrainingArguments(str(tmp_path), divergence=name, **settings)


@pytest.mark.filterwarnings("ignore:no negative pair")
def test_batches_without_negatives_are_one_line(bert_folder, tmp_path):
    """Every batch of two is one text twice."""
    texts = [text for text in sentences(8) for _ in range(2)]
    trainer = make_trainer(bert_folder, tmp_path, dataset=Dataset.from_dict({"text": texts}), alpha="auto",
                           per_device_train_batch_size=2, train_sampling_strategy="sequential")  # fmt: skip
    with pytest.raises(InputError, match="alpha=auto: no batch has a negative pair"):
        trainer.train()


@pytest.mark.parametrize("value", ["automatic", "nan", "0", "-1", -1.0, True])
def test_only_positive_numbers_and_auto(tmp_path, value):
    for name in ("alpha", "gamma"):
        with pytest.raises(ValueError, match=f"{name} must be auto or a finite number > 0, got "):
            FMICLTrainingArguments(str(tmp_path), **{name: value})
    assert FMICLTrainingArguments(str(tmp_path), alpha="4e5", gamma="20").build_loss().alpha == 4e5


@pytest.mark.filterwarnings("ignore:divergence 'pearson' with gamma 1e.06")
def test_no_repulsion_at_any_pair_is_one_line(bert_folder, tmp_path):
    """e^(2r) is 0 in float64 in every batch."""
    trainer = make_trainer(bert_folder, tmp_path, divergence="pearson", gamma=1e6, alpha="auto", max_steps=1)
    with pytest.raises(InputError, match=r"^alpha=auto: no finite alpha balances"):
        trainer.train()


def test_a_number_given_later_stays_if_it_was_measured_before(bert_folder, tmp_path):
    trainer = make_trainer(bert_folder, tmp_path, learning_rate=0.1, **AUTO)
    trainer.train()
    alpha, gamma = trainer.loss.alpha, trainer.loss.gamma
    trainer.args.divergence, trainer.args.alpha, trainer.args.gamma = "pearson", alpha, gamma
    trainer.train()
    assert (trainer.loss.alpha, trainer.loss.gamma) == (alpha, gamma)
    assert trainer.loss.hyperparameters | {"divergence": "pearson", "gamma": gamma} == trainer.loss.hyperparameters


@pytest.mark.slow
def test_numbers_of_another_order_are_not_taken_from_a_checkpoint(bert_folder, tmp_path):
    settings = SAVING | AUTO | {"divergence": "tsallis"}
    make_trainer(bert_folder, tmp_path, tsallis_order=4.0, **settings).train()
    checkpoint = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    other = make_trainer(bert_folder, tmp_path, tsallis_order=0.5, **settings)
    with pytest.warns(UserWarning, match="tsallis_order 4.0 -> 0.5"):
        other.train(resume_from_checkpoint=str(checkpoint))
    assert other.loss.gamma >= 5 and saved_run(checkpoint)["gamma"] < 5


# ---- small batches


def joined_alpha(folder, output_dir, rows, monkeypatch, **options):
    """A trainer with batches of 8, and the sizes of the batches that were measured."""
    monkeypatch.setattr(calibration, "JOINED_ROWS", 64)
    texts = sentences(rows)
    dataset = Dataset.from_dict({"text": texts, "length": list(map(len, texts))})
    trainer = make_trainer(folder, output_dir, dataset=dataset, max_steps=1, **AUTO, **options)
    seen = recording(trainer)
    trainer.train()
    return trainer, seen


def test_small_batches_are_joined(bert_folder, tmp_path, monkeypatch):
    """The means are those over all pairs of 64 rows, also over those of different batches."""
    trainer, seen = joined_alpha(bert_folder, tmp_path, 150, monkeypatch)
    assert [len(x) for x, _ in seen] == [64, 64, 16]
    parts = [balances(x, y, trainer.loss.gamma, math.exp) for x, y in seen]
    assert trainer.loss.alpha == pytest.approx(sorted(positive / negative for positive, negative in parts)[1], rel=1e-4)


def test_batches_of_similar_lengths_are_not_joined(bert_folder, tmp_path, monkeypatch):
    """Their pairs are closer than those of different batches."""
    _, seen = joined_alpha(bert_folder, tmp_path, 96, monkeypatch, train_sampling_strategy="group_by_length")
    assert {len(x) for x, _ in seen} == {8}


def test_near_duplicates_in_one_batch_do_not_change_alpha(bert_folder, tmp_path, monkeypatch):
    """One pair of equal texts that are not known to be equal has a similarity of 1, which is more than all others."""
    texts = [" ".join(words) for words in zip(*[iter(sentences(256))] * 2, strict=True)]
    found = []
    for name, rows in (("without", texts), ("with", [*texts[:9], texts[8] + " .", *texts[10:]])):
        dataset = Dataset.from_dict({"text": rows})
        trainer = make_trainer(bert_folder, tmp_path / name, dataset=dataset, max_steps=1, alpha="auto", gamma=200.0)
        trainer.train()
        found.append((trainer.loss.alpha, logged(trainer, "alpha_relative_error")[0]))
    assert found[1][0] == pytest.approx(found[0][0], rel=2 * found[0][1])
