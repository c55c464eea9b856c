/* The cuda backend: attention over the caches of generation, and the products of heads around it, against ref from the same rounded inputs. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/mem.h"
#include "core/rng.h"
#ifdef RT_CUDA
#include "core/cuda/mla_cached.h"
#endif
#include "tests/cuda_ops.h"

/* Probabilities and results are rounded to bfloat16, independently: sqrt(2) times one rounding. */
#define TWO_ROUNDINGS (1.42 * CUDA_BF16_ONCE)

/* A cache [slots, capacity, width] on both sides; rows that no token may see are NaN on the GPU. */
static void *cache_of(struct cuda_pair *p, float *x, int slots, int64_t capacity, int64_t width, const int32_t *slot, const int32_t *pos, int64_t n,
                      uint64_t stream)
{
    cuda_random(x, slots * capacity * width, stream, 1.0f);
    for (int s = 0; s < slots; s++) {
        int64_t seen = 0;
        for (int64_t i = 0; i < n; i++)
            if (slot[i] == s && pos[i] >= seen)
                seen = pos[i] + 1;
        for (int64_t i = seen * width; i < capacity * width; i++)
            x[s * capacity * width + i] = NAN;
    }
    return cuda_act(p, x, slots * capacity * width);
}

struct places {
    int64_t n, capacity;
    int slots;
    int32_t slot[256], pos[256];
};

/* Positions around the sizes of tiles and parts, in slots in turn; several tokens of one slot too. */
static struct places places_of(int64_t n, int64_t capacity, int slots)
{
    static const int32_t special[] = {0, 1, 15, 16, 17, 31, 63, 64, 65, 127, 128, 200, 511, 512, 513, 1100};
    struct places r = {.n = n, .capacity = capacity, .slots = slots};
    for (int64_t i = 0; i < n; i++) {
        r.slot[i] = (int32_t)((i * 5 + 2) % slots);
        r.pos[i] = (int32_t)(special[i % 16] < capacity ? special[i % 16] : capacity - 1);
    }
    return r;
}

/* 256 tokens of which a block takes several parts of the cache in turn. */
static struct places crowd_of(int64_t capacity)
{
    struct places r = {.n = 256, .capacity = capacity, .slots = 2};
    for (int64_t i = 0; i < r.n; i++) {
        r.slot[i] = (int32_t)(i % 2);
        r.pos[i] = (int32_t)(i % 50 == 7 ? capacity - 1 - i : i * 37 % capacity / 16);
    }
    return r;
}

/* ---- latent attention ---- */

struct mla_case {
    int nh, R, dr;
    int64_t pe_head, pe_ld; /* 0: dense */
};

static void one_mla(struct cuda_pair *p, const struct mla_case *c, const struct places *at)
{
    struct rt_err err = {0};
    char what[128];
    const int64_t n = at->n, lat = n * c->nh * c->R, pe_head = c->pe_head != 0 ? c->pe_head : c->dr, pe_ld = c->pe_ld != 0 ? c->pe_ld : c->nh * pe_head;
    const int64_t width = c->R + c->dr, size = at->slots * at->capacity * width;
    float *q = cuda_floats(lat), *pe = cuda_floats(n * pe_ld), *cache = cuda_floats(size), *want = cuda_floats(lat), *got = cuda_floats(lat), *again = cuda_floats(lat);
    cuda_random(q, lat, 31, 1.0f);
    cuda_random(pe, n * pe_ld, 32, 1.0f);
    void *gcache = cache_of(p, cache, at->slots, at->capacity, width, at->slot, at->pos, n, 33);
    void *gq = cuda_act(p, q, lat), *gpe = cuda_act(p, pe, n * pe_ld), *o = cuda_act(p, NULL, lat), *slot = cuda_bytes(p, at->slot, (size_t)n * 4),
         *pos = cuda_bytes(p, at->pos, (size_t)n * 4);
    struct rt_mla_cached_args a = {.q_lat = q, .q_pe = pe, .q_pe_ld = c->pe_ld, .q_pe_head = c->pe_head, .cache = cache, .slot = at->slot, .pos = at->pos,
                                   .o = want, .n = n, .capacity = at->capacity, .nh = c->nh, .R = c->R, .dr = c->dr,
                                   .scale = 2.0f / sqrtf((float)width)};
    assert_ok(p->ref.be->mla_cached(p->ref.dev, p->ref.q, &a, &err));
    a.q_lat = gq, a.q_pe = gpe, a.cache = gcache, a.slot = slot, a.pos = pos, a.o = o;
    assert_non_null(p->gpu.be->mla_cached);
    assert_ok(p->gpu.be->mla_cached(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get_act(p, got, o, lat);
    snprintf(what, sizeof what, "mla %d heads, %d + %d, %lld tokens, capacity %lld", c->nh, c->R, c->dr, (long long)n, (long long)at->capacity);
    cuda_close(what, got, want, n * c->nh, c->R, TWO_ROUNDINGS, 2 * TWO_ROUNDINGS);
#ifdef RT_CUDA
    /* the kernels that another GPU, or another size, would get */
    for (int kernel = RT_CUDA_MLA_SYNC; kernel <= RT_CUDA_MLA_PLAIN; kernel++) {
        if (kernel == RT_CUDA_MLA_SYNC && c->R != 128 && c->R != 512)
            continue;
        assert_ok(rt_cuda_mla_by(p->gpu.dev, p->gpu.q, &a, kernel, &err));
        cuda_get_act(p, again, o, lat);
        cuda_close(kernel == RT_CUDA_MLA_SYNC ? "  mma.sync" : "  plain", again, want, n * c->nh, c->R, TWO_ROUNDINGS, 2 * TWO_ROUNDINGS);
    }
#endif
    /* a token alone: the same bits */
    const int64_t row = (int64_t)c->nh * c->R;
    a.n = 1;
    a.q_lat = (char *)gq + (n - 1) * row * 2;
    a.q_pe = (char *)gpe + (n - 1) * pe_ld * 2;
    a.slot = (int32_t *)slot + n - 1;
    a.pos = (int32_t *)pos + n - 1;
    assert_ok(p->gpu.be->mla_cached(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get_act(p, again, o, row);
    assert_memory_equal(again, got + (n - 1) * row, (size_t)row * sizeof *got);
    void *const device[] = {gcache, gq, gpe, o, slot, pos};
    for (int i = 0; i < 6; i++)
        cuda_free(p, device[i]);
    float *const host[] = {q, pe, cache, want, got, again};
    for (int i = 0; i < 6; i++)
        rt_free(host[i]);
}

static void test_mla(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct places some = places_of(33, 600, 7), few = places_of(16, 130, 3), one = places_of(1, 20, 1);
    one_mla(&p, &(struct mla_case){.nh = 8, .R = 128, .dr = 16, .pe_head = 48, .pe_ld = 384}, &some);
    one_mla(&p, &(struct mla_case){.nh = 4, .R = 128, .dr = 16}, &one);
    one_mla(&p, &(struct mla_case){.nh = 16, .R = 512, .dr = 64, .pe_head = 192, .pe_ld = 16 * 192}, &few);
    one_mla(&p, &(struct mla_case){.nh = 70, .R = 512, .dr = 64}, &few);
    one_mla(&p, &(struct mla_case){.nh = 128, .R = 512, .dr = 64, .pe_head = 192, .pe_ld = 128 * 192}, &one);
    one_mla(&p, &(struct mla_case){.nh = 3, .R = 40, .dr = 6}, &some); /* sizes that have no kernel of their own */
    /* several parts: positions around the cut */
    struct places cut = places_of(5, 8300, 2);
    static const int32_t around[] = {4094, 4095, 4096, 8192, 8250};
    memcpy(cut.pos, around, sizeof around);
    one_mla(&p, &(struct mla_case){.nh = 3, .R = 512, .dr = 64}, &cut);
    one_mla(&p, &(struct mla_case){.nh = 5, .R = 128, .dr = 16}, &cut);
    const struct places crowd = crowd_of(12400);
    one_mla(&p, &(struct mla_case){.nh = 1, .R = 128, .dr = 16}, &crowd);
    cuda_pair_close(&p);
}

/* ---- grouped heads ---- */

struct attn_case {
    int nh, nkv, d;
    int64_t q_ld;
};

static void one_attn(struct cuda_pair *p, const struct attn_case *c, const struct places *at)
{
    struct rt_err err = {0};
    char what[128];
    const int64_t n = at->n, out = n * c->nh * c->d, ld = c->q_ld != 0 ? c->q_ld : c->nh * c->d, width = c->nkv * c->d;
    const int64_t size = at->slots * at->capacity * width, row = (int64_t)c->nh * c->d;
    float *q = cuda_floats(n * ld), *k = cuda_floats(size), *v = cuda_floats(size), *want = cuda_floats(out), *got = cuda_floats(out), *again = cuda_floats(out);
    cuda_random(q, n * ld, 41, 1.0f);
    void *gk = cache_of(p, k, at->slots, at->capacity, width, at->slot, at->pos, n, 42),
         *gv = cache_of(p, v, at->slots, at->capacity, width, at->slot, at->pos, n, 43);
    void *gq = cuda_act(p, q, n * ld), *o = cuda_act(p, NULL, out), *slot = cuda_bytes(p, at->slot, (size_t)n * 4),
         *pos = cuda_bytes(p, at->pos, (size_t)n * 4);
    struct rt_attn_cached_args a = {.q = q, .q_ld = c->q_ld, .k_cache = k, .v_cache = v, .slot = at->slot, .pos = at->pos, .o = want, .n = n,
                                    .capacity = at->capacity, .nh = c->nh, .nkv = c->nkv, .d = c->d, .scale = 2.0f / sqrtf((float)c->d)};
    assert_ok(p->ref.be->attn_cached(p->ref.dev, p->ref.q, &a, &err));
    a.q = gq, a.k_cache = gk, a.v_cache = gv, a.slot = slot, a.pos = pos, a.o = o;
    assert_non_null(p->gpu.be->attn_cached);
    assert_ok(p->gpu.be->attn_cached(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get_act(p, got, o, out);
    snprintf(what, sizeof what, "attention %d/%d heads of %d, %lld tokens, capacity %lld", c->nh, c->nkv, c->d, (long long)n, (long long)at->capacity);
    cuda_close(what, got, want, n * c->nh, c->d, TWO_ROUNDINGS, 2.5 * TWO_ROUNDINGS);
    a.n = 1;
    a.q = (char *)gq + (n - 1) * ld * 2;
    a.slot = (int32_t *)slot + n - 1;
    a.pos = (int32_t *)pos + n - 1;
    assert_ok(p->gpu.be->attn_cached(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get_act(p, again, o, row);
    assert_memory_equal(again, got + (n - 1) * row, (size_t)row * sizeof *got);
    void *const device[] = {gk, gv, gq, o, slot, pos};
    for (int i = 0; i < 6; i++)
        cuda_free(p, device[i]);
    float *const host[] = {q, k, v, want, got, again};
    for (int i = 0; i < 6; i++)
        rt_free(host[i]);
}

static void test_attn(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct places some = places_of(48, 1200, 7), few = places_of(16, 130, 3), one = places_of(1, 20, 1);
    one_attn(&p, &(struct attn_case){.nh = 12, .nkv = 2, .d = 128, .q_ld = 2048}, &some);
    one_attn(&p, &(struct attn_case){.nh = 9, .nkv = 3, .d = 64, .q_ld = 960}, &some);
    one_attn(&p, &(struct attn_case){.nh = 4, .nkv = 4, .d = 128}, &few);
    one_attn(&p, &(struct attn_case){.nh = 40, .nkv = 2, .d = 64}, &few); /* more query heads than a tile has rows */
    one_attn(&p, &(struct attn_case){.nh = 32, .nkv = 8, .d = 128}, &one);
    one_attn(&p, &(struct attn_case){.nh = 4, .nkv = 2, .d = 16, .q_ld = 130}, &some); /* sizes that have no kernel of their own */
    one_attn(&p, &(struct attn_case){.nh = 4, .nkv = 2, .d = 8}, &few);
    one_attn(&p, &(struct attn_case){.nh = 6, .nkv = 2, .d = 96}, &few);
    one_attn(&p, &(struct attn_case){.nh = 2, .nkv = 1, .d = 64, .q_ld = 131}, &one);
    const struct places crowd = crowd_of(12400);
    one_attn(&p, &(struct attn_case){.nh = 10, .nkv = 10, .d = 64}, &crowd);
    cuda_pair_close(&p);
}

/* ---- products of heads ---- */

struct head_case {
    int64_t n, x_ld, x_head, y_ld, y_head;
    int nh, head_rows, row0, d, R;
    bool transpose, e4m3;
};

static void one_head(struct cuda_pair *p, const struct head_case *c)
{
    struct rt_err err = {0};
    char what[128];
    const int64_t dx = c->transpose ? c->R : c->d, dy = c->transpose ? c->d : c->R;
    const int64_t x_head = c->x_head != 0 ? c->x_head : dx, x_ld = c->x_ld != 0 ? c->x_ld : c->nh * x_head;
    const int64_t y_head = c->y_head != 0 ? c->y_head : dy, y_ld = c->y_ld != 0 ? c->y_ld : c->nh * y_head;
    float *x = cuda_floats(c->n * x_ld), *want = cuda_floats(c->n * y_ld), *got = cuda_floats(c->n * y_ld), *dense = cuda_floats(2 * c->n * c->nh * dy);
    struct cuda_weight w = c->e4m3 ? cuda_weight_e4m3(p, c->nh * c->head_rows, c->R, 51, 0.1f) : cuda_weight_bf16(p, c->nh * c->head_rows, c->R, 51, 0.1f);
    cuda_random(x, c->n * x_ld, 52, 1.0f);
    cuda_random(want, c->n * y_ld, 53, 1.0f); /* what lies between rows stays */
    void *gx = cuda_act(p, x, c->n * x_ld), *y = cuda_act(p, want, c->n * y_ld);
    struct rt_head_matmul_args a = {.x = x, .x_ld = c->x_ld, .x_head = c->x_head, .w = w.ref, .y = want, .y_ld = c->y_ld, .y_head = c->y_head, .n = c->n,
                                    .nh = c->nh, .head_rows = c->head_rows, .row0 = c->row0, .d = c->d, .R = c->R, .transpose = c->transpose};
    assert_ok(p->ref.be->head_matmul(p->ref.dev, p->ref.q, &a, &err));
    a.x = gx, a.w = w.gpu, a.y = y;
    assert_non_null(p->gpu.be->head_matmul);
    assert_ok(p->gpu.be->head_matmul(p->gpu.dev, p->gpu.q, &a, &err));
    cuda_get_act(p, got, y, c->n * y_ld);
    float *dense_want = dense + c->n * c->nh * dy;
    for (int64_t t = 0; t < c->n; t++)
        for (int h = 0; h < c->nh; h++) {
            memcpy(dense + (t * c->nh + h) * dy, got + t * y_ld + h * y_head, (size_t)dy * sizeof *got);
            memcpy(dense_want + (t * c->nh + h) * dy, want + t * y_ld + h * y_head, (size_t)dy * sizeof *got);
            for (int64_t i = t * y_ld + h * y_head; i < t * y_ld + h * y_head + dy; i++)
                got[i] = want[i] = 0;
        }
    assert_memory_equal(got, want, (size_t)(c->n * y_ld) * sizeof *got);
    snprintf(what, sizeof what, "%s%s %lld tokens, %d heads, %d..%d of %d, %d", c->e4m3 ? "e4m3" : "bf16", c->transpose ? " transposed" : "",
             (long long)c->n, c->nh, c->row0, c->row0 + c->d, c->head_rows, c->R);
    cuda_close(what, dense, dense_want, c->n * c->nh, dy, TWO_ROUNDINGS, 2.5 * TWO_ROUNDINGS); /* e4m3: weights are rounded once they are scaled */
    cuda_free(p, gx);
    cuda_free(p, y);
    cuda_weight_free(p, &w);
    rt_free(x);
    rt_free(want);
    rt_free(got);
    rt_free(dense);
}

static void test_heads(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (int e4m3 = 0; e4m3 < 2; e4m3++) {
        one_head(&p, &(struct head_case){.e4m3 = e4m3, .n = 70, .nh = 4, .head_rows = 256, .d = 128, .R = 512, .x_head = 192, .x_ld = 800});
        one_head(&p, &(struct head_case){.e4m3 = e4m3, .n = 70, .nh = 4, .head_rows = 256, .row0 = 128, .d = 128, .R = 512, .transpose = true});
        one_head(&p, &(struct head_case){.e4m3 = e4m3, .n = 9, .nh = 8, .head_rows = 64, .d = 32, .R = 128, .x_head = 48});
        one_head(&p, &(struct head_case){.e4m3 = e4m3, .n = 1, .nh = 8, .head_rows = 64, .row0 = 32, .d = 32, .R = 128, .transpose = true, .y_head = 40});
        one_head(&p, &(struct head_case){.e4m3 = e4m3, .n = 65, .nh = 3, .head_rows = 50, .row0 = 11, .d = 33, .R = 131, .y_ld = 3 * 131 + 5});
        one_head(&p, &(struct head_case){.e4m3 = e4m3, .n = 65, .nh = 3, .head_rows = 50, .row0 = 11, .d = 33, .R = 131, .transpose = true});
        one_head(&p, &(struct head_case){.e4m3 = e4m3, .n = 2, .nh = 128, .head_rows = 256, .d = 128, .R = 512});
    }
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_mla),
    cmocka_unit_test(test_attn),
    cmocka_unit_test(test_heads),
};
RT_SUITE(cuda_decode, tests)
