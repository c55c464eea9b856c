/* What MLA does to heads: rope in place, and keys put together from two parts. */
#include "core/cuda/attn.h"
#include "core/cuda/rows.cuh"

namespace {

enum { THREADS = 256, AT_ONCE = 4 };

struct rope {
    bf16 *x;
    const float *cos, *sin;
    const int32_t *position;
    int64_t n, ld, head_ld;
    int heads, dim, units, heads_once, tokens; /* of a token: threads of a head, heads at a time; of a block: tokens */
    bool interleaved;
    float sign;                                /* -1: inverse */
};

__device__ __forceinline__ void load4(float (&x)[4], const float *p)
{
    const float4 v = __ldg((const float4 *)p);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

/* One vector of 8 elements: pairs (0,1) (2,3) .. of angles c[0..3]. */
__device__ __forceinline__ uint4 turn_pairs(const uint4 &v, const float (&c)[4], const float (&s)[4])
{
    float x[VEC], y[VEC];
    unpack(v, x);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        y[2 * i] = fmaf(x[2 * i], c[i], -(x[2 * i + 1] * s[i])); /* the same bits as in attn_fwd_sm90.cu */
        y[2 * i + 1] = fmaf(x[2 * i], s[i], x[2 * i + 1] * c[i]);
    }
    return pack(y);
}

/* Two vectors: element i of lo with element i of hi. */
__device__ __forceinline__ void turn_halves(uint4 &lo, uint4 &hi, const float (&c)[VEC], const float (&s)[VEC])
{
    float u[VEC], v[VEC], a[VEC], b[VEC];
    unpack(lo, u);
    unpack(hi, v);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        a[i] = u[i] * c[i] - v[i] * s[i];
        b[i] = u[i] * s[i] + v[i] * c[i];
    }
    lo = pack(a);
    hi = pack(b);
}

/* A thread keeps its angles and goes through every heads_once-th head of one token. */
template <bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS) rope_kernel(const __grid_constant__ struct rope p)
{
    enum { ANGLES = INTERLEAVED ? 4 : VEC };
    const int unit = (int)threadIdx.x % p.units, rest = (int)threadIdx.x / p.units;
    const int64_t t = (int64_t)blockIdx.x * p.tokens + rest / p.heads_once;
    if (rest >= p.heads_once * p.tokens || t >= p.n)
        return;
    const int64_t at = (int64_t)p.position[t] * (p.dim / 2) + unit * ANGLES;
    float c[ANGLES], s[ANGLES];
#pragma unroll
    for (int i = 0; i < ANGLES; i += 4) {
        load4(*(float(*)[4])(c + i), p.cos + at + i);
        load4(*(float(*)[4])(s + i), p.sin + at + i);
    }
#pragma unroll
    for (int i = 0; i < ANGLES; i++)
        s[i] *= p.sign;
    bf16 *x = p.x + t * p.ld + unit * VEC;
    for (int h0 = rest % p.heads_once; h0 < p.heads; h0 += AT_ONCE * p.heads_once) {
        uint4 lo[AT_ONCE], hi[INTERLEAVED ? 1 : AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int h = h0 + i * p.heads_once;
            if (h < p.heads)
                lo[i] = *(const uint4 *)(x + h * p.head_ld);
            if (!INTERLEAVED && h < p.heads)
                hi[i] = *(const uint4 *)(x + h * p.head_ld + p.dim / 2);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int h = h0 + i * p.heads_once;
            if (h >= p.heads)
                break;
            if constexpr (INTERLEAVED) {
                lo[i] = turn_pairs(lo[i], c, s);
            } else {
                turn_halves(lo[i], hi[i], c, s);
                *(uint4 *)(x + h * p.head_ld + p.dim / 2) = hi[i];
            }
            *(uint4 *)(x + h * p.head_ld) = lo[i];
        }
    }
}

/* Any dim and alignment: a thread a pair. */
__global__ void __launch_bounds__(THREADS) rope_slow_kernel(const __grid_constant__ struct rope p)
{
    const int64_t t = blockIdx.x;
    const int half = p.dim / 2;
    const int64_t at = (int64_t)p.position[t] * half;
    for (int j = (int)threadIdx.x; j < p.heads * half; j += THREADS) {
        const int h = j / half, i = j % half;
        bf16 *x = p.x + t * p.ld + h * p.head_ld;
        bf16 *lo = p.interleaved ? x + 2 * i : x + i, *hi = p.interleaved ? x + 2 * i + 1 : x + i + half;
        const float c = p.cos[at + i], s = p.sign * p.sin[at + i], u = __bfloat162float(*lo), v = __bfloat162float(*hi);
        *lo = __float2bfloat16_rn(u * c - v * s);
        *hi = __float2bfloat16_rn(u * s + v * c);
    }
}

struct concat {
    const bf16 *k, *k_pe;
    bf16 *out;
    int64_t n, k_ld, k_head, k_pe_ld;
    int heads, dn, dr, heads_once;
};

/* Unit: uint4 or bf16; all widths and ld count units. A block takes a token, a thread one unit of every heads_once-th head. */
template <class Unit>
__global__ void __launch_bounds__(1024) concat_kernel(const __grid_constant__ struct concat p)
{
    const int width = p.dn + p.dr, c = (int)threadIdx.x % width;
    const int64_t t = blockIdx.x;
    const Unit *k = (const Unit *)p.k + t * p.k_ld + c;
    Unit *out = (Unit *)p.out + t * p.heads * width + c;
    Unit pe = Unit();
    if (c >= p.dn)
        pe = ((const Unit *)p.k_pe)[t * p.k_pe_ld + c - p.dn];
    for (int h0 = (int)threadIdx.x / width; h0 < p.heads; h0 += AT_ONCE * p.heads_once) {
        Unit v[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int h = h0 + i * p.heads_once;
            v[i] = c < p.dn && h < p.heads ? k[h * p.k_head] : pe;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (h0 + i * p.heads_once < p.heads)
                out[(h0 + i * p.heads_once) * width] = v[i];
    }
}

bool concat_vectors(const struct concat &p)
{
    return p.dn % VEC == 0 && p.dr % VEC == 0 && p.k_ld % VEC == 0 && p.k_head % VEC == 0 && p.k_pe_ld % VEC == 0 && aligned16(p.k) &&
           aligned16(p.k_pe) && aligned16(p.out);
}

}

enum rt_status rt_cuda_rope(struct rt_dev *, struct rt_queue *q, const struct rt_rope_args *a, struct rt_err *err)
{
    struct rope p = {};
    p.x = (bf16 *)a->x;
    p.cos = a->cos;
    p.sin = a->sin;
    p.position = a->position;
    p.n = a->n;
    p.head_ld = ld_or(a->head_ld, a->dim);
    p.ld = ld_or(a->ld, a->heads * p.head_ld);
    p.heads = a->heads;
    p.dim = a->dim;
    p.interleaved = a->interleaved;
    p.sign = a->inverse ? -1.0f : 1.0f;
    p.units = a->dim / (a->interleaved ? VEC : 2 * VEC);
    if (a->n <= 0 || a->heads <= 0 || a->dim <= 0)
        return RT_OK;
    if (a->n > INT32_MAX)
        return rt_fail(err, RT_SHAPE, "rope: %lld rows; 2^31 - 1 at most", (long long)a->n);
    const bool vectors = a->dim % (a->interleaved ? VEC : 2 * VEC) == 0 && p.units <= THREADS && p.ld % VEC == 0 && p.head_ld % VEC == 0 &&
                         aligned16(p.x) && aligned16(p.cos) && aligned16(p.sin);
    if (!vectors) {
        rope_slow_kernel<<<(unsigned)a->n, THREADS, 0, q->stream>>>(p);
        return rt_cuda_launched("rope", err);
    }
    p.heads_once = a->heads < THREADS / p.units ? a->heads : THREADS / p.units;
    p.tokens = THREADS / (p.units * p.heads_once);
    const unsigned grid = (unsigned)((a->n + p.tokens - 1) / p.tokens);
    if (a->interleaved)
        rope_kernel<true><<<grid, THREADS, 0, q->stream>>>(p);
    else
        rope_kernel<false><<<grid, THREADS, 0, q->stream>>>(p);
    return rt_cuda_launched("rope", err);
}

enum rt_status rt_cuda_attn_keys(struct rt_queue *q, const struct rt_attn_fwd_args *a, void *k, struct rt_err *err)
{
    struct concat p = {};
    p.k = (const bf16 *)a->k;
    p.k_pe = (const bf16 *)a->k_pe;
    p.out = (bf16 *)k;
    p.n = a->s.n;
    p.k_ld = a->k_ld;
    p.k_head = a->k_head;
    p.k_pe_ld = a->k_pe_ld;
    p.heads = a->s.nkv;
    p.dn = a->s.dqk - a->dr;
    p.dr = a->dr;
    if (p.n <= 0)
        return RT_OK;
    const bool vectors = concat_vectors(p);
    if (vectors) {
        p.dn /= VEC;
        p.dr /= VEC;
        p.k_ld /= VEC;
        p.k_head /= VEC;
        p.k_pe_ld /= VEC;
    }
    const int width = p.dn + p.dr;
    if (width > 1024)
        return rt_fail(err, RT_UNSUPPORTED, "attn_fwd: keys of %d + %d elements", a->s.dqk - a->dr, a->dr);
    p.heads_once = 384 / width < 1 ? 1 : 384 / width > p.heads ? p.heads : 384 / width;
    const unsigned threads = (unsigned)(width * p.heads_once);
    if (vectors)
        concat_kernel<uint4><<<(unsigned)p.n, threads, 0, q->stream>>>(p);
    else
        concat_kernel<unsigned short><<<(unsigned)p.n, threads, 0, q->stream>>>(p);
    return rt_cuda_launched("attn_fwd: keys of two parts", err);
}
