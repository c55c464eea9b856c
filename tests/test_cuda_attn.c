/* Attention on the GPU, each path against `ref` from the same rounded inputs: own kernels of every size, cuDNN where it is there. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/mem.h"
#include "tests/cuda_ops.h"

#ifdef RT_CUDA
#include "core/cuda/attn.h"

/* Packed sequences in the layout that a caller has: q, k and v inside rows of one or two arrays. */
struct layout {
    int nh, nkv, dqk, dv;
    int64_t q_ld, q_head, k_ld, k_head, v_ld, v_head; /* of arrays that start with the first element of each */
};
/* The student's: [q | k | v] in one row. */
static struct layout student(int nh, int nkv, int d)
{
    const int64_t ld = (int64_t)(nh + 2 * nkv) * d;
    return (struct layout){nh, nkv, d, d, ld, d, ld, d, ld, d};
}
/* The teacher's: q dense, k dense, v in rows [k part dn | v] of each head. */
static struct layout teacher(int nh, int dn, int dr, int dv)
{
    return (struct layout){nh, nh, dn + dr, dv, nh * (dn + dr), dn + dr, nh * (dn + dr), dn + dr, nh * (dn + dv), dn + dv};
}

struct arrays {
    int64_t n, q_n, k_n, v_n, o_n; /* elements */
    float *q, *k, *v, *o, *lse, *dout, *dq, *dk, *dv, *delta;
};

static struct arrays arrays_make(const struct layout *l, int64_t n, float scale)
{
    struct arrays a = {.n = n, .q_n = n * l->q_ld, .k_n = n * l->k_ld, .v_n = n * l->v_ld, .o_n = n * l->nh * l->dv};
    a.q = cuda_floats(a.q_n), a.k = cuda_floats(a.k_n), a.v = cuda_floats(a.v_n), a.o = cuda_floats(a.o_n), a.lse = cuda_floats(n * l->nh);
    a.dout = cuda_floats(a.o_n), a.dq = cuda_floats(a.q_n), a.dk = cuda_floats(a.k_n), a.dv = cuda_floats(a.v_n), a.delta = cuda_floats(n * l->nh);
    cuda_random(a.q, a.q_n, 1, scale);
    cuda_random(a.k, a.k_n, 2, 1.0f);
    cuda_random(a.v, a.v_n, 3, 1.0f);
    cuda_random(a.dout, a.o_n, 4, 1.0f);
    return a;
}

static void arrays_free(struct arrays *a)
{
    float *const all[] = {a->q, a->k, a->v, a->o, a->lse, a->dout, a->dq, a->dk, a->dv, a->delta};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        rt_free(all[i]);
}

/* Elements of a strided array that belong to it, dense. */
static float *packed(const float *x, int64_t n, int heads, int d, int64_t ld, int64_t head)
{
    float *y = cuda_floats(n * heads * d);
    for (int64_t t = 0; t < n; t++)
        for (int h = 0; h < heads; h++)
            memcpy(y + (t * heads + h) * d, x + t * ld + h * head, (size_t)d * sizeof *y);
    return y;
}

static void close_heads(const char *what, const float *got, const float *want, int64_t n, int heads, int d, int64_t ld, int64_t head, double bound)
{
    float *a = packed(got, n, heads, d, ld, head), *b = packed(want, n, heads, d, ld, head);
    cuda_close(what, a, b, n, heads * d, bound, 0);
    rt_free(a);
    rt_free(b);
}

/* Elements between the heads of an output must keep what they held: 0 here, while the outputs' own are written over. */
static void untouched(const char *what, const float *x, int64_t n, int heads, int d, int64_t ld, int64_t head)
{
    for (int64_t t = 0; t < n; t++)
        for (int64_t c = 0; c < ld; c++)
            if ((c / head >= heads || c % head >= d) && x[t * ld + c] != 0)
                fail_msg("%s: row %lld, column %lld was written", what, (long long)t, (long long)c);
}

/* The weights are rounded to bfloat16 before they meet v, and so is the sum: 2^-9/sqrt(3) twice in the mean square, 1.6e-3. A gradient has one
 * more such factor (dS, from P and dP). */
static const double fwd_bound = CUDA_BF16_ONCE, bwd_bound = 4e-3;

/* One call on both sides. */
struct pass {
    struct cuda_pair *p;
    enum rt_cuda_attn_path path;
    const struct layout *l;
    struct rt_attn_shape s;
    struct arrays a;
    void *q, *k, *v; /* on the GPU */
};

static void check_lse(const float *got, const float *want, int64_t n)
{
    for (int64_t i = 0; i < n; i++) /* float32 sums of up to 2^12 terms; exp2 in hardware: 2 ulp */
        if (!(fabsf(got[i] - want[i]) <= 1e-4f * (1 + fabsf(want[i]))))
            fail_msg("lse %lld: %g, expected %g", (long long)i, (double)got[i], (double)want[i]);
}

static void forward(struct pass *x)
{
    struct rt_err err = {0};
    char what[96];
    const struct layout *l = x->l;
    struct arrays *a = &x->a;
    const int64_t stats = a->n * l->nh;
    struct rt_attn_fwd_args f = {.s = x->s, .q = a->q, .k = a->k, .v = a->v, .q_ld = l->q_ld, .q_head = l->q_head, .k_ld = l->k_ld,
                                 .k_head = l->k_head, .v_ld = l->v_ld, .v_head = l->v_head, .o = a->o, .lse = a->lse};
    assert_ok(x->p->ref.be->attn_fwd(x->p->ref.dev, x->p->ref.q, &f, &err));
    f.q = x->q, f.k = x->k, f.v = x->v, f.o = cuda_act(x->p, NULL, a->o_n), f.lse = cuda_bytes(x->p, NULL, (size_t)stats * 4);
    assert_ok(rt_cuda_attn_fwd_by(x->path, x->p->gpu.dev, x->p->gpu.q, &f, &err));
    float *o = cuda_floats(a->o_n), *lse = cuda_floats(stats);
    cuda_get_act(x->p, o, f.o, a->o_n);
    cuda_get(x->p, lse, f.lse, (size_t)stats * 4);
    snprintf(what, sizeof what, "%d/%d x %d/%d, %lld rows: o", l->nh, l->nkv, l->dqk, l->dv, (long long)a->n);
    cuda_close(what, o, a->o, a->n, l->nh * l->dv, fwd_bound, 4 * fwd_bound);
    check_lse(lse, a->lse, stats);
    cuda_free(x->p, f.o);
    cuda_free(x->p, f.lse);
    rt_free(o);
    rt_free(lse);
}

/* After forward: both sides are given ref's output (as the GPU stores it) and log-sum-exps. */
static void backward(struct pass *x)
{
    struct rt_err err = {0};
    const struct layout *l = x->l;
    struct arrays *a = &x->a;
    const int64_t sizes[3] = {a->q_n, a->k_n, a->v_n}, stats = a->n * l->nh;
    float *host[3];
    void *dev[3];
    struct rt_attn_bwd_args b = {.s = x->s, .q = a->q, .k = a->k, .v = a->v, .q_ld = l->q_ld, .q_head = l->q_head, .k_ld = l->k_ld,
                                 .k_head = l->k_head, .v_ld = l->v_ld, .v_head = l->v_head, .o = a->o, .lse = a->lse, .dout = a->dout, .dq = a->dq,
                                 .dk = a->dk, .dv = a->dv, .delta = a->delta};
    cuda_round(a->o, a->o_n);
    assert_ok(x->p->ref.be->attn_bwd(x->p->ref.dev, x->p->ref.q, &b, &err));
    for (int i = 0; i < 3; i++) {
        host[i] = cuda_floats(sizes[i]);
        dev[i] = cuda_act(x->p, host[i], sizes[i]);
    }
    void *o = cuda_act(x->p, a->o, a->o_n), *dout = cuda_act(x->p, a->dout, a->o_n), *lse = cuda_bytes(x->p, a->lse, (size_t)stats * 4);
    b.q = x->q, b.k = x->k, b.v = x->v, b.o = o, b.dout = dout, b.lse = lse, b.dq = dev[0], b.dk = dev[1], b.dv = dev[2];
    b.delta = cuda_bytes(x->p, NULL, (size_t)stats * 4);
    assert_ok(rt_cuda_attn_bwd_by(x->path, x->p->gpu.dev, x->p->gpu.q, &b, &err));
    for (int i = 0; i < 3; i++)
        cuda_get_act(x->p, host[i], dev[i], sizes[i]);
    untouched("dq", host[0], a->n, l->nh, l->dqk, l->q_ld, l->q_head);
    untouched("dk", host[1], a->n, l->nkv, l->dqk, l->k_ld, l->k_head);
    untouched("dv", host[2], a->n, l->nkv, l->dv, l->v_ld, l->v_head);
    close_heads("  dq", host[0], a->dq, a->n, l->nh, l->dqk, l->q_ld, l->q_head, bwd_bound);
    close_heads("  dk", host[1], a->dk, a->n, l->nkv, l->dqk, l->k_ld, l->k_head, bwd_bound);
    close_heads("  dv", host[2], a->dv, a->n, l->nkv, l->dv, l->v_ld, l->v_head, bwd_bound);
    /* the same call again: the same bytes */
    assert_ok(rt_cuda_attn_bwd_by(x->path, x->p->gpu.dev, x->p->gpu.q, &b, &err));
    for (int i = 0; i < 3; i++) {
        float *again = cuda_floats(sizes[i]);
        cuda_get_act(x->p, again, dev[i], sizes[i]);
        assert_memory_equal(again, host[i], (size_t)sizes[i] * sizeof *again);
        rt_free(again);
    }
    for (int i = 0; i < 3; i++) {
        cuda_free(x->p, dev[i]);
        rt_free(host[i]);
    }
    cuda_free(x->p, o), cuda_free(x->p, dout), cuda_free(x->p, lse), cuda_free(x->p, b.delta);
}

static void run_paths(struct cuda_pair *p, enum rt_cuda_attn_path path, const struct layout *l, const int32_t *cu, int64_t n_seq, bool with_backward,
                      enum rt_cuda_attn_path path_back)
{
    struct pass x = {.p = p, .path = path, .l = l, .a = arrays_make(l, cu[n_seq], 2.0f)};
    x.s = (struct rt_attn_shape){.cu_seqlens = cu, .n = cu[n_seq], .n_seq = n_seq, .nh = l->nh, .nkv = l->nkv, .dqk = l->dqk, .dv = l->dv,
                                 .scale = (float)(1 / sqrt(l->dqk))};
    x.q = cuda_act(p, x.a.q, x.a.q_n), x.k = cuda_act(p, x.a.k, x.a.k_n), x.v = cuda_act(p, x.a.v, x.a.v_n);
    forward(&x);
    x.path = path_back;
    if (with_backward)
        backward(&x);
    cuda_free(p, x.q), cuda_free(p, x.k), cuda_free(p, x.v);
    arrays_free(&x.a);
}

static void run_case(struct cuda_pair *p, enum rt_cuda_attn_path path, const struct layout *l, const int32_t *cu, int64_t n_seq, bool with_backward)
{
    run_paths(p, path, l, cu, n_seq, with_backward, path);
}

static const int32_t mixed[] = {0, 1, 8, 8, 72, 137, 437, 437}; /* lengths 1, 7, 0, 64, 65, 300, 0 */
enum { MIXED = 7 };

static void test_own_sizes(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct layout l[] = {student(4, 2, 64), student(3, 1, 96), student(4, 2, 128), teacher(3, 128, 64, 128), student(2, 1, 256)};
    for (size_t i = 0; i < sizeof l / sizeof *l; i++)
        run_case(&p, RT_CUDA_ATTN_OWN, &l[i], mixed, MIXED, true);
    cuda_pair_close(&p);
}

static void test_own_small_heads(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct layout l[] = {student(4, 2, 8),  student(4, 1, 16), student(6, 3, 24), student(2, 2, 32), student(4, 2, 48), student(2, 1, 80),
                               student(2, 1, 112), teacher(4, 32, 16, 32), teacher(2, 64, 32, 160), student(3, 1, 12), student(2, 1, 5)};
    for (size_t i = 0; i < sizeof l / sizeof *l; i++)
        run_case(&p, RT_CUDA_ATTN_OWN, &l[i], mixed, MIXED, true);
    cuda_pair_close(&p);
}

/* The tiles for GPUs with less shared memory; and what they have not got is refused. */
static void test_own_small_blocks(void **state)
{
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct layout l[] = {student(4, 2, 64), student(3, 1, 96), student(4, 2, 128), teacher(3, 128, 64, 128), student(2, 1, 256)};
    for (size_t i = 0; i < sizeof l / sizeof *l; i++)
        run_case(&p, RT_CUDA_ATTN_SMALL, &l[i], mixed, MIXED, l[i].dqk <= 128);
    void *x = cuda_act(&p, NULL, 256);
    const struct rt_attn_bwd_args b = {.s = {.cu_seqlens = (const int32_t[]){0, 1}, .n = 1, .n_seq = 1, .nh = 1, .nkv = 1, .dqk = 256, .dv = 256, .scale = 1},
                                       .q = x, .k = x, .v = x, .o = x, .dout = x, .lse = x, .dq = x, .dk = x, .dv = x, .delta = x};
    assert_status(rt_cuda_attn_bwd_by(RT_CUDA_ATTN_SMALL, p.gpu.dev, p.gpu.q, &b, &err), UNSUPPORTED);
    cuda_free(&p, x);
    cuda_pair_close(&p);
}

/* Sequences longer than several tiles, and more of them than travel with a launch. */
static void test_own_many(void **state)
{
    enum { N = 700 };
    struct cuda_pair p;
    int32_t cu[N + 1];
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct layout a = student(2, 1, 64), b = student(2, 1, 128), c = teacher(2, 128, 64, 128);
    const int32_t longer[] = {0, 1000, 1001, 1514};
    run_case(&p, RT_CUDA_ATTN_OWN, &a, longer, 3, true);
    run_case(&p, RT_CUDA_ATTN_OWN, &b, longer, 3, true);
    run_case(&p, RT_CUDA_ATTN_OWN, &c, longer, 3, true);
    cu[0] = 0;
    for (int i = 0; i < N; i++)
        cu[i + 1] = cu[i] + i * 7 % 11;
    run_case(&p, RT_CUDA_ATTN_OWN, &a, cu, N, true);
    cuda_pair_close(&p);
}

/* Rows and heads that 16-byte accesses do not reach: an odd offset, an odd distance. */
static void test_own_unaligned(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    struct layout l = student(4, 2, 64);
    l.q_ld += 1;
    l.k_head += 3, l.k_ld += 6;
    l.v_ld += 2;
    run_case(&p, RT_CUDA_ATTN_OWN, &l, mixed, MIXED, true);
    cuda_pair_close(&p);
}

/* All shapes of the kernels for compute capability 9.0: forward, or backward after a forward of the base kernels. */
static void hopper(bool back)
{
    enum { N = 300 };
    struct cuda_pair p;
    int32_t cu[N + 1];
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    if (p.gpu.dev->encode_map == NULL) {
        cuda_pair_close(&p);
        TEST_SKIP("not compute capability 9.0");
    }
    const struct layout l[] = {student(4, 2, 64), student(4, 2, 128), student(2, 2, 64), student(3, 1, 96), student(4, 1, 16), teacher(4, 32, 16, 32),
                               teacher(2, 64, 32, 128), student(7, 1, 64), student(6, 1, 128), student(2, 2, 128), teacher(3, 128, 64, 128)};
    const int32_t longer[] = {0, 400, 401, 660}, even[] = {0, 256, 512, 768};
    const enum rt_cuda_attn_path path = back ? RT_CUDA_ATTN_OWN : RT_CUDA_ATTN_HOPPER;
    for (size_t i = 0; i < sizeof l / sizeof *l; i++) {
        if (back && l[i].dqk > 128)
            continue;
        run_paths(&p, path, &l[i], mixed, MIXED, back, RT_CUDA_ATTN_HOPPER);
        run_paths(&p, path, &l[i], even, 3, back, RT_CUDA_ATTN_HOPPER);
        run_paths(&p, path, &l[i], longer, 3, back, RT_CUDA_ATTN_HOPPER);
    }
    cu[0] = 0;
    for (int i = 0; i < N; i++)
        cu[i + 1] = cu[i] + i * 7 % 11;
    run_paths(&p, path, &l[0], cu, N, back, RT_CUDA_ATTN_HOPPER);
    cuda_pair_close(&p);
}
static void test_hopper(void **state)
{
    (void)state;
    hopper(false);
}
static void test_hopper_bwd(void **state)
{
    (void)state;
    hopper(true);
}

/* A backward with work for more blocks than run at a time, in sequences of many lengths: against the base kernels, by bytes when it is repeated, and
 * by bytes where the scratch makes it go head by head. */
static void hopper_many(struct cuda_pair *p, const struct layout *l, const int32_t *cu, int seqs)
{
    enum { REPEAT = 4 };
    struct rt_err err = {0};
    const int64_t n = cu[seqs], row = l->q_ld, o_n = n * l->nh * l->dv, qkv = n * row;
    const size_t k_at = (size_t)(l->nh * l->dqk), v_at = k_at + (size_t)(l->nkv * l->dqk);
    float *x = cuda_floats(qkv), *want = cuda_floats(qkv), *got = cuda_floats(qkv);
    cuda_random(x, qkv, 5, 1.5f);
    uint16_t *q = cuda_act(p, x, qkv), *dq = cuda_act(p, NULL, qkv);
    cuda_random(x, o_n, 6, 1.0f);
    void *o = cuda_act(p, NULL, o_n), *dout = cuda_act(p, x, o_n), *lse = cuda_bytes(p, NULL, (size_t)(n * l->nh) * 4),
         *delta = cuda_bytes(p, NULL, (size_t)(n * l->nh) * 4);
    const struct rt_attn_shape s = {.cu_seqlens = cu, .n = n, .n_seq = seqs, .nh = l->nh, .nkv = l->nkv, .dqk = l->dqk, .dv = l->dv,
                                    .scale = (float)(1 / sqrt(l->dqk))};
    const struct rt_attn_fwd_args f = {.s = s, .q = q, .k = q + k_at, .v = q + v_at, .q_ld = row, .k_ld = row, .v_ld = row, .o = o, .lse = lse};
    const struct rt_attn_bwd_args b = {.s = s, .q = q, .k = q + k_at, .v = q + v_at, .q_ld = row, .k_ld = row, .v_ld = row, .o = o, .lse = lse,
                                       .dout = dout, .dq = dq, .dk = dq + k_at, .dv = dq + v_at, .delta = delta};
    assert_ok(rt_cuda_attn_fwd_by(RT_CUDA_ATTN_OWN, p->gpu.dev, p->gpu.q, &f, &err));
    assert_ok(rt_cuda_attn_bwd_by(RT_CUDA_ATTN_OWN, p->gpu.dev, p->gpu.q, &b, &err));
    cuda_get_act(p, want, dq, qkv);
    for (int i = 0; i < REPEAT; i++) {
        if (i == REPEAT - 1)
            p->gpu.be->set_scratch(p->gpu.dev, 1);
        cuda_set(p, dq, 0xff, (size_t)qkv * 2);
        assert_ok(rt_cuda_attn_bwd_by(RT_CUDA_ATTN_HOPPER, p->gpu.dev, p->gpu.q, &b, &err));
        cuda_get_act(p, i == 0 ? x : got, dq, qkv);
        if (i == 0) /* both sides round twice */
            cuda_close("  many sequences", x, want, n, row, 1.5 * bwd_bound, 0);
        else
            assert_memory_equal(got, x, (size_t)qkv * sizeof *x);
    }
    p->gpu.be->set_scratch(p->gpu.dev, (uint64_t)2 << 30);
    cuda_free(p, q), cuda_free(p, dq), cuda_free(p, o), cuda_free(p, dout), cuda_free(p, lse), cuda_free(p, delta);
    rt_free(x), rt_free(want), rt_free(got);
}

static void test_hopper_many(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    if (p.gpu.dev->encode_map == NULL) {
        cuda_pair_close(&p);
        TEST_SKIP("not compute capability 9.0");
    }
    const struct layout l[] = {student(14, 2, 64), student(12, 2, 128), student(4, 4, 128)};
    const int32_t many[] = {0, 1, 1200, 1328, 1455, 1584, 2100, 2100, 3000, 3100};
    const int32_t one[] = {0, 5003}; /* 40 key blocks in a row, more of each head at a time than with many */
    for (size_t i = 0; i < sizeof l / sizeof *l; i++) {
        hopper_many(&p, &l[i], many, 9);
        hopper_many(&p, &l[i], one, 1);
    }
    cuda_pair_close(&p);
}

static bool has_cudnn(const struct cuda_pair *p)
{
    return p->gpu.dev->dnn != NULL;
}

static void test_cudnn_uniform(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    if (!has_cudnn(&p)) {
        cuda_pair_close(&p);
        TEST_SKIP("no cuDNN");
    }
    const struct layout l[] = {student(4, 2, 64), student(4, 2, 128), teacher(3, 128, 64, 128), student(2, 2, 64)};
    const int32_t one[] = {0, 300}, four[] = {0, 256, 512, 768, 1024}, odd[] = {0, 197, 394};
    for (size_t i = 0; i < sizeof l / sizeof *l; i++) {
        run_case(&p, RT_CUDA_ATTN_CUDNN, &l[i], one, 1, false);
        run_case(&p, RT_CUDA_ATTN_CUDNN, &l[i], four, 4, l[i].dqk == l[i].dv);
        run_case(&p, RT_CUDA_ATTN_CUDNN, &l[i], odd, 2, false);
    }
    /* a backward in parts: what it may keep is dS of one sequence and one key head */
    p.gpu.be->set_scratch(p.gpu.dev, 2 * 2 * 256 * 256);
    run_case(&p, RT_CUDA_ATTN_CUDNN, &l[0], four, 4, true);
    cuda_pair_close(&p);
}

static void test_cudnn_ragged(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    if (!has_cudnn(&p)) {
        cuda_pair_close(&p);
        TEST_SKIP("no cuDNN");
    }
    const struct layout l[] = {student(4, 2, 64), student(4, 2, 128), teacher(3, 128, 64, 128)};
    const int32_t longer[] = {0, 1000, 1001, 1514};
    for (size_t i = 0; i < sizeof l / sizeof *l; i++) {
        run_case(&p, RT_CUDA_ATTN_CUDNN, &l[i], mixed, MIXED, l[i].dqk == l[i].dv);
        run_case(&p, RT_CUDA_ATTN_CUDNN, &l[i], longer, 3, false);
        run_case(&p, RT_CUDA_ATTN_CUDNN, &l[i], mixed, MIXED, false); /* a kept plan */
    }
    cuda_pair_close(&p);
}

/* Rows of queries more than 2^31 elements from the first: the same bytes as from a dense array, forward and backward. */
static void test_far(void **state)
{
    enum { ROWS = 57344, LEN = 64, D = 64, LD = 40960 };
    const size_t dense = (size_t)ROWS * D, far = (size_t)ROWS * LD;
    struct cuda_pair p;
    struct rt_err err = {0};
    void *q_far = NULL, *dq_far = NULL;
    int32_t cu[ROWS / LEN + 1];
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct rt_backend *be = p.gpu.be;
    if (be->alloc(p.gpu.dev, far * 2, &q_far, &err) != RT_OK || be->alloc(p.gpu.dev, far * 2, &dq_far, &err) != RT_OK) {
        be->free(p.gpu.dev, q_far);
        cuda_pair_close(&p);
        TEST_SKIP("less than 10 GB of GPU memory");
    }
    float *x = cuda_floats(ROWS * D), *got = cuda_floats(ROWS * D);
    void *dev[8]; /* q, k, v, dout; o, dq, dk, dv */
    for (int i = 0; i < 8; i++) {
        cuda_random(x, ROWS * D, (uint64_t)i, 1.0f);
        dev[i] = cuda_act(&p, i < 4 ? x : NULL, ROWS * D);
    }
    float *lse = cuda_bytes(&p, NULL, ROWS * sizeof *lse), *delta = cuda_bytes(&p, NULL, ROWS * sizeof *delta);
    for (int i = 0; i <= ROWS / LEN; i++)
        cu[i] = i * LEN;
    cuda_copy_rows(&p, q_far, LD * 2, dev[0], D * 2, D * 2, ROWS);
    const struct rt_attn_shape s = {.cu_seqlens = cu, .n = ROWS, .n_seq = ROWS / LEN, .nh = 1, .nkv = 1, .dqk = D, .dv = D, .scale = 0.125f};
    const enum rt_cuda_attn_path paths[2] = {RT_CUDA_ATTN_OWN, RT_CUDA_ATTN_HOPPER};
    for (int i = 0; i < (p.gpu.dev->encode_map != NULL ? 2 : 1); i++) {
        struct rt_attn_fwd_args f = {.s = s, .q = dev[0], .k = dev[1], .v = dev[2], .o = dev[4], .lse = lse};
        struct rt_attn_bwd_args b = {.s = s, .q = dev[0], .k = dev[1], .v = dev[2], .o = dev[4], .lse = lse, .dout = dev[3], .dq = dev[5], .dk = dev[6],
                                     .dv = dev[7], .delta = delta};
        assert_ok(rt_cuda_attn_fwd_by(paths[i], p.gpu.dev, p.gpu.q, &f, &err));
        cuda_get_act(&p, x, dev[4], ROWS * D);
        f.q = q_far, f.q_ld = LD;
        assert_ok(rt_cuda_attn_fwd_by(paths[i], p.gpu.dev, p.gpu.q, &f, &err));
        cuda_get_act(&p, got, dev[4], ROWS * D);
        assert_memory_equal(got, x, dense * sizeof *x);
        assert_ok(rt_cuda_attn_bwd_by(paths[i], p.gpu.dev, p.gpu.q, &b, &err));
        cuda_get_act(&p, x, dev[5], ROWS * D);
        b.q = q_far, b.q_ld = LD, b.dq = dq_far;
        assert_ok(rt_cuda_attn_bwd_by(paths[i], p.gpu.dev, p.gpu.q, &b, &err));
        cuda_copy_rows(&p, dev[5], D * 2, dq_far, LD * 2, D * 2, ROWS);
        cuda_get_act(&p, got, dev[5], ROWS * D);
        assert_memory_equal(got, x, dense * sizeof *x);
    }
    for (int i = 0; i < 8; i++)
        cuda_free(&p, dev[i]);
    cuda_free(&p, lse), cuda_free(&p, delta);
    be->free(p.gpu.dev, q_far), be->free(p.gpu.dev, dq_far);
    rt_free(x), rt_free(got);
    cuda_pair_close(&p);
}

/* What the table takes by itself, dense strides given as 0, no rows, and what it refuses. */
static void test_table(void **state)
{
    struct cuda_pair p;
    struct rt_err err = {0};
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    const struct layout big = {4, 2, 128, 128, 4 * 128, 128, 2 * 128, 128, 2 * 128, 128};
    const int32_t cu[] = {0, 1024, 2048};
    run_case(&p, RT_CUDA_ATTN_AUTO, &big, cu, 2, true);
    const int32_t none[] = {0, 0}, wrong[] = {0, 5, 3};
    void *x = cuda_act(&p, NULL, 64);
    const struct rt_attn_shape s = {.cu_seqlens = none, .n = 0, .n_seq = 1, .nh = 1, .nkv = 1, .dqk = 8, .dv = 8, .scale = 1};
    struct rt_attn_fwd_args a = {.s = s, .q = x, .k = x, .v = x, .o = x};
    assert_ok(p.gpu.be->attn_fwd(p.gpu.dev, p.gpu.q, &a, &err));
    a.s.cu_seqlens = wrong, a.s.n_seq = 2, a.s.n = 3;
    assert_status(p.gpu.be->attn_fwd(p.gpu.dev, p.gpu.q, &a, &err), SHAPE);
    a.s.cu_seqlens = none, a.s.n_seq = 1, a.s.n = 1;
    assert_status(p.gpu.be->attn_fwd(p.gpu.dev, p.gpu.q, &a, &err), SHAPE);
    a.s.n = 0, a.s.nh = 3, a.s.nkv = 2;
    assert_status(p.gpu.be->attn_fwd(p.gpu.dev, p.gpu.q, &a, &err), SHAPE);
    const int32_t one[] = {0, 1};
    a.s = (struct rt_attn_shape){.cu_seqlens = one, .n = 1, .n_seq = 1, .nh = 1, .nkv = 1, .dqk = 300, .dv = 8, .scale = 1};
    assert_status(p.gpu.be->attn_fwd(p.gpu.dev, p.gpu.q, &a, &err), UNSUPPORTED);
    cuda_free(&p, x);
    cuda_pair_close(&p);
}

#else

static void test_skip(void **state)
{
    (void)state;
    TEST_SKIP("no cuda backend");
}
#define test_own_sizes test_skip
#define test_own_small_heads test_skip
#define test_own_many test_skip
#define test_far test_skip
#define test_own_small_blocks test_skip
#define test_own_unaligned test_skip
#define test_hopper test_skip
#define test_hopper_many test_skip
#define test_hopper_bwd test_skip
#define test_cudnn_uniform test_skip
#define test_cudnn_ragged test_skip
#define test_table test_skip

#endif

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_own_sizes),        cmocka_unit_test(test_own_small_heads), cmocka_unit_test(test_own_many),
    cmocka_unit_test(test_own_unaligned),    cmocka_unit_test(test_cudnn_uniform),   cmocka_unit_test(test_cudnn_ragged),
    cmocka_unit_test(test_own_small_blocks), cmocka_unit_test(test_table),           cmocka_unit_test(test_hopper),
    cmocka_unit_test(test_far),              cmocka_unit_test(test_hopper_many),
    cmocka_unit_test(test_hopper_bwd),
};
RT_SUITE(cuda_attn, tests)
