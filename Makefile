# Every target sets itself up: all that a machine needs is GNU make and Python 3.11 (3.12 for test-latest).
# The environments are cached outside the checkout; see scripts/environment.sh.

# Further arguments for pytest: make test ARGS="-k ternary -x"
ARGS ?=

# The run that docs/example-report shows
RUN ?= outputs/tiny-sft

# No telemetry, no downloads; and whichever checkout a shared environment points to, import this one.
export AXOLOTL_DO_NOT_TRACK = 1
export DO_NOT_TRACK = 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# What Triton and torch.compile made once, both lanes and every checkout use again.
CACHE = $(or $(AXOLOTL_BITNET_CACHE),$(HOME)/.cache/axolotl-bitnet)
export TRITON_CACHE_DIR ?= $(CACHE)/triton
export TORCHINDUCTOR_CACHE_DIR ?= $(CACHE)/inductor
export PYTHONPATH = $(CURDIR)/src

# Two workers, each with whole files, so that what a file's tests share (a trained run) is made once.
pytest = python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40

# $(call in,LANE) begins a recipe line that runs inside the lane's environment
in = environment=$$(scripts/environment.sh $(1)) && PATH="$$environment/bin:$$PATH" && export PATH && set -x &&

.PHONY: help test test-latest test-vllm nightly lint demo bench example build release-check clean distclean

help: ## list the targets (the default)
	@sed -n 's/^\([a-z-]*\):[a-z ]*## */\1	/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-13s %s\n", $$1, $$2 }'

test: ## run the tests on Python 3.11 with the oldest supported Axolotl
	@$(call in,oldest) $(pytest) -m 'not nightly' $(ARGS)

test-latest: ## run all that can depend on a version on Python 3.12 with the newest supported Axolotl
	@$(call in,latest) $(pytest) -m 'not nightly and not once' $(ARGS)

nightly: ## run the tests that the clock decides: kills at random moments of every format's writing
	@$(call in,any) python -m pytest -m nightly $(ARGS)

lint: ## ruff (rules and format) on everything, mypy on the package
	@$(call in,oldest) ruff check . && ruff format --check . && mypy

test-vllm: ## serve the demo's packed model and others with vLLM on a CPU (after make demo; outside CI)
	@environment=$$(scripts/vllm.sh) && PATH="$$environment/bin:$$PATH" && export PATH && set -x && python -m pytest -m '' tests/with_vllm $(ARGS)

demo: ## train a tiny ternary model (SFT, DPO), pack it, ask it: minutes on a CPU
	@scripts/demo.sh

bench: ## measure the kernels and the whole step against their peers (needs a GPU and the peers: .[bench])
	python benchmarks/first_step.py && python benchmarks/each_kernel.py && python benchmarks/linear.py && python benchmarks/train_step.py && python benchmarks/plot.py

example: ## show a run's report in docs/: make example RUN=outputs/tiny-sft
	@$(call in,any) python scripts/example_report.py $(RUN)

build: ## build the sdist and the wheel into dist/
	@$(call in,any) python -m build --no-isolation

release-check: ## build, install from nothing, plan and validate the recipes, run the demo: before a release
	@$(call in,oldest) python scripts/release_check.py

clean: ## remove what builds and checks leave in the checkout
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests examples benchmarks experiments -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the cached environments, of every checkout
	rm -rf "$(CACHE)"
