"""Files about the project: workflows, versions, CONTRIBUTING.md, CHANGELOG.md, CITATION.cff."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

import fmicl_text
from fmicl_text import FMICLTrainer, FMICLTrainingArguments

ROOT = Path(__file__).parent.parent
YAML_FILES = (
    ".pre-commit-config.yaml",
    "CITATION.cff",
    ".github/workflows/checks.yml",
    ".github/workflows/nightly.yml",
)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MODULES = [
    path.relative_to(ROOT / "fmicl_text").with_suffix("").as_posix()
    for path in sorted((ROOT / "fmicl_text").rglob("*.py"))
    if path.stem != "__init__"
]


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", YAML_FILES)
def test_yaml_files_parse(name):
    assert isinstance(read_yaml(name), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_limited(path):
    """In time and permissions; no secrets, and actions by their major version."""
    workflow, text = read_yaml(path), path.read_text(encoding="utf-8")
    assert workflow["permissions"] == {"contents": "read"} and "secrets" not in text
    assert all(0 < job["timeout-minutes"] <= 120 for job in workflow["jobs"].values())
    actions = re.findall(r"uses: (\S+)", text)
    assert actions and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)


def test_there_are_workflows():
    assert [path.name for path in WORKFLOWS] == ["checks.yml", "nightly.yml"]


# ---- versions


def requirements(section):
    """Requirements of pyproject.toml by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = project["dependencies"] if section is None else project["optional-dependencies"][section]
    return {requirement.name: requirement for requirement in map(Requirement, listed)}


def lowest(requirement):
    (bound,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    return Version(bound)


def test_the_nightly_run_has_the_lowest_versions():
    (job,) = read_yaml(".github/workflows/nightly.yml")["jobs"].values()
    matrix = {entry["versions"]: entry["requirements"] for entry in job["strategy"]["matrix"]["include"]}
    assert set(matrix) == {"lowest", "pinned", "newest"}
    exact = dict(re.findall(r"([\w-]+)==(\S+)", matrix["lowest"]))
    supported = requirements(None)
    assert {name: Version(version) for name, version in exact.items()} == {
        name: lowest(supported[name]) for name in ("transformers", "sentence-transformers")
    }


def test_pinned_versions_are_supported():
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pins}
    for section in (None, "dev", "geometry", "lars", "lora", "mteb", "qlora", "soak"):
        for name, requirement in requirements(section).items():
            if name != "fmicl_text":
                assert pinned[re.sub(r"[-_.]+", "-", name).lower()] in requirement.specifier, name


@pytest.mark.slow
def test_the_version_is_in_one_place():
    version = fmicl_text.__version__
    assert (ROOT / "fmicl_text" / "__init__.py").read_text(encoding="utf-8").count(f'"{version}"') == 1
    pages = [path for kind in ("*.toml", "*.cff", "*.md") for path in files(kind) if path.name != "CHANGELOG.md"]
    assert len(pages) > 5
    number = re.compile(rf"(?<![\w.]){re.escape(version)}(?!\.?\w)")
    assert not [path for path in pages if number.search(path.read_text(encoding="utf-8"))]


def files(pattern):
    """Files of the project, without hidden folders and the output of runs and builds."""
    skipped = {"runs", "build", "dist"}
    for path in sorted(ROOT.rglob(pattern)):
        folders = path.relative_to(ROOT).parts[:-1]
        if not skipped & set(folders) and not any(folder.startswith(".") for folder in folders):
            yield path


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0].startswith(("Unreleased", fmicl_text.__version__))
    assert fmicl_text.__version__ in [heading.split()[0] for heading in headings]


# ---- the paper


def test_the_citation_is_the_papers():
    citation = read_yaml("CITATION.cff")
    paper = citation["preferred-citation"]
    assert paper["title"] == "f-MICL: Understanding and Generalizing InfoNCE-based Contrastive Learning"
    assert [author["family-names"] for author in paper["authors"]] == ["Lu", "Zhang", "Sun", "Guo", "Yu"]
    assert paper["url"] == "https://arxiv.org/abs/2402.10150" and "version" not in citation


# ---- CONTRIBUTING.md


def layout():
    """Modules in the layout of CONTRIBUTING.md."""
    (block,) = re.findall(r"^    fmicl_text/\n((?: {6}.*\n)+)", CONTRIBUTING, re.MULTILINE)
    folder = ""
    for line in block.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        if names[0].endswith("/"):
            folder = names[0]
        else:
            yield from ((folder if line.startswith(" " * 8) else "") + name for name in names)


LAYOUT = list(layout())


@pytest.mark.parametrize("module", MODULES)
def test_the_layout_has_every_module(module):
    assert LAYOUT.count(module) == 1


def test_the_layout_has_no_other_modules():
    assert len(MODULES) > 40 and set(LAYOUT) == set(MODULES)


def test_the_examples_of_extensions_run(tmp_path):
    names = {}
    examples = re.findall(r"```py\n(.*?)```", CONTRIBUTING, re.DOTALL)
    assert len(examples) == 6
    for number, example in enumerate(examples):
        exec(compile(example, f"CONTRIBUTING.md, example {number}", "exec"), names)
    x, y = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)).unbind()
    r = torch.linspace(-2, 0, 5)
    torch.testing.assert_close(names["power"].score(r), 1.5 * torch.expm1(r / 2))
    assert names["loss"](x, y).isfinite()

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 4))
    before = encoder[0].weight.detach().clone()
    args = FMICLTrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, max_steps=2, save_strategy="no", eval_strategy="epoch",
        metric_for_best_model="norm", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = FMICLTrainer(
        names["SeriesModel"](encoder, nn.Identity(), 4),
        args,
        train_dataset=[{"series": row} for row in torch.cat([x, y])],
        data_collator=lambda rows: {"series": torch.stack([row["series"] for row in rows])},
        evaluator=names["evaluate"],
        loss=names["PotentialLoss"](alpha=2.0),
        views=names["noisy_views"],
    )
    trainer.train()
    assert not torch.equal(encoder[0].weight, before)
    assert trainer.evaluate()["eval_norm"] == pytest.approx(encoder[0].weight.norm().item())
