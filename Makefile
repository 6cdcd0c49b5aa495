# Everything here can be run again: what is already done is not done twice.
#   make install   .venv with the pinned set (constraints.txt)
#   make demo      install, then the demonstration: SFT, then RAO, on four local ranks of this machine's CPU
#   make test      install, then ruff, mypy and the test suite
#   make test-slurm   install, then the tests that run jobs on a real SLURM, which is installed as root
#   make test-matrix  install, then the test suite with the NeMo and megatron-core of NVIDIA's containers (MATRIX)
#   make lint      ruff, mypy, shellcheck and hadolint alone;  make format  applies ruff's fixes
#   make bench     install, then all benchmarks; make bench BENCH=step one;  make bench-page  docs/performance.md
#   make precision   install, then the accuracy of number formats; make precision-page  docs/precision.md from it
#   make clean     removes caches and builds;  make distclean  removes .venv and those of test-matrix too
#
# Variables, as in `make install PYTHON=python3.12`:
#   PYTHON           the interpreter that .venv is made from: 3.10, 3.11 or 3.12
#   TORCH_INDEX_URL  a further package index, asked before PyPI's CUDA build of torch is taken. A machine without a GPU
#                    saves gigabytes with TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#   DEMO_ARGS        passed to `nemo-rao demo`;  PYTEST_ARGS  passed to pytest
#   BENCH            of benchmarks/, such as step;  BENCH_ARGS  passed to it
#   MATRIX           containers whose versions are tested: 25.09, 25.11 or both;  make test-matrix-25.11  one of them
#   TEST_PROCESSES   that share the test files; each imports NeMo, and its multi-rank tests use two to four cores

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.10 python3,$(shell command -v $(name) 2>/dev/null)))
TORCH_INDEX_URL ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH ?= log_probs step scaling start_up profile_step
BENCH_ARGS ?=
TEST_PROCESSES ?= 2
MATRIX ?= 25.09 25.11

# Of NVIDIA's containers, in the last patch releases; containers/README.md.
VERSIONS_25.09 := nemo_toolkit==2.5.3 megatron-core==0.14.0
VERSIONS_25.11 := nemo_toolkit==2.6.2 megatron-core==0.15.3

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --no-input --disable-pip-version-check

.PHONY: install demo test test-matrix test-slurm lint format bench bench-page precision precision-page constraints clean
.PHONY: distclean
.DELETE_ON_ERROR:
.PRECIOUS: $(VENV)-%/.installed

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python found; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
	  { echo "error: $(PYTHON) is not Python 3.10, 3.11 or 3.12; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) install --progress-bar on $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
	  --constraint constraints.txt --editable '.[dev]'
	$(PIP) check
	@touch $@

demo: install
	$(BIN)/nemo-rao demo $(DEMO_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run containers/*.sh
	$(BIN)/hadolint containers/Dockerfile

test: lint
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

# A virtual environment of the container's NeMo and megatron-core alone, in front of the packages of $(VENV).
$(VENV)-%/.installed: $(INSTALLED)
	$(if $(VERSIONS_$*),,$(error MATRIX: no container $*; there are 25.09 and 25.11))
	rm -rf $(VENV)-$*
	$(BIN)/python -m venv --without-pip $(VENV)-$*
	$(PIP) --python $(VENV)-$*/bin/python install --no-deps $(VERSIONS_$*)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > "$$($(VENV)-$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth"
	@touch $@

test-matrix: $(MATRIX:%=test-matrix-%)

# Programs such as shellcheck are those of $(VENV).
test-matrix-%: $(VENV)-%/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(VENV)-$*/bin/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile \
	  $(PYTEST_ARGS)

test-slurm: install
	$(BIN)/python -m pytest --slurm tests/slurm $(PYTEST_ARGS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	set -e; for name in $(BENCH); do $(BIN)/python -m benchmarks.$$name $(BENCH_ARGS); done

bench-page: install
	$(BIN)/python -m benchmarks.page > docs/performance.md.new && mv docs/performance.md.new docs/performance.md

precision: install
	$(BIN)/python -m benchmarks.precision $(BENCH_ARGS)
	$(MAKE) precision-page

precision-page: install
	$(BIN)/python -m benchmarks.precision_page > docs/precision.md.new && mv docs/precision.md.new docs/precision.md

constraints:
	@command -v uv >/dev/null || { echo "error: this target needs uv (https://docs.astral.sh/uv)" >&2; exit 2; }
	@head=$$(sed -n '/^#/p' constraints.txt) && \
	uv pip compile pyproject.toml --extra dev --extra eval --universal --python-version 3.10 --no-emit-package nemo-rao \
	  --no-header --no-annotate --quiet --output-file constraints.txt && \
	{ echo "$$head"; sed '/^#/d' constraints.txt; } > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find nemo_rao tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV)-25.09 $(VENV)-25.11
