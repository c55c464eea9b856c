#include "tests/cuda_ops.h"

#include <math.h>
#include <string.h>

#include "core/dtype.h"
#include "core/mem.h"
#include "core/rng.h"

enum { GUARD = 256 };
static const unsigned char guard_byte = 0xa5;

/* Each device array lies behind a header that holds its size. */
enum { HEADER = 256 };

bool cuda_pair_open(struct cuda_pair *p)
{
    struct rt_err err = {0};
    char why[128];
    *p = (struct cuda_pair){0};
    const struct rt_backend *const *list = rt_backend_list();
    while (*list != NULL && strcmp((*list)->name, "cuda") != 0)
        list++;
    if (*list == NULL || !(*list)->available(why, sizeof why))
        return false;
    assert_ok(rt_device_open(*list, &(struct rt_dev_options){0}, &p->gpu, &err));
    assert_ok(rt_device_open(&rt_backend_ref, &(struct rt_dev_options){.threads = 1}, &p->ref, &err));
    return true;
}

void cuda_pair_close(struct cuda_pair *p)
{
    rt_device_close(&p->gpu);
    rt_device_close(&p->ref);
}

void cuda_round(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = rt_bf16_to_f32(rt_f32_to_bf16(x[i]));
}

float *cuda_floats(int64_t n)
{
    struct rt_err err = {0};
    float *p;
    assert_ok(rt_alloc((size_t)(n > 0 ? n : 1), sizeof *p, "test", &p, &err));
    return p;
}

void cuda_poison(float *y, int64_t rows, int64_t cols, int64_t ld)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < cols; j++)
            y[r * ld + j] = NAN;
}

void cuda_random(float *x, int64_t n, uint64_t stream, float scale)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = scale * (float)rt_rng_normal(1, stream, (uint64_t)i);
    cuda_round(x, n);
}

float *cuda_numbers(int64_t n, uint64_t stream, float scale)
{
    float *x = cuda_floats(n);
    cuda_random(x, n, stream, scale);
    return x;
}

void *cuda_bytes(struct cuda_pair *p, const void *x, size_t bytes)
{
    struct rt_err err = {0};
    const struct rt_backend *be = p->gpu.be;
    char *block, *host;
    void *dev = NULL;
    const size_t total = HEADER + bytes + GUARD;
    assert_ok(rt_alloc(total, 1, "test", &host, &err));
    block = host + HEADER;
    memcpy(host, &bytes, sizeof bytes);
    if (x != NULL)
        memcpy(block, x, bytes);
    else
        memset(block, 0xff, bytes); /* NaN in every float type, -1 in every integer type */
    memset(block + bytes, guard_byte, GUARD);
    assert_ok(be->alloc(p->gpu.dev, total, &dev, &err));
    assert_ok(rt_device_upload(&p->gpu, dev, host, total, &err));
    assert_ok(rt_device_sync(&p->gpu, &err));
    rt_free(host);
    return (char *)dev + HEADER;
}

void *cuda_act(struct cuda_pair *p, const float *x, int64_t n)
{
    struct rt_err err = {0};
    uint16_t *half;
    if (x == NULL)
        return cuda_bytes(p, NULL, (size_t)n * 2);
    assert_ok(rt_alloc((size_t)n, 2, "test", &half, &err));
    rt_from_f32(half, RT_BF16, x, (size_t)n);
    void *dev = cuda_bytes(p, half, (size_t)n * 2);
    rt_free(half);
    return dev;
}

void cuda_free(struct cuda_pair *p, void *dev)
{
    struct rt_err err = {0};
    size_t bytes;
    unsigned char guard[GUARD];
    if (dev == NULL)
        return;
    cuda_get(p, &bytes, (char *)dev - HEADER, sizeof bytes);
    cuda_get(p, guard, (char *)dev + bytes, GUARD);
    for (int i = 0; i < GUARD; i++)
        if (guard[i] != guard_byte)
            fail_msg("an operation wrote %d bytes behind an array of %zu bytes", i, bytes);
    p->gpu.be->free(p->gpu.dev, (char *)dev - HEADER);
    (void)err;
}

void cuda_set(struct cuda_pair *p, void *dst, int value, size_t bytes)
{
    struct rt_err err = {0};
    char *all;
    assert_ok(rt_alloc(bytes, 1, "test", &all, &err));
    memset(all, value, bytes);
    assert_ok(rt_device_upload(&p->gpu, dst, all, bytes, &err));
    rt_free(all);
}

void cuda_copy_rows(struct cuda_pair *p, void *dst, size_t dst_ld, const void *src, size_t src_ld, size_t row, size_t rows)
{
    struct rt_err err = {0};
    for (size_t i = 0; i < rows; i++)
        assert_ok(p->gpu.be->copy(p->gpu.dev, p->gpu.q, (char *)dst + i * dst_ld, (const char *)src + i * src_ld, row, &err));
}

void cuda_get(struct cuda_pair *p, void *x, const void *dev, size_t bytes)
{
    struct rt_err err = {0};
    assert_ok(rt_device_download(&p->gpu, x, dev, bytes, &err));
}

void cuda_get_act(struct cuda_pair *p, float *x, const void *dev, int64_t n)
{
    struct rt_err err = {0};
    uint16_t *half;
    assert_ok(rt_alloc((size_t)n, 2, "test", &half, &err));
    cuda_get(p, half, dev, (size_t)n * 2);
    rt_to_f32(x, half, RT_BF16, (size_t)n);
    rt_free(half);
}

static struct cuda_weight load(struct cuda_pair *p, enum rt_dtype t, void *data, float *scale, int64_t rows, int64_t cols)
{
    struct rt_err err = {0};
    struct cuda_weight w = {.data = data, .scale = scale};
    const struct rt_weight_src src = {.name = "w", .dtype = t, .rows = rows, .cols = cols, .data = data, .scale_inv = scale};
    assert_ok(p->ref.be->weight_load(p->ref.dev, p->ref.q, &src, &w.ref, &err));
    assert_ok(p->gpu.be->weight_load(p->gpu.dev, p->gpu.q, &src, &w.gpu, &err));
    return w;
}

struct cuda_weight cuda_weight_f32(struct cuda_pair *p, int64_t rows, int64_t cols, uint64_t stream, float scale)
{
    struct rt_err err = {0};
    float *x;
    assert_ok(rt_alloc((size_t)(rows * cols), sizeof *x, "test", &x, &err));
    for (int64_t i = 0; i < rows * cols; i++)
        x[i] = scale * (float)rt_rng_normal(2, stream, (uint64_t)i);
    return load(p, RT_F32, x, NULL, rows, cols);
}

struct cuda_weight cuda_weight_bf16(struct cuda_pair *p, int64_t rows, int64_t cols, uint64_t stream, float scale)
{
    struct rt_err err = {0};
    uint16_t *x;
    assert_ok(rt_alloc((size_t)(rows * cols), sizeof *x, "test", &x, &err));
    for (int64_t i = 0; i < rows * cols; i++)
        x[i] = rt_f32_to_bf16(scale * (float)rt_rng_normal(2, stream, (uint64_t)i));
    return load(p, RT_BF16, x, NULL, rows, cols);
}

struct cuda_weight cuda_weight_e4m3(struct cuda_pair *p, int64_t rows, int64_t cols, uint64_t stream, float scale)
{
    struct rt_err err = {0};
    const int64_t blocks = (rows + 127) / 128 * ((cols + 127) / 128);
    uint8_t *x;
    float *s;
    assert_ok(rt_alloc((size_t)(rows * cols), 1, "test", &x, &err));
    assert_ok(rt_alloc((size_t)blocks, sizeof *s, "test", &s, &err));
    for (int64_t i = 0; i < rows * cols; i++)
        x[i] = rt_f32_to_e4m3(100.0f * (float)rt_rng_normal(2, stream, (uint64_t)i));
    for (int64_t i = 0; i < blocks; i++)
        s[i] = scale / 100.0f * (0.5f + (float)fabs(rt_rng_normal(3, stream, (uint64_t)i)));
    return load(p, RT_E4M3, x, s, rows, cols);
}

void cuda_weight_free(struct cuda_pair *p, struct cuda_weight *w)
{
    p->ref.be->weight_free(p->ref.dev, w->ref);
    p->gpu.be->weight_free(p->gpu.dev, w->gpu);
    rt_free(w->data);
    rt_free(w->scale);
    *w = (struct cuda_weight){0};
}

struct cuda_quantised cuda_quantise(struct cuda_pair *p, const float *x, int64_t n, int64_t cols)
{
    struct rt_err err = {0};
    struct cuda_quantised q;
    const int64_t ld = rt_act_rows(n), blocks = cols / 128;
    uint8_t *codes;
    float *scale;
    assert_ok(rt_alloc((size_t)(n * cols), 1, "test", &q.ref.data, &err));
    assert_ok(rt_alloc((size_t)(n * blocks), sizeof(float), "test", &q.ref.scale, &err));
    assert_ok(RT_OP(&p->ref, quant, &err, .x = x, .q = q.ref, .n = n, .cols = cols));
    assert_ok(rt_alloc((size_t)(ld * cols), 1, "test", &codes, &err));
    assert_ok(rt_alloc((size_t)(ld * blocks), sizeof(float), "test", &scale, &err));
    memcpy(codes, q.ref.data, (size_t)(n * cols));
    for (int64_t b = 0; b < blocks; b++)
        memcpy(scale + b * ld, q.ref.scale + b * n, (size_t)n * sizeof *scale);
    q.gpu.data = cuda_bytes(p, codes, (size_t)(ld * cols));
    q.gpu.scale = cuda_bytes(p, scale, (size_t)(ld * blocks) * sizeof *scale);
    rt_free(codes);
    rt_free(scale);
    return q;
}

void cuda_quantised_free(struct cuda_pair *p, struct cuda_quantised *q)
{
    rt_free(q->ref.data);
    rt_free(q->ref.scale);
    cuda_free(p, q->gpu.data);
    cuda_free(p, q->gpu.scale);
}

void cuda_close(const char *what, const float *got, const float *want, int64_t rows, int64_t cols, double bound, double row_bound)
{
    double num = 0, den = 0, worst = 0;
    for (int64_t r = 0; r < rows; r++) {
        double a = 0, b = 0;
        for (int64_t c = 0; c < cols; c++) {
            const double d = (double)got[r * cols + c] - (double)want[r * cols + c];
            a += d * d;
            b += (double)want[r * cols + c] * (double)want[r * cols + c];
        }
        num += a;
        den += b;
        const double e = b > 0 ? sqrt(a / b) : a > 0 ? INFINITY : sqrt(a);
        worst = e > worst || isnan(e) ? e : worst;
    }
    const double e = den > 0 ? sqrt(num / den) : sqrt(num);
    print_message("    %-44s %.3e (worst row %.3e)\n", what, e, worst);
    if (!(e <= bound))
        fail_msg("%s: error %g, bound %g", what, e, bound);
    if (row_bound > 0 && !(worst <= row_bound))
        fail_msg("%s: worst row %g, bound %g", what, worst, row_bound);
}
