# The two commands of the README: `make quickstart` and `make test`. Each sets up .venv the first time.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test soak check format wheel clean

quickstart: .venv/ready
	$(OFFLINE) $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/simcse_fmicl.py --divergence kl --output_dir runs/quickstart --overwrite_output_dir

test: .venv/ready
	$(OFFLINE) $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# harnesses that kill, fill and fuzz, an hour in all; tests/README.md has what they printed
soak: .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[soak]'
	$(OFFLINE) $(BIN)/python tests/soak/kill.py
	$(OFFLINE) $(BIN)/python tests/soak/memory.py
	$(OFFLINE) $(BIN)/python tests/soak/files.py
	$(OFFLINE) $(BIN)/python tests/soak/fuzz_readers.py --seconds 300

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/ready
	$(BIN)/python -m build --wheel

# torch first: that exact pin is a CPU build on CPU-only machines that offer one
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fmicl_text needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info runs
