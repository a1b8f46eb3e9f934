# Every target makes the environment it needs: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-browser lint format clean

demo: $(VENV)/.demo
	$(BIN)/tinymodal demo

# torch first and alone, so that the pinned build is taken and nothing else chooses another one.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,eval]'
	touch $@

$(STAMP): $(VENV)/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,eval,data,hub,train,quant,serve,export,dev]'
	# Alone: it would bring torchvision, of which nothing here is used.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps timm==1.0.31
	touch $@

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Two workers with a thread each: two threads in each of two processes would fight over two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow --timeout 600

# Debian's browser and its driver belong to the machine; all else to the environment. A browser now and then
# draws late: what failed is tried once more, and only what fails twice counts.
test-browser: $(STAMP)
	{ command -v chromium && command -v chromedriver; } >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; } \
	  || echo "No chromium could be installed here: the browser tests are skipped."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser,serve]'
	$(BIN)/pytest -m browser --timeout 900 tests/browser || $(BIN)/pytest -m browser --timeout 900 --last-failed tests/browser

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
