#include "distill/losses.h"

#include <string.h>

#include "core/top_ids.h"

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

static void lay_out_slot(const struct rt_losses *l, struct rt_loss_slot *s, struct cut *c)
{
    const int64_t n = l->tokens;
    s->ids = cut(c, n, sizeof *s->ids);
    s->pos = cut(c, n, sizeof *s->pos);
    s->index = cut(c, n, sizeof *s->index);
    s->label = cut(c, n, sizeof *s->label);
    s->kl_mask = cut(c, n, 1);
    s->top_ids = cut(c, n * rt_top_ids_words(l->k, l->id_bits), sizeof *s->top_ids);
    s->top_logp = cut(c, n * l->k, sizeof *s->top_logp);
    for (int i = 0; i < 4; i++)
        s->dev_row[i] = cut(c, n, sizeof(double));
    s->dev_hit = cut(c, n, 1);
    if (l->pairs == 0)
        return;
    s->feature_index = cut(c, n, sizeof *s->feature_index);
    s->dev_feature = cut(c, n * l->pairs, sizeof(double));
}

static void lay_out(struct rt_losses *l, const struct rt_feature_map *map, bool backward, struct cut *c)
{
    const int64_t n = l->tokens, H = l->H;
    l->dim = widest(map);
    l->pairs = map != NULL ? map->n : 0;
    l->slots = backward ? RT_LOSS_SLOTS : 1;
    for (int i = 0; i < l->slots; i++)
        lay_out_slot(l, &l->slot[i], c);
    l->x = cut(c, n * H, l->act);
    if (backward) {
        l->dx = cut(c, n * H, l->act);
        l->d_final = cut(c, n * H, l->act);
    }
    if (l->pairs == 0)
        return;
    l->a = cut(c, n * l->dim, l->act);
    l->da = cut(c, n * l->dim, l->act);
    l->b = cut(c, n * l->dim, sizeof(float));
    for (int i = 0; backward && i < l->pairs; i++)
        l->extra[i] = cut(c, n * H, l->act);
}

size_t rt_losses_bytes(int64_t tokens, int64_t H, int64_t V, int k, const struct rt_feature_map *map, size_t act_size, bool backward)
{
    struct rt_losses l = {.tokens = tokens, .H = H, .k = k, .id_bits = rt_top_ids_bits(V), .act = act_size};
    struct cut c = {0};
    lay_out(&l, map, backward, &c);
    return c.bytes;
}

static enum rt_status create_slot(struct rt_losses *l, struct rt_loss_slot *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const size_t n = (size_t)l->tokens;
    const struct rt_backend *be = l->d->be;
    struct rt_dev *dev = l->d->dev;
    void *p;
    RT_TRY(be->host_alloc(dev, n * sizeof *s->host_pos, &p, err));
    s->host_pos = p;
    for (int i = 0; i < 4; i++) {
        RT_TRY(be->host_alloc(dev, n * sizeof(double), &p, err));
        s->row[i] = p;
    }
    RT_TRY(be->host_alloc(dev, n, &p, err));
    s->hit = p;
    RT_TRY(be->host_alloc(dev, n * (size_t)l->pairs * sizeof(double), &p, err));
    s->feature = p;
    RT_TRY(be->event_create(dev, &s->sent, err));
    RT_TRY(be->event_create(dev, &s->done, err));
out:
    return st;
}

enum rt_status rt_losses_create(struct rt_losses *l, const struct rt_device *d, int64_t tokens, int64_t H, int64_t V, int k,
                                const struct rt_feature_map *map, bool backward, struct rt_arena *arena, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *l = (struct rt_losses){.d = d, .tokens = tokens, .H = H, .k = k, .id_bits = rt_top_ids_bits(V), .act = rt_device_act_size(d)};
    struct cut c = {.arena = arena, .err = err};
    lay_out(l, map, backward, &c);
    RT_TRY(c.st);
    for (int i = 0; i < l->slots; i++)
        RT_TRY(create_slot(l, &l->slot[i], err));
    if (backward)
        RT_TRY(d->be->queue_create(d->dev, &l->copies, err));
out:
    if (st != RT_OK)
        rt_losses_free(l);
    return st;
}

void rt_losses_free(struct rt_losses *l)
{
    if (l->d == NULL)
        return;
    const struct rt_backend *be = l->d->be;
    struct rt_dev *dev = l->d->dev;
    (void)rt_device_sync(l->d, NULL); /* nothing of the host's is read or written any more */
    if (l->copies != NULL)
        be->queue_free(dev, l->copies);
    for (int i = 0; i < RT_LOSS_SLOTS; i++) {
        struct rt_loss_slot *s = &l->slot[i];
        void *const host[] = {s->host_pos, s->row[0], s->row[1], s->row[2], s->row[3], s->feature, s->hit};
        for (size_t j = 0; j < sizeof host / sizeof host[0]; j++)
            if (host[j] != NULL)
                be->host_free(dev, host[j]);
        be->event_free(dev, s->sent);
        be->event_free(dev, s->done);
    }
    *l = (struct rt_losses){0};
}

/* ---- the way to the device ---- */

struct rt_student_sent rt_losses_sent(const struct rt_losses *l, int slot)
{
    return (struct rt_student_sent){.ids = l->slot[slot].ids, .pos = l->slot[slot].pos};
}

static enum rt_status send_rows(struct rt_losses *l, struct rt_loss_slot *s, struct rt_queue *q, const struct rt_micro *p, struct rt_err *err)
{
    const size_t n = (size_t)p->rows, k = (size_t)l->k, words = (size_t)rt_top_ids_words(l->k, l->id_bits), tokens = (size_t)p->n;
    const struct {
        void *to;
        const void *from;
        size_t bytes;
    } part[] = {
        {s->ids, p->ids, tokens * sizeof *p->ids}, {s->pos, s->host_pos, tokens * sizeof *s->host_pos}, {s->index, p->index, n * sizeof *p->index},
        {s->label, p->label, n * sizeof *p->label}, {s->kl_mask, p->kl_mask, n}, {s->top_ids, p->top_ids, n * words * sizeof *p->top_ids},
        {s->top_logp, p->top_logp, n * k * sizeof *p->top_logp},
        {s->feature_index, p->feature_index, l->pairs > 0 ? (size_t)p->feature_rows * sizeof *p->feature_index : 0},
    };
    enum rt_status st = RT_OK;
    for (size_t i = 0; i < sizeof part / sizeof part[0]; i++)
        if (part[i].bytes > 0)
            RT_TRY(l->d->be->upload(l->d->dev, q, part[i].to, part[i].from, part[i].bytes, err));
out:
    return st;
}

enum rt_status rt_losses_send(struct rt_losses *l, int slot, const struct rt_micro *p, struct rt_err *err)
{
    enum rt_status st;
    struct rt_loss_slot *s = &l->slot[slot];
    const struct rt_backend *be = l->d->be;
    struct rt_queue *q = l->copies != NULL ? l->copies : l->d->q;
    if (s->started || slot >= l->slots)
        RT_FAIL(err, USAGE, "a micro-batch is sent to slot %d, whose results were not collected, of %d", slot, l->slots);
    if (l->k > 0 && (p->o.k != l->k || p->id_bits != l->id_bits))
        RT_FAIL(err, USAGE, "a micro-batch of %d ids of %d bits a row is sent where %d of %d bits are expected", p->o.k, p->id_bits, l->k, l->id_bits);
    s->p = p;
    s->with_states = p->feature_rows > 0 && l->pairs > 0;
    for (int64_t i = 0; i < p->n_seq; i++)
        for (int32_t t = p->cu[i]; t < p->cu[i + 1]; t++)
            s->host_pos[t] = t - p->cu[i];
    RT_TRY(send_rows(l, s, q, p, err));
    if (l->copies == NULL)
        goto out;
    RT_TRY(be->event_record(l->d->dev, q, s->sent, err));
    RT_TRY(be->event_wait(l->d->dev, l->d->q, s->sent, err));
out:
    return st;
}

/* Head, on the gathered rows; with backward the gradient at the final states lies in d_final. */
static enum rt_status run_head(struct rt_losses *l, const struct rt_loss_slot *at, struct rt_student *s, const struct rt_loss_weights *w, int64_t items,
                               bool backward, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_device *d = l->d;
    const struct rt_micro *p = at->p;
    const struct rt_student_head head = rt_student_head(s);
    if (backward)
        RT_TRY(rt_device_zero(d, l->d_final, (size_t)p->n * (size_t)l->H * l->act, err));
    if (p->rows == 0)
        goto out;
    RT_TRY(RT_OP(d, gather, err, .x = rt_student_hidden(s, RT_LAYER_FINAL), .index = at->index, .out = l->x, .n = p->rows, .cols = l->H));
    RT_TRY(RT_OP(d, head_loss, err, .x = l->x, .w = head.w, .dx = backward ? l->dx : NULL, .dw = backward ? head.dw : NULL, .n = p->rows,
                 .H = l->H, .V = head.V, .label = at->label, .k = p->kl_rows > 0 ? l->k : 0, .id_bits = l->id_bits, .top_ids = at->top_ids,
                 .top_logp = at->top_logp, .kl_mask = p->kl_rows > 0 ? at->kl_mask : NULL, .tail = w->tail, .w_ce = w->ce / (double)items,
                 .w_kl = w->kl / (double)items, .T = w->T, .ce = at->dev_row[0], .kl = at->dev_row[1], .teacher_mass = at->dev_row[2],
                 .student_mass = at->dev_row[3], .hit = at->dev_hit));
    if (backward)
        RT_TRY(RT_OP(d, scatter, err, .y = l->dx, .index = at->index, .x = l->d_final, .n = p->rows, .cols = l->H));
out:
    return st;
}

/* What was found for the rows, on its way to the host. */
static enum rt_status fetch_rows(struct rt_losses *l, struct rt_loss_slot *s, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_backend *be = l->d->be;
    const size_t n = (size_t)s->p->rows, states = s->with_states ? (size_t)s->p->feature_rows : 0;
    for (int i = 0; i < 4 && n > 0; i++)
        RT_TRY(be->download(l->d->dev, l->d->q, s->row[i], s->dev_row[i], n * sizeof(double), err));
    if (n > 0)
        RT_TRY(be->download(l->d->dev, l->d->q, s->hit, s->dev_hit, n, err));
    for (int i = 0; i < l->pairs && states > 0; i++)
        RT_TRY(be->download(l->d->dev, l->d->q, s->feature + i * l->tokens, s->dev_feature + i * l->tokens, states * sizeof(double), err));
    RT_TRY(be->event_record(l->d->dev, l->d->q, s->done, err));
out:
    return st;
}

static void add_rows(const struct rt_losses *l, const struct rt_loss_slot *s, struct rt_loss_sums *sums)
{
    const struct rt_micro *p = s->p;
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
    if (!s->with_states)
        return;
    for (int i = 0; i < l->pairs; i++)
        for (int64_t r = 0; r < p->feature_rows; r++)
            sums->feature += s->feature[i * l->tokens + r] / l->pairs;
    sums->feature_rows += p->feature_rows;
}

enum rt_status rt_losses_collect(struct rt_losses *l, int slot, struct rt_loss_sums *sums, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_loss_slot *s = &l->slot[slot];
    if (!s->started)
        goto out;
    s->started = false;
    RT_TRY(l->d->be->event_sync(l->d->dev, s->done, err));
    l->ce = s->row[0];
    l->kl = s->row[1];
    l->teacher_mass = s->row[2];
    l->student_mass = s->row[3];
    l->hit = s->hit;
    add_rows(l, s, sums);
out:
    return st;
}

/* Pair i: a = h W^T against the stored states; gradients to W and, scattered, to the hidden state. */
static enum rt_status run_pair(struct rt_losses *l, const struct rt_loss_slot *at, struct rt_student *s, struct rt_projectors *proj, int i,
                               const struct rt_loss_weights *w, int64_t items, bool backward, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_device *d = l->d;
    const struct rt_micro *p = at->p;
    const struct rt_feature_pair *pair = &proj->map.pair[i];
    const void *hidden = rt_student_hidden(s, pair->student);
    const int64_t n = p->feature_rows, D = pair->dim, H = l->H;
    if (hidden == NULL)
        RT_FAIL(err, INTERNAL, "hidden state %d was not kept", pair->student);
    RT_TRY(rt_device_upload(d, l->b, p->feature[i], (size_t)(n * D) * sizeof(float), err));
    RT_TRY(RT_OP(d, gather, err, .x = hidden, .index = at->feature_index, .out = l->x, .n = n, .cols = H));
    RT_TRY(RT_OP(d, linear_fwd, err, .x = {l->x, NULL}, .w = proj->weight[i], .y = l->a, .n = n, .K = H, .N = D));
    RT_TRY(RT_OP(d, feature_loss, err, .a = l->a, .b = l->b, .da = backward ? l->da : NULL, .loss = at->dev_feature + i * l->tokens,
                 .w = w->feature / (double)items / l->pairs, .n = n, .cols = D, .cosine = w->cosine));
    if (!backward)
        goto out;
    RT_TRY(RT_OP(d, linear_wgrad, err, .dy = l->da, .x = l->x, .dw = proj->grad + (size_t)proj->entry[i].offset * l->act, .n = n, .K = H, .N = D));
    RT_TRY(RT_OP(d, linear_dgrad, err, .dy = l->da, .w = proj->weight[i], .dx = l->dx, .n = n, .K = H, .N = D));
    if (pair->student == RT_LAYER_FINAL) {
        RT_TRY(RT_OP(d, scatter, err, .y = l->dx, .index = at->feature_index, .x = l->d_final, .n = n, .cols = H, .accumulate = true));
    } else {
        RT_TRY(rt_device_zero(d, l->extra[i], (size_t)(p->n * H) * l->act, err));
        RT_TRY(RT_OP(d, scatter, err, .y = l->dx, .index = at->feature_index, .x = l->extra[i], .n = n, .cols = H));
    }
out:
    return st;
}

/* The spans' part, behind run_head: gradients of head and final states +=. */
static enum rt_status run_spans(struct rt_losses *l, const struct rt_loss_slot *at, struct rt_student *s, const struct rt_loss_weights *w, int64_t items,
                                bool backward, struct rt_loss_sums *sums, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_micro *p = at->p;
    bool any;
    const struct rt_student_head head = rt_student_head(s);
    RT_TRY(rt_span_losses_run(l->spans, &head, p, l->x, at->label, w->tau, w->alm / (double)items, backward ? l->dx : NULL, &any, &sums->spans, err));
    if (any && backward)
        RT_TRY(RT_OP(l->d, scatter, err, .y = l->dx, .index = at->index, .x = l->d_final, .n = p->rows, .cols = l->H, .accumulate = true));
out:
    return st;
}

bool rt_losses_constant(const struct rt_losses *l, int slot, const struct rt_loss_weights *w)
{
    return !l->slot[slot].with_states && (l->spans == NULL || !(w->alm > 0));
}

enum rt_status rt_losses_enqueue(struct rt_losses *l, int slot, struct rt_student *s, struct rt_projectors *proj, const struct rt_loss_weights *w, int64_t items,
                                 enum rt_losses_grads grads, struct rt_loss_sums *sums, struct rt_err *err)
{
    enum rt_status st;
    const bool backward = grads != RT_GRADS_NONE;
    const struct rt_loss_slot *at = &l->slot[slot];
    struct rt_student_extra extra[RT_MAX_FEATURES];
    int n_extra = 0;
    RT_TRY(run_head(l, at, s, w, items, backward, err));
    if (l->spans != NULL && w->alm > 0)
        RT_TRY(run_spans(l, at, s, w, items, backward, sums, err));
    for (int i = 0; at->with_states && i < l->pairs; i++) {
        RT_TRY(run_pair(l, at, s, proj, i, w, items, backward, err));
        if (proj->map.pair[i].student != RT_LAYER_FINAL)
            extra[n_extra++] = (struct rt_student_extra){proj->map.pair[i].student, l->extra[i]};
    }
    if (backward)
        RT_TRY(rt_student_backward(s, l->d_final, extra, n_extra, grads == RT_GRADS_FIRST, err));
out:
    return st;
}

enum rt_status rt_losses_fetch(struct rt_losses *l, int slot, struct rt_err *err)
{
    const enum rt_status st = fetch_rows(l, &l->slot[slot], err);
    l->slot[slot].started |= st == RT_OK;
    return st;
}

enum rt_status rt_losses_run(struct rt_losses *l, struct rt_student *s, struct rt_projectors *proj, const struct rt_micro *p,
                             const struct rt_loss_weights *w, int64_t items, bool backward, struct rt_loss_sums *sums, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_losses_send(l, 0, p, err));
    RT_TRY(rt_losses_enqueue(l, 0, s, proj, w, items, backward ? RT_GRADS_ADD : RT_GRADS_NONE, sums, err));
    RT_TRY(rt_losses_fetch(l, 0, err));
    RT_TRY(rt_losses_collect(l, 0, sums, err));
out:
    return st;
}
