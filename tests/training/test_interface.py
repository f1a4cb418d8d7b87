"""Arguments of the trainer: bare encoders, texts, any evaluator, custom losses; and values that are rejected."""

import inspect

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from transformers import BertModel, Trainer, TrainingArguments

from fmicl_text import FMICLLoss, FMICLTrainer, FMICLTrainingArguments, InputError, build_text_encoder
from fmicl_text.hub.model_card import model_card
from fmicl_text.hub.run_record import run_record
from fmicl_text.losses import ContrastiveLoss
from fmicl_text.losses.objectives import PairObjective
from fmicl_text.losses.pairs import LossTerms
from fmicl_text.losses.similarity import unit_rows
from fmicl_text.text import TextContrastiveModel, TextViewCollator
from fmicl_text.training.trainer import NonFiniteError
from tests.support import same, sentences, weights


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
    before = trainer.run_evaluator()[f"eval_{evaluator.primary_metric}"]
    trainer.train()
    scores = [
        entry[f"eval_{evaluator.primary_metric}"]
        for entry in trainer.state.log_history
        if "eval_runtime" not in entry and f"eval_{evaluator.primary_metric}" in entry
    ]
    assert trainer.state.best_metric == max([before, *scores])
    assert trainer.state.best_global_step == [before, *scores].index(max([before, *scores]))


@pytest.mark.parametrize(
    "evaluator",
    [lambda e: "high", lambda e: {"score": "high"}, lambda e: None, lambda e: 1j, lambda e: {"score": 10**400}],
    ids=["text", "text in a dict", "None", "complex", "too large"],
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


class DistanceLoss(ContrastiveLoss):
    """The distance of the views: a loss that is not one of pairs, and has no `negatives`."""

    def __init__(self) -> None:
        super().__init__(gamma=1.0, negatives="same_view")

    def terms(self, x, y, hard_negatives=None, text_ids=None, queue=None):
        distance = (unit_rows(x) - unit_rows(y)).square().sum(1).mean()
        return LossTerms(distance, distance.detach(), torch.zeros(()))


def test_a_loss_that_overrides_terms_trains_is_recorded_and_resumes(bert_folder, tmp_path):
    args = arguments(tmp_path, objective=f"{__name__}:DistanceLoss", save_strategy="steps", save_steps=1, max_steps=2)
    trainer = FMICLTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(16))
    assert moved(trainer)
    assert run_record(trainer, {})["objective"] == "distance_loss"
    again = FMICLTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(16))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(weights(trainer), weights(again))


class NeedsArgument(ContrastiveLoss):
    def __init__(self, width):
        super().__init__(gamma=width, negatives="same_view")


class FailsWhenBuilt(ContrastiveLoss):
    def __init__(self):
        super().__init__(gamma={}["width"], negatives="same_view")


@pytest.mark.parametrize(
    ("name", "reason"), [("NeedsArgument", "TypeError: .*'width'"), ("FailsWhenBuilt", "KeyError")]
)
def test_an_objective_that_cannot_be_built_is_one_line(tmp_path, name, reason):
    with pytest.raises(ValueError, match=rf"^objective={__name__}:{name} cannot be built with {{}} \({reason}"):
        arguments(tmp_path, objective=f"{__name__}:{name}").build_loss()


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


@pytest.mark.parametrize(
    "keyword, instead",
    [
        ("eval_dataset", "evaluator="),
        ("compute_metrics", "evaluator="),
        ("preprocess_logits_for_metrics", "evaluator="),
        ("compute_loss_func", "loss=, or override compute_loss"),
        ("processing_class", "data_collator="),
        ("tokenizer", "data_collator="),
    ],
)
def test_what_would_not_be_used_is_named_with_what_to_do_instead(bert_folder, tmp_path, keyword, instead):
    with pytest.raises(InputError, match=f"^{keyword} is not used by FMICLTrainer: .*{instead}"):
        FMICLTrainer(build_text_encoder(bert_folder), arguments(tmp_path), **{keyword: lambda *a: {}})


def test_the_encoders_own_tokenizer_may_be_passed(bert_folder, tmp_path):
    encoder = build_text_encoder(bert_folder)
    assert moved(
        FMICLTrainer(encoder, arguments(tmp_path), train_dataset=sentences(16), processing_class=encoder.tokenizer)
    )


def test_arguments_are_in_the_order_of_transformers(bert_folder, tmp_path):
    positional = [name for name, one in inspect.signature(Trainer.__init__).parameters.items()]
    assert list(inspect.signature(FMICLTrainer.__init__).parameters)[: len(positional)] == positional
    encoder = build_text_encoder(bert_folder)
    collator = TextViewCollator(encoder.tokenizer, ["text"])
    rows = Dataset.from_dict({"text": sentences(16)})
    assert moved(FMICLTrainer(encoder, arguments(tmp_path), collator, rows, None, None, None, None, None, []))
    with pytest.raises(InputError, match=r"data_collator must be a function, got list: .*train_dataset="):
        FMICLTrainer(encoder, arguments(tmp_path), sentences(16))


@pytest.mark.parametrize("kind", [TrainingArguments, SentenceTransformerTrainingArguments])
def test_arguments_of_others_are_named(bert_folder, tmp_path, kind):
    words = f"args must be FMICLTrainingArguments, .*got {kind.__name__}$"
    with pytest.raises(InputError, match=words):
        FMICLTrainer(bert_folder, kind(str(tmp_path), use_cpu=True), train_dataset=sentences(16))


def test_models_that_cannot_be_trained_are_named(bert_folder, tmp_path):
    for model, words in [
        (BertModel.from_pretrained(bert_folder), r"got BertModel: .*build_text_encoder"),
        (None, "got NoneType: pass model or model_init"),
    ]:
        with pytest.raises(InputError, match=words):
            FMICLTrainer(model, arguments(tmp_path), train_dataset=sentences(16))
    with pytest.raises(InputError, match="model and model_init are mutually exclusive"):
        FMICLTrainer(bert_folder, arguments(tmp_path), model_init=lambda: bert_folder)
    with pytest.raises(InputError, match="model_init should have 0 or 1 argument"):
        FMICLTrainer(args=arguments(tmp_path), model_init=lambda a, b: bert_folder)
    with pytest.raises(InputError, match="train_dataset is required"):
        FMICLTrainer(bert_folder, arguments(tmp_path)).train()


@pytest.mark.slow
def test_a_model_from_model_init_trains_as_one_that_is_passed(bert_folder, tmp_path):
    runs = []
    for given in (
        {"model": bert_folder},
        {"model_init": lambda: bert_folder},
        {"model_init": lambda trial: bert_folder},
    ):
        trainer = FMICLTrainer(**given, args=arguments(tmp_path), train_dataset=sentences(16))
        trainer.train()
        runs.append(weights(trainer))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="optimizers cannot be used with model_init"):
        FMICLTrainer(model_init=lambda: bert_folder, args=arguments(tmp_path), optimizers=(optimizer, None))


def test_hyperparameters_that_a_given_loss_ignores_are_named(bert_folder, tmp_path):
    with pytest.raises(InputError, match=r"alpha=3\.0 has no effect because loss is passed"):
        FMICLTrainer(bert_folder, arguments(tmp_path, alpha=3.0), loss=FMICLLoss())


def test_hyperparameters_that_change_later_have_effect(bert_folder, tmp_path):
    trainer = FMICLTrainer(bert_folder, arguments(tmp_path, alpha=3.0), train_dataset=sentences(16))
    patched = trainer.loss
    trainer.train()
    assert trainer.loss is patched
    trainer.args.alpha = 5.0
    trainer.train()
    assert trainer.loss.alpha == 5.0


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda args: args.set_training(batch_size=1), "per_device_train_batch_size must be at least 2, got 1"),
        (lambda args: args.set_dataloader(train_batch_size=9), "dataloader_drop_last=False is not supported"),
        (lambda args: args.set_testing(), "do_predict=True is not supported"),
        (lambda args: args.set_push_to_hub("a/b", token="secret"), "hub_token is not accepted"),
        (lambda args: setattr(args, "alpha", -1.0), "alpha must be auto or a finite number > 0"),
        (lambda args: setattr(args, "label_smoothing_factor", 0.1), "label_smoothing_factor=0.1 is not supported"),
        (lambda args: setattr(args, "mini_batch_size", 9), "mini_batch_size must be from 1 to the batch size 8"),
        (lambda args: setattr(args, "bf16", True), "bf16=True was set later, without effect"),
        (lambda args: setattr(args, "early_stopping_patience", 2), "early_stopping_patience=2"),
    ],
)
def test_arguments_that_change_later_are_checked(bert_folder, tmp_path, change, words, later):
    args = arguments(tmp_path)
    if later:
        trainer = FMICLTrainer(bert_folder, args, train_dataset=sentences(16))
        change(args)
        with pytest.raises(InputError, match=words):
            trainer.train()
        return
    change(args)
    with pytest.raises(InputError, match=words):
        FMICLTrainer(bert_folder, args, train_dataset=sentences(16))


def test_a_batch_size_that_changes_later_has_effect(bert_folder, tmp_path):
    trainer = FMICLTrainer(bert_folder, arguments(tmp_path), train_dataset=sentences(16))
    trainer.args.per_device_train_batch_size = 16
    trainer.train()
    assert trainer.state.train_batch_size == 16 and trainer.state.epoch == 2
    trainer.args.per_device_train_batch_size = 17
    with pytest.raises(InputError, match="16 training examples are fewer than one batch of 17"):
        trainer.train()


def test_a_folder_that_is_a_file_is_named(bert_folder, tmp_path):
    trainer = FMICLTrainer(bert_folder, arguments(tmp_path / "out"), train_dataset=sentences(16))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="file could not be written: Not a directory"):
        trainer.save_model(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.slow
def test_what_a_trainer_chooses_is_not_given_to_another(bert_folder, tmp_path):
    args = arguments(tmp_path)
    pairs = list(zip(sentences(16), sentences(16, 1), strict=True))
    of_pairs = FMICLTrainer(bert_folder, args, train_dataset=pairs)
    assert FMICLTrainer(bert_folder, args, train_dataset=sentences(16)).loss.negatives == "same_view"
    FMICLTrainer(bert_folder, args, train_dataset=sentences(16), loss=FMICLLoss())
    of_pairs.train()
    assert of_pairs.loss.negatives == "cross_view"
    args.negatives = "both"
    assert FMICLTrainer(bert_folder, args, train_dataset=sentences(16)).loss.negatives == "both"
    for name in ("a", "b"):
        scores = EmbeddingSimilarityEvaluator(sentences(8), sentences(8, 1), [i / 8 for i in range(8)], name=name)
        FMICLTrainer(bert_folder, args, train_dataset=sentences(16), evaluator=scores).evaluate()
        assert args.metric_for_best_model == f"{name}_spearman_cosine" and args.greater_is_better


def test_predictions_and_cards_of_the_base_class_are_named(bert_folder, tmp_path):
    trainer = FMICLTrainer(bert_folder, arguments(tmp_path), train_dataset=sentences(16))
    with pytest.raises(InputError, match=r"predict is not supported: .*encoder.encode"):
        trainer.predict(sentences(4))
    with pytest.raises(InputError, match="create_model_card is not supported"):
        trainer.create_model_card()
    with pytest.raises(InputError, match="not eval_dataset="):
        trainer.evaluate(sentences(4))


def test_a_search_without_optuna_is_named(bert_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fmicl_text.training.search.is_optuna_available", lambda: False)
    trainer = FMICLTrainer(bert_folder, arguments(tmp_path), train_dataset=sentences(16), evaluator=lambda e: 0.5)
    with pytest.raises(InputError, match="hyperparameter_search requires optuna: pip install optuna"):
        trainer.hyperparameter_search()


# ---- methods of a subclass


class UniformityTrainer(FMICLTrainer):
    """A loss of its own, in the documented hook."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("text_ids")
        embeddings = self.embed(model, inputs)
        x, y = torch.nn.functional.normalize(embeddings, dim=-1).unbind(1)
        loss = (x - y).square().sum(1).mean() + torch.pdist(x).square().mul(-2).exp().mean().log()
        return (loss, {"embeddings": embeddings}) if return_outputs else loss


class HalfTrainer(FMICLTrainer):
    """The loss of the base class, changed."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (loss / 2, outputs) if return_outputs else loss / 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_compute_loss_of_a_subclass_is_the_loss(bert_folder, tmp_path, accumulation):
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, gamma=2.0, alpha=4.0)
    own = UniformityTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(32))
    assert moved(own)
    logs = [entry for entry in own.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(-8 < entry["loss"] < 4 and "loss_positive" not in entry for entry in logs)
    losses = []
    for kind in (FMICLTrainer, HalfTrainer):
        trainer = kind(build_text_encoder(bert_folder), args, train_dataset=sentences(32))
        trainer.train()
        losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), return_outputs=True)
    assert loss.requires_grad and outputs["embeddings"].shape == (8, 2, 32)


def test_a_loss_of_a_subclass_that_is_not_finite_stops_training(bert_folder, tmp_path):
    class Broken(UniformityTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * float("nan")

    with pytest.raises(NonFiniteError, match=r"loss is nan .* at step 1"):
        Broken(build_text_encoder(bert_folder), arguments(tmp_path), train_dataset=sentences(16)).train()


def test_compute_loss_of_a_subclass_needs_the_whole_batch(bert_folder, tmp_path):
    args = arguments(tmp_path, mini_batch_size=4)
    with pytest.raises(InputError, match="mini_batch_size=4 is not supported with a compute_loss of your own"):
        HalfTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(16))


class HookTrainer(FMICLTrainer):
    """Overrides that users write, which record that they were called."""

    def __init__(self, *args, **kwargs):
        self.called = set()
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.called.add("training_step")
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()

    def log(self, logs, *args, **kwargs):
        self.called.add("log")
        super().log(logs | {"own": 1.0}, *args, **kwargs)

    def create_optimizer(self, *args):
        self.called.add("create_optimizer")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.called.add("create_scheduler")
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        return self.lr_scheduler

    def get_train_dataloader(self):
        self.called.add("get_train_dataloader")
        return super().get_train_dataloader()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.called.add("evaluate")
        self.log(metrics := {"eval_own": 0.5})
        return metrics

    def prediction_step(self, *args):  # may be called by evaluate
        raise AssertionError

    def floating_point_ops(self, inputs):
        self.called.add("floating_point_ops")
        return 7


def test_hooks_of_a_subclass_are_called(bert_folder, tmp_path):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    trainer = HookTrainer(build_text_encoder(bert_folder), args, train_dataset=sentences(16))
    assert moved(trainer)
    hooks = {name for name, value in vars(HookTrainer).items() if inspect.isfunction(value)}
    assert trainer.called == hooks - {"__init__", "prediction_step"}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logs] == [0.5, 0.5] and all(entry["own"] == 1 for entry in logs)
    assert trainer.state.total_flos == 14


@pytest.mark.parametrize(
    "hook, instead",
    [
        ("prediction_step", "override evaluate"),
        ("evaluation_loop", "override evaluate"),
        ("get_eval_dataloader", "override evaluate"),
        ("create_optimizer_and_scheduler", "create_optimizer and create_scheduler"),
        ("create_model_card", "push_to_hub"),
    ],
)
def test_hooks_that_are_not_called_are_named(bert_folder, tmp_path, hook, instead):
    kind = type("MyTrainer", (FMICLTrainer,), {hook: lambda self, *args: None})
    with pytest.raises(InputError, match=f"MyTrainer.{hook} would not be called: .*{instead}"):
        kind(bert_folder, arguments(tmp_path), train_dataset=sentences(16))


def test_a_dataloader_of_a_subclass_needs_no_dataset(bert_folder, tmp_path):
    encoder = build_text_encoder(bert_folder)
    collator = TextViewCollator(encoder.tokenizer, ["text"])
    rows = [{"text": text} for text in sentences(16)]

    class Loading(FMICLTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=collator)

    assert moved(Loading(encoder, arguments(tmp_path), collator))


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_a_process_of_several_that_trains_alone_is_refused(bert_folder, tmp_path, monkeypatch, variable):
    args = arguments(tmp_path)
    monkeypatch.setenv(variable, "2")  # as torchrun and mpirun do
    with pytest.raises(InputError, match=r"2 processes were requested, but the world size is 1: .*--multi_gpu"):
        FMICLTrainer(bert_folder, args, train_dataset=sentences(16))


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
