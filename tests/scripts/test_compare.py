"""The comparison of settings: names, flags and tables by hand; a study that is killed and continued; mistakes."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.nn.functional import normalize

from fmicl_text.cli.study import Study, load_study
from fmicl_text.cli.study_tables import (
    Cell,
    best_rows,
    cells_of,
    chosen_rows,
    curve,
    values_before,
    values_of,
    write_tables,
)
from fmicl_text.errors import InputError
from fmicl_text.losses import FDivergence, load_divergence, load_objective
from tests.programs import run_program, start_program

PATH = Path(__file__).parent.parent.parent / "recipes" / "compare.py"
STUDIES = PATH.parent / "studies"


@pytest.fixture
def compare():
    spec = importlib.util.spec_from_file_location("compare_settings", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_settings"] = module  # for dataclasses
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compare_settings"]


def study_file(folder, text):
    path = folder / "study.yaml"
    path.write_text(textwrap.dedent(text))
    return path


STUDY = """\
    recipe: simcse_fmicl
    metrics: {sts_spearman: STS}
    seeds: [1, 2, 3]
    options: {max_steps: 2, eval_strategy: no}
    variables: {data: texts}
    baseline: InfoNCE, temperature 0.1
    hyperparameters: [alpha]
    columns:
      one: {train_file: "{data}/one.txt"}
      two: {train_file: ["{data}/two.txt", three.txt]}
    rows:
      - divergence: [kl, js]
        gamma: [5, 10.0]
        views: [[crops, delete]]
      - {objective: infonce, temperature: [0.05, 0.1], name: InfoNCE}
    """


def test_every_setting_is_run_with_every_seed(compare, tmp_path):
    study = load_study(study_file(tmp_path, STUDY))
    runs = study.runs({"data": "mine"})
    names = [f"{f}, gamma {g}, views crops delete" for f in ("kl", "js") for g in ("5", "10")]
    names += ["InfoNCE, temperature 0.05", "InfoNCE, temperature 0.1"]
    places = [(run.seed, run.row, run.column) for run in runs]
    assert places == [(seed, row, column) for seed in (1, 2, 3) for row in names for column in ("one", "two")]
    options = ["--max_steps=2", "--eval_strategy=no"]
    more = ["--divergence=kl", "--gamma=5", "--views", "crops", "delete", "--seed=1"]
    assert runs[0].arguments == [*options, "--train_file=mine/one.txt", *more]
    assert runs[1].arguments == [*options, "--train_file", "mine/two.txt", "three.txt", *more]
    assert len({run.name for run in runs}) == len(runs)
    compare.check(study, runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rows:", "row:"), "unknown key row; known: recipe, rows,"),
        (("recipe: simcse_fmicl", "recipe: train"), "recipe: must be simcse_fmicl or vision_fmicl, got train"),
        (("metrics: {sts_spearman: STS}", "about: x"), "the key metrics is missing"),
        (("metrics: {sts_spearman: STS}", "metrics: sts"), "metrics: must be a mapping, got 'sts'"),
        (("[1, 2, 3]", "[1, 1]"), "seeds: must be different whole numbers, got [1, 1]"),
        (("[1, 2, 3]", "[]"), "seeds: must be a list, got []"),
        (
            ("hyperparameters: [alpha]", "hyperparameters: [[alpha]]"),
            "hyperparameters: names must be text, got ['alpha']",
        ),
        (("hyperparameters: [alpha]", "best_by: [gamma]"), "best_by: must be text, got ['gamma']"),
        (
            ("hyperparameters: [alpha]", "best_by: alpha"),
            "best_by: must be one of the options divergence, gamma, views",
        ),
        (("hyperparameters: [alpha]", "choose_by: 1"), "choose_by: must be text, got 1"),
        (("hyperparameters: [alpha]", "curves: {loss: 1}"), "curves: titles must be text, got 1"),
        (("hyperparameters: [alpha]", "keep_encoders: maybe"), "keep_encoders: must be true or false, got 'maybe'"),
        (("[5, 10.0]", "[5, 5.0]"), "two rows have the name kl, gamma 5, views crops delete"),
        (("baseline: InfoNCE, temperature 0.1", "baseline: infonce"), "baseline: must be one of the rows kl, gamma 5"),
        (("max_steps: 2", "seed: 2"), "options: seed is set by this script"),
        (("- {objective: infonce, temperature: [0.05, 0.1], name: InfoNCE}", "- kl"), "rows, number 2: must be a map"),
        (("gamma: [5, 10.0]", "1: 5"), "rows, number 1: the name of an option must be text, got 1"),
        (("{sts_spearman: STS}", "{sts_spearman: [STS]}"), "metrics: titles must be text, got ['STS']"),
        (("[1, 2, 3]", "*seeds"), "aliases (*name) are not supported"),
    ],
)
def test_mistakes_in_a_study_are_one_line(compare, tmp_path, change, message):
    path = study_file(tmp_path, STUDY.replace(*change))
    with pytest.raises(InputError) as error:
        load_study(path)
    assert message in str(error.value) and str(error.value).startswith(str(path))


def test_mistakes_in_options_are_found_before_the_first_run(compare, tmp_path):
    study = load_study(study_file(tmp_path, STUDY.replace("gamma:", "gama:")))
    with pytest.raises(InputError, match=r"^kl, gama 5, views crops delete, one: unknown argument --gama"):
        compare.check(study, study.runs({}))
    study = load_study(study_file(tmp_path, STUDY.replace("{data}", "{folder}")))
    with pytest.raises(InputError, match=r"\{folder\}/one.txt: --variables folder=... is required"):
        study.runs({})
    with pytest.raises(InputError, match="--variables dat: the study has data"):
        study.runs({"dat": "x"})


def test_an_output_folder_that_cannot_be_made_is_one_line(compare, tmp_path):
    study = load_study(study_file(tmp_path, STUDY))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output_dir .*file: Not a directory"):
        compare.execute(study, study.runs({}), tmp_path / "file", 1, 1, tmp_path)


def test_a_folder_with_other_files_is_left_alone(compare, tmp_path):
    study = load_study(study_file(tmp_path, STUDY))
    with pytest.raises(InputError, match="contains other files"):
        compare.execute(study, study.runs({}), tmp_path, 1, 1, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_names_that_are_numbers_are_text(compare, tmp_path):
    text = STUDY.replace("name: InfoNCE", "name: 7").replace("one:", "128:").replace("baseline: InfoNCE", "baseline: 7")
    study = load_study(study_file(tmp_path, text))
    assert {run.column for run in study.runs({})} == {"128", "two"}
    assert {run.row for run in study.runs({})} >= {"7, temperature 0.05", "7, temperature 0.1"}


def result(score, before=50.0, alpha=None, **more):
    hyperparameters = {} if alpha is None else {"alpha": alpha}
    scores = {"before": {"eval_sts_spearman": before}, "after": {"eval_sts_spearman": score}}
    return {"hyperparameters": hyperparameters, "data": {}, **scores, **more}


def write_records(compare, study, folder, scores):
    runs = study.runs({})
    for run in runs:
        if (score := scores.get((run.row, run.column, run.seed))) is not None:
            record = {"row": run.row, "column": run.column, "seed": run.seed, "arguments": run.arguments, "code": "a"}
            compare.write_json(folder / "runs" / f"{run.name}.json", record | {"results": score})
    return runs


def test_the_table_by_hand(compare, tmp_path):
    text = STUDY.replace("[kl, js]", "kl").replace("[5, 10.0]", "5").replace("[0.05, 0.1]", "0.1")
    text = text.replace("        views: [[crops, delete]]\n", "").replace("InfoNCE, temperature 0.1", "InfoNCE")
    study = load_study(study_file(tmp_path, text))
    (tmp_path / "runs").mkdir()
    kl, base = (60.0, 61.0, 65.0), (59.0, 61.0, 61.0)
    scores = {("kl, gamma 5", "one", seed): result(kl[seed - 1], alpha=float(10**seed)) for seed in (1, 2, 3)}
    scores |= {("InfoNCE", "one", seed): result(base[seed - 1]) for seed in (1, 2, 3)}
    scores |= {("InfoNCE", "two", 1): result(70.0, before=52.0), ("kl, gamma 5", "two", 1): result(71.5, before=52.0)}
    runs = write_records(compare, study, tmp_path, scores)
    records = [record for run in runs if (record := compare.record_of(run, tmp_path))]
    cells = cells_of(study, records)
    assert list(cells) == ["before training", "kl, gamma 5", "InfoNCE"]
    mean, half = cells["kl, gamma 5"]["one"].difference(cells["InfoNCE"]["one"])
    interval = stats.ttest_rel(kl, base).confidence_interval(0.95)
    assert mean == pytest.approx(5 / 3) and (mean - half, mean + half) == pytest.approx(tuple(interval))
    lines = write_tables(study, records, tmp_path).splitlines()
    table = [[word.strip() for word in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["setting", "one", "one: difference", "two", "two: difference", "seeds", "one, alpha"]
    assert table[2] == ["before training", "50.00 ± 0.00", "", "52.00", "", "1-3", ""]
    assert table[3] == ["kl, gamma 5", "62.00 ± 2.65", f"+1.67 ± {half:.2f}", "71.50", "+1.50", "1-3", "10 to 1e+03"]
    assert "8 of 12 runs" in "\n".join(lines)
    assert json.loads((tmp_path / "table.json").read_text())["cells"]["InfoNCE"]["two"] == {"1": 70.0}
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_the_best_row_of_every_value(tmp_path):
    text = (
        STUDY.replace("[0.05, 0.1]", "0.1").replace("InfoNCE, temperature 0.1", "InfoNCE").rstrip(" ")
        + "    best_by: divergence\n"
    )
    study = load_study(study_file(tmp_path, text.replace("        views: [[crops, delete]]\n", "")))
    cells = {
        f"{f}, gamma {g}": {"one": Cell({1: score})}
        for f, g, score in (("kl", 5, 60.0), ("kl", 10, 61.0), ("js", 5, 63.0), ("js", 10, 62.0))
    }
    assert best_rows(study, cells) == [
        {"divergence": "kl", "best, one": "kl, gamma 10", "one": "61.00"},
        {"divergence": "js", "best, one": "js, gamma 5", "one": "63.00"},
    ]


def test_probes_are_metrics_and_rows_before_training():
    probes = [
        {"features": "raw pixels", "k-NN": 90.0},
        {"features": "before training", "k-NN": 80.0, "5 labels": "70.50 ± 1.00"},
        {"features": "after training", "k-NN": 95.0, "5 labels": "90.25 ± 2.00"},
    ]
    record = {"results": result(60.0) | {"data": {"probes": probes}}}
    metrics = {"k-NN": "k-NN", "sts_spearman": "STS", "5 labels": "5 labels"}
    assert values_of(record, metrics) == {"k-NN": 95.0, "sts_spearman": 60.0, "5 labels": 90.25}
    assert values_before(record, metrics) == {"k-NN": 80.0, "sts_spearman": 50.0, "5 labels": 70.5}
    with pytest.raises(InputError, match="metrics: knn is not in the results, which have sts_spearman, k-NN, 5 labels"):
        values_of(record, {"knn": "k-NN"})


def test_curves_are_means_over_the_steps_that_all_seeds_logged(tmp_path):
    study = load_study(
        study_file(tmp_path, STUDY.rstrip(" ") + "    curves: {loss: the loss, uniformity: uniformity}\n")
    )
    history = [[(1, 2.0), (2, 4.0), (3, 9.0)], [(1, 4.0), (2, 5.0)]]
    records = [
        {"row": "InfoNCE, temperature 0.1", "column": "one", "seed": seed, "code": "a"}
        | {"results": result(60.0, log_history=[{"step": step, "loss": loss} for step, loss in of_seed])}
        for seed, of_seed in enumerate(history, 1)
    ]
    assert curve(records, "loss") == ([1, 2], [3.0, 4.5])
    records[0]["results"]["log_history"] += [{"step": 1, "eval_knn": 5.0}]
    assert curve(records[:1], "knn") == ([1], [5.0]) and curve(records, "knn") == ([], [])
    with pytest.raises(InputError, match="curves: uniformity was not logged by any run"):
        write_tables(study, records, tmp_path)
    del study.curves["uniformity"]
    write_tables(study, records, tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_choice_by_a_logged_value():
    """Row a is better on average (62 against 61). The value chooses b in seed 1 and a in seed 2: 0.5 below a."""
    settings = {"recipe": "simcse_fmicl", "metrics": {"sts_spearman": "STS"}, "seeds": [1, 2], "choose_by": "nats"}
    study = Study(**settings, rows=[{"name": "a"}, {"name": "b", "gamma": 5}])
    scores = {
        ("a", 1): (61.0, [9, 1, 2]),
        ("a", 2): (63.0, [0, 5, 5]),
        ("b", 1): (60.0, [0, 2, 4]),
        ("b", 2): (62.0, [9, 1, 1]),
    }
    records = [
        {"row": row, "column": "", "seed": seed}
        | {"results": result(score, log_history=[{"step": i, "nats": value} for i, value in enumerate(values)])}
        for (row, seed), (score, values) in scores.items()
    ]
    (table,) = chosen_rows(study, records)
    assert table["chosen"] == "b; a" and table["score"] == "61.50 ± 2.12"
    assert table["below the best"] == 0.5 and table["random choice"] == 0.5
    del records[0]["results"]["log_history"][:]
    with pytest.raises(InputError, match="choose_by: nats was not logged by a"):
        chosen_rows(study, records)


# ---- the modules of the studies


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    yield
    for name in ("study_divergences", "study_objectives"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("modules")
def test_a_mixture_is_the_divergence_of_the_sum_of_f():
    mixture = load_divergence("study_divergences:kl_pearson")
    by_autograd = FDivergence.from_convex(mixture.f)
    r = torch.linspace(-8, 1, 91, dtype=torch.float64)
    for function in ("score", "conjugate"):
        assert torch.allclose(getattr(mixture, function)(r), getattr(by_autograd, function)(r), atol=1e-12)
    assert mixture.tail_exponent == 1.0 and load_divergence("study_divergences:js_sh").tail_exponent == 0.5
    assert load_divergence("study_divergences:power").tail_exponent == 1.5


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("name", ["SkewRenyi", "KernelContrastive", "TemperatureFree"])
def test_objectives_equal_loops_in_float64(name):
    generator = torch.Generator().manual_seed(0)
    x, y = (normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    rows, pairs = range(6), [(i, j) for i in range(6) for j in range(6) if i != j]

    def cross(i, j):
        return float(x[i] @ y[j])

    if name == "SkewRenyi":  # order 2, skewness 1/64, temperature 0.05
        above = math.log(sum(math.exp(cross(i, i) / 0.05) for i in rows) / 6)
        same = sum(math.exp(2 * cross(i, i) / 0.05) for i in rows) / 6
        other = sum(math.exp(2 * cross(i, j) / 0.05) for i, j in pairs) / 30
        expected = -above + 0.5 * math.log(same / 64 + other * 63 / 64)
    elif name == "KernelContrastive":
        same = sum(math.exp(-2 * float((x[i] - y[i]).square().sum())) for i in rows) / 6
        other = sum(math.exp(-2 * float((x[i] - x[j]).square().sum())) for i, j in pairs) / 30
        expected = -same + 16 * other
    else:
        odds = [[(1 + cross(i, j)) / (1 - cross(i, j)) for j in rows] for i in rows]
        expected = sum(math.log(sum(odds[i]) / odds[i][i]) for i in rows) / 6
    loss = load_objective(f"study_objectives:{name}")()
    assert float(loss(x, y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.usefixtures("modules")
def test_the_statistic_of_sigreg():
    """Against the integral over [-5, 5] for given projections, and near 0 for normal rows only."""
    loss = load_objective("study_objectives:SIGReg")(projections=1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 3, generator=generator)
    torch.manual_seed(1)
    found = float(loss.statistic(rows))
    torch.manual_seed(1)
    values = (rows @ normalize(torch.randn(3, 1), dim=0))[:, 0].double().numpy()

    def integrand(t):
        empirical = np.exp(1j * t * values).mean()
        return abs(empirical - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2)

    assert found == pytest.approx(512 * integrate.quad(integrand, -5, 5)[0], rel=1e-3)
    assert found < 3 < float(loss.statistic(3 * rows)) and float(loss.statistic(rows.sign())) > 3


# ---- whole studies, with a recipe that only writes its result

RECIPE = """\
import json, os, sys, time
from pathlib import Path
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:] if "=" in word)
folder = Path(options["output_dir"])
print("text on the way", file=sys.stderr)
if options["gamma"] == os.environ.get("FAILS"):
    sys.exit("simcse_fmicl.py: error: no such file")
if (folder / "results.json").exists():
    sys.exit()
folder.mkdir()
time.sleep(0.3)
score = 10 * float(options["gamma"]) + int(options["seed"])
Path(os.environ["CALLS"]).open("a").write(f"{folder.name}\\n")
result = {"hyperparameters": {}, "data": {}, "before": {}, "after": {"eval_sts_spearman": score}}
(folder / "results.json").write_text(json.dumps(result))
"""
SMALL = """\
    recipe: simcse_fmicl
    metrics: {sts_spearman: STS}
    seeds: [1, 2]
    rows: [{gamma: [1, 2, 3]}]
    """


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    shutil.copy(PATH, tmp_path / "recipes" / "compare.py")
    for name in ("simcse_fmicl", "vision_fmicl"):
        (tmp_path / "recipes" / f"{name}.py").write_text(RECIPE)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    script = [str(tmp_path / "recipes" / "compare.py"), str(study_file(tmp_path, SMALL))]
    return [*script, "--output_dir", str(tmp_path / "out")]


def calls(folder):
    return (folder / "calls").read_text().split()


@pytest.mark.slow
def test_a_killed_study_ends_with_the_same_table(command, tmp_path):
    undisturbed = [sys.executable, *command[:-1], str(tmp_path / "other")]
    undisturbed = subprocess.run(undisturbed, capture_output=True, text=True, check=True)
    (tmp_path / "calls").unlink()
    process = start_program(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "calls").exists() or len(calls(tmp_path)) < 2:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = run_program(*command, "--jobs", "2")
    assert again.returncode == 0, again.stderr
    assert again.stdout == undisturbed.stdout and "| gamma 3" in again.stdout
    assert len(calls(tmp_path)) == len(set(calls(tmp_path))) == 6  # none twice, although one was running at the kill
    assert not (tmp_path / "out" / "encoders").exists()
    third = run_program(*command, "--table")
    assert third.returncode == 0, third.stderr
    assert third.stdout == again.stdout and len(calls(tmp_path)) == 6


@pytest.mark.slow
def test_modules_beside_the_study_are_found_by_runs_that_name_one(command, tmp_path):
    """The recipe of this test fails if it can import `mine`, or, for the run that names it, cannot."""
    (tmp_path / "mine.py").write_text("def power(u):\n    return u**1.5\n")
    script = tmp_path / "recipes" / "simcse_fmicl.py"
    check = """
    import importlib.util
    found = importlib.util.find_spec("mine") is not None
    if found != ("mine:power" in " ".join(sys.argv)):
        sys.exit(f"mine is found: {found}")
    """
    script.write_text(RECIPE.replace("folder = ", textwrap.dedent(check) + "folder = ", 1))
    study_file(
        tmp_path, SMALL.replace("rows: [{gamma: [1, 2, 3]}]", 'rows: [{divergence: [js, "mine:power"], gamma: 1}]')
    )
    done = run_program(*command, cwd=tmp_path / "recipes")
    assert done.returncode == 0, done.stderr
    assert "| mine:power, gamma 1" in done.stdout


@pytest.mark.slow
def test_a_failed_run_ends_the_study_in_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS", "2")
    failed = run_program(*command)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    last = failed.stderr.strip().splitlines()[-1]
    assert last.endswith("error: gamma_2-seed-1 ended with status 1: simcse_fmicl.py: error: no such file")
    assert calls(tmp_path) == ["gamma_1-seed-1"]
    monkeypatch.delenv("FAILS")
    assert run_program(*command).returncode == 0
    assert len(calls(tmp_path)) == 6
    study_file(tmp_path, SMALL.replace("[1, 2, 3]", "[1]").rstrip(" ") + "    options: {max_steps: 3}\n")
    other = run_program(*command)
    assert other.returncode == 2 and "is a run with other options (--max_steps=3)" in other.stderr


@pytest.mark.slow
def test_a_signal_stops_the_runs(command, tmp_path):
    process = start_program(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (tmp_path / "calls").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    done = len(calls(tmp_path))
    time.sleep(1)
    assert len(calls(tmp_path)) == done < 6


@pytest.mark.slow
def test_a_study_of_the_recipe_itself(tmp_path):
    text = """\
        recipe: simcse_fmicl
        metrics: {sts_spearman: STS}
        seeds: [1]
        options: {max_steps: 1, eval_strategy: no, per_device_train_batch_size: 8}
        hyperparameters: [gamma]
        rows: [{divergence: kl}]
        """
    done = run_program(PATH, study_file(tmp_path, text), "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    output = done.stdout.splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in output if line.startswith("|")}
    before, after = (float(rows[name][0]) for name in ("before training", "kl"))
    assert 0 < abs(after - before) < 5 and 15 < float(rows["kl"][1]) <= 20
