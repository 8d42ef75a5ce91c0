# Everything from a clean checkout: each target installs what it needs first, into $(VENV).
#
#   make quickstart                    train, evaluate, export and ask a small T5, on CPU
#   make test                          the checks; Python 3.11 to 3.13 and make are all they need
#   make test-smoke PYTHON=python3.12 VENV=.venv-py312      a part of them with another Python

VENV ?= .venv
BIN := $(VENV)/bin

# The first of these that starts and that the packages support. A name alone says little: pyenv
# leaves commands on the path that only report that they are not there.
SUPPORTED := import ensurepip, sys, venv; assert (3, 11) <= sys.version_info < (3, 14)
ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
endif
VERSION := $(shell $(PYTHON) -c '$(SUPPORTED); print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

# The versions tested together. jax and flax of Python 3.11 are older than those of 3.12 and later.
CONSTRAINTS := constraints/$(if $(filter 3.11,$(VERSION)),py311,py312).txt

INSTALLED := $(VENV)/.installed-$(VERSION)
# Of the version that the Dockerfile has.
CONTAINER_PYTHON ?= python3.12

# What the parity tests compare with, of which nothing else makes use. No version of torch is
# among those tested for Python 3.12: there these tests skip.
TORCH_INSTALLED := $(if $(filter 3.11,$(VERSION)),$(VENV)/.torch-installed-$(VERSION))

# What is imported is compiled when it is, and the rest of so many packages never. seqeval's old
# setup.py only builds apart from the setuptools that is installed here.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile --use-pep517 --disable-pip-version-check \
	-c $(CONSTRAINTS)

# Compiling takes one core; files stay whole, because their tests share what they have trained, and
# come in the order of tests/conftest.py.
PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help
help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: install
install: $(INSTALLED)  ## make the environment and put t5jax into it, for CPU

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
ifeq ($(VERSION),)
	@echo "$(if $(PYTHON),$(PYTHON) does not run or is not,there is no) Python 3.11, 3.12 or 3.13" \
	  "with its venv module (Debian and Ubuntu: apt install python3-venv); install one, or name" \
	  "it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2
	@exit 1
endif
	[ -x $(BIN)/pip$(VERSION) ] || $(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.torch-installed-%: $(VENV)/.installed-%
	$(PIP_INSTALL) -e '.[torch]'
	@touch $@

.PHONY: quickstart
quickstart: install  ## train a small T5 for some minutes, evaluate, export and ask it
	$(BIN)/t5jax train quickstart
	$(BIN)/t5jax eval runs/quickstart --split test
	$(BIN)/t5jax export runs/quickstart runs/quickstart/export --overwrite
	$(BIN)/t5jax infer runs/quickstart/export --prompt \
	  "Translate English to French: two hundred and forty-one" \
	  "How is 1984 spelled?" \
	  "Which number is seven thousand and eleven?"
	@echo
	@echo 'Next, a prompt of your own:'
	@echo "  $(BIN)/t5jax infer runs/quickstart/export --prompt 'How do you say ninety in German?'"

.PHONY: install-torch
install-torch: install $(TORCH_INSTALLED)

.PHONY: test
test: install-torch  ## every test
	$(BIN)/python -m pytest $(PARALLEL)

.PHONY: test-fast
test-fast: install  ## the tests of a few seconds each, without torch
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not hf'

.PHONY: test-faults
test-faults: install  ## kills, damage and hostile input by the hundred; writes docs/reliability.md
	$(BIN)/python tests/faults/long.py

# What may differ between versions of jax and Python: the outputs of every network, gradients, dropout
# and scanned layers, files, a mesh, one task and one run. The curves have gradients of each kind.
NUMERICS := conformance/test_numerics.py
LAYERS := $(NUMERICS)::test_scanned_unrolled_and_recomputed_are_the_same_with_dropout
SMOKE := $(NUMERICS)::test_outputs_are_those_of_transformers $(NUMERICS)::test_golden_dropouts \
	'$(LAYERS)[t5_1_0]' '$(LAYERS)[gemma3]' test_curves.py \
	conformance/test_huggingface_files.py::test_golden_folder \
	conformance/test_huggingface_files.py::test_every_published_size_has_a_row_for_each_leaf \
	test_checkpoint.py test_packaging.py data/test_fingerprint.py tasks/test_numbers.py tokenizers \
	test_sharding.py::test_a_mesh_trains_as_one_device_does \
	test_train.py::test_loss_falls_and_metrics_have_each_step_once \
	test_train.py::test_resumed_run_ends_in_the_same_bits

.PHONY: test-smoke
test-smoke: install  ## numerics and a run, for a second Python
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not hf' $(addprefix tests/,$(SMOKE))

.PHONY: lint
lint: install  ## rules, format and types: ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: docs
docs: install  ## the site of docs/, in build/site/
	$(BIN)/python -m sphinx -W -n --keep-going -q docs build/site
	@echo 'build/site/index.html'

.PHONY: docs-links
docs-links: install  ## ask every address that the site links to; needs the network
	$(BIN)/python -m sphinx -b linkcheck -q docs build/links

.PHONY: release
release:  ## check, build, install and list the version TAG=v0.2.0; uploads nothing
	$(PYTHON) -m release $(TAG)

.PHONY: gcp-flags
gcp-flags: install  ## let this machine's gcloud CLI parse every command of gcp/
	PYTHONPATH=. $(BIN)/python tests/gcp/gcloud_flags.py

.PHONY: container-steps
container-steps:  ## run the steps of the Dockerfile in build/container, without an engine
	rm -rf build/container
	$(PYTHON) tests/container.py build/container --python $(CONTAINER_PYTHON)

.PHONY: clean
clean:  ## remove environments, caches and builds; runs/ stays
	rm -rf $(VENV) .venv-* build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
