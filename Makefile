# make train   set up, then pretrain a tiny T5 on this machine; ARGS="--config.train.num_steps=50" adds flags
# make test    set up, then run the tests; ARGS="-k checkpoint" adds options of pytest
# make newest  the same in an environment of its own, .newest, with the newest versions that setup.py allows; Python 3.12
# make reliability  set up, then kill, stop and starve real runs: minutes; needs Linux, and root for a disk that fills up
# make soak    set up, then one run under random faults; ARGS="--seed=1 --minutes=10" chooses them
# make parity  set up with PyTorch, transformers and TRL (large), then compare with them: models, losses, text
# make cluster set up, also Slurm (Debian's packages, as root), then run the tests of cluster jobs (tests/cluster)
# make browser  set up, also Chromium (Debian's package, as root), then open the pages of `t5like inspect` in it
# make benchmarks  set up, then start every program of benchmarks/ at toy sizes (tests/benchmarks); it times nothing
# make container  set up, then install the locked requirements of the container image `cpu`, and run t5like there
# make golden  set up with the TPU compiler, then plan the big models and compare with tests/golden/plans: an hour, no TPU
#              ARGS=--probes: small ones, minutes; ARGS=--write: renew; ARGS=NAME: those whose names begin so
# make gpu     set up with NVIDIA's compiler, then compile the GPU kernels for an H100 and an A100: a minute, no GPU
# make check   set up, then lint, and check the format
# make lock    set up, then renew the locked requirements of the container images (needs Python 3.11 on Linux x86_64)
# make clean   remove the environment and all caches; runs/ stays
#
# PYTHON=/path/to/python3 chooses the interpreter of the environment. Works with GNU make 3.81, which macOS has.

.PHONY: help train test newest reliability soak parity cluster slurm browser chromium benchmarks container golden gpu \
	check lock clean

VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PEERS := $(VENV)/peers_installed
LIBTPU := .libtpu
LIBTPU_VERSION := 0.0.52
CUDA := .cuda
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE
# Bytecode of what pip has installed and t5like imports, by all processors instead of pip's one.
COMPILE = { $(BIN)/python -m compileall -q -j 0 -x '/(tests?|aio|pip)/' $(VENV)/lib >/dev/null 2>&1 || :; }

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

train: $(INSTALLED)
	@$(BIN)/python -m t5like train --config=configs/tiny.py --workdir=runs/tiny $(ARGS)

test: $(INSTALLED)
	@$(BIN)/python -m pytest -q --numprocesses=2 --dist=worksteal $(ARGS)

# jax 0.11 needs Python 3.12.
newest:
	@$(MAKE) --no-print-directory test VENV=.newest CONSTRAINTS=/dev/null PYTHON="$(or $(PYTHON),python3.12 python3.13)"

reliability: $(INSTALLED)
	@$(BIN)/python -m pytest -q --numprocesses=2 --dist=worksteal tests/reliability $(ARGS)

soak: $(INSTALLED)
	@$(BIN)/python tests/reliability/soak.py $(ARGS)

parity: $(PEERS)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q --numprocesses=2 --dist=worksteal tests/live $(ARGS)

# The daemons lie in /usr/sbin, which is not on every PATH. Four cases wait for the scheduler at the same time.
cluster: $(INSTALLED) slurm
	@PYTEST_ADDOPTS="-q -n 4" $(BIN)/python tests/cluster/slurm_cluster.py $(BIN)/python -m pytest tests/cluster $(ARGS)

browser: $(INSTALLED) chromium
	@$(BIN)/python -m pytest -q tests/browser $(ARGS)

benchmarks: $(INSTALLED)
	@$(BIN)/python -m pytest -q --numprocesses=2 --dist=worksteal tests/benchmarks $(ARGS)

# Debian's packages of programs that are missing: $(call packages,PROGRAMS,PACKAGES)
packages = for program in $(1); do \
	    PATH="$$PATH:/usr/sbin" command -v $$program >/dev/null && continue; \
	    if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	        echo "$$program is missing: install $(2) (packages of Debian and Ubuntu)" >&2; exit 1; \
	    fi; \
	    echo "Installing $(2), once ..."; \
	    log=$$(mktemp); \
	    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $(2); } \
	        </dev/null >$$log 2>&1 || { cat $$log >&2; exit 1; }; \
	    rm -f $$log; \
	done

slurm:
	@$(call packages,slurmctld slurmd srun munged,slurm-wlm munge)

chromium:
	@$(call packages,chromium,chromium fonts-dejavu-core)

container: $(INSTALLED)
	@$(BIN)/python -m pytest -q tests/container $(ARGS)

golden: $(LIBTPU)/installed
	@PYTHONPATH=$(CURDIR):$(CURDIR)/$(LIBTPU) $(BIN)/python tests/golden/make_plans.py $(ARGS)

gpu: $(CUDA)/installed
	@JAX_PLATFORMS=cpu PYTHONPATH=$(CURDIR)/$(CUDA) $(BIN)/python -m pytest -q tests/gpu $(ARGS)

check: $(INSTALLED)
	@$(BIN)/ruff check . $(ARGS)
	@$(BIN)/ruff format --check .

lock: $(INSTALLED)
	@$(BIN)/python launch/container/lock.py

clean:
	@rm -rf $(VENV) .newest $(LIBTPU) $(CUDA) build dist *.egg-info .pytest_cache .ruff_cache .jax_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an interrupted installation starts again.
$(INSTALLED): setup.py $(filter-out /dev/null,$(CONSTRAINTS))
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "Python 3.11 or later with its venv module is needed: install it, or name one: make PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	fi; \
	echo "Installing t5like into $(VENV) with $$($$python --version), once; this takes a minute or two ..."; \
	$$python -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint $(CONSTRAINTS) \
	    --editable '.[dev]' \
	    >$(VENV)/install.log 2>&1 || { cat $(VENV)/install.log >&2; echo "Installing failed; make tries again." >&2; exit 1; }
	@$(COMPILE)
	@touch $@

# Only what the extra adds: t5like, which programs may run meanwhile, is not installed again.
$(PEERS): $(INSTALLED)
	@echo "Installing PyTorch, transformers and TRL into $(VENV), once ..."; \
	$(BIN)/python -c 'from importlib.metadata import requires; \
	    print(*(each.partition(";")[0] for each in requires("t5like") if "\"parity\"" in each), sep="\n")' \
	    >$(VENV)/peers.txt && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint $(CONSTRAINTS) \
	    --requirement $(VENV)/peers.txt \
	    >$(VENV)/install_peers.log 2>&1 || { cat $(VENV)/install_peers.log >&2; echo "Installing failed; make tries again." >&2; exit 1; }
	@touch $@

# A folder of its own: in the environment it would slow the start of every process. The version is that of the golden
# files and of plan/estimate.py's table; a TPU runs with the older one that jax[tpu] asks for.
$(LIBTPU)/installed: $(INSTALLED)
	@echo "Installing the TPU compiler into $(LIBTPU), once ..."; \
	rm -rf $(LIBTPU) && mkdir $(LIBTPU) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --no-deps \
	    --target $(LIBTPU) libtpu==$(LIBTPU_VERSION) >$(LIBTPU)/install.log 2>&1 || \
	    { cat $(LIBTPU)/install.log >&2; echo "Installing failed; make tries again." >&2; exit 1; }
	@touch $@

# JAX's plugin for CUDA with the compiler that it calls, and no library that needs a GPU; a folder of its own, as above.
$(CUDA)/installed: $(INSTALLED)
	@echo "Installing NVIDIA's compiler into $(CUDA), once ..."; \
	rm -rf $(CUDA) && mkdir $(CUDA) && \
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(CUDA) \
	    jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 \
	    nvidia-cuda-cupti-cu12 >$(CUDA)/install.log 2>&1 || \
	    { cat $(CUDA)/install.log >&2; echo "Installing failed; make tries again." >&2; exit 1; }
	@touch $@
