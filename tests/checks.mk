# ---- checks -----------------------------------------------------------------------
# The C tests and sweeps once more, each time built in a folder of its own, with what finds
# errors that a test does not see. Minutes each, so not part of `make test`.
.PHONY: check-san check-asan check-tsan check-valgrind coverage fuzz fuzz-merge fuzz-objects \
        check-clang

# $(1): the folder; $(2): flags of every compile and link.
build_checked = $(MAKE) --no-print-directory BUILD=$(1) CFLAGS='$(2)' LDFLAGS='$(2)' test-programs

SANITIZED := -O1 -g -fno-omit-frame-pointer
ASAN_FLAGS := $(SANITIZED) -fsanitize=address,undefined -fno-sanitize-recover=undefined
# TSan does not see fences, and gcc warns of each. Ours, in pool_drain(), stands between accesses
# that are atomic themselves.
TSAN_FLAGS := $(SANITIZED) -fsanitize=thread -Wno-tsan

check-san: check-asan check-tsan

check-asan:
	@$(call build_checked,build/asan,$(ASAN_FLAGS))
	@$(PYTHON) tests/run_tests.py --c-only --build build/asan

# Without address randomisation: older kernels and sanitizers disagree on where a program
# may lie.
check-tsan:
	@$(call build_checked,build/tsan,$(TSAN_FLAGS))
	@$(PYTHON) tests/run_tests.py --c-only --build build/tsan --under 'setarch -R'

# Memory that is lost for good fails; what is still reachable at exit does not, for the
# library need not be closed.
VALGRIND := valgrind --quiet --error-exitcode=99 --leak-check=full \
  --errors-for-leak-kinds=definite,indirect --show-leak-kinds=definite,indirect
check-valgrind: test-programs
	@command -v valgrind >/dev/null || { echo 'missing: apt install valgrind' >&2; exit 1; }
	@$(PYTHON) tests/run_tests.py --c-only --only '^test_' --under '$(VALGRIND)'

# ---- coverage ---------------------------------------------------------------------
# Lines and branches of libvmm that the C tests reach: as they run in `make test`, and with
# what differs between drivers. Text and HTML in build/coverage, and a section of
# docs/RELIABILITY.md.
# Of the library alone: the tests are as fast as ever.
COVERAGE_FLAGS := -O0 --coverage -fprofile-update=atomic
COVERED_RUN = $(PYTHON) tests/run_tests.py --c-only --build build/coverage
GCOVR := $(VENV)/bin/gcovr --root . --filter libvmm/src/ --gcov-executable gcov

coverage: $(call have,coverage)
	@$(MAKE) --no-print-directory BUILD=build/coverage LIB_CFLAGS='$(COVERAGE_FLAGS)' \
	  LDFLAGS=--coverage test-programs
	@find build/coverage -name '*.gcda' -delete
	@$(COVERED_RUN)
	@mkdir -p build/coverage/html
	@$(GCOVR) build/coverage --json build/coverage/coverage.json \
	  --html-details build/coverage/html/index.html \
	  --txt build/coverage/coverage.txt --txt-metric branch
	@$(VENV_PYTHON) tests/coverage_report.py build/coverage/coverage.json
	@$(GCOVR) -a build/coverage/coverage.json --txt-summary --txt build/coverage/summary.txt \
	  --fail-under-line 95 --fail-under-branch 90

# ---- fuzzing ----------------------------------------------------------------------
# libFuzzer over the C interface, see tests/fuzz/fuzz.h. What it finds lands in
# build/fuzz: the growing corpus in corpus/, inputs that fail as crash-*; these become
# tests by a copy into tests/fuzz/corpus.
CLANG ?= $(firstword $(shell ls /usr/bin/clang-[0-9][0-9] 2>/dev/null | sort -rV) \
                     $(shell command -v clang))
FUZZ_SECONDS ?= 900
FUZZ_CORPUS := tests/fuzz/corpus
# Functions are called through our own declarations of the driver's types, which have other
# names there.
FUZZ_FLAGS := $(SANITIZED) -fsanitize=fuzzer-no-link,address,undefined \
  -fno-sanitize=function -fno-sanitize-recover=undefined
# Refused allocations are tested, too: tensors with millions of lanes get none.
FUZZ_ENV := VMM_CUDA_LIBRARY=$(CURDIR)/build/sim/libcuda.so.1 \
  ASAN_OPTIONS=allocator_may_return_null=1:max_allocation_size_mb=32

check-clang:
	@[ -n '$(CLANG)' ] || { echo 'missing: clang with its run-time library. On Debian and' \
	  'Ubuntu: apt install clang-19 libclang-rt-19-dev (or what is newest)' >&2; exit 1; }

build/fuzz/fuzz_vmm: $(wildcard tests/fuzz/*.[ch]) tests/c/check.h tests/sim/vmm_sim.h \
    $(wildcard libvmm/src/*.[chS]) libvmm/include/vmm.h | check-clang
	@mkdir -p $(@D)
	@$(MAKE) --no-print-directory BUILD=build/fuzz CC=$(CLANG) CFLAGS='$(FUZZ_FLAGS)' NVCC= HIPCC= \
	  fuzz-objects
	$(CLANG) $(FUZZ_FLAGS) -fsanitize=fuzzer -std=c11 -Wall -Wextra -Ilibvmm/include -Itests/c \
	  -Itests/sim -o $@ $(wildcard tests/fuzz/*.c) build/fuzz/obj/*.o -pthread -ldl -lm

fuzz-objects: $(LIB_OBJECTS) $(BUILD)/obj/append_image.o

fuzz: build/fuzz/fuzz_vmm build/sim/libcuda.so.1
	@mkdir -p build/fuzz/corpus $(FUZZ_CORPUS)
	cd build/fuzz && $(FUZZ_ENV) ./fuzz_vmm -max_total_time=$(FUZZ_SECONDS) -max_len=512 \
	  -len_control=0 -timeout=60 -rss_limit_mb=6000 -malloc_limit_mb=6000 -print_final_stats=1 $(ARGS) \
	  corpus $(CURDIR)/$(FUZZ_CORPUS)

# The fewest inputs that reach every place that all of them reach: what to commit.
fuzz-merge: build/fuzz/fuzz_vmm build/sim/libcuda.so.1
	rm -rf build/fuzz/merged && mkdir -p build/fuzz/merged
	cd build/fuzz && $(FUZZ_ENV) ./fuzz_vmm -merge=1 -set_cover_merge=1 -use_counters=0 \
	  -max_len=512 -rss_limit_mb=6000 -malloc_limit_mb=6000 merged $(CURDIR)/$(FUZZ_CORPUS) corpus
	@echo "build/fuzz/merged: $$(ls build/fuzz/merged | wc -l) inputs," \
	  "$$(cat build/fuzz/merged/* | wc -c) bytes"
