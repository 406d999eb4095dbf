# Two commands: `make demo` and `make test`; `make test-fast` for every edit. settings.ini says what is installed, constraints.txt in which version.
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports when it first does: compiling all of it took a minute
PIP = $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt
TOOL = $(BIN)/python tools/notebooks.py
# the first Python that is new enough and can make environments; name another with make PYTHON=...
PYTHON = $(or $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done),python3)
# the folder that load() looks into, as an absolute path; empty when there is none
override SCFORMER_DATA_DIR := $(shell [ -d "$(SCFORMER_DATA_DIR)" ] && cd "$(SCFORMER_DATA_DIR)" && pwd)
export SCFORMER_DATA_DIR
TIMEOUT := $(if $(shell command -v timeout 2>/dev/null),timeout 1800)
# the page that test-fast runs
PAGE := $(firstword $(wildcard nbs/*_binning.ipynb))
START := $(shell date +%s)
SAY = @echo "== $$(( $$(date +%s) - $(START) )) s:"

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 20

demo: $(VENV)/.core ## learn from 700 blood cells in a few minutes; results in out/demo
	@$(BIN)/scformer demo

test: $(VENV)/.dev ## prove that notebooks and package agree, then run every page and every test
	$(SAY) are the notebooks clean, package and README in sync?
	@$(TOOL) check
	@$(BIN)/ruff check -q nbs scformer_nb tests tools docs
	$(SAY) the notebooks, cell by cell
	@test -n "$$SCFORMER_DATA_DIR" || echo "SCFORMER_DATA_DIR names no folder: what needs a download is skipped"
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(TIMEOUT) $(BIN)/nbdev_test --n_workers 2 --timing --flags "$(if $(SCFORMER_DATA_DIR),data)"
	$(SAY) the tests
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.dev ## for every edit, in about two minutes: sync, style, one page, the fast tests
	@$(TOOL) check
	@$(BIN)/ruff check -q nbs scformer_nb tests tools docs
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/nbdev_test --path $(PAGE) --n_workers 1
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile -m "not slow"

# what attacks: each file of tests/stress that is a program of its own
PARTS = $(sort $(basename $(notdir $(shell grep -l __main__ tests/stress/*.py))))
stress: $(VENV)/.dev ## kill, starve and crowd the commands, in a quarter of an hour: figures/reliability.jsonl; some with PARTS="kills disk"
	@printf '%s\n' $(PARTS) | OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 xargs -P 2 -I PART \
		sh -c '$(BIN)/python tests/stress/PART.py || { echo "failed: PART"; exit 1; }'

experiments: $(VENV)/.baselines ## fill the ledgers and figures in figures/; runs that are there are kept (a night or two from nothing)
	@mkdir -p out
	@set -e; page() { for d in $$2; do $(BIN)/papermill nbs/*_$$1.ipynb out/$$1_$$d.ipynb \
		-p dataset $$d -p full True -p out figures $${3:+-y "$$3"} --log-output; done; }; \
	page exp_clustering cortex_200genes "{methods: [scFormer (paper)], seeds: [0]}"; \
	page exp_clustering "cortex cortex_200genes pbmc3k pbmc4k" \
		"{methods: [HVG, PCA, Seurat, scVI, CONCORD, scFormer, scFormer (untrained)]}"; \
	page exp_integration "kang_pbmc pancreas_5tech pbmc_3chem pancreas_baron_human \
		pancreas_baron_mouse pancreas_3studies human_cortex_m1_5k" \
		"{methods: [HVG, PCA, Seurat, Harmony, scVI, CONCORD, scFormer, scFormer (untrained)]}"; \
	page exp_gene_embeddings "kang_pbmc pancreas_5tech"; \
	page exp_ablation "pancreas_5tech pbmc_3chem"; \
	page exp_what_is_kept "pancreas_5tech"; \
	page exp_resolutions "cortex cortex_200genes pbmc3k pbmc4k"; \
	for d in pancreas_3studies pancreas_5tech pbmc_3chem kang_pbmc; do $(BIN)/papermill nbs/*_exp_resolutions.ipynb out/exp_resolutions_$$d.ipynb \
		-p dataset $$d -p batch_key batch -p full True -p out figures --log-output; done; \
	page exp_external_tokens "pancreas_5tech kang_pbmc"; \
	page exp_new_study "kang_pbmc pbmc3k"; \
	$(BIN)/papermill nbs/*_exp_new_study.ipynb out/new_study_pancreas.ipynb -p dataset pancreas_baron_human \
		-p model human_pancreas -p full True -p out figures --log-output; \
	page exp_perturbation "simulated papalexi norman"; \
	page exp_cross_species "simulated cortex pancreas pbmc"; \
	page exp_anchors "pancreas_whole pancreas pbmc"

mutants: $(VENV)/.dev ## seeded faults, one at a time in a copy: does a test or a page notice? make mutants NAMES="mask-inverted"
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -u tests/mutants.py $(NAMES)

models: $(VENV)/.core ## train the models that ship again, from registered data (some minutes on one thread)
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -c "from scformer_nb.shipped import PLANS, ship; \
	[print(ship(name, 'scformer_nb/models')) for name in PLANS]"

bench: $(VENV)/.baselines ## measure speed in full; tables in out/benchmark (an hour or two)
	@mkdir -p out
	@$(BIN)/papermill nbs/*_benchmark.ipynb out/benchmark.ipynb -p full True --log-output

atlas: $(VENV)/.dev ## what cells on disk need, in figures/atlas.jsonl and page 53: make atlas CELLS=1000000 (29 GB in FOLDER)
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python tools/atlas.py $(or $(CELLS),10000) $(or $(FOLDER),out/atlas) "$(EPOCHS)"

env: $(VENV)/.dev ## make the environment .venv with all that developers need

hooks: $(VENV)/.dev ## install nbdev's git and Jupyter hooks: clean notebooks, readable merges
	@$(BIN)/nbdev_install_hooks
	@git config merge.nbdev-merge.driver "'$(abspath $(BIN))/nbdev_merge' %O %A %B %P"
	@printf '#!/bin/sh\nexec "%s/nbdev_trust"\n' "$(abspath $(BIN))" > "$$(git rev-parse --git-path hooks)/post-merge"

outputs: $(VENV)/.dev ## run the notebooks and store what they show: make outputs NB="nbs/00_tour.ipynb" FLAGS=data,slow
	@$(TOOL) outputs $(NB) --flags "$(FLAGS)"

readme: $(VENV)/.dev ## render README.md from nbs/index.ipynb
	@$(TOOL) readme

docs: $(VENV)/.docs ## build the documentation from the stored outputs in _docs, and check its links
	$(SAY) building the documentation
	@rm -rf _docs
	@$(BIN)/sphinx-build -q -W --keep-going -j auto -d _docs/doctrees docs _docs/html
	@$(BIN)/python tools/docsite.py _docs/html
	$(SAY) the documentation is in _docs/html/index.html

lint: $(VENV)/.dev ## ruff over notebooks, tests and tools; over the package its rules on security
	@$(BIN)/ruff check nbs scformer_nb tests tools docs

sbom: $(VENV)/.dev ## write sbom.json, the list of all that is installed, as CycloneDX
	@$(PYTHON) -m venv build/sbom # of its own, so that the list does not hold the tool
	@build/sbom/bin/python -m pip install -qq --disable-pip-version-check 'cyclonedx-bom>=7,<8'
	@build/sbom/bin/cyclonedx-py environment -o sbom.json $(BIN)/python

coverage: $(VENV)/.dev ## the lines of the package that no fast test runs, in some minutes; fails below 92%; all tests with TESTS=
	@rm -f .coverage .coverage.*
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/coverage run -m pytest -q -n 2 --dist loadfile $(TESTS)
	@$(BIN)/coverage combine -q && $(BIN)/coverage report --skip-covered --fail-under=92
coverage: TESTS = -m "not slow"

compat: ## install and try the package on each Python that is there, and on the oldest versions it allows (10 minutes each)
	@python3 tools/compat.py $(COMPAT)

clean: ## remove the environment and what tools leave behind; out/ stays
	rm -rf $(VENV) build dist _docs docs/pages docs/api *.egg-info .pytest_cache .hypothesis .ruff_cache
	find nbs scformer_nb tests tools -name __pycache__ -prune -exec rm -rf {} +

INSTALLED = settings.ini setup.py constraints.txt | $(BIN)/python

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("scformer_nb needs Python 3.11 or newer, and \
	$(PYTHON) is %d.%d. Install a newer one, or name it: make PYTHON=/path/to/python3.11" % v[:2])'
	$(SAY) making $(VENV) with $(PYTHON)
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(INSTALLED)
	$(SAY) installing the tested versions, some 2 minutes
	@$(PIP) -e .
	@touch $@

$(VENV)/.baselines: $(INSTALLED)
	$(SAY) installing Harmony, scVI and CONCORD too, some 2 minutes
	@$(PIP) -e '.[baselines]'
	@touch $(VENV)/.core $@

$(VENV)/.dev: $(INSTALLED)
	$(SAY) installing all that notebooks and tests need, in one go, some 2 minutes
	@$(PIP) -e '.[baselines,dev]'
	@touch $(VENV)/.core $(VENV)/.baselines $@

$(VENV)/.docs: $(INSTALLED)
	$(SAY) installing what the documentation needs too, some 20 seconds
	@$(PIP) -e '.[docs]'
	@touch $(VENV)/.core $@

.PHONY: help demo test test-fast stress mutants experiments models bench atlas coverage compat env hooks outputs readme docs lint sbom clean
