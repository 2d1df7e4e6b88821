# farpage: set-up, demo, tests and benchmarks.
#   make setup   Debian packages of apt.txt and the virtual environment .venv
#   make demo    page a real guest through two I/O servers and lose both of them in turn
#   make claims  the first claim of the patent, clause by clause: a table of what shows each
#   make test    lint, types and the whole test suite
#   make bench   beside nbdkit, qemu-nbd, nbdcopy and host swap; mirrors beside none, clients while they move,
#                migrations beside pre-copy, costs at rest, the RAM tier's store: tables, JSON and plots in build/bench, or OUT=DIR

PYTHON ?= python3
VENV   := .venv
OUT    ?= build/bench
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
# The tests start hundreds of daemons: each would compile the sources anew where this is set.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: setup packages demo claims test lint style types suite bench clean

setup: $(READY)

packages:
	@scripts/debian-packages apt.txt

# `packages` costs a dpkg-query; it is order-only so that the environment is made anew only
# when its own inputs change.
$(READY): pyproject.toml apt.txt Makefile $(wildcard src/farpage/*/_*.pyx src/farpage/*/_*.pxd) | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "farpage: '$(PYTHON)' is not Python 3.11 or newer; say which one is: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@[ -x $(BIN)/python ] && $(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing farpage into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/farpage demo $(ARGS)

claims: setup
	@$(BIN)/python -m tests.claims

lint: style types

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# mypy takes half a minute of one core, and the tests beside it wait at times.
test: style
	@$(MAKE) --jobs=2 types suite

suite: setup
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

bench: setup
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	-$(BIN)/python -m bench.nbd --out $(OUT)
	-$(BIN)/python -m bench.workers --out $(OUT)
	-$(BIN)/python -m bench.paging --out $(OUT)
	-$(BIN)/python -m bench.guest --out $(OUT)
	-$(BIN)/python -m bench.mirror --out $(OUT)
	-$(BIN)/python -m bench.copy --out $(OUT)
	-$(BIN)/python -m bench.move --out $(OUT)
	-$(BIN)/python -m bench.migrate --out $(OUT)
	-$(BIN)/python -m bench.costs --out $(OUT)
	-$(BIN)/python -m bench.store --out $(OUT)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	rm -f src/farpage/*/_*.c src/farpage/*/_*.so
