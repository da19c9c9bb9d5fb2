# `make help` lists the targets. Everything is installed into .venv, which is made on first use.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test slurm browser lint audit clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

install: .venv/installed ## make .venv and install the project with its development tools

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@test -d .venv || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]' | sed -u -n -E 's/^(Collecting|Downloading|Installing|Successfully) (.{0,90}).*/  \1 \2/p'
	@$(BIN)/python -c 'import sft' && touch $@

demo: install ## pre-train a small base model, fine-tune it, show what it learned (5 minutes on 2 cores)
	@$(BIN)/python scripts/demo.py

test: install ## the test suite
	@$(BIN)/python -m pytest

slurm: ## install the Debian packages that the tests on a Slurm cluster need
	@which slurmctld slurmd sbatch munged ip >/dev/null || { \
		sudo=$$([ $$(id -u) = 0 ] || echo sudo) && \
		$$sudo apt-get update -qq && \
		$$sudo apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2 >/dev/null; \
	}

browser: ## install the Debian packages that the test of the report in a browser needs
	@which chromium chromedriver >/dev/null || { \
		sudo=$$([ $$(id -u) = 0 ] || echo sudo) && \
		$$sudo apt-get update -qq && \
		$$sudo apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null; \
	}

lint: install ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: install ## look the installed packages up among known vulnerabilities; needs the network
	@$(BIN)/python -c 'import pip_audit' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check --quiet 'pip-audit>=2.7' || { echo "sft: make audit needs pip-audit, and the network to install it" >&2; exit 2; }
	@$(BIN)/python -m pip_audit --skip-editable --progress-spinner off

clean: ## remove caches and build output; runs/ and .venv stay
	rm -rf cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
