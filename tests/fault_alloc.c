#include "tests/fault_alloc.h"

#include <errno.h>
#include <jansson.h>
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <zlib.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* A linker's --wrap has nowhere else to keep its state. */
static atomic_int_fast64_t calls, fail_at, live, peak;
static atomic_size_t largest;
static atomic_bool armed, stays, fired;
static _Thread_local bool arms; /* the thread that armed last */

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
int __real_posix_memalign(void **out, size_t align, size_t n);
void *__real_aligned_alloc(size_t align, size_t n);
char *__real_strdup(const char *s);
void __real_free(void *p);
void *__real_mmap(void *at, size_t n, int prot, int flags, int fd, off_t off);
int __real_deflateInit2_(z_streamp s, int level, int method, int bits, int mem, int strategy, const char *version, int size);
int __real_inflateInit_(z_streamp s, const char *version, int size);
pcre2_code *__real_pcre2_compile_8(PCRE2_SPTR p, PCRE2_SIZE n, uint32_t o, int *code, PCRE2_SIZE *at, pcre2_compile_context *c);
pcre2_compile_context *__real_pcre2_compile_context_create_8(pcre2_general_context *g);
pcre2_match_context *__real_pcre2_match_context_create_8(pcre2_general_context *g);
pcre2_match_data *__real_pcre2_match_data_create_8(uint32_t n, pcre2_general_context *g);
pcre2_jit_stack *__real_pcre2_jit_stack_create_8(PCRE2_SIZE a, PCRE2_SIZE b, pcre2_general_context *g);
int __real_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg);

static void asked(size_t bytes)
{
    size_t most = largest;
    while (armed && arms && bytes > most && !atomic_compare_exchange_weak(&largest, &most, bytes))
        ;
}

static bool fails(size_t bytes)
{
    asked(bytes);
    if (!armed)
        return false;
    const int64_t i = ++calls, at = fail_at;
    if (at == 0 || (stays ? i < at : i != at))
        return false;
    fired = true;
    return true;
}

static void *held(void *p)
{
    if (p != NULL && armed) {
        const int64_t now = atomic_fetch_add(&live, (int64_t)malloc_usable_size(p)) + (int64_t)malloc_usable_size(p);
        int_fast64_t most = peak;
        while (now > most && !atomic_compare_exchange_weak(&peak, &most, now))
            ;
    }
    return p;
}

static void let_go(void *p)
{
    if (p != NULL && armed)
        live -= (int64_t)malloc_usable_size(p);
}

void *__wrap_malloc(size_t n);
void *__wrap_malloc(size_t n)
{
    return fails(n) ? errno = ENOMEM, NULL : held(__real_malloc(n));
}

void *__wrap_calloc(size_t n, size_t size);
void *__wrap_calloc(size_t n, size_t size)
{
    return fails(n * size) ? errno = ENOMEM, NULL : held(__real_calloc(n, size));
}

void *__wrap_realloc(void *p, size_t n);
void *__wrap_realloc(void *p, size_t n)
{
    if (fails(n)) {
        errno = ENOMEM;
        return NULL;
    }
    let_go(p);
    return held(__real_realloc(p, n));
}

int __wrap_posix_memalign(void **out, size_t align, size_t n);
int __wrap_posix_memalign(void **out, size_t align, size_t n)
{
    if (fails(n))
        return ENOMEM;
    const int rc = __real_posix_memalign(out, align, n);
    if (rc == 0)
        held(*out);
    return rc;
}

void *__wrap_aligned_alloc(size_t align, size_t n);
void *__wrap_aligned_alloc(size_t align, size_t n)
{
    return fails(n) ? errno = ENOMEM, NULL : held(__real_aligned_alloc(align, n));
}

char *__wrap_strdup(const char *s);
char *__wrap_strdup(const char *s)
{
    return fails(strlen(s) + 1) ? errno = ENOMEM, NULL : held(__real_strdup(s));
}

void __wrap_free(void *p);
void __wrap_free(void *p)
{
    let_go(p);
    __real_free(p);
}

void *__wrap_mmap(void *at, size_t n, int prot, int flags, int fd, off_t off);
void *__wrap_mmap(void *at, size_t n, int prot, int flags, int fd, off_t off)
{
    return fails(n) ? errno = ENOMEM, MAP_FAILED : __real_mmap(at, n, prot, flags, fd, off);
}

int __wrap_deflateInit2_(z_streamp s, int level, int method, int bits, int mem, int strategy, const char *version, int size);
int __wrap_deflateInit2_(z_streamp s, int level, int method, int bits, int mem, int strategy, const char *version, int size)
{
    return fails(0) ? Z_MEM_ERROR : __real_deflateInit2_(s, level, method, bits, mem, strategy, version, size);
}

int __wrap_inflateInit_(z_streamp s, const char *version, int size);
int __wrap_inflateInit_(z_streamp s, const char *version, int size)
{
    return fails(0) ? Z_MEM_ERROR : __real_inflateInit_(s, version, size);
}

pcre2_code *__wrap_pcre2_compile_8(PCRE2_SPTR p, PCRE2_SIZE n, uint32_t o, int *code, PCRE2_SIZE *at, pcre2_compile_context *c);
pcre2_code *__wrap_pcre2_compile_8(PCRE2_SPTR p, PCRE2_SIZE n, uint32_t o, int *code, PCRE2_SIZE *at, pcre2_compile_context *c)
{
    if (!fails(0))
        return __real_pcre2_compile_8(p, n, o, code, at, c);
    *code = PCRE2_ERROR_HEAP_FAILED;
    *at = 0;
    return NULL;
}

pcre2_compile_context *__wrap_pcre2_compile_context_create_8(pcre2_general_context *g);
pcre2_compile_context *__wrap_pcre2_compile_context_create_8(pcre2_general_context *g)
{
    return fails(0) ? NULL : __real_pcre2_compile_context_create_8(g);
}

pcre2_match_context *__wrap_pcre2_match_context_create_8(pcre2_general_context *g);
pcre2_match_context *__wrap_pcre2_match_context_create_8(pcre2_general_context *g)
{
    return fails(0) ? NULL : __real_pcre2_match_context_create_8(g);
}

pcre2_match_data *__wrap_pcre2_match_data_create_8(uint32_t n, pcre2_general_context *g);
pcre2_match_data *__wrap_pcre2_match_data_create_8(uint32_t n, pcre2_general_context *g)
{
    return fails(0) ? NULL : __real_pcre2_match_data_create_8(n, g);
}

pcre2_jit_stack *__wrap_pcre2_jit_stack_create_8(PCRE2_SIZE a, PCRE2_SIZE b, pcre2_general_context *g);
pcre2_jit_stack *__wrap_pcre2_jit_stack_create_8(PCRE2_SIZE a, PCRE2_SIZE b, pcre2_general_context *g)
{
    return fails(0) ? NULL : __real_pcre2_jit_stack_create_8(a, b, g);
}

int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg);
int __wrap_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg)
{
    return fails(0) ? EAGAIN : __real_pthread_create(t, a, fn, arg);
}

/* jansson does not survive a failed allocation (formats/json.c asks beforehand): its own are counted only. */
static void *jansson_malloc(size_t n)
{
    asked(n);
    return held(__real_malloc(n));
}

void fault_arm(int64_t at, bool sticky)
{
    json_set_alloc_funcs(jansson_malloc, __wrap_free);
    calls = live = peak = 0;
    largest = 0;
    fail_at = at;
    stays = sticky;
    fired = false;
    arms = true;
    armed = true;
}

int64_t fault_disarm(void)
{
    armed = false;
    return calls;
}

bool fault_fired(void)
{
    return fired;
}

struct fault_use fault_use(void)
{
    return (struct fault_use){largest, peak};
}
