# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv first.

PYTHON ?= python3
READY := .venv/ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: setup demo test nightly docs lint wheel clean

demo: setup
	bash launch/demo.sh

# One thread a process: two ranks on two cores wait for each other otherwise.
test: setup lint
	bash tests/slurm/install.sh
	OMP_NUM_THREADS=1 python -m pytest

# What takes long: `pytest -m nightly`.
nightly: setup
	OMP_NUM_THREADS=1 python -m pytest -m nightly

# The documentation as a site, to be opened in a browser: site/index.html.
docs: setup
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

lint: setup
	ruff check .
	ruff format --check .

# dist/: the sdist, and the wheel made from it.
wheel: setup
	rm -rf dist *.egg-info # whose list of files would come back
	python -m build --no-isolation

setup: $(READY)

$(READY): requirements.txt setup.py launch/setup.sh
	bash launch/setup.sh "$(PYTHON)"

clean:
	rm -rf .venv build dist site *.egg-info
