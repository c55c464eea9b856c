/* AdamW over a block of parameters in one launch.
 *
 * 26 bytes an element with split parameters and float32 moments (p 2+2, low 2+2, grad 2, m 4+4, v 4+4), 18 with BF16 moments; it is as fast as memory
 * copies. Blocks are many and short-lived, so that those on the GPU at a time work on one stretch of each array: blocks that stay and stride drift
 * apart, which takes a tenth longer. Arithmetic is float32. Stochastic rounding adds 16 random bits below the kept half and cuts: its expectation is
 * the float32.
 */
#include <math.h>

#include "core/cuda/cuda.h"
#include "core/cuda/vec8.cuh"

namespace {

typedef __nv_bfloat16 bf16;
enum { THREADS = 256 };

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

/* The run of element i: how many ends are at or before it. */
__device__ int run_of(const struct step &s, int64_t i)
{
    int from = 0, to = s.n_decay;
    while (from < to) {
        const int mid = (from + to) / 2;
        if (s.decay_end[mid] <= i)
            from = mid + 1;
        else
            to = mid;
    }
    return from;
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

/* Is anything rounded by draws: p without its lower halves, or BF16 moments? */
template <bool LOW, class M> constexpr bool DRAWS = !LOW || sizeof(M) == 2;

/* A moment as it is stored, float32 or BF16. */
__device__ float as_float(float x) { return x; }
__device__ float as_float(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }
__device__ void keep(float *to, float x, uint32_t) { *to = x; }
__device__ void keep(uint16_t *to, float x, uint32_t bits) { *to = round_by(x, bits); }

template <bool LOW, class M> __device__ void update_one(const struct step &s, int64_t i)
{
    const uint32_t bits = DRAWS<LOW, M> ? draw(hash(s, i / 8), (int)(i % 8)) : 0;
    float p = join_halves(s.p[i], LOW ? s.low[i] : 0), m = as_float(((M *)s.m)[i]), v = as_float(((M *)s.v)[i]);
    update(s, __bfloat162float(s.grad[i]), decay_in(s, run_of(s, i)), &p, &m, &v);
    if (LOW)
        split(p, &s.p[i], &s.low[i]);
    else
        s.p[i] = round_by(p, bits * 0x9e3779b1u >> 16);
    keep((M *)s.m + i, m, bits);
    keep((M *)s.v + i, v, bits >> 16);
}

/* N elements of an array as they lie in memory, in one access. */
template <class T, int N> struct __align__(sizeof(T) * N) elements {
    T at[N];
};
template <int N, class T> __device__ __forceinline__ elements<T, N> load(const T *from)
{
    return *(const elements<T, N> *)(const void *)from;
}
template <int N, class T> __device__ __forceinline__ void store(T *to, const elements<T, N> &x)
{
    *(elements<T, N> *)(void *)to = x;
}

/* Elements i .. i + N - 1, all of which are read before anything is known of their decay. */
template <bool LOW, class M, int N> __device__ __forceinline__ void update_group(const struct step &s, int64_t i)
{
    elements<uint16_t, N> p = load<N>(s.p + i);
    const elements<uint16_t, N> grad = load<N>((const uint16_t *)s.grad + i);
    elements<M, N> m = load<N>((const M *)s.m + i), v = load<N>((const M *)s.v + i);
    elements<int16_t, N> low = {};
    if (LOW)
        low = load<N>(s.low + i);
    const int run = run_of(s, i);
    if (run < s.n_decay && i + N > s.decay_end[run]) { /* an end within */
        for (int j = 0; j < N; j++)
            update_one<LOW, M>(s, i + j);
        return;
    }
    const float decay = decay_in(s, run);
    const uint32_t octet = DRAWS<LOW, M> ? hash(s, i / 8) : 0;
#pragma unroll
    for (int j = 0; j < N; j++) {
        const uint32_t bits = DRAWS<LOW, M> ? draw(octet, (int)(i % 8) + j) : 0;
        float x = join_halves(p.at[j], low.at[j]), first = as_float(m.at[j]), second = as_float(v.at[j]);
        update(s, as_float(grad.at[j]), decay, &x, &first, &second);
        if (LOW)
            split(x, &p.at[j], &low.at[j]);
        else
            p.at[j] = round_by(x, bits * 0x9e3779b1u >> 16);
        keep(&m.at[j], first, bits);
        keep(&v.at[j], second, bits >> 16);
    }
    store(s.p + i, p);
    if (LOW)
        store(s.low + i, low);
    store((M *)s.m + i, m);
    store((M *)s.v + i, v);
}

/* N elements a thread; WIDE: arrays lie where a thread can have them in one access each. */
template <bool LOW, class M, int N, bool WIDE> __global__ void __launch_bounds__(THREADS) adamw_kernel(const struct step s)
{
    const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * N, end = vec8::smaller(i + N, s.n);
    if constexpr (WIDE)
        if (end == i + N) {
            update_group<LOW, M, N>(s, i);
            return;
        }
    for (int64_t j = i; j < end; j++)
        update_one<LOW, M>(s, j);
}

template <bool LOW, class M> void launch(struct rt_queue *q, const struct step *s)
{
    enum { N = 16 / sizeof(M) };
    const bool wide = vec8::aligned16(s->p) && vec8::aligned16(s->low) && vec8::aligned16(s->grad) && vec8::aligned16(s->m) && vec8::aligned16(s->v);
    const unsigned blocks = (unsigned)((s->n + THREADS * N - 1) / (THREADS * N));
    if (wide)
        adamw_kernel<LOW, M, N, true><<<blocks, THREADS, 0, q->stream>>>(*s);
    else
        adamw_kernel<LOW, M, N, false><<<blocks, THREADS, 0, q->stream>>>(*s);
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
        launch<true, float>(q, &s);
    else if (a->low != NULL)
        launch<true, uint16_t>(q, &s);
    else if (a->moment == RT_F32)
        launch<false, float>(q, &s);
    else
        launch<false, uint16_t>(q, &s);
    RT_TRY(rt_cuda_launched("adamw", err));
out:
    rt_cuda_temp_free(q, ends);
    return st;
}
