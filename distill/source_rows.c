#include "distill/source_rows.h"

#include <string.h>

#include "core/mem.h"

static bool take(size_t *bytes, size_t *at, size_t n, size_t size)
{
    size_t b;
    *at = *bytes;
    if (!rt_mul_size(n, size, &b) || b > SIZE_MAX / 2)
        return false;
    return rt_add_size(*bytes, rt_arena_round(b), bytes);
}

bool rt_rows_lay_out(const struct rt_rows *r, const struct rt_row_identity *id, bool features, struct rt_rows_layout *l)
{
    const size_t n = (size_t)r->n_tokens, rows = (size_t)r->n_rows;
    bool ok = true;
    *l = (struct rt_rows_layout){.bytes = rt_arena_round(sizeof(struct rt_rows))};
    ok &= take(&l->bytes, &l->ids, n, 4) && take(&l->bytes, &l->mask, n, 1) && take(&l->bytes, &l->position, rows, 4);
    ok &= take(&l->bytes, &l->top_ids, rows, 4 * (size_t)r->k) && take(&l->bytes, &l->top_logits, rows, 4 * (size_t)r->k);
    ok &= take(&l->bytes, &l->lse, rows, 4 * (size_t)r->n_lse);
    for (int f = 0; features && f < r->n_features; f++) {
        const struct rt_feature_spec *spec = &id->feature[f];
        ok &= take(&l->bytes, &l->feature[f], n, (size_t)spec->dim * rt_dtype_size(spec->dtype));
        ok &= take(&l->bytes, &l->scale[f], r->feature_scale[f] != NULL ? n : 0, 4);
    }
    ok &= take(&l->bytes, &l->span, r->span != NULL ? rows : 0, 4) && take(&l->bytes, &l->span_logp, r->span != NULL ? rows : 0, 4);
    ok &= take(&l->bytes, &l->paired, features && r->feature_mask != NULL ? n : 0, 1);
    return ok;
}

static const void *put(char *base, size_t at, const void *src, size_t bytes)
{
    if (bytes > 0)
        memcpy(base + at, src, bytes);
    return base + at;
}

enum rt_status rt_rows_copy(const struct rt_rows *r, const struct rt_row_identity *id, bool features, const struct rt_rows_layout *l, struct rt_rows **out,
                            struct rt_err *err)
{
    enum rt_status st;
    const size_t n = (size_t)r->n_tokens, rows = (size_t)r->n_rows, k = (size_t)r->k;
    struct rt_rows *copy;
    RT_TRY(rt_alloc(1, l->bytes, "a training sequence", &copy, err));
    char *base = (char *)copy;
    *copy = *r;
    copy->text = NULL;
    copy->byte_end = NULL;
    copy->next_id = NULL;
    copy->next_logprob = NULL;
    copy->next_rank = NULL;
    copy->ids = put(base, l->ids, r->ids, n * 4);
    copy->loss_mask = put(base, l->mask, r->loss_mask, n);
    copy->position = put(base, l->position, r->position, rows * 4);
    copy->topk_ids = put(base, l->top_ids, r->topk_ids, rows * k * 4);
    copy->topk_logits = put(base, l->top_logits, r->topk_logits, rows * k * 4);
    copy->lse = put(base, l->lse, r->lse, rows * (size_t)r->n_lse * 4);
    if (!features)
        copy->n_features = 0;
    for (int f = 0; f < copy->n_features; f++) {
        const struct rt_feature_spec *spec = &id->feature[f];
        copy->feature[f] = put(base, l->feature[f], r->feature[f], n * (size_t)spec->dim * rt_dtype_size(spec->dtype));
        if (r->feature_scale[f] != NULL)
            copy->feature_scale[f] = put(base, l->scale[f], r->feature_scale[f], n * 4);
    }
    copy->boundary_logp = NULL;
    if (r->span != NULL) {
        copy->span = put(base, l->span, r->span, rows * 4);
        copy->span_logp = put(base, l->span_logp, r->span_logp, rows * 4);
    }
    if (r->feature_mask != NULL)
        copy->feature_mask = features ? put(base, l->paired, r->feature_mask, n) : NULL;
    *out = copy;
out:
    return st;
}

/* A block of memory takes more than was asked for: rt_alloc's border, and malloc's. */
enum { BLOCK_BORDER = 128 };
size_t rt_rows_in_memory(const struct rt_rows_layout *l)
{
    return l->bytes + BLOCK_BORDER;
}
