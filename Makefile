# Everything starts from a bare checkout: a target that needs the environment makes it first (locks/install.sh).
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
# Without compiled files each of the many processes of the tests compiles our code again.
unexport PYTHONDONTWRITEBYTECODE
PURE := registry/errors.py registry/wire/labels.py registry/wire/words.py registry/core/* registry/contract/* registry/accounting/* registry/service/reconcile.py registry/service/version_skew.py
comma := ,
empty :=
PURE_FILES := $(subst $(empty) $(empty),$(comma),$(PURE))

.PHONY: help env demo check test test-unit test-pythons test-cluster soak fuzz test-long eval-check docs audit lint tiny-llms bench bench-gpu locks clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## create the environment in .venv, and update it after a change of the locks or pyproject.toml
	@PYTHON="$(PYTHON)" locks/install.sh cpu .venv

demo: env ## a whole registry on this machine, without a GPU (ARGS="…" go to `greenprompt demo`)
	@$(BIN)/greenprompt demo $(ARGS)

# The cheap tests share the processors, a file of tests at a time. Those that start vLLM, Ray or hosts wait half of their
# time, so two runs of them share the machine. Files come in the order of tests/conftest.py, the longest first.
SHARED := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
STARTS := tests/engine tests/cluster tests/hosts
# Only the whole has a lowest coverage (`coverage report` below); pytest-cov would take it for that of each part.
COVERED = COVERAGE_FILE=.coverage.$@ $(BIN)/pytest --cov --cov-report= --cov-fail-under=0 --durations=15 --durations-min=5
test: lint ## linters, types, import contracts and all tests but the long ones, with coverage
	@mkdir -p build
	@rm -f .coverage .coverage.*
	@$(MAKE) --no-print-directory test-shared
	@$(MAKE) --no-print-directory -j2 test-clusters test-engines
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	@echo "Every branch of the pure files:"
	$(BIN)/coverage report --include='$(PURE_FILES)' --fail-under=100
	@grep -hE '^=+ .* in [0-9.]+s.* =+$$' build/pytest-*.log

# Parts of `make test`. The last two run side by side, and so does their output; each has a log of its own in build/.
.PHONY: test-shared test-clusters test-engines
test-shared:
	$(COVERED) $(SHARED) $(STARTS:%=--ignore=%) 2>&1 | tee build/pytest-shared.log
test-clusters:
	$(COVERED) tests/cluster 2>&1 | tee build/pytest-clusters.log
test-engines:
	$(COVERED) tests/engine tests/hosts 2>&1 | tee build/pytest-engines.log

check: env ## run after each change: linters, and the tests that need no Ray, vLLM or database, with few examples
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	HYPOTHESIS_PROFILE=quick $(BIN)/pytest -q $(SHARED) -m "not long and not slow" tests/unit tests/property tests/simulation

test-unit: env ## the tests that need neither Ray nor vLLM
	$(BIN)/pytest $(SHARED) -m "not cluster and not vllm and not fault and not hosts and not long"

# The other Pythons of pyproject.toml; `make test` has one of its own.
PYTHONS := 3.12 3.13
test-pythons: env ## the unit tests on Python 3.12 and 3.13, as far as this machine has them
	@tests/pythons.sh $(PYTHONS)

test-cluster: env ## a cluster of several hosts, made of network namespaces (root; iproute2, nftables, openssh-server, rsync)
	$(BIN)/pytest -s -m "hosts and not soak" tests/hosts

soak: env ## half an hour of leases on a cluster of several hosts, with a fault every 20 s (SOAK_S=…, SOAK_SEED=…)
	$(BIN)/pytest -s -m soak tests/hosts

fuzz: env ## 20,000 generated calls of the registry's API, in sequences with real leases (FUZZ_CALLS=…)
	FUZZ_CALLS=$${FUZZ_CALLS:-20000} $(BIN)/pytest -s tests/integration/serve/test_api_fuzz.py

test-long: env .venv-eval/.installed ## all tests, the long ones too, with many more generated examples
	HYPOTHESIS_PROFILE=long $(BIN)/pytest -m "not soak" --timeout=3600

.venv-eval/.installed: locks/eval.txt | env
	@rm -rf .venv-eval
	@$(BIN)/python -m venv .venv-eval
	@$(BIN)/uv pip install --quiet --python .venv-eval/bin/python --no-deps --require-hashes -r locks/eval.txt
	@touch $@

eval-check: env .venv-eval/.installed ## run a tiny task of lm_eval at the address of a lease, in a separate environment
	$(BIN)/pytest -m long tests/cluster/test_lm_eval.py

.venv-docs/.installed: locks/docs.txt | env
	@rm -rf .venv-docs
	@$(BIN)/python -m venv .venv-docs
	@$(BIN)/uv pip install --quiet --python .venv-docs/bin/python --no-deps --require-hashes -r locks/docs.txt
	@touch $@

docs: env .venv-docs/.installed ## the pages made from the code, and the site of docs/ in build/docs; a warning is an error
	$(BIN)/python -m tests.docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict
	@! grep -rE '<(script|img)[^>]* src="https?:|<link[^>]* href="https?:' build/docs --include='*.html'
	@echo "made: build/docs/index.html"

.venv-audit/.installed: locks/audit.txt | env
	@rm -rf .venv-audit
	@$(BIN)/python -m venv .venv-audit
	@$(BIN)/uv pip install --quiet --python .venv-audit/bin/python --no-deps --require-hashes -r locks/audit.txt
	@touch $@

audit: env .venv-audit/.installed ## licences, known vulnerabilities and CycloneDX files of what the locks install (ADVISORIES=osv.zip without a network)
	$(BIN)/python -m tests.supply_chain $(if $(ADVISORIES),--advisories "$(ADVISORIES)")

lint: env ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

tiny-llms: env ## make two LLMs of about 100 kB with random weights, in build/llms
	$(BIN)/python -m greenprompt_client.demo.tiny_llm build/llms/a build/llms/b

bench: env ## the benchmarks (PART=… for one of them)
	$(BIN)/python -m tests.bench.run $(if $(PART),--part $(PART))

bench-gpu: ## benchmark starts and changes of LLMs on an NVIDIA GPU, in a separate environment (.venv-gpu)
	@PYTHON="$(PYTHON)" locks/install.sh gpu .venv-gpu
	.venv-gpu/bin/python -m tests.bench.engine --only starts --gpus 1

# torch and its relatives stay out of the CPU lock, see locks/cpu.overrides; locks/torch-cpu.txt is written by hand.
COMPILE = $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-emit-index-url \
	--no-emit-find-links --custom-compile-command "make locks"
locks: export UV_FIND_LINKS =
locks: env ## resolve all versions in locks/ again: the newest that pyproject.toml allows
	$(COMPILE) --upgrade --python-version 3.11 locks/installer.in -o locks/installer.txt
	$(COMPILE) --upgrade --python-version 3.11 pyproject.toml locks/cpu.in $(foreach e,server report cpu postgres dev,--extra $(e)) \
	    --override locks/cpu.overrides $(foreach p,torch torchvision torchaudio torchcodec,--no-emit-package $(p)) \
	    -o locks/cpu.txt
	$(COMPILE) --upgrade --python-version 3.11 locks/eval.in -o locks/eval.txt
	$(COMPILE) --upgrade --python-version 3.11 locks/docs.in -o locks/docs.txt
	$(COMPILE) --upgrade --python-version 3.11 locks/audit.in -o locks/audit.txt
	$(COMPILE) --upgrade --python-version 3.12 pyproject.toml $(foreach e,server report gpu postgres,--extra $(e)) -o locks/gpu.txt

clean: ## delete everything that can be made again
	rm -rf .venv .venv-audit .venv-docs .venv-eval .venv-gpu $(PYTHONS:%=.venv-%) build dist *.egg-info .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find greenprompt_client registry deployments tests -name __pycache__ -type d -exec rm -rf {} +
