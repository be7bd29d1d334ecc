# `make help` lists the targets. All that is needed beforehand is Python 3.11 or newer, with pip.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Test processes. XLA's compiler keeps a core and a half busy by itself.
JOBS ?= 2
PEERS ?=
PROMPT ?= Tell me a short story about a lighthouse keeper and a whale.
export PROMPT

PY := $(VENV)/bin/python
# -q -q: errors only, as pip also warns of each find-links folder that it skips.
PIP := $(PY) -m pip --disable-pip-version-check -q -q

.DEFAULT_GOAL := help
.PHONY: help demo test bench docs lint venv
.NOTPARALLEL:  # two pips in one environment break it

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' Makefile
	@echo "  make test keeps compiled programs in ~/.cache/jaxkv/tests-xla, or in JAX_COMPILATION_CACHE_DIR"
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) ARGS=\"more arguments\" JOBS=2 PROMPT=\"...\" PEERS=1"

demo: $(VENV)/.models ## stream a story from SmolLM2-135M on the CPU (93 MB, fetched once)
	@$(PY) scripts/generate.py --model smollm2 --chat --prompt "$$PROMPT" \
		--max-tokens 200 --temperature 0.7 --seed 7 $(ARGS)

# Compiled programs are kept below XDG_CACHE_HOME or ~/.cache, in jaxkv/tests-xla, which
# may be deleted at any time; JAX_COMPILATION_CACHE_DIR=folder names another folder.
test: $(VENV)/.test ## run the tests; ARGS="-m 'not slow'" leaves out the slow ones
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

bench: $(VENV)/.models $(if $(PEERS),$(VENV)/.bench) ## measure generation; PEERS=1 installs torch, transformers, llama.cpp
	$(PY) scripts/bench/generate.py $(ARGS)

lint: $(VENV)/.test ## check with ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

docs: $(VENV)/.docs ## build the documentation's site, strictly, into build/site
	$(PY) docs/support_matrix.py --check
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

venv: $(VENV)/.test ## only make the environment: jaxkv, the models' and the tests' packages

# Each stamp is touched last, so an interrupted install is done again.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: no $(PYTHON) here: install Python 3.11 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: jaxkv needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name another with PYTHON=..." % sys.version_info[:2])'
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@# --clear only what was an environment: VENV may name any folder. Debian's Python has no
	@# ensurepip; its pip then installs one.
	@clear=$$(test ! -f $(VENV)/pyvenv.cfg || echo --clear); \
	$(PYTHON) -m venv $$clear $(VENV) >/dev/null 2>&1 || \
		{ $(PYTHON) -m venv --without-pip $$clear $(VENV) && \
		$(PYTHON) -m pip --python $(PY) install -q -q pip; }
	@touch $@

$(VENV)/.models: $(VENV)/.made pyproject.toml
	@echo "Installing jaxkv[models] into $(VENV) (JAX and Flax: about 800 MB, minutes the first time)"
	@$(PIP) install -e '.[models]'
	@touch $@

$(VENV)/.test: $(VENV)/.made pyproject.toml
	@echo "Installing jaxkv[test] into $(VENV) (JAX, Flax, pytest: about 1.1 GB, minutes the first time)"
	@$(PIP) install -e '.[test]'
	@touch $(VENV)/.models $@

$(VENV)/.docs: $(VENV)/.made pyproject.toml
	@echo "Installing jaxkv[docs] into $(VENV)"
	@$(PIP) install -e '.[docs]'
	@touch $(VENV)/.models $@

$(VENV)/.bench: $(VENV)/.made pyproject.toml
	@echo "Installing jaxkv[bench] into $(VENV) (torch: several GB; llama.cpp is compiled: ten minutes)"
	@$(PIP) install -e '.[bench]'
	@touch $(VENV)/.models $@
