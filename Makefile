# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each makes .venv and installs what it needs when it is not there.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# torch goes in first, by an exact pin: a range could bring several GB that are not wanted.
TORCH  := torch==2.13.0
# The lower bounds of pyproject.toml, on which `make test-oldest` runs the suite.
OLDEST := torch==2.11.0 sentence-transformers==6.0.1 transformers==5.17.0 accelerate==1.10.0 datasets==4.0.0 \
          huggingface-hub==1.5.0 safetensors==0.8.0 tqdm==4.66.3 numpy==1.26.4 pyarrow==21.0.0 jinja2==3.1.0 regex==2025.10.22 \
          lazy-loader==0.4
# Many tests start processes of their own: with several threads each, they slow one another down.
ONE    := OMP_NUM_THREADS=1
NQ     ?= ../shared/data/nq
PRESET ?= cpu
# A smoke test's figures are no results.
RESULTS = $(or $(if $(filter smoke,$(PRESET)),outputs/smoke-results),$(if $(filter gpu,$(PRESET)),$(GPU_RESULTS)/study),\
          $(if $(filter labels evidence,$(PRESET)),benchmarks/results/$(PRESET)),benchmarks/results)
GPU_RESULTS := benchmarks/results/gpu
# Runs of the study side by side on a GPU, and after how many minutes no further one is started (if anything).
AT_ONCE ?= 4
MINUTES ?=

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Packages are installed without being compiled, which takes half the time; what is imported is, at its first import.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install -q --no-compile

.PHONY: demo test test-long test-oldest test-gpu lint bench bench-selection bench-step bench-gpu report synthetic docs \
        package clean

demo: $(VENV)/.installed  ## code search over the installed packages, trained in minutes
	$(BIN)/python recipes/quickstart.py

test: $(VENV)/.installed  ## the test suite, offline
	$(ONE) $(BIN)/python -m pytest -q -m "not long" -n 2 --dist worksteal

test-long: $(VENV)/.installed  ## the tests that take minutes
	$(ONE) $(BIN)/python -m pytest -q -m long

test-gpu: $(VENV)/.installed  ## the tests that need a GPU
	$(BIN)/python -c "import torch, sys; torch.cuda.is_available() or sys.exit('torch sees no GPU')"
	$(ONE) $(BIN)/python -m pytest -q -m gpu -n 8 --dist worksteal --results $(GPU_RESULTS)/tests.json

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.installed $(if $(filter labels evidence,$(PRESET)),outputs/corpora)  ## the study on NQ=<BEIR folder>, PRESET=smoke|cpu|labels|evidence|gpu; finished runs are kept
	$(BIN)/python benchmarks/strategies.py --dataset $(NQ) --preset $(PRESET) --results $(RESULTS)
ifeq ($(PRESET),labels)
	for coverage in high low; do for share in 0 0.36; do \
	    $(BIN)/python benchmarks/pool.py --dataset $(NQ) --coverage $$coverage --own_pairs_share $$share || exit 1; done; done
	$(BIN)/python benchmarks/untrusted_teachers.py --dataset $(NQ) --max_targets 30000 --steps 300
	$(BIN)/python benchmarks/untrusted_teachers.py --dataset outputs/corpora/code --other $(NQ)
endif
	$(BIN)/python benchmarks/$(if $(filter labels evidence,$(PRESET)),$(PRESET)_report.py,report.py) --results $(RESULTS)

outputs/corpora: $(VENV)/.installed  ## two more corpora, from PyPI and from Debian's lists
	$(BIN)/python benchmarks/corpora.py code
	$(BIN)/python benchmarks/corpora.py packages

report: $(VENV)/.installed  ## the report of committed results, from their JSON
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/selection_report.py
	$(BIN)/python benchmarks/step_report.py
	$(BIN)/python benchmarks/reliability_report.py
	$(BIN)/python benchmarks/labels_report.py
	$(BIN)/python benchmarks/serving_report.py
	test ! -d benchmarks/results/evidence || $(BIN)/python benchmarks/evidence_report.py
	test ! -d $(GPU_RESULTS)/study || $(BIN)/python benchmarks/report.py --results $(GPU_RESULTS)/study

bench-selection: $(VENV)/.installed  ## what a search costs, at every size; finished settings are kept
	$(BIN)/python benchmarks/selection.py --dataset $(NQ)
	$(BIN)/python benchmarks/selection_report.py

bench-step: $(VENV)/.installed  ## what a training step costs; finished settings are kept
	$(BIN)/python benchmarks/step.py --dataset $(NQ) --preset cpu
	$(BIN)/python benchmarks/step_report.py

# Each part is made whatever has become of the others; if one of them fails, so does the whole, at its end.
bench-gpu: $(VENV)/.installed  ## everything that needs a GPU: selection, step, study, tests; finished parts are kept
	failed=0; \
	$(BIN)/python benchmarks/selection.py --dataset $(NQ) --device cuda || failed=1; \
	$(BIN)/python benchmarks/step.py --dataset $(NQ) --preset gpu || failed=1; \
	$(BIN)/python benchmarks/strategies.py --dataset $(NQ) --preset gpu --at_once $(AT_ONCE) \
	    $(if $(MINUTES),--minutes $(MINUTES)) || failed=1; \
	$(MAKE) test-gpu || failed=1; \
	$(MAKE) report || failed=1; \
	exit $$failed

synthetic: $(VENV)/.installed  ## the synthetic study of how far a corrector can follow
	$(BIN)/python recipes/synthetic_staleness.py --output benchmarks/results/synthetic

docs: $(VENV)/.installed  ## the documentation in build/docs; whatever MkDocs warns of ends it
	$(BIN)/python docs/figures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test-oldest: .venv-oldest/.installed
	$(ONE) .venv-oldest/bin/python -m pytest -q -m "not long" -n 2 --dist worksteal

package: $(VENV)/.installed  ## sdist and wheel in dist/, checked, installed and tried apart from the checkout
	rm -rf dist *.egg-info
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m venv --clear .venv-package
	.venv-package/bin/python $(INSTALL) $(TORCH)
	.venv-package/bin/python $(INSTALL) dist/*.whl
	cd / && "$(CURDIR)/.venv-package/bin/python" -c "import st_corrector; print(st_corrector.__version__, st_corrector.__file__)"
	cd / && "$(CURDIR)/.venv-package/bin/st-corrector" --help

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) $(TORCH)
	$(BIN)/python $(INSTALL) -e ".[demo,dev,docs]"
	touch $@

.venv-oldest/.installed: pyproject.toml Makefile
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(INSTALL) $(OLDEST)
	.venv-oldest/bin/python $(INSTALL) -e ".[demo,dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-package outputs build dist *.egg-info
