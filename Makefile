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

# uv installs on all cores, from pip's index; where it cannot be had or cannot reach one, pip does it. compileall
# compiles on all cores too, and every stage starts twice as fast for it. What is left out, two fifths of all source,
# is hardly ever imported, and is compiled by whoever imports it.
RARE = .*/tests?/|transformers/models/|diffusers/pipelines/|torch/(testing|_inductor|_vendor)/|sqlalchemy/|fontTools/|pygments/|setuptools/|skimage/
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	pip install --quiet --disable-pip-version-check -c constraints.txt uv && \
	  UV_DEFAULT_INDEX="$${PIP_INDEX_URL:-$$(pip config get global.index-url 2> /dev/null)}" \
	  uv pip install --quiet --python .venv -c constraints.txt -e ".[test]" || \
	  pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[test]"
	python -m compileall -q -j 0 -x 'site-packages/($(RARE))' .venv/lib > .venv/compile.log || true
	touch $@

lint: .venv/ready
	ruff check --fix .
	ruff format .

clean:
	rm -rf .venv data results/runs results/tune results/compose results/distill results/export results/map \
	  results/cost.csv results/rates.csv results/report
