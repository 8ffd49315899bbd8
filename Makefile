# Two commands matter: `make app` starts the page, `make test` proves it. Both make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: app test lint fast-test examples clean

$(BIN)/activate:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.app: requirements.txt | $(BIN)/activate
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.dev: requirements.txt pyproject.toml | $(BIN)/activate
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/.app

app: $(VENV)/.app  ## start the page on the embedded default
	$(BIN)/python app.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fast-test: $(VENV)/.dev lint  ## what is quick enough to run at every save
	$(BIN)/pytest -m 'not slow and not browser'

test: $(VENV)/.dev lint  ## lint, types, all tests, the page in a browser (needs chromium)
	$(BIN)/pytest

examples: $(VENV)/.dev  ## rebuild the example cases from their sources
	$(BIN)/python examples/build_examples.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
