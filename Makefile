# run and test set up what they need: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
BIN = .venv/bin
SHELL = /bin/bash
.DEFAULT_GOAL = help
.PHONY: help run test slow mutants lab docs bench results config export clean

help: ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 12

# torch first: alone it takes the build that constraints.txt names and nothing newer
.venv/done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "monosem needs Python >= 3.11, this is %s; set PYTHON=/path/to/python3.11" % sys.version.split()[0])'
	@echo "[setup] virtual environment and packages (once; a few minutes)"
	@start=$$SECONDS; \
	$(PYTHON) -m venv .venv && \
	$(BIN)/pip install -q --disable-pip-version-check torch -c constraints.txt && \
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt && \
	touch $@ && echo "[setup] done in $$((SECONDS-start)) s"

run: .venv/done ## the main job: text -> transformer -> dictionary -> tested features -> site
	@$(BIN)/python -m monosem reproduce --scale small

test: .venv/done ## every check
	@bash .ci/checks $(BIN)

slow: .venv/done ## the slow tests too: a training process is killed 24 times
	@MONOSEM_SLOW=1 $(BIN)/python -m pytest -q -rs

.venv/mutmut: constraints.txt .venv/done
	@$(BIN)/pip install -q --disable-pip-version-check mutmut -c constraints.txt && touch $@

mutants: .venv/mutmut ## plant faults, MODULES="sae core" SAMPLE=60 of each: do the tests notice?
	@$(BIN)/python .ci/mutants.py $(MODULES) $(if $(SAMPLE),--sample $(SAMPLE))

lab: .venv/done ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs

docs: .venv/done ## render the site to _docs/
	@$(BIN)/python -m monosem site

bench: .venv/done ## measure against peers (benchmarks/*.json)
	@for b in sae toy transformer; do $(BIN)/python benchmarks/$$b.py; done  # gpu.py wants a GPU

results: .venv/done ## write nbs/results: the flagged cells of the notebooks, and runs/small
	@for n in $$(grep -l '#| slow' nbs/*.ipynb); do $(BIN)/nbdev-test $$n --flags slow --save --n-workers 1 --timing --cell-timeout 0 || exit 1; done; $(BIN)/nbdev-clean
	@$(BIN)/python -m monosem results && $(BIN)/python -m monosem readme

config: .venv/done ## derive pyproject.toml from settings.ini
	@$(BIN)/python .ci/config.py && touch .venv/done

export: .venv/done ## notebooks -> monosem/, README
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/python -m monosem readme

clean: ## remove what is derived (keeps runs/ and .venv)
	@rm -rf _proc _docs .pytest_cache .hypothesis build *.egg-info && find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
