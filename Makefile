# Everything runs in a virtual environment in $(VENV). `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
READY = $(VENV)/.ready
# The tested versions; `make setup CONSTRAINTS=` installs the newest ones.
CONSTRAINTS ?= constraints.txt
PIP = $(PY) -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# pip's output goes to a log, which is printed if pip fails.
SETUP_LOG = $(VENV)/setup.log
CRF_LOG = $(VENV)/crf.log
NOTEBOOK = $(PY) -m stego_book.notebooks
# Parameters for a notebook: make train ARGS="-p dataset camvid -p data_root FOLDER"
ARGS ?=
# make reproduce: row of the paper
ROW ?=
# make reproduce, photos, book: folder of the datasets (default data/)
DATA ?=
# make export: run folder and output file
RUN ?=
FILE ?= stego.onnx

# Quick tests of `make check`: the published code's numbers, imports between modules, the pages.
QUICK = tests/golden tests/method/test_loss.py tests/method/test_metrics.py tests/method/test_experiment.py \
	tests/project/test_layers.py tests/book/test_book.py
# Pages checked by `make links`.
PAGES = README.md CONTRIBUTING.md data/README.md book/*.md book/references.bib notebooks/*.ipynb

.DEFAULT_GOAL := help
.PHONY: help setup train seeds ablations tuning export reproduce pretrain photos check test bench lab book pdf links serve clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## create the environment and install everything (CONSTRAINTS= for the newest dependencies)

$(READY): pyproject.toml book/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; this is $$($(PYTHON) --version). Choose another: make PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV) (once; about 6 GB, a few minutes) ..."
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@{ $(PY) -m pip install --quiet --upgrade pip && $(PIP) --editable '.[all]' --editable 'book[lab,render]'; } >$(SETUP_LOG) 2>&1 || { cat $(SETUP_LOG); exit 1; }
	@$(PIP) --no-build-isolation --editable '.[crf]' >$(CRF_LOG) 2>&1 || \
		echo "pydensecrf was not built (it needs a C++ compiler). Only engine=\"pydensecrf\" and its tests need it. See $(CRF_LOG)"
	@touch $@

train: $(READY)  ## train and evaluate STEGO with notebooks/train.ipynb (ARGS="-p dataset camvid": other parameters)
	@$(NOTEBOOK) notebooks/train.ipynb runs/train.ipynb $(ARGS)

seeds: $(READY)  ## train five seeds; mean and standard deviation (notebooks/seeds.ipynb)
	@$(NOTEBOOK) notebooks/seeds.ipynb runs/seeds.ipynb $(ARGS)

ablations: $(READY)  ## train the missing runs of the chapters Baselines and Ablations (66 in all, about 90 s each on one core)
	@$(NOTEBOOK) notebooks/baselines.ipynb runs/baselines.ipynb -p limit -1 $(ARGS)
	@$(NOTEBOOK) notebooks/ablations.ipynb runs/ablations.ipynb -p limit -1 $(ARGS)

tuning: $(READY)  ## train the missing runs of the appendix on shifts (ARGS="-p camvid_root FOLDER -p camvid_backbone FILE" adds CamVid)
	@$(NOTEBOOK) notebooks/choosing_evidence.ipynb runs/choosing_evidence.ipynb -p limit -1 $(ARGS)

export: $(READY)  ## export a run to ONNX: make export RUN=runs/NAME (FILE=stego.onnx by default)
	@$(PY) -c "import sys; from stego_lib import load_run; from stego_lib.export import export_onnx; export_onnx(load_run(sys.argv[1]), sys.argv[2])" "$(RUN)" "$(FILE)"

reproduce: $(READY)  ## reproduce a row of the paper: make reproduce ROW=cityscapes-vitb8 DATA=FOLDER (notebooks/reproduce.ipynb)
	@$(NOTEBOOK) notebooks/reproduce.ipynb "runs/reproduce-$(ROW).ipynb" -p row "$(ROW)" $(if $(DATA),-p data_root "$(DATA)") $(ARGS)

pretrain: $(READY)  ## train the embedded backbone for scenes (notebooks/pretrain_scenes.ipynb; an hour on two cores)
	@$(NOTEBOOK) notebooks/pretrain_scenes.ipynb runs/pretrain_scenes.ipynb $(ARGS)

photos: $(READY)  ## train the embedded backbone for photographs: make photos DATA=FOLDER with photos/, photos_more/ and camvid/ (notebooks/pretrain_photos.ipynb)
	@$(NOTEBOOK) notebooks/pretrain_photos.ipynb runs/pretrain_photos.ipynb $(if $(DATA),-p data_root "$(DATA)") $(ARGS)

check: $(READY)  ## run the pre-commit hooks on every file and the quick tests (a minute)
	@VENV=$(VENV) $(PY) -m pre_commit run --all-files
	@OMP_NUM_THREADS=1 $(PY) -m pytest --durations=0 --durations-min=5 $(QUICK) $(ARGS)

test: $(READY)  ## run ruff, mypy and all tests (minutes)
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

bench: $(READY)  ## compare speed and memory with a plain re-implementation; writes benchmarks/results (half an hour; ARGS="step evaluation": only these rows)
	@$(PY) -m benchmarks $(ARGS)

lab: $(READY)  ## open JupyterLab on the notebooks
	@$(PY) -m jupyter lab --notebook-dir=. notebooks/train.ipynb

book: $(READY)  ## run the chapters, render and check book/_build/html (DATA=FOLDER: with FOLDER/camvid; ARGS=--no-run: only render)
	@$(PY) -m stego_book.build $(if $(DATA),--data "$(DATA)") $(ARGS)

pdf: $(READY)  ## the same, and the whole book as one PDF, linked from its welcome page (needs Chromium)
	@$(PY) -m stego_book.build --pdf $(if $(DATA),--data "$(DATA)") $(ARGS)

links: $(READY)  ## check external links of the pages and the bibliography (needs the network)
	@$(VENV)/bin/lychee --include-fragments --no-progress $(PAGES) $(ARGS)

serve: $(READY)  ## serve the rendered book at http://localhost:8000
	@test -f book/_build/html/index.html || { echo "There is no rendered book. Run: make book"; exit 1; }
	@$(PY) -m http.server 8000 --bind 127.0.0.1 --directory book/_build/html

clean:  ## remove build outputs (keeps the environment, data and runs)
	@rm -rf book/_build build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage*
