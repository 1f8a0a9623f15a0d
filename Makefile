# make help lists what there is. Everything that is built lands in build/ and .venv/.

PYTHON ?= python3
VENV ?= .venv
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
# Where the library, the tests and the simulator are built: the checks below have folders of
# their own. From the command line only, for setup.py relies on it.
BUILD := build
WITH ?=
ARGS ?=

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
SOVERSION := 0

# nvcc: from PATH, CUDA_HOME, or the virtual environment (from PyPI). The real path, since
# nvcc finds its parts relative to itself and a symlink to it fails. NVCC= on the command
# line says: none, take the checked-in PTX.
NVCC ?= $(firstword $(realpath $(shell command -v nvcc || \
          ls -d $${CUDA_HOME:-/nonexistent}/bin/nvcc \
                $(VENV)/lib/python3*/site-packages/nvidia/cu13/bin/nvcc 2>/dev/null)))

# A HIP compiler: ROCm's, or a clang that knows these GPUs and has lld beside it. Tried, since
# only a trial tells; into a file, since a compiler that fails as root may remove /dev/null.
# HIPCC= on the command line says: none, no kernels for AMD GPUs.
HIP_ARCHS ?= gfx90a gfx942
HIP_FLAGS = -x hip --cuda-device-only $(HIP_ARCHS:%=--offload-arch=%) --gpu-bundle-output \
  -nogpulib -nogpuinc -mcode-object-version=4 -O3 -std=c++17 -fdeclspec -Wall -Wextra
ifeq ($(origin HIPCC),undefined)
HIPCC := $(shell trial=$$(mktemp) || exit; \
           for cc in hipcc $${ROCM_PATH:+$$ROCM_PATH/bin/hipcc} clang \
             clang-22 clang-21 clang-20 clang-19 clang-18 clang-17; do \
             command -v $$cc >/dev/null && $$cc $(HIP_FLAGS) -o $$trial - </dev/null \
               2>/dev/null && echo $$cc && break; \
           done; rm -f $$trial)
endif

CFLAGS ?= -O2 -g
WERROR ?= -Werror
C_FLAGS = -std=c11 -Wall -Wextra $(WERROR) -fPIC -pthread -MMD -MP -Ilibvmm/include $(CFLAGS)
LIB_FLAGS = $(C_FLAGS) -fvisibility=hidden $(LIB_CFLAGS)
TEST_FLAGS = $(C_FLAGS) -Ilibvmm/src -Itests/c -Itests/sim
LINK_VMM = -L$(BUILD) -lvmm -Wl,-rpath,$(CURDIR)/$(BUILD) -pthread -ldl -lm

LIB_OBJECTS := $(patsubst libvmm/src/%.c,$(BUILD)/obj/%.o,$(wildcard libvmm/src/*.c))
C_TESTS := $(patsubst tests/c/%.c,$(BUILD)/tests/c/%,$(wildcard tests/c/test_*.c))
SWEEP := $(BUILD)/tests/sweep
C_BENCHES := $(patsubst benchmarks/%.c,$(BUILD)/benchmarks/%,$(wildcard benchmarks/bench_*.c))
BARE_LAUNCH := $(BUILD)/benchmarks/libbare_launch.so
SIM_SOURCES := $(filter-out %/entry.c %/hip_entry.c,$(wildcard tests/sim/*.c))
SIM := $(if $(SIM_SOURCES),$(BUILD)/sim/libcuda.so.1 $(BUILD)/sim/libamdhip64.so)
C_FILES = $(wildcard libvmm/*/*.[ch] libvmm/src/*.cu libvmm/src/*.cuh tests/*/*.[ch] benchmarks/*.[ch] \
            benchmarks/*.cc pyvmm/*/*.cc)
PYX_FILES = $(wildcard pyvmm/*.pyx pyvmm/*.pxd)

VENV_PYTHON := $(VENV)/bin/python
# One stamp for each requirements file that has been installed.
have = $(VENV)/.have-$(1)

ifneq ($(shell uname -s),Linux)
$(error libvmm and pyvmm are built on Linux only; this is $(shell uname -s))
endif

.DELETE_ON_ERROR:
.PHONY: all help install venv demo demo-llm test test-frameworks soak test-inplace test-programs \
        inplace lint format ptx dist bench bench-c bench-programs reliability clean check-cc check-cxx check-python \
        check-venv FORCE

all: $(BUILD)/libvmm.so

help:
	@echo 'make              build/libvmm.so'
	@echo 'make install      library, header and vmm.pc; PREFIX=$(PREFIX) LIBDIR= DESTDIR='
	@echo 'make demo         a virtual environment in $(VENV), a build, and python -m pyvmm demo'
	@echo 'make demo-llm     the same for a real model (downloads a few hundred MB)'
	@echo 'make test         all C and Python tests that this machine can run;'
	@echo '                  WITH="torch jax paddle transformers numba" installs these and tests'
	@echo '                  the hand-off'
	@echo 'make soak         100 000 random operations with failing driver calls, half an hour'
	@echo 'make test-frameworks  whole models, in every way of generating'
	@echo '                  (make test-paddlenlp, test-paddleformers: those alone)'
	@echo 'make inplace      build offline, in place, with what $$(PYTHON) already has'
	@echo 'make test-inplace the same, then the tests with that interpreter'
	@echo 'make check-san    the C tests under ASan, LSan and UBSan, then under TSan'
	@echo 'make check-valgrind  the C tests under valgrind'
	@echo 'make coverage     lines and branches of libvmm that the C tests reach; fails below the aim'
	@echo 'make fuzz         random calls of vmm.h (needs clang); FUZZ_SECONDS=$(FUZZ_SECONDS)'
	@echo 'make reliability  what docs/RELIABILITY.md shows of the sweeps, anew'
	@echo 'make lint         clang-format, ruff, cython-lint, mypy, warnings; make format mends'
	@echo 'make dist         dist/: an sdist, and a wheel that needs no compiler'
	@echo 'make planted-defects  plants defects in a copy, one at a time: a test must notice each;'
	@echo '                  the table goes into docs/RELIABILITY.md'
	@echo 'make bench        the benchmarks in C and Python; ARGS="cuda:0 --out FOLDER --only append"'
	@echo 'make bench-c      those in C alone; ARGS="cuda:0 --out FOLDER"'
	@echo 'make ptx          regenerate libvmm/src/append.ptx (needs nvcc 13.0.88)'
	@echo 'make venv, clean  the virtual environment alone; remove what was built'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) CC=$(CC) NVCC=PATH or nothing'
	@echo '           HIPCC=COMMAND or nothing, HIP_ARCHS="$(HIP_ARCHS)"'

# ---- prerequisites ----------------------------------------------------------------
PREREQUISITES := apt install python3-venv python3-dev gcc g++ make
need = @$(1) >/dev/null 2>&1 || { echo 'missing: $(2). On Debian and Ubuntu:' >&2; \
                                  echo '$(PREREQUISITES)' >&2; exit 1; }

check-cc:
	$(call need,command -v $(firstword $(CC)),the C compiler $(firstword $(CC)))
check-cxx:
	$(call need,command -v $(firstword $(CXX)),the C++ compiler $(firstword $(CXX)) (nvcc needs it))
check-python: check-cc
	$(call need,command -v $(PYTHON),$(PYTHON))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'pyvmm needs Python 3.10 or newer; choose one with PYTHON=' >&2; exit 1; }
	$(call need,$(PYTHON) -c 'import sysconfig as s; open(s.get_path("include") + "/Python.h")',\
	  Python.h of $(PYTHON))
check-venv: check-python check-cxx
	$(call need,$(PYTHON) -c 'import venv; import ensurepip',the venv module of $(PYTHON))

# ---- the library ------------------------------------------------------------------
# The embedded kernels. nvcc sees append.cu and what it includes; without nvcc the image is an
# empty file. Native code for each architecture that this nvcc knows, and PTX for the rest.
$(BUILD)/nvcc: FORCE
	@mkdir -p $(BUILD); echo '$(NVCC)' | cmp -s - $@ || echo '$(NVCC)' > $@

ARCHS := 80 90 100 120
KERNELS := libvmm/src/append.cu libvmm/src/cursor.cuh libvmm/src/append.h libvmm/src/cursor_job.h
$(BUILD)/append.fatbin: $(KERNELS) $(BUILD)/nvcc
	@if [ -z '$(NVCC)' ]; then \
	  echo 'no nvcc: the library carries the checked-in PTX alone, which the driver compiles'; \
	  : > $@; \
	else \
	  command -v g++ >/dev/null || \
	    { echo 'missing: g++ (nvcc needs it). On Debian and Ubuntu:' >&2; \
	      echo '$(PREREQUISITES)' >&2; exit 1; }; \
	  known=$$('$(NVCC)' --list-gpu-arch) || exit 1; \
	  code='-gencode arch=compute_80,code=compute_80'; \
	  for arch in $(ARCHS); do case "$$known" in *compute_$$arch*) \
	    code="$$code -gencode arch=compute_$$arch,code=sm_$$arch";; esac; done; \
	  echo "$(NVCC) -fatbin $$code -o $@ $<"; \
	  '$(NVCC)' -fatbin --threads 0 $$code -o $@ $< || \
	    { echo 'nvcc failed; "make NVCC=" builds with the checked-in PTX instead' >&2; exit 1; }; \
	fi

# The same for AMD GPUs: one file with a code object for each of HIP_ARCHS.
$(BUILD)/hipcc: FORCE
	@mkdir -p $(BUILD); echo '$(HIPCC) $(HIP_ARCHS)' | cmp -s - $@ || echo '$(HIPCC) $(HIP_ARCHS)' > $@

$(BUILD)/append.hipfb: $(KERNELS) libvmm/src/append_hip.h $(BUILD)/hipcc
	@if [ -z '$(HIPCC)' ]; then \
	  echo 'no HIP compiler (hipcc, or clang 17 and lld): the library has no kernels for AMD GPUs'; \
	  : > $@; \
	else \
	  echo '$(HIPCC) $(HIP_FLAGS) -o $@ $<'; \
	  $(HIPCC) $(HIP_FLAGS) -o $@ $< || \
	    { echo '$(HIPCC) failed; "make HIPCC=" builds without kernels for AMD GPUs' >&2; exit 1; }; \
	fi

# The checked-in PTX: nvcc's for the oldest architecture it knows, declared as the oldest
# PTX version that has that architecture, so that CUDA 12 drivers and older take it. That
# lowering is sound because append.cu uses nothing newer, but for a hint of the compiler's that
# is dropped; tests/python/test_ptx.py checks that the file is what this makes, and that ptxas
# takes it.
$(BUILD)/append.ptx: $(KERNELS) $(BUILD)/nvcc
	@[ -n '$(NVCC)' ] || { echo 'nvcc not found' >&2; exit 1; }
	'$(NVCC)' -ptx -arch=compute_75 -o $@.full $<
	sed -e '/^\/\//d' -e '/^$$/d' -e '/\.pragma "used_bytes_mask/d' \
	  -e 's/^\.version .*/.version 6.3/' $@.full > $@

ptx: $(BUILD)/append.ptx
	cp $< libvmm/src/append.ptx

$(BUILD)/obj/%.o: libvmm/src/%.c | check-cc
	@mkdir -p $(@D)
	$(CC) $(LIB_FLAGS) -c -o $@ $<

$(BUILD)/obj/append_image.o: libvmm/src/append_image.S libvmm/src/append.ptx $(BUILD)/append.fatbin \
    $(BUILD)/append.hipfb | check-cc
	@mkdir -p $(@D)
	$(CC) -DVMM_APPEND_FATBIN='"$(BUILD)/append.fatbin"' -DVMM_APPEND_HIPFB='"$(BUILD)/append.hipfb"' \
	  -DVMM_APPEND_PTX='"libvmm/src/append.ptx"' -c -o $@ $<

$(BUILD)/libvmm.so: $(LIB_OBJECTS) $(BUILD)/obj/append_image.o libvmm/libvmm.map
	$(CC) $(LDFLAGS) -shared -pthread -o $@ $(filter %.o,$^) -Wl,-soname,libvmm.so.$(SOVERSION) \
	  -Wl,--version-script=libvmm/libvmm.map -Wl,-z,defs,-z,now,-z,relro,-z,noexecstack \
	  -Wl,--as-needed -ldl
	ln -sf libvmm.so $(BUILD)/libvmm.so.$(SOVERSION)

install: $(BUILD)/libvmm.so
	install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(LIBDIR)/pkgconfig
	install -m 644 libvmm/include/vmm.h $(DESTDIR)$(PREFIX)/include/vmm.h
	install -m 755 $(BUILD)/libvmm.so $(DESTDIR)$(LIBDIR)/libvmm.so.$(VERSION)
	ln -sf libvmm.so.$(VERSION) $(DESTDIR)$(LIBDIR)/libvmm.so.$(SOVERSION)
	ln -sf libvmm.so.$(SOVERSION) $(DESTDIR)$(LIBDIR)/libvmm.so
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@LIBDIR@|$(LIBDIR)|' -e 's|@VERSION@|$(VERSION)|' \
	  libvmm/vmm.pc.in > $(DESTDIR)$(LIBDIR)/pkgconfig/vmm.pc
	@# A library folder that the loader knows needs its cache refreshed; one that it does
	@# not know needs to be named.
	@[ -n '$(DESTDIR)' ] || { ldconfig 2>/dev/null; ldconfig -p 2>/dev/null | \
	  grep -q '$(LIBDIR)/libvmm.so.$(SOVERSION)'; } || \
	  echo 'programs find the library with: export LD_LIBRARY_PATH=$(LIBDIR)' \
	       'PKG_CONFIG_PATH=$(LIBDIR)/pkgconfig'

# ---- the virtual environment ------------------------------------------------------
$(VENV)/pyvenv.cfg: | check-venv
	$(PYTHON) -m venv $(VENV)

$(call have,%): tests/requirements-%.txt $(VENV)/pyvenv.cfg
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -q -r $<
	@touch $@

# CUDA's compiler from PyPI, where there is no other. A machine that cannot have it builds
# with the PTX, and tries again next time.
$(call have,nvcc): tests/requirements-nvcc.txt $(VENV)/pyvenv.cfg
	@if [ -n '$(NVCC)' ] || [ '$(origin NVCC)' != file ]; then :; \
	else echo 'no nvcc on PATH or in CUDA_HOME: installing it from PyPI (100 MB)'; \
	  if $(VENV_PYTHON) -m pip install --disable-pip-version-check -q -r $<; then touch $@; \
	  else echo 'no nvcc from PyPI either'; fi; \
	fi

venv: $(call have,build) $(call have,nvcc)

# setup.py runs make for the library, and compiles what has changed. The .pth file lets the
# environment's python find the package from any folder.
IN_VENV = $(VENV_PYTHON) setup.py -q build_ext --inplace && \
  echo '$(CURDIR)' > "$$($(VENV_PYTHON) -c 'import sysconfig; \
  print(sysconfig.get_path("purelib"))')/pyvmm-inplace.pth"

demo: venv
	@$(IN_VENV)
	$(VENV_PYTHON) -m pyvmm demo

demo-llm: venv $(call have,llm)
	@$(IN_VENV)
	$(VENV_PYTHON) benchmarks/demo_llm.py

# ---- in place, offline ------------------------------------------------------------
inplace: check-python
	$(PYTHON) setup.py -q build_ext --inplace

# ---- tests ------------------------------------------------------------------------
$(BUILD)/tests/c/%: tests/c/%.c $(BUILD)/libvmm.so
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) -o $@ $< $(LINK_VMM)

# The fuzzer is several files.
$(BUILD)/tests/c/test_fuzz_corpus: tests/c/test_fuzz_corpus.c $(wildcard tests/fuzz/*.[ch]) \
    tests/c/check.h $(BUILD)/libvmm.so
	@mkdir -p $(@D)
	$(CC) $(filter-out -MMD -MP,$(TEST_FLAGS)) -o $@ $< $(wildcard tests/fuzz/*.c) $(LINK_VMM)

# malloc and others are the program's own, for libvmm.so too: see tests/sweep/faults.h.
$(SWEEP): $(wildcard tests/sweep/*.[ch]) tests/c/check.h $(BUILD)/libvmm.so
	@mkdir -p $(@D)
	$(CC) $(filter-out -MMD -MP,$(TEST_FLAGS)) -o $@ $(filter %.c,$^) $(LINK_VMM)

# The simulated driver, under CUDA's names and under HIP's.
$(BUILD)/sim/libcuda.so.1: tests/sim/entry.c
$(BUILD)/sim/libamdhip64.so: tests/sim/hip_entry.c tests/sim/hip.map libvmm/src/hip_abi.h
$(BUILD)/sim/libamdhip64.so: SIM_LINK = -Wl,--version-script=tests/sim/hip.map
$(SIM): $(SIM_SOURCES) $(wildcard tests/sim/*.h) libvmm/src/append.h libvmm/src/cursor_job.h
	@mkdir -p $(@D)
	$(CC) $(filter-out -MMD -MP,$(TEST_FLAGS)) -fvisibility=default -shared \
	  -Wl,-soname,$(@F),-z,defs $(SIM_LINK) -o $@ $(filter %.c,$^) -pthread -ldl

$(BUILD)/tests/conformance/probes: $(wildcard tests/conformance/*.[ch]) tests/sim/cuda_abi.h
	@mkdir -p $(@D)
	$(CC) $(filter-out -MMD -MP,$(TEST_FLAGS)) -o $@ $(filter %.c,$^) -pthread -ldl

test-programs: $(C_TESTS) $(SWEEP) $(SIM) $(BUILD)/tests/conformance/probes

# What does not compile is a failure that run_tests.py reports with the others. Another make,
# since setup.py may have installed an nvcc, or built the library, that this one did not see.
TEST_PROGRAMS = $(MAKE) --no-print-directory --keep-going test-programs bench-programs || true

test: venv $(call have,test) $(foreach name,$(WITH),$(call have,$(name)))
	@$(IN_VENV)
	@$(TEST_PROGRAMS)
	@$(VENV_PYTHON) tests/run_tests.py

# Whole models of other libraries: what takes too long, and installs too much, for `make test`.
# Each file in a process of its own, since frameworks do not always bear one another.
test-frameworks: venv $(call have,test) $(call have,transformers)
	@$(IN_VENV)
	@for file in $$(grep -l 'mark\.frameworks' tests/python/test_*.py); do \
	  $(VENV_PYTHON) -m pytest -q -m frameworks $$file || exit 1; done

soak: venv $(call have,test)
	@$(IN_VENV)
	@$(TEST_PROGRAMS)
	@$(VENV_PYTHON) tests/python/soak.py

# Libraries over Paddle whose pins do not go with anyone else's: an environment for each.
PADDLE_LIBRARIES := paddlenlp paddleformers
.PHONY: $(PADDLE_LIBRARIES:%=test-%)
test-frameworks: $(PADDLE_LIBRARIES:%=test-%)

$(VENV)-%/.have: tests/requirements-%.txt | check-venv
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --disable-pip-version-check -q -r $<
	@touch $@

$(PADDLE_LIBRARIES:%=test-%): test-%: venv $(VENV)-%/.have
	@$(IN_VENV)
	PYTHONPATH='$(CURDIR)' $(VENV)-$*/bin/python -m pytest -q tests/frameworks/test_$*.py

test-inplace: inplace
	@$(TEST_PROGRAMS)
	@$(PYTHON) tests/run_tests.py

# The tables of docs/RELIABILITY.md, from what the tests find.
reliability: $(SWEEP) $(SIM)
	@$(PYTHON) tests/reliability.py

$(BUILD)/benchmarks/%: benchmarks/%.c libvmm/src/append.ptx $(BUILD)/libvmm.so
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) -o $@ $< $(LINK_VMM)

bench-c: $(C_BENCHES)
	@for bench in $(C_BENCHES); do echo "== $$bench"; $$bench $(ARGS) || exit 1; done

# With Python twins, progress and a summary. rich and matplotlib are wanted, not needed.
bench: venv $(C_BENCHES) $(BARE_LAUNCH)
	@$(IN_VENV)
	@$(VENV_PYTHON) benchmarks/run.py $(ARGS)

$(BARE_LAUNCH): benchmarks/bare_launch.c libvmm/src/append.ptx
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) -fvisibility=hidden -shared -o $@ $< -ldl -lm

bench-programs: $(C_BENCHES) $(BARE_LAUNCH)

# Each defect is planted in a copy of its own, build/defects; DEFECTS="NAME ..." for some.
.PHONY: planted-defects
planted-defects: venv $(call have,test)
	@$(VENV_PYTHON) tests/defects/plant.py $(or $(DEFECTS),--write)

-include $(wildcard $(BUILD)/obj/*.d $(BUILD)/tests/c/*.d $(BUILD)/benchmarks/*.d)

include tests/checks.mk

# ---- lint -------------------------------------------------------------------------
# The compile is part of it: -Wall -Wextra -Werror, of everything that is C.
lint: $(call have,build) $(call have,lint) $(BUILD)/libvmm.so test-programs $(C_BENCHES)
	$(CC) -std=c99 -Wall -Wextra -pedantic -Werror -fsyntax-only -x c libvmm/include/vmm.h
	$(CXX) -std=c++11 -Wall -Wextra -pedantic -Werror -fsyntax-only -x c++ libvmm/include/vmm.h
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	PATH="$(abspath $(VENV))/bin:$$PATH" cython-lint $(PYX_FILES)
	$(VENV)/bin/mypy

format: $(call have,lint)
	$(VENV)/bin/clang-format -i $(C_FILES)
	$(VENV)/bin/ruff check --fix-only
	$(VENV)/bin/ruff format

# ---- distribution -----------------------------------------------------------------
# The wheel is built from the sdist, so each proves the other. auditwheel names the oldest
# glibc that the wheel runs with.
dist: $(call have,dist)
	rm -rf dist build/wheel
	$(VENV_PYTHON) -m build --sdist --wheel --outdir build/wheel .
	mkdir -p dist
	mv build/wheel/*.tar.gz dist/
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV_PYTHON) -m auditwheel repair --strip -w dist build/wheel/*.whl
	@ls -l dist

clean:
	rm -rf build dist pyvmm.egg-info pyvmm/*.so pyvmm/libvmm.so.$(SOVERSION)
