/* Attention: checks, and which path a call takes. */
#include "core/cuda/attn.h"

#include "core/cuda/dnn.h"
#include "core/mem.h"

enum rt_status rt_cuda_attn_check(const struct rt_attn_shape *s, const char *op, struct rt_err *err)
{
    if (s->nh < 1 || s->nkv < 1 || s->nh % s->nkv != 0)
        return rt_fail(err, RT_SHAPE, "%s: %d query heads over %d key heads; expected a multiple", op, s->nh, s->nkv);
    if (s->dqk < 1 || s->dv < 1)
        return rt_fail(err, RT_SHAPE, "%s: heads of %d and %d elements", op, s->dqk, s->dv);
    if (s->n < 0 || s->n_seq < 0 || s->n > INT32_MAX || s->n_seq > INT32_MAX - 1 || (s->n_seq == 0 && s->n > 0))
        return rt_fail(err, RT_SHAPE, "%s: %lld sequences of %lld rows together", op, (long long)s->n_seq, (long long)s->n);
    for (int64_t i = 0; i < s->n_seq; i++)
        if (s->cu_seqlens[i + 1] < s->cu_seqlens[i])
            return rt_fail(err, RT_SHAPE, "%s: sequence %lld has length %lld", op, (long long)i,
                           (long long)s->cu_seqlens[i + 1] - s->cu_seqlens[i]);
    if (s->n_seq > 0 && (s->cu_seqlens[0] != 0 || s->cu_seqlens[s->n_seq] != s->n))
        return rt_fail(err, RT_SHAPE, "%s: sequences span rows %d .. %d, expected 0 .. %lld", op, (int)s->cu_seqlens[0],
                       (int)s->cu_seqlens[s->n_seq], (long long)s->n);
    if (!(s->scale > 0))
        return rt_fail(err, RT_UNSUPPORTED, "%s: scale %g; the GPU's kernels need a positive one", op, (double)s->scale);
    return RT_OK;
}

void rt_cuda_attn_dense(const struct rt_attn_shape *s, int64_t *q_ld, int64_t *q_head, int64_t *k_ld, int64_t *k_head, int64_t *v_ld,
                        int64_t *v_head)
{
    *q_head = *q_head != 0 ? *q_head : s->dqk;
    *k_head = *k_head != 0 ? *k_head : s->dqk;
    *v_head = *v_head != 0 ? *v_head : s->dv;
    *q_ld = *q_ld != 0 ? *q_ld : s->nh * *q_head;
    *k_ld = *k_ld != 0 ? *k_ld : s->nkv * *k_head;
    *v_ld = *v_ld != 0 ? *v_ld : s->nkv * *v_head;
}

/* list: cu [n_seq + 1], then tile [n_seq + 1] */
static int64_t fill_seqs(const struct rt_attn_shape *shape, int rows, int32_t *list)
{
    int64_t tiles = 0;
    for (int64_t i = 0; i <= shape->n_seq; i++) {
        list[i] = shape->cu_seqlens[i];
        list[shape->n_seq + 1 + i] = (int32_t)tiles;
        if (i < shape->n_seq)
            tiles += ((int64_t)shape->cu_seqlens[i + 1] - shape->cu_seqlens[i] + rows - 1) / rows;
    }
    return tiles;
}

enum rt_status rt_cuda_seqs_make(struct rt_queue *q, const struct rt_attn_shape *shape, int rows, struct rt_cuda_seqs *s, int64_t *n_tile,
                                 struct rt_err *err)
{
    const size_t count = 2 * ((size_t)shape->n_seq + 1);
    int32_t *list = NULL;
    void *dev = NULL;
    enum rt_status st = RT_OK;
    s->n_seq = (int32_t)shape->n_seq;
    s->dev = NULL;
    if (shape->n_seq <= RT_CUDA_ATTN_INLINE) {
        *n_tile = fill_seqs(shape, rows, s->held);
    } else {
        RT_TRY(rt_cuda_not_recorded(q, "attention over more sequences than a launch carries", err));
        RT_TRY(rt_alloc(count, sizeof *list, "a list of sequences", &list, err));
        *n_tile = fill_seqs(shape, rows, list);
        RT_TRY(rt_cuda_temp(q, count * sizeof *list, &dev, err));
        /* from pageable memory: read before the call returns */
        RT_CUDA_TRY(cudaMemcpyAsync(dev, list, count * sizeof *list, cudaMemcpyHostToDevice, q->stream));
        s->dev = dev;
        dev = NULL;
    }
    if (*n_tile * shape->nh > INT32_MAX) {
        rt_cuda_temp_free(q, (void *)(uintptr_t)s->dev);
        RT_FAIL(err, UNSUPPORTED, "attention over %lld tiles of %d heads in one call", (long long)*n_tile, shape->nh);
    }
out:
    rt_cuda_temp_free(q, dev);
    rt_free(list);
    return st;
}

/* Shared memory that a block of the own kernels may take. */
static enum rt_status shared_of(const struct rt_dev *dev, enum rt_cuda_attn_path path, int *bytes, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *bytes = 99 << 10;
    if (path != RT_CUDA_ATTN_SMALL)
        RT_CUDA_TRY(cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, dev->index));
out:
    return st;
}

/* What AUTO tries, in this order: the kernels for compute capability 9.0 were ahead of cuDNN 9 on an H200 at every shape of bench_cuda_attn. */
static int order_of(enum rt_cuda_attn_path path, enum rt_cuda_attn_path order[3])
{
    order[0] = path != RT_CUDA_ATTN_AUTO ? path : RT_CUDA_ATTN_HOPPER;
    order[1] = RT_CUDA_ATTN_CUDNN;
    order[2] = RT_CUDA_ATTN_OWN;
    return path != RT_CUDA_ATTN_AUTO ? 1 : 3;
}

/* Keys in one part, queries rotated, no codes. */
static enum rt_status fwd_plain(enum rt_cuda_attn_path path, struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_fwd_args *a,
                                struct rt_err *err)
{
    enum rt_cuda_attn_path order[3];
    enum rt_status st = RT_OK;
    bool done = false;
    int shared;
    const int n = order_of(path, order);
    for (int i = 0; i < n && !done; i++)
        switch (order[i]) {
        case RT_CUDA_ATTN_HOPPER: RT_TRY(rt_cuda_attn_fwd_hopper(q, a, &done, err)); break;
        case RT_CUDA_ATTN_CUDNN: RT_TRY(rt_cuda_dnn_attn_fwd(dev, q, a, path == RT_CUDA_ATTN_CUDNN, &done, err)); break;
        default:
            RT_TRY(shared_of(dev, order[i], &shared, err));
            RT_TRY(rt_cuda_attn_fwd_own(q, a, shared, err));
            done = true;
        }
    if (!done)
        RT_FAIL(err, UNSUPPORTED, "attn_fwd: no kernel of compute capability 9.0 for heads of %d and %d elements", a->s.dqk, a->s.dv);
out:
    return st;
}

/* The rows of whole sequences as a call of their own; cu [n_seq + 1] for its sequences. */
static struct rt_attn_fwd_args fwd_part(const struct rt_attn_fwd_args *a, int64_t seq0, int64_t seq1, int32_t *cu)
{
    typedef uint16_t act;
    struct rt_attn_fwd_args b = *a;
    const int64_t row = a->s.cu_seqlens[seq0];
    for (int64_t i = seq0; i <= seq1; i++)
        cu[i - seq0] = a->s.cu_seqlens[i] - (int32_t)row;
    b.s.cu_seqlens = cu, b.s.n_seq = seq1 - seq0, b.s.n = cu[seq1 - seq0];
    b.q = (const act *)a->q + row * a->q_ld, b.k = (const act *)a->k + row * a->k_ld, b.v = (const act *)a->v + row * a->v_ld;
    b.k_pe = (const act *)a->k_pe + row * a->k_pe_ld, b.o = (act *)a->o + row * a->s.nh * a->s.dv;
    return b;
}

/* Keys put together in temporary memory, of as many sequences as the scratch holds; of all where log-sum-exps are asked for, whose rows are n long. */
static enum rt_status fwd_together(enum rt_cuda_attn_path path, struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_fwd_args *a,
                                   struct rt_err *err)
{
    const int64_t key = (int64_t)a->s.nkv * a->s.dqk, fit = a->lse != NULL ? INT64_MAX : (int64_t)(dev->scratch / ((uint64_t)key * 2));
    const int32_t *cu = a->s.cu_seqlens;
    int32_t *list = NULL;
    void *k = NULL;
    enum rt_status st;
    RT_TRY(rt_alloc((size_t)a->s.n_seq + 1, sizeof *list, "a list of sequences", &list, err));
    for (int64_t s0 = 0, s1; s0 < a->s.n_seq; s0 = s1) {
        for (s1 = s0 + 1; s1 < a->s.n_seq && cu[s1 + 1] - cu[s0] <= fit; s1++)
            ;
        struct rt_attn_fwd_args b = fwd_part(a, s0, s1, list);
        RT_TRY(rt_cuda_temp(q, (size_t)(b.s.n * key) * 2, &k, err));
        RT_TRY(rt_cuda_attn_keys(q, &b, k, err));
        b.k = k, b.k_head = a->s.dqk, b.k_ld = key, b.k_pe = NULL;
        if (b.s.n > 0)
            RT_TRY(fwd_plain(path, dev, q, &b, err));
        rt_cuda_temp_free(q, k);
        k = NULL;
    }
out:
    rt_cuda_temp_free(q, k);
    rt_free(list);
    return st;
}

enum rt_status rt_cuda_attn_fwd_by(enum rt_cuda_attn_path path, struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_fwd_args *a,
                                   struct rt_err *err)
{
    struct rt_attn_fwd_args b = *a;
    enum rt_status st;
    bool done = false;
    RT_TRY(rt_cuda_attn_check(&b.s, "attn_fwd", err));
    if ((b.k_pe != NULL || b.cos != NULL) && (b.dr < 1 || b.dr >= b.s.dqk))
        RT_FAIL(err, SHAPE, "attn_fwd: %d elements of a head of %d lie apart or are rotated", b.dr, b.s.dqk);
    if (b.oq.data != NULL && (int64_t)b.s.nh * b.s.dv % 128 != 0)
        RT_FAIL(err, SHAPE, "attn_fwd: %d heads of %d; the e4m3 form needs a multiple of 128 columns", b.s.nh, b.s.dv);
    b.k_head = b.k_head != 0 ? b.k_head : b.s.dqk - (b.k_pe != NULL ? b.dr : 0);
    b.k_pe_ld = b.k_pe_ld != 0 ? b.k_pe_ld : b.dr;
    rt_cuda_attn_dense(&b.s, &b.q_ld, &b.q_head, &b.k_ld, &b.k_head, &b.v_ld, &b.v_head);
    if (b.s.n == 0)
        goto out;
    if ((path == RT_CUDA_ATTN_AUTO || path == RT_CUDA_ATTN_HOPPER) && (b.k_pe != NULL || b.oq.data != NULL || b.cos != NULL))
        RT_TRY(rt_cuda_attn_fwd_hopper(q, &b, &done, err));
    if (done)
        goto out;
    if (b.cos != NULL)
        RT_TRY(rt_cuda_rope(dev, q, &(const struct rt_rope_args){.x = (uint16_t *)(uintptr_t)b.q + (b.s.dqk - b.dr), .ld = b.q_ld, .head_ld = b.q_head,
                                                                 .cos = b.cos, .sin = b.sin, .position = b.position, .n = b.s.n, .heads = b.s.nh,
                                                                 .dim = b.dr, .interleaved = true}, err));
    b.cos = NULL;
    b.oq = (struct rt_act){0};
    RT_TRY(b.k_pe != NULL ? fwd_together(path, dev, q, &b, err) : fwd_plain(path, dev, q, &b, err));
    if (a->oq.data != NULL)
        RT_TRY(rt_cuda_quant(dev, q, &(const struct rt_quant_args){.x = b.o, .q = a->oq, .n = b.s.n, .cols = (int64_t)b.s.nh * b.s.dv, .pow2 = b.pow2},
                             err));
out:
    return st;
}

enum rt_status rt_cuda_attn_bwd_by(enum rt_cuda_attn_path path, struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_bwd_args *a,
                                   struct rt_err *err)
{
    struct rt_attn_bwd_args b = *a;
    enum rt_cuda_attn_path order[3];
    enum rt_status st;
    bool done = false;
    int shared;
    RT_TRY(rt_cuda_attn_check(&b.s, "attn_bwd", err));
    rt_cuda_attn_dense(&b.s, &b.q_ld, &b.q_head, &b.k_ld, &b.k_head, &b.v_ld, &b.v_head);
    if (b.s.n == 0)
        goto out;
    const int n = order_of(path, order);
    for (int i = 0; i < n && !done; i++)
        switch (order[i]) {
        case RT_CUDA_ATTN_HOPPER: RT_TRY(rt_cuda_attn_bwd_hopper(q, &b, &done, err)); break;
        case RT_CUDA_ATTN_CUDNN: RT_TRY(rt_cuda_dnn_attn_bwd(dev, q, &b, path == RT_CUDA_ATTN_CUDNN, &done, err)); break;
        default:
            RT_TRY(shared_of(dev, order[i], &shared, err));
            RT_TRY(rt_cuda_attn_bwd_own(q, &b, shared, err));
            done = true;
        }
    if (!done)
        RT_FAIL(err, UNSUPPORTED, "attn_bwd: no kernel of compute capability 9.0 for heads of %d and %d elements", b.s.dqk, b.s.dv);
out:
    return st;
}

enum rt_status rt_cuda_attn_fwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_fwd_args *a, struct rt_err *err)
{
    return rt_cuda_attn_fwd_by(RT_CUDA_ATTN_AUTO, dev, q, a, err);
}

enum rt_status rt_cuda_attn_bwd(struct rt_dev *dev, struct rt_queue *q, const struct rt_attn_bwd_args *a, struct rt_err *err)
{
    return rt_cuda_attn_bwd_by(RT_CUDA_ATTN_AUTO, dev, q, a, err);
}
