# Everything runs in .venv, which is made when it is missing. On Debian and Ubuntu: apt install python3-venv make gcc
PYTHON ?= python3
DATA ?=
TABLE ?=
BIN := .venv/bin

.PHONY: demo test test-slow gpu lint docs figures
.DELETE_ON_ERROR:

demo: .venv/.installed  ## train, predict and evaluate on phantoms, or on DATA=path/to/Task04_Hippocampus
	$(BIN)/nnunet-xattnres demo $(if $(DATA),--data "$(DATA)")

test: .venv/.installed  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

# nnU-Net trains on a CPU with all cores, whatever OMP_NUM_THREADS says. Threads that wait for each other must not spin.
test-slow: .venv/.installed  ## the slow tests and the feature matrix; TABLE=FILE writes the table of the matrix
	GOMP_SPINCOUNT=0 OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow or feature" -n auto --dist loadscope $(if $(TABLE),--table="$(TABLE)")

gpu: .venv/.installed  ## the Triton tests and the costs of every backend on a GPU, into results/gpu/; run it again to go on
	$(BIN)/python studies/gpu.py

lint: .venv/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed  ## the documentation site, in site/
	$(BIN)/mkdocs build --strict

figures: .venv/.installed  ## the figure of the README
	$(BIN)/python docs/draw_method.py docs/method.png

.venv/.installed: setup.cfg setup.py pyproject.toml $(wildcard nnunet_xattnres/ops/native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "apt install python3-venv first" >&2; exit 1; }
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e ".[test,lint,docs]"
	touch $@
