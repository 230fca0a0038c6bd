# Every target sets up what it needs in .venv first; nothing has to be installed by hand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CSRC := $(wildcard csrc/*)

.PHONY: quickstart test test-kernels test-peers test-readers style bench bench-gpu gpu figures docs release test-matrix clean

# The main job on a real model: calibrate, initialise, fine-tune, compare with LoRA, save, reload.
quickstart: $(VENV)/.installed
	$(BIN)/lora-null quickstart $(ARGS)

# Everything that must hold, without a GPU, style first; the tests of the CUDA kernels run where a device is. A process
# for each core, each with one thread of torch: half of the tests wait for processes or compilers of their own.
test: style
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal $(ARGS)

# Every kernel and configuration, compiled for three architectures; with another Triton in a folder of its own.
TRITON ?=
OTHER := $(if $(TRITON),build/triton-$(TRITON))
test-kernels: $(VENV)/.installed
	$(if $(TRITON),test -d $(OTHER) || $(BIN)/pip install -q --no-deps --target $(OTHER) triton==$(TRITON))
	PYTHONPATH=$(OTHER) $(BIN)/python tests/support/kernel_matrix.py $(ARGS)

# PEFT's own LoRA tests, fetched with pip, with and without the fused forward; fails on any that fails only when fused.
test-peers: $(VENV)/.installed
	$(BIN)/python -m tests.peers $(ARGS)

# Readers of adapters by their own code: vLLM, mergekit, onnxruntime, llama.cpp; skips what is not there (tests/peers/readers.py).
test-readers: $(VENV)/.installed
	$(BIN)/python -m pytest -rs tests/peers/readers.py $(ARGS)

# Seconds instead of minutes; .pre-commit-config.yaml calls the same.
style: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h
	$(BIN)/python tests/support/style.py
	$(BIN)/mypy

# Every question that a CPU can answer, ours beside every peer; two cores, at most ten minutes.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks --device cpu --minutes 9 $(ARGS)

# On a machine with a GPU nothing is installed or fetched: the environment that is there, .venv or another.
HERE := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# The same on one GPU, most valuable questions first, at most nine minutes; each result is kept as it is known.
bench-gpu:
	$(HERE) -m benchmarks.gpu --prepare
	$(HERE) -m benchmarks --device cuda --minutes 8 $(ARGS)

# The first half hour on a new card: tests, comparisons, tuning, peers, one table. A second call goes on.
MINUTES ?= 28
gpu:
	$(HERE) -m benchmarks.gpu --minutes $(MINUTES) $(if $(DRY),--dry) $(ARGS)

# Plots and the README's figures from the recorded results.
figures: $(VENV)/.installed
	$(BIN)/python -m benchmarks figures $(ARGS)

# The pages in build/site; a warning is an error, and so is a link that leads nowhere. Links to other sites are not followed.
docs: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt mkdocs-material
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

# sdist and wheel in dist, each tried in an empty environment, without the repository and without a compiler.
release: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt build
	$(BIN)/python tests/support/release.py

# Both on other versions of Python, where they are on this machine, and of torch (TORCHES="2.11.0 2.13.0", as in CI; where
# an index has only CUDA builds of a version, that fetches gigabytes).
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
TORCHES ?= 2.13.0
test-matrix: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt build
	$(BIN)/python tests/support/release.py $(PYTHONS:%=--python %) $(TORCHES:%=--torch %)

# torch first and by its exact version: the extension is compiled against it.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt $(CSRC)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/pip install -q $$(grep '^torch==' constraints.txt) setuptools==$$(sed -n 's/^setuptools==//p' constraints.txt) wheel ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[test,style,bench,quickstart]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info lora_null/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
