# make help explains every target.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
# reads records only: without .venv, any Python with numpy, pandas, pyarrow, matplotlib and pillow will do
ANALYSIS := $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) -m analysis
# the experiments of results/reference that `make reference` renews
REFERENCE := demo methods positions redundancy attention matched_budget rivals rivals_twins
export TOKENIZERS_PARALLELISM := false
# threads that spin while they wait cost more than they compute where cores are shared
export GOMP_SPINCOUNT := 0
# images of containers often forbid bytecode: then each start compiles torch and the rest anew (35 CPU s instead of 14)
export PYTHONDONTWRITEBYTECODE :=
STUDY := train.data=build/study/train.json train.batch_size=24 train.micro_batch=24 train.learning_rate=5e-4

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all parity torture torture-workers ray-launcher
.PHONY: walk check docs wheel release-check bench bench-choosing bench-training bench-evaluation
.PHONY: bench-workers training-study tables figures report repro embedded-model reference lock
.PHONY: clean

help: ## Say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv and install what requirements.lock pins (about 7 GB; done once)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version): pdrop needs 3.11, 3.12 or 3.13; call make PYTHON=python3.12"; exit 1; }
	@echo "== setting up $(VENV): PyTorch and friends, about 7 GB"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@( while sleep 30 >/dev/null 2>&1; do echo "   still installing"; done ) & alive=$$!; trap "kill $$alive" EXIT; \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	@echo "== $(VENV) is complete: source $(VENV)/bin/activate"
	@touch $(STAMP)

demo: $(STAMP) ## Run the first comparison on the embedded model and render its table and figure
	@echo "== running experiments/demo.yaml (finished runs are skipped; interrupt and repeat at will)"
	@$(BIN)/python run.py -m experiments=demo
	@echo "== rendering"
	@$(BIN)/python -m analysis tables demo
	@$(BIN)/python -m analysis figures demo
	@echo "== the runs are in results/runs, the table in results/tables/demo.md .csv .tex, the figure in results/figures"

test: $(STAMP) ## Run the tests, with some cases of each exhaustive product (no network, no GPU; about ten CPU minutes)
	@echo "== running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not exhaustive and not torture"

test-all: $(STAMP) ## Run all tests, with every case of the products of methods, families and backends (pytest --collect-only -qm exhaustive)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not torture"

parity: $(STAMP) ## Compare protocol=lmms_eval with lmms-eval's own wrappers (token ids, pixels, answers, scores); run every task of every set
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/evaluation/test_parity.py tests/evaluation/test_video_parity.py tests/evaluation/test_task_sets.py

torture: $(STAMP) ## Kill runs at random moments, mistype everything, damage stores: 0 tracebacks, 0 accepted, 0 lost (half an hour on two cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m torture tests

torture-workers: $(STAMP) ## Kill workers and commands of many workers at random, 30 times (KILLS=30 SEED=0), and resume with others: the same record
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -m torture tests/torture/test_worker_kills.py

ray-launcher: $(STAMP) ## Try Hydra's launcher for Ray, in the separate environment build/ray-launcher: it pins another cloudpickle
	@$(PYTHON) -m venv build/ray-launcher
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > build/ray-launcher/main.pth
	@cp build/ray-launcher/main.pth "$$(build/ray-launcher/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_main.pth"
	@build/ray-launcher/bin/python -m pip --disable-pip-version-check install --quiet --no-deps hydra-ray-launcher==1.2.2 'cloudpickle<3'
	@PDROP_RAY_LAUNCHER_PYTHON="$(abspath build/ray-launcher/bin/python)" $(BIN)/python -m pytest -q tests/cli/test_launchers.py -k ray

walk: $(STAMP) ## Attach to a LLaVA with every text model of transformers: ranked by its own attention, or refused (about 5 minutes on one core)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pdrop.conformance.walk

check: $(STAMP) ## Format and lint, look for large files and broken YAML (the checks before a commit); check the types
	@if git rev-parse --git-dir >/dev/null 2>&1; then \
		PATH="$(abspath $(BIN)):$$PATH" PRE_COMMIT_HOME=build/pre-commit $(BIN)/pre-commit run --all-files; \
	else echo "not a git checkout: ruff alone"; $(BIN)/ruff format --check . && $(BIN)/ruff check .; fi
	@$(BIN)/mypy

docs: $(STAMP) ## Build the site in build/docs, strictly; no network
	@$(BIN)/sphinx-build -W --keep-going -n -q -E -d build/doctrees docs build/docs
	@echo "== build/docs/index.html"

wheel: $(STAMP) ## Build dist/pdrop-*.whl; no network
	@rm -rf build/lib build/bdist* dist
	@$(BIN)/python -m pip --disable-pip-version-check --quiet wheel . --no-deps --no-build-isolation --wheel-dir dist
	@ls dist/*.whl

release-check: check docs wheel ## What a release checks in addition to make test-all: see docs/releasing.md
	@PDROP_WHEEL="$$(ls dist/*.whl)" $(BIN)/python -m pytest -q $(wildcard tests/project/test_package.py tests/*/test_package.py)

bench: $(STAMP) ## Time prefill and decoding against the FLOPs ratio (about 20 minutes on one core)
	@$(BIN)/python -m benchmarks.bench
	@$(BIN)/python -m analysis bench

bench-choosing: $(STAMP) ## Time what choosing tokens takes, for every method (about 4 minutes on one core)
	@$(BIN)/python -m benchmarks.bench_choosing
	@$(BIN)/python -m analysis bench

bench-training: $(STAMP) ## Time training steps against the FLOPs ratio (about 8 minutes on one core)
	@$(BIN)/python -m benchmarks.bench_training

bench-evaluation: $(STAMP) ## Time evaluation against lmms-eval's own wrapper, and a device that waits for pictures (about 8 CPU minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_evaluation $(if $(BEFORE),--before $(BEFORE))

bench-workers: $(STAMP) ## Time two workers against one, a sweep's loads, and up to 64 workers that sleep (about 10 minutes on two free cores)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_workers

training-study: $(STAMP) ## Train the embedded model with and without dropping and score it both ways (about an hour and a half on one core)
	@test -f build/study/train.json || $(BIN)/python -m pdrop.embedded.export --out build/study --first 300000 \
		--images 4800 --mix scene=0.75,chart=0.25 --turns 1 \
		--families existence=0.5,attribute=0.5,relation=0.7,position,counting=0.5,reading,chart,choice=0.8,multihop
	@$(BIN)/python train.py -m seed=0,1,2 method=none,pyramiddrop,fastv $(STUDY)
	@$(BIN)/python train.py -m method=pyramiddrop ratio=0.4,0.6 $(STUDY)
	@$(BIN)/python train.py -m method=pyramiddrop stages=3,5 $(STUDY)
	@$(BIN)/python -m pdrop.training.commands results/trainings batch_size=16 > build/score.sh
	@$(BIN)/python -m pdrop.training.commands results/trainings --layers batch_size=16 > build/layers.sh
	@sh -e build/score.sh
	@sh -e build/layers.sh
	@$(ANALYSIS) trainings
	@$(ANALYSIS) tables training redundancy_trained
	@$(ANALYSIS) figures training redundancy_trained

tables: ## Render results/tables from the records
	@$(ANALYSIS) tables

figures: ## Render results/figures from the records, those that changed
	@$(ANALYSIS) figures

report: figures ## Write results/report.html: tables, figures, samples and records in one page that opens offline
	@$(ANALYSIS) report

repro: ## Put our numbers next to those that papers printed: results/tables/repro.md
	@$(ANALYSIS) repro

embedded-model: $(STAMP) ## Train the embedded model from scratch (70 minutes on 2 cores with bfloat16, 2 h 10 min without; resumes; DEVICE=cuda for a GPU)
	@$(BIN)/python -m recipes.embedded.train $(if $(DEVICE),--device $(DEVICE),--workers 2)

reference: $(STAMP) ## Renew results/reference, the README's numbers and those of docs/results.md (half an hour on 2 cores)
	@for name in $(REFERENCE); do $(BIN)/python run.py -m experiments=$$name results=results/reference || exit 1; done
	@$(ANALYSIS) tables --results results/reference --out results/reference
	@$(ANALYSIS) banner rivals --results results/reference --out results/reference
	@$(ANALYSIS) repro --results results/reference --out results/reference
	@$(ANALYSIS) trainings --results results/reference --out results/reference
	@$(ANALYSIS) figures --results results/reference --out results/reference
	@$(ANALYSIS) readme --results results/reference

lock: $(STAMP) ## Renew requirements.lock from pyproject.toml
	@$(BIN)/uv pip compile --generate-hashes --no-emit-index-url --universal --python-version 3.11 --extra dev --extra launchers --extra workers pyproject.toml -o requirements.lock

clean: ## Remove logs and caches; results, .venv and a training in build/embedded stay
	@rm -rf outputs multirun build/lib build/bdist* build/docs build/doctrees build/pre-commit dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
