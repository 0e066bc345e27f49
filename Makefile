# On a machine with Python 3.11, 3.12 or 3.13 two commands do everything: `make demo` and `make test`.
# The newest of them that works, or the one that PYTHON names.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c $(IS_SUPPORTED) 2>/dev/null && echo $$python && break; done)
IS_SUPPORTED := 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
DATA ?= synthetic
STORAGE ?= sqlite:///optuna.db
ifneq ($(filter-out gs://%,$(EUROSAT_ROOT)),)
export EUROSAT_ROOT := $(abspath $(EUROSAT_ROOT))
endif
export MLFLOW_DISABLE_TELEMETRY = true
export DO_NOT_TRACK = true

BIN := .venv/bin
UV := $(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode --require-hashes

.DEFAULT_GOAL := help
# Every target that `make help` lists.
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/uv:
	@$(or $(PYTHON),false) -c $(IS_SUPPORTED) || { echo "error: $(or $(PYTHON),python3) is not Python 3.11, 3.12" \
		"or 3.13 with the module ensurepip: install it (Debian: apt-get install python3-venv), or run" \
		"make PYTHON=/path/to/python3.13" >&2; exit 2; }
	@echo "creating .venv with $$($(PYTHON) --version)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'

.venv/product: requirements.lock | $(BIN)/uv
	@echo "installing the pinned packages (about a minute, 6 GB on disk)"
	$(UV) -r requirements.lock
	@touch $@

.venv/dev: requirements-dev.lock .venv/product
	@echo "installing the development packages"
	$(UV) -r requirements-dev.lock
	@touch $@

setup: .venv/product ## create .venv with the product's pinned packages
setup-dev: .venv/dev ## create .venv with the development tools too

demo: .venv/product ## run the whole job, end to end (DATA=eurosat EUROSAT_ROOT=folder for the real tiles)
	$(BIN)/python -m experiments.demo data=$(DATA) $(DEMO_ARGS)

doctor: .venv/product ## check this machine and the platform (docs/doctor.md)
	$(BIN)/python -m eurosat.doctor $(DOCTOR_ARGS)

main-job: .venv/product ## run the whole job on the real tiles and write reports/main-job.json
	$(BIN)/python -m experiments.demo data=eurosat report=reports/main-job.json $(DEMO_ARGS)
	$(BIN)/python -m benchmarks.tables main-job

# The whole set runs on all cores, up to four, and has to reach the coverage floor. From Python 3.12 on,
# coverage uses sys.monitoring. Threads that wait must not spin: they would hold the cores of other workers.
WORKERS ?= --numprocesses=logical --maxprocesses=4 --dist=loadfile
WHOLE := $(if $(PYTEST_ARGS),--cov-fail-under=0,$(WORKERS))
CORE = $$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")')

test: .venv/dev ## run the tests with coverage (PYTEST_ARGS='-k split' for some)
	OMP_WAIT_POLICY=passive COVERAGE_CORE=$(CORE) $(BIN)/python -m pytest -m 'not slow and not docker' --cov --cov-report=term \
		--durations=10 --durations-min=1 $(WHOLE) $(PYTEST_ARGS)

test-slow: .venv/dev ## run the tests that take minutes each
	$(BIN)/python -m pytest -m 'slow and not docker' $(PYTEST_ARGS)

test-docker: .venv/dev ## test docker-compose.yml on this machine's Docker engine
	$(BIN)/python -m pytest -m docker -s $(PYTEST_ARGS)

audit: .venv/dev ## look up known vulnerabilities of the locked packages
	$(BIN)/python -m deploy.audit

images: .venv/product ## write the digests that the tags of the container images have now
	$(BIN)/python -m deploy.images refresh

secrets: .venv/product ## create the platform's secrets that are missing
	$(BIN)/python -m deploy.secrets

platform: .venv/dev ## start the platform without containers, on loopback (PLATFORM_ARGS=--free-ports)
	$(BIN)/python -m deploy.platform up $(PLATFORM_ARGS)

platform-down: .venv/dev ## stop that platform; its data stays in .platform
	$(BIN)/python -m deploy.platform down $(PLATFORM_ARGS)

ROLE ?= reader

user: .venv/product ## add a user of the platform (NAME=ada ROLE=reader, writer or promoter)
	$(BIN)/python -m deploy.users add $(NAME) --role $(ROLE)

tables: .venv/product ## write the tables of README.md and docs/benchmarks.md from reports/
	$(BIN)/python -m benchmarks.tables

# Each peer in a benchmark has its own environment.
.venv-torchgeo/done: benchmarks/torchgeo.lock
.venv-litserve/done: benchmarks/serving/litserve.lock
.venv-bentoml/done: benchmarks/serving/bentoml.lock
.venv-torchgeo/done .venv-litserve/done .venv-bentoml/done: | $(BIN)/uv
	$(PYTHON) -m venv $(@D)
	$(BIN)/uv pip install --python $(@D)/bin/python --quiet --require-hashes -r $<
	@touch $@

bench-train: .venv/product .venv-torchgeo/done ## measure training speed against a plain loop, torchgeo and the bare step
	$(BIN)/python -m benchmarks.train --torchgeo .venv-torchgeo/bin/python $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables bench-train

RECIPE ?= resnet18-quick
STUDY ?= few-labels

bench-results: .venv/product ## measure a row of the results table (RECIPE=efficientnet-lite0 BENCH_ARGS='--seeds 0')
	$(BIN)/python -m benchmarks.results $(RECIPE) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables results

bench-studies: .venv/product ## measure a study (STUDY=few-labels, learning-rates, features or bands)
	$(BIN)/python -m benchmarks.studies $(STUDY) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables studies

bench-convolutions: .venv/product ## compare our CPU convolutions with PyTorch's in a training step
	$(BIN)/python -m benchmarks.convolutions $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables bench-convolutions

bench-tracking: .venv/product ## measure what logging adds to a training step, with a near and a far server
	$(BIN)/python -m benchmarks.tracking $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables bench-tracking

bench-sweep: .venv/product ## compare a sweep with random trials, per epoch trained (an hour)
	$(BIN)/python -m benchmarks.sweep $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables bench-sweep

.PHONY: wrk
wrk:
	@command -v wrk >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get install --yes --quiet wrk; } || \
		{ echo "error: wrk is not installed: apt-get install wrk" >&2; exit 2; }

bench-serving: .venv/product .venv-litserve/done .venv-bentoml/done wrk ## compare our server with MLflow's, FastAPI, LitServe and BentoML (20 minutes)
	$(BIN)/python -m benchmarks.serving --litserve $(CURDIR)/.venv-litserve/bin/python \
		--bentoml $(CURDIR)/.venv-bentoml/bin/python $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables bench-serving

bench-overload: .venv/product wrk ## measure our server under overload, and while versions are swapped
	$(BIN)/python -m benchmarks.serving.overload $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables bench-overload

soak-serving: .venv/product wrk ## the same, then 20 minutes of load in which memory must not grow
	$(BIN)/python -m benchmarks.serving.overload --soak 20 $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables bench-overload

tune-serving: .venv/product wrk ## find the number of processes and the batch size that serve fastest here
	$(BIN)/python -m benchmarks.serving.tune $(BENCH_ARGS)

bench-precisions: .venv/product ## compare the precisions of a run's network (RUN=id)
	$(BIN)/python -m benchmarks.precisions $(RUN) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables bench-precisions

bench-registry: .venv/product ## measure judging, rollback, and how often chance promotes
	$(BIN)/python -m benchmarks.registry $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables bench-registry

# The variables that `make platform` wrote, except those that are already set.
PLATFORM := env $$(awk -F= '!($$1 in ENVIRON)' .platform/env 2>/dev/null)

backup: .venv/product ## save the platform's databases and artifacts (TO=folder or gs://bucket/prefix)
	@$(PLATFORM) $(BIN)/python -m deploy.backup save --to '$(or $(TO),$(error TO=folder or gs://bucket/prefix is missing))'

restore: .venv/product ## restore a backup (FROM=file or gs://…; ARGS=--replace overwrites)
	@$(PLATFORM) $(BIN)/python -m deploy.backup restore --from '$(or $(FROM),$(error FROM=file or gs://… is missing))' $(ARGS)

bench-platform: .venv/dev ## load the platform while its services are killed (a quarter of an hour)
	$(BIN)/python -m benchmarks.platform $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables bench-platform

sweep-ui: .venv/product ## show the studies in a browser (STORAGE=sqlite:///optuna.db)
	$(BIN)/optuna-dashboard $(STORAGE)

# Without this, gcsfs asks Google for the kind of bucket even when an emulator is used.
DVC = PATH="$(abspath $(BIN)):$$PATH" GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false $(BIN)/dvc

data: .venv/dev ## make the data version of params.yaml: fetch, pack, validate, split
	$(DVC) repro $(DVC_ARGS)

dvc-remote: .venv/dev ## store data versions in gs://EUROSAT_BUCKET/versions
	@[ -n "$(EUROSAT_BUCKET)" ] || { echo "error: EUROSAT_BUCKET is not set: run make $@ EUROSAT_BUCKET=name" >&2; exit 2; }
	$(DVC) remote modify --local bucket url gs://$(EUROSAT_BUCKET)/versions

data-push data-pull: .venv/dev
data-push: ## upload the local data versions to the bucket
	@EUROSAT_ARTIFACTS=$$($(DVC) config remote.bucket.url) $(PLATFORM) $(BIN)/python -m eurosat.doctor --only bucket
	$(PLATFORM) $(DVC) push $(DVC_ARGS)

data-pull: ## download the data version of dvc.lock from the bucket
	$(PLATFORM) $(DVC) pull $(DVC_ARGS)

lint: .venv/dev ## run ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/dev ## format the code and fix what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/dev ## build the documentation as a site, build/docs/index.html
	$(BIN)/python -m sphinx -W --keep-going -n -q -d build/doctrees docs build/docs

describe: .venv/product ## draw the data set into reports/describe-DATA
	$(BIN)/python -m eurosat.data describe data=$(DATA)

lock: $(BIN)/uv ## compile the lock files from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --quiet -o requirements.lock
	$(BIN)/uv pip compile pyproject.toml --group dev -c requirements.lock --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet \
		-o requirements-dev.lock
	for image in mlflow postgres serving; do $(BIN)/uv pip compile deploy/$$image/requirements.in \
		-c requirements.lock --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --quiet -o deploy/$$image/requirements.lock; done
	$(BIN)/uv pip compile benchmarks/torchgeo.in -c requirements.lock --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet \
		-o benchmarks/torchgeo.lock
	$(BIN)/uv pip compile benchmarks/serving/litserve.in -c requirements.lock --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet \
		-o benchmarks/serving/litserve.lock
	$(BIN)/uv pip compile benchmarks/serving/bentoml.in --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet \
		-o benchmarks/serving/bentoml.lock

clean: ## remove tracking data, studies and Data Docs from this folder (not .venv, not the cache)
	rm -rf mlflow.db mlruns mlartifacts optuna.db data_docs reports/demo.json
