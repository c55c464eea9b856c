#include <string.h>

#include "core/mem.h"
#include "tests/suite.h"

static void sizes_are_checked(void **state)
{
    size_t v;
    (void)state;
    assert_true(rt_mul_size(1u << 20, 1u << 20, &v) && v == (size_t)1 << 40);
    assert_false(rt_mul_size(SIZE_MAX / 2 + 1, 2, &v));
    assert_true(rt_mul_size(0, SIZE_MAX, &v) && v == 0);
    assert_true(rt_add_size(SIZE_MAX - 1, 1, &v) && v == SIZE_MAX);
    assert_false(rt_add_size(SIZE_MAX, 1, &v));
}

static void blocks_are_zero_and_aligned(void **state)
{
    struct rt_err err = {0};
    /* Either side of the size from which blocks are mapped (16 MiB), and nothing at all. */
    const size_t bytes[] = {0, 1, 63, 64, 1000, ((size_t)16 << 20) - 64, (size_t)16 << 20, (size_t)20 << 20};
    (void)state;
    for (size_t i = 0; i < sizeof bytes / sizeof bytes[0]; i++) {
        unsigned char *p = NULL;
        assert_ok(rt_alloc(bytes[i], 1, "a test", &p, &err));
        assert_non_null(p);
        assert_int_equal((uintptr_t)p % 64, 0);
        for (size_t k = 0; k < bytes[i]; k += k < 4096 ? 1 : 4093)
            assert_int_equal(p[k], 0);
        if (bytes[i] > 0) {
            assert_int_equal(p[bytes[i] - 1], 0);
            memset(p, 0xa5, bytes[i]);
        }
        rt_free(p);
        assert_ok(rt_alloc(bytes[i], 1, "a test", &p, &err)); /* likely the same, now dirty */
        for (size_t k = 0; k < bytes[i]; k += k < 4096 ? 1 : 4093)
            assert_int_equal(p[k], 0);
        rt_free(p);
    }
    rt_free(NULL);
}

static void alloc_refuses_too_much(void **state)
{
    struct rt_err err = {0};
    char *p = (char *)&err;
    (void)state;
    assert_status(rt_alloc(SIZE_MAX / 8 + 1, 8, "the weights", &p, &err), NOMEM);
    assert_status(rt_alloc(SIZE_MAX, 1, "the weights", &p, &err), NOMEM);
    assert_status(rt_alloc(SIZE_MAX / 2, 1, "the weights", &p, &err), NOMEM);
    rt_alloc(SIZE_MAX / 2, 1, "the weights", &p, &err);
    assert_non_null(strstr(err.msg, "the weights"));
    assert_ptr_equal(p, &err); /* untouched on failure */
}

static void buffer_grows(void **state)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    (void)state;
    for (int i = 0; i < 1000; i++)
        assert_ok(rt_buf_printf(&b, &err, "%d,", i));
    assert_int_equal(b.len, 10 * 2 + 90 * 3 + 900 * 4);
    assert_int_equal(strlen(b.data), b.len);
    assert_memory_equal(b.data, "0,1,2,", 6);
    assert_string_equal(b.data + b.len - 4, "999,");
    const size_t len = b.len;
    assert_ok(rt_buf_puts(&b, "", &err));
    assert_ok(rt_buf_append(&b, NULL, 0, &err));
    assert_int_equal(b.len, len);
    assert_status(rt_buf_reserve(&b, SIZE_MAX - 4, &err), NOMEM);
    assert_int_equal(b.len, len);
    assert_string_equal(b.data + b.len - 4, "999,");
    rt_buf_free(&b);
    assert_null(b.data);
    assert_int_equal(b.len + b.cap, 0);
    assert_ok(rt_buf_puts(&b, "", &err)); /* of an empty buffer: still a string */
    assert_string_equal(b.data, "");
    rt_buf_free(&b);
}

static void arena_cuts_and_gives_back(void **state)
{
    struct rt_err err = {0};
    struct rt_arena a;
    char *block, *p, *q, *r;
    (void)state;
    assert_ok(rt_alloc(256, 1, "a test", &block, &err));
    rt_arena_init(&a, block, 256, "scratch");
    assert_ok(rt_arena_alloc(&a, 1, &p, &err));
    assert_ok(rt_arena_alloc(&a, 65, &q, &err));
    assert_ptr_equal(p, block);
    assert_ptr_equal(q, block + 64);
    const size_t mark = a.used;
    assert_int_equal(mark, 192);
    assert_ok(rt_arena_alloc(&a, 64, &r, &err));
    assert_status(rt_arena_alloc(&a, 1, &p, &err), NOMEM);
    assert_status(rt_arena_alloc(&a, SIZE_MAX, &p, &err), NOMEM);
    assert_status(rt_arena_alloc(&a, SIZE_MAX - 63, &p, &err), NOMEM);
    assert_ok(rt_arena_alloc(&a, 0, &p, &err));
    rt_arena_reset(&a, mark);
    assert_int_equal(a.peak, 256);
    assert_ok(rt_arena_alloc(&a, 1, &p, &err));
    assert_ptr_equal(p, r);
    rt_arena_init(&a, block, 100, "scratch");
    assert_status(rt_arena_alloc(&a, 70, &p, &err), NOMEM); /* occupies 128 */
    assert_int_equal(a.used, 0);
    rt_free(block);
    assert_int_equal(rt_arena_round(0), 0);
    assert_int_equal(rt_arena_round(1), 64);
    assert_int_equal(rt_arena_round(64), 64);
    assert_true(rt_arena_round(SIZE_MAX) >= SIZE_MAX - 63);
}

static void arena_without_a_block_measures(void **state)
{
    struct rt_err err = {0};
    struct rt_arena a;
    void *p;
    (void)state;
    rt_arena_init(&a, NULL, SIZE_MAX, "plan");
    assert_ok(rt_arena_alloc(&a, (size_t)1 << 40, &p, &err));
    assert_ok(rt_arena_alloc(&a, 3, &p, &err));
    assert_int_equal(a.peak, ((size_t)1 << 40) + 64);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(sizes_are_checked),   cmocka_unit_test(blocks_are_zero_and_aligned),
    cmocka_unit_test(alloc_refuses_too_much), cmocka_unit_test(buffer_grows),
    cmocka_unit_test(arena_cuts_and_gives_back), cmocka_unit_test(arena_without_a_block_measures),
};
RT_SUITE(core_mem, tests)
