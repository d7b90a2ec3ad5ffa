# From a fresh Debian 12 with python3, gcc, make and git:
#   make demo    three nodes, pinged, loaded and shown, then taken down again
#   make test    the whole suite, network namespaces and etcd included
#   make bench   all paths measured side by side; BENCH="--quick --out=DIR" gives options to loden bench
# All begin with `make setup`, which installs only what is missing and is quick when nothing is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := gcc iproute2 nftables iptables ethtool iputils-ping procps util-linux etcd-server etcd-client tcpdump tshark
EXT := $(shell find ext bench -name '*.pyx' -o -name '*.pxd' -o -name '*.h' -o -path 'bench/generator/*.c')

# $(call step,what,what to do if it fails): names the step before, and its remedy after a failure
define step
@step="$(1)" remedy="$(2)"
finally() { :; }
trap 'code=$$?; finally; [ $$code = 0 ] || echo "== FAILED: $$step. $$remedy" >&2' EXIT
echo "== $$step"
endef

.PHONY: help setup packages demo test bench bench-selftest fuzz sanitize checked soak races lint wheel clean

help:
	@sed -n 's/^#   make/make/p' Makefile
	echo "make setup   Debian packages, $(VENV), compiled extensions, $(BIN)/flanneld and $(BIN)/loden"
	echo "make bench-selftest  does the benchmark find a slowdown and a loss of known size?"
	echo "make soak    100 GB of hashed TCP over a bad underlay, 5 GB with each capability off"
	echo "make races   200 rounds (RACE_ROUNDS=...) of 2 and of 20 daemons that start together; of 64 nodes for 64 subnets"
	echo "make fuzz    500,000,000 fuzz executions (FUZZ_COUNT=...) over the packet path"
	echo "make sanitize  the packet tests and 20,000,000 executions with sanitizers of addresses, of data races"
	echo "make checked  the whole suite with checks of each index and each length"
	echo "make lint    ruff and mypy"
	echo "make wheel   a wheel in dist/"
	echo "make clean   remove what was built; $(VENV) stays"

setup: $(VENV)/.built

demo: setup
	$(call step,demo,Read the error above; 'sudo $(BIN)/loden lab up' and 'sudo $(BIN)/loden lab status' show more)
	$(BIN)/loden lab demo

test: lint
	$(call step,pytest,Read its summary; '$(BIN)/pytest -x PATH' runs one file)
	$(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder

soak: setup
	$(call step,soak,Read its summary above)
	LODEN_SOAK_BYTES=$(or $(SOAK_BYTES),100000000000) LODEN_SOAK_OFF_BYTES=$(or $(SOAK_OFF_BYTES),5000000000) $(BIN)/pytest -s tests/netns/test_soak.py

races: setup
	$(call step,races,Read its summary above)
	LODEN_RACE_ROUNDS=$(or $(RACE_ROUNDS),200) $(BIN)/pytest -s tests/netns/test_together.py tests/lease/test_etcd_races.py

fuzz: setup
	$(call step,fuzz,The execution it names can be repeated as it says)
	$(BIN)/python -m tests.fuzz.fuzzing build/fuzz $$(date +%s%N) $(or $(FUZZ_COUNT),500000000) --rebuild

sanitize: setup
	$(call step,sanitizers,Read the report above; LODEN_FUZZ_FIRST repeats a fuzz)
	LODEN_SANITIZE_ALL=1 LODEN_SANITIZED_COUNT=20000000 $(BIN)/pytest -v --timeout 3600 --durations=0 tests/fuzz/test_sanitized.py tests/fuzz/test_threads.py

checked: setup
	$(call step,the suite with checks of bounds,Read its summary above)
	LODEN_CHECK_ALL=1 $(BIN)/pytest -v --timeout 7200 tests/fuzz/test_checked.py

bench: setup
	$(call step,bench,Read the error above; '$(BIN)/loden lab down --name=bench' removes what a killed run left)
	$(BIN)/loden bench $(BENCH)

bench-selftest: setup
	$(call step,bench-selftest,Another load on this machine does not matter to it; read what it has measured above)
	$(BIN)/loden bench selftest

lint: setup
	$(call step,ruff,'$(BIN)/ruff check --fix' mends some findings)
	$(BIN)/ruff check .
	step=mypy remedy="It names file and line"
	echo "== $$step"
	$(BIN)/mypy

wheel: setup
	$(call step,wheel,Read the compiler's message above)
	rm -rf build/lib.*  # all of it is packed: also modules that are no longer in the tree
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	ls dist

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(VENV)/.built
	find dataplane bench -name '*.so' -delete
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# --- setup -----------------------------------------------------------------------------------------------------

# Looked at each time: dpkg-query is quick, and a package may have been removed since. etcd is for tests and labs, which
# start their own; a service of it is neither started (policy-rc.d) nor left enabled, unless it was here before us.
packages:
	$(call step,Debian packages,)
	remedy="Name one that is: make PYTHON=/path/to/python3.11"
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	missing=()
	has() { [ "$$(dpkg-query -W -f '$${db:Status-Status}' "$$1" 2>/dev/null)" = installed ]; }
	for package in $(PACKAGES); do has $$package || missing+=($$package); done
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
	$(PYTHON) -c 'import pathlib, sysconfig; assert pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()' 2>/dev/null || missing+=(python3-dev)
	[ $${#missing[@]} -gt 0 ] || exit 0
	echo "missing: $${missing[*]}"
	remedy="Only root may install them: sudo apt-get install $${missing[*]}"
	[ "$$(id -u)" = 0 ]
	remedy="Make the network and apt's sources work; then make setup again"
	policy=/usr/sbin/policy-rc.d
	finally() { rm -f $$policy; [ ! -e $$policy.before-loden ] || mv $$policy.before-loden $$policy; }
	[ ! -e $$policy ] || [ -e $$policy.before-loden ] || mv $$policy $$policy.before-loden
	printf '#!/bin/sh\nexit 101\n' > $$policy
	chmod 755 $$policy
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q
	apt-get install -q -y --no-install-recommends "$${missing[@]}"
	[[ " $${missing[*]} " != *" etcd-server "* ]] || systemctl --quiet disable etcd.service || [ ! -d /run/systemd/system ]

$(VENV)/.made: | packages
	$(call step,virtual environment $(VENV),Remove $(VENV) and try again)
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml setup.py | packages
	$(call step,Python packages and compiled extensions,Read pip's or the compiler's message above)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $(VENV)/build-requires.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/build-requires.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[test]'
	touch $@

# The editable install has compiled once; this does it again where a source is newer.
$(VENV)/.built: $(VENV)/.installed $(EXT) | packages
	$(call step,compiled extensions,Read the compiler's message above)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
