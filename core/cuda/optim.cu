/* AdamW over a block of parameters in one launch.
 *
 * Eight elements a thread; 26 bytes an element with split parameters and float32 moments (p 2+2, low 2+2, grad 2, m 4+4, v 4+4), 18 with BF16
 * moments. Arithmetic is float32. Stochastic rounding adds 16 random bits below the kept half and cuts: its expectation is the float32.
 */
#include <math.h>

#include "core/cuda/cuda.h"
#include "core/cuda/vec8.cuh"

namespace {

typedef __nv_bfloat16 bf16;

struct step {
    uint16_t *p;
    int16_t *low;
    const bf16 *grad;
    void *m, *v;
    int64_t n;
    const int64_t *decay_end;
    int n_decay;
    uint32_t key0, key1;
    float b1, b2, n1, n2, c1, c2, lr, eps, decay, scale; /* n = 1 - b; c = 1 / (1 - b^step) */
};

/* Random bits of eight elements from 8 `octet` on, under a key of the step: two rounds of the 32-bit finaliser of MurmurHash3. */
__device__ uint32_t hash(const struct step &s, int64_t octet)
{
    uint32_t h = (uint32_t)octet ^ s.key0;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    h ^= h >> 16 ^ (uint32_t)(octet >> 32) * 0x9e3779b9u ^ s.key1;
    h = (h ^ h >> 16) * 0x85ebca6bu;
    h = (h ^ h >> 13) * 0xc2b2ae35u;
    return h ^ h >> 16;
}
/* Those of the j-th: a finaliser once more (lowbias32, Wellons 2018). */
__device__ uint32_t draw(uint32_t h, int j)
{
    h += (uint32_t)j * 0x9e3779b9u;
    h = (h ^ h >> 16) * 0x7feb352du;
    h = (h ^ h >> 15) * 0x846ca68bu;
    return h ^ h >> 16;
}

/* x to bfloat16 by the lower 16 of random bits; what is not finite stays so. */
__device__ uint16_t round_by(float x, uint32_t bits)
{
    return (uint16_t)((__float_as_uint(x) + (fabsf(x) < INFINITY ? bits & 0xffffu : 0)) >> 16);
}

__device__ float join_halves(uint16_t high, int16_t low)
{
    return __uint_as_float(((uint32_t)high << 16) + (uint32_t)(int32_t)low);
}

__device__ void split(float x, uint16_t *high, int16_t *low)
{
    const uint32_t u = __float_as_uint(x);
    *high = (uint16_t)((u + 0x8000u) >> 16);
    *low = (int16_t)(u - ((uint32_t)*high << 16));
}

/* The run of element i, one at or behind `run`. A thread's elements ascend, most often within a run. */
__device__ int run_of(const struct step &s, int run, int64_t i)
{
    while (run < s.n_decay && i >= s.decay_end[run])
        run++;
    return run;
}

__device__ float decay_in(const struct step &s, int run)
{
    return s.decay_end == NULL || (run < s.n_decay && run % 2 == 0) ? s.decay : 0;
}

/* p, m, v of one element. Root and quotient are within two units in the last place: beside BF16 moments exact ones take longer than the memory. */
__device__ void update(const struct step &s, float grad, float decay, float *p, float *m, float *v)
{
    const float g = grad * s.scale;
    *m = s.b1 * *m + s.n1 * g;
    *v = s.b2 * *v + s.n2 * g * g;
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(*v * s.c2));
    *p -= s.lr * (__fdividef(*m * s.c1, root + s.eps) + decay * *p);
}

template <bool LOW, bool F32> __device__ void update_one(const struct step &s, int64_t i, float decay)
{
    const uint32_t bits = LOW && F32 ? 0 : draw(hash(s, i / 8), (int)(i % 8));
    float p = join_halves(s.p[i], LOW ? s.low[i] : 0);
    float m = F32 ? ((float *)s.m)[i] : __bfloat162float(((bf16 *)s.m)[i]), v = F32 ? ((float *)s.v)[i] : __bfloat162float(((bf16 *)s.v)[i]);
    update(s, __bfloat162float(s.grad[i]), decay, &p, &m, &v);
    if (LOW)
        split(p, &s.p[i], &s.low[i]);
    else
        s.p[i] = round_by(p, bits * 0x9e3779b1u >> 16);
    if (F32) {
        ((float *)s.m)[i] = m;
        ((float *)s.v)[i] = v;
    } else {
        ((uint16_t *)s.m)[i] = round_by(m, bits);
        ((uint16_t *)s.v)[i] = round_by(v, bits >> 16);
    }
}

/* Eight halves as they lie in 16 bytes. */
union eight {
    uint4 all;
    uint16_t at[8];
    int16_t low[8];
};

template <bool F32> __device__ void load_moment(const void *x, int64_t i, float out[8])
{
    if (F32)
        vec8::load<8>((const float *)x + i, out);
    else
        vec8::load<8>((const bf16 *)x + i, out);
}

template <bool F32> __device__ void store_moment(void *x, int64_t i, const float in[8], const uint32_t bits[8], int shift)
{
    if (F32) {
        float4 *to = (float4 *)(void *)((float *)x + i);
        to[0] = make_float4(in[0], in[1], in[2], in[3]);
        to[1] = make_float4(in[4], in[5], in[6], in[7]);
    } else {
        union eight e;
#pragma unroll
        for (int j = 0; j < 8; j++)
            e.at[j] = round_by(in[j], bits[j] >> shift);
        *(uint4 *)(void *)((uint16_t *)x + i) = e.all;
    }
}

template <bool LOW, bool F32> __device__ void update_eight(const struct step &s, int64_t i, float decay)
{
    float g[8], m[8], v[8];
    uint32_t bits[8];
    const uint32_t octet = LOW && F32 ? 0 : hash(s, i / 8);
    union eight high, low;
    high.all = *(const uint4 *)(const void *)(s.p + i);
    if (LOW)
        low.all = *(const uint4 *)(const void *)(s.low + i);
    vec8::load<8>(s.grad + i, g);
    load_moment<F32>(s.m, i, m);
    load_moment<F32>(s.v, i, v);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float p = join_halves(high.at[j], LOW ? low.low[j] : 0);
        bits[j] = LOW && F32 ? 0 : draw(octet, j);
        update(s, g[j], decay, &p, &m[j], &v[j]);
        if (LOW)
            split(p, &high.at[j], &low.low[j]);
        else
            high.at[j] = round_by(p, bits[j] * 0x9e3779b1u >> 16);
    }
    *(uint4 *)(void *)(s.p + i) = high.all;
    if (LOW)
        *(uint4 *)(void *)(s.low + i) = low.all;
    store_moment<F32>(s.m, i, m, bits, 0);
    store_moment<F32>(s.v, i, v, bits, 16);
}

template <bool LOW, bool F32, bool WIDE> __global__ void __launch_bounds__(256) adamw_kernel(const struct step s)
{
    int run = 0;
    for (int64_t i = ((int64_t)blockIdx.x * 256 + threadIdx.x) * 8; i < s.n; i += (int64_t)gridDim.x * 256 * 8) {
        const int64_t end = vec8::smaller(i + 8, s.n);
        run = run_of(s, run, i);
        if (WIDE && end == i + 8 && (run >= s.n_decay || end <= s.decay_end[run])) {
            update_eight<LOW, F32>(s, i, decay_in(s, run));
            continue;
        }
        for (int64_t j = i; j < end; j++)
            update_one<LOW, F32>(s, j, decay_in(s, run_of(s, run, j)));
    }
}

template <bool LOW, bool F32> void launch(struct rt_queue *q, const struct step *s)
{
    const bool wide = vec8::aligned16(s->p) && vec8::aligned16(s->low) && vec8::aligned16(s->grad) && vec8::aligned16(s->m) && vec8::aligned16(s->v);
    const unsigned blocks = (unsigned)vec8::smaller((s->n + 2047) / 2048, 32 * (int64_t)q->dev->sm_count);
    if (wide)
        adamw_kernel<LOW, F32, true><<<blocks, 256, 0, q->stream>>>(*s);
    else
        adamw_kernel<LOW, F32, false><<<blocks, 256, 0, q->stream>>>(*s);
}

/* splitmix64 (Steele et al. 2014): seed and step to a key. */
uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

struct step make_step(const struct rt_adamw_args *a)
{
    struct step s = {};
    const uint64_t key = mix(mix(a->seed + 0x9e3779b97f4a7c15u) + (uint64_t)a->step);
    s.p = (uint16_t *)a->p;
    s.low = (int16_t *)a->low;
    s.grad = (const bf16 *)a->grad;
    s.m = a->m;
    s.v = a->v;
    s.n = a->n;
    s.n_decay = a->decay_end != NULL ? a->n_decay : 0;
    s.key0 = (uint32_t)key;
    s.key1 = (uint32_t)(key >> 32);
    s.b1 = (float)a->beta1;
    s.b2 = (float)a->beta2;
    s.n1 = (float)(1 - a->beta1);
    s.n2 = (float)(1 - a->beta2);
    s.c1 = (float)(1 / (1 - pow(a->beta1, (double)a->step)));
    s.c2 = (float)(1 / (1 - pow(a->beta2, (double)a->step)));
    s.lr = (float)a->lr;
    s.eps = (float)a->eps;
    s.decay = (float)a->decay;
    s.scale = (float)a->grad_scale;
    return s;
}

}

enum rt_status rt_cuda_adamw(struct rt_dev *, struct rt_queue *q, const struct rt_adamw_args *a, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct step s = make_step(a);
    int64_t *ends = NULL;
    if (a->n <= 0)
        return RT_OK;
    if (a->moment != RT_F32 && a->moment != RT_BF16)
        RT_FAIL(err, UNSUPPORTED, "adamw: moments of type %s; expected F32 or BF16", rt_dtype_name(a->moment));
    if (a->decay_end != NULL) {
        RT_TRY(rt_cuda_not_recorded(q, "adamw with decay in parts", err));
        RT_TRY(rt_cuda_temp(q, (size_t)(a->n_decay + 1) * sizeof *ends, &ends, err));
        RT_CUDA_TRY(cudaMemcpyAsync(ends, a->decay_end, (size_t)a->n_decay * sizeof *ends, cudaMemcpyHostToDevice, q->stream));
        s.decay_end = ends;
    }
    if (a->low != NULL && a->moment == RT_F32)
        launch<true, true>(q, &s);
    else if (a->low != NULL)
        launch<true, false>(q, &s);
    else if (a->moment == RT_F32)
        launch<false, true>(q, &s);
    else
        launch<false, false>(q, &s);
    RT_TRY(rt_cuda_launched("adamw", err));
out:
    rt_cuda_temp_free(q, ends);
    return st;
}
