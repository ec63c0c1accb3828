# make demo: set up, build the demo world, train, evaluate.  make test: set up, run the tests.  Both skip what is done.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
WORLD := data/demo_world
TORCH_THREADS := OMP_NUM_THREADS=1
# Tests run in an order of their own each time; make test SEED=… repeats one.
SEED ?= $(shell date +%s)

.PHONY: demo lint test test-slow clean

# An environment is marked as whole only when everything is installed, so a broken set-up is done again.
$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11 demo"'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed requirements-test.txt
	$(RUN) -m pip install -q -r requirements-test.txt
	$(RUN) -m pip install -q --no-deps "geoclip>=1.3"  # for its weights: its code is read by one test only
	touch $@

demo: $(VENV)/.installed
	$(RUN) -m datasets.build demo $(WORLD)
	$(RUN) -m experiments.demo --dataset_path $(WORLD)

lint: $(VENV)/.installed-tests
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check .

test: lint
	$(TORCH_THREADS) $(RUN) -m pytest -q -m "not slow" --randomly-seed=$(SEED) tests

test-slow: $(VENV)/.installed-tests
	$(TORCH_THREADS) $(RUN) -m pytest -q -m slow --randomly-seed=$(SEED) tests

clean:
	rm -rf logs data/demo_world
