# Two commands for a newcomer: `make demo` and `make test`. Both do all the set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.made

# Tests on replicas: one framework, and one number of replicas, a process.
REPLICATED := tests/test_engine_tensorflow.py tests/test_layer_tensorflow.py

.PHONY: demo test check lint gpu benchmark clean

demo: $(SETUP)
	$(BIN)/syncbn demo

test: $(SETUP)
	$(BIN)/pytest tests/test_house.py tests/test_maths.py tests/test_demo.py
	$(BIN)/pytest tests/test_layer_keras.py $(REPLICATED) --replicas 4
	$(BIN)/pytest $(REPLICATED) --replicas 2
	$(BIN)/pytest tests/test_multi_worker.py tests/test_mutants.py
	$(BIN)/pytest tests/test_layer_torch.py tests/test_engine_torch.py tests/test_layer_torch_ranks.py tests/test_functional_torch.py --replicas 4
	$(BIN)/pytest tests/test_engine_torch.py tests/test_torch_training.py --replicas 2
	$(BIN)/pytest tests/test_layer_keras_torch.py --replicas 4
	$(BIN)/pytest tests/test_demo_torch.py tests/test_mutants_torch.py
	$(BIN)/pytest tests/test_kernels_triton.py tests/test_exchange.py tests/test_kernels_compile.py tests/test_mutants_kernels.py

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

# On a machine with a GPU, PyTorch and Triton.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest tests/gpu

benchmark: $(SETUP)
	$(BIN)/python benchmarks/run.py tensorflow-cpu
	$(BIN)/python benchmarks/run.py torch-cpu

clean:
	rm -rf $(VENV) demo-results .pytest_cache .mypy_cache .ruff_cache

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@
