#include "distill/losses.h"

#include <string.h>

struct rt_student_batch rt_losses_batch(const struct rt_micro *p)
{
    return (struct rt_student_batch){.ids = p->ids, .cu_seqlens = p->cu, .n = p->n, .n_seq = p->n_seq};
}

static int widest(const struct rt_feature_map *map)
{
    int dim = 0;
    for (int i = 0; map != NULL && i < map->n; i++)
        dim = map->pair[i].dim > dim ? map->pair[i].dim : dim;
    return dim;
}

/* One list of buffers for both sizes and pointers: visit(buffer, bytes). */
struct cut {
    struct rt_arena *arena; /* NULL: count only */
    size_t bytes;
    enum rt_status st;
    struct rt_err *err;
};

static void *cut(struct cut *c, int64_t n, size_t size)
{
    void *p = NULL;
    size_t bytes;
    if (c->st != RT_OK)
        return NULL;
    if (!rt_mul_size((size_t)n, size, &bytes) || !rt_add_size(c->bytes, rt_arena_round(bytes), &c->bytes)) {
        c->bytes = SIZE_MAX;
        c->st = rt_fail(c->err, RT_NOMEM, "a micro-batch of %ld tokens is too large", (long)n);
    } else if (c->arena != NULL) {
        c->st = rt_arena_alloc(c->arena, bytes, &p, c->err);
    }
    return p;
}

static void lay_out(struct rt_losses *l, const struct rt_feature_map *map, bool backward, struct cut *c)
{
    const int64_t n = l->tokens, H = l->H;
    l->index = cut(c, n, sizeof *l->index);
    l->label = cut(c, n, sizeof *l->label);
    l->kl_mask = cut(c, n, 1);
    l->top_ids = cut(c, n * l->k, sizeof *l->top_ids);
    l->top_logp = cut(c, n * l->k, sizeof *l->top_logp);
    l->x = cut(c, n * H, l->act);
    if (backward) {
        l->dx = cut(c, n * H, l->act);
        l->d_final = cut(c, n * H, l->act);
    }
    for (int i = 0; i < 4; i++)
        l->dev_row[i] = cut(c, n, sizeof(double));
    l->dev_hit = cut(c, n, 1);
    l->dim = widest(map);
    l->pairs = map != NULL ? map->n : 0;
    if (l->pairs == 0)
        return;
    l->feature_index = cut(c, n, sizeof *l->feature_index);
    l->a = cut(c, n * l->dim, l->act);
    l->da = cut(c, n * l->dim, l->act);
    l->b = cut(c, n * l->dim, sizeof(float));
    l->dev_feature = cut(c, n, sizeof(double));
    for (int i = 0; backward && i < l->pairs; i++)
        l->extra[i] = cut(c, n * H, l->act);
}

size_t rt_losses_bytes(int64_t tokens, int64_t H, int k, const struct rt_feature_map *map, size_t act_size, bool backward)
{
    struct rt_losses l = {.tokens = tokens, .H = H, .k = k, .act = act_size};
    struct cut c = {0};
    lay_out(&l, map, backward, &c);
    return c.bytes;
}

enum rt_status rt_losses_create(struct rt_losses *l, const struct rt_device *d, int64_t tokens, int64_t H, int k,
                                const struct rt_feature_map *map, bool backward, struct rt_arena *arena, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *l = (struct rt_losses){.d = d, .tokens = tokens, .H = H, .k = k, .act = rt_device_act_size(d)};
    struct cut c = {.arena = arena, .err = err};
    lay_out(l, map, backward, &c);
    RT_TRY(c.st);
    double **const host[] = {&l->ce, &l->kl, &l->teacher_mass, &l->student_mass, &l->feature};
    for (int i = 0; i < 5; i++)
        RT_TRY(rt_alloc((size_t)tokens, sizeof(double), "losses of rows", host[i], err));
    RT_TRY(rt_alloc((size_t)tokens, 1, "losses of rows", &l->hit, err));
out:
    if (st != RT_OK)
        rt_losses_free(l);
    return st;
}

void rt_losses_free(struct rt_losses *l)
{
    rt_free(l->ce);
    rt_free(l->kl);
    rt_free(l->teacher_mass);
    rt_free(l->student_mass);
    rt_free(l->feature);
    rt_free(l->hit);
    *l = (struct rt_losses){0};
}

static enum rt_status upload_rows(struct rt_losses *l, const struct rt_micro *p, struct rt_err *err)
{
    enum rt_status st;
    const size_t n = (size_t)p->rows;
    RT_TRY(rt_device_upload(l->d, l->index, p->index, n * sizeof *p->index, err));
    RT_TRY(rt_device_upload(l->d, l->label, p->label, n * sizeof *p->label, err));
    RT_TRY(rt_device_upload(l->d, l->kl_mask, p->kl_mask, n, err));
    if (l->k > 0) {
        RT_TRY(rt_device_upload(l->d, l->top_ids, p->top_ids, n * (size_t)l->k * sizeof *p->top_ids, err));
        RT_TRY(rt_device_upload(l->d, l->top_logp, p->top_logp, n * (size_t)l->k * sizeof *p->top_logp, err));
    }
out:
    return st;
}

/* Head, on the gathered rows; with backward the gradient at the final states lies in d_final. */
static enum rt_status run_head(struct rt_losses *l, struct rt_student *s, const struct rt_micro *p, const struct rt_loss_weights *w,
                               int64_t items, bool backward, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_device *d = l->d;
    const struct rt_student_head head = rt_student_head(s);
    if (backward)
        RT_TRY(rt_device_zero(d, l->d_final, (size_t)p->n * (size_t)l->H * l->act, err));
    if (p->rows == 0)
        goto out;
    RT_TRY(upload_rows(l, p, err));
    RT_TRY(RT_OP(d, gather, err, .x = rt_student_hidden(s, RT_LAYER_FINAL), .index = l->index, .out = l->x, .n = p->rows, .cols = l->H));
    RT_TRY(RT_OP(d, head_loss, err, .x = l->x, .w = head.w, .dx = backward ? l->dx : NULL, .dw = backward ? head.dw : NULL, .n = p->rows,
                 .H = l->H, .V = head.V, .label = l->label, .k = p->kl_rows > 0 ? l->k : 0, .top_ids = l->top_ids, .top_logp = l->top_logp,
                 .kl_mask = p->kl_rows > 0 ? l->kl_mask : NULL, .tail = w->tail, .w_ce = w->ce / (double)items, .w_kl = w->kl / (double)items,
                 .T = w->T, .ce = l->dev_row[0], .kl = l->dev_row[1], .teacher_mass = l->dev_row[2], .student_mass = l->dev_row[3],
                 .hit = l->dev_hit));
    if (backward)
        RT_TRY(RT_OP(d, scatter, err, .y = l->dx, .index = l->index, .x = l->d_final, .n = p->rows, .cols = l->H));
out:
    return st;
}

/* What run_head found for the rows. It waits, so the rest of the work is enqueued before. */
static enum rt_status fetch_rows(struct rt_losses *l, const struct rt_micro *p, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t n = (size_t)p->rows;
    double *const host[] = {l->ce, l->kl, l->teacher_mass, l->student_mass};
    for (int i = 0; i < 4 && n > 0; i++)
        RT_TRY(rt_device_download(l->d, host[i], l->dev_row[i], n * sizeof(double), err));
    if (n > 0)
        RT_TRY(rt_device_download(l->d, l->hit, l->dev_hit, n, err));
out:
    return st;
}

static void add_rows(const struct rt_losses *l, const struct rt_micro *p, struct rt_loss_sums *sums)
{
    for (int64_t i = 0; i < p->rows; i++) {
        if (p->label[i] >= 0) {
            sums->ce += l->ce[i];
            sums->correct += l->hit[i] & 1;
            sums->rows++;
        }
        if (p->kl_mask[i] == 0)
            continue;
        sums->kl += l->kl[i];
        sums->teacher_mass += l->teacher_mass[i];
        sums->student_mass += l->student_mass[i];
        sums->agree += l->hit[i] >> 1 & 1;
    }
    sums->kl_rows += p->kl_rows;
}

/* Pair i: a = h W^T against the stored states; gradients to W and, scattered, to the hidden state. */
static enum rt_status run_pair(struct rt_losses *l, struct rt_student *s, struct rt_projectors *proj, const struct rt_micro *p, int i,
                               const struct rt_loss_weights *w, int64_t items, bool backward, struct rt_loss_sums *sums, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_device *d = l->d;
    const struct rt_feature_pair *pair = &proj->map.pair[i];
    const void *hidden = rt_student_hidden(s, pair->student);
    const int64_t n = p->feature_rows, D = pair->dim, H = l->H;
    if (hidden == NULL)
        RT_FAIL(err, INTERNAL, "hidden state %d was not kept", pair->student);
    RT_TRY(rt_device_upload(d, l->b, p->feature[i], (size_t)(n * D) * sizeof(float), err));
    RT_TRY(RT_OP(d, gather, err, .x = hidden, .index = l->feature_index, .out = l->x, .n = n, .cols = H));
    RT_TRY(RT_OP(d, linear_fwd, err, .x = {l->x, NULL}, .w = proj->weight[i], .y = l->a, .n = n, .K = H, .N = D));
    RT_TRY(RT_OP(d, feature_loss, err, .a = l->a, .b = l->b, .da = backward ? l->da : NULL, .loss = l->dev_feature,
                 .w = w->feature / (double)items / l->pairs, .n = n, .cols = D, .cosine = w->cosine));
    RT_TRY(rt_device_download(d, l->feature, l->dev_feature, (size_t)n * sizeof(double), err));
    for (int64_t r = 0; r < n; r++)
        sums->feature += l->feature[r] / l->pairs;
    if (!backward)
        goto out;
    RT_TRY(RT_OP(d, linear_wgrad, err, .dy = l->da, .x = l->x, .dw = proj->grad + (size_t)proj->entry[i].offset * l->act, .n = n, .K = H, .N = D));
    RT_TRY(RT_OP(d, linear_dgrad, err, .dy = l->da, .w = proj->weight[i], .dx = l->dx, .n = n, .K = H, .N = D));
    if (pair->student == RT_LAYER_FINAL) {
        RT_TRY(RT_OP(d, scatter, err, .y = l->dx, .index = l->feature_index, .x = l->d_final, .n = n, .cols = H, .accumulate = true));
    } else {
        RT_TRY(rt_device_zero(d, l->extra[i], (size_t)(p->n * H) * l->act, err));
        RT_TRY(RT_OP(d, scatter, err, .y = l->dx, .index = l->feature_index, .x = l->extra[i], .n = n, .cols = H));
    }
out:
    return st;
}

/* The spans' part, behind run_head: gradients of head and final states +=. */
static enum rt_status run_spans(struct rt_losses *l, struct rt_student *s, const struct rt_micro *p, const struct rt_loss_weights *w, int64_t items,
                                bool backward, struct rt_loss_sums *sums, struct rt_err *err)
{
    enum rt_status st;
    bool any;
    const struct rt_student_head head = rt_student_head(s);
    RT_TRY(rt_span_losses_run(l->spans, &head, p, l->x, l->label, w->tau, w->alm / (double)items, backward ? l->dx : NULL, &any, &sums->spans, err));
    if (any && backward)
        RT_TRY(RT_OP(l->d, scatter, err, .y = l->dx, .index = l->index, .x = l->d_final, .n = p->rows, .cols = l->H, .accumulate = true));
out:
    return st;
}

enum rt_status rt_losses_run(struct rt_losses *l, struct rt_student *s, struct rt_projectors *proj, const struct rt_micro *p,
                             const struct rt_loss_weights *w, int64_t items, bool backward, struct rt_loss_sums *sums, struct rt_err *err)
{
    enum rt_status st;
    struct rt_student_extra extra[RT_MAX_FEATURES];
    int n_extra = 0;
    RT_TRY(run_head(l, s, p, w, items, backward, err));
    if (l->spans != NULL && w->alm > 0)
        RT_TRY(run_spans(l, s, p, w, items, backward, sums, err));
    if (proj != NULL && p->feature_rows > 0 && l->pairs > 0) {
        RT_TRY(rt_device_upload(l->d, l->feature_index, p->feature_index, (size_t)p->feature_rows * sizeof *p->feature_index, err));
        for (int i = 0; i < l->pairs; i++) {
            RT_TRY(run_pair(l, s, proj, p, i, w, items, backward, sums, err));
            if (proj->map.pair[i].student != RT_LAYER_FINAL)
                extra[n_extra++] = (struct rt_student_extra){proj->map.pair[i].student, l->extra[i]};
        }
        sums->feature_rows += p->feature_rows;
    }
    if (backward)
        RT_TRY(rt_student_backward(s, l->d_final, extra, n_extra, err));
    RT_TRY(fetch_rows(l, p, err));
    add_rows(l, p, sums);
out:
    return st;
}
