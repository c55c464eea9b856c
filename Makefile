# retort: distils a Mixture-of-Experts teacher into dense students.      make help  lists the targets
#
#   MODE=release|debug|asan   DEV=1 (warnings are errors)   V=1 (show commands)   PREFIX=/usr/local
#   CUDA=auto|1|0 (the cuda backend: where nvcc is found; required; left out)   CUDA_ARCH="80 90a"

MODE ?= release
PREFIX ?= /usr/local
comma := ,
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 1)
ifeq ($(origin CC),default)
CC := gcc
endif
Q := $(if $(V),,@)
B := build/$(MODE)

WARN := -Wall -Wextra -Wshadow -Wmissing-prototypes -Wstrict-prototypes -Wvla -Wpointer-arith
CPPFLAGS += -I. -D_GNU_SOURCE
CFLAGS_release := -O2 -g
CFLAGS_debug := -O0 -g
CFLAGS_asan := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
LDFLAGS_asan := -fsanitize=address,undefined
BASE := -std=c11 -pthread $(WARN) $(CFLAGS_$(MODE)) $(if $(DEV),-Werror)
# The kernels: contraction and vectorised selects, but never -ffast-math (NaN checks and parity depend on IEEE semantics).
KERNEL := -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math

# The cuda backend is built where nvcc is found, and needs no CUDA library to start: kernels and the runtime are linked in, the others opened at run time.
CUDA ?= auto
CUDA_HOME ?= $(patsubst %/bin/,%,$(dir $(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null)))
NVCC := $(if $(filter-out 0,$(CUDA)),$(wildcard $(if $(CUDA_HOME),$(CUDA_HOME)/bin/nvcc)))
ifeq ($(CUDA)$(NVCC),1)
$(error CUDA=1, but nvcc is not on the PATH; set CUDA_HOME)
endif
CUDA_ARCH ?= 80 90a
ifneq ($(NVCC),)
# machine code for each, and what a later GPU can be compiled from
NVFLAGS := -std=c++17 -O3 -lineinfo -ccbin $(CC) -Xcompiler -pthread,-Wall,-Wno-unused-function,-fno-threadsafe-statics,-fno-exceptions,-fno-rtti --expt-relaxed-constexpr \
           $(foreach a,$(CUDA_ARCH),-gencode arch=compute_$(a)$(comma)code=sm_$(a)) \
           $(foreach a,$(firstword $(CUDA_ARCH)),-gencode arch=compute_$(a)$(comma)code=compute_$(a)) $(if $(DEV),-Werror all-warnings)
CUDA_SRC := $(wildcard core/cuda/*.c core/cuda/*.cu)
CUDA_OBJ := $(patsubst %.c,$(B)/%.o,$(filter %.c,$(CUDA_SRC))) $(patsubst %.cu,$(B)/%.cu.o,$(filter %.cu,$(CUDA_SRC)))
CUDA_LIBS := -L$(firstword $(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/lib)) -lcudart_static -ldl -lrt
endif

# PORTABLE=1: a program for machines that lack these libraries.
LIBS := $(if $(PORTABLE),-Wl$(comma)-Bstatic) -lopenblas -lmsgpackc -lpcre2-8 -lutf8proc -ljansson -lz $(if $(PORTABLE),-Wl$(comma)-Bdynamic) $(CUDA_LIBS) -lm

# What was compiled or linked with other options is made again; warnings that are errors make no difference to what comes out.
COMPILED := $(filter-out -Werror all-warnings,$(CC) $(CPPFLAGS) $(BASE) $(KERNEL) $(CFLAGS) $(NVCC) $(NVFLAGS))
LINKED := $(CC) $(LDFLAGS_$(MODE)) $(LDFLAGS) $(LIBS)
stamp = @mkdir -p $(@D); echo '$(subst ','\'',$1)' | cmp -s - $@ || echo '$(subst ','\'',$1)' >$@
.PHONY: always
$(B)/compile.flags: always
	$(call stamp,$(COMPILED))
$(B)/link.flags: always
	$(call stamp,$(LINKED))
# What `retort --version` says.
COMMIT := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
$(B)/commit.flags: always
	$(call stamp,$(COMMIT))
$(B)/distill/main.o: BASE += -DRT_COMMIT='"$(COMMIT)"'
$(B)/distill/main.o: $(B)/commit.flags

LIB_SRC := $(wildcard core/*.c core/ref/*.c core/cpu/*.c formats/*.c teacher/*.c student/*.c) \
           $(filter-out distill/main.c,$(wildcard distill/*.c))
LIB_OBJ := $(LIB_SRC:%.c=$(B)/%.o)
# The reference backend twice: elements float, and double for finite differences.
LIB_OBJ += $(patsubst %.c,$(B)/%.64.o,$(wildcard core/ref/*.c))
LIB_OBJ += $(CUDA_OBJ)
TEST_SRC := $(wildcard tests/*.c)
TEST_OBJ := $(TEST_SRC:%.c=$(B)/%.o)
BENCH_SRC := $(wildcard bench/*.c)
BENCH_BIN := $(BENCH_SRC:bench/%.c=$(B)/bench_%)

.DEFAULT_GOAL := all
.PHONY: all help deps demo demo-crossing test check check-gpu check-asan fuzz oracle bench install uninstall clean
all: deps $(B)/retort ## build the program (default)

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  variables: MODE=release|debug|asan  DEV=1  V=1  PORTABLE=1 (static libraries)  CUDA=auto|1|0  CUDA_ARCH="80 90a"  PREFIX=/usr/local'

deps:
	@sh tests/deps.sh

$(B)/core/cpu/%.o: BASE += $(KERNEL)
$(B)/core/backend.o: BASE += $(if $(NVCC),-DRT_CUDA)
$(B)/tests/%.o $(B)/bench/%.o: BASE += $(if $(NVCC),-DRT_CUDA -isystem $(CUDA_HOME)/include)
$(B)/core/cuda/%.o: BASE += -isystem $(CUDA_HOME)/include
$(B)/core/cuda/%.cu.o: core/cuda/%.cu $(B)/compile.flags | deps
	@mkdir -p $(@D)
	$(if $(V),,@echo '  NVCC $<')
	$(Q)$(NVCC) $(CPPFLAGS) $(NVFLAGS) -MMD -MP -MF $(@:.o=.d) -c $< -o $@
$(B)/core/ref/%.64.o: core/ref/%.c $(B)/compile.flags | deps
	@mkdir -p $(@D)
	$(if $(V),,@echo '  CC $< (double)')
	$(Q)$(CC) $(CPPFLAGS) $(BASE) -DRT_REF_REAL64 $(CFLAGS) -MMD -MP -c $< -o $@
$(B)/%.o: %.c $(B)/compile.flags | deps
	@mkdir -p $(@D)
	$(if $(V),,@echo '  CC $<')
	$(Q)$(CC) $(CPPFLAGS) $(BASE) $(CFLAGS) -MMD -MP -c $< -o $@

$(B)/libretort.a: $(LIB_OBJ)
	@rm -f $@
	$(Q)ar rcs $@ $^

$(B)/retort: $(B)/distill/main.o $(B)/libretort.a $(B)/link.flags
	$(if $(V),,@echo '  LD $@')
	$(Q)$(CC) -pthread $(LDFLAGS_$(MODE)) $(LDFLAGS) $(filter-out %.flags,$^) $(LIBS) -o $@

# One RT_SUITE(name) in each tests/test_*.c; the runner's list is made from them.
$(B)/tests/suites.inc: $(TEST_SRC)
	@mkdir -p $(@D)
	@sed -n 's/^RT_SUITE(\([a-z0-9_]*\).*/RT_SUITE_ENTRY(\1)/p' $(sort $(filter tests/test_%.c,$^)) > $@
$(B)/tests/main.o: CPPFLAGS += -I$(B)/tests
$(B)/tests/main.o: $(B)/tests/suites.inc

# What asks for memory goes through tests/fault_alloc.c.
WRAP := malloc calloc realloc posix_memalign aligned_alloc strdup free mmap deflateInit2_ inflateInit_ pthread_create \
        $(addprefix pcre2_,compile_8 compile_context_create_8 match_context_create_8 match_data_create_8 jit_stack_create_8)
$(B)/retort-tests: $(TEST_OBJ) $(B)/libretort.a $(B)/link.flags
	$(if $(V),,@echo '  LD $@')
	$(Q)$(CC) -pthread $(LDFLAGS_$(MODE)) $(LDFLAGS) $(WRAP:%=-Wl$(comma)--wrap=%) $(filter-out %.flags,$^) -lcmocka $(LIBS) -o $@

test: deps $(B)/retort $(B)/retort-tests ## everything that needs no GPU; ends with `N passed, N failed`
	@sh tests/run.sh $(B)

check: test

check-gpu: deps $(B)/retort-tests ## the suites that a GPU computes in; without one they say SKIP
	@$(B)/retort-tests $$($(B)/retort-tests --list | sed -n 's/^\(cuda_[a-z0-9]*\)\..*/\1/p' | sort -u) student_generate eval train_slots recorded

check-asan: ## the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(MAKE) --no-print-directory MODE=asan test

fuzz: ## every parser against damaged files under the sanitizers: SECONDS_EACH=60 TARGETS="..."
	@$(MAKE) --no-print-directory MODE=asan build/asan/retort-tests
	@for t in $(if $(TARGETS),$(TARGETS),$$(build/asan/retort-tests --fuzz list)); do \
	    build/asan/retort-tests --fuzz $$t $(or $(SECONDS_EACH),60) || exit 1; done

demo: all ## the main job on the embedded teacher: traces, logits, five students, the comparison; DEVICE=auto|cpu|cuda
	@sh examples/demo.sh $(B)/retort build/demo $(or $(DEVICE),auto)

demo-crossing: all ## soft labels across tokenizers: hard, exact, strict and likelihoods of spans, SEEDS=3 DEVICE=auto
	@sh examples/crossing.sh $(B)/retort build/crossing $(or $(SEEDS),3) $(or $(DEVICE),auto)

oracle: deps $(B)/retort-tests ## CASES="DIR ..." [TOKENIZERS="NAME=DIR ..." TOKENIZER_CASES=FILE] [BACKENDS="ref cpu cuda"]
	@$(B)/retort-tests --oracle --cases "$(CASES)" --tokenizers "$(TOKENIZERS)" --tokenizer-cases "$(TOKENIZER_CASES)" \
	    --backends "$(if $(BACKENDS),$(BACKENDS),ref cpu)"

$(B)/bench_%: $(B)/bench/%.o $(B)/libretort.a $(B)/link.flags
	$(if $(V),,@echo '  LD $@')
	$(Q)$(CC) -pthread $(LDFLAGS_$(MODE)) $(LDFLAGS) $(filter-out %.flags,$^) $(LIBS) -o $@
bench: deps $(B)/retort $(BENCH_BIN) ## speed against OpenBLAS sgemm, memory, bytes a token
	@sh bench/run.sh $(B)

install: all ## PREFIX=/usr/local
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(B)/retort $(DESTDIR)$(PREFIX)/bin/retort
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/retort
clean: ## remove build/
	rm -rf build

-include $(LIB_OBJ:.o=.d) $(TEST_OBJ:.o=.d) $(BENCH_SRC:%.c=$(B)/%.d) $(B)/distill/main.d
.SECONDARY:
