# Every target uses a virtual environment, which `make setup` makes. On a machine without a package
# registry, or with its own torch:  make test VENV= PYTHON=/path/to/python3
PYTHON ?= python3
VENV ?= .venv
ifeq ($(strip $(VENV)),)
  PY := $(PYTHON)
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif
export LOCAL_KERNELS ?= org/flash-attention=$(CURDIR)
export HF_HUB_OFFLINE ?= 1

.PHONY: setup build demo example test test-ci lint aot benchmark clean

setup: $(READY)

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	touch $@

build: $(READY)
	$(PY) tools/build.py

demo: build
	$(PY) demo.py

example: build
	$(PY) example.py

test: build lint
	$(PY) -m pytest --numprocesses 2

# What the Hub runs: under a minute.
test-ci: build
	$(PY) -m pytest -m kernels_ci

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

aot: build
	$(PY) tools/aot.py --csv benchmarks/results/aot.csv

benchmark: build
	$(PY) benchmarks/run.py

clean:
	rm -rf build .venv .pytest_cache .ruff_cache
