/* Cross entropy and KL of rows of logits, a cluster of blocks a row.
 *
 * Each block of the cluster holds a part of the row in shared memory, brought by one bulk copy; several blocks lie on a multiprocessor, so that some
 * of them load or store while others compute. The ids of K are taken out (-inf in their place) before the part is summed, as in loss.cu; the parts' sums
 * are joined in the order of the blocks by every block for itself. Then the gradient is made from shared memory and written.
 *
 * One exponential an element and walk where T is 1 or 2: with u = 2^(z/T log2e - off_at),
 *   T = 1: dz = (off + ce 2^(off_at - ce_at)) u;   T = 2: dz = off u + ce 2^(2 off_at - ce_at) u^2.
 * u is at most 1 off K, and the factors cannot overflow: ce_at is at least off_at for T = 1, and 2 off_at - ce_at at most log2 V for T = 2.
 */
#include <cooperative_groups.h>

#include "core/cuda/hopper.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/loss_cluster.h"
#include "core/cuda/loss_terms.cuh"

namespace {

using namespace loss_row;
typedef __nv_bfloat16 bf16;

/* BLOCKS to a multiprocessor, of 227 KB. */
enum { THREADS = 256, MOST_BLOCKS = 8, PART_BYTES = 54 << 10, BLOCKS = 4 };
enum temperature { T_ANY, T_ONE, T_TWO };

/* Sums of a block, or of a row. */
struct sums {
    struct stat off;
    struct on_k on;
    float z_label;
};

/* Factors of the walk that writes: a u + b u^2, or the general form of coefficients. */
struct walk {
    struct coefficients c;
    float a, b;
};

struct block_shared {
    struct sums warp[THREADS / 32], part;
    struct walk w;
    uint64_t full;
};

/* The part of the row that this block holds, as bits of Z: elements first .. first + count - 1, count a multiple of 8. */
template <class Z> struct part {
    uint4 *cell;
    int first, count;
    __device__ Z *at(int id) const { return (Z *)cell + (id - first); }
    __device__ bool has(int id) const { return id >= first && id < first + count; }
};

template <enum temperature T> __device__ void add8_of(struct stat *s, const float z[8], int first, float scale)
{
    if (T != T_TWO) {
        add8<T == T_ANY>(s, z, first, scale);
        return;
    }
    float top = z[0];
#pragma unroll
    for (int i = 1; i < 8; i++)
        top = fmaxf(top, z[i]);
    if (top > s->max) {
        const float f = exp2_fast((s->max - top) * scale);
        s->sum *= f * f;
        s->sum_T *= f;
        s->max = top;
#pragma unroll
        for (int i = 7; i >= 0; i--)
            s->best = z[i] == top ? first + i : s->best;
    }
    if (s->max == -CUDART_INF_F && top == -CUDART_INF_F)
        return;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float e = exp2_fast((z[i] - s->max) * scale);
        s->sum_T += e;
        s->sum += e * e;
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ struct stat shuffle(const struct stat &s, int d)
{
    struct stat o;
    o.max = __shfl_xor_sync(0xffffffffu, s.max, d);
    o.sum = __shfl_xor_sync(0xffffffffu, s.sum, d);
    o.sum_T = __shfl_xor_sync(0xffffffffu, s.sum_T, d);
    o.best = __shfl_xor_sync(0xffffffffu, s.best, d);
    return o;
}

/* Over `width` lanes, lower lanes first. */
__device__ void join_lanes(struct sums *s, int width, bool has_kl, float scale)
{
    for (int d = 1; d < width; d *= 2) {
        const bool low = (threadIdx.x & (unsigned)d) == 0;
        const struct stat o = shuffle(s->off, d);
        s->off = low ? join(s->off, o, scale) : join(o, s->off, scale);
        if (!has_kl)
            continue;
        const struct stat k = shuffle(s->on.z, d);
        s->on.z = low ? join(s->on.z, k, scale) : join(k, s->on.z, scale);
        s->on.mass += __shfl_xor_sync(0xffffffffu, s->on.mass, d);
        s->on.cross += __shfl_xor_sync(0xffffffffu, s->on.cross, d);
    }
}

/* Over the block, in sh->part. */
__device__ void join_block(struct sums *s, bool has_kl, float scale, struct block_shared *sh)
{
    join_lanes(s, 32, has_kl, scale);
    if (threadIdx.x % 32 == 0)
        sh->warp[threadIdx.x / 32] = *s;
    __syncthreads();
    if (threadIdx.x < 32) {
        *s = sh->warp[threadIdx.x % (THREADS / 32)];
        join_lanes(s, THREADS / 32, has_kl, scale);
        if (threadIdx.x == 0)
            sh->part = *s;
    }
}
#endif

/* One of K: -1 for none, and for one of another part. */
struct entry {
    int32_t id;
    double logp, p;
};

template <class Z> __device__ struct entry entry_of(const struct rt_head_loss_args &a, int64_t i, int j, const struct part<Z> &p)
{
    struct entry e = {-1, 0, 0};
    if (j >= a.k)
        return e;
    const int32_t id = rt_head_loss_id(&a, i, j);
    if (id < 0 || !p.has(id))
        return e;
    e.id = id;
    e.logp = a.top_logp[i * a.k + j];
    e.p = exp(e.logp);
    return e;
}

/* The ids of K that lie in this part: their logits to zk [k], -inf to their places, their sums. first: entry_of this thread's number. */
template <class Z>
__device__ void take_k(const struct rt_head_loss_args &a, int64_t i, const struct entry &first, const struct part<Z> &p, float *zk, float scale, struct on_k *r)
{
    const double inv = 1 / a.T;
    for (int j = (int)threadIdx.x; j < a.k; j += THREADS) {
        const struct entry e = j == (int)threadIdx.x ? first : entry_of(a, i, j, p);
        if (e.id < 0)
            continue;
        zk[j] = element(p.at(e.id));
        const struct stat one = {zk[j], 1, 1, e.id};
        r->z = join(r->z, one, scale);
        r->mass += e.p;
        r->cross += e.p > 0 ? e.p * (e.logp - (double)zk[j] * inv) : 0;
    }
    __syncthreads(); /* every logit of K, and the label's, has been read */
    for (int j = (int)threadIdx.x; j < a.k; j += THREADS) {
        const int32_t id = j == (int)threadIdx.x ? first.id : rt_head_loss_id(&a, i, j);
        if (id >= 0 && p.has(id))
            set_element(p.at(id), -CUDART_INF_F);
    }
}

/* One thread: the row's outputs (where `out`) and the factors of its gradient. */
template <enum temperature T>
__device__ void finish_sums(const struct rt_head_loss_args &a, int64_t i, int32_t label, bool has_kl, struct sums s, bool out, struct walk *w)
{
    if (T == T_ONE) {
        s.off.sum_T = s.off.sum;
        s.on.z.sum_T = s.on.z.sum;
    }
    finish_row(a, i, label, s.z_label, has_kl, s.off, s.on, out, &w->c);
    const struct coefficients c = w->c;
    w->a = c.off;
    w->b = 0;
    if (s.off.max == -CUDART_INF_F)
        w->a = 0; /* all ids are in K */
    else if (T == T_ONE)
        w->a = c.off + c.ce * exp2f(c.off_at - c.ce_at);
    else if (T == T_TWO)
        w->b = c.ce * exp2f(2 * c.off_at - c.ce_at);
}

template <enum temperature T> __device__ float gradient_of(const struct walk &w, float z, float scale)
{
    if (T == T_ANY)
        return gradient_off(w.c, z, scale);
    const float u = exp2_fast(z * scale - w.c.off_at);
    return T == T_ONE ? w.a * u : u * (w.a + w.b * u);
}

/* The entries on K and the label's, of this part. zk: of this part's ids. */
template <class Z>
__device__ void fix_part(const struct rt_head_loss_args &a, int64_t i, int32_t label, float z_label, bool has_kl, const struct part<Z> &p, const float *zk,
                         const struct coefficients &c, float scale, bf16 *dz)
{
    __shared__ int label_in_k;
    if (threadIdx.x == 0)
        label_in_k = 0;
    __syncthreads(); /* and the walk is done */
    for (int j = (int)threadIdx.x; has_kl && j < a.k; j += THREADS) {
        const int32_t id = rt_head_loss_id(&a, i, j);
        if (id < 0 || !p.has(id))
            continue;
        float g = c.on * exp2_fast(zk[j] * scale - c.on_at) - c.p * expf(a.top_logp[i * a.k + j]);
        g += c.ce * exp2_fast(zk[j] * LOG2E - c.ce_at);
        if (id == label) {
            g -= c.ce;
            label_in_k = 1;
        }
        dz[id] = __float2bfloat16_rn(g);
    }
    __syncthreads();
    if (threadIdx.x == 0 && label >= 0 && p.has(label) && !label_in_k)
        dz[label] = __float2bfloat16_rn(gradient_off(c, z_label, scale) - c.ce);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/* Every block reads the parts of all and makes the row's factors for itself. */
template <enum temperature T>
__device__ void join_cluster(const struct rt_head_loss_args &a, int64_t i, int32_t label, bool has_kl, float scale, struct block_shared *sh)
{
    namespace cg = cooperative_groups;
    cg::cluster_group cluster = cg::this_cluster();
    cluster.sync(); /* every part is there */
    if (threadIdx.x < 32) {
        const int blocks = (int)cluster.num_blocks(), lane = (int)threadIdx.x;
        struct sums s = {empty(), {empty(), 0, 0}, 0};
        if (lane < blocks)
            s = *cluster.map_shared_rank(&sh->part, lane);
        const float z = s.z_label; /* of the one block that has it; 0 of the others */
        join_lanes(&s, MOST_BLOCKS, has_kl, scale);
        s.z_label = vec8::warp_sum(z, MOST_BLOCKS);
        if (lane == 0)
            finish_sums<T>(a, i, label, has_kl, s, cluster.block_rank() == 0, &sh->w);
    }
}
#endif

template <class Z, enum temperature T>
__global__ void __launch_bounds__(THREADS, BLOCKS) loss_cluster_kernel(const struct rt_head_loss_args a, const struct rt_cuda_logits t, int in_part)
{
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900 /* else an empty kernel, which nothing starts */
    extern __shared__ uint4 cells[]; /* [in_part / 8], then float [k] */
    __shared__ struct block_shared sh;
    const int rank = (int)hopper::cluster_rank(), width = (int)(a.V + 7) / 8 * 8;
    const int64_t tile_row = blockIdx.x / cooperative_groups::this_cluster().num_blocks(), i = t.row0 + tile_row;
    struct part<Z> p = {cells, rank * in_part, 0};
    p.count = min(in_part, max(width - p.first, 0));
    float *zk = (float *)(void *)(cells + in_part / 8);
    const Z *z = (const Z *)t.z + tile_row * t.ldz;
    const uint32_t full = hopper::smem(&sh.full);
    if (threadIdx.x == 0) {
        hopper::barrier_init(full, 1);
        hopper::barrier_init_fence();
        hopper::barrier_expect(full, p.count * (int)sizeof(Z));
        if (p.count > 0)
            hopper::load_bytes(hopper::smem(cells), z + p.first, p.count * (int)sizeof(Z), full);
    }
    const int32_t label = a.label[i];
    const bool has_kl = a.k > 0 && a.kl_mask != NULL && a.kl_mask[i] != 0;
    const float scale = (float)(1.4426950408889634 / a.T);
    struct sums s = {empty(), {empty(), 0, 0}, 0};
    struct entry first = {-1, 0, 0};
    if (has_kl) /* while the part arrives */
        first = entry_of(a, i, (int)threadIdx.x, p);
    __syncthreads(); /* the barrier is there */
    hopper::barrier_wait(full, 0);
    const float z_label = label >= 0 && p.has(label) ? element(p.at(label)) : 0;
    if (has_kl)
        take_k(a, i, first, p, zk, scale, &s.on);
    if (p.first + p.count > a.V && threadIdx.x < 8 && p.first + p.count - 8 + (int)threadIdx.x >= a.V) /* behind the row's end */
        set_element(p.at(p.first + p.count - 8 + (int)threadIdx.x), -CUDART_INF_F);
    __syncthreads();
    for (int at = (int)threadIdx.x; at < p.count / 8; at += THREADS) {
        float x[8];
        widen<Z>(p.cell[at], x);
        add8_of<T>(&s.off, x, p.first + at * 8, scale);
    }
    s.z_label = z_label;
    join_block(&s, has_kl, scale, &sh);
    join_cluster<T>(a, i, label, has_kl, scale, &sh);
    __syncthreads();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); /* this block has read the others' parts */
    const struct walk w = sh.w;
    bf16 *dz = (bf16 *)t.dz + tile_row * t.ldz;
    const bool none = T == T_ANY ? w.c.off == 0 && w.c.ce == 0 : w.a == 0 && w.b == 0;
    for (int at = (int)threadIdx.x; at < p.count / 8; at += THREADS) {
        float x[8] = {};
        if (!none) {
            widen<Z>(p.cell[at], x);
#pragma unroll
            for (int j = 0; j < 8; j++)
                x[j] = gradient_of<T>(w, x[j], scale);
        }
        vec8::store<8>(dz + p.first + at * 8, x);
    }
    fix_part(a, i, label, z_label, has_kl, p, zk, w.c, scale, dz);
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); /* nobody reads this block's part any more */
#endif
}

struct shape {
    unsigned blocks;
    int in_part; /* elements of a block, a multiple of 8 */
    size_t shared;
};

struct shape shape_of(const struct rt_head_loss_args *a)
{
    const int64_t width = (a->V + 7) / 8 * 8;
    int64_t blocks = (width * 2 + PART_BYTES - 1) / PART_BYTES;
    blocks = blocks > MOST_BLOCKS ? MOST_BLOCKS : blocks;
    const int64_t in_part = ((width + blocks - 1) / blocks + 7) / 8 * 8;
    const struct shape s = {(unsigned)blocks, (int)in_part, (size_t)in_part * 2 + (size_t)(a->k > 0 ? a->k : 0) * sizeof(float)};
    return s;
}

template <class Z, enum temperature T>
enum rt_status launch_rows(struct rt_queue *q, const struct rt_head_loss_args *a, const struct rt_cuda_logits *t, struct rt_err *err)
{
    enum rt_status st;
    const struct shape s = shape_of(a);
    RT_CUDA_TRY(cudaFuncSetAttribute((const void *)loss_cluster_kernel<Z, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)s.shared));
    RT_CUDA_TRY(launch_as(q, false, loss_cluster_kernel<Z, T>, dim3((unsigned)t->rows * s.blocks), dim3(THREADS), s.shared, (int)s.blocks, *a, *t, s.in_part));
out:
    return st;
}

template <class Z> enum rt_status launch_for(struct rt_queue *q, const struct rt_head_loss_args *a, const struct rt_cuda_logits *t, struct rt_err *err)
{
    if (a->T == 1)
        return launch_rows<Z, T_ONE>(q, a, t, err);
    return a->T == 2 ? launch_rows<Z, T_TWO>(q, a, t, err) : launch_rows<Z, T_ANY>(q, a, t, err);
}

}

bool rt_cuda_loss_cluster_fits(const struct rt_dev *dev, const struct rt_head_loss_args *a, const struct rt_cuda_logits *t)
{
    const size_t most = (size_t)dev->block_shared;
    return dev->cc == 90 && t->dz != NULL && t->type != RT_F32 && a->V < INT32_MAX - 16 && t->rows <= INT32_MAX / MOST_BLOCKS &&
           shape_of(a).shared + sizeof(struct block_shared) + 1024 <= most;
}

enum rt_status rt_cuda_loss_cluster(struct rt_queue *q, const struct rt_head_loss_args *a, const struct rt_cuda_logits *t, struct rt_err *err)
{
    return t->type == RT_F16 ? launch_for<__half>(q, a, t, err) : launch_for<bf16>(q, a, t, err);
}
