# make demo            sweep over SID designs on a synthetic catalogue, ending in an HTML report
# make demo DATA=dir   the same on your interactions, items and vectors
# make test            everything that runs in minutes; test-slow and test-services run the rest
PYTHON ?= python3
VENV ?= .venv
STORE ?= forge-store
SCALE_DIR ?= ../scale
SCALE_SIZES ?= 1000000x1000000,1000000x10000000,10000000x100000000
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED := 0
export FORGE_RAY_STORE := $(STORE)

.PHONY: demo test test-ray test-rest test-slow test-services scale lint docs-check setup clean
.DEFAULT_GOAL := demo

setup:
	@echo "setting up $(VENV) (the first time installs the dependencies) …"
	@$(PYTHON) scripts/setup_venv.py $(VENV)

demo: setup
ifdef DATA
	$(BIN)/forge-ray sweep run sweeps/beauty.yaml data=$(DATA) name=$(notdir $(abspath $(DATA)))
else
	$(BIN)/forge-ray sweep run sweeps/quickstart.yaml
endif

# Two halves at once, their dots mixed: tests that share a Ray mostly wait for it, the others compute.
test:
	@$(MAKE) --no-print-directory -j2 test-ray test-rest

test-ray test-rest: test-%: setup
	$(BIN)/python -m pytest -m "$(if $(filter rest,$*),not )ray and not slow and not services"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not services" --timeout 3600

# Needs Debian's chromium, postgresql and prometheus; installs them where we are root. Pictures of the
# pages that the browser opened are kept in build/screenshots.
test-services: setup
	@command -v chromium >/dev/null && command -v promtool >/dev/null && ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || \
	  { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium postgresql prometheus >/dev/null; } || \
	  { echo "chromium, postgresql and prometheus must be installed for these tests." \
	  "Run apt-get install chromium postgresql prometheus."; exit 1; }
	$(BIN)/python -m pytest -m services

# Ten million items and a hundred million interactions through every stage: half an hour on two cores, 10 GB
# below SCALE_DIR. It goes on where it was stopped, and writes docs/results/scale.json.
scale: setup
	$(BIN)/python scripts/record.py scale -- $(BIN)/python scripts/scale.py $(SCALE_DIR) --sizes $(SCALE_SIZES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell forge_ray docs README.md CONTRIBUTING.md CHANGELOG.md

docs-check: setup
	$(BIN)/python scripts/docs_check.py README.md docs/*.md

clean:
	rm -rf $(VENV) $(STORE) build *.egg-info
