/* The cuda backend: losses of the head, likelihoods, feature losses. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/rng.h"
#include "tests/cuda_ops.h"
#include "tests/pack_ids.h"
#ifdef RT_CUDA
#include "core/cuda/loss.h"
#endif

static void *memory(size_t n, size_t size)
{
    void *x = malloc(n * size + 1);
    assert_non_null(x);
    return x;
}

/* A device array of doubles or bytes as long as the rows. */
#define DEV(p, type, n) ((type *)cuda_bytes((p), NULL, (size_t)(n) * sizeof(type)))

static void close_rows(const char *what, const double *got, const double *want, int64_t n, double bound)
{
    double worst = 0;
    for (int64_t i = 0; i < n; i++) {
        const double e = fabs(got[i] - want[i]) / (1 + fabs(want[i]));
        worst = e > worst || isnan(e) ? e : worst;
    }
    print_message("    %-44s %.3e\n", what, worst);
    if (!(worst <= bound))
        fail_msg("%s: %g away, bound %g", what, worst, bound);
}

/* ---- head_loss ---- */
struct loss_case {
    int64_t n, H, V;
    int k;
    double T;
    enum rt_tail tail;
    float spread;     /* standard deviation of the logits */
    int64_t scratch;  /* bytes; 0: as the device has it */
    enum rt_dtype logits; /* from 1024 rows on the operation chooses: F16, and F32 for a forward alone */
    bool only_ce;
};

struct loss_data {
    float *x, *logp;
    int32_t *label, *ids;
    uint8_t *mask;
    struct cuda_weight w;
};

/* Ids of a row: distinct, some empty, one with no probability; their mass depends on the row (from little to nearly all of it). */
static void fill_row(const struct loss_case *c, struct loss_data *d, int64_t i)
{
    int32_t *ids = d->ids + i * c->k;
    float *logp = d->logp + i * c->k;
    const double mass = i % 3 == 0 ? 0.2 : i % 3 == 1 ? 0.9 : 1 - 1e-9;
    double sum = 0;
    for (int j = 0; j < c->k; j++) {
        logp[j] = (float)exp(2 * rt_rng_normal(5, 3, (uint64_t)(i * c->k + j)));
        sum += logp[j];
    }
    for (int j = 0; j < c->k; j++) {
        ids[j] = (int32_t)((rt_rng_u64(5, 2, (uint64_t)i) % (uint64_t)c->V + (uint64_t)j * 7919 % (uint64_t)c->V) % (uint64_t)c->V);
        logp[j] = (float)log(mass * logp[j] / sum);
    }
    for (int j = 0; j < c->k; j++) /* 7919 j may meet itself modulo V */
        for (int m = 0; m < j; m++)
            if (ids[m] == ids[j])
                ids[j] = -1;
    if (i % 5 == 0 && c->k > 2) {
        ids[c->k - 1] = -1;
        logp[c->k - 2] = -INFINITY;
    }
    d->mask[i] = i % 7 != 3 && !c->only_ce;
    d->label[i] = i % 6 == 4 ? -100 : i % 4 == 1 && c->k > 0 && ids[0] >= 0 ? ids[0] : (int32_t)(rt_rng_u64(5, 4, (uint64_t)i) % (uint64_t)c->V);
}

static struct loss_data make_data(struct cuda_pair *p, const struct loss_case *c)
{
    struct loss_data d = {.x = memory((size_t)(c->n * c->H), sizeof(float)), .logp = memory((size_t)(c->n * c->k), sizeof(float)),
                          .label = memory((size_t)c->n, sizeof(int32_t)), .ids = memory((size_t)(c->n * c->k), sizeof(int32_t)),
                          .mask = memory((size_t)c->n, 1)};
    cuda_random(d.x, c->n * c->H, 1, 1.0f);
    d.w = cuda_weight_bf16(p, c->V, c->H, 2, c->spread / sqrtf((float)c->H));
    for (int64_t i = 0; i < c->n; i++)
        fill_row(c, &d, i);
    return d;
}

struct rows_out {
    double *ce, *kl, *tm, *sm;
    uint8_t *hit;
    void *dx, *dw;
};

static enum rt_status run_loss(struct rt_device *dev, const struct loss_case *c, const struct rt_head_loss_args *a, struct rt_err *err)
{
#ifdef RT_CUDA
    if (c->logits != RT_F32 && c->n < 1024 && dev->be == &rt_backend_cuda)
        return rt_cuda_head_loss_as(dev->dev, dev->q, a, c->logits, err);
#endif
    (void)c;
    return dev->be->head_loss(dev->dev, dev->q, a, err);
}

/* float32 logits: a sum over H in another order, 2^x to 2^-22. Others: half a unit of the last bit, 2^-9 (F16: 2^-12) of |z| up to 5 spreads. */
static double logit_error(const struct loss_case *c)
{
    return c->logits == RT_F32 ? 0 : (c->logits == RT_BF16 ? 0x1p-9 : 0x1p-12) * c->spread;
}

static void compare_loss(struct cuda_pair *p, const struct loss_case *c, const struct rows_out *want, const struct rows_out *gpu, float *got, float *got_dw)
{
    const size_t n = (size_t)c->n;
    double *row = memory(n, sizeof *row);
    uint8_t *hit = memory(n, 1);
    const double bound = 5 * logit_error(c) + 2e-5, grad = 3 * logit_error(c) + 2 * CUDA_BF16_ONCE;
    const struct { const char *name; const double *dev, *want; } each[] = {
        {"  ce", gpu->ce, want->ce}, {"  kl", gpu->kl, want->kl}, {"  teacher mass", gpu->tm, want->tm}, {"  student mass", gpu->sm, want->sm}};
    for (int i = 0; i < 4; i++) {
        cuda_get(p, row, each[i].dev, n * sizeof *row);
        close_rows(each[i].name, row, each[i].want, c->n, i == 1 ? bound * c->T * c->T + 1e-5 : bound);
    }
    cuda_get(p, hit, gpu->hit, n);
    for (size_t i = 0; i < n && c->logits == RT_F32; i++)
        if (hit[i] != want->hit[i])
            fail_msg("row %zu: hit %d, expected %d", i, hit[i], want->hit[i]);
    cuda_get_act(p, got, gpu->dx, c->n * c->H);
    cuda_close("  dx", got, want->dx, c->n, c->H, grad, 0); /* dz is rounded, and dx */
    cuda_get_act(p, got_dw, gpu->dw, c->V * c->H);
    cuda_close("  dw", got_dw, want->dw, 1, c->V * c->H, grad, 0);
    free(row);
    free(hit);
}

static struct rows_out host_out(const struct loss_case *c)
{
    const size_t n = (size_t)c->n;
    return (struct rows_out){memory(n, 8), memory(n, 8), memory(n, 8), memory(n, 8), memory(n, 1), memory((size_t)(c->n * c->H), 4),
                             memory((size_t)(c->V * c->H), 4)};
}

static void free_out(struct rows_out *o)
{
    void *const all[] = {o->ce, o->kl, o->tm, o->sm, o->hit, o->dx, o->dw};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
}

static void one_loss(struct cuda_pair *p, const struct loss_case *c)
{
    struct rt_err err = {0};
    const size_t nk = (size_t)(c->n * c->k);
    struct loss_data d = make_data(p, c);
    struct rows_out want = host_out(c), gpu = {DEV(p, double, c->n), DEV(p, double, c->n), DEV(p, double, c->n), DEV(p, double, c->n),
                                               DEV(p, uint8_t, c->n), cuda_act(p, NULL, c->n * c->H), NULL};
    float *got = memory((size_t)(c->n * c->H), sizeof *got), *got_dw = memory((size_t)(c->V * c->H), sizeof *got_dw);
    print_message("  %ld x %ld x %ld, k %d, T %g, %s, spread %g%s\n", (long)c->n, (long)c->H, (long)c->V, c->k, c->T,
                  c->tail == RT_TAIL_BUCKET ? "bucket" : "renorm", c->spread, c->logits == RT_BF16 ? ", BF16 logits" : c->logits == RT_F16 ? ", F16 logits" : "");
    cuda_random(want.dw, c->V * c->H, 3, 1e-3f);
    gpu.dw = cuda_act(p, want.dw, c->V * c->H);
    struct rt_head_loss_args a = {.x = d.x, .w = d.w.ref, .dx = want.dx, .dw = want.dw, .n = c->n, .H = c->H, .V = c->V, .label = d.label, .k = c->k,
                                  .top_ids = d.ids, .top_logp = d.logp, .kl_mask = c->k > 0 ? d.mask : NULL, .tail = c->tail, .w_ce = 0.03, .w_kl = 0.05,
                                  .T = c->T, .ce = want.ce, .kl = want.kl, .teacher_mass = want.tm, .student_mass = want.sm, .hit = want.hit};
    assert_ok(run_loss(&p->ref, c, &a, &err));
    void *x = cuda_act(p, d.x, c->n * c->H);
    uint32_t *packed = pack_ids(d.ids, c->n, c->k, c->V); /* the reference took them as they are */
    a.id_bits = rt_top_ids_bits(c->V);
    void *ids = cuda_bytes(p, packed, (size_t)(c->n * rt_top_ids_words(c->k, a.id_bits)) * 4);
    int32_t *label = cuda_bytes(p, d.label, (size_t)c->n * 4);
    float *logp = cuda_bytes(p, d.logp, nk * 4);
    uint8_t *mask = cuda_bytes(p, d.mask, (size_t)c->n);
    a.x = x, a.w = d.w.gpu, a.dx = gpu.dx, a.dw = gpu.dw, a.label = label, a.top_ids = ids, a.top_logp = logp, a.kl_mask = c->k > 0 ? mask : NULL;
    a.ce = gpu.ce, a.kl = gpu.kl, a.teacher_mass = gpu.tm, a.student_mass = gpu.sm, a.hit = gpu.hit;
    p->gpu.be->set_scratch(p->gpu.dev, c->scratch > 0 ? (uint64_t)c->scratch : (uint64_t)2 << 30);
    assert_ok(run_loss(&p->gpu, c, &a, &err));
    compare_loss(p, c, &want, &gpu, got, got_dw);
    /* forward alone: the same figures, and nothing else is asked for */
    double *ce = DEV(p, double, c->n), *a_ce = memory((size_t)c->n, 8), *b_ce = memory((size_t)c->n, 8);
    a.dx = a.dw = NULL, a.ce = ce, a.kl = a.teacher_mass = a.student_mass = NULL, a.hit = NULL;
    assert_ok(run_loss(&p->gpu, c, &a, &err));
    cuda_get(p, a_ce, gpu.ce, (size_t)c->n * 8);
    cuda_get(p, b_ce, ce, (size_t)c->n * 8);
    close_rows("  ce of a forward alone", b_ce, a_ce, c->n, 5 * logit_error(c) + 1e-6); /* another height of tile may take another order */
    void *const dev[] = {x, label, ids, logp, mask, gpu.ce, gpu.kl, gpu.tm, gpu.sm, gpu.hit, gpu.dx, gpu.dw, ce};
    for (size_t i = 0; i < sizeof dev / sizeof dev[0]; i++)
        cuda_free(p, dev[i]);
    void *const host[] = {d.x, d.logp, d.label, d.ids, d.mask, packed, got, got_dw, a_ce, b_ce};
    for (size_t i = 0; i < sizeof host / sizeof host[0]; i++)
        free(host[i]);
    free_out(&want);
    cuda_weight_free(p, &d.w);
}

static void test_head_loss(void **state)
{
    static const struct loss_case cases[] = {
        {17, 32, 61, 3, 2, RT_TAIL_BUCKET, 1.0f, 0, RT_F32, false},
        {17, 32, 61, 3, 1, RT_TAIL_RENORM, 1.0f, 0, RT_F32, false},
        {130, 64, 1003, 64, 1, RT_TAIL_BUCKET, 4.0f, 0, RT_F32, false},
        {130, 64, 1003, 64, 0.5, RT_TAIL_RENORM, 4.0f, 0, RT_F32, false},
        {64, 40, 5000, 0, 1, RT_TAIL_BUCKET, 2.0f, 0, RT_F32, false},
        {64, 48, 8192, 16, 4, RT_TAIL_BUCKET, 6.0f, 0, RT_F32, true},
        {48, 64, 32003, 64, 1, RT_TAIL_BUCKET, 8.0f, 0, RT_F32, false},
        {300, 64, 1000, 5, 1, RT_TAIL_BUCKET, 3.0f, 400000, RT_F32, false}, /* tiles and chunks, dw in bfloat16 */
        {300, 8, 1000, 5, 1, RT_TAIL_BUCKET, 3.0f, 400000, RT_F32, false},  /* dw summed in float32 */
        {300, 8, 1000, 5, 1, RT_TAIL_BUCKET, 3.0f, 400000, RT_BF16, false},
        {130, 64, 1003, 64, 2, RT_TAIL_BUCKET, 4.0f, 0, RT_BF16, false},
        {130, 64, 1003, 64, 2, RT_TAIL_BUCKET, 4.0f, 0, RT_F16, false},
        {300, 8, 1000, 5, 1, RT_TAIL_RENORM, 8.0f, 400000, RT_F16, false},
        {24, 16, 140001, 64, 1, RT_TAIL_BUCKET, 4.0f, 0, RT_F16, false}, /* more than shared memory holds of a row */
        {1100, 32, 331, 5, 1, RT_TAIL_BUCKET, 3.0f, 0, RT_F16, false}, /* rows enough for the operation to take F16 by itself */
    };
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        one_loss(&p, &cases[i]);
    cuda_pair_close(&p);
}

#ifdef RT_CUDA
/* Rows by one block each and by whatever is best here (a cluster, on Hopper): the same losses and gradients. */
static void one_block_case(struct cuda_pair *p, const struct loss_case *c)
{
    struct rt_err err = {0};
    const int64_t ldz = (c->V + 7) / 8 * 8, nz = c->n * ldz, nk = c->n * c->k;
    struct loss_data d = {.logp = memory((size_t)nk, 4), .label = memory((size_t)c->n, 4), .ids = memory((size_t)nk, 4), .mask = memory((size_t)c->n, 1)};
    float *z = memory((size_t)nz, 4), *dz[2] = {memory((size_t)nz, 4), memory((size_t)nz, 4)};
    uint16_t *bits = memory((size_t)nz, 2);
    double *row[2][2];
    for (int64_t i = 0; i < c->n; i++)
        fill_row(c, &d, i);
    cuda_random(z, nz, 7, c->spread);
    rt_from_f32(bits, c->logits, z, (size_t)nz);
    int32_t *label = cuda_bytes(p, d.label, (size_t)c->n * 4), *ids = cuda_bytes(p, d.ids, (size_t)nk * 4);
    float *logp = cuda_bytes(p, d.logp, (size_t)nk * 4);
    uint8_t *mask = cuda_bytes(p, d.mask, (size_t)c->n);
    double *ce = DEV(p, double, c->n), *kl = DEV(p, double, c->n);
    const struct rt_head_loss_args a = {.n = c->n, .H = 1, .V = c->V, .label = label, .k = c->k, .top_ids = ids, .top_logp = logp, .kl_mask = mask,
                                        .tail = c->tail, .w_ce = 0.03, .w_kl = 0.05, .T = c->T, .ce = ce, .kl = kl};
    for (int way = 0; way < 2; way++) {
        void *gz = cuda_bytes(p, bits, (size_t)nz * 2);
        const struct rt_cuda_logits t = {.z = gz, .dz = gz, .ldz = ldz, .rows = c->n, .type = c->logits, .threads = way == 0 ? 512 : 0};
        assert_ok(rt_cuda_loss_rows(p->gpu.q, &a, &t, &err));
        cuda_get_act(p, dz[way], gz, nz);
        for (int j = 0; j < 2; j++) {
            row[way][j] = memory((size_t)c->n, 8);
            cuda_get(p, row[way][j], j == 0 ? ce : kl, (size_t)c->n * 8);
        }
        cuda_free(p, gz);
    }
    print_message("  %ld rows of %ld, k %d, T %g\n", (long)c->n, (long)c->V, c->k, c->T);
    close_rows("  ce", row[1][0], row[0][0], c->n, 2e-6);
    close_rows("  kl", row[1][1], row[0][1], c->n, 2e-6 * c->T * c->T);
    for (int64_t i = 0; i < c->n; i++) /* behind the row's end is nobody's */
        memset(dz[1] + i * ldz + c->V, 0, (size_t)(ldz - c->V) * 4), memset(dz[0] + i * ldz + c->V, 0, (size_t)(ldz - c->V) * 4);
    cuda_close("  dz", dz[1], dz[0], c->n, ldz, CUDA_BF16_ONCE, 0);
    void *const dev[] = {label, ids, logp, mask, ce, kl};
    for (size_t i = 0; i < sizeof dev / sizeof dev[0]; i++)
        cuda_free(p, dev[i]);
    void *const host[] = {d.logp, d.label, d.ids, d.mask, z, dz[0], dz[1], bits, row[0][0], row[0][1], row[1][0], row[1][1]};
    for (size_t i = 0; i < sizeof host / sizeof host[0]; i++)
        free(host[i]);
}

static void test_one_block(void **state)
{
    static const struct loss_case cases[] = {
        {13, 1, 60007, 64, 1, RT_TAIL_BUCKET, 3.0f, 0, RT_F16, false},   {13, 1, 60007, 300, 2, RT_TAIL_BUCKET, 3.0f, 0, RT_F16, false},
        {13, 1, 152064, 64, 1.5, RT_TAIL_BUCKET, 3.0f, 0, RT_F16, false}, {13, 1, 152064, 64, 2, RT_TAIL_RENORM, 3.0f, 0, RT_BF16, false},
        {13, 1, 152064, 0, 1, RT_TAIL_BUCKET, 30.0f, 0, RT_F16, true},   {13, 1, 9, 3, 2, RT_TAIL_BUCKET, 3.0f, 0, RT_F16, false},
        {13, 1, 260000, 64, 2, RT_TAIL_BUCKET, 30.0f, 0, RT_F16, false},
    };
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        one_block_case(&p, &cases[i]);
    cuda_pair_close(&p);
}
#endif

/* A student that is sure: Q_R far below what 1 - sum can show, and logits whose exponentials overflow float32 by themselves. */
static void test_confident(void **state)
{
    enum { H = 8, V = 64, N = 3 };
    struct cuda_pair p;
    struct rt_err err = {0};
    float x[N * H] = {0}, w[V * H] = {0}, logp[N * 2], got[N * H], want[N * H];
    const int32_t label[N] = {5, 9, -1}, ids[N * 2] = {5, 6, 5, 6, 5, 6};
    const uint8_t mask[N] = {1, 1, 1};
    double ce[N], kl[N], a[N];
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (int i = 0; i < N; i++) {
        x[i * H] = i == 2 ? 200.0f : 40.0f; /* 200: exp(200) is no float32 */
        x[i * H + 1] = 1.0f;
        logp[i * 2] = logf(0.7f);
        logp[i * 2 + 1] = logf(0.2f);
    }
    for (int v = 0; v < V; v++)
        w[v * H + 1] = 0.125f * (float)(v % 5);
    w[5 * H] = 1.0f;
    w[6 * H] = 0.5f;
    struct rt_weight_src src = {.name = "w", .dtype = RT_F32, .rows = V, .cols = H, .data = w};
    struct rt_weight *rw, *gw;
    assert_ok(p.ref.be->weight_load(p.ref.dev, p.ref.q, &src, &rw, &err));
    assert_ok(p.gpu.be->weight_load(p.gpu.dev, p.gpu.q, &src, &gw, &err));
    void *gx = cuda_act(&p, x, N * H), *gdx = cuda_act(&p, NULL, N * H);
    int32_t *glabel = cuda_bytes(&p, label, sizeof label), *gids = cuda_bytes(&p, ids, sizeof ids);
    float *glogp = cuda_bytes(&p, logp, sizeof logp);
    uint8_t *gmask = cuda_bytes(&p, mask, sizeof mask);
    double *gce = DEV(&p, double, N), *gkl = DEV(&p, double, N);
    assert_ok(RT_OP(&p.ref, head_loss, &err, .x = x, .w = rw, .dx = want, .n = N, .H = H, .V = V, .label = label, .k = 2, .top_ids = ids,
                    .top_logp = logp, .kl_mask = mask, .tail = RT_TAIL_BUCKET, .w_ce = 0.5, .w_kl = 0.25, .T = 1, .ce = ce, .kl = kl));
    assert_ok(RT_OP(&p.gpu, head_loss, &err, .x = gx, .w = gw, .dx = gdx, .n = N, .H = H, .V = V, .label = glabel, .k = 2, .top_ids = gids,
                    .top_logp = glogp, .kl_mask = gmask, .tail = RT_TAIL_BUCKET, .w_ce = 0.5, .w_kl = 0.25, .T = 1, .ce = gce, .kl = gkl));
    cuda_get(&p, a, gce, sizeof a);
    close_rows("ce", a, ce, N, 1e-6);
    cuda_get(&p, a, gkl, sizeof a);
    close_rows("kl", a, kl, N, 1e-6);
    cuda_get_act(&p, got, gdx, N * H);
    cuda_close("dx", got, want, N, H, 2 * CUDA_BF16_ONCE, 4 * CUDA_BF16_ONCE);
    void *const dev[] = {gx, gdx, glabel, gids, glogp, gmask, gce, gkl};
    for (size_t i = 0; i < sizeof dev / sizeof dev[0]; i++)
        cuda_free(&p, dev[i]);
    p.ref.be->weight_free(p.ref.dev, rw);
    p.gpu.be->weight_free(p.gpu.dev, gw);
    cuda_pair_close(&p);
}

/* ---- likelihoods ---- */
static void one_likelihood(struct cuda_pair *p, int64_t n, int64_t H, int64_t V, int64_t n_ids, int set)
{
    struct rt_err err = {0};
    float *x = memory((size_t)(n * H), 4), *dx = memory((size_t)(n * H), 4), *dw = memory((size_t)(V * H), 4), *got = memory((size_t)(V * H + n * H), 4);
    float *wl = memory((size_t)n, 4), *ws = memory((size_t)n, 4);
    int32_t *label = memory((size_t)n, 4);
    uint8_t *in_set = memory((size_t)n_ids, 1);
    double *ll = memory((size_t)n, 8), *sl = memory((size_t)n, 8), *row = memory((size_t)n, 8);
    struct cuda_weight w = cuda_weight_bf16(p, V, H, 2, 3.0f / sqrtf((float)H));
    cuda_random(x, n * H, 1, 1.0f);
    cuda_random(dw, V * H, 3, 1e-2f);
    for (int64_t i = 0; i < n; i++) {
        wl[i] = 0.1f * (float)rt_rng_normal(6, 1, (uint64_t)i);
        ws[i] = i % 3 == 0 ? 0 : 0.1f * (float)rt_rng_normal(6, 2, (uint64_t)i);
        label[i] = i % 5 == 2 ? -1 : (int32_t)(rt_rng_u64(6, 3, (uint64_t)i) % (uint64_t)n_ids);
    }
    for (int64_t v = 0; v < n_ids; v++)
        in_set[v] = set == 2 ? 0 : rt_rng_u64(6, 4, (uint64_t)v) % 3 == 0;
    print_message("  likelihoods %ld x %ld x %ld of %ld, %s set\n", (long)n, (long)H, (long)n_ids, (long)V, set == 0 ? "no" : set == 1 ? "a" : "an empty");
    void *gx = cuda_act(p, x, n * H), *gdx = cuda_act(p, NULL, n * H), *gdw = cuda_act(p, dw, V * H), *glabel = cuda_bytes(p, label, (size_t)n * 4);
    void *gset = cuda_bytes(p, in_set, (size_t)n_ids), *gwl = cuda_bytes(p, wl, (size_t)n * 4), *gws = cuda_bytes(p, ws, (size_t)n * 4);
    double *gll = DEV(p, double, n), *gsl = DEV(p, double, n);
    assert_ok(RT_OP(&p->ref, head_likelihood, &err, .x = x, .w = w.ref, .dx = dx, .dw = dw, .n = n, .H = H, .n_ids = n_ids, .label = label,
                    .in_set = set > 0 ? in_set : NULL, .w_label = wl, .w_set = ws, .label_logp = ll, .set_logp = sl));
    assert_ok(RT_OP(&p->gpu, head_likelihood, &err, .x = gx, .w = w.gpu, .dx = gdx, .dw = gdw, .n = n, .H = H, .n_ids = n_ids, .label = glabel,
                    .in_set = set > 0 ? gset : NULL, .w_label = gwl, .w_set = gws, .label_logp = gll, .set_logp = gsl));
    cuda_get(p, row, gll, (size_t)n * 8);
    close_rows("  label", row, ll, n, 2e-5);
    cuda_get(p, row, gsl, (size_t)n * 8);
    if (set == 2)
        for (int64_t i = 0; i < n; i++)
            assert_true(isinf(row[i]) && row[i] < 0);
    else
        close_rows("  set", row, sl, n, 2e-5);
    cuda_get_act(p, got, gdx, n * H);
    cuda_close("  dx", got, dx, n, H, 2 * CUDA_BF16_ONCE, 0);
    cuda_get_act(p, got, gdw, V * H);
    cuda_close("  dw", got, dw, 1, V * H, 2 * CUDA_BF16_ONCE, 0);
    void *const dev[] = {gx, gdx, gdw, glabel, gset, gwl, gws, gll, gsl};
    for (size_t i = 0; i < sizeof dev / sizeof dev[0]; i++)
        cuda_free(p, dev[i]);
    void *const host[] = {x, dx, dw, got, wl, ws, label, in_set, ll, sl, row};
    for (size_t i = 0; i < sizeof host / sizeof host[0]; i++)
        free(host[i]);
    cuda_weight_free(p, &w);
}

static void test_head_likelihood(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    one_likelihood(&p, 33, 32, 61, 61, 1);
    one_likelihood(&p, 70, 64, 5000, 4987, 1);
    one_likelihood(&p, 20, 64, 1003, 1003, 0);
    one_likelihood(&p, 20, 64, 1003, 900, 2);
    p.gpu.be->set_scratch(p.gpu.dev, 300000);
    one_likelihood(&p, 200, 16, 1003, 1003, 1);
    cuda_pair_close(&p);
}

/* ---- features ---- */
static void one_feature(struct cuda_pair *p, int64_t n, int64_t cols, bool cosine)
{
    struct rt_err err = {0};
    char what[64];
    const size_t all = (size_t)(n * cols);
    float *a = memory(all, 4), *b = memory(all, 4), *want = memory(all, 4), *got = memory(all, 4);
    double *loss = memory((size_t)n, 8), *row = memory((size_t)n, 8);
    cuda_random(a, n * cols, 1, 1.0f);
    for (size_t i = 0; i < all; i++)
        b[i] = (i / (size_t)cols % 2 == 0 ? a[i] : 0) + 0.01f * (float)rt_rng_normal(8, 1, i); /* even rows: near their goal */
    memset(b + cols, 0, (size_t)cols * sizeof *b); /* no direction */
    void *ga = cuda_act(p, a, n * cols), *gda = cuda_act(p, NULL, n * cols);
    float *gb = cuda_bytes(p, b, all * 4);
    double *gloss = DEV(p, double, n);
    assert_ok(RT_OP(&p->ref, feature_loss, &err, .a = a, .b = b, .da = want, .loss = loss, .w = 0.3, .n = n, .cols = cols, .cosine = cosine));
    assert_ok(RT_OP(&p->gpu, feature_loss, &err, .a = ga, .b = gb, .da = gda, .loss = gloss, .w = 0.3, .n = n, .cols = cols, .cosine = cosine));
    cuda_get(p, row, gloss, (size_t)n * 8);
    snprintf(what, sizeof what, "feature %s %ld x %ld", cosine ? "cosine" : "mse", (long)n, (long)cols);
    close_rows(what, row, loss, n, 1e-12); /* float64 in another order */
    cuda_get_act(p, got, gda, n * cols);
    cuda_close("  gradient", got, want, n, cols, n * cols < 2000 ? 0x1p-8 : CUDA_BF16_ONCE, 0x1p-8);
    void *const dev[] = {ga, gda, gb, gloss};
    for (size_t i = 0; i < 4; i++)
        cuda_free(p, dev[i]);
    void *const host[] = {a, b, want, got, loss, row};
    for (size_t i = 0; i < 6; i++)
        free(host[i]);
}

static void test_feature_loss(void **state)
{
    struct cuda_pair p;
    (void)state;
    if (!cuda_pair_open(&p))
        TEST_SKIP("no GPU");
    for (int cosine = 0; cosine < 2; cosine++) {
        one_feature(&p, 70, 7168, cosine);
        one_feature(&p, 333, 512, cosine);
        one_feature(&p, 5, 27, cosine);
    }
    cuda_pair_close(&p);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_head_loss),
#ifdef RT_CUDA
    cmocka_unit_test(test_one_block),
#endif
    cmocka_unit_test(test_confident),
    cmocka_unit_test(test_head_likelihood),
    cmocka_unit_test(test_feature_loss),
};
RT_SUITE(cuda_loss, tests)
