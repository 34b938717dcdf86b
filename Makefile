# make demo   text -> shards -> pre-training -> continued pre-training -> what was learned and what was forgotten
# make test   the whole test suite          make check   format, lint, types          make       both
# make soak   hours of random damage and kills, gone on with when started again: make soak FOLDER=soak SEED=0
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# megatron-core reads our shards in the tests, and they look at what flash-attn-4's functions take; both are installed
# alone because their dependencies want a GPU.
INSTALLED := $(VENV)/.installed

all: check test

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps megatron-core flash-attn-4
	touch $@

demo: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(nproc)} $(BIN)/fastcpt demo --output demo

# One thread a test process: tiny models lose more to waiting for each other than they gain.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal --durations 10

# 10,000,000 lines, 10,000 files, 10,000 corruptions, 200 kills, 10,000 checkpoints, 100 signals, 100 hangs; in training 450
# kills, 30 restarts by torchrun, 300 injections; prints tallies.
FOLDER ?= soak
SEED   ?= 0
soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py all --seed $(SEED) $(FOLDER)

# mypy reads an installed copy: no static tool sees that kernels/ is imported as fastcpt.kernels.
check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	copy=$$(mktemp -d) && $(BIN)/pip install --quiet --no-deps --target $$copy . \
	  && cp pyproject.toml $$copy/ && (cd $$copy && $(CURDIR)/$(BIN)/mypy -p fastcpt); status=$$?; rm -rf $$copy build; exit $$status

# Both packages, checked, and the wheel tried in an environment that has nothing else.
dist: $(INSTALLED)
	rm -rf dist build
	$(BIN)/pip install --quiet build twine
	$(BIN)/pyproject-build --outdir dist . && $(BIN)/twine check --strict dist/*
	smoke=$$(mktemp -d) && $(PYTHON) -m venv $$smoke/env \
	  && $$smoke/env/bin/pip install --quiet --constraint constraints.txt torch numpy \
	  && $$smoke/env/bin/pip install --quiet --constraint constraints.txt dist/*.whl \
	  && cd $$smoke && env/bin/fastcpt --version && env/bin/fastcpt demo --quick --output demo \
	  && env/bin/fastcpt verify demo/runs/replay && env/bin/fastcpt export demo/runs/replay --output model; \
	  status=$$?; rm -rf $$smoke $(CURDIR)/build; exit $$status

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info demo soak

.PHONY: all demo test soak check dist format clean
