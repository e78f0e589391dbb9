# make run: build the environment, then run the whole default grid, ending in results/report/index.html
# make paper: run the paper's grid on GEO-Bench: write params.yaml, estimate bytes and hours, run
# make test: build the environment, then lint, check types and test
# make lint: format and check
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: run paper test lint clean

run: .venv/ready
	dvc repro

paper: .venv/ready
	python -m stages.profile --name paper
	python -m stages.validate
	python -m stages.plan
	dvc repro

test: .venv/ready
	ruff check .
	ruff format --check .
	mypy
	pytest

lint: .venv/ready
	ruff check --fix .
	ruff format .
	mypy

# uv installs on all cores, from pip's index; without uv, pip installs. compileall compiles on all cores, and every stage
# starts twice as fast for it. The excluded packages, two fifths of all source, are rarely imported.
RARE = .*/tests?/|transformers/models/|diffusers/pipelines/|torch/(testing|_inductor|_vendor)/|sqlalchemy/|fontTools/|pygments/|setuptools/|skimage/
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	pip install --quiet --disable-pip-version-check -c constraints.txt uv && \
	  UV_DEFAULT_INDEX="$${PIP_INDEX_URL:-$$(pip config get global.index-url 2> /dev/null)}" \
	  uv pip install --quiet --python .venv -c constraints.txt -e ".[test]" || \
	  pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[test]"
	python -m compileall -q -j 0 -x 'site-packages/($(RARE))' .venv/lib > .venv/compile.log || true
	touch $@

clean:
	rm -rf .venv data results/[!m]* results/map
