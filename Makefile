# `make demo` and `make test` are all a fresh machine needs: Python 3.11 and a C++ compiler (llama.cpp is compiled once, about six minutes).
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/edgepack build examples/models/tiny-llama-5m --target laptop --output dist/tiny-llama-5m-laptop --force

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Side by side with llama.cpp's own tools: builds them from the sdist of llama-cpp-python first (about ten minutes, once).
bench: $(VENV)/.installed
	PYTHON=$(abspath $(BIN)/python) benchmarks/run

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
