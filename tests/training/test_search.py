"""Hyperparameter search: every trial has its own loss, weights and folder, and nothing of it remains in the trainer."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fmicl_text import FMICLLoss, FMICLTrainer, FMICLTrainingArguments, InputError, build_text_encoder
from fmicl_text.evaluation.evaluator import STSEvaluator
from fmicl_text.training import search
from fmicl_text.training.checkpoint import latest_valid_checkpoint
from tests.support import make_trainer, same, sentences, sts_pairs, weights

optuna = pytest.importorskip("optuna", reason="hyperparameter_search needs optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)
FEW = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "gamma": 2.0, "alpha": 4.0}
STEPS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}


def make(folder, output_dir, evaluator=None, given=None, **settings):
    """A trainer of the tiny model with an evaluator, checkpoints every 2 of 4 steps."""
    defaults = FEW | STEPS | {"metric_for_best_model": "sts_spearman", "use_cpu": True, "disable_tqdm": True}
    args = FMICLTrainingArguments(str(output_dir), **(defaults | settings))
    return FMICLTrainer(
        **({"model": build_text_encoder(folder, pooling="mean")} if given is None else given),
        args=args,
        train_dataset=sentences(64),
        evaluator=evaluator or STSEvaluator(sts_pairs(), progress=False),
    )


def alphas(*values):
    """A space of alphas, searched in this order."""
    return {
        "hp_space": lambda trial: {"alpha": trial.suggest_categorical("alpha", values)},
        "n_trials": len(values),
        "sampler": optuna.samplers.GridSampler({"alpha": list(values)}, seed=0),
    }


def trial_states(folder):
    """Name of each trial's folder: (its hyperparameters, its last measured value)."""
    found = {}
    for run in sorted(folder.glob("run-*")):
        state = json.loads((run / "trainer_state.json").read_text())
        found[run.name] = state["trial_params"], state["log_history"][-1]["eval_sts_spearman"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("with_model_init", [False, True])
def test_a_search_finds_a_better_alpha_and_leaves_a_folder_per_trial(bert_folder, tmp_path, with_model_init):
    given = {"model_init": lambda: build_text_encoder(bert_folder, pooling="mean")} if with_model_init else None
    trainer = make(bert_folder, tmp_path, given=given, learning_rate=5e-3)
    before = weights(trainer)
    values = (1e-3, 4.0, 4096.0)
    best = trainer.hyperparameter_search(**alphas(*values))
    states = trial_states(tmp_path)
    assert list(states) == ["run-0", "run-1", "run-2"]
    assert {params["alpha"] for params, _ in states.values()} == set(values)
    scores = [score for _, score in states.values()]
    assert len(set(scores)) == 3 and best.objective == max(scores) > min(scores)
    assert states[f"run-{best.run_id}"] == (best.hyperparameters, best.objective)
    for name, (params, score) in states.items():  # each is the run that a trainer of its own makes
        alone = make(bert_folder, tmp_path / f"alone-{name}", learning_rate=5e-3, **params)
        alone.train()
        saved, expected = (
            load_file(f / "checkpoint-4/model.safetensors") for f in (tmp_path / name, alone.checkpointer.output_dir)
        )
        assert all(torch.equal(saved[key], expected[key]) for key in expected)
        assert alone.run_evaluator()["eval_sts_spearman"] == score
    assert same(weights(trainer), before) and trainer.args.alpha == trainer.loss.alpha == 4.0
    assert trainer.args.output_dir == str(tmp_path)


@pytest.mark.slow
def test_the_best_values_train_after_the_search(bert_folder, tmp_path):
    trainer = make(bert_folder, tmp_path)
    best = trainer.hyperparameter_search(**alphas(0.5, 64.0))
    for name, value in best.hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert trainer.loss.alpha == best.hyperparameters["alpha"] and trainer.state.trial_params is None
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    trial = load_file(tmp_path / f"run-{best.run_id}" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(saved[key], trial[key]) for key in trial)


@pytest.mark.slow
def test_all_hyperparameters_of_a_trial_have_effect(bert_folder, tmp_path):
    """Objective, divergence, negatives, temperature, optimizer and warmup (a fraction that a cast would turn to 0).
    What only the first trial sets is as before in the second."""
    seen = []
    spaces = [
        {"divergence": "js", "gamma": 3.0, "negatives": "both", "warmup_steps": 0.5, "seed": 7, "optim": "sgd"},
        {"objective": "infonce", "temperature": 0.1, "gamma": None, "alpha": None, "per_device_train_batch_size": 16},
    ]

    class Recording(FMICLTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            batch = next(iter(self.get_train_dataloader()))["input_ids"].shape[0]
            seen.append((self.loss.objective_name, self.loss.hyperparameters, type(self.optimizer.optimizer).__name__))
            seen[-1] += (self.args.get_warmup_steps(num_training_steps), self.args.seed, batch)
            return super().create_scheduler(num_training_steps, optimizer)

    plain = make(bert_folder, tmp_path)
    args, evaluator = plain.args, plain.evaluator
    trainer = Recording(bert_folder, args, train_dataset=sentences(64), evaluator=evaluator)
    trainer.hyperparameter_search(lambda trial: spaces[trial.number], n_trials=2)
    (name, first, optimizer, warmup, seed, batch), second = seen
    assert (name, optimizer, warmup, seed, batch) == ("fmicl-js", "SGD", 2, 7, 8)
    assert (first["gamma"], first["negatives"]) == (3.0, "both")
    assert second[0] == "infonce" and second[1]["temperature"] == 0.1 and second[1]["negatives"] == "cross_view"
    assert second[2:] == ("AdamW", 0, 42, 16)
    assert (args.objective, args.divergence, args.warmup_steps, args.seed) == ("fmicl", None, 0, 42)
    assert args.optim == "adamw_torch_fused" and trainer.loss.objective_name == "fmicl-kl"


@pytest.mark.slow
def test_the_default_space_is_around_the_present_values(bert_folder, tmp_path):
    fixed = optuna.trial.FixedTrial({"learning_rate": 5e-4, "gamma": 15.0, "alpha": 0.5})
    assert search.default_space(make(bert_folder, tmp_path))(fixed) == fixed.params
    infonce = make(bert_folder, tmp_path, objective="infonce", gamma=None, alpha=None)
    fixed = optuna.trial.FixedTrial({"learning_rate": 5e-4, "temperature": 0.4})
    assert search.default_space(infonce)(fixed) == fixed.params
    trainer = make(bert_folder, tmp_path)
    assert trainer.hyperparameter_search(n_trials=2).hyperparameters.keys() == {"learning_rate", "gamma", "alpha"}


@pytest.mark.slow
def test_a_metric_that_falls_is_minimized(bert_folder, tmp_path):
    def size(encoder):
        return {"norm": encoder[0].model.embeddings.word_embeddings.weight.norm().item(), "other": 1.0}

    settings = {"metric_for_best_model": "norm", "greater_is_better": False}
    best = make(bert_folder, tmp_path, size, **settings).hyperparameter_search(**alphas(0.1, 1e4))
    values = [
        json.loads((tmp_path / f"run-{i}" / "trainer_state.json").read_text())["log_history"][-1]["eval_norm"]
        for i in range(2)
    ]
    assert best.objective == min(values) < max(values)
    other = make(bert_folder, tmp_path / "b", size, **settings)
    best = other.hyperparameter_search(
        **alphas(0.1, 1e4), compute_objective=lambda metrics: metrics["eval_norm"], direction="maximize"
    )
    assert best.objective == max(values)
    one = make(bert_folder, tmp_path / "c", lambda encoder: 0.5, metric_for_best_model=None)
    assert one.hyperparameter_search(**alphas(1.0, 2.0)).objective == 0.5


def test_the_objective_is_that_of_the_best_checkpoint(bert_folder, tmp_path):
    """With load_best_model_at_end, a trial ends with its best weights, not with the last ones."""
    scores = iter([0.0, 0.9, 0.1, 0.9])  # before the search, at steps 2 and 4, at the end

    trainer = make(
        bert_folder,
        tmp_path,
        lambda encoder: {"x": next(scores)},
        metric_for_best_model="x",
        load_best_model_at_end=True,
    )
    assert trainer.hyperparameter_search(**alphas(1.0)).objective == 0.9


@pytest.mark.slow
def test_early_stopping_counts_in_each_trial_anew(bert_folder, tmp_path):
    settings = {"metric_for_best_model": "x", "load_best_model_at_end": True, "early_stopping_patience": 1}
    settings |= {"eval_steps": 1, "save_steps": 1}
    trainer = make(bert_folder, tmp_path, lambda encoder: {"x": 0.5}, **settings)
    trainer.hyperparameter_search(**alphas(1.0, 2.0))
    for i in range(2):
        state = json.loads((tmp_path / f"run-{i}" / "trainer_state.json").read_text())
        assert state["global_step"] == 2


@pytest.mark.slow
def test_trials_are_protected_like_runs(bert_folder, tmp_path):
    make(bert_folder, tmp_path).hyperparameter_search(**alphas(1.0, 2.0))
    kept = load_file(tmp_path / "run-0" / "checkpoint-4" / "model.safetensors")
    with pytest.raises(InputError, match=r"run-0 already contains checkpoint-2"):
        make(bert_folder, tmp_path).hyperparameter_search(**alphas(3.0))
    with pytest.raises(InputError, match="different file name for each trial, got 'same'"):
        make(bert_folder, tmp_path).hyperparameter_search(**alphas(3.0, 4.0), hp_name=lambda trial: "same")
    with pytest.raises(InputError, match=r"file name for each trial, got '\.\./x'"):
        make(bert_folder, tmp_path).hyperparameter_search(**alphas(3.0), hp_name=lambda trial: "../x")
    again = load_file(tmp_path / "run-0" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    make(bert_folder, tmp_path, overwrite_output_dir=True).hyperparameter_search(**alphas(3.0))
    assert trial_states(tmp_path)["run-0"][0] == {"alpha": 3.0}
    assert trial_states(tmp_path)["run-1"][0]["alpha"] in (1.0, 2.0)  # not part of the second search
    resumed = make(bert_folder, tmp_path / "run-0", alpha=3.0)  # a trial is a run that can be resumed
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 4 and latest_valid_checkpoint(tmp_path / "run-0").name == "checkpoint-4"


@pytest.mark.slow
def test_a_trial_that_diverges_does_not_end_the_search(bert_folder, tmp_path):
    trainer = make(bert_folder, tmp_path, given={"model_init": lambda trial: broken(bert_folder, trial)})
    assert trainer.hyperparameter_search(**alphas(1.0, 2.0)).run_id == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-0", "run-1"]
    trainer = make(bert_folder, tmp_path / "b", given={"model_init": lambda trial: broken(bert_folder, trial)})
    with pytest.raises(InputError, match="no trial of the search was completed"):
        trainer.hyperparameter_search(**alphas(1.0))
    assert trainer.args.alpha == 4.0 and trainer.hp_search_backend is None


@pytest.mark.slow
def test_a_pruned_trial_leaves_its_folder(bert_folder, tmp_path):
    class Pruner(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1

    trainer = make(bert_folder, tmp_path)
    assert trainer.hyperparameter_search(**alphas(1.0, 2.0, 3.0), pruner=Pruner()).run_id != "1"
    steps = [json.loads((tmp_path / f"run-{i}" / "trainer_state.json").read_text())["global_step"] for i in range(3)]
    assert steps == [4, 2, 4] and not trainer.output_dir.held


def broken(folder, trial):
    """An encoder whose output is NaN in the first trial."""
    encoder = build_text_encoder(folder, pooling="mean")
    if trial is not None and trial.number == 0:
        encoder.register_forward_hook(
            lambda module, inputs, out: {**out, "sentence_embedding": out["sentence_embedding"] * float("nan")}
        )
    return encoder


@pytest.mark.parametrize(
    "options, words",
    [
        ({"backend": "ray"}, "backend=ray is not supported; it must be optuna"),
        ({"n_jobs": 2}, "n_jobs=2 is not supported"),
        ({"direction": "minimize"}, "direction=minimize would search for the worst .*sts_spearman.*maximize"),
        ({"compute_objective": sum}, "direction is required with compute_objective"),
        ({"hp_space": lambda trial: None}, "hp_space must return a dict of arguments, got NoneType"),
        ({"hp_space": lambda trial: {"lr_scheduler_type": "x"}}, "trial 0: lr_scheduler_type: x is not a valid"),
        ({"hp_space": lambda trial: {"learning_rate": "1e-3"}}, "learning_rate must be finite .*, got '1e-3'"),
        ({"hp_space": lambda trial: {"bf16": True}}, "trial 0: bf16=True was set later, without effect"),
        ({"hp_space": lambda trial: {"early_stopping_patience": 2, "load_best_model_at_end": True}}, "no effect now"),
        ({"hp_space": lambda trial: {"alhpa": 1.0}}, "hp_space sets alhpa, which is not an argument"),
        ({"hp_space": lambda trial: {"output_dir": "x"}}, "hp_space sets output_dir"),
        ({"hp_space": lambda trial: {"alpha": -1.0}}, r"trial 0: alpha must be auto or a finite number > 0, got -1\.0"),
        ({"hp_space": lambda trial: {"per_device_train_batch_size": 65}}, "64 training examples are fewer"),
        ({"hp_space": lambda trial: {"temperature": 0.1}}, "trial 0: temperature=0.1 does not apply"),
    ],
)
def test_searches_that_would_mislead_are_named(bert_folder, tmp_path, options, words):
    trainer = make(bert_folder, tmp_path)
    with pytest.raises(InputError, match=words):
        trainer.hyperparameter_search(**({"n_trials": 1} | options))
    assert trainer.args.alpha == 4.0 and trainer.model is not None


@pytest.mark.slow
def test_searches_without_effect_are_named(bert_folder, tmp_path):
    encoder = build_text_encoder(bert_folder)
    args = FMICLTrainingArguments(
        str(tmp_path), **STEPS, max_steps=2, use_cpu=True, metric_for_best_model="sts_spearman"
    )
    evaluator = STSEvaluator(sts_pairs(), progress=False)
    rest = {"args": args, "train_dataset": sentences(64), "evaluator": evaluator}
    space = {"alpha": [1.0], "learning_rate": [1.0]}

    def of(name):
        return lambda trial: {name: trial.suggest_categorical(name, space[name])}

    for given, name, words in [
        ({"loss": FMICLLoss()}, "alpha", "sets alpha, which has no effect because loss was passed"),
        (
            {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
            "learning_rate",
            "sets learning_rate, which has no effect",
        ),
        ({"optimizers": (torch.optim.SGD(encoder.parameters(), lr=0.1), None)}, "alpha", "do not pass optimizers"),
    ]:
        with pytest.raises(InputError, match=words):
            FMICLTrainer(encoder, **rest, **given).hyperparameter_search(of(name), n_trials=1)
    with pytest.raises(InputError, match="needs an evaluator"):
        make_trainer(bert_folder, tmp_path).hyperparameter_search(of("alpha"), n_trials=1)
    several = make(bert_folder, tmp_path, lambda encoder: {"a": 1.0, "b": 2.0}, metric_for_best_model=None)
    with pytest.raises(InputError, match=r"metric_for_best_model is required .*choose one of a, b"):
        several.hyperparameter_search(of("alpha"), n_trials=1)


@pytest.mark.slow
def test_trials_within_the_noise_of_the_start_are_distinguished(bert_folder, tmp_path):
    """The encoder before training is no candidate in a trial, although the trainer selects checkpoints."""

    class Noisy:
        """0.5 before training; after it, the learning rate is added, which is far below the noise."""

        primary_metric, metric_of = "score", staticmethod(lambda rows: float(rows.mean()))
        start = calls = 0

        def __call__(self, encoder):
            first = next(encoder.parameters()).sum().item()
            self.start, self.calls = self.start or first, self.calls + 1
            score = 0.5 + trainer.args.learning_rate * (first != self.start)
            noise = np.random.default_rng(self.calls).normal(size=100)
            self.observations = score + noise - noise.mean()
            return {"score": score}

    trainer = make(bert_folder, tmp_path, Noisy(), load_best_model_at_end=True, metric_for_best_model="score")
    rates = [1e-3, 3e-3, 2e-3]
    space = {"hp_space": lambda trial: {"learning_rate": rates[trial.number]}}
    best = trainer.hyperparameter_search(n_trials=3, **space)
    assert best.run_id == "1" and best.objective == pytest.approx(0.503)
