# Every target does its own set-up in $(VENV) on a fresh machine, once; then its job.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
WORKERS ?= -n 2 --dist worksteal
READY := $(VENV)/.ready
TORCH := $(shell grep -E '^(torch|torchvision)==' constraints.txt)

.PHONY: demo test check lint bench app docs embedded newest oldest help

help:
	@echo "make demo      six GenEval prompts on the embedded model, plain guidance beside"
	@echo "               AdaptiveGuidance (outputs/demo)"
	@echo "make test      the whole test suite"
	@echo "make check     format, lint, types, README, and the tests that are not slow"
	@echo "make bench     benchmarks, after the quick tests"
	@echo "make app       the demo in a browser"
	@echo "make docs      the documentation as a site (outputs/docs/index.html)"
	@echo "make newest    the quick tests with the newest diffusers, transformers and torch"
	@echo "make oldest    the same with the oldest that pyproject.toml allows"
	@echo "make embedded  train the embedded models again (hours)"

# The tested versions; where this platform lacks them, and not in CI, the newest that pyproject.toml
# allows. With -qq pip shows its errors and nothing else.
INSTALL := $(PY) -m pip install -qq --disable-pip-version-check --no-input
EXTRAS := ".[dev,app,eval,ocr,docs]"
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(PY) || { echo "Creating a Python environment in $(VENV)"; \
	  $(PYTHON) -m venv $(VENV); }
	@echo "Installing diffalign and what it needs in $(VENV) (minutes the first time)"
	@$(INSTALL) -c constraints.txt $(TORCH) -e $(EXTRAS) || { \
	  test -z "$$CI" || exit 1; \
	  echo "The tested versions cannot be had here; installing the newest allowed ones."; \
	  $(INSTALL) -e $(EXTRAS); }
	@touch $@

demo: $(READY)
	@echo "Drawing six prompts twice on the embedded model"
	@$(PY) -m diffalign demo

app: $(READY)
	@$(PY) app/app.py

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "outputs/docs/index.html; its search works when served:"
	@echo "$(PY) -m http.server --directory outputs/docs"

test: $(READY)
	$(PY) -m pytest --fail-on-skip $(WORKERS)

lint: $(READY)
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m mypy

check: lint
	$(PY) -m pytest -m "not slow" $(WORKERS)

bench: $(READY)
	$(PY) -m pytest -m "not slow" $(WORKERS)
	$(PY) benchmarks/overhead.py --compile

# Environments of their own; what passed goes to outputs/newest.md and outputs/oldest.md.
newest oldest:
	$(PYTHON) benchmarks/bounds.py $@ -- $(WORKERS)

# Hours: autoencoders, denoisers, judges, reward, evaluator; each stage resumes what an earlier run
# left in runs/, and nothing shipped is touched.
TRAIN := $(PY) -m diffalign.embedded.workshop
embedded: $(READY)
	$(TRAIN).train_vae --out runs/vae --resume
	$(TRAIN).train_denoiser --vae runs/vae/vae --out runs/first --updates 14000 --decay-from 14000 --curriculum 7000 --resume
	$(TRAIN).train_denoiser --vae runs/vae/vae --out runs/first --export runs/models/first
	$(TRAIN).train_denoiser --vae runs/vae/vae --out runs/emoji --from runs/models/first --captions noisy --mix relations --top 0.25 \
	  --lesson 2000 --seed 13 --rate 1e-3 --updates 6400 --decay-from 4800 --decay 0.999 --save 800 --resume
	$(TRAIN).train_denoiser --vae runs/vae/vae --out runs/emoji --export runs/models/emoji
	$(TRAIN).train_judge --out runs/judge --vae runs/vae/vae --updates 1600 --vae-updates 900 --resume
	$(TRAIN).train_judge --out runs/judge --vae runs/vae/vae --export runs/models/emoji-judge
	$(TRAIN).train_judge --model emoji-judge-audit --seed 22 --out runs/audit --vae runs/vae/vae --updates 2400 --vae-updates 500 --resume
	$(TRAIN).train_judge --model emoji-judge-audit --seed 22 --out runs/audit --vae runs/vae/vae --export runs/models/emoji-judge-audit
	$(TRAIN).train_code --out runs/code --updates 16000 --rate 2e-3 --every 8 --resume
	$(TRAIN).train_code --out runs/code --export runs/code/vae
	$(TRAIN).train_flow --vae runs/code/vae --text runs/models/first --out runs/emoji-dit --batch 8 --rate 1.2e-3 --updates 24000 \
	  --decay-from 17000 --curriculum 13000 --lesson 12000 18000 --pairs 1 --decay 0.998 --resume
	$(TRAIN).train_flow --vae runs/code/vae --text runs/models/first --out runs/emoji-dit --export runs/models/emoji-dit
	$(TRAIN).train_judge --edition second --from runs/models/emoji-judge --out runs/judge-2 --vae runs/code/vae --seed 61 \
	  --batch 8 --rate 0.6 --updates 2400 --vae-updates 800 --resume
	$(TRAIN).train_judge --edition second --out runs/judge-2 --export runs/models/emoji-judge-2
	$(TRAIN).train_judge --model emoji-judge-audit --edition second --from runs/models/emoji-judge-audit --out runs/audit-2a \
	  --vae runs/code/vae --seed 62 --batch 8 --rate 0.6 --updates 2400 --vae-updates 800 --resume
	$(TRAIN).train_judge --model emoji-judge-audit --edition second --out runs/audit-2a --export runs/models/audit-2a
	$(TRAIN).train_judge --model emoji-judge-audit --edition second --from runs/models/audit-2a --out runs/audit-2 \
	  --vae runs/code/vae --seed 63 --batch 8 --rate 0.8 --updates 7000 --vae-updates 1500 --resume
	$(TRAIN).train_judge --model emoji-judge-audit --edition second --out runs/audit-2 --export runs/models/emoji-judge-audit-2
	$(TRAIN).samples --pipeline runs/models/first --out runs/samples.pt --prompts 250 --scale 1.0
	$(TRAIN).train_clip --out runs/clip --tokenizer runs/models/emoji/tokenizer --vae runs/vae/vae --samples runs/samples.pt \
	  --pairs 24 --spoilt 8 --updates 4100 --vae-updates 1500 --sample-updates 250 --resume
	$(TRAIN).samples --pipeline runs/models/emoji --out runs/samples-2.pt --mix hard --prompts 240 --seed 80
	$(TRAIN).samples --pipeline runs/models/emoji --out runs/samples-3.pt --mix relations --steps 10 --prompts 160 --seed 82
	$(TRAIN).train_clip --out runs/clip --tokenizer runs/models/emoji/tokenizer --vae runs/vae/vae --samples runs/samples-2.pt runs/samples-3.pt \
	  --pairs 24 --spoilt 8 --groups 6 --updates 4100 --vae-updates 1500 --sample-updates 250 --drill-updates 1000 --last-updates 300 --resume
	$(TRAIN).train_clip --out runs/clip --tokenizer runs/models/emoji/tokenizer --vae runs/vae/vae --export runs/models/emoji-clip
	$(TRAIN).samples --pipeline runs/models/emoji-dit --judge emoji-judge-audit-2 --out runs/samples-dit.pt --mix hard --prompts 110 \
	  --seed 91 --scale 2.5 --dtype bfloat16
	$(TRAIN).train_clip --edition second --from runs/models/emoji-clip --tokenizer runs/models/emoji-clip --out runs/clip-2 --vae runs/code/vae \
	  --samples runs/samples-dit.pt --seed 34 --focus 0 --pairs 24 --spoilt 8 --groups 6 --updates 1400 --vae-updates 350 --sample-updates 120 --resume
	$(TRAIN).train_clip --edition second --tokenizer runs/models/emoji-clip --seed 34 --pairs 24 --spoilt 8 --out runs/clip-2 --export runs/models/emoji-clip-2
	$(TRAIN).trajectories --pipeline runs/models/emoji --out runs/evaluator/train.pt
	$(TRAIN).train_evaluator --out runs/evaluator --pipeline runs/models/emoji --trajectories runs/evaluator/train.pt --updates 2000 --from 700 --resume
	$(TRAIN).train_evaluator --out runs/evaluator --pipeline runs/models/emoji --export runs/models/emoji-evaluator
	$(TRAIN).train_turbo --pipeline runs/models/emoji --out runs/emoji-turbo --resume
	$(TRAIN).train_turbo --pipeline runs/models/emoji --out runs/emoji-turbo --export runs/models/emoji-turbo
	$(TRAIN).train_video_vae --teacher runs/vae/vae --out runs/video-vae --updates 12000 --resume
	$(TRAIN).train_video_vae --teacher runs/vae/vae --out runs/video-vae --export runs/video-vae/vae
	$(TRAIN).train_video --teacher runs/vae/vae --out runs/emoji-video --updates 13500 --alone 2000 --decay-from 11000 --curriculum 2500 4000 \
	  --rate 1.2e-3 --decay 0.998 --lesson 7800 11000 --pairs 12 --pictures 8 --resume
	$(TRAIN).train_video --teacher runs/vae/vae --out runs/emoji-video --vae runs/video-vae/vae --export runs/models/emoji-video
