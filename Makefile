# `make` alone says what there is. Every target sets up what it needs; only python3 (3.11 or later) and make come first.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCKED := $(VENV)/.locked
READY := $(VENV)/.ready
# google.type is read, and not generated: its stubs come with googleapis-common-protos.
PROTOS = $(shell find protos third_party/buf -name '*.proto' | sort)
PROTOC = $(BIN)/python -m grpc_tools.protoc --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc -Iprotos -Ithird_party
FRESH := $(VENV)/generated
USERS ?= 3
ORDERS ?= 2
NOTIFICATIONS ?= 2
RATE ?= 50
FOR ?= 30
PORT ?= 50050
DATA ?= data
# Further arguments for pytest: make test ARGS='tests/policy -x'
ARGS ?=

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# -- the shop ---------------------------------------------------------------------------------------------------------
.PHONY: run-mesh
run-mesh: $(READY) ## the whole shop until Ctrl-C (USERS=3 ORDERS=2 NOTIFICATIONS=2 PORT=50050 DATA=data)
	@exec $(BIN)/python -m services --users '$(USERS)' --orders '$(ORDERS)' --notifications '$(NOTIFICATIONS)' \
		--port '$(PORT)' --data '$(DATA)'

.PHONY: load
load: $(READY) ## a realistic mix of calls against a running shop, with live figures (RATE=50 FOR=30 PORT=50050)
	@exec $(BIN)/python -m services.load --rate '$(RATE)' --for '$(FOR)' --registry '127.0.0.1:$(PORT)'

# -- tests ------------------------------------------------------------------------------------------------------------
.PHONY: test
test: lint types check-generated floors coverage unit ## everything below but the faults: lint, types, floors, tests

.PHONY: lint
lint: $(READY) ## ruff and buf: rules and layout
	@echo '== lint'
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Run: $(BIN)/ruff format"; exit 1; }
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code protos

.PHONY: types
types: $(READY) ## mypy, strict
	@echo '== types'
	@$(BIN)/mypy

.PHONY: check-generated
check-generated: $(READY) ## generated/ is what the protos give
	@echo '== generated code'
	@rm -rf $(FRESH) && mkdir -p $(FRESH)
	@$(call protoc,$(FRESH))
	@diff -r -x __pycache__ generated $(FRESH) || { echo "generated/ is not what protos/ give: make generate"; exit 1; }
	@rm -rf $(FRESH)

.PHONY: floors
floors: $(READY) ## a file imports only from floors below its own
	@echo '== floors'
	@$(BIN)/lint-imports --no-logo

# Without the tests of the rest: only what tests/policy reaches counts. (`unit` leaves out what ran here.)
.PHONY: coverage
coverage: $(READY) ## every branch of mesh/policy is tested
	@echo '== coverage of mesh/policy'
	@$(BIN)/pytest -q -n 2 tests/policy --cov=mesh.policy --cov-branch --cov-report=term-missing:skip-covered \
		--cov-fail-under=100

.PHONY: unit
unit: $(READY) ## the tests, without those that kill processes (ARGS='tests/policy -x' for some of them)
	@echo '== tests'
	@$(BIN)/pytest -n 2 --dist=loadscope -m 'not faults' $(or $(ARGS),--ignore=tests/policy)

.PHONY: test-faults
test-faults: $(READY) ## the long tests, with real processes that are killed, stopped and brought back
	@echo '== faults'
	@$(BIN)/pytest -v -m faults $(ARGS)

.PHONY: bench-call
bench-call: $(READY) ## the CPU of one call: the mesh, gRPC core's round_robin, a bare channel
	@$(BIN)/python -m benchmarks.call

.PHONY: bench-cluster
bench-cluster: $(READY) ## what balancing, ejection and updates are worth and cost, beside gRPC core's (about 3 minutes)
	@$(BIN)/python -m benchmarks.cluster

.PHONY: bench-server
bench-server: $(READY) ## a server's cost, twice its capacity, rolling restarts, the registry (about 3 minutes)
	@$(BIN)/python -m benchmarks.server

.PHONY: bench-events
bench-events: $(READY) ## from what happens to an order until its user is told, at 100 orders a second
	@$(BIN)/python -m benchmarks.events

.PHONY: bench-shop
bench-shop: $(READY) ## CreateOrder through the mesh against the raw rate of SQLite and of PostgreSQL
	@$(BIN)/python -m benchmarks.shop

# -- upkeep -----------------------------------------------------------------------------------------------------------
.PHONY: setup
setup: $(READY) ## the virtual environment with the locked dependencies (the other targets do this themselves)

$(LOCKED): requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "weft needs Python 3.11 or later; $(PYTHON) is not here"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "weft needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
		"With another one: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module here; on Debian or Ubuntu: apt-get install python3-venv"; exit 2; }
	@echo "Setting up $(VENV) (once, about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@{ $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --require-hashes \
		-r requirements.lock || touch $(VENV)/.failed; } | awk -v all="$$(grep -c == requirements.lock)" \
		'/^(Collecting|Processing)/ && ++n % 10 == 0 { print "  " n " of " all " packages"; fflush() } \
		/^Installing/ { print "  installing"; fflush() }'
	@! rm $(VENV)/.failed 2>/dev/null
	@touch $@

$(READY): $(LOCKED) pyproject.toml
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: generate
generate: $(READY) ## generated/ anew from protos/
	@rm -rf generated && mkdir -p generated
	@$(call protoc,generated)

.PHONY: docs
docs: $(READY) ## the pages in docs/ that are written from sources
	@$(BIN)/python docs/generate.py

# py.typed tells type checkers of an installed wheel that the stubs beside it count (PEP 561). weft.order says what it
# needs when that is missing.
define protoc
$(PROTOC) --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS) && touch $(1)/weft/py.typed \
	&& cp protos/weft/order/__init__.py $(1)/weft/order/
endef

.PHONY: format
format: $(READY) ## lay out the Python and proto files
	@$(BIN)/ruff format --quiet .
	@$(BIN)/buf format --write protos

.PHONY: lock
lock: ## requirements.lock anew from pyproject.toml (needs uv)
	uv export -q --all-extras --all-groups --no-emit-project --no-header --no-annotate \
		--format requirements-txt -o requirements.lock
	rm -f uv.lock

.PHONY: clean
clean: ## forget the virtual environment, caches and built things (data/ stays)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage
