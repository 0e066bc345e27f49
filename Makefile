# Two commands do everything on a machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= $(or $(shell command -v python3.11),python3)
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
# every target that help lists
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/uv:
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "error: $(PYTHON) is not Python 3.11: name one with make PYTHON=..." >&2; exit 2; }
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

setup: .venv/product ## virtual environment with the product's pinned packages
setup-dev: .venv/dev ## the same with the tools for development

demo: .venv/product ## the main job, end to end (DATA=eurosat EUROSAT_ROOT=folder for the real tiles)
	$(BIN)/python -m experiments.demo data=$(DATA) $(DEMO_ARGS)

doctor: .venv/product ## what is wrong with this machine, the platform, or between them (docs/doctor.md)
	$(BIN)/python -m eurosat.doctor $(DOCTOR_ARGS)

main-job: .venv/product ## the main job on the real tiles, figures into reports/main-job.json
	$(BIN)/python -m experiments.demo data=eurosat report=reports/main-job.json $(DEMO_ARGS)
	$(BIN)/python -m benchmarks.tables

# The floor of coverage is held only by the whole set of tests.
COVERAGE := $(if $(PYTEST_ARGS),--cov-fail-under=0,)

test: .venv/dev ## the tests with coverage (PYTEST_ARGS='-k split' for some)
	$(BIN)/python -m pytest -m 'not slow and not docker' --cov --cov-report=term $(COVERAGE) \
		--durations=40 --durations-min=5 $(PYTEST_ARGS)

test-slow: .venv/dev ## the long forms of the tests
	$(BIN)/python -m pytest -m 'slow and not docker' $(PYTEST_ARGS)

test-docker: .venv/dev ## docker-compose.yml, all of it, on this machine's engine
	$(BIN)/python -m pytest -m docker -s $(PYTEST_ARGS)

audit: .venv/dev ## known faults of the locked packages
	$(BIN)/python -m deploy.audit

secrets: .venv/product ## the platform's secrets, those that are missing
	$(BIN)/python -m deploy.secrets

platform: .venv/dev ## the platform without containers, on loopback (PLATFORM_ARGS=--free-ports)
	$(BIN)/python -m deploy.platform up $(PLATFORM_ARGS)

platform-down: .venv/dev ## its end; what it keeps stays in .platform
	$(BIN)/python -m deploy.platform down $(PLATFORM_ARGS)

ROLE ?= reader

user: .venv/product ## a user of the platform (NAME=ada ROLE=reader, writer or promoter)
	$(BIN)/python -m deploy.users add $(NAME) --role $(ROLE)

# Each peer of a benchmark has an environment of its own.
.venv-torchgeo/done: benchmarks/torchgeo.lock
.venv-litserve/done: benchmarks/serving/litserve.lock
.venv-bentoml/done: benchmarks/serving/bentoml.lock
.venv-torchgeo/done .venv-litserve/done .venv-bentoml/done: | $(BIN)/uv
	$(PYTHON) -m venv $(@D)
	$(BIN)/uv pip install --python $(@D)/bin/python --quiet --require-hashes -r $<
	@touch $@

bench-train: .venv/product .venv-torchgeo/done ## training speed against a plain loop, torchgeo and the bare step
	$(BIN)/python -m benchmarks.train --torchgeo .venv-torchgeo/bin/python $(BENCH_ARGS)

RECIPE ?= resnet18-quick
STUDY ?= few-labels

bench-results: .venv/product ## a row of the results table (RECIPE=efficientnet-lite0 BENCH_ARGS='--seeds 0')
	$(BIN)/python -m benchmarks.results $(RECIPE) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

bench-extras: .venv/product ## a study beside it (STUDY=few-labels, learning-rates, features or bands)
	$(BIN)/python -m benchmarks.studies $(STUDY) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

bench-convolutions: .venv/product ## training steps with our convolutions on a CPU and with PyTorch's
	$(BIN)/python -m benchmarks.convolutions $(BENCH_ARGS)

bench-tracking: .venv/product ## what logging costs a training step, on a near and a far server
	$(BIN)/python -m benchmarks.tracking $(BENCH_ARGS)

bench-sweep: .venv/product ## what a sweep finds for its epochs, against random trials (an hour)
	$(BIN)/python -m benchmarks.sweep $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

.PHONY: wrk
wrk:
	@command -v wrk >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get install --yes --quiet wrk; } || \
		{ echo "error: wrk is not installed: apt-get install wrk" >&2; exit 2; }

bench-serving: .venv/product .venv-litserve/done .venv-bentoml/done wrk ## our server against MLflow's, FastAPI, LitServe and BentoML (20 minutes)
	$(BIN)/python -m benchmarks.serving --litserve $(CURDIR)/.venv-litserve/bin/python \
		--bentoml $(CURDIR)/.venv-bentoml/bin/python $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

bench-strain: .venv/product wrk ## our server overrun, and its version swapped under load
	$(BIN)/python -m benchmarks.serving.overload $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

soak-serving: .venv/product wrk ## the same, and 20 minutes of load in which nothing may grow
	$(BIN)/python -m benchmarks.serving.overload --soak 20 $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

tune-serving: .venv/product wrk ## the processes and batches that serve fastest on this machine
	$(BIN)/python -m benchmarks.serving.tune $(BENCH_ARGS)

bench-forms: .venv/product ## FP32, INT8, bf16, compiled and pruned forms of a run's network (RUN=id)
	$(BIN)/python -m benchmarks.precisions $(RUN) $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

bench-registry: .venv/product ## how long a judgement and a rollback take, and how often chance promotes
	$(BIN)/python -m benchmarks.registry $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

# What `make platform` wrote, but for the variables that are set already.
PLATFORM := env $$(awk -F= '!($$1 in ENVIRON)' .platform/env 2>/dev/null)

backup: .venv/product ## databases and artifacts of the platform into one archive (TO=folder or gs://bucket/prefix)
	@$(PLATFORM) $(BIN)/python -m deploy.backup save --to '$(or $(TO),$(error TO=folder or gs://bucket/prefix is missing))'

restore: .venv/product ## an archive of it (FROM=file or gs://…; ARGS=--replace where there is something)
	@$(PLATFORM) $(BIN)/python -m deploy.backup restore --from '$(or $(FROM),$(error FROM=file or gs://… is missing))' $(ARGS)

bench-platform: .venv/dev ## the platform written to and searched while its services fall over (a quarter of an hour)
	$(BIN)/python -m benchmarks.platform $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.tables

sweep-ui: .venv/product ## look at the studies while they run (STORAGE=sqlite:///optuna.db)
	$(BIN)/optuna-dashboard $(STORAGE)

# gcsfs would ask Google which kind of bucket it is, also where an emulator stands for Google.
DVC = PATH="$(abspath $(BIN)):$$PATH" GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false $(BIN)/dvc

data: .venv/dev ## a version of the data that params.yaml names: fetch, pack, validate, split
	$(DVC) repro $(DVC_ARGS)

dvc-remote: .venv/dev ## keep versions of the data in gs://EUROSAT_BUCKET/versions
	@[ -n "$(EUROSAT_BUCKET)" ] || { echo "error: which bucket? make $@ EUROSAT_BUCKET=name" >&2; exit 2; }
	$(DVC) remote modify --local bucket url gs://$(EUROSAT_BUCKET)/versions

data-push data-pull: .venv/dev
data-push: ## send the versions that are here to the bucket
	$(DVC) push $(DVC_ARGS)

data-pull: ## bring the version that dvc.lock names from the bucket
	$(DVC) pull $(DVC_ARGS)

lint: .venv/dev ## ruff, mypy and import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

describe: .venv/product ## figures of the data set into reports/describe-DATA
	$(BIN)/python -m eurosat.data describe data=$(DATA)

lock: $(BIN)/uv ## compile the locks anew from pyproject.toml
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

clean: ## remove what runs left here: tracking data, studies, Data Docs (not .venv, not the packs)
	rm -rf mlflow.db mlruns mlartifacts optuna.db data_docs reports/demo.json
