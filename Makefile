# Everything a newcomer types. `make demo` and `make test` need Python 3.11 or later and git, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO := protos/saemonitor/v1/monitor.proto
# On CI a missing tool fails the tests that need it; at a desk they skip and say why.
PYTEST_ARGS ?= $(if $(CI),--require-tools)
# Processes that share the tests, a file each at a time; torch keeps to one thread in each.
WORKERS ?= auto

.PHONY: demo test check format protos tools lock clean

demo: $(VENV)/.demo
	$(BIN)/sae-monitor demo $(ARGS)

test: $(VENV)/.dev tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS) $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The committed stubs; tests/monitor/test_protos.py fails when they are stale.
protos: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I. --python_out=. \
	  --mypy_out=quiet:. --grpc_python_out=. --mypy_grpc_out=quiet:. $(PROTO)

# Prometheus, Alertmanager and buf for the tests that run them for real.
tools:
	tests/install_tools.sh

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: any other spec would bring the CUDA build.
$(VENV)/.torch: $(VENV)/bin/python constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .tools build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
