/* Barriers, bulk tensor copies and asynchronous products of compute capability 9.0, as PTX. One line of the ISA each. */
#ifndef RT_CORE_CUDA_HOPPER_CUH
#define RT_CORE_CUDA_HOPPER_CUH

#include <stdint.h>

namespace hopper {

__device__ __forceinline__ uint32_t smem(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(uint32_t bar, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals));
}
/* Inits are visible to the copy engine and to the cluster. */
__device__ __forceinline__ void barrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t bar, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
/* Arrives on the barrier at the same place in block `rank` of the cluster. Orders what the async proxy read before it (a tile that may be
 * overwritten), not the thread's own accesses: release at the scope of the cluster would wait for all of those. */
__device__ __forceinline__ void barrier_arrive_at(uint32_t bar, uint32_t rank)
{
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(bar), "r"(rank));
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}
/* What bulk copies brought is visible; scope as above. */
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n"
                 "bra again;\n"
                 "done:\n"
                 "}" ::"r"(bar), "r"(parity) : "memory");
}

/* The same with an end: a wait that takes so long is a defect, and better a trap than a GPU that hangs. */
__device__ __forceinline__ void wait_or_trap(uint32_t bar, uint32_t parity)
{
#pragma unroll 1
    for (uint32_t tries = 0; tries < 1u << 24; tries++) {
        uint32_t done;
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(bar), "r"(parity) : "memory");
        if (done)
            return;
    }
    __trap();
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
/* One arrival for all that the warp did. */
__device__ __forceinline__ void barrier_arrive_warp(uint32_t bar)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        barrier_arrive(bar);
}

__device__ __forceinline__ uint32_t cluster_rank()
{
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* A descriptor in global memory that an earlier copy wrote. */
__device__ __forceinline__ void tensormap_acquire(const void *map)
{
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}
/* Box at column x, row y of a matrix into shared memory. */
__device__ __forceinline__ void load_box(uint32_t dst, const void *map, int x, int y, uint32_t bar)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(dst), "l"(map),
                 "r"(bar), "r"(x), "r"(y) : "memory");
}
/* Bytes, a multiple of 16 between addresses that are. */
__device__ __forceinline__ void load_bytes(uint32_t dst, const void *src, int bytes, uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src), "r"(bytes), "r"(bar)
                 : "memory");
}
/* 16 bytes by this thread, in the background; zeros where they are not `valid`. */
__device__ __forceinline__ void copy16(uint32_t dst, const void *src, bool valid)
{
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
/* Arrives, one of the arrivals that the barrier counts, when this thread's copies so far are there. */
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
/* Between what threads wrote to shared memory and what the copy engine or the tensor cores read of it. */
__device__ __forceinline__ void fence_async()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ float load_float(uint32_t at)
{
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
    return x;
}
/* The same box into every block of the cluster in `mask`, at the same place, each block's own barrier counting the bytes. */
__device__ __forceinline__ void load_box_multicast(uint32_t dst, const void *map, int x, int y, uint32_t bar, uint16_t mask)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(dst), "l"(map), "r"(bar), "r"(x), "r"(y), "h"(mask) : "memory");
}

template <int REGS> __device__ __forceinline__ void registers_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGS));
}
template <int REGS> __device__ __forceinline__ void registers_fewer()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGS));
}

/* Operand in shared memory, rows of 128 bytes in the 128-byte swizzle, groups of 8 rows 1024 bytes apart (PTX ISA, matrix descriptor). */
__device__ __forceinline__ uint64_t descriptor(uint32_t addr)
{
    return (uint64_t)((addr & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
/* Columns of the product contiguous (rows of the tile are summed over); blocks of 64 columns `block` bytes apart. */
__device__ __forceinline__ uint64_t descriptor_t(uint32_t addr, uint32_t block)
{
    return (uint64_t)((addr & 0x3ffff) >> 4) | (uint64_t)(block >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
__device__ __forceinline__ void mma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void mma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT> __device__ __forceinline__ void mma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#define RT_R8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
/* d [64 x 128] (+)= a [64 x 32] b [128 x 32]^T, e4m3, float32 sums; `add` 0: d begins at 0. Lane l of warp w holds row 16 w + l/4 (d[4 j + 0, 1]) and
 * row + 8 (d[4 j + 2, 3]), columns 8 j + 2 (l % 4) and the next. */
__device__ __forceinline__ void mma_e4m3_64x128x32(float (&d)[64], uint64_t a, uint64_t b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
                 "%28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, "
                 "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1;\n}"
                 : RT_R8(d, 0), RT_R8(d, 8), RT_R8(d, 16), RT_R8(d, 24), RT_R8(d, 32), RT_R8(d, 40), RT_R8(d, 48), RT_R8(d, 56)
                 : "l"(a), "l"(b), "r"(add));
}
#undef RT_R8

}

#endif
