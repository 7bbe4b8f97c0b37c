PYTHON ?= python3
INSTALLED = .venv/.installed

.PHONY: help
help:
	@echo "make demo               train on KuaiRand with a sharded memory, on two processes"
	@echo "make test               lint and run the tests"
	@echo "make lint               lint only"
	@echo "make benchmark-quality  the table of models in README"
	@echo "make benchmark-kernels  the kernels and their peers, on a GPU (python -m benchmarks.kernels)"
	@echo "make benchmark-step     a training step of the paper's size, on a GPU (python -m benchmarks.step)"
	@echo "make clean              remove .venv, caches and build files; runs/ stays"

# Written last, so that a set-up which failed half-way is done again.
$(INSTALLED): setup.cfg pyproject.toml launch/install.py launch/versions.py
	@$(PYTHON) launch/install.py
	@touch $@

.PHONY: demo
demo: $(INSTALLED)
	@.venv/bin/msn prepare kuairand
	@.venv/bin/msn train configs/demo.yaml --nproc 2

.PHONY: test
test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q

.PHONY: lint
lint: $(INSTALLED)
	.venv/bin/ruff check .

.PHONY: benchmark-quality
benchmark-quality: $(INSTALLED)
	@.venv/bin/msn prepare kuairand
	@.venv/bin/python -m benchmarks.quality

.PHONY: benchmark-kernels
benchmark-kernels: $(INSTALLED)
	@.venv/bin/python -m benchmarks.kernels

.PHONY: benchmark-step
benchmark-step: $(INSTALLED)
	@.venv/bin/python -m benchmarks.step

.PHONY: clean
clean:
	rm -rf .venv .cache build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
