# make demo | make test | make lab | make site | make bench | make bench-gpu | make table-streets        each makes .venv from requirements.lock first when it is missing or stale
PYTHON ?= python3
PY     ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-browser lab site readme export bench bench-gpu table-streets table-photographs table-frames clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

venv: $(STAMP)  ## the development environment, pinned by requirements.lock

# The environment is rebuilt when the lock changes and the package installed again when its metadata does.
$(STAMP): requirements.lock setup.py settings.ini
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or later is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@cmp -s requirements.lock $(VENV)/.lock || { echo "installing the pinned environment into $(VENV) (about two minutes)"; \
	  $(BIN)/python -m pip install -q -r requirements.lock && cp requirements.lock $(VENV)/.lock; }
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@; echo "$(VENV) is ready: source $(VENV)/bin/activate"

demo: $(STAMP)  ## from source alone to MixTeacher with 21 labels on drawn streets, demo/report.html (six minutes on two cores)
	$(BIN)/protonb demo --out demo

test: $(STAMP)  ## what CI checks, but for the browser: export, clean, README, all notebooks, pytest
	$(BIN)/python tools/check.py

lab: $(STAMP)  ## JupyterLab, opened on the tour
	$(BIN)/jupyter lab --config tools/lab.py

site: $(STAMP)  ## the book and its reference as pages: site/index.html (needs npm)
	$(BIN)/python tools/site.py

test-browser: $(STAMP)  ## site and JupyterLab in a headless Chromium, which is installed when missing; K='not 01_tour' leaves tests out
	$(BIN)/python tools/chromium.py
	$(BIN)/python tools/site.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup --durations 8 $(if $(K),-k "$(K)") tests/browser

export: $(STAMP)  ## notebooks -> protonb/, cleaned, pictures in 256 colours, README.md
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/pictures.py
	$(BIN)/python tools/readme.py

readme: $(STAMP)  ## nbs/index.ipynb -> README.md
	$(BIN)/python tools/readme.py

bench: $(STAMP)  ## CPU benchmarks of all operations against their peers, goals asserted (5 minutes, a quiet machine)
	$(BIN)/python benchmarks/bench.py --device cpu

bench-gpu:  ## GPU tests, then benchmarks; runs with PY=python from a checkout, no installation (8 minutes)
	$(PY) benchmarks/bench.py --device cuda

table-streets: $(STAMP)  ## benchmarks/streets.csv: methods and controls on drawn streets, but DIP, PixDA, ProDA (two hours on two cores; goes on where it was stopped)
	$(BIN)/protonb compare benchmarks/streets.toml --jobs 2 --only start source_only oracle fine_tuning joint iapc pbal views wdass mixteacher
	cp runs/streets/results.csv benchmarks/streets.csv

table-photographs: $(STAMP)  ## benchmarks/photographs.csv and longer.csv: the same on CARLA -> CamVid, DATA=folder (a day on two cores; goes on where it was stopped)
	$(BIN)/protonb compare benchmarks/photographs.toml --root "$(DATA)" --jobs 2
	cp runs/photographs/results.csv benchmarks/photographs.csv
	$(BIN)/protonb compare benchmarks/longer.toml --root "$(DATA)" --jobs 2
	cp runs/photographs/results.csv benchmarks/longer.csv

table-frames: $(STAMP)  ## benchmarks/frames.csv: the same with 13 and 27 of CARLA's frames, no labels, DATA=folder (an hour and a half)
	for n in 13 27; do $(BIN)/protonb compare benchmarks/statistics.toml --root "$(DATA)" --jobs 2 --out runs/frames$$n \
	  --networks pbal_mobilenetv2 \
	  --source "carla:{root}/carla,size=273x361,cache=true,count=$$n" --only start source_only "mixteacher none" || exit; done
	head -n 1 runs/frames13/results.csv > benchmarks/frames.csv
	for n in 13 27; do tail -n +2 runs/frames$$n/results.csv | sed "s/$$/$$n source images/"; done >> benchmarks/frames.csv

clean:  ## remove caches and the demo's output, keep .venv
	rm -rf demo site _docs build dist *.egg-info .pytest_cache _proc
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
