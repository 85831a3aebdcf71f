# make demo: train a small GenLIP from nothing and caption unseen images.  make test: the CPU test suite.
# make parity: the same run on every parallel layout, into docs/parity.md.
# make plugging: what others load, with transformers 4, ONNX and lmms-eval, in environments of their own.
# make faults: kill, hang and corrupt runs in every way the tests know, into docs/reliability.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test test-all plugging faults parity check format clean

$(STAMP): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest

plugging:
	test -x $(VENV)-hf4/bin/python || $(PYTHON) -m venv $(VENV)-hf4
	$(VENV)-hf4/bin/python -m pip install --quiet --editable ".[dev,onnx]" "transformers>=4.56,<4.58"
	$(VENV)-hf4/bin/python -m pytest tests/hf tests/plugging tests/infer tests/convert/test_convert_tool.py
	test -x $(VENV)-lmms/bin/python || $(PYTHON) -m venv $(VENV)-lmms
	$(VENV)-lmms/bin/python -m pip install --quiet --editable ".[dev,lmms]"
	$(VENV)-lmms/bin/python -m pytest tests/plugging/test_lmms_eval.py

faults: $(STAMP)
	$(BIN)/python -m pytest -m faults --fault-table=docs/reliability.md

parity: $(STAMP)
	$(BIN)/python tools/parity_matrix.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy genlip_megatron pretrain_genlip.py tools
	$(BIN)/codespell

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-hf4 $(VENV)-lmms build *.egg-info .mypy_cache .pytest_cache .ruff_cache
