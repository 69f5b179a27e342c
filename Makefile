# All of it works in a fresh clone: whatever a target needs, it installs into .venv first.
# PYTHON=, CC=, TESTS=, TARGETS=, SUITES=, BENCH_ARGS=, ROWS=, ATTACK_ARGS= and what the scripts name at their heads can be given to make
# or be in the environment.

.PHONY: help install demo cluster-demo trial test test-slow test-long test-cluster storm test-gpu test-vm test-roots soak bench bench-check attack profile \
	check docs sanitize fuzz coverage package deb test-package format lock clean

help:
	@echo 'make install      pjw and pjwd into .venv/bin'
	@echo 'make demo         a service, certificates and a session with them, from nothing and back'
	@echo 'make cluster-demo a gateway and three nodes, a session, and a power cut, from nothing and back; as root'
	@echo 'make trial        types each command of docs/trial.md on two new machines; as root'
	@echo 'make test         all tests; as root those of the kernel too (TESTS=tests/unit: only those)'
	@echo 'make test-slow    the tests that take a minute or more'
	@echo 'make test-long    the tests that take many minutes, which CI leaves out'
	@echo 'make test-cluster faults of a cluster on four machines of namespaces, and their figures; as root'
	@echo 'make storm        random faults of a cluster beside forty clients for STORM_SECONDS=600 (STORM_SEED=N); as root'
	@echo 'make test-gpu     jobs with the GPUs of this machine, where it has some; as root'
	@echo 'make test-vm      the tests of the kernel and of systemd on cgroup v2, in the virtual machine $$PJW_VM'
	@echo 'make test-roots   make demo, make test and make package from nothing on new Debians; as root'
	@echo '                  (ROOTS="12 13" STEPS="demo test package" TESTS=tests/unit)'
	@echo 'make soak         mixed load with random kills for SOAK_SECONDS=1800, and what it left'
	@echo 'make bench        pjw beside its peers and the kernel, with plots (SUITES=start BENCH_ARGS=--quick); as root'
	@echo '                  (SUITES=goals: the goals of a start and a job, beside earlier commits)'
	@echo 'make bench-check  fails when pjw is worse by half than in benchmarks/ratios.json; as root'
	@echo 'make attack       attackers beside a victim on a real pjwd (ROWS="s1 s3" ATTACK_ARGS=--short); as root'
	@echo 'make profile      where the processor time of a start goes, by perf(1); as root'
	@echo 'make check        ruff, mypy, import-linter, generated code, prose, clang-format, clang-tidy, shellcheck, buf'
	@echo 'make docs         the site, into build/site; fails on a broken link'
	@echo 'make sanitize     pjw-init with ASan and UBSan under its tests'
	@echo 'make fuzz         each fuzzer for FUZZ_SECONDS (default 60); TARGETS=settings: only that one'
	@echo 'make coverage     all tests, and which lines they did not reach'
	@echo 'make package      what is published, from the last commit: wheel, sdist, Debian package, SHA256SUMS, in dist'
	@echo 'make deb          the Debian package of this tree, for this Debian, in dist'
	@echo 'make test-package tests of what make package makes'
	@echo 'make format       format the source'
	@echo 'make lock         requirements/*.txt anew, from pyproject.toml'
	@echo 'make clean        remove everything that was built and installed here'

install:
	@scripts/install

demo:
	@scripts/demo

cluster-demo:
	@scripts/cluster-demo

trial:
	@scripts/install test
	@scripts/install package
	@scripts/trial

test:
	@scripts/install test
	@scripts/run-tests $(TESTS)

test-slow:
	@scripts/install test
	@scripts/run-tests -m slow $(or $(TESTS),tests/root)

test-long:
	@scripts/install test
	@scripts/run-tests -m long $(or $(TESTS),tests/root)

test-cluster:
	@scripts/install test
	@scripts/test-cluster

storm: export STORM_SECONDS ?= 600
storm:
	@scripts/install test
	@scripts/test-cluster tests/outages/test_storm.py

test-gpu:
	@scripts/install test
	@scripts/test-gpu

test-vm:
	@scripts/install test
	@scripts/install package
	@scripts/test-vm

test-roots:
	@ROOTS="$(ROOTS)" STEPS="$(STEPS)" TESTS="$(TESTS)" scripts/test-roots

soak:
	@scripts/install test
	@scripts/soak

bench:
	@scripts/install bench
	@.venv/bin/python -B -m benchmarks --plots $(BENCH_ARGS) $(SUITES)

# Those that take seconds. Peers are compared where they are installed.
bench-check: SUITES ?= start stream line history cli
bench-check:
	@scripts/install test
	@.venv/bin/python -B -m benchmarks --quick --check $(BENCH_ARGS) $(SUITES)

attack:
	@scripts/install test
	@.venv/bin/python -B -m benchmarks.attack $(ATTACK_ARGS) $(ROWS)

profile:
	@scripts/install test
	@.venv/bin/python -B -m benchmarks.cpu_profile

check:
	@scripts/install dev
	@scripts/check

# Not --quiet: warnings, which --strict makes errors of, would not be counted. The variable: the theme's makers
# announce its successor at every build.
docs:
	@scripts/install docs
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	@echo 'the site is in build/site: open build/site/index.html, or with its search'
	@echo '  python3 -m http.server --bind 127.0.0.1 --directory build/site'

sanitize:
	@scripts/install test
	@scripts/sanitize

fuzz:
	@scripts/install fuzz
	@scripts/fuzz $(TARGETS)

coverage:
	@scripts/install test
	@scripts/coverage

package:
	@scripts/package check
	@scripts/install package
	@scripts/package

deb:
	@scripts/install package
	@rm -rf build/wheel
	@scripts/package-wheel . build/wheel
	@scripts/package-deb build/wheel/pjw-*.whl dist

test-package: package
	@scripts/install test
	@PJW_DIST=dist scripts/run-tests tests/package

format:
	@scripts/install dev
	.venv/bin/ruff check --fix-only --exit-zero
	.venv/bin/ruff format
	.venv/bin/clang-format -i $$(git ls-files '*.c' '*.h')

lock:
	scripts/lock

clean:
	rm -rf .venv build dist node_modules tests/clients/node_modules .coverage* .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests docs -name __pycache__ -prune -exec rm -rf {} +
