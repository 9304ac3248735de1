# make demo       two recipes at one budget on a real 135M-parameter model, and the page that compares them
# make check      linters, import contracts, types, language, the page of settings
# make test-fast  unit, numerics and document tests
# make test       the whole suite
# make serving  the environments of vLLM, llama.cpp and ONNX Runtime, in .serving (ENGINES='vllm llama_cpp onnx converter')
# make test-serving  students in these engines, compared with transformers; skipped where they are not installed
# make coverage   test-fast with line coverage
# make bench      rows of the side-by-side table (an hour each on two cores), and the table
# Each sets everything up first.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
INDEX  ?=
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
ROWS   ?= best,pangu_light,minitron
SHARE  ?= 25

ENGINES ?= vllm llama_cpp onnx converter

WORKERS ?= 2
DEMO    ?= budget.parameters=0.75 distill.tokens=16384 local_distill.tokens=16384 evaluate.tokens=8192
FAST   := -m "(unit or numerics or docs) and not slow and not stages"

.PHONY: setup demo test test-fast serving test-serving coverage check bench clean
setup: $(STAMP)

$(STAMP): pyproject.toml requirements/demo.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(if $(INDEX),--index-url '$(INDEX)') '$(TORCH)'
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[demo,dev]'
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/demo.txt
	touch $@

demo: setup
	$(RUN) -m pipeline run=demo --multirun recipe=pangu_light,best $(DEMO)

test: setup
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile

test-fast: setup
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile $(FAST)

serving:
	PYTHON=$(PYTHON) tests/serving/environment.sh $(ENGINES)

test-serving: setup
	$(RUN) -m pytest tests/serving

coverage: setup
	$(RUN) -m pytest $(FAST) --cov --cov-report=term

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(RUN) -m mypy
	$(RUN) .ci/check_language.py
	$(RUN) -m pipeline.cli.reference docs/settings.md

bench: setup
	$(RUN) benchmarks/quality/texts.py
	$(RUN) benchmarks/quality/run.py --rows $(ROWS) --removed $(SHARE)
	$(RUN) benchmarks/quality/table.py

clean:
	rm -rf $(VENV) build *.egg-info
