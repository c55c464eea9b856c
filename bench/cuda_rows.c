/* Speed of the memory-bound operations of the teacher on the GPU, at the geometry of DeepSeek-V3, beside a plain device copy.
 *
 *     bench_cuda_rows
 *
 * Each line: the operation, its time (median of 15, by events), the bytes that it has to read and write once, and their rate, absolutely and
 * as a share of the copy's. Operations that wait are timed by the clock of the host.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/median.h"
#include "core/backend.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/rng.h"

#ifdef RT_CUDA
#include "core/cuda/gemm.h"
#include "core/cuda/moe_rows.h"

enum { N = 65536, H = 7168, K = 8, E = 256, GROUP = 64, REPEATS = 15, HEADS = 128, MANY = 262144 };
#define GIB ((size_t)1 << 30)

struct bench {
    struct rt_device d;
    struct rt_event *from, *to;
    char *a, *b, *c;        /* 6, 6 and 4 GiB of elements */
    float *scale, *rstd, *angles, *weight;
    int32_t *index, *position, *ids, *perm;
    struct rt_weight *norm, *table, *router, *bias;
    int32_t offset[E + 1];
    struct rt_cuda_moe_group group;
    double copy_rate;
    struct rt_err err;
};

static void need(struct bench *b, enum rt_status st)
{
    if (st == RT_OK)
        return;
    fprintf(stderr, "bench_cuda_rows: %s\n", b->err.msg);
    exit(rt_exit_code(st));
}

static void measure(struct bench *b, const char *name, double bytes, enum rt_status (*run)(struct bench *b), bool waits)
{
    const struct rt_backend *be = b->d.be;
    double t[REPEATS];
    for (int i = -2; i < REPEATS; i++) {
        const double t0 = rt_now();
        double seconds = 0;
        need(b, be->event_record(b->d.dev, b->d.q, b->from, &b->err));
        need(b, run(b));
        need(b, be->event_record(b->d.dev, b->d.q, b->to, &b->err));
        need(b, be->event_elapsed(b->d.dev, b->from, b->to, &seconds, &b->err));
        if (i >= 0)
            t[i] = waits ? rt_now() - t0 : seconds;
    }
    qsort(t, REPEATS, sizeof *t, bench_by_value);
    const double rate = bytes / t[REPEATS / 2];
    if (b->copy_rate == 0)
        b->copy_rate = rate;
    printf("%-52s %9.1f us %9.1f MB %8.0f GB/s  %4.0f%%\n", name, t[REPEATS / 2] * 1e6, bytes * 1e-6, rate * 1e-9, 100 * rate / b->copy_rate);
    fflush(stdout);
}

#define OP(name, op, ...) \
    static enum rt_status name(struct bench *b) { return RT_OP(&b->d, op, &b->err, __VA_ARGS__); }

static enum rt_status copy(struct bench *b)
{
    return b->d.be->copy(b->d.dev, b->d.q, b->b, b->a, 2 * GIB, &b->err);
}
OP(embed, embed_fwd, .ids = b->index, .table = b->table, .out = b->b, .n = N, .cols = H)
OP(norm_y, norm_fwd, .x = b->a, .w = b->norm, .y = b->b, .n = N, .cols = H, .eps = 1e-6f)
OP(norm_yq, norm_fwd, .x = b->a, .w = b->norm, .y = b->b, .yq = {b->c, b->scale}, .n = N, .cols = H, .eps = 1e-6f)
OP(norm_q, norm_fwd, .x = b->a, .w = b->norm, .yq = {b->c, b->scale}, .n = N, .cols = H, .eps = 1e-6f)
OP(norm_add, norm_fwd, .x = b->a, .add = b->b, .w = b->norm, .sum = b->a, .y = b->c, .yq = {b->c + 2 * GIB, b->scale}, .rstd = b->rstd, .n = N,
   .cols = H, .eps = 1e-6f)
OP(norm_qa, norm_fwd, .x = b->a, .y = b->b, .yq = {b->c, b->scale}, .n = MANY, .cols = 1536, .eps = 1e-6f)
OP(norm_kva, norm_fwd, .x = b->a, .ldx = 576, .y = b->b, .n = MANY, .cols = 512, .eps = 1e-6f)
OP(norm_896, norm_fwd, .x = b->a, .y = b->b, .n = MANY, .cols = 896, .eps = 1e-6f)
OP(quant_h, quant, .x = b->a, .q = {b->c, b->scale}, .n = N, .cols = H)
OP(quant_o, quant, .x = b->a, .q = {b->c, b->scale}, .n = N, .cols = 128 * HEADS)
OP(rope_q, rope, .x = b->a + 256, .ld = 192 * HEADS, .head_ld = 192, .cos = b->angles, .sin = b->angles + 32 * 4096, .position = b->position, .n = N,
   .heads = HEADS, .dim = 64, .interleaved = true)
OP(rope_k, rope, .x = b->a + 1024, .ld = 576, .cos = b->angles, .sin = b->angles + 32 * 4096, .position = b->position, .n = N, .heads = 1,
   .dim = 64, .interleaved = true)
OP(swiglu_dense, swiglu_fwd, .gate = b->a, .up = b->a + 2 * 18432, .ld = 2 * 18432, .hq = {b->c, b->scale}, .n = N, .I = 18432)
OP(swiglu_shared, swiglu_fwd, .gate = b->a, .up = b->a + 2 * 2048, .ld = 2 * 2048, .hq = {b->c, b->scale}, .n = MANY, .I = 2048)
OP(swiglu_h, swiglu_fwd, .gate = b->a, .up = b->a + 2 * 2048, .ld = 2 * 2048, .h = b->c, .n = MANY, .I = 2048)
OP(gather, gather, .x = b->a, .index = b->index, .out = b->b, .n = N, .cols = H)
OP(scatter, scatter, .y = b->a, .index = b->index, .x = b->b, .n = N, .cols = H)
OP(scatter_add, scatter, .y = b->a, .index = b->index, .x = b->b, .n = N, .cols = H, .accumulate = true)
OP(axpy, axpy, .x = b->a, .y = b->b, .n = (int64_t)N * H, .a = 0.5)
OP(route, route, .x = b->a, .w = b->router, .bias = b->bias, .ids = b->perm, .weight = b->weight, .n = N, .H = H, .E = E, .k = K, .n_group = 8,
   .topk_group = 4, .sigmoid = true, .group_top2 = true, .norm = true, .scale = 2.5f)
OP(sort, moe_sort, .ids = b->ids, .perm = b->perm, .offset = b->offset, .n = N, .k = K, .E = E)
OP(sort_many, moe_sort, .ids = b->ids, .perm = b->perm, .offset = b->offset, .n = 16 * N, .k = K, .E = E)

static enum rt_status sumsq(struct bench *b)
{
    double out;
    return RT_OP(&b->d, sumsq, &b->err, .x = b->a, .n = (int64_t)MANY * H, .out = &out);
}

/* The router's product without the choice: over all rows at once, and over as many as route takes at a time. */
static enum rt_status product(struct bench *b, int64_t rows)
{
    enum rt_status st = RT_OK;
    for (int64_t t = 0; t < N && st == RT_OK; t += rows) {
        const struct rt_cuda_gemm_args g = {.a = b->a + 2 * t * H, .b = b->router->data, .d = b->b, .m = t + rows < N ? rows : N - t, .n = E, .k = H,
                                            .b_t = true, .d_f32 = true};
        st = rt_cuda_gemm(b->d.q, &g, &b->err);
    }
    return st;
}
static enum rt_status product_all(struct bench *b) { return product(b, N); }
static enum rt_status product_wave(struct bench *b) { return product(b, 128 * b->d.dev->sm_count); }
static enum rt_status product_waves(struct bench *b) { return product(b, 256 * b->d.dev->sm_count); }

static enum rt_status group_make(struct bench *b)
{
    rt_cuda_moe_group_release(b->d.q, &b->group);
    return rt_cuda_moe_group_make(b->d.q, b->perm, b->offset + GROUP, GROUP, 16, N, K, true, &b->group, &b->err);
}

static enum rt_status group_gather8(struct bench *b)
{
    return rt_cuda_moe_gather(b->d.q, &b->group, (struct rt_act){b->a, b->scale}, (struct rt_act){b->b, b->scale + 60 * N}, H, &b->err);
}

static enum rt_status group_gather16(struct bench *b)
{
    return rt_cuda_moe_gather(b->d.q, &b->group, (struct rt_act){b->a, NULL}, (struct rt_act){b->b, NULL}, H, &b->err);
}

static enum rt_status group_swiglu(struct bench *b)
{
    return rt_cuda_moe_swiglu(b->d.q, &b->group, b->a, b->a + 2 * 2048, 2 * 2048, (struct rt_act){b->c, b->scale}, 2048, false, &b->err);
}

static enum rt_status group_combine(struct bench *b)
{
    return rt_cuda_moe_combine(b->d.q, &b->group, b->a, b->weight, b->b, H, &b->err);
}

static enum rt_status take(struct bench *b, size_t bytes, void *out_ptr)
{
    void *p = NULL;
    const enum rt_status st = b->d.be->alloc(b->d.dev, bytes, &p, &b->err);
    memcpy(out_ptr, &p, sizeof p);
    return st;
}

/* Normal numbers as bf16 over the first `bytes` of to. */
static void fill(struct bench *b, char *to, size_t bytes)
{
    enum { PART = 1 << 22 };
    static uint16_t part[PART];
    for (int i = 0; i < PART; i++)
        part[i] = rt_f32_to_bf16(rt_rng_normal(1, 1, (uint64_t)i));
    need(b, rt_device_upload(&b->d, to, part, sizeof part, &b->err));
    need(b, rt_device_sync(&b->d, &b->err));
    for (size_t have = sizeof part; have < bytes; have *= 2)
        need(b, b->d.be->copy(b->d.dev, b->d.q, to + have, to, have < bytes - have ? have : bytes - have, &b->err));
}

static struct rt_weight *weight(struct bench *b, int64_t rows, int64_t cols, const void *at)
{
    struct rt_weight *w = NULL;
    const struct rt_weight_src src = {.name = "w", .dtype = RT_BF16, .rows = rows, .cols = cols, .device_data = at};
    need(b, b->d.be->weight_load(b->d.dev, b->d.q, &src, &w, &b->err));
    return w;
}

static void prepare(struct bench *b)
{
    static int32_t index[N], position[N], ids[16 * N * K];
    static float angles[2 * 32 * 4096];
    int64_t *perm;
    need(b, b->d.be->event_create(b->d.dev, &b->from, &b->err));
    need(b, b->d.be->event_create(b->d.dev, &b->to, &b->err));
    need(b, take(b, 6 * GIB, &b->a));
    need(b, take(b, 6 * GIB, &b->b));
    need(b, take(b, 4 * GIB, &b->c));
    need(b, take(b, GIB / 2, &b->scale));
    need(b, take(b, MANY * sizeof(float), &b->rstd));
    need(b, take(b, sizeof angles, &b->angles));
    need(b, take(b, 16 * N * K * sizeof(float), &b->weight));
    need(b, take(b, sizeof index, &b->index));
    need(b, take(b, sizeof position, &b->position));
    need(b, take(b, sizeof ids, &b->ids));
    need(b, take(b, sizeof ids, &b->perm));
    fill(b, b->a, 6 * GIB);
    fill(b, b->b, 6 * GIB);
    fill(b, b->c, 4 * GIB);
    need(b, rt_alloc(N, sizeof *perm, "bench", &perm, &b->err));
    rt_rng_permutation(1, 2, N, perm);
    for (int i = 0; i < N; i++) {
        index[i] = (int32_t)perm[i];
        position[i] = i % 4096;
    }
    for (int i = 0; i < 2 * 32 * 4096; i++)
        angles[i] = 0.7f;
    for (int64_t i = 0; i < 16 * N * K; i++)
        ids[i] = (int32_t)(rt_rng_u64(1, 3, (uint64_t)i) % E);
    need(b, rt_device_upload(&b->d, b->index, index, sizeof index, &b->err));
    need(b, rt_device_upload(&b->d, b->position, position, sizeof position, &b->err));
    need(b, rt_device_upload(&b->d, b->angles, angles, sizeof angles, &b->err));
    need(b, rt_device_upload(&b->d, b->ids, ids, sizeof ids, &b->err));
    need(b, rt_device_sync(&b->d, &b->err));
    rt_free(perm);
    b->norm = weight(b, 1, H, b->c);
    b->table = weight(b, 129280, H, b->a);
    b->router = weight(b, E, H, b->c);
    b->bias = weight(b, 1, E, b->c);
}

int main(void)
{
    static struct bench b;
    const struct rt_backend *const *list = rt_backend_list();
    char why[160] = "";
    while (*list != NULL && strcmp((*list)->name, "cuda") != 0)
        list++;
    if (*list == NULL || !(*list)->available(why, sizeof why)) {
        printf("bench_cuda_rows: %s\n", why);
        return 0;
    }
    need(&b, rt_device_open(*list, &(struct rt_dev_options){0}, &b.d, &b.err));
    printf("%s; n %d unless a line says otherwise\n", b.d.be->describe(b.d.dev), N);
    prepare(&b);
    const double row = 2.0 * H, n = N, many = MANY;
    measure(&b, "copy of 2 GiB", 4.0 * (double)GIB, copy, false);
    measure(&b, "embed_fwd 7168", n * 2 * row, embed, false);
    measure(&b, "norm 7168 -> y", n * 2 * row, norm_y, false);
    measure(&b, "norm 7168 -> y, codes", n * (2.5 * row + 4 * 56), norm_yq, false);
    measure(&b, "norm 7168 -> codes", n * (1.5 * row + 4 * 56), norm_q, false);
    measure(&b, "add + norm 7168 -> sum, y, codes, rstd", n * (4.5 * row + 4 * 57), norm_add, false);
    measure(&b, "norm 1536 -> y, codes (n 262144)", many * (5 * 1536 + 4 * 12), norm_qa, false);
    measure(&b, "norm 512 of 576 -> y (n 262144)", many * 4 * 512, norm_kva, false);
    measure(&b, "norm 896 -> y (n 262144)", many * 4 * 896, norm_896, false);
    measure(&b, "quant 7168", n * (1.5 * row + 4 * 56), quant_h, false);
    measure(&b, "quant 16384", n * (3.0 * 16384 + 4 * 128), quant_o, false);
    measure(&b, "rope 128 heads, 64 of 192", n * 4 * 64 * HEADS, rope_q, false);
    measure(&b, "rope 1 head, 64 of 576", n * 4 * 64, rope_k, false);
    measure(&b, "swiglu 18432 -> codes", n * (5.0 * 18432 + 4 * 144), swiglu_dense, false);
    measure(&b, "swiglu 2048 -> codes (n 262144)", many * (5.0 * 2048 + 4 * 16), swiglu_shared, false);
    measure(&b, "swiglu 2048 -> h (n 262144)", many * 6.0 * 2048, swiglu_h, false);
    measure(&b, "gather 7168", n * 2 * row, gather, false);
    measure(&b, "scatter 7168", n * 2 * row, scatter, false);
    measure(&b, "scatter += 7168", n * 3 * row, scatter_add, false);
    measure(&b, "axpy 65536 x 7168", n * 3 * row, axpy, false);
    measure(&b, "sumsq 262144 x 7168, waits", many * row, sumsq, true);
    measure(&b, "route 8 of 256", n * (row + 8 * K), route, false);
    measure(&b, "  its product, all rows at once", n * (row + 4 * E), product_all, false);
    measure(&b, "  its product, 128 rows a multiprocessor at a time", n * (row + 4 * E), product_wave, false);
    measure(&b, "  its product, 256 rows a multiprocessor at a time", n * (row + 4 * E), product_waves, false);
    measure(&b, "moe_sort 65536 x 8, waits", n * K * 12, sort, true);
    measure(&b, "moe_sort 1048576 x 8, waits", 16 * n * K * 12, sort_many, true);
    need(&b, RT_OP(&b.d, moe_sort, &b.err, .ids = b.ids, .perm = b.perm, .offset = b.offset, .n = N, .k = K, .E = E));
    measure(&b, "tables of 64 of 256 experts", n * K * 4, group_make, false);
    const double rows = (double)b.group.rows, touched = n * (1 - 0.1001); /* of 8 choices none in a quarter of the experts: 0.75^8 */
    measure(&b, "gather codes of the 64 experts", (rows + touched) * (row / 2 + 4 * 56), group_gather8, false);
    measure(&b, "gather bf16 of the 64 experts", (rows + touched) * row, group_gather16, false);
    measure(&b, "swiglu 2048 of the 64 experts -> codes", rows * (5.0 * 2048 + 4 * 16), group_swiglu, false);
    measure(&b, "combine of the 64 experts", rows * row + touched * 2 * row, group_combine, false);
    return 0;
}

#else

int main(void)
{
    printf("bench_cuda_rows: a build without CUDA\n");
    return 0;
}

#endif
