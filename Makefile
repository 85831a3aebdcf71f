# make demo: train a small GenLIP from scratch and caption unseen images.
# make test: the quick CPU tests.  make test-all: all that CI runs.
# make parity: the same run on every parallel layout, into docs/parity.md.
# make evaluate: every evaluation on real data and a small GenLIP trained on it; takes an hour or more.
# make docs: the documentation site, into site/.
# make plugging: tests of exports with transformers 4.40 and 4.57, ONNX and lmms-eval, in separate environments.
# make faults: kill, hang and corrupt runs in every way the tests know, into docs/reliability.md and docs/launch.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# The oldest Python that setup.py accepts.
OLDEST := 3.10
IS_OLD := import sys; sys.exit(sys.version_info < tuple(map(int, '$(OLDEST)'.split('.'))))

.PHONY: demo evaluate test test-all plugging null-gpu faults parity docs check format clean usable

# $(call usable,FOLDER): end with one line, before anything is made, if no environment can be made there or used.
define usable
	@if test -e $(1) || test -L $(1); then \
		$(1)/bin/python -c "$(IS_OLD)" 2>/dev/null || { echo "$(1): its Python does not run or is older than" \
			"Python $(OLDEST). Remove it (rm -r $(1)) and run make again" >&2; exit 2; }; \
	else \
		$(PYTHON) -c "$(IS_OLD)" 2>/dev/null || { echo "PYTHON = $(PYTHON): does not run or is older than Python" \
			"$(OLDEST). Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }; \
	fi
endef

# $(call environment,FOLDER): make the environment if there is none, all of it or nothing.
define environment
	$(call usable,$(1))
	@test -e $(1) || $(PYTHON) -m venv $(1) || { rm -rf $(1); echo "$(1): $(PYTHON) makes no environment; see above." \
		"On Debian and Ubuntu, install python3-venv" >&2; exit 2; }
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || { echo "$(1): has no working pip. Remove it (rm -r $(1)) and" \
		"run make again" >&2; exit 2; }
endef

usable:
	$(call usable,$(VENV))

$(STAMP): setup.py | usable
	$(call environment,$(VENV))
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py

# A test file stays in one process, because its tests share runs and data.
PARALLEL := -n auto --dist loadfile

evaluate: $(STAMP)
	-$(BIN)/python -m pip install --quiet "gguf>=0.10" "accelerate>=1.0"
	$(BIN)/python tools/evaluate.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not long" $(PARALLEL)

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not long" $(PARALLEL)

plugging:
	$(call environment,$(VENV)-hf4)
	$(VENV)-hf4/bin/python -m pip install --quiet --editable ".[dev,onnx]" "transformers>=4.56,<4.58"
	$(VENV)-hf4/bin/python -m pytest tests/hf tests/plugging tests/infer tests/convert/test_convert_tool.py \
		tests/convert/test_openclip.py
	$(call environment,$(VENV)-hf440)
	$(VENV)-hf440/bin/python -m pip install --quiet --editable ".[dev]"
	$(VENV)-hf440/bin/python -m pip install --quiet --no-deps transformers==4.40.2 tokenizers==0.19.1 \
		"huggingface-hub<1"
	$(VENV)-hf440/bin/python -m pytest tests/plugging/test_llava_next.py
	$(call environment,$(VENV)-lmms)
	$(VENV)-lmms/bin/python -m pip install --quiet --editable ".[dev,lmms]"
	$(VENV)-lmms/bin/python -m pytest tests/plugging/test_lmms_eval.py

# torch comes first, because Transformer Engine is compiled against it, with nvcc. Triton's interpreter needs numpy < 2.3.
NULL_GPU := $(VENV)-null-gpu
NULL_GPU_PYTHON ?= $(NULL_GPU)/bin/python
CUDA_HOME ?= /usr/local/cuda

$(NULL_GPU)/installed: setup.py
	test -x $(CUDA_HOME)/bin/nvcc || { echo "CUDA_HOME = $(CUDA_HOME) has no bin/nvcc. Set it to a CUDA 13 toolkit"; exit 1; }
	$(call environment,$(NULL_GPU))
	$(NULL_GPU)/bin/python -m pip install --quiet torch==2.11.0 ninja pybind11 setuptools wheel "numpy<2.3"
	nvidia=$$($(NULL_GPU)/bin/python -c "import nvidia; print(nvidia.__path__[0])") && \
	CPATH=$$nvidia/cudnn/include:$$nvidia/nccl/include:$$nvidia/cu13/include CUDA_HOME=$(CUDA_HOME) \
	PATH=$(CURDIR)/$(NULL_GPU)/bin:$$PATH MAX_JOBS=$${MAX_JOBS:-2} \
	$(NULL_GPU)/bin/python -m pip install --no-build-isolation --editable ".[dev,te]" torch==2.11.0 "numpy<2.3"
	touch $@

ifeq ($(NULL_GPU_PYTHON),$(NULL_GPU)/bin/python)
null-gpu: $(NULL_GPU)/installed
endif
null-gpu:
	$(NULL_GPU_PYTHON) -m pytest tests/null_gpu/test_null_gpu.py
	$(NULL_GPU_PYTHON) -m tests.null_gpu.run --devices 2 $(dir $(NULL_GPU_PYTHON))pytest --gpu \
		tests/train/test_no_waits.py -k "not engine"
	$(NULL_GPU_PYTHON) -m tests.null_gpu.check

faults: $(STAMP)
	$(BIN)/python -m pytest -m faults --fault-table=docs/reliability.md
	$(BIN)/python -m pytest tests/launch --fault-table=docs/launch.md

parity: $(STAMP)
	$(BIN)/python tools/parity_matrix.py

$(STAMP)-docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy genlip_megatron pretrain_genlip.py tools
	$(BIN)/codespell

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Fixed names in this folder, not $(VENV), which may be an environment that others use; `make --file` may run anywhere.
clean:
	cd "$(dir $(abspath $(lastword $(MAKEFILE_LIST))))" && rm -rf .venv .venv-hf4 .venv-lmms .venv-null-gpu build site \
		genlip_megatron.egg-info .mypy_cache .pytest_cache .ruff_cache
