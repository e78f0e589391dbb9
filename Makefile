# make run: the environment, then the whole default grid as by `dvc repro`, ending in results/report/index.html
# make paper: the paper's grid on GEO-Bench: params.yaml, what it will take, and the run
# make test: the environment, then the tests
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: run paper test lint clean

run: .venv/ready
	python -m stages.repro

paper: .venv/ready
	python -m stages.profile --name paper
	python -m stages.plan
	dvc repro

test: .venv/ready
	ruff check .
	ruff format --check .
	pytest

# The pip that comes with Python 3.11 takes twice as long to fetch a large wheel as a new one. pip byte-compiles on one
# core; compileall does it on all, and every stage starts twice as fast for it. What is left out, a third of all
# source, is hardly ever imported, and is compiled by whoever imports it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	pip install --quiet --disable-pip-version-check --upgrade pip
	pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[test]"
	python -m compileall -q -j 0 -x 'site-packages/(.*/tests?/|transformers/models/|diffusers/pipelines/)' .venv/lib \
	  > .venv/compile.log || true
	touch $@

lint: .venv/ready
	ruff check --fix .
	ruff format .

clean:
	rm -rf .venv data results/runs results/tune results/compose results/distill results/export results/map \
	  results/cost.csv results/report
