# Every target makes what it needs first: a virtual environment in .venv, torch, this package.
# The same command does only what is missing and goes on where it was stopped.

PY     ?= $(shell for p in python3.11 python3 python; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
VENV   ?= .venv
RECIPE ?=
PARENT ?=
SET    ?=
RUN    ?=
QUICK  ?=
SMOKE  ?=
SCALE  ?=
GPUS   ?=
GPU_MEM ?=
WEIGHTS ?=
ACCELERATE ?=
PROCESSES  ?=
NODES      ?=
NODE_RANK  ?=
MASTER     ?=

# torch comes first. With a GPU: the newest build; without: the version that has a small CPU build.
HAS_GPU = $(shell command -v nvidia-smi 2>/dev/null)
TORCH  ?= $(if $(HAS_GPU),torch>=2.9,torch==2.13.0)

PYTHON = $(VENV)/bin/python
PIP    = $(PYTHON) -m pip --disable-pip-version-check --quiet
ARGS   = $(if $(SCALE),--scale '$(SCALE)') $(if $(RECIPE),--recipe '$(RECIPE)') $(if $(PARENT),--parent '$(PARENT)') $(if $(RUN),--run '$(RUN)') \
         $(if $(SET),--set '$(SET)') $(if $(filter-out 0,$(QUICK)),--quick) $(if $(filter-out 0,$(SMOKE)),--smoke)
# how the training commands are spread over processes and machines
SPREAD = $(if $(FORCE),--force '$(FORCE)') $(if $(ACCELERATE),--accelerate '$(ACCELERATE)') $(if $(PROCESSES),--processes '$(PROCESSES)') \
         $(if $(NODES),--nodes '$(NODES)') $(if $(NODE_RANK),--node-rank '$(NODE_RANK)') $(if $(MASTER),--master '$(MASTER)')
RUN_IT = $(PYTHON) -m distill

.DEFAULT_GOAL := help
.PHONY: help online-lpm data teacher ar-teacher keep-teacher trajectories distill distill-stage1 distill-stage2 \
        distill-stage3 distill-stage4 export consolidate evaluate report ablate score compare bands stream serve latency drift \
        doctor \
        lineage recipes validate plan runs diff import-wan gpu-check test mutants objectives lint types gpu ci smoke clean \
        clean-venv

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  RECIPE=file.yaml  PARENT=checkpoint  SET="train.steps=50 optimizer.lr=1e-4"  RUN=name  QUICK=1'

# ---- the path -------------------------------------------------------------------------------------------------

online-lpm: $(VENV)/.installed ## everything: data, teacher, stages 1-4, export, evaluation, report (QUICK=1: shorter)
	@$(RUN_IT) online-lpm $(ARGS) $(if $(FORCE),--force '$(FORCE)')

data: $(VENV)/.installed ## prepare speech, characters and latents
	@$(RUN_IT) data $(ARGS)

teacher: $(VENV)/.installed ## train the teacher from nothing (a trained one is kept in the repository)
	@$(RUN_IT) teacher $(ARGS) $(SPREAD)

ar-teacher: $(VENV)/.installed ## make the teacher causal, for trajectories of its own (teacher or diffusion forcing)
	@$(RUN_IT) ar-teacher $(ARGS)

keep-teacher: $(VENV)/.installed ## put the teacher of RUN= where the repository keeps one
	@$(RUN_IT) keep $(ARGS)

trajectories: $(VENV)/.installed ## store the teacher's sampling trajectories for stage 1
	@$(RUN_IT) trajectories $(ARGS)

distill: $(VENV)/.installed ## trajectories and stages 1 to 4
	@$(RUN_IT) distill $(ARGS) $(if $(FORCE),--force '$(FORCE)')

distill-stage1: $(VENV)/.installed ## causal initialization of the student, by ODE regression as shipped
	@$(RUN_IT) stage1 $(ARGS) $(SPREAD)

distill-stage2: $(VENV)/.installed ## distribution matching, off-policy as shipped
	@$(RUN_IT) stage2 $(ARGS) $(SPREAD)

distill-stage3: $(VENV)/.installed ## distribution matching on the student's own long rollouts, on-policy as shipped
	@$(RUN_IT) stage3 $(ARGS) $(SPREAD)

distill-stage4: $(VENV)/.installed ## the one-step refiner
	@$(RUN_IT) stage4 $(ARGS) $(SPREAD)

export: $(VENV)/.installed ## gather the Online LPM folder
	@$(RUN_IT) export $(ARGS)

consolidate: $(VENV)/.installed ## write the checkpoint PARENT= (or the run's newest) as one plain safetensors set
	@$(RUN_IT) consolidate $(ARGS)

evaluate: $(VENV)/.installed ## measure teacher and student on held-out characters and speech
	@$(RUN_IT) evaluate $(ARGS)

report: $(VENV)/.installed ## write the report of a run again from its scores
	@$(RUN_IT) report $(ARGS)

stream: $(VENV)/.installed ## film a character: AUDIO=file [LISTEN=file] [CHARACTER=name] [TEXT=".."] [MODEL=folder] [OUT=file.mp4]
	@$(RUN_IT) stream $(ARGS) --audio '$(AUDIO)' --listen '$(LISTEN)' --character '$(CHARACTER)' --text '$(TEXT)' \
	  --model '$(MODEL)' --out '$(OUT)'

serve: $(VENV)/.serve ## a live page: [MODEL=folder] [COMPARE=folder] [PORT=8000] [HOST=127.0.0.1]; ctrl-C ends it
	@$(RUN_IT) serve $(ARGS) --model '$(MODEL)' --compare '$(COMPARE)' --host '$(HOST)' --port '$(PORT)'

latency: $(VENV)/.installed ## time per chunk, first frame, memory over an hour, and against the teacher (HORIZON=seconds)
	@$(RUN_IT) latency $(ARGS) --model '$(MODEL)' --horizon '$(HORIZON)'

drift: $(VENV)/.installed ## identity, motion and sync over MINUTES=10 of CHARACTERS=24, of RUN=run or grid ([BASELINE="teacher undistilled"] [STAGE=] [MODEL=] [SHARES=])
	@$(RUN_IT) drift $(ARGS) --minutes '$(MINUTES)' --characters '$(CHARACTERS)' --shares '$(SHARES)' --baseline '$(BASELINE)' \
	  --stage '$(STAGE)' --model '$(MODEL)' --age '$(AGE)'

# ---- looking --------------------------------------------------------------------------------------------------

doctor: $(VENV)/.installed ## check this machine: OK, WARN or FAIL lines, each with its remedy
	@$(RUN_IT) doctor

ablate: $(VENV)/.installed ## train and score the cells of GRID=recipes/ablations/<name>.yaml (JOBS=2 at once, DRY=1: list them)
	@$(RUN_IT) ablate --grid '$(GRID)' --jobs '$(JOBS)' --dry '$(DRY)' --seeds '$(SEEDS)' --name '$(RUN)' \
	  $(if $(PARENT),--parent '$(PARENT)') $(if $(SET),--set '$(SET)') $(filter --quick --smoke,$(ARGS))

score: $(VENV)/.installed ## measure the last stage of RUN=, or STAGE=, alone, for make compare
	@$(RUN_IT) score $(ARGS) --stage '$(STAGE)'

compare: $(VENV)/.installed ## one page that holds RUNS="grid" or RUNS="a b" side by side (BASELINE=arm, OUT=folder)
	@$(RUN_IT) compare --runs '$(RUNS)' --baseline '$(BASELINE)' --out '$(OUT)'

bands: $(VENV)/.installed ## reference bands of RECIPE= (or all of SCALE=) over SEEDS=3 up to STEPS=, parents from PARENTS=run
	@$(RUN_IT) bands $(ARGS) --seeds '$(SEEDS)' --steps '$(STEPS)' --parents '$(PARENTS)'

lineage: $(VENV)/.installed ## draw the family tree of RUN= or PARENT=, as text and as picture (OUT=file.svg)
	@$(RUN_IT) lineage $(ARGS) --out '$(OUT)'

recipes: $(VENV)/.installed ## list the recipes and what they cost (PLAN=1: work that out afresh)
	@$(RUN_IT) recipes --plan '$(PLAN)'

validate: $(VENV)/.installed ## check RECIPE= without running it: every problem, with file and line
	@$(RUN_IT) validate $(ARGS)

runs: $(VENV)/.installed ## list the runs with their stages and scores
	@$(RUN_IT) runs

diff: $(VENV)/.installed ## what differs between two checkpoints: A=runs/a/stage2 B=runs/b/stage2
	@$(RUN_IT) diff --a '$(A)' --b '$(B)'

plan: $(VENV)/.installed ## what RECIPE= costs: memory, time, whether it fits GPUS=8 of GPU_MEM=80 GB (JSON=1: for machines)
	@$(RUN_IT) plan $(ARGS) $(if $(GPUS),--gpus '$(GPUS)') $(if $(GPU_MEM),--gpu-mem '$(GPU_MEM)') \
	  $(if $(ACCELERATE),--accelerate '$(ACCELERATE)') $(if $(filter-out 0,$(JSON)),--json)

import-wan: $(VENV)/.installed ## take Wan2.1's weights in WEIGHTS= as the teacher of a run: SCALE=1.3b or 17b
	@$(RUN_IT) import-wan $(ARGS) --weights '$(WEIGHTS)'

gpu-check: ## what this machine's GPU does: tests, attention, training steps, in one table (needs torch alone, no network)
	@$(if $(wildcard $(PYTHON)),$(PYTHON),$(PY)) -m distill gpu-check

# ---- developing -----------------------------------------------------------------------------------------------

test: $(VENV)/.dev ## run the tests
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile

mutants: $(VENV)/.dev ## break one thing at a time and see that a test notices (about twenty minutes)
	@OMP_NUM_THREADS=1 $(PYTHON) tests/mutants.py

objectives: $(VENV)/.dev ## train every objective against an exact teacher and write docs/OBJECTIVES.md (about a minute)
	@OMP_NUM_THREADS=1 $(PYTHON) tests/objectives_table.py

lint: $(VENV)/.dev ## ruff
	@$(PYTHON) -m ruff check .

types: $(VENV)/.dev ## mypy
	@$(PYTHON) -m mypy

gpu: $(VENV)/.installed ## deepspeed, and flash-attn where nvcc is, for training on GPUs
	@$(PIP) install deepspeed
	@command -v nvcc >/dev/null || { echo 'flash-attn needs nvcc, which was not found: attention stays with torch.' >&2; exit 2; }
	@$(PIP) install --no-build-isolation flash-attn

ci: ## what the hosted checks run: lint, types, tests and the shrunken path, in a fresh copy
	@.ci/run

smoke: $(VENV)/.installed ## the whole path with a few steps per stage: does it run
	@$(RUN_IT) online-lpm --smoke $(if $(RUN),--run '$(RUN)')

clean: ## remove caches (runs/ and data/ stay)
	@rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-venv: ## remove the virtual environment
	@rm -rf '$(VENV)'

# ---- the environment, step by step; each stamp lies inside it -------------------------------------------------

$(VENV)/.made:
	@test -n '$(PY)' || { echo 'Python 3.10 or newer was not found: install it, or name one with PY=python3.x.' >&2; exit 2; }
	@test -x $(PYTHON) || { echo 'making $(VENV) with $(PY)'; $(PY) -m venv '$(VENV)' >/dev/null 2>&1 && $(PYTHON) -m pip --version >/dev/null 2>&1; } \
	  || { rm -rf '$(VENV)'; echo '$(PY) cannot make a virtual environment: install its venv package (Debian: apt install python3-venv).' >&2; exit 2; }
	@date +%s > '$(VENV)/.began'
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	@$(PYTHON) -c 'import torch' 2>/dev/null || { echo 'installing $(TORCH)'; $(PIP) install '$(TORCH)'; }
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo 'installing this package and what it needs (about a minute)'
	@$(PIP) install -e .
	@# what a first run spends here belongs to its total in the report
	@test -e '$(VENV)/.setup_seconds' || ! test -e '$(VENV)/.began' || \
	  echo $$(( $$(date +%s) - $$(cat '$(VENV)/.began') )) > '$(VENV)/.setup_seconds'
	@touch $@

$(VENV)/.serve: $(VENV)/.installed
	@echo 'installing the server'
	@$(PIP) install -e '.[serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo 'installing the tools for tests, lint and types'
	@$(PIP) install -e '.[dev]'
	@touch $@
