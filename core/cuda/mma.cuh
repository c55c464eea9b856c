/* Pieces of the kernels of generation: asynchronous copies, the tensor cores' fragments, e4m3 codes as 16-bit floats. */
#ifndef RT_CORE_CUDA_MMA_CUH
#define RT_CORE_CUDA_MMA_CUH

#include <cuda_bf16.h>
#include <stdint.h>

namespace mma {

__device__ __forceinline__ uint32_t shared_at(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* 16 bytes to shared memory; zeros where not valid (src is a readable address all the same). */
__device__ __forceinline__ void copy16(uint32_t dst, const void *src, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4(uint32_t dst, const void *src)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ uint4 load16(uint32_t at)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}

/* Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. */
__device__ __forceinline__ void ldsm(uint32_t (&r)[4], uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void ldsm_t(uint32_t (&r)[4], uint32_t at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

/* c[16,8] += a[16,16] b[16,8]. Lane (g = lane/4, t = lane%4) holds a: rows g, g+8 of columns 2t, 2t+1, then of 2t+8, 2t+9; b: rows 2t, 2t+1,
 * then 2t+8, 2t+9 of column g; c: columns 2t, 2t+1 of row g, then of row g+8. */
__device__ __forceinline__ void bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi)
{
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

/* Two codes in the high bytes of both halves of v, as BF16: exponent and mantissa move to their places, which makes the number 2^-120 times
 * too small (subnormal codes become subnormal numbers), and one exact product puts that right. NaN codes come out as 480. */
__device__ __forceinline__ uint32_t spread_bf16(uint32_t v)
{
    const uint32_t small = (v & 0x80008000u) | ((v >> 4) & 0x07f007f0u);
    uint32_t r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(small), "r"(0x7b807b80u), "r"(0x80008000u));
    return r;
}
/* Codes 0, 1 and 2, 3 of the bytes of v. */
__device__ __forceinline__ void e4m3_to_bf16(uint32_t v, uint32_t &lo, uint32_t &hi)
{
    lo = spread_bf16(__byte_perm(v, 0, 0x1404));
    hi = spread_bf16(__byte_perm(v, 0, 0x3424));
}
__device__ __forceinline__ void e4m3_to_f16(uint32_t v, uint32_t &lo, uint32_t &hi)
{
#if __CUDA_ARCH__ >= 890
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}" : "=r"(lo), "=r"(hi) : "r"(v));
#else
    const uint32_t a = __byte_perm(v, 0, 0x1404), b = __byte_perm(v, 0, 0x3424);
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(lo) : "r"((a & 0x80008000u) | ((a >> 1) & 0x3f803f80u)), "r"(0x5c005c00u), "r"(0x80008000u));
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(hi) : "r"((b & 0x80008000u) | ((b >> 1) & 0x3f803f80u)), "r"(0x5c005c00u), "r"(0x80008000u));
#endif
}

}

#endif
