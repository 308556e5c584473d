# `make` alone says what there is. Every target sets up what it needs; only python3 (3.11 or later) and make come first.
SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTOS = $(shell find protos third_party -name '*.proto' | sort)
PROTOC = $(BIN)/python -m grpc_tools.protoc --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc -Iprotos -Ithird_party
USERS ?= 3
ORDERS ?= 2
PORT ?= 50050

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# -- set-up -----------------------------------------------------------------------------------------------------------
.PHONY: setup
setup: $(READY) ## the virtual environment with the locked dependencies (the other targets do this themselves)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "weft needs Python 3.11 or later as python3 (or make PYTHON=/path/to/python3.11)"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "python3 has no venv module here; on Debian or Ubuntu: apt-get install python3-venv"; exit 2; }
	@echo "Setting up $(VENV) (once, about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: generate
generate: $(READY) ## generated/ anew from protos/
	rm -rf generated/weft generated/buf && mkdir -p generated
	$(call protoc,generated)

define protoc
$(PROTOC) --python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1) $(PROTOS)
endef

.PHONY: lock
lock: ## requirements.lock anew from pyproject.toml (needs uv)
	uv export -q --all-extras --all-groups --no-emit-project --no-header --no-annotate \
		--format requirements-txt -o requirements.lock
	rm -f uv.lock
