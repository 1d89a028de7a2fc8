# The same few verbs everywhere: make install | check | lint | test | test-long | docs | demo | bench | clean
PYTHON ?= python3
BIN := .venv/bin
WEB := src/lmworks/export/web
LLAMA_CPP := tests/export/llama_cpp
INSTALLED := .venv/.installed
WORKERS ?= 2

.PHONY: install check lint test test-long docs demo bench clean

install: $(INSTALLED)

# torch first and pinned: without it, pip would fetch the build for graphics cards, several gigabytes
$(INSTALLED): pyproject.toml constraints.txt hatch_build.py $(WEB)/package.json $(WEB)/package-lock.json $(LLAMA_CPP)/package-lock.json
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	$(BIN)/python hatch_build.py
	-cd $(LLAMA_CPP) && npm ci --silent --ignore-scripts --omit=optional --no-audit --no-fund  # x86 Linux only
	touch $(INSTALLED)

check: lint

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install
	$(BIN)/python -m pytest -m "not slow and not live" -n $(WORKERS) --dist loadfile

test-long: install
	$(BIN)/python -m pytest -m "not live" --hypothesis-profile=default

docs: install
	$(BIN)/python -m sphinx --quiet -W --keep-going docs build/docs

demo: install
	$(BIN)/lmworks build --out demo --overwrite
	@echo "Open the page: run $(BIN)/lmworks serve demo, then open http://127.0.0.1:8000/"

bench: install
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv demo dist build .mypy_cache .ruff_cache .pytest_cache $(WEB)/node_modules $(WEB)/vendor $(LLAMA_CPP)/node_modules
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
