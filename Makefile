# Two commands for a stranger: `make demo` and `make test`. Each sets up .venv first; a second run installs nothing.
# Before a commit: `make lint`. `make house` reports on the wings, their imports, docstrings and English. `make compile`
# compiles the kernels for cards that are not here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLD_TRITON := $(VENV)/triton-3.1.0
# compile no bytecode yet: that halves the time, and each module is compiled when it is first imported
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
# tests/conftest.py decides which tests share a process, and which come first
IN_TWO_PROCESSES := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long fuzz lint types house compile bench clean comfyui

demo: $(VENV)/.demo
	$(BIN)/python -m d3ds2 workflows/demo_input.png -o demo.glb --preview demo.png

test:
	$(MAKE) --jobs 3 $(VENV)/.test $(OLD_TRITON)/.done comfyui
	$(BIN)/python -m pytest tests $(IN_TWO_PROCESSES)

# the tests that take minutes: 20 steps of every trainer on 1, 2 and 4 ranks, whole recipes, 60 kills, damaged files, a Ray
# cluster, and more cards to compile for
test-long: $(VENV)/.test-long
	$(BIN)/python -m pytest tests -m long

# thousands of hostile pictures, meshes, model folders, node values and arguments; `make test` draws some 200
fuzz: $(VENV)/.test
	HOSTILE_CASES=many $(BIN)/python -m pytest tests/hostile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(MAKE) types

types: $(VENV)/.test
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

house: | $(BIN)/python
	$(BIN)/python tests/house.py

# every Triton launch of the networks, for cards that are not here; no GPU is needed
compile: $(VENV)/.test
	$(BIN)/python -m tests.support.compile_launches

bench: $(VENV)/.demo
	$(BIN)/python benchmarks/geometry.py

clean:
	rm -rf $(VENV) demo.glb demo.png

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: requirements.txt constraints.txt pyproject.toml | $(BIN)/python
	$(INSTALL) --constraint constraints.txt --requirement requirements.txt embreex
	touch $@

$(VENV)/.test: $(VENV)/.demo Makefile
	$(INSTALL) --constraint constraints.txt \
		pytest pytest-xdist hypothesis ruff codespell pyrefly tensorboard peft "fsspec[http]" onnx onnxruntime rembg \
		pillow-heif DracoPy efficientnet-lite-pytorch triton websocket-client
	touch $@

$(VENV)/.test-long: $(VENV)/.test
	$(INSTALL) --constraint constraints.txt ray pyarrow
	touch $@

# the oldest Triton whose interpreter the kernels support; its interpreter was built for NumPy 1
$(OLD_TRITON)/.done: | $(BIN)/python
	rm -rf $(OLD_TRITON)
	$(INSTALL) --no-deps --target $(OLD_TRITON) triton==3.1.0 numpy==1.26.4
	touch $@

# real ComfyUIs, a browser and the registry's tool, outside this folder; a test that lacks one is skipped and says why
comfyui: | $(BIN)/python
	-@$(BIN)/python -m tests.comfy.installation
