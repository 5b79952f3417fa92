# The commands of the project. `make demo` and `make test` need Python 3.10+ and a C++ compiler, and set up the rest.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
# The tested torch, a small download where there is a build for the CPU alone; any torch from 2.11 on works.
TORCH ?= torch==2.13.0
TRITON = "triton; platform_system == 'Linux' and platform_machine == 'x86_64'"
# If set, packages beside torch are installed from requirements/ci.txt by hash, and nothing is built in isolation.
LOCKED ?=
# The CUDA build of torch for `make cuda-check`; no GPU is needed.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
# The Triton of the oldest supported torch.
TRITON_OLD ?= triton==3.6.0
TRITON_VENV ?= .venv-triton

# One process per core, up to 8: most tests use one thread.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-slow fuzz trust lint tidy docs bench guard sanitize cuda-check triton-check gpu release dist-check install-matrix lock audit clean

demo: $(VENV)/.built $(VENV)/.extra-train
	$(RUN)/bomkern train --out runs/demo --overwrite

# The quick tests: every op with every implementation that serves here, errors, the trainer, commands, pages.
test: $(VENV)/.built $(VENV)/.extra-test
	$(RUN)/python -m pytest tests $(PARALLEL) -m "not slow" --durations=20

# The slow tests: Triton's interpreter and the emulated CUDA kernels in full, builds by nvcc, runs of several processes,
# studies and long runs.
test-slow: $(VENV)/.built $(VENV)/.extra-test $(VENV)/.extra-bench
	$(RUN)/python -m pytest tests $(PARALLEL) -m slow --durations=20

# Random cases from SEED for SECONDS: every op and implementation that serves here against the reference in float64.
SECONDS ?= 60
SEED ?= 0
fuzz: $(VENV)/.built $(VENV)/.extra-test
	$(RUN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

# Repeats the results in tests/README.md except the install matrix: half an hour on two cores.
trust: $(VENV)/.built $(VENV)/.extra-test sanitize
	$(RUN)/python -m tests.fuzz --seconds 600 --seed 0 --json tests/results/fuzz.json
	$(RUN)/python -m tests.faults --kills 20 --offsets 50
	$(RUN)/python -m tests.endurance --steps 20000
	$(RUN)/python -m pytest tests $(PARALLEL) -m "not slow" -p tests.refusals
	$(RUN)/python -m tests.report

lint: $(VENV)/.torch $(VENV)/.extra-lint
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy bomkern

# Runs clang-tidy with .clang-tidy over csrc/ and kernels/, if it is installed (pip install clang-tidy).
tidy: $(VENV)/.torch
	PYTHON=$(RUN)/python bash tools/tidy.sh

# Builds the pages of docs/ into site/, with the measured figures; a warning is an error. Needs neither torch nor a build.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build --strict

# Times everything against its peers on this machine, and writes the report in bench/results.
bench: $(VENV)/.built $(VENV)/.extra-bench
	mkdir -p build
	$(RUN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench.json
	$(RUN)/python -m bench.report build/bench.json

# Runs three minutes of the benches and compares them with recorded runs: fails where bomkern became slower than eager
# PyTorch on its worst kind of data, or where one kind of data takes much longer than another.
guard: $(VENV)/.built $(VENV)/.extra-bench
	$(RUN)/python -m bench.compare bench/results/guard.json --run 3

# Runs the C++ and the emulated CUDA kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, built
# in .sanitize. PART= selects some of: planted kernels emulator memory threads. A full run writes the results for
# tests/README.
sanitize: $(VENV)/.torch $(VENV)/.extra-test
	$(RUN)/python tools/sanitize.py $(or $(PART),--results tests/results/sanitize.json)

# Builds every CUDA kernel, imports the extension, and checks that each op has one and that none spills registers. It
# builds for the one architecture whose machine code is read: six would take most of an hour on two cores. It builds from
# a copy, so that this build and the one for $(VENV) do not overwrite each other.
cuda-check: $(CUDA_VENV)/.ready
	rm -rf $(CUDA_VENV)/src/bomkern $(CUDA_VENV)/src/csrc $(CUDA_VENV)/src/kernels && mkdir -p $(CUDA_VENV)/src
	tar --exclude='_C*.so' --exclude=__pycache__ -cf - bomkern bomkern_command.py csrc kernels tools setup.py pyproject.toml README.md LICENSE \
		| tar -xf - -C $(CUDA_VENV)/src
	BOMKERN_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-9.0} $(CUDA_VENV)/bin/python -m pip install --no-deps --force-reinstall $(CUDA_VENV)/src
	cd $(CUDA_VENV) && bin/python $(CURDIR)/tools/cuda_check.py

# Checks every Triton launch on a libcuda that runs nothing, and that no kernel spills, with TRITON_OLD and the other
# packages of $(VENV).
triton-check: $(TRITON_VENV)/.ready
	$(TRITON_VENV)/bin/python -m pytest tests/dispatch/test_triton_launch.py tests/ops/test_*_triton.py $(PARALLEL) -rP -k "on_a_stub or spills"

# Tries another torch, TORCH='torch==X', in its own environment: the private names it lacks, a build, the quick tests.
.PHONY: next-torch
next-torch:
	$(PYTHON) tools/next_torch.py '$(TORCH)'

# Runs everything on a machine with a GPU, with the Python that has its torch, in three calls of under ten minutes. Each
# ends with an archive of its results (tools/gpu.py). BEFORE= archives of earlier calls, ONLY= some stages, DRY=1 without
# a GPU.
CALL ?= 1
gpu:
	$(if $(DRY),$(RUN)/python,$(PYTHON)) tools/gpu.py --call $(CALL) $(if $(DRY),--dry) $(if $(ARCHIVE),--archive $(ARCHIVE)) \
		$(if $(BEFORE),--before $(BEFORE)) $(if $(ONLY),--only $(ONLY))

# Builds the sdist, and the wheel for the torch of $(VENV), checks both, installs each into a fresh environment, runs the
# quick tests on the wheel, and says how to publish (tools/release.py). FLAGS=--no-test leaves out the tests, --cuda
# demands CUDA kernels.
release: $(VENV)/.torch $(VENV)/.extra-release
	$(RUN)/python tools/release.py $(FLAGS)

# The same for a tree that is not ready, and without archives.
dist-check: $(VENV)/.torch $(VENV)/.extra-release
	$(RUN)/python tools/release.py --dry-run $(FLAGS)

# Installs in every common way, each into a fresh environment; continues an interrupted run. ONLY='cpu/g++/*' for some,
# CUDA=1 for all.
install-matrix: $(VENV)/.built $(VENV)/.extra-test
	$(RUN)/python tools/install_matrix.py --only '$(or $(ONLY),*)' $(if $(CUDA),--cuda)

# Locks the packages that CI installs, with hashes, for Python 3.10 and later on any platform. Torch and triton, whose
# files differ between builds (CPU, CUDA), and packages that torch alone requires are left out.
lock:
	uv pip compile pyproject.toml requirements/ci.in --extra dev --extra docs --excludes requirements/left-out.txt \
		--universal --python-version 3.10 --generate-hashes --no-annotate --upgrade --quiet \
		--custom-compile-command "make lock" --output-file requirements/ci.txt

audit:
	$(PYTHON) tools/audit.py

# Stamp files install the requirements of a target, each once: an environment with torch, bomkern built into it, and the
# packages of an extra. With LOCKED the first installs the packages of all extras.
$(VENV)/.torch:
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
ifneq ($(LOCKED),)
	$(RUN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/ci.txt
	$(RUN)/python -m pip install --quiet '$(TORCH)' $(TRITON)
else
	$(RUN)/python -m pip install --quiet --upgrade 'pip>=23'
	# torch comes first, and only if there is none: bomkern is built for the installed one.
	$(RUN)/python -c "import torch" 2>/dev/null || $(RUN)/python -m pip install '$(TORCH)' $(TRITON)
endif
	touch $@

# The sources: bomkern is rebuilt when one of them changes.
SOURCES := $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu') setup.py $(wildcard tools/build_*.py)

$(VENV)/.built: $(SOURCES) pyproject.toml | $(VENV)/.torch
	$(RUN)/python tools/install.py build $(if $(LOCKED),--no-deps --no-build-isolation)
	touch $@

$(VENV)/.extra-%: pyproject.toml | $(VENV)/.torch
	$(if $(LOCKED),$(RUN)/python -m pip check,$(RUN)/python tools/install.py extra $*)
	touch $@

# Without torch, which the docs do not need.
$(VENV)/.docs: pyproject.toml
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python tools/install.py extra docs
	touch $@

$(CUDA_VENV)/.ready:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet $(CUDA_TORCH) numpy
	touch $@

# The environment's own site-packages come first, then those of $(VENV).
$(TRITON_VENV)/.ready: $(VENV)/.built $(VENV)/.extra-test
	test -x $(TRITON_VENV)/bin/python || $(RUN)/python -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --no-deps '$(TRITON_OLD)'
	$(RUN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(TRITON_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth
	touch $@

clean:
	rm -rf build dist *.egg-info bomkern/_C*.so
