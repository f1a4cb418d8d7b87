# `make quickstart` trains on the bundled data, `make test` runs the quick tests, `make test-slow` the others. The first
# run sets up .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test test-slow test-fast studies soak check format wheel clean

quickstart: .venv/runtime
	$(OFFLINE) $(BIN)/fmicl-text train --divergence kl --output_dir runs/quickstart --overwrite_output_dir
	@echo
	@echo 'Train on your own text:'
	@echo '    source .venv/bin/activate'
	@echo '    fmicl-text train --model_name_or_path google-bert/bert-base-uncased --train_file SENTENCES.txt'

PYTEST := $(OFFLINE) $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: .venv/ready
	$(PYTEST) -m "not slow"

# what `make test` leaves out: launched processes, normalizing flows, engines, whole recipe runs
test-slow: .venv/ready
	$(PYTEST) -m slow

# one case of each test of `make test`
test-fast: .venv/ready
	$(PYTEST) -m "not slow" --one-case

# the comparisons of recipes/studies with their number of runs and cost
studies: .venv/runtime
	@$(BIN)/python recipes/compare.py --list recipes/studies/*.yaml

# crash, memory, file and fuzz tests, about an hour; results in tests/README.md
soak: .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[soak]'
	$(OFFLINE) $(BIN)/python tests/soak/kill.py
	$(OFFLINE) $(BIN)/python tests/soak/kill_files.py
	$(OFFLINE) $(BIN)/python tests/soak/fuzz_flags.py
	$(OFFLINE) $(BIN)/python tests/soak/memory.py
	$(OFFLINE) $(BIN)/python tests/soak/families.py
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

# What running needs. torch first: that exact pin is a CPU build on CPU-only machines that offer one
.venv/runtime: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fmicl_text needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

# what tests and checks need in addition
.venv/ready: .venv/runtime
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info runs
