# `make` alone lists the targets. Each sets up what it needs, except python3 (3.11 or later) and make.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
PYTHON ?= python3
# Faster than pip, if installed. Without it: make UV=
UV ?= $(shell uv --version >/dev/null 2>&1 && command -v uv)
VENV := .venv
BIN := $(VENV)/bin
# Installed: the shop's packages, this checkout, and the tools for checks and tests.
LOCKED := $(VENV)/.locked
READY := $(VENV)/.ready
DEV := $(VENV)/.dev
# The oldest supported packages. With a Python that they have wheels for: make OLDEST_PYTHON=python3.11
OLDEST := $(VENV)/oldest
OLDEST_PYTHON ?= $(PYTHON)
FRESH := $(VENV)/generated
LOCKS := requirements.lock requirements-dev.lock requirements-oldest.lock
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
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# -- the shop ---------------------------------------------------------------------------------------------------------
.PHONY: run-mesh
run-mesh: $(READY) ## run the whole shop until Ctrl-C (USERS=3 ORDERS=2 NOTIFICATIONS=2 PORT=50050 DATA=data)
	@exec $(BIN)/python -m services --users '$(USERS)' --orders '$(ORDERS)' --notifications '$(NOTIFICATIONS)' \
		--port '$(PORT)' --data '$(DATA)'

.PHONY: load
load: $(READY) ## send a realistic mix of calls to a running shop, with live statistics (RATE=50 FOR=30 PORT=50050)
	@exec $(BIN)/python -m services.load --rate '$(RATE)' --for '$(FOR)' --registry '127.0.0.1:$(PORT)'

# -- tests ------------------------------------------------------------------------------------------------------------
.PHONY: test
test: lint types check-generated layers coverage unit ## run all checks and tests: lint, types, check-generated, layers, coverage, unit

.PHONY: lint
lint: $(READY) $(DEV) ## check rules and formatting with ruff and buf
	@echo '== lint'
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "Run: $(BIN)/ruff format"; exit 1; }
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code protos

.PHONY: types
types: $(READY) $(DEV) ## check types with mypy, strict
	@echo '== types'
	@$(BIN)/mypy

.PHONY: check-generated
check-generated: $(READY) $(DEV) ## check that generated/ matches the protos
	@echo '== generated code'
	@if $(has_oldest); then $(MAKE) -s same-generated; \
		else echo "skipped: needs a Python before 3.14, see make OLDEST_PYTHON=python3.11"; fi

.PHONY: same-generated
same-generated: $(READY) $(DEV) $(OLDEST)/.ready
	@rm -rf $(FRESH) && mkdir -p $(FRESH)
	@$(BIN)/python protos/generate.py $(FRESH) --protoc $(OLDEST)/bin/python
	@diff -r -x __pycache__ generated $(FRESH) || { echo "generated/ does not match protos/. Run: make generate"; exit 1; }
	@rm -rf $(FRESH)

.PHONY: layers
layers: $(READY) $(DEV) ## check that files import only from layers below their own
	@echo '== layers'
	@$(BIN)/lint-imports --no-logo

# Only tests/policy, so that nothing else adds to the coverage. (`unit` skips it.)
.PHONY: coverage
coverage: $(READY) $(DEV) ## check that all branches of mesh/policy are tested
	@echo '== coverage of mesh/policy'
	@$(BIN)/pytest -q -n 3 tests/policy --cov=mesh.policy --cov-branch --cov-report=term-missing:skip-covered \
		--cov-fail-under=100

# More processes than cores: many tests wait for processes and deadlines.
.PHONY: unit
unit: $(READY) $(DEV) ## run the tests, except those that kill processes (ARGS='tests/policy -x' for some of them)
	@echo '== tests'
	@$(BIN)/pytest -n 4 --dist=loadscope -m 'not faults' $(or $(ARGS),--ignore=tests/policy)

.PHONY: test-oldest
test-oldest: $(OLDEST)/.ready ## run the mesh's tests on the oldest supported grpcio and protobuf
	@echo '== tests on the oldest packages'
	@$(OLDEST)/bin/python -m pytest -n 3 --dist=loadscope -m 'not faults' \
		$(or $(ARGS),tests/channel tests/server tests/registry tests/discovery tests/config tests/testing tests/test_context.py)

.PHONY: test-faults
test-faults: $(READY) $(DEV) ## run the long tests, in which real processes are killed, stopped and restarted
	@echo '== faults'
	@$(BIN)/pytest -v -m faults $(ARGS)

.PHONY: bench-call
bench-call: $(READY) $(DEV) ## measure the CPU of a call: the mesh, gRPC core's round_robin, a bare channel
	@$(BIN)/python -m benchmarks.call

.PHONY: bench-cluster
bench-cluster: $(READY) $(DEV) ## measure balancing, outlier detection and updates, against gRPC core (about 3 minutes)
	@$(BIN)/python -m benchmarks.cluster

.PHONY: bench-server
bench-server: $(READY) $(DEV) ## measure a server's cost, overload, rolling restarts, the registry (about 3 minutes)
	@$(BIN)/python -m benchmarks.server

.PHONY: bench-events
bench-events: $(READY) $(DEV) ## measure the delay from orders to notifications, at 100 orders per second
	@$(BIN)/python -m benchmarks.events

.PHONY: bench-shop
bench-shop: $(READY) $(DEV) ## measure CreateOrder through the mesh, against the raw rate of SQLite and PostgreSQL
	@$(BIN)/python -m benchmarks.shop

# -- upkeep -----------------------------------------------------------------------------------------------------------
.PHONY: setup
setup: $(READY) $(DEV) ## create the virtual environment with the locked packages (other targets do this, too)

# Packages are installed as locked, without resolving: pip before 23.3 resolves extras again even with --require-hashes,
# and fails once something newer is released. No sdists: building one downloads packages that are not locked.
EXACTLY := --no-deps --require-hashes --only-binary :all:

# $(call install,FOLDER,LOCK): installs a lock file into the environment in FOLDER.
define install
	@$(if $(UV),$(UV) pip install -q --python $(1)/bin/python $(EXACTLY) -r $(2), \
	{ $(1)/bin/python -m pip install --disable-pip-version-check --progress-bar off $(EXACTLY) \
		-r $(2) || touch $(1)/.failed; } | awk -v all="$$(grep -c == $(2))" \
		'/^Collecting/ && ++n % 10 == 0 { print "  " n " of " all " packages"; fflush() } \
		/^Installing/ { print "  installing"; fflush() }' && ! rm $(1)/.failed 2>/dev/null)
endef

# $(call checkout,FOLDER): installs this checkout, editable, and checks that all packages are compatible.
define checkout
	@$(if $(UV),$(UV) pip install -q --python $(1)/bin/python --no-deps --no-build-isolation -e ., \
		$(1)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .)
	$(call check,$(1))
endef

define check
	@$(if $(UV),$(UV) pip check -q --python $(1)/bin/python, \
		$(1)/bin/python -m pip --disable-pip-version-check check >$(1)/.check || { cat $(1)/.check; exit 1; })
endef

# $(call environment,PYTHON,FOLDER): creates an empty environment.
define environment
	@rm -rf $(2)
	@$(if $(UV),$(UV) venv -q --no-project --python "$$(command -v $(1))" $(2),$(1) -m venv $(2))
endef

# grpcio 1.72.1 has wheels for Python 3.11 to 3.13.
has_oldest = $(OLDEST_PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 14))'

# A changed lock file makes a new environment, without packages that it no longer has.
$(LOCKED): $(LOCKS)
	@command -v $(PYTHON) >/dev/null || { echo "weft needs Python 3.11 or later; $(PYTHON) is not installed"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "weft needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
		"With another one: make PYTHON=python3.12"; exit 2; }
	@$(if $(UV),:,$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null) || \
		{ echo "$(PYTHON) has no venv module here; on Debian or Ubuntu: apt-get install python3-venv"; exit 2; }
	@echo "Setting up $(VENV) (once, about half a minute)"
	$(call environment,$(PYTHON),$(VENV))
	$(call install,$(VENV),requirements.lock)
	@touch $@

$(READY): $(LOCKED) pyproject.toml
	$(call checkout,$(VENV))
	@touch $@

$(DEV): $(LOCKED) | $(READY)
	@echo "Adding what checks and tests need (once, about half a minute)"
	$(call install,$(VENV),requirements-dev.lock)
	$(call check,$(VENV))
	@touch $@

$(OLDEST)/.ready: $(LOCKED)
	@$(has_oldest) || { echo "grpcio 1.72.1 has no wheel for $(OLDEST_PYTHON); with another Python:" \
		"make OLDEST_PYTHON=python3.11"; exit 2; }
	@echo "Setting up $(OLDEST) (once, about 20 seconds)"
	$(call environment,$(OLDEST_PYTHON),$(OLDEST))
	$(call install,$(OLDEST),requirements-oldest.lock)
	$(call checkout,$(OLDEST))
	@touch $@

.PHONY: generate
generate: $(READY) $(DEV) $(OLDEST)/.ready ## regenerate generated/ from protos/
	@rm -rf generated && mkdir -p generated
	@$(BIN)/python protos/generate.py generated --protoc $(OLDEST)/bin/python

.PHONY: docs
docs: $(READY) $(DEV) ## regenerate the pages in docs/ that come from sources
	@$(BIN)/python docs/generate.py

.PHONY: format
format: $(READY) $(DEV) ## format the Python and proto files
	@$(BIN)/ruff format --quiet .
	@$(BIN)/buf format --write protos

COMPILE := uv pip compile -q --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

.PHONY: lock
lock: ## update the lock files to the newest releases (needs uv)
	$(COMPILE) pyproject.toml --all-extras --group dev -o requirements-dev.lock
	$(COMPILE) pyproject.toml --extra services --group shop -c requirements-dev.lock -o requirements.lock
	$(COMPILE) pyproject.toml requirements-oldest.in --extra dns --group test -o requirements-oldest.lock

.PHONY: clean
clean: ## remove the virtual environment, caches and build output (data/ stays)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage
