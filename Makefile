# Two commands for a newcomer: `make demo` and `make test`. Both do all the set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.made
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/pytest

# One framework, and one number of replicas, a process; two processes at a time.
REPLICATED := tests/tensorflow/test_engine_tensorflow.py tests/tensorflow/test_layer_tensorflow.py
# What TensorFlow 2.2 to 2.15 wrote, on each backend of Keras.
FILES := tests/keras/test_old_files.py tests/keras/test_matching.py tests/keras/test_hostile_files.py
TESTS := test-architecture test-demos test-tensorflow test-tensorflow-2 test-torch test-torch-2 test-jax test-kernels test-conversion

.PHONY: demo test check lint quick mutants gpu gpu-ranks gpu-tensorflow benchmark clean package smoke test-oldest test-newest test-all test-more test-docs test-mutants test-torch-kernels docs $(TESTS)

# Installs one framework: `make demo BACKEND=jax`, or torch, or tensorflow.
BACKEND ?= tensorflow
demo: $(VENV)/.made-demo-$(BACKEND)
	$(BIN)/syncbn demo --backend $(BACKEND)

test: $(SETUP)
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(TESTS)

test-architecture:
	$(PYTEST) tests/test_architecture.py tests/test_benchmarks.py tests/test_errors.py tests/test_settings.py tests/test_maths.py tests/test_prose.py tests/test_mutants.py -k "not is_caught"

test-demos:
	$(PYTEST) tests/demo/test_demo.py tests/demo/test_doctor.py tests/test_missing.py

# What `make test` leaves out for its time: examples and code blocks of the docs, exports, kernels under layers, the essential
# deliberate faults, other numbers of replicas, and old files and conversion on the other backends of Keras.
test-more: $(SETUP) test-docs test-mutants test-torch-kernels
	$(PYTEST) tests/test_examples.py
	$(PYTEST) tests/jax/test_examples_jax.py
	$(PYTEST) tests/torch/test_export_torch.py
	$(PYTEST) tests/keras/test_export_keras.py
	$(PYTEST) $(REPLICATED) --replicas 2
	$(PYTEST) tests/demo/test_demo_torch.py tests/demo/test_demo_jax.py
	KERAS_BACKEND=torch $(PYTEST) tests/keras/test_convert_keras.py tests/keras/test_export_keras.py -k "not round_trip and not real_arch"
	KERAS_BACKEND=jax $(PYTEST) tests/keras/test_convert_keras.py tests/keras/test_files_of_converted.py tests/keras/test_export_keras.py -k "not round_trip and not real_arch"
	KERAS_BACKEND=torch $(PYTEST) $(FILES) -k "(computes or in_code) and (tf2.2 or tf2.15) or hdf5 or fit"
	KERAS_BACKEND=jax $(PYTEST) $(FILES) -k "(computes or in_code) and (tf2.2 or tf2.15) or hdf5 or fit"
	$(PYTEST) tests/jax/test_engine_jax.py -k "concatenated and (ragged or masked) or groups" --replicas 2
	$(PYTEST) tests/jax/test_engine_jax.py -k "concatenated and (ragged or masked) or groups" --replicas 8
	JAX_ENABLE_X64=1 $(PYTEST) tests/jax/test_engine_jax.py -k "second or groups"
	$(PYTEST) tests/torch/test_engine_torch.py --replicas 2
	SYNCBN_TEST_DEVICE=interpreter $(PYTEST) tests/torch/test_engine_torch.py --replicas 2

test-tensorflow: $(VENV)/.made-tensorflow
	$(PYTEST) tests/keras/test_layer_keras.py tests/keras/test_inputs_keras.py tests/keras/test_private_keras.py tests/tensorflow/test_functional_tensorflow.py $(REPLICATED) --replicas 4

test-tensorflow-2: $(VENV)/.made-tensorflow
	$(PYTEST) tests/tensorflow/test_passes_gpu.py --replicas 2
	$(PYTEST) $(REPLICATED) --replicas 2 --passes gpu -k "large or million or second_order or ordered or collective or nothing or groups"
	$(PYTEST) tests/tensorflow/test_multi_worker.py

test-torch: $(VENV)/.made-torch
	$(PYTEST) tests/torch/test_layer_torch.py tests/torch/test_engine_torch.py tests/torch/test_layer_torch_ranks.py tests/torch/test_functional_torch.py tests/torch/test_private_torch.py tests/torch/test_world_torch.py tests/torch/test_drop_in_ranks.py --replicas 4
	$(PYTEST) tests/keras/test_layer_keras_torch.py --replicas 4
	KERAS_BACKEND=torch $(PYTEST) tests/keras/test_inputs_keras.py

test-torch-2: $(VENV)/.made-torch
	$(PYTEST) tests/torch/test_torch_training.py tests/torch/test_local_torch.py tests/torch/test_failures_torch.py --replicas 2

test-jax: $(VENV)/.made-jax
	$(PYTEST) tests/jax/test_engine_jax.py tests/jax/test_layer_jax.py tests/jax/test_functional_jax.py tests/jax/test_private_jax.py tests/jax/test_sums_jax.py
	JAX_ENABLE_X64=1 $(PYTEST) tests/jax/test_engine_jax.py -k "float64 or large"
	$(PYTEST) tests/jax/test_multi_process_jax.py
	KERAS_BACKEND=jax $(PYTEST) tests/keras/test_inputs_keras.py

test-kernels: $(VENV)/.made-torch
	$(PYTEST) tests/torch/test_kernels_triton.py tests/torch/test_exchange.py tests/torch/test_kernels_compile.py tests/torch/test_launch.py

# What torch's layers and engine promise, through the kernels for CUDA under Triton's interpreter.
test-torch-kernels: $(VENV)/.made-torch
	SYNCBN_TEST_DEVICE=interpreter $(PYTEST) tests/torch/test_layer_torch.py tests/torch/test_layer_torch_ranks.py tests/torch/test_torch_training.py --replicas 2

test-conversion: test-conversion-tensorflow
	$(PYTEST) tests/torch/test_convert_torch.py tests/torch/test_drop_in_torch.py tests/torch/test_files_before.py
	KERAS_BACKEND=torch $(PYTEST) tests/keras/test_files_of_converted.py

# The site, into site/: strict, so that a dead link fails.
DOCS := .venv-docs
docs: $(DOCS)/.made
	$(DOCS)/bin/mkdocs build --strict

$(DOCS)/.made: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

# What README.md and the site show, run.
test-docs: $(SETUP)
	$(PYTEST) tests/test_docs_blocks.py

# The oldest and the newest versions that are supported, one environment a framework: constraints/. Run by hand; docs/compatibility.md
# says when, and what came out. PyTorch's floor downloads gigabytes of CUDA libraries: `make test-oldest-torch`.
.PRECIOUS: .venv-oldest-%/.made .venv-newest-%/.made
OF_tensorflow := test-tensorflow test-tensorflow-2 test-conversion-tensorflow
OF_jax := test-jax
OF_torch := test-torch test-torch-2 test-kernels test-torch-kernels
# Triton 3.2, which PyTorch 2.6 comes with, has no names that the kernels need.
OLDEST_torch := test-torch test-torch-2
OLDEST_tensorflow := $(OF_tensorflow)
OLDEST_jax := $(OF_jax)
test-oldest: test-oldest-tensorflow test-oldest-jax
test-newest: test-newest-tensorflow test-newest-jax test-newest-torch

# -o: the environment is made; constraints.txt, which is for the others, must not bring its versions into it.
test-oldest-%: .venv-oldest-%/.made
	$(MAKE) --no-print-directory $(OLDEST_$*) VENV=.venv-oldest-$* -o .venv-oldest-$*/.made-$*

test-newest-%: .venv-newest-%/.made
	$(MAKE) --no-print-directory $(OF_$*) VENV=.venv-newest-$* -o .venv-newest-$*/.made-$*

.venv-oldest-%/.made: constraints/oldest-%.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $< -e .
	if [ $* = tensorflow ]; then $(@D)/bin/pip install --quiet --no-deps tf_keras==2.18.0; fi
	touch $@ $(@D)/.made-$*

.venv-newest-%/.made: constraints/newest.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --upgrade -c $< -e ".[dev-$*]"
	if [ $* = tensorflow ]; then $(@D)/bin/pip install --quiet --no-deps tf_keras; fi
	touch $@ $(@D)/.made-$*

# What no single command runs otherwise. Hours.
test-all: check test-more package smoke test-oldest test-newest mutants

# The wheel and the sdist, and what must be in them.
package: $(SETUP)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTEST) tests/package/test_package.py

# The wheel in fresh environments, as a user installs it: with one framework, and with none.
smoke: smoke-none smoke-tensorflow smoke-torch smoke-jax
smoke-%: package
	rm -rf .venv-smoke-$*
	$(PYTHON) -m venv .venv-smoke-$*
	.venv-smoke-$*/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)$(EXTRA_$*)" mypy
	cd .venv-smoke-$* && bin/python ../tests/package/smoke.py $*
EXTRA_tensorflow := [tensorflow]
EXTRA_torch := [torch]
EXTRA_jax := [jax]

test-conversion-tensorflow:
	$(PYTEST) tests/keras/test_convert_keras.py tests/keras/test_files_of_converted.py tests/keras/test_legacy.py tests/keras/test_files_before_keras.py
	$(PYTEST) $(FILES)

# Most mistakes, in about two minutes.
quick: lint test-architecture
	$(PYTEST) tests/tensorflow/test_engine_tensorflow.py tests/tensorflow/test_layer_tensorflow.py --replicas 2 -k "ragged or collective"
	$(PYTEST) tests/torch/test_layer_torch.py
	$(PYTEST) tests/jax/test_engine_jax.py -k "ragged and checked"

test-mutants:
	$(PYTEST) tests/test_mutants.py -k is_caught

mutants: $(SETUP)
	$(PYTEST) tests/test_mutants.py --all-mutants

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test docs

# On a machine with a GPU, PyTorch and Triton: the kernels, then what the layer promises, alone and in two processes on one GPU over gloo.
ON_GPU := SYNCBN_TEST_DEVICE=cuda PYTHONPATH=src $(PYTHON) -m pytest
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest tests/gpu
	$(ON_GPU) tests/torch/test_layer_torch.py
	CUDA_VISIBLE_DEVICES=0 $(ON_GPU) tests/torch/test_layer_torch_ranks.py tests/torch/test_engine_torch.py tests/torch/test_torch_training.py --replicas 2

# On a machine with GPUs, TensorFlow's CUDA build and Keras: TensorFlow's suites on one GPU and on GPUS of them. More replicas than
# GPUs share them.
GPUS ?= 2
ON_TENSORFLOW_GPU := SYNCBN_TEST_DEVICE=gpu TF_FORCE_GPU_ALLOW_GROWTH=true PYTHONPATH=src $(PYTHON) -m pytest
gpu-tensorflow:
	$(ON_TENSORFLOW_GPU) tests/gpu/test_tensorflow_gpu.py
	$(ON_TENSORFLOW_GPU) tests/keras/test_layer_keras.py tests/tensorflow/test_functional_tensorflow.py --replicas 1
	$(ON_TENSORFLOW_GPU) $(REPLICATED) --replicas $(GPUS)
	$(ON_TENSORFLOW_GPU) tests/tensorflow/test_multi_worker.py

# On a machine with several: RANKS of them.
RANKS ?= 2
RUN := PYTHONPATH=src $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node $(RANKS)
gpu-ranks:
	$(RUN) -m syncbn.cli doctor
	$(RUN) tests/gpu/ranks.py
	$(RUN) tests/gpu/training.py
	PYTHONPATH=src $(PYTHON) tests/gpu/dead_peers.py
	$(ON_GPU) tests/torch/test_engine_torch.py tests/torch/test_layer_torch_ranks.py tests/torch/test_torch_training.py --replicas $(RANKS)

benchmark: $(SETUP)
	$(BIN)/python benchmarks/run.py tensorflow-cpu
	$(BIN)/python benchmarks/run.py torch-cpu
	$(BIN)/python benchmarks/run.py jax-cpu

clean:
	rm -rf $(VENV) .venv-* dist site demo-results .pytest_cache .mypy_cache .ruff_cache

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo,dev,examples]"
	# By itself: what it asks for is the other build of TensorFlow.
	$(PIP) --no-deps tf_keras
	touch $@ $(foreach name,tensorflow torch jax,$(VENV)/.made-$(name) $(VENV)/.made-demo-$(name))

# For the demo on one framework, that framework alone; of TensorFlow the build for CPUs, which is smaller.
$(VENV)/.made-demo-%: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) with $*: this takes minutes, most of them a download."
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo]" $(if $(filter tensorflow,$*),tensorflow-cpu,$*)
	touch $@

# For the suites of one framework, that framework alone.
$(VENV)/.made-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev-$*]"
	touch $@
