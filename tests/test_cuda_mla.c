/* Attention of the teacher on the GPU, each path against `ref`: keys in two parts, queries that are rotated first, and codes instead of the output. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "tests/cuda_ops.h"

#ifdef RT_CUDA
#include "core/cuda/attn.h"

static const int32_t mixed[] = {0, 1, 8, 8, 72, 137, 437, 437}; /* lengths 1, 7, 0, 64, 65, 300, 0 */

struct mla {
    struct cuda_pair *p;
    struct rt_attn_shape s;
    int64_t kv, pe_ld, n_o; /* a token's elements of kv; elements of o */
    void *q, *k, *pe, *o;   /* on the GPU */
    void *given;            /* queries as they are before a call */
    float *cos, *sin;
    int32_t *position;
    int dr;
};
enum { POSITIONS = 977 };

/* A call on the GPU, with queries that no call has touched. */
static void mla_call(const struct mla *m, enum rt_cuda_attn_path path, struct rt_attn_fwd_args f)
{
    struct rt_err err = {0};
    const size_t bytes = (size_t)(m->s.n * m->s.nh * m->s.dqk) * 2;
    cuda_copy_rows(m->p, m->q, bytes, m->given, bytes, bytes, 1);
    f.cos = m->cos, f.sin = m->sin, f.position = m->position;
    assert_ok(rt_cuda_attn_fwd_by(path, m->p->gpu.dev, m->p->gpu.q, &f, &err));
}

static struct rt_attn_fwd_args mla_args(const struct mla *m, const void *q, const void *k, const void *v, const void *pe, void *o)
{
    return (struct rt_attn_fwd_args){.s = m->s, .q = q, .k = k, .v = v, .k_ld = m->kv, .k_head = m->kv / m->s.nh, .v_ld = m->kv,
                                     .v_head = m->kv / m->s.nh, .k_pe = pe, .k_pe_ld = m->pe_ld, .dr = m->dr, .o = o};
}

/* The codes of a call are those of the output of the same call, bit for bit, and the rows added are zeros. */
static void mla_codes(const struct mla *m, enum rt_cuda_attn_path path, bool pow2)
{
    struct cuda_pair *p = m->p;
    struct rt_err err = {0};
    const int64_t n = m->s.n, rows = rt_act_rows(n), cols = m->n_o / n;
    const size_t codes = (size_t)(rows * cols), scales = (size_t)(rows * (cols / 128)) * sizeof(float);
    struct rt_act got = {cuda_bytes(p, NULL, codes), cuda_bytes(p, NULL, scales)}, want = {cuda_bytes(p, NULL, codes), cuda_bytes(p, NULL, scales)};
    char *a = malloc(codes + scales), *b = malloc(codes + scales);
    void *scratch = cuda_act(p, NULL, m->n_o);
    struct rt_attn_fwd_args f = mla_args(m, m->q, m->k, (char *)m->k + (m->s.dqk - m->dr) * 2, m->pe, scratch);
    assert_ok(rt_cuda_quant(p->gpu.dev, p->gpu.q, &(const struct rt_quant_args){.x = m->o, .q = want, .n = n, .cols = cols, .pow2 = pow2}, &err));
    cuda_set(p, got.data, 0x55, codes);
    cuda_set(p, got.scale, 0x55, scales);
    f.oq = got, f.pow2 = pow2;
    mla_call(m, path, f);
    cuda_get(p, a, got.data, codes), cuda_get(p, a + codes, got.scale, scales);
    cuda_get(p, b, want.data, codes), cuda_get(p, b + codes, want.scale, scales);
    assert_memory_equal(a, b, codes + scales);
    cuda_free(p, got.data), cuda_free(p, got.scale), cuda_free(p, want.data), cuda_free(p, want.scale), cuda_free(p, scratch);
    free(a), free(b);
}

static void mla_case(struct cuda_pair *p, enum rt_cuda_attn_path path, int nh, int dn, int dr, int dv, const int32_t *cu, int64_t n_seq)
{
    struct rt_err err = {0};
    char what[96];
    struct mla m = {.p = p, .kv = (int64_t)nh * (dn + dv), .pe_ld = dr + 16, .n_o = (int64_t)cu[n_seq] * nh * dv, .dr = dr};
    m.s = (struct rt_attn_shape){.cu_seqlens = cu, .n = cu[n_seq], .n_seq = n_seq, .nh = nh, .nkv = nh, .dqk = dn + dr, .dv = dv,
                                 .scale = (float)(1 / sqrt(dn + dr))};
    const int64_t n = m.s.n, sizes[3] = {n * nh * (dn + dr), n * m.kv, n * m.pe_ld};
    float *x[3], *want = cuda_floats(m.n_o), *got = cuda_floats(m.n_o), *again = cuda_floats(m.n_o);
    for (int i = 0; i < 3; i++) {
        x[i] = cuda_floats(sizes[i]);
        cuda_random(x[i], sizes[i], (uint64_t)i + 1, i == 0 ? 2.0f : 1.0f);
    }
    float *cos = cuda_floats(POSITIONS * dr / 2), *sin = cuda_floats(POSITIONS * dr / 2);
    int32_t *position = malloc((size_t)n * sizeof *position);
    for (int64_t i = 0; i < POSITIONS * dr / 2; i++)
        cos[i] = cosf((float)i), sin[i] = sinf((float)i);
    for (int64_t i = 0; i < n; i++)
        position[i] = (int32_t)(i * 631 % POSITIONS);
    struct rt_attn_fwd_args f = mla_args(&m, x[0], x[1], x[1] + dn, x[2] + 8, want);
    f.cos = cos, f.sin = sin, f.position = position;
    m.given = cuda_act(p, x[0], sizes[0]);
    assert_ok(p->ref.be->attn_fwd(p->ref.dev, p->ref.q, &f, &err));
    void *pe = cuda_act(p, x[2], sizes[2]);
    m.cos = cuda_bytes(p, cos, (size_t)(POSITIONS * dr / 2) * 4), m.sin = cuda_bytes(p, sin, (size_t)(POSITIONS * dr / 2) * 4);
    m.position = cuda_bytes(p, position, (size_t)n * sizeof *position);
    m.q = cuda_act(p, NULL, sizes[0]), m.k = cuda_act(p, x[1], sizes[1]), m.pe = (char *)pe + 16, m.o = cuda_act(p, NULL, m.n_o);
    f = mla_args(&m, m.q, m.k, (char *)m.k + dn * 2, m.pe, m.o);
    p->gpu.be->set_scratch(p->gpu.dev, 1); /* keys of one sequence at a time, where they are put together */
    mla_call(&m, path, f);
    cuda_get_act(p, again, m.o, m.n_o);
    p->gpu.be->set_scratch(p->gpu.dev, (uint64_t)2 << 30);
    mla_call(&m, path, f);
    cuda_get_act(p, got, m.o, m.n_o);
    snprintf(what, sizeof what, "path %d, %d x (%d + %d)/%d, %lld rows: o", (int)path, nh, dn, dr, dv, (long long)n);
    cuda_close(what, got, want, n, nh * dv, CUDA_BF16_ONCE, 4 * CUDA_BF16_ONCE);
    if (path != RT_CUDA_ATTN_AUTO) /* which may take another path for other sizes */
        assert_memory_equal(again, got, (size_t)m.n_o * sizeof *got);
    for (int pow2 = 0; pow2 < 2 && nh * dv % 128 == 0; pow2++)
        mla_codes(&m, path, pow2 != 0);
    cuda_free(p, m.q), cuda_free(p, m.k), cuda_free(p, pe), cuda_free(p, m.o), cuda_free(p, m.given);
    cuda_free(p, m.cos), cuda_free(p, m.sin), cuda_free(p, m.position);
    rt_free(cos), rt_free(sin), free(position);
    for (int i = 0; i < 3; i++)
        rt_free(x[i]);
    rt_free(want), rt_free(got), rt_free(again);
}

static void test_mla(void **state)
{
    static const int shapes[][4] = {{3, 128, 64, 128}, {5, 128, 32, 128}, {4, 32, 16, 32}, {2, 128, 64, 64}, {3, 10, 6, 14}, {2, 5, 2, 8}};
    static const int32_t longer[] = {0, 400, 401, 660};
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const int *d = shapes[i];
        mla_case(&p, RT_CUDA_ATTN_OWN, d[0], d[1], d[2], d[3], mixed, 7);
        mla_case(&p, RT_CUDA_ATTN_AUTO, d[0], d[1], d[2], d[3], mixed, 7);
        if (p.gpu.dev->encode_map != NULL && d[1] % 8 == 0) {
            mla_case(&p, RT_CUDA_ATTN_HOPPER, d[0], d[1], d[2], d[3], mixed, 7);
            mla_case(&p, RT_CUDA_ATTN_HOPPER, d[0], d[1], d[2], d[3], longer, 3);
        }
    }
    void *x = cuda_act(&p, NULL, 512);
    const int32_t one[] = {0, 1};
    struct rt_attn_fwd_args f = {.s = {.cu_seqlens = one, .n = 1, .n_seq = 1, .nh = 1, .nkv = 1, .dqk = 192, .dv = 64, .scale = 1},
                                 .q = x, .k = x, .v = x, .o = x, .k_pe = x, .dr = 192};
    assert_status(p.gpu.be->attn_fwd(p.gpu.dev, p.gpu.q, &f, &err), SHAPE);
    f.dr = 64, f.oq = (struct rt_act){x, x};
    assert_status(p.gpu.be->attn_fwd(p.gpu.dev, p.gpu.q, &f, &err), SHAPE);
    cuda_free(&p, x);
    cuda_pair_close(&p);
}

#else

static void test_mla(void **state)
{
    (void)state;
    TEST_SKIP("no cuda backend");
}

#endif

static const struct CMUnitTest tests[] = {cmocka_unit_test(test_mla)};
RT_SUITE(cuda_mla, tests)
