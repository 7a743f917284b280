# make demo   set up everything and run the main job        make test   set up everything and run the tests
# make check  lint, format, types, import rules             make dev    tools for developers
# make bench  the benchmarks, and docs/performance.md of them: make bench ROOT=~/cifar10
# make slow   tests of minutes: every network of torchvision, full-size exports, every engine on up to four ranks
# make soak   tests of hours: a hundred random kills, fifty random faults
# make fresh  demo and test in a clean clone of HEAD, in fresh Debian 12 and 13 (debootstrap, as root): tests/fresh.sh
# make lab    the lab report measured again, for docs/lab.md: make lab FLAGS='--root ~/cifar10'
# make bench-gpu    one GPU measured in nine minutes: make bench-gpu FLAGS='--json gpu.json'
# make zoo    every file of timm, and torchvision beyond its classifiers, cut: a table in build/, hours with Torch-Pruning
# make gpu    tests of training on one GPU: nccl alone, gloo between two processes, fp16, bf16, torch.compile, resuming

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_TEST := $(VENV)/.ready-test
READY_BENCH := $(VENV)/.ready-bench
# System packages, as PROGRAM:PACKAGE, without which some tests are skipped; `make test TEST_TOOLS=` leaves them alone.
TEST_TOOLS ?= slurmctld:slurm-wlm munged:munge shellcheck:shellcheck chromium:chromium

# Processes that run tests: more than cores, since many tests wait for processes, clusters and time-outs.
WORKERS ?= 3

# A benchmark's figures, of which docs/performance.md is made; those of a GPU and of all networks have words of their own.
FIGURES := $(patsubst tests/bench/%.py,docs/performance/%.json,\
	$(filter-out %/bench_gpu.py %/bench_zoo.py,$(sort $(wildcard tests/bench/bench_*.py))))
FLAGS_bench_end_to_end = $(if $(ROOT),--root $(ROOT) --model vgg19 --epochs 8 --finetune-epochs 3 --weight 2e-3 \
	--reconfigure-every 1 --seeds 0 1 2)

.PHONY: demo test slow soak gpu fresh check format bench bench-gpu zoo lab dev clean $(FIGURES)
.DELETE_ON_ERROR:
.NOTPARALLEL:

demo: $(READY)
	$(BIN)/netslim run digits

# So many workers, whatever the machine: many tests start processes themselves, and each worker has a set-up of its own.
# Files in their order: by their numbers of tests, those whose few tests take longest would come last.
test: $(READY_TEST)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

slow: $(READY)
	$(BIN)/python -m pytest -m slow

soak: $(READY)
	$(BIN)/python -m pytest -m soak

# One after the other, and each with `--json`: `make docs/performance/bench_prune.json` measures one again.
bench: $(FIGURES)
	$(BIN)/python tests/bench/performance.py

$(FIGURES): docs/performance/%.json: tests/bench/%.py $(READY_BENCH)
	$(BIN)/python $< $(FLAGS_$*) --json $@

lab: $(READY)
	$(BIN)/python tests/bench/lab.py $(FLAGS)

dev: $(READY_DEV)

fresh:
	tests/fresh.sh

gpu: $(READY)
	NETSLIM_TEST_DEVICE=cuda $(BIN)/python -m pytest -m 'not soak' \
		tests/test_train_distributed.py tests/test_train_engines.py tests/test_train_resume.py tests/test_train_finite.py

zoo: $(READY_BENCH)
	mkdir -p build
	$(BIN)/python tests/bench/bench_zoo.py --out build/zoo.jsonl $(FLAGS)

bench-gpu: $(READY)
	$(BIN)/python tests/bench/bench_gpu.py $(FLAGS)

check: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/ns $(BIN)/mypy build/ns/netslim
	PYTHONPATH=build/ns $(BIN)/lint-imports --config setup.cfg

format: $(READY_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Install the packages in $$missing, where that can be done without a question; else do what the argument says.
define install_missing
if [ -n "$$missing" ]; then \
		as_root=; [ "$$(id -u)" = 0 ] || as_root="sudo -n"; \
		{ command -v apt-get >/dev/null && $$as_root true 2>/dev/null && \
			echo "installing system packages:$$missing" && $$as_root apt-get update -qq && \
			$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; } || \
		{ $(1); }; \
	fi
endef

# FFCV compiles against OpenCV, TurboJPEG and Python. The constraints pin every version that the tests were run with.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "netslim needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@missing=; \
	command -v pkg-config >/dev/null || missing="$$missing pkg-config"; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	pkg-config --exists opencv4 2>/dev/null || missing="$$missing libopencv-dev"; \
	pkg-config --exists libturbojpeg 2>/dev/null || missing="$$missing libturbojpeg0-dev"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
		|| missing="$$missing python3-dev"; \
	$(call install_missing,\
		echo "netslim needs these system packages:$$missing. Install them (Debian, Ubuntu: sudo apt-get install$$missing) and run make again." >&2; \
		exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[ffcv,deepspeed,export,test]'
	touch $@

$(READY_TEST): $(READY)
	@missing=; \
	for tool in $(TEST_TOOLS); do \
		PATH="$$PATH:/usr/sbin" command -v $${tool%:*} >/dev/null || missing="$$missing $${tool#*:}"; \
	done; \
	$(call install_missing,echo "not installed (their tests are skipped):$$missing" >&2)
	touch $@

$(READY_BENCH): $(READY)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[ffcv,deepspeed,export,test,bench]'
	touch $@

# mypy cannot follow the editable install's import hook, so it reads the packages through links.
$(READY_DEV): $(READY)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[ffcv,deepspeed,export,test,dev]'
	mkdir -p build/ns/netslim
	for each in base train prune data launch door/__init__.py door/__main__.py; do \
		ln -sfn ../../../$$each build/ns/netslim/; \
	done
	touch $@
