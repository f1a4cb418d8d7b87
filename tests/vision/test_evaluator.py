"""Scores of image encoders during training and the table of probes: values, one pass, several processes."""

import math
import os

import pytest
import torch

from fmicl_text import FMICLTrainer, FMICLTrainingArguments
from fmicl_text.errors import InputError
from fmicl_text.evaluation.probes import few_label_accuracies, knn_accuracies, logistic_accuracy
from fmicl_text.vision.data import TrainingRows, collate_images
from fmicl_text.vision.encoder import new_image_encoder
from fmicl_text.vision.encoding import encode_images
from fmicl_text.vision.evaluator import ImageEvaluator, encode_raw_pixels
from fmicl_text.vision.model import ImageContrastiveModel
from fmicl_text.vision.preprocessing import new_preprocessing
from fmicl_text.vision.views import ImageViews
from tests.support import IMAGE_FAMILIES, LabeledPictures, run_ranks

MEAN, STD = (0.45, 0.5, 0.55), (0.2, 0.25, 0.3)
NO_CLASS = [-1] * 70


class Patches(torch.nn.Module):
    """Features [B, 12]: means of 2 x 2 patches. Counts the images it has encoded."""

    def __init__(self):
        super().__init__()
        self.weight, self.count = torch.nn.Parameter(torch.ones(())), 0

    def forward(self, pixel_values):
        self.count += len(pixel_values)
        return self.weight * torch.nn.functional.adaptive_avg_pool2d(pixel_values, 2).flatten(1)


def make(train, test, **settings):
    views = ImageViews("gray", 8, MEAN, STD)
    return ImageEvaluator(train, test, new_preprocessing(8, MEAN, STD), views, progress=False, **settings)


def features(images, encoder=None):
    return encode_images(encoder or Patches(), images, new_preprocessing(8, MEAN, STD), progress=False)


@pytest.mark.parametrize("labels", [None, NO_CLASS], ids=["classes", "no classes"])
def test_the_score_is_that_of_its_observations(labels):
    """One value per image; a subset of the test images has the score of its own."""
    test = LabeledPictures(70, 1, labels)
    evaluator = make(LabeledPictures(90), test)
    score = evaluator(Patches())[evaluator.primary_metric]
    assert evaluator.observations.shape == (70,) and 0 <= evaluator.observations.min() < evaluator.observations.max()
    assert evaluator.metric_of(evaluator.observations) == score
    if labels is None:
        data = features(LabeledPictures(90)), LabeledPictures(90).labels, features(test)[:20], test.labels[:20]
        assert evaluator.metric_of(evaluator.observations[:20]) == knn_accuracies(*data, [200])[200, 0.1]


def test_the_score_is_the_accuracy_of_neighbors_with_a_class():
    """Images without a class take no part: neither as neighbors nor as test images."""
    labels = [i % 2 if i % 3 else -1 for i in range(90)]
    train, test = (
        LabeledPictures(90, labels=labels),
        LabeledPictures(70, 1, [i % 2 if i % 5 else -1 for i in range(70)]),
    )
    evaluator, encoder = make(train, test), Patches()
    known, asked = train.labels >= 0, test.labels >= 0
    data = (features(train)[known], train.labels[known], features(test)[asked], test.labels[asked])
    expected = knn_accuracies(*data, [200])[200, 0.1]
    assert evaluator(encoder) == {"knn_accuracy": expected} and 60 < expected < 100
    assert encoder.count == known.sum() + asked.sum() and evaluator.table == []
    assert evaluator.primary_metric == "knn_accuracy" and evaluator.describe() == {
        "evaluation_data": test.fingerprint()
    }


@pytest.mark.slow
def test_a_row_of_the_table_comes_from_the_pass_of_the_score():
    train, test = LabeledPictures(90), LabeledPictures(70, 1)
    evaluator, encoder = make(train, test), Patches()
    with evaluator.table_row("before training"):
        scores = evaluator(encoder)
    assert encoder.count == 90 + 70 and evaluator(encoder) == scores
    with torch.no_grad():
        encoder.weight.copy_(-1)
    with evaluator.table_row("after training"):
        evaluator(encoder)
    raw, before = evaluator.table[:2]
    data = (features(train), train.labels, features(test), test.labels)
    few = few_label_accuracies(*data)
    assert before["k-NN, k = 200"] == scores["knn_accuracy"] == knn_accuracies(*data, [200])[200, 0.1]
    assert before["k-NN, k = 20"] == knn_accuracies(*data, [20])[20, 0.1]
    assert before["logistic regression"] == logistic_accuracy(*data)
    assert before["5 labels per class"].startswith(f"{sum(few) / 5:.2f} ± ")
    assert list(raw) == list(before) and [row["features"] for row in evaluator.table[1:]] == [
        "before training",
        "after training",
    ]
    pixels = [
        torch.cat([x for _, x in encode_raw_pixels(part, torch.arange(len(part)), evaluator.preprocessing)])
        for part in (train, test)
    ]
    assert raw["features"] == "raw pixels" and pixels[0].shape == (90, 3 * 8 * 8)
    assert raw["logistic regression"] == logistic_accuracy(pixels[0], train.labels, pixels[1], test.labels)


@pytest.mark.parametrize("most, times", [(2**30, 1), (1000, 3)])
def test_small_images_are_preprocessed_once(monkeypatch, most, times):
    """Else they would be at each of hundreds of evaluations."""
    monkeypatch.setattr("fmicl_text.vision.evaluator.MOST_KEPT", most)
    train, test, seen = LabeledPictures(90), LabeledPictures(70, 1), []
    train.pictures, original = lambda rows, draft=None: seen.extend(rows) or original(rows, draft), train.pictures
    evaluator, encoder = make(train, test), Patches()
    scores = evaluator(encoder)
    assert evaluator(encoder) == evaluator(encoder) == scores and len(seen) == times * 90


@pytest.mark.slow
def test_scores_of_validation_images_and_a_table_of_test_images():
    train, test, validation = LabeledPictures(90), LabeledPictures(70, 1), LabeledPictures(40, 2)
    evaluator, encoder = make(train, test, validation=validation), Patches()
    with evaluator.table_row("before training"):
        scores = evaluator(encoder)
    assert encoder.count == 90 + 70 + 40
    assert (
        scores == make(train, validation)(encoder)
        and evaluator.describe()["evaluation_data"] == validation.fingerprint()
    )
    assert evaluator.table[1]["k-NN, k = 200"] == make(train, test)(encoder)["knn_accuracy"]
    only = make(train, None, validation=validation)
    with only.table_row("before training"):
        assert only(encoder) == scores
    assert only.table == []


def test_probes_that_are_switched_off(monkeypatch):
    def forbidden(*args):
        raise AssertionError("a probe was computed")

    monkeypatch.setattr("fmicl_text.vision.evaluator.describe_probes", forbidden)
    monkeypatch.setattr("fmicl_text.vision.evaluator.encode_raw_pixels", forbidden)
    train, test = LabeledPictures(90), LabeledPictures(70, 1)
    evaluator = make(train, test, probes=False)
    with evaluator.table_row("before training"):
        assert evaluator(Patches()) == make(train, test)(Patches())
    assert evaluator.table == []


def test_images_without_classes_are_scored_by_their_views():
    train, test = LabeledPictures(90, labels=[-1] * 90), LabeledPictures(70, 1, NO_CLASS)
    evaluator, encoder = make(train, test), Patches()
    with evaluator.table_row("before training"):
        scores = evaluator(encoder)
    assert list(scores) == ["view_retrieval", "alignment", "uniformity", "effective_rank"]
    assert evaluator.primary_metric == "view_retrieval" and evaluator(encoder) == scores and encoder.count == 4 * 70
    assert 100 / 70 < scores["view_retrieval"] <= 100 and 1 < scores["effective_rank"] <= 12
    raw, before = evaluator.table
    assert before == {
        "features": "before training",
        **{name.replace("_", " "): value for name, value in scores.items()},
    }
    assert raw["features"] == "raw pixels" and raw["effective rank"] > scores["effective_rank"]
    collapsed = evaluator(lambda_module(lambda x: torch.ones(len(x), 4)))
    assert collapsed == {
        "view_retrieval": pytest.approx(100 / 70),
        "alignment": 0,
        "uniformity": 0,
        "effective_rank": pytest.approx(1),
    }
    lost = evaluator(lambda_module(lambda x: torch.full((len(x), 4), math.nan)))
    assert lost["view_retrieval"] == 0 and math.isnan(lost["effective_rank"])


def lambda_module(function):
    module = torch.nn.Module()
    module.forward = function
    return module


def test_at_most_some_images_from_all_are_viewed(monkeypatch):
    monkeypatch.setattr("fmicl_text.vision.evaluator.MOST_VIEWED", 10)
    train, test, seen = LabeledPictures(90, labels=[-1] * 90), LabeledPictures(70, 1, NO_CLASS), []
    test.for_views, original = lambda rows, *args: seen.extend(rows) or original(rows, *args), test.for_views
    make(train, test)(Patches())
    assert len(seen) == 10 and seen[0] == 0 and seen[-1] == 69 and len(set(seen)) == 10


def test_one_class_only_is_no_class():
    evaluator = make(LabeledPictures(90, labels=[0] * 90), LabeledPictures(70, 1, [0] * 70))
    assert evaluator.primary_metric == "view_retrieval"


def test_what_cannot_be_evaluated():
    train = LabeledPictures(90)
    with pytest.raises(InputError, match="needs held-out images"):
        make(train, None)
    with pytest.raises(InputError, match="noise: no training image has a class of the 3 held-out images"):
        make(train, LabeledPictures(3, labels=[4, 5, 5]))
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        make(train, LabeledPictures(70, 1), batch_size=0)
    with pytest.raises(InputError, match="at least 2 held-out images"):
        make(LabeledPictures(90, labels=[-1] * 90), LabeledPictures(1, labels=[-1]))


def test_classes_without_training_images_count_as_errors(caplog):
    train, test = LabeledPictures(90, noise=0), LabeledPictures(40, 1, [0, 1, 0, 7] * 10, noise=0)
    assert make(train, test)(Patches()) == {"knn_accuracy": 75}
    assert "10 of 40 held-out images are of classes without training images" in caplog.text


@pytest.mark.parametrize("labels, metric", [([0, 1] * 20, "knn_accuracy"), ([-1] * 40, "view_retrieval")])
def test_the_trainer_selects_checkpoints_by_the_score_that_there_is(tmp_path, labels, metric):
    config = IMAGE_FAMILIES["resnet, small stem"][0]
    model = ImageContrastiveModel(new_image_encoder(type(config).from_dict(config.to_dict())), 16, head_dim=8)
    evaluator = make(LabeledPictures(40, labels=labels), LabeledPictures(40, 1, labels))
    args = FMICLTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, metric_for_best_model=None)
    rows = TrainingRows(LabeledPictures(64), 8, None, seed=0)
    trainer = FMICLTrainer(
        model, args, train_dataset=rows, data_collator=collate_images, evaluator=evaluator, views=evaluator.views
    )
    with evaluator.table_row("before training"):
        scores = trainer.run_evaluator()
    assert next(iter(scores)) == f"eval_{metric}" and args.metric_for_best_model == metric and args.greater_is_better
    assert [row["features"] for row in evaluator.table] == ["raw pixels", "before training"]


def evaluate_share(rank, labels):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.manual_seed(0)
    train, test = LabeledPictures(len(labels), labels=labels), LabeledPictures(70, 1, labels[:70])
    evaluator, encoder = make(train, test, validation=LabeledPictures(5, 2, labels[:5])), Patches()
    with evaluator.table_row("before training"):
        scores = evaluator(encoder)
    return scores, evaluator.table, encoder.count


@pytest.mark.slow
@pytest.mark.parametrize("labels", [[i % 2 for i in range(121)], [-1] * 121], ids=["classes", "no classes"])
@pytest.mark.parametrize("most", [50_000, 50])
def test_two_processes_share_the_images_and_score_as_one(monkeypatch, labels, most):
    monkeypatch.setattr("fmicl_text.vision.evaluator.MOST_FITTED", most)
    (alone,) = run_ranks(1, evaluate_share, labels)
    first, second = run_ranks(2, evaluate_share, labels)
    assert first[:2] == second[:2] == alone[:2]
    assert first[2] + second[2] == alone[2] and first[2] < 0.7 * alone[2] if labels[0] == 0 else True
