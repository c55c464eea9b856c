/* Values of parameters across the border of the device: from files, from the generator, to files. */
#include <stdlib.h>
#include <string.h>

#include "core/pool.h"
#include "core/collective.h"
#include "core/mem.h"
#include "core/rng.h"
#include "student/params.h"

enum { PIECE = 1 << 18 }; /* elements that are converted at a time */

/* float32 as a BF16 rounded to the nearest, halves away from zero, and what is left of its bits. */
static void split_halves(const float *src, int64_t n, uint16_t *high, int16_t *low)
{
    for (int64_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, &src[i], sizeof u);
        high[i] = (uint16_t)((u + 0x8000u) >> 16);
        low[i] = (int16_t)(uint16_t)(u - ((uint32_t)high[i] << 16));
    }
}

static void join_halves(const uint16_t *high, const int16_t *low, int64_t n, float *dst)
{
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = ((uint32_t)high[i] << 16) + (uint32_t)(int32_t)low[i];
        memcpy(&dst[i], &u, sizeof u);
    }
}

/* dst [n] of type t = src, rounded to the nearest. */
static enum rt_status narrow(void *dst, enum rt_dtype t, const float *src, int64_t n, struct rt_err *err)
{
    if (t == RT_F64) {
        for (int64_t i = 0; i < n; i++)
            ((double *)dst)[i] = src[i];
        return RT_OK;
    }
    return rt_from_f32(dst, t, src, (size_t)n) ? RT_OK : rt_fail(err, RT_INTERNAL, "no conversion from F32 to %s", rt_dtype_name(t));
}

/* Elements at .. at + n of data, with those of low from low_at on. Waits. */
static enum rt_status upload(const struct rt_device *d, const struct rt_param_block *b, int64_t at, int64_t low_at, int64_t n, const float *src,
                             struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char *tmp = NULL;
    const size_t size = rt_dtype_size(b->dtype), count = (size_t)n;
    char *to = (char *)b->data + (size_t)at * size;
    if (b->dtype == RT_F32) {
        RT_TRY(rt_device_upload(d, to, src, count * size, err));
    } else if (b->low != NULL) {
        RT_TRY(rt_alloc(count, 2 * size, "conversion of a parameter", &tmp, err));
        split_halves(src, n, (uint16_t *)(void *)tmp, (int16_t *)(void *)(tmp + count * size));
        RT_TRY(rt_device_upload(d, to, tmp, count * size, err));
        RT_TRY(rt_device_upload(d, (char *)b->low + (size_t)low_at * size, tmp + count * size, count * size, err));
    } else {
        RT_TRY(rt_alloc(count, size, "conversion of a parameter", &tmp, err));
        RT_TRY(narrow(tmp, b->dtype, src, n, err));
        RT_TRY(rt_device_upload(d, to, tmp, count * size, err));
    }
    RT_TRY(rt_device_sync(d, err));
out:
    rt_free(tmp);
    return st;
}

static enum rt_status download(const struct rt_device *d, const struct rt_param_block *b, int64_t at, int64_t low_at, int64_t n, float *dst,
                               struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char *tmp = NULL;
    const size_t size = rt_dtype_size(b->dtype), count = (size_t)n;
    const char *from = (const char *)b->data + (size_t)at * size;
    if (b->dtype == RT_F32) {
        RT_TRY(rt_device_download(d, dst, from, count * size, err));
        goto out;
    }
    RT_TRY(rt_alloc(count, 2 * size, "conversion of a parameter", &tmp, err));
    RT_TRY(rt_device_download(d, tmp, from, count * size, err));
    if (b->low != NULL) {
        RT_TRY(rt_device_download(d, tmp + count * size, (const char *)b->low + (size_t)low_at * size, count * size, err));
        join_halves((const uint16_t *)(const void *)tmp, (const int16_t *)(const void *)(tmp + count * size), n, dst);
    } else if (!rt_to_f32(dst, tmp, b->dtype, count)) {
        RT_FAIL(err, INTERNAL, "no conversion from %s to F32", rt_dtype_name(b->dtype));
    }
out:
    rt_free(tmp);
    return st;
}

enum rt_status rt_param_upload(const struct rt_device *d, void *block, const struct rt_param *p, int64_t first, int64_t n,
                               const float *src, struct rt_err *err)
{
    const struct rt_param_block b = rt_param_block(d, block);
    return upload(d, &b, p->offset + first, 0, n, src, err);
}

enum rt_status rt_param_download(const struct rt_device *d, const void *block, const struct rt_param *p, int64_t first, int64_t n,
                                 float *dst, struct rt_err *err)
{
    const struct rt_param_block b = rt_param_block(d, block);
    return download(d, &b, p->offset + first, 0, n, dst, err);
}

/* The tensor of an entry: name, shape and an element type that a student is read from. */
static enum rt_status find_tensor(const struct rt_tensors *t, const struct rt_param *e, const struct rt_tensor **out, struct rt_err *err)
{
    const struct rt_tensor_decl decl = rt_param_decl(e, RT_F32);
    return rt_tensors_get(t, e->name, RT_DT(RT_F32) | RT_DT(RT_F16) | RT_DT(RT_BF16), decl.ndim, decl.ne, out, err);
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* The elements of [at, at + n) in a part: *from of the block, *len of them, *own of what the rank keeps. */
static void overlap(int64_t at, int64_t n, const struct rt_param_part *part, int64_t *from, int64_t *len, int64_t *own)
{
    const int64_t end = smaller(at + n, part->first + part->n);
    *from = at > part->first ? at : part->first;
    *len = end > *from ? end - *from : 0;
    *own = part->at + (*from - part->first);
}

/* upload of what this rank holds of elements [at, at + n). */
static enum rt_status upload_own(const struct rt_device *d, const struct rt_param_block *b, int64_t at, int64_t n, const float *src, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int64_t from, len, own;
    if (b->shard.comm == NULL)
        return upload(d, b, at, at, n, src, err);
    for (int i = 0; i < b->shard.n_buckets; i++) {
        const struct rt_param_part part = rt_param_part(&b->shard, b->shard.rank, i);
        overlap(at, n, &part, &from, &len, &own);
        if (len > 0)
            RT_TRY(upload(d, b, b->whole ? from : own, own, len, src + (from - at), err));
    }
out:
    return st;
}

/* dst = elements [at, at + n) on rank 0, from the ranks that hold them; the others send theirs. */
static enum rt_status download_all(const struct rt_device *d, const struct rt_param_block *b, int64_t at, int64_t n, float *dst, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_param_shard *s = &b->shard;
    int64_t from, len, own;
    if (s->comm == NULL)
        return download(d, b, at, at, n, dst, err);
    for (int i = 0; i < s->n_buckets; i++) {
        if (s->start[i + 1] <= at || s->start[i] >= at + n)
            continue;
        for (int r = 0; r < s->size; r++) {
            const struct rt_param_part part = rt_param_part(s, r, i);
            overlap(at, n, &part, &from, &len, &own);
            if (len == 0)
                continue;
            if (r == s->rank)
                RT_TRY(download(d, b, b->whole ? from : own, own, len, dst + (from - at), err));
            if (r == s->rank && r > 0)
                RT_TRY(rt_comm_send(s->comm, 0, dst + (from - at), (size_t)len * sizeof *dst, err));
            if (s->rank == 0 && r > 0)
                RT_TRY(rt_comm_recv(s->comm, r, dst + (from - at), (size_t)len * sizeof *dst, err));
        }
    }
out:
    return st;
}

enum rt_status rt_params_load(const struct rt_params *p, const struct rt_device *d, struct rt_param_block block, const struct rt_tensors *t,
                              struct rt_err *err)
{
    enum rt_status st = RT_OK;
    float *piece = NULL;
    const size_t held = (size_t)(block.shard.comm != NULL ? block.shard.n : p->elements), all = block.whole ? (size_t)p->elements : held;
    RT_TRY(rt_alloc(PIECE, sizeof *piece, "loading", &piece, err));
    RT_TRY(rt_device_zero(d, block.data, all * rt_dtype_size(block.dtype), err));
    if (block.low != NULL)
        RT_TRY(rt_device_zero(d, block.low, held * sizeof(int16_t), err));
    for (int i = 0; i < p->n; i++) {
        const struct rt_param *e = &p->at[i];
        const struct rt_tensor *tensor = NULL;
        RT_TRY(find_tensor(t, e, &tensor, err));
        for (int64_t first = 0, n; first < rt_param_elements(e); first += n) {
            n = smaller(PIECE, rt_param_elements(e) - first);
            RT_TRY(rt_tensors_read_f32(t, tensor, first, n, piece, err));
            RT_TRY(upload_own(d, &block, e->offset + first, n, piece, err));
        }
    }
out:
    rt_free(piece);
    return st;
}

/* Elements [first, first + n) of an entry, drawn by several threads. */
struct drawn {
    const struct rt_param *e;
    float *out;
    double range;
    uint64_t seed, stream;
    int64_t first, n;
};
enum { DRAW = 8192 };

static void draw_item(void *ctx, int64_t item, int worker)
{
    const struct drawn *d = ctx;
    const int64_t end = smaller((item + 1) * DRAW, d->n);
    (void)worker;
    for (int64_t j = item * DRAW; j < end; j++)
        d->out[j] = d->e->kind == RT_PARAM_NORM
                        ? 1
                        : rt_bf16_to_f32(rt_f32_to_bf16((float)(d->range * rt_rng_normal(d->seed, d->stream, (uint64_t)(d->first + j)))));
}

enum rt_status rt_params_init(const struct rt_params *p, const struct rt_device *d, void *block, double initializer_range,
                              uint64_t seed, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_pool *pool = NULL;
    float *piece = NULL;
    RT_TRY(rt_alloc(PIECE, sizeof *piece, "initialisation", &piece, err));
    RT_TRY(rt_pool_create(p->elements > PIECE ? 0 : 1, &pool, err)); /* a normal takes 50 ns */
    RT_TRY(rt_device_zero(d, block, (size_t)p->elements * rt_device_act_size(d), err));
    for (int i = 0; i < p->n; i++) {
        const struct rt_param *e = &p->at[i];
        if (e->kind == RT_PARAM_BIAS)
            continue;
        const uint64_t stream = rt_rng_stream(e->name);
        for (int64_t first = 0, n; first < rt_param_elements(e); first += n) {
            n = smaller(PIECE, rt_param_elements(e) - first);
            rt_pool_run(pool, (n + DRAW - 1) / DRAW, draw_item, &(struct drawn){e, piece, initializer_range, seed, stream, first, n});
            RT_TRY(rt_param_upload(d, block, e, first, n, piece, err));
        }
    }
out:
    rt_pool_free(pool);
    rt_free(piece);
    return st;
}

enum rt_status rt_params_put(const struct rt_params *p, const struct rt_device *d, struct rt_param_block block, enum rt_dtype dtype,
                             rt_param_put_fn put, void *ctx, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    float *piece = NULL;
    void *out = NULL;
    RT_TRY(rt_alloc(PIECE, sizeof *piece, "saving", &piece, err));
    RT_TRY(rt_alloc(PIECE, sizeof *piece, "saving", &out, err));
    for (int i = 0; i < p->n; i++) {
        const struct rt_param *e = &p->at[i];
        for (int64_t first = 0, n; first < rt_param_elements(e); first += n) {
            n = smaller(PIECE, rt_param_elements(e) - first);
            RT_TRY(download_all(d, &block, e->offset + first, n, piece, err));
            if (rt_comm_rank(block.shard.comm) > 0)
                continue;
            if (!rt_from_f32(out, dtype, piece, (size_t)n))
                RT_FAIL(err, USAGE, "parameters are written as F32, F16 or BF16, not as %s", rt_dtype_name(dtype));
            RT_TRY(put(ctx, out, (uint64_t)n * rt_dtype_size(dtype), err));
        }
    }
out:
    rt_free(piece);
    rt_free(out);
    return st;
}

/* *same = whether two tensors of equal shape hold equal values. */
static enum rt_status equal_values(const struct rt_tensors *t, const struct rt_tensor *a, const struct rt_tensor *b, bool *same,
                                   struct rt_err *err)
{
    enum rt_status st = RT_OK;
    float *x = NULL, *y = NULL;
    const int64_t n_all = rt_tensor_elements(a);
    *same = rt_tensor_elements(b) == n_all;
    RT_TRY(rt_alloc(PIECE, sizeof *x, "comparing the head", &x, err));
    RT_TRY(rt_alloc(PIECE, sizeof *y, "comparing the head", &y, err));
    for (int64_t first = 0, n; *same && first < n_all; first += n) {
        n = smaller(PIECE, n_all - first);
        RT_TRY(rt_tensors_read_f32(t, a, first, n, x, err));
        RT_TRY(rt_tensors_read_f32(t, b, first, n, y, err));
        *same = memcmp(x, y, (size_t)n * sizeof *x) == 0;
    }
out:
    rt_free(x);
    rt_free(y);
    return st;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool known(const char *const *names, size_t n_names, const char *name)
{
    static const char old[] = ".rotary_emb.inv_freq"; /* in files of the first Llama 2 conversions */
    const size_t n = strlen(name), k = sizeof old - 1;
    return strcmp(name, "lm_head.weight") == 0 || (n > k && strcmp(name + n - k, old) == 0) ||
           bsearch(&name, names, n_names, sizeof *names, by_name) != NULL;
}

static enum rt_status warn_unknown(const struct rt_student_config *c, const struct rt_params *p, const struct rt_tensors *t,
                                   struct rt_log *log, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf list = {0};
    const char **names = NULL;
    int64_t n = 0;
    RT_TRY(rt_alloc((size_t)p->n, sizeof *names, "names of parameters", &names, err));
    for (int i = 0; i < p->n; i++)
        names[i] = p->at[i].name;
    qsort(names, (size_t)p->n, sizeof *names, by_name);
    for (int64_t i = 0; i < rt_tensors_count(t); i++) {
        const char *name = rt_tensors_at(t, i)->name;
        if (known(names, (size_t)p->n, name))
            continue;
        if (n++ < 8)
            RT_TRY(rt_buf_printf(&list, err, "%s%s", n == 1 ? "" : ", ", name));
    }
    if (n > 0)
        rt_warn(log, "%s: %lld tensors are not part of a %s student and are left out: %s%s", rt_tensors_path(t), (long long)n,
                rt_student_family_name(c->family), list.data, n > 8 ? ", ..." : "");
out:
    rt_free(names);
    rt_buf_free(&list);
    return st;
}

static enum rt_status check_head(struct rt_student_config *c, const struct rt_tensors *t, bool tie_missing_head, struct rt_log *log,
                                 struct rt_err *err)
{
    const struct rt_tensor *head = rt_tensors_find(t, "lm_head.weight"), *embed = rt_tensors_find(t, "model.embed_tokens.weight");
    if (c->tied && head != NULL && embed != NULL) {
        bool same = false;
        const enum rt_status st = equal_values(t, head, embed, &same, err);
        if (st != RT_OK)
            return st;
        if (!same)
            rt_warn(log, "%s: tie_word_embeddings is true, yet lm_head.weight differs from model.embed_tokens.weight; the latter is used",
                    rt_tensors_path(t));
    } else if (!c->tied && head == NULL) {
        if (!tie_missing_head)
            return rt_fail(err, RT_FORMAT, "%s: no tensor lm_head.weight, though tie_word_embeddings is false; set it to true in "
                           "config.json if the head is the embedding matrix", rt_tensors_path(t));
        c->tied = true;
        rt_warn(log, "%s: no lm_head.weight; the head is tied to the embeddings", rt_tensors_path(t));
    }
    return RT_OK;
}

enum rt_status rt_params_check_model(struct rt_student_config *c, const struct rt_tensors *t, bool tie_missing_head,
                                     struct rt_log *log, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_params p = {0};
    RT_TRY(check_head(c, t, tie_missing_head, log, err));
    RT_TRY(rt_params_create(c, &p, err));
    for (int i = 0; i < p.n; i++) {
        const struct rt_tensor *tensor = NULL;
        RT_TRY(find_tensor(t, &p.at[i], &tensor, err));
    }
    RT_TRY(warn_unknown(c, &p, t, log, err));
out:
    rt_params_free(&p);
    return st;
}
