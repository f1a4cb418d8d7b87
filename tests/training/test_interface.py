"""Arguments of the trainer: bare encoders, texts, any evaluator, custom losses; and values that are rejected."""

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from fmicl_text import FMICLLoss, FMICLTrainer, FMICLTrainingArguments, InputError, build_text_encoder
from fmicl_text.hub.model_card import model_card
from fmicl_text.hub.run_record import run_record
from fmicl_text.losses import ContrastiveLoss
from fmicl_text.losses.objectives import PairObjective
from fmicl_text.text import TextContrastiveModel, TextViewCollator
from tests.support import sentences


def arguments(output_dir, **settings):
    defaults = {"per_device_train_batch_size": 8, "max_steps": 2, "use_cpu": True, "disable_tqdm": True}
    return FMICLTrainingArguments(str(output_dir), **defaults | {"save_strategy": "no", "logging_steps": 1} | settings)


def moved(trainer):
    """Train; whether the weights of the encoder changed."""
    before = trainer.model.encoder[0].model.embeddings.word_embeddings.weight.detach().clone()
    trainer.train()
    return not torch.equal(before, trainer.model.encoder[0].model.embeddings.word_embeddings.weight)


def test_a_bare_encoder_and_a_list_of_texts(bert_folder, tmp_path):
    encoder = build_text_encoder(bert_folder)
    trainer = FMICLTrainer(encoder, arguments(tmp_path, divergence="js"), train_dataset=sentences(16))
    assert trainer.model.encoder is encoder and trainer.loss.divergence.name == "js"
    assert moved(trainer)


def test_the_defaults_train_and_save_checkpoints(bert_folder, tmp_path):
    args = FMICLTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, per_device_train_batch_size=8)
    assert (args.eval_strategy, args.load_best_model_at_end) == ("no", False)
    assert moved(FMICLTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(16)))


@pytest.mark.parametrize("columns", [("anchor", "positive"), ("a", "b", "c")])
def test_columns_of_any_name_are_pairs_and_triplets(bert_folder, tmp_path, columns):
    rows = Dataset.from_dict({column: sentences(16, seed) for seed, column in enumerate(columns)})
    trainer = FMICLTrainer(build_text_encoder(bert_folder), arguments(tmp_path), train_dataset=rows)
    assert trainer.data_collator.settings["columns"] == list(columns)
    seen = []
    trainer.loss.terms = lambda *a, terms=trainer.loss.terms: seen.append(a) or terms(*a)
    assert moved(trainer)
    x, y, hard_negatives = seen[0][:3]
    assert not torch.equal(x, y) and (hard_negatives is None) == (len(columns) == 2)


@pytest.mark.parametrize("given", [None, "same_view", "both"])
@pytest.mark.parametrize("objective", ["fmicl", "align_uniform", "infonce"])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_negatives_of_pairs_are_those_of_the_other_view(bert_folder, tmp_path, columns, objective, given):
    """f-MICL's default is same_view for single texts and cross_view for pairs; a choice is kept, and recorded."""
    rows = [tuple(sentences(columns, i)) for i in range(16)]
    args = arguments(tmp_path, objective=objective, negatives=given)
    trainer = FMICLTrainer(build_text_encoder(bert_folder), args, train_dataset=rows)
    default = {"fmicl": "cross_view" if columns > 1 else "same_view", "infonce": "cross_view"}.get(
        objective, "same_view"
    )
    assert trainer.loss.negatives == trainer.loss.hyperparameters["negatives"] == (given or default)
    assert args.build_loss().negatives == trainer.loss.negatives


def test_a_name_is_opened(bert_folder, tmp_path):
    trainer = FMICLTrainer(bert_folder, arguments(tmp_path), train_dataset=[tuple(sentences(2, i)) for i in range(16)])
    assert isinstance(trainer.model.encoder, SentenceTransformer) and moved(trainer)


def test_texts_are_truncated_to_the_encoders_length(bert_folder, tmp_path):
    encoder = build_text_encoder(bert_folder)
    encoder.max_seq_length = 5
    trainer = FMICLTrainer(encoder, arguments(tmp_path), train_dataset=sentences(16))
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[-1] == 5


def similarity_evaluator():
    scores = [i / 11 for i in range(12)]
    return EmbeddingSimilarityEvaluator(sentences(12, 1), sentences(12, 2), scores, name="dev", show_progress_bar=False)


@pytest.mark.parametrize(
    "evaluator, metric",
    [
        (lambda encoder: {"size": encoder.get_embedding_dimension()}, "eval_size"),
        (lambda encoder: {"a metric of an unknown name": torch.tensor(2.0).item()}, "eval_a metric of an unknown name"),
        (lambda encoder: 0.5, "eval_score"),
        (similarity_evaluator(), "eval_dev_spearman_cosine"),
    ],
    ids=["function", "unknown name", "number", "sentence-transformers"],
)
def test_any_evaluator(bert_folder, tmp_path, evaluator, metric):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer = FMICLTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(16), evaluator=evaluator)
    trainer.train()
    logged = [entry["step"] for entry in trainer.state.log_history if metric in entry]
    assert logged == [1, 2] and metric in trainer.evaluate()
    assert f"| {metric.removeprefix('eval_')}" in model_card(run_record(trainer, trainer.run_evaluator()), "name")


def test_the_best_checkpoint_by_an_evaluators_primary_metric(bert_folder, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(tmp_path, **settings, load_best_model_at_end=True)
    evaluator = similarity_evaluator()
    trainer = FMICLTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(16), evaluator=evaluator)
    trainer.train()
    scores = [
        entry[f"eval_{evaluator.primary_metric}"]
        for entry in trainer.state.log_history
        if "eval_runtime" not in entry and f"eval_{evaluator.primary_metric}" in entry
    ]
    assert trainer.state.best_metric == max(scores)
    assert trainer.state.best_global_step == 1 + scores.index(max(scores))


@pytest.mark.parametrize(
    "evaluator",
    [lambda e: "high", lambda e: {"score": "high"}, lambda e: None],
    ids=["text", "text in a dict", "None"],
)
def test_what_an_evaluator_returns_is_checked(bert_folder, tmp_path, evaluator):
    trainer = FMICLTrainer(
        build_text_encoder(bert_folder), arguments(tmp_path), train_dataset=sentences(16), evaluator=evaluator
    )
    with pytest.raises(InputError, match="evaluator must return"):
        trainer.evaluate()


def test_an_evaluator_does_not_change_the_training_that_follows(bert_folder, tmp_path):
    runs = []
    for evaluator in (lambda e: {"a": 0.0}, lambda e: {"a": torch.rand(()).item()}):
        args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, num_train_epochs=2, max_steps=4)
        trainer = FMICLTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(16), evaluator=evaluator)
        torch.manual_seed(0)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[0] == runs[1]


class MarginLoss(ContrastiveLoss):
    """Alignment and a squared margin on similarities, as a user would write it.

    Args:
        margin: Lowest r that is penalized, < 0.
    """

    def __init__(self, margin: float = -1.0, global_batch: str = "none") -> None:
        super().__init__(gamma=1.0, negatives="same_view", global_batch=global_batch)
        self.margin = margin

    @property
    def objective(self):
        return PairObjective(lambda r: r, lambda r: (r - self.margin).clamp_min(0).square(), lambda mean: mean)


def test_a_loss_of_the_users_own_trains_and_is_recorded(bert_folder, tmp_path):
    trainer = FMICLTrainer(
        build_text_encoder(bert_folder), arguments(tmp_path), train_dataset=sentences(16), loss=MarginLoss(-2.0)
    )
    assert moved(trainer)
    record = run_record(trainer, {})
    assert record["hyperparameters"]["margin"] == -2.0
    assert "squared margin" in model_card(record, "name")


def test_an_objective_is_named_by_its_place(bert_folder, tmp_path):
    objective = f"{__name__}:MarginLoss"
    args = arguments(tmp_path, objective=objective)
    assert isinstance(args.build_loss(), MarginLoss) and "/" not in args.objective_name
    with pytest.raises(ValueError, match=r"alpha=3.*MarginLoss"):
        arguments(tmp_path, objective=objective, alpha=3.0)
    with pytest.raises(ValueError, match=r"objective=nowhere:Loss"):
        arguments(tmp_path, objective="nowhere:Loss")


def test_a_divergence_is_named_by_its_place(tmp_path):
    args = arguments(tmp_path, divergence=f"{__name__}:power")
    assert args.build_loss().divergence.name == "power"


def power(u):
    return u**1.5


@pytest.mark.parametrize("keyword", ["compute_metrics", "compute_loss_func", "eval_dataset", "model_init"])
def test_what_would_not_be_used_is_not_accepted(bert_folder, tmp_path, keyword):
    with pytest.raises(TypeError, match=keyword):
        FMICLTrainer(build_text_encoder(bert_folder), arguments(tmp_path), **{keyword: lambda *a: {}})


def test_arguments_after_args_are_named(bert_folder, tmp_path):
    with pytest.raises(TypeError, match="positional"):
        FMICLTrainer(build_text_encoder(bert_folder), arguments(tmp_path), sentences(16))


def test_another_kind_of_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"ContrastiveModel.*Linear"):
        FMICLTrainer(torch.nn.Linear(2, 2), arguments(tmp_path))


def test_a_given_collator_is_used_as_it_is(bert_folder, tmp_path):
    encoder = build_text_encoder(bert_folder)
    collator = TextViewCollator(encoder.tokenizer, ["text"])
    rows = Dataset.from_dict({"text": sentences(16), "other": sentences(16)})
    model = TextContrastiveModel(encoder, "simcse")
    assert moved(FMICLTrainer(model, arguments(tmp_path), train_dataset=rows, data_collator=collator))


def test_alpha_of_the_loss_is_a_plain_attribute():
    loss = FMICLLoss("kl", gamma=2.0, alpha=3.0)
    assert (loss.gamma, loss.alpha, loss.negatives, loss.similarity.name) == (2.0, 3.0, "same_view", "gaussian")
