/* Pairs of a head that a rotation turns. For .cu files alone. */
#ifndef RT_CORE_CUDA_TURN_CUH
#define RT_CORE_CUDA_TURN_CUH

#include "core/cuda/vec8.cuh"

namespace {

typedef __nv_bfloat16 bf16;

/* Elements j and j + d/2 of a head, N of each: the pairs of the rotation. */
template <int N> struct halves {
    float lo[N], hi[N];
};

template <int N> __device__ void load_halves(const bf16 *p, int half, struct halves<N> *v)
{
    vec8::load<N>(p, v->lo);
    vec8::load<N>(p + half, v->hi);
}

template <int N> __device__ void store_halves(bf16 *p, int half, const struct halves<N> *v)
{
    vec8::store<N>(p, v->lo);
    vec8::store<N>(p + half, v->hi);
}

template <int N> struct angles {
    float cos[N], sin[N];
};

template <int N> __device__ void turn_by(const struct angles<N> &by, struct halves<N> *v)
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float u = v->lo[i], w = v->hi[i];
        v->lo[i] = u * by.cos[i] - w * by.sin[i];
        v->hi[i] = u * by.sin[i] + w * by.cos[i];
    }
}

/* Back by the angle; rounded the same wherever it stands. */
template <int N> __device__ void turn_back_by(const struct angles<N> &by, struct halves<N> *v)
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float u = v->lo[i], w = v->hi[i];
        v->lo[i] = fmaf(u, by.cos[i], __fmul_rn(w, by.sin[i]));
        v->hi[i] = fmaf(w, by.cos[i], -__fmul_rn(u, by.sin[i]));
    }
}

}

#endif
