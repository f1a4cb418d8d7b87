"""Metrics logged with the loss, compared with values computed by hand, and in the files of TensorBoard."""

import time

import pytest
import torch
from torch.nn.functional import normalize

from fmicl_text.losses.contrastive import FMICLLoss
from fmicl_text.training.metrics import TrainingMetrics
from tests.support import make_trainer, trained


def test_means_rank_and_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log = TrainingMetrics()
    now[0] = 150.0  # before the first step: not counted
    loss = FMICLLoss("js", gamma=1.0, alpha=4.0)
    batches = [torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    terms = []
    for x, y in batches:
        log.count_inputs("tokens", torch.tensor(60))
        now[0] += 1.0
        terms.append(loss.terms(x, y))
        log.add(terms[-1], x, y)
    with log.pause():
        now[0] += 60.0
    found = log.take(loss)
    assert found["mutual_information"] == loss.mutual_information(*batches[1]).item()
    assert found["tokens_per_second"] == 2 * 60 / 2.0
    assert found["loss_positive"] == pytest.approx(sum(term.positive.item() for term in terms) / 2)
    rows = normalize(batches[1][0].double(), dim=1)
    shares = torch.linalg.eigvalsh(rows.T @ rows / 6)
    assert found["effective_rank"] == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-6)
    assert log.take(loss) == {}
    log.count_inputs("images", torch.tensor(6))
    now[0] += 2.0
    assert log.take(loss) == {"images_per_second": 3.0}


def test_tensorboard_shows_all_of_it(bert_folder, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(make_trainer(bert_folder, tmp_path, evaluate=True, report_to="tensorboard"))
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    wanted = {"loss", "loss_positive", "loss_negative", "alignment", "uniformity", "effective_rank", "learning_rate",
              "mutual_information", "tokens_per_second", "grad_norm"}  # fmt: skip
    assert {f"train/{name}" for name in wanted} | {"eval/sts_spearman"} <= set(events.Tags()["scalars"])
    ranks = events.Scalars("train/effective_rank")
    assert [event.step for event in ranks] == [1, 2, 3, 4] and all(1 <= event.value <= 32 for event in ranks)
    assert all(event.value > 0 for event in events.Scalars("train/tokens_per_second"))
