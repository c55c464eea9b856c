/* Products on the GPU: the interface that the backend's files call, by cuBLASLt and by the kernel of our own. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/dtype.h"
#include "core/mem.h"
#include "tests/cuda_ops.h"

#ifdef RT_CUDA
#include "core/cuda/gemm.h"
#include "core/cuda/gemm_kernels.h"
#include "core/cuda/group8.h"
#include "core/cuda/lt.h"
#include "core/cuda/product_sm90.h"

/* Float32 results differ from the reference by the rounding of their sums alone: tensor cores cut each of up to 100 partial sums of 16 terms at
 * 2^-23 of its size. */
#define F32_SUMS 5e-6
/* Rounding to bfloat16: 2^-8 at most, 1.66e-3 in the mean square. Twice, where two operands are rounded on the way, or the library rounds the
 * product before it adds bias or y: 2.35e-3; with the store 2.9e-3. A few elements may all lie near the most. */
#define BF16_TWICE 3.5e-3
#define BF16_FEW 8e-3
/* e4m3 products with block scales: Hopper's tensor cores keep some 13 bits behind the largest of the sums of a run of 128: 1.4e-4 measured. */
#define SCALED_F32 5e-4
#define SCALED 3.5e-3

/* ---- rt_cuda_gemm ---- */

struct shape {
    int64_t m, n, k, pad; /* pad: elements between rows beyond the row's own */
    bool a_t, b_t, accumulate, d_f32;
    int bias; /* 0 none, 1 BF16, 2 float32 */
    int64_t batch;
    bool add;
};

static void naive(const struct shape *s, const struct rt_cuda_gemm_args *g, const float *a, const float *b, const float *bias, const float *add, float *d)
{
    for (int64_t z = 0; z < s->batch; z++)
        for (int64_t i = 0; i < s->m; i++)
            for (int64_t j = 0; j < s->n; j++) {
                float *at = d + z * g->d_stride + i * g->ldd + j;
                double sum = (s->bias ? (double)bias[j] : 0.0) + (s->accumulate ? (double)*at : 0.0) + (s->add ? (double)add[i * g->ldd + j] : 0.0);
                for (int64_t l = 0; l < s->k; l++)
                    sum += (double)a[z * g->a_stride + (s->a_t ? l * g->lda + i : i * g->lda + l)] *
                           (double)b[z * g->b_stride + (s->b_t ? j * g->ldb + l : l * g->ldb + j)];
                *at = (float)sum;
            }
}

enum maker { BY_CHOICE, BY_MMA, BY_SM90 }; /* the last two: kernels of our own, whatever the library could do */

static void gemm_case(struct cuda_pair *p, const struct shape *s, enum maker way)
{
    static const char *const name[] = {"library", "own", "own of 9.0"};
    struct rt_err err = {0};
    struct rt_cuda_gemm_args g = {.m = s->m, .n = s->n, .k = s->k, .a_t = s->a_t, .b_t = s->b_t, .accumulate = s->accumulate, .d_f32 = s->d_f32,
                                  .bias_f32 = s->bias == 2, .batch = s->batch};
    const int64_t a_rows = s->a_t ? s->k : s->m, b_rows = s->b_t ? s->n : s->k;
    g.lda = (s->a_t ? s->m : s->k) + s->pad;
    g.ldb = (s->b_t ? s->k : s->n) + s->pad;
    g.ldd = s->n + s->pad;
    g.a_stride = a_rows * g.lda;
    g.b_stride = b_rows * g.ldb;
    g.d_stride = s->m * g.ldd;
    const int64_t na = s->batch * g.a_stride, nb = s->batch * g.b_stride, nd = s->batch * g.d_stride;
    float *a = cuda_floats(na), *b = cuda_floats(nb), *d = cuda_floats(nd), *got = cuda_floats(nd), *bias = cuda_floats(s->n), *add = cuda_floats(nd);
    char what[96];
    cuda_random(a, na, 1, 1.0f);
    cuda_random(b, nb, 2, 1.0f);
    cuda_random(d, nd, 3, 10.0f);
    if (!s->accumulate)
        cuda_poison(d, s->batch * s->m, s->n, g.ldd);
    cuda_random(bias, s->n, 4, 10.0f);
    cuda_random(add, nd, 5, 10.0f);
    g.a = cuda_act(p, a, na);
    g.b = cuda_act(p, b, nb);
    g.add = !s->add ? NULL : s->d_f32 ? cuda_bytes(p, add, (size_t)nd * 4) : cuda_act(p, add, nd);
    g.d = s->d_f32 ? cuda_bytes(p, d, (size_t)nd * 4) : cuda_act(p, d, nd);
    g.bias = s->bias == 0 ? NULL : s->bias == 1 ? cuda_act(p, bias, s->n) : cuda_bytes(p, bias, (size_t)s->n * 4);
    struct rt_queue *q = (struct rt_queue *)p->gpu.q;
    if (way == BY_SM90)
        assert_true(rt_cuda_product_sm90_fits(p->gpu.dev, &g));
    assert_ok(way == BY_SM90 ? rt_cuda_product_sm90(q, &g, &err) : way == BY_MMA ? rt_cuda_gemm_mma(q, &g, &err) : rt_cuda_gemm(q, &g, &err));
    if (s->d_f32)
        cuda_get(p, got, g.d, (size_t)nd * 4);
    else
        cuda_get_act(p, got, g.d, nd);
    naive(s, &g, a, b, bias, add, d); /* what lies between the rows stays as it was */
    snprintf(what, sizeof what, "%s %lldx%lldx%lld%s%s%s%s%s%s", name[way], (long long)s->m, (long long)s->n, (long long)s->k,
             s->a_t ? " a_t" : "", s->b_t ? " b_t" : "", s->accumulate ? " +=" : "", s->d_f32 ? " f32" : "", s->bias ? " bias" : "", s->add ? " add" : "");
    cuda_close(what, got, d, s->batch * s->m, g.ldd, s->d_f32 ? F32_SUMS : s->m * s->n < 64 ? BF16_FEW : BF16_TWICE, 0);
    for (int64_t r = 0; r < s->batch * s->m; r++)
        for (int64_t j = s->n; j < g.ldd; j++)
            if (got[r * g.ldd + j] != d[r * g.ldd + j])
                fail_msg("%s: wrote behind row %lld", what, (long long)r);
    cuda_free(p, (void *)(uintptr_t)g.a);
    cuda_free(p, (void *)(uintptr_t)g.b);
    cuda_free(p, (void *)(uintptr_t)g.bias);
    cuda_free(p, (void *)(uintptr_t)g.add);
    cuda_free(p, g.d);
    rt_free(a);
    rt_free(b);
    rt_free(d);
    rt_free(got);
    rt_free(bias);
    rt_free(add);
}

static void test_gemm(void **state)
{
    static const int64_t sizes[][4] = {{1, 1, 1, 0}, {3, 5, 7, 0}, {16, 128, 64, 8}, {128, 128, 128, 0}, {130, 257, 96, 3}, {257, 136, 520, 8},
                                       {300, 64, 1000, 0}};
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int flags = 0; flags < 16; flags++)
            for (int own = 0; own < 2; own++) {
                const struct shape s = {sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3], flags & 1, flags >> 1 & 1, flags >> 2 & 1, flags >> 3 & 1,
                                        (int)((i + (size_t)flags) % 3), 1, false};
                gemm_case(&p, &s, own ? BY_MMA : BY_CHOICE);
            }
    for (int own = 0; own < 2; own++) {
        gemm_case(&p, &(struct shape){40, 72, 48, 0, false, true, false, false, 0, 5, false}, own ? BY_MMA : BY_CHOICE);
        gemm_case(&p, &(struct shape){40, 71, 48, 1, true, false, true, true, 0, 3, false}, own ? BY_MMA : BY_CHOICE);
        gemm_case(&p, &(struct shape){9, 40, 0, 0, false, true, true, false, 1, 1, false}, own ? BY_MMA : BY_CHOICE);  /* k 0: the bias alone */
        gemm_case(&p, &(struct shape){9, 40, 0, 0, false, true, false, true, 0, 1, false}, own ? BY_MMA : BY_CHOICE);
    }
    for (int f32 = 0; f32 < 2; f32++) { /* something to add, with and without a bias */
        gemm_case(&p, &(struct shape){130, 264, 96, 8, false, true, false, f32, 1, 1, true}, BY_CHOICE);
        gemm_case(&p, &(struct shape){33, 71, 48, 1, true, false, false, f32, 0, 1, true}, BY_CHOICE);
        gemm_case(&p, &(struct shape){9, 40, 0, 0, false, true, false, f32, 0, 1, true}, BY_CHOICE);
    }
    cuda_pair_close(&p);
}

/* The kernel of compute capability 9.0 alone: edges of its tiles of 192 x 256, more tiles than blocks, in one band of rows and, where the L2 holds little, in
 * two; sums shorter than its ring and longer; a tile in parts along k behind whole ones. */
static void test_sm90(void **state)
{
    static const int64_t sizes[][4] = {{192, 256, 64, 0}, {1, 8, 8, 0}, {200, 264, 72, 8}, {384, 512, 256, 0}, {304, 896, 200, 0}, {2312, 2600, 16, 16},
                                       {136, 264, 4104, 0}}; /* the last in parts along k */
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const bool there = rt_cuda_product_sm90_fits(p.gpu.dev, &(struct rt_cuda_gemm_args){.m = 192, .n = 256, .k = 64});
    const size_t l2_bytes = p.gpu.dev->l2_bytes;
    for (size_t i = 0; there && i < 2 * (sizeof sizes / sizeof *sizes); i++)
        for (int flags = 0; flags < 8; flags++) {
            const size_t at = i / 2;
            p.gpu.dev->l2_bytes = i % 2 == 0 ? l2_bytes : 1;
            const struct shape s = {sizes[at][0], sizes[at][1], sizes[at][2], sizes[at][3], flags & 1, flags >> 1 & 1, flags >> 2 & 1, false, 0, 1, false};
            if (!(s.a_t && s.b_t) && (!s.a_t || s.m % 8 == 0))
                gemm_case(&p, &s, BY_SM90);
        }
    p.gpu.dev->l2_bytes = l2_bytes;
    for (int i = 0; there && i < 3; i++) /* where 66 clusters run: 66 tiles, and parts of another */
        gemm_case(&p, &(struct shape){8, 66 * 256 + 8, 4104, 0, i == 2, i == 1, i == 0, false, 0, 1, false}, BY_SM90);
    /* what it does not do */
    for (int i = 0; i < 6; i++) {
        struct rt_cuda_gemm_args g = {.m = 192, .n = 256, .k = 64, .a_t = i == 0, .b_t = i == 0, .d_f32 = i == 1, .batch = i == 2 ? 2 : 1, .lda = i == 3 ? 68 : 0};
        if (i == 4)
            g.d = (char *)8; /* never read: not 16-byte aligned */
        if (i == 5)
            g.add = (char *)16;
        assert_false(rt_cuda_product_sm90_fits(p.gpu.dev, &g));
    }
    cuda_pair_close(&p);
    if (!there)
        TEST_SKIP("not of compute capability 9.0");
}

/* FP16 as the head's logits have it: against the library. */
static void test_sm90_f16(void **state)
{
    enum { M = 300, N = 520, K = 136 };
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    uint16_t *a = NULL, *b = NULL, *d = NULL;
    float *x = cuda_floats(M * N), *y = cuda_floats(M * N);
    assert_ok(rt_alloc(M * K, sizeof *a, "a", &a, &err));
    assert_ok(rt_alloc(N * K, sizeof *b, "b", &b, &err));
    assert_ok(rt_alloc(M * N, sizeof *d, "d", &d, &err));
    for (int i = 0; i < M * K; i++)
        a[i] = (uint16_t)(0x3800 + i % 1021 + (i % 3 == 0) * 0x8000); /* +- 0.5 .. 1 */
    for (int i = 0; i < N * K; i++)
        b[i] = (uint16_t)(0x3c00 + i % 1013 + (i % 7 < 3) * 0x8000); /* +- 1 .. 2 */
    struct rt_cuda_gemm_args g = {.a = cuda_bytes(&p, a, M * K * 2), .b = cuda_bytes(&p, b, N * K * 2), .d = cuda_bytes(&p, NULL, M * N * 2), .m = M, .n = N,
                                  .k = K, .b_t = true, .f16 = true};
    const bool there = rt_cuda_product_sm90_fits(p.gpu.dev, &g) && p.gpu.dev->lt != NULL;
    if (there) {
        assert_ok(rt_cuda_gemm((struct rt_queue *)p.gpu.q, &g, &err));
        cuda_get(&p, d, g.d, M * N * 2);
        for (int i = 0; i < M * N; i++)
            x[i] = rt_f16_to_f32(d[i]);
        assert_ok(rt_cuda_product_sm90((struct rt_queue *)p.gpu.q, &g, &err));
        cuda_get(&p, d, g.d, M * N * 2);
        for (int i = 0; i < M * N; i++)
            y[i] = rt_f16_to_f32(d[i]);
        cuda_close("FP16, own of 9.0", y, x, M, N, 3e-4, 0); /* both are rounded to 2^-11 */
        g.accumulate = true;
        assert_false(rt_cuda_product_sm90_fits(p.gpu.dev, &g));
    }
    cuda_free(&p, (void *)(uintptr_t)g.a);
    cuda_free(&p, (void *)(uintptr_t)g.b);
    cuda_free(&p, g.d);
    rt_free(a);
    rt_free(b);
    rt_free(d);
    rt_free(x);
    rt_free(y);
    cuda_pair_close(&p);
    if (!there)
        TEST_SKIP("not of compute capability 9.0, or no cuBLASLt");
}

/* Heads side by side in each row: batches at a distance smaller than a row. */
static void test_heads(void **state)
{
    enum { N = 70, HEADS = 3, D = 24, R = 40 };
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    float *x = cuda_floats(N * HEADS * D), *w = cuda_floats(HEADS * D * R), *want = cuda_floats(N * HEADS * R), *got = cuda_floats(N * HEADS * R);
    cuda_random(x, N * HEADS * D, 1, 1.0f);
    cuda_random(w, HEADS * D * R, 2, 1.0f);
    for (int t = 0; t < N; t++)
        for (int h = 0; h < HEADS; h++)
            for (int r = 0; r < R; r++) {
                double sum = 0;
                for (int i = 0; i < D; i++)
                    sum += (double)x[(t * HEADS + h) * D + i] * (double)w[(h * D + i) * R + r];
                want[(t * HEADS + h) * R + r] = (float)sum;
            }
    void *dx = cuda_act(&p, x, N * HEADS * D), *dw = cuda_act(&p, w, HEADS * D * R), *dy = cuda_act(&p, NULL, N * HEADS * R);
    const struct rt_cuda_gemm_args g = {.a = dx, .b = dw, .d = dy, .m = N, .n = R, .k = D, .lda = HEADS * D, .ldd = HEADS * R, .batch = HEADS,
                                        .a_stride = D, .b_stride = D * R, .d_stride = R};
    assert_ok(rt_cuda_gemm((struct rt_queue *)p.gpu.q, &g, &err));
    cuda_get_act(&p, got, dy, N * HEADS * R);
    cuda_close("heads", got, want, N, HEADS * R, CUDA_BF16_ONCE, 0);
    cuda_free(&p, dx);
    cuda_free(&p, dw);
    cuda_free(&p, dy);
    rt_free(x);
    rt_free(w);
    rt_free(want);
    rt_free(got);
    cuda_pair_close(&p);
}

/* The algorithm of 100 rows does not depend on what was multiplied before, 112 rows of the same bucket. */
static void test_history(void **state)
{
    enum { K = 1024, N = 512, M = 112 };
    static uint16_t bits[2][M * N];
    float *x = cuda_floats(M * K);
    struct rt_err err = {0};
    (void)state;
    for (int order = 0; order < 2; order++) {
        struct cuda_pair p;
        if (!cuda_pair_open(&p)) {
            rt_free(x);
            TEST_SKIP("no GPU");
        }
        struct cuda_weight w = cuda_weight_bf16(&p, N, K, 9, 1.0f);
        cuda_random(x, M * K, 8, 1.0f);
        void *dx = cuda_act(&p, x, M * K), *dy = cuda_act(&p, NULL, M * N);
        for (int i = 0; i < 2; i++) {
            struct rt_cuda_gemm_args g = {.a = dx, .b = w.gpu->data, .b_t = true, .d = dy, .m = (i == order) ? 100 : 112, .n = N, .k = K};
            assert_ok(rt_cuda_gemm((struct rt_queue *)p.gpu.q, &g, &err));
            if (g.m == 100)
                cuda_get(&p, bits[order], dy, sizeof bits[order]);
        }
        cuda_free(&p, dx);
        cuda_free(&p, dy);
        cuda_weight_free(&p, &w);
        cuda_pair_close(&p);
    }
    assert_memory_equal(bits[0], bits[1], 100 * N * sizeof bits[0][0]);
    assert_int_equal(rt_cuda_lt_bucket(100), rt_cuda_lt_bucket(112));
    for (int64_t n = 1; n < 100000; n = n * 5 / 4 + 1) {
        const int64_t b = rt_cuda_lt_bucket(n);
        assert_true(b >= n && b % 16 == 0 && b <= n + n / 8 + 15 && rt_cuda_lt_bucket(b) == b);
    }
    rt_free(x);
}

/* Rows beyond 2^31 elements, on either side. */
static void test_far(void **state)
{
    enum { K = 64, N = 8192, LAST = 40 };
    const int64_t n = 270000;
    struct cuda_pair p;
    struct rt_err err = {0};
    struct rt_dev_memory memory;
    void *dx, *dy;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    assert_ok(p.gpu.be->memory(p.gpu.dev, &memory, &err));
    if (memory.free < (uint64_t)12 << 30) {
        cuda_pair_close(&p);
        TEST_SKIP("a product of 270000 rows takes 12 GiB");
    }
    float *x = cuda_floats(LAST * K), *want = cuda_floats(LAST * N), *got = cuda_floats(LAST * N);
    uint16_t *half = (uint16_t *)(void *)cuda_floats(LAST * N);
    struct cuda_weight w = cuda_weight_bf16(&p, N, K, 1, 1.0f);
    cuda_random(x, LAST * K, 2, 1.0f);
    rt_from_f32(half, RT_BF16, x, LAST * K);
    assert_ok(RT_OP(&p.ref, linear_fwd, &err, .x = {x, NULL}, .w = w.ref, .y = want, .n = LAST, .K = K, .N = N));
    assert_ok(p.gpu.be->alloc(p.gpu.dev, (size_t)n * K * 2, &dx, &err));
    assert_ok(p.gpu.be->alloc(p.gpu.dev, (size_t)n * N * 2, &dy, &err));
    assert_ok(rt_device_upload(&p.gpu, (char *)dx + (size_t)(n - LAST) * K * 2, half, LAST * K * 2, &err));
    for (int own = 0; own < 2; own++) {
        const struct rt_cuda_gemm_args g = {.a = dx, .b = w.gpu->data, .b_t = true, .d = dy, .m = n, .n = N, .k = K};
        assert_ok(rt_device_zero(&p.gpu, dy, (size_t)n * N * 2, &err));
        assert_ok(own ? rt_cuda_gemm_mma((struct rt_queue *)p.gpu.q, &g, &err) : rt_cuda_gemm((struct rt_queue *)p.gpu.q, &g, &err));
        cuda_get_act(&p, got, (char *)dy + (size_t)(n - LAST) * N * 2, LAST * N);
        cuda_close(own ? "far rows, own" : "far rows, library", got, want, LAST, N, CUDA_BF16_ONCE, 0);
    }
    p.gpu.be->free(p.gpu.dev, dx);
    p.gpu.be->free(p.gpu.dev, dy);
    cuda_weight_free(&p, &w);
    rt_free(x);
    rt_free(want);
    rt_free(got);
    rt_free(half);
    cuda_pair_close(&p);
}

static void test_dequant(void **state)
{
    static const int64_t shapes[][2] = {{130, 128}, {257, 272}, {64, 135}};
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < 3; i++) {
        const int64_t rows = shapes[i][0], cols = shapes[i][1], blocks = (cols + 127) / 128, row0 = 3;
        struct cuda_weight w = cuda_weight_e4m3(&p, rows, cols, i, 1.0f);
        float *want = cuda_floats(rows * cols), *got = cuda_floats(rows * cols);
        for (int64_t r = row0; r < rows; r++)
            for (int64_t c = 0; c < cols; c++)
                want[(r - row0) * cols + c] = rt_e4m3_to_f32(((uint8_t *)w.data)[r * cols + c]) * w.scale[r / 128 * blocks + c / 128];
        cuda_round(want, (rows - row0) * cols);
        void *out = cuda_act(&p, NULL, (rows - row0) * cols);
        assert_ok(rt_cuda_dequant((struct rt_queue *)p.gpu.q, w.gpu, row0, rows - row0, out, &err));
        cuda_get_act(&p, got, out, (rows - row0) * cols);
        assert_memory_equal(got, want, (size_t)((rows - row0) * cols) * sizeof *got);
        cuda_free(&p, out);
        cuda_weight_free(&p, &w);
        rt_free(want);
        rt_free(got);
    }
    cuda_pair_close(&p);
}

/* ---- rt_cuda_gemm8 ---- */

struct shape8 {
    int64_t n, K, N, ldy, more; /* more: rows of the array of scales beyond rt_act_rows(n) */
    bool accumulate, y_f32, padded;
};

/* The ways of a product of codes, by what is there: neither, the library alone, the kernel of our own alone. */
enum way { DEQUANTISED, LIBRARY, OWN };

static void gemm8_case(struct cuda_pair *p, const struct shape8 *s, enum way way)
{
    static const char *const names[] = {"dequantised", "library", "own"};
    struct rt_err err = {0};
    struct rt_dev *dev = p->gpu.dev;
    struct rt_cuda_lt *lt = dev->lt;
    void *encode = dev->encode_map;
    const int64_t rows = s->padded ? rt_act_rows(s->n) : s->n, ny = rows * s->ldy, ld = rt_act_rows(s->n) + s->more;
    float *x = cuda_floats(s->n * s->K), *y = cuda_floats(ny), *got = cuda_floats(ny), *scales = cuda_floats(ld * (s->K / 128));
    char what[96];
    cuda_random(x, s->n * s->K, 11, 2.0f);
    cuda_random(y, ny, 12, 30.0f);
    if (!s->accumulate)
        cuda_poison(y, rows, s->N, s->ldy);
    struct cuda_quantised q = cuda_quantise(p, x, s->n, s->K);
    struct cuda_weight w = cuda_weight_e4m3(p, s->N, s->K, 13, 1.0f);
    for (int64_t b = 0; b < s->K / 128; b++)
        for (int64_t r = 0; r < ld; r++)
            scales[b * ld + r] = r < s->n ? q.ref.scale[b * s->n + r] : 1e6f; /* of rows that are not there: must not matter */
    struct rt_cuda_gemm8_args g = {.x = q.gpu, .w = w.gpu, .n = s->n, .K = s->K, .N = s->N, .ldy = s->ldy, .x_scale_ld = ld,
                                   .accumulate = s->accumulate, .y_f32 = s->y_f32, .padded = s->padded};
    g.x.scale = cuda_bytes(p, scales, (size_t)(ld * (s->K / 128)) * 4);
    g.y = s->y_f32 ? cuda_bytes(p, y, (size_t)ny * 4) : cuda_act(p, y, ny);
    dev->lt = way == LIBRARY ? lt : NULL;
    dev->encode_map = way == OWN ? encode : NULL;
    assert_ok(rt_cuda_gemm8((struct rt_queue *)p->gpu.q, &g, &err));
    dev->lt = lt;
    dev->encode_map = encode;
    if (s->y_f32)
        cuda_get(p, got, g.y, (size_t)ny * 4);
    else
        cuda_get_act(p, got, g.y, ny);
    assert_ok(RT_OP(&p->ref, linear_fwd, &err, .x = q.ref, .w = w.ref, .y = y, .ldy = s->ldy, .n = s->n, .K = s->K, .N = s->N,
                    .accumulate = s->accumulate));
    snprintf(what, sizeof what, "e4m3 %s %lldx%lldx%lld%s%s%s", names[way], (long long)s->n, (long long)s->N, (long long)s->K,
             s->accumulate ? " +=" : "", s->y_f32 ? " f32" : "", s->padded ? " padded" : "");
    /* what a way does not take is dequantised */
    const bool whole = way == OWN ? rt_cuda_group8_fits(dev, s->K, s->N, false) && !s->y_f32 && s->more == 0 : way == LIBRARY && s->N % 4 == 0;
    cuda_close(what, got, y, s->n, s->ldy, !whole ? BF16_TWICE : s->y_f32 ? SCALED_F32 : SCALED, 0);
    for (int64_t r = 0; r < s->n; r++)
        for (int64_t j = s->N; j < s->ldy; j++)
            if (got[r * s->ldy + j] != y[r * s->ldy + j])
                fail_msg("%s: wrote behind row %lld", what, (long long)r);
    cuda_free(p, g.x.scale);
    cuda_free(p, g.y);
    cuda_quantised_free(p, &q);
    cuda_weight_free(p, &w);
    rt_free(x);
    rt_free(y);
    rt_free(got);
    rt_free(scales);
}

static void test_gemm8(void **state)
{
    /* rows that are and are not multiples of 4; 1, 2, 4, 11 blocks of columns; a last block of rows that is not whole (576, 200); N = 130 */
    static const int64_t sizes[][4] = {{4, 128, 128, 128}, {1, 512, 256, 256}, {130, 256, 576, 576}, {128, 512, 200, 208}, {67, 1408, 128, 256},
                                       {300, 512, 576, 576}, {64, 512, 130, 130}, {261, 384, 512, 520}};
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const bool can = rt_cuda_lt_block_scaled(p.gpu.dev);
    print_message("    block-scaled products by the library: %s\n", can ? "yes" : "no");
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int flags = 0; flags < 8; flags++)
            for (int way = DEQUANTISED; way <= (can ? OWN : DEQUANTISED); way++) {
                const struct shape8 s = {sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3], flags == 5 ? 8 : 0, flags & 1, flags >> 1 & 1,
                                         flags >> 2 & 1};
                gemm8_case(&p, &s, (enum way)way);
            }
    cuda_pair_close(&p);
}

/* The library takes the shapes of the published model, whole tiles or not. */
static void test_scaled_used(void **state)
{
    static const int64_t shapes[][3] = {{256, 7168, 576}, {256, 7168, 1536}, {256, 1536, 4096}, {256, 512, 4096}, {256, 2048, 7168}};
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    if (!rt_cuda_lt_block_scaled(p.gpu.dev)) {
        cuda_pair_close(&p);
        TEST_SKIP("no block-scaled products here");
    }
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int64_t n = shapes[i][0], K = shapes[i][1], N = shapes[i][2];
        bool done;
        char *block;
        assert_ok(p.gpu.be->alloc(p.gpu.dev, (size_t)(n * K + N * K + n * N * 2 + (n + N) * K), (void **)&block, &err));
        float *scales = (float *)(void *)(block + n * K + N * K + n * N * 2);
        const struct rt_lt_call c = {.a = block, .b = block + N * K, .d = block + N * K + n * K, .a_scale = scales, .b_scale = scales, .M = N, .N = n,
                                     .K = K, .lda = K, .ldb = K, .ldd = N, .batch = 1, .ta = true, .bucket_n = true};
        assert_ok(rt_cuda_lt_matmul((struct rt_queue *)p.gpu.q, &c, &done, &err));
        assert_ok(rt_device_sync(&p.gpu, &err));
        if (!done)
            fail_msg("the library refuses %lld x %lld x %lld", (long long)n, (long long)N, (long long)K);
        p.gpu.be->free(p.gpu.dev, block);
    }
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_gemm),    cmocka_unit_test(test_sm90), cmocka_unit_test(test_sm90_f16), cmocka_unit_test(test_heads), cmocka_unit_test(test_history),     cmocka_unit_test(test_far),
    cmocka_unit_test(test_dequant), cmocka_unit_test(test_gemm8), cmocka_unit_test(test_scaled_used),
};

#else

static void test_absent(void **state)
{
    (void)state;
    TEST_SKIP("built without CUDA");
}

static const struct CMUnitTest tests[] = {cmocka_unit_test(test_absent)};

#endif

RT_SUITE(cuda_gemm, tests)
