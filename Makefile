# Every target but fuzz and clean sets .venv up when it is missing, or when what it was built from has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc -type f)

.PHONY: setup demo test bench lint sanitize fuzz clean

setup: $(STAMP)

# torch comes first and pinned: left to the dependencies, pip might choose another version of it. The package is
# installed in place, so that an edited Python file needs no reinstallation; the compiled modules are built once, here.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/pgolf demo

test: $(STAMP)
	$(BIN)/python -m pytest tests -q

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

sanitize: $(STAMP)
	$(BIN)/python -m setup_tools.sanitize

# The decoders on damaged streams, under the address and undefined-behaviour sanitizers. Needs a C++ compiler only; an
# input that fails is kept as build/fuzz/fuzz-failure.bin.
FUZZ_SECONDS ?= 600
FUZZ_FLAGS := -std=c++20 -O2 -g -fsanitize=address,undefined -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS \
	-D_GLIBCXX_SANITIZE_VECTOR -Icsrc/fuzz -Icsrc/codec -pthread

fuzz: build/fuzz/decode
	cd build/fuzz && nice -n 19 ./decode --seconds $(FUZZ_SECONDS)

build/fuzz/decode: $(shell find csrc/codec csrc/fuzz -type f)
	mkdir -p $(@D)
	$(CXX) $(FUZZ_FLAGS) csrc/fuzz/decode.cpp $(filter-out %/bind.cpp,$(wildcard csrc/codec/*.cpp)) -o $@

clean:
	rm -rf $(VENV) build
