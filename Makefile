# `make demo` and `make test` work on a fresh machine: the first one makes .venv (about 2 GB) and fills it.
PYTHON ?= python3
# Where torch comes from: the address of a package index, for instance PyTorch's own with CPU builds. Empty is
# pip's default, whose Linux build of torch brings CUDA's libraries along (several GB, and it works as well).
TORCH_FROM ?=
# Tests that run at once. Each worker holds torch, and two of them are enough for two cores.
WORKERS ?= 2
# Seeds of `make demo` and `make demo-real`: 1 shows the picture, 3 are the least for a claim.
SEEDS ?= 1

.PHONY: demo demo-real table test test-slow test-gpu docs-check lint toy clean

demo: .venv/ready
	.venv/bin/python toy/demo.py --seeds=$(SEEDS)

demo-real: .venv/ready
	.venv/bin/python toy/real.py --seeds=$(SEEDS)

table: .venv/ready
	.venv/bin/python toy/table.py

test: .venv/ready
	.venv/bin/python -m pytest -n $(WORKERS) --dist=loadgroup

test-slow: .venv/ready
	.venv/bin/python -m pytest -n $(WORKERS) --dist=loadgroup -m slow

# On a machine with a GPU, in an environment of requirements-gpu.txt: the tests that need one. All others run on the CPU.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/test_model.py

# The links and file maps of README and docs/, and every command in them, in a copy of this checkout.
docs-check: .venv/ready
	.venv/bin/python measure/docs_check.py

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Rebuild the committed toy worlds: base models and parquet files.
toy: .venv/ready
	.venv/bin/python toy/build.py
	.venv/bin/python toy/shaping.py

.venv/ready: requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q pip==26.3
	.venv/bin/pip install -q torch==2.13.0 $(if $(TORCH_FROM),-i $(TORCH_FROM))
	.venv/bin/pip install -q --no-deps -r requirements-cpu.txt
	@touch .venv/ready

clean:
	rm -rf .venv out
