#include "distill/micro.h"

#include <math.h>
#include <string.h>

#include "core/row_loops.h"
#include "core/mem.h"
#include "core/top_ids.h"

/* Of a row's ids. */
static size_t words_of(const struct rt_micro_options *o)
{
    return (size_t)rt_top_ids_words(o->k, rt_top_ids_bits(o->vocab));
}

size_t rt_micro_bytes(const struct rt_micro_options *o)
{
    size_t row = 4 + 4 + 1 + 4 * (size_t)o->k + 4 * words_of(o) + 4 + (o->spans ? 9 : 0), n;
    for (int i = 0; o->map != NULL && i < o->map->n; i++)
        row += 4 * (size_t)o->map->pair[i].dim;
    return rt_mul_size((size_t)o->tokens, row + 8 + sizeof(struct rt_micro_seq), &n) ? n : SIZE_MAX;
}

static enum rt_status take(const struct rt_micro_options *o, size_t n, size_t size, void *out_ptr_to_ptr, struct rt_err *err)
{
    enum rt_status st;
    void *p = NULL;
    size_t bytes;
    if (o->d == NULL)
        return rt_alloc(n, size, "a micro-batch", out_ptr_to_ptr, err);
    if (!rt_mul_size(n, size, &bytes))
        RT_FAIL(err, NOMEM, "a micro-batch of %ld tokens is too large", (long)o->tokens);
    RT_TRY(o->d->be->host_alloc(o->d->dev, bytes, &p, err));
    memcpy(out_ptr_to_ptr, &p, sizeof p);
out:
    return st;
}

static void give(const struct rt_micro_options *o, void *p)
{
    if (o->d == NULL)
        rt_free(p);
    else if (p != NULL)
        o->d->be->host_free(o->d->dev, p);
}

enum rt_status rt_micro_create(struct rt_micro *p, const struct rt_micro_options *o, struct rt_err *err)
{
    enum rt_status st;
    const size_t n = (size_t)o->tokens, k = (size_t)o->k;
    *p = (struct rt_micro){.o = *o, .id_bits = rt_top_ids_bits(o->vocab)};
    RT_TRY(take(o, n, sizeof *p->ids, &p->ids, err));
    RT_TRY(take(o, n + 1, sizeof *p->cu, &p->cu, err));
    RT_TRY(take(o, n, sizeof *p->seq, &p->seq, err));
    RT_TRY(take(o, n, sizeof *p->index, &p->index, err));
    RT_TRY(take(o, n, sizeof *p->label, &p->label, err));
    RT_TRY(take(o, n, 1, &p->kl_mask, err));
    RT_TRY(take(o, n * words_of(o), sizeof *p->top_ids, &p->top_ids, err));
    RT_TRY(take(o, n * k, sizeof *p->top_logp, &p->top_logp, err));
    RT_TRY(take(o, n, sizeof *p->feature_index, &p->feature_index, err));
    if (o->spans) {
        RT_TRY(take(o, n, sizeof *p->span, &p->span, err));
        RT_TRY(take(o, n, sizeof *p->span_logp, &p->span_logp, err));
        RT_TRY(take(o, n, 1, &p->span_boundary, err));
    }
    for (int i = 0; o->map != NULL && i < o->map->n; i++)
        RT_TRY(take(o, n * (size_t)o->map->pair[i].dim, sizeof(float), &p->feature[i], err));
out:
    if (st != RT_OK)
        rt_micro_free(p);
    return st;
}

void rt_micro_free(struct rt_micro *p)
{
    void *const all[] = {p->ids, p->cu, p->seq, p->index, p->label, p->kl_mask, p->top_ids, p->top_logp, p->feature_index, p->span, p->span_logp,
                         p->span_boundary};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        give(&p->o, all[i]);
    for (int i = 0; i < RT_MAX_FEATURES; i++)
        give(&p->o, p->feature[i]);
    *p = (struct rt_micro){0};
}

void rt_micro_clear(struct rt_micro *p)
{
    p->n = p->n_seq = p->rows = p->kl_rows = p->feature_rows = p->n_spans = 0;
}

static int ids_of(const struct rt_micro *p, const struct rt_rows *r)
{
    return p->o.use > 0 && p->o.use < r->k ? p->o.use : r->k;
}

/* log p of a stored row's ids at the teacher's temperature. lse -1: normalised over them. */
static void row_logp(const struct rt_micro *p, const struct rt_rows *r, int64_t row, int lse, float *out)
{
    const float *z = r->topk_logits + row * r->k;
    const double T = p->o.teacher_T;
    const int k = ids_of(p, r);
    double norm;
    if (lse >= 0) {
        norm = r->lse[row * r->n_lse + lse];
    } else {
        double sum = 0;
        for (int j = 0; j < k; j++)
            sum += exp(((double)z[j] - z[0]) / T);
        norm = z[0] / T + log(sum);
    }
    rt_row_logp(z, k, T, norm, out);
}

/* Entries from `from` on of a row are empty, and the row is written. */
static void fill_empty(struct rt_micro *p, int64_t row, struct rt_top_ids_row *ids, int from)
{
    for (int j = from; j < p->o.k; j++) {
        rt_top_ids_add(ids, -1);
        p->top_logp[row * p->o.k + j] = 0;
    }
    rt_top_ids_end(ids);
}
static void no_entries(struct rt_micro *p, int64_t row)
{
    struct rt_top_ids_row ids;
    rt_top_ids_begin(&ids, p->top_ids, p->o.k, p->id_bits, row);
    fill_empty(p, row, &ids, 0);
}

static enum rt_status add_teacher(struct rt_micro *p, const struct rt_rows *r, int64_t stored, int lse, int64_t row, const char *path,
                                  struct rt_err *err)
{
    const int k = p->o.k, stored_k = ids_of(p, r);
    const uint32_t *from = r->topk_ids + stored * r->k;
    struct rt_top_ids_row ids;
    if (stored_k > k)
        return rt_fail(err, RT_REFUSED, "%s: a row with %d ids, expected at most %d", path, stored_k, k);
    rt_top_ids_begin(&ids, p->top_ids, p->o.k, p->id_bits, row);
    for (int j = 0; j < stored_k; j++) {
        const bool entry = from[j] != RT_NO_ID;
        rt_top_ids_add(&ids, entry ? (int32_t)from[j] : -1);
        if (entry && from[j] >= (uint64_t)p->o.vocab)
            return rt_fail(err, RT_REFUSED, "%s: line %ld: teacher id %u, the student's vocabulary has %ld rows", path, (long)r->source_line, from[j],
                           (long)p->o.vocab);
    }
    row_logp(p, r, stored, lse, p->top_logp + row * k);
    fill_empty(p, row, &ids, stored_k);
    p->kl_mask[row] = 1;
    p->kl_rows++;
    return RT_OK;
}

/* The span that ends at a stored row, if one does. first: the sequence's first row here. */
static enum rt_status add_span(struct rt_micro *p, const struct rt_train_info *info, const struct rt_rows *r, int64_t stored, int64_t row, int64_t first,
                               struct rt_err *err)
{
    const int64_t n = r->span[stored], next = (int64_t)r->position[stored] + 1;
    if (n == 0)
        return RT_OK;
    if (n > row + 1 - first || p->index[row] - p->index[row + 1 - n] != n - 1)
        return rt_fail(err, RT_FORMAT, "%s: line %ld: a span of %ld rows ends at token %ld, and not all of them are targets", info->path, (long)r->source_line,
                       (long)n, (long)next);
    p->span[row] = (int32_t)n;
    p->span_logp[row] = r->span_logp[stored];
    p->span_boundary[row] = info->identity->boundary && stored + 1 < r->n_rows && r->position[stored + 1] == next && r->loss_mask[next + 1] != 0;
    p->n_spans++;
    return RT_OK;
}

/* The states of token t for each pair. */
static void add_states(struct rt_micro *p, const struct rt_row_identity *id, const struct rt_rows *r, const int *column, int64_t t,
                       int64_t token)
{
    for (int i = 0; i < p->o.map->n; i++) {
        const struct rt_feature_spec *spec = &id->feature[column[i]];
        const size_t dim = (size_t)spec->dim;
        float *out = p->feature[i] + (size_t)p->feature_rows * dim;
        rt_to_f32(out, (const char *)r->feature[column[i]] + (size_t)t * dim * rt_dtype_size(spec->dtype), spec->dtype, dim);
        if (r->feature_scale[column[i]] != NULL)
            for (size_t d = 0; d < dim; d++)
                out[d] *= r->feature_scale[column[i]][t];
    }
    p->feature_index[p->feature_rows++] = (int32_t)token;
}

/* Whether the sequence has every state of the map. */
static enum rt_status columns(const struct rt_micro *p, const struct rt_train_info *info, const struct rt_rows *r, int *column, bool *all,
                              struct rt_err *err)
{
    *all = p->o.map != NULL && p->o.map->n > 0 && info->identity != NULL;
    for (int i = 0; *all && i < p->o.map->n; i++) {
        const enum rt_status st = rt_feature_column(&p->o.map->pair[i], info->identity, info->path, &column[i], err);
        if (st != RT_OK)
            return st;
        *all = column[i] >= 0 && column[i] < r->n_features;
    }
    return RT_OK;
}

/* Row of token t: what it predicts, with neither span nor the teacher's entries yet. */
static int64_t add_row(struct rt_micro *p, const struct rt_rows *r, int64_t t)
{
    const int64_t row = p->rows++;
    p->index[row] = (int32_t)(p->n + t);
    p->label[row] = (int32_t)r->ids[t + 1];
    p->kl_mask[row] = 0;
    if (p->o.spans) {
        p->span[row] = p->span_boundary[row] = 0;
        p->span_logp[row] = 0;
    }
    return row;
}

enum rt_status rt_micro_put(struct rt_micro *p, const struct rt_train_set *set, const struct rt_order_item *item, const struct rt_rows *rows, bool *full,
                            struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_train_info *info = rt_train_set_info(set);
    const struct rt_rows *r = rows;
    const int lse = rt_train_set_lse(set, p->o.teacher_T);
    const bool teacher = p->o.k > 0 && info->top_k > 0 && (lse >= 0 || p->o.tail == RT_TAIL_RENORM);
    const bool spans = p->o.spans && info->identity != NULL && rt_row_identity_spans(info->identity);
    int column[RT_MAX_FEATURES];
    bool states;
    int64_t stored = 0;
    *full = p->n + r->n_tokens > p->o.tokens;
    if (*full)
        return RT_OK;
    RT_TRY(columns(p, info, r, column, &states, err));
    struct rt_micro_seq *q = &p->seq[p->n_seq];
    *q = (struct rt_micro_seq){.item = *item, .occurrence = r->occurrence, .line = r->source_line, .row0 = (int32_t)p->rows};
    memcpy(q->key, r->key, RT_KEY_BYTES);
    for (int64_t t = 0; t < r->n_tokens; t++) {
        if (r->ids[t] >= (uint64_t)p->o.vocab)
            RT_FAIL(err, REFUSED, "%s: line %ld: id %u at token %ld, the student's vocabulary has %ld rows", info->path, (long)r->source_line,
                    r->ids[t], (long)t, (long)p->o.vocab);
        p->ids[p->n + t] = (int32_t)r->ids[t];
        if (t + 1 == r->n_tokens || r->loss_mask[t + 1] == 0)
            continue;
        const int64_t row = add_row(p, r, t);
        while ((teacher || spans) && stored < r->n_rows && r->position[stored] < t)
            stored++;
        const bool here = stored < r->n_rows && r->position[stored] == t;
        if (teacher && here) {
            RT_TRY(add_teacher(p, r, stored, lse, row, info->path, err));
            if (p->o.ce_rest)
                p->label[row] = -1;
        } else {
            no_entries(p, row);
        }
        if (spans && here)
            RT_TRY(add_span(p, info, r, stored, row, q->row0, err));
        if (states && (r->feature_mask == NULL || r->feature_mask[t] == 1))
            add_states(p, info->identity, r, column, t, p->n + t);
    }
    q->rows = (int32_t)p->rows - q->row0;
    p->cu[0] = 0;
    p->n += r->n_tokens;
    p->cu[++p->n_seq] = (int32_t)p->n;
out:
    return st;
}

enum rt_status rt_micro_add(struct rt_micro *p, struct rt_train_set *set, const struct rt_order_item *item, bool *full, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_rows r;
    *full = p->n + rt_train_set_length(set, item->seq) > p->o.tokens;
    if (*full)
        return RT_OK;
    RT_TRY(rt_train_set_get(set, item->seq, &r, err));
    RT_TRY(rt_micro_put(p, set, item, &r, full, err));
out:
    return st;
}

static void append(void *base, int64_t at, const void *src, int64_t n, size_t size)
{
    if (n > 0)
        memcpy((char *)base + (size_t)at * size, src, (size_t)n * size);
}

void rt_micro_append(struct rt_micro *p, const struct rt_micro *part, bool *full)
{
    const int64_t k = p->o.k, words = (int64_t)words_of(&p->o), rows = p->rows;
    *full = p->n + part->n > p->o.tokens;
    if (*full)
        return;
    append(p->ids, p->n, part->ids, part->n, sizeof *p->ids);
    append(p->seq, p->n_seq, part->seq, part->n_seq, sizeof *p->seq);
    append(p->label, rows, part->label, part->rows, sizeof *p->label);
    append(p->kl_mask, rows, part->kl_mask, part->rows, 1);
    append(p->top_ids, rows * words, part->top_ids, part->rows * words, sizeof *p->top_ids);
    append(p->top_logp, rows * k, part->top_logp, part->rows * k, sizeof *p->top_logp);
    if (p->o.spans) {
        append(p->span, rows, part->span, part->rows, sizeof *p->span);
        append(p->span_logp, rows, part->span_logp, part->rows, sizeof *p->span_logp);
        append(p->span_boundary, rows, part->span_boundary, part->rows, 1);
    }
    for (int i = 0; p->o.map != NULL && i < p->o.map->n; i++)
        append(p->feature[i], p->feature_rows * p->o.map->pair[i].dim, part->feature[i], part->feature_rows * p->o.map->pair[i].dim, sizeof(float));
    for (int64_t i = 0; i < part->rows; i++)
        p->index[rows + i] = part->index[i] + (int32_t)p->n;
    for (int64_t i = 0; i < part->feature_rows; i++)
        p->feature_index[p->feature_rows + i] = part->feature_index[i] + (int32_t)p->n;
    p->cu[0] = 0;
    for (int64_t i = 0; i < part->n_seq; i++) {
        p->seq[p->n_seq + i].row0 += (int32_t)rows;
        p->cu[p->n_seq + i + 1] = part->cu[i + 1] + (int32_t)p->n;
    }
    p->n += part->n;
    p->n_seq += part->n_seq;
    p->rows += part->rows;
    p->kl_rows += part->kl_rows;
    p->feature_rows += part->feature_rows;
    p->n_spans += part->n_spans;
}
