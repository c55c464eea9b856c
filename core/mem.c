#include "core/mem.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ALIGN = 64 };

/* Blocks from here on come from mmap: their pages are zero without being touched, and may be huge ones. The address
 * sanitizer sees neither the bounds of such a block nor the pointers in it, so there all blocks come from malloc. */
#ifdef __SANITIZE_ADDRESS__
#define MAP_FROM SIZE_MAX
#else
#define MAP_FROM ((size_t)16 << 20)
#endif

/* In the 64 bytes before each block. */
struct head {
    size_t mapped; /* bytes of the mapping; 0: from malloc */
};

bool rt_mul_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_mul_overflow(a, b, out);
}

bool rt_add_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_add_overflow(a, b, out);
}

static void *take(size_t bytes)
{
    void *base = NULL;
    size_t mapped = 0;
    if (bytes >= MAP_FROM) {
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED)
            return NULL;
        madvise(base, bytes, MADV_HUGEPAGE); /* advice only: speed, never meaning */
        mapped = bytes;
    } else {
        if (posix_memalign(&base, ALIGN, bytes) != 0)
            return NULL;
        memset(base, 0, bytes);
    }
    *(struct head *)base = (struct head){mapped};
    return (char *)base + ALIGN;
}

enum rt_status rt_alloc(size_t n, size_t size, const char *what, void *out_ptr_to_ptr, struct rt_err *err)
{
    size_t bytes, whole;
    void *p = NULL;
    if (!rt_mul_size(n, size, &bytes))
        return rt_fail(err, RT_NOMEM, "out of memory: %s needs %zu times %zu bytes, more than can be addressed", what, n, size);
    if (rt_add_size(bytes, ALIGN, &whole) && whole <= PTRDIFF_MAX)
        p = take(whole);
    if (p == NULL)
        return rt_fail(err, RT_NOMEM, "out of memory: %s needs %zu bytes", what, bytes);
    memcpy(out_ptr_to_ptr, &p, sizeof p);
    return RT_OK;
}

void rt_free(void *p)
{
    if (p == NULL)
        return;
    void *base = (char *)p - ALIGN;
    const size_t mapped = ((struct head *)base)->mapped;
    if (mapped > 0)
        munmap(base, mapped);
    else
        free(base);
}

enum rt_status rt_buf_reserve(struct rt_buf *b, size_t extra, struct rt_err *err)
{
    size_t need;
    if (!rt_add_size(b->len, extra, &need) || need > PTRDIFF_MAX)
        return rt_fail(err, RT_NOMEM, "out of memory: a buffer of %zu bytes cannot grow by %zu", b->len, extra);
    if (need <= b->cap && b->data != NULL)
        return RT_OK;
    size_t cap = b->cap < PTRDIFF_MAX / 2 ? b->cap * 2 : need;
    if (cap < need)
        cap = need;
    if (cap < 64)
        cap = 64;
    char *data = realloc(b->data, cap);
    if (data == NULL && cap > need)
        data = realloc(b->data, cap = need);
    if (data == NULL)
        return rt_fail(err, RT_NOMEM, "out of memory: a buffer needs %zu bytes", cap);
    b->data = data;
    b->cap = cap;
    return RT_OK;
}

enum rt_status rt_buf_append(struct rt_buf *b, const void *data, size_t n, struct rt_err *err)
{
    const enum rt_status st = rt_buf_reserve(b, n, err);
    if (st == RT_OK && n > 0) {
        memcpy(b->data + b->len, data, n);
        b->len += n;
    }
    return st;
}

enum rt_status rt_buf_printf(struct rt_buf *b, struct rt_err *err, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n < 0)
        return rt_fail(err, RT_INTERNAL, "cannot format '%s'", fmt);
    const enum rt_status st = rt_buf_reserve(b, (size_t)n + 1, err);
    if (st == RT_OK) {
        va_start(ap, fmt);
        vsnprintf(b->data + b->len, (size_t)n + 1, fmt, ap);
        va_end(ap);
        b->len += (size_t)n;
    }
    return st;
}

enum rt_status rt_buf_puts(struct rt_buf *b, const char *s, struct rt_err *err)
{
    const size_t n = strlen(s);
    const enum rt_status st = rt_buf_reserve(b, n + 1, err);
    if (st == RT_OK) {
        memcpy(b->data + b->len, s, n + 1);
        b->len += n;
    }
    return st;
}

void rt_buf_free(struct rt_buf *b)
{
    free(b->data);
    *b = (struct rt_buf){0};
}

void rt_arena_init(struct rt_arena *a, void *base, size_t size, const char *name)
{
    *a = (struct rt_arena){.base = base, .size = size, .name = name};
}

size_t rt_arena_round(size_t n)
{
    const size_t top = SIZE_MAX - (ALIGN - 1);
    return n > top ? top : (n + ALIGN - 1) & ~(size_t)(ALIGN - 1);
}

enum rt_status rt_arena_alloc(struct rt_arena *a, size_t bytes, void *out_ptr_to_ptr, struct rt_err *err)
{
    const size_t left = a->size - a->used, step = rt_arena_round(bytes);
    if (bytes > left || step > left)
        return rt_fail(err, RT_NOMEM, "out of memory: %zu bytes asked of the %s arena, %zu of its %zu are left", bytes, a->name,
                       left, a->size);
    /* By way of an integer: base is NULL where an arena only measures. */
    void *p = (void *)((uintptr_t)a->base + a->used);
    memcpy(out_ptr_to_ptr, &p, sizeof p);
    a->used += step;
    if (a->used > a->peak)
        a->peak = a->used;
    return RT_OK;
}

void rt_arena_reset(struct rt_arena *a, size_t mark)
{
    RT_ASSERT(mark <= a->used);
    a->used = mark;
}
