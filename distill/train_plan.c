/* Before the first step: student, data, every refusal that can be made without training, memory and the number of steps. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "core/sha256.h"
#include "distill/run_record.h"
#include "distill/spans.h"
#include "distill/train_run.h"
#include "student/describe.h"

/* Below this mass of the stored ids a tail treatment loses too much to stay silent. */
static const double mass_renorm = 0.95, mass_bucket = 0.5;

/* ---- data ---- */

/* "PATH[:WEIGHT]": a path that exists as it stands has weight 1. */
static enum rt_status split_weight(const char *text, char **path, double *weight, struct rt_err *err)
{
    enum rt_status st;
    const char *colon = strrchr(text, ':');
    char *end = NULL;
    const size_t n = strlen(text);
    RT_TRY(rt_alloc(n + 1, 1, "a path", path, err));
    memcpy(*path, text, n);
    *weight = 1;
    if (colon == NULL || rt_path_exists(text))
        goto out;
    *weight = strtod(colon + 1, &end);
    if (end == colon + 1 || *end != '\0')
        *weight = 1;
    else
        (*path)[colon - text] = '\0';
    if (!(*weight > 0 && *weight <= 1e6))
        RT_FAIL(err, USAGE, "--data %s: weight %g, expected above 0 and at most 1e6", text, *weight);
out:
    return st;
}

static enum rt_status open_sets(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_train_values *v = r->v;
    struct rt_train_set_options o = {.model = &r->student.model, .vocab = r->student.c.vocab_size,
                                     .max_length = rt_length_limit(v->max_length, r->student.c.max_position),
                                     .drop_long = v->max_length > 0, .features = v->w_feature > 0};
    RT_TRY(rt_alloc((size_t)v->data.n, sizeof *r->set, "data", &r->set, err));
    RT_TRY(rt_alloc((size_t)v->data.n, sizeof *r->weight, "data", &r->weight, err));
    RT_TRY(rt_alloc((size_t)v->data.n, sizeof *r->path, "data", &r->path, err));
    RT_TRY(rt_alloc((size_t)v->eval_data.n, sizeof *r->eval_set, "data", &r->eval_set, err));
    for (; r->n_sets < v->data.n; r->n_sets++) {
        RT_TRY(split_weight(v->data.items[r->n_sets], &r->path[r->n_sets], &r->weight[r->n_sets], err));
        RT_TRY(rt_train_set_open(r->path[r->n_sets], &o, r->ctx->log, &r->set[r->n_sets], err));
    }
    o.features = false;
    for (; r->n_eval < v->eval_data.n; r->n_eval++) {
        bool losses, answers;
        RT_TRY(rt_eval_kind(v->eval_data.items[r->n_eval], &r->student.model, &losses, &answers, err));
        if (!losses)
            RT_FAIL(err, USAGE, "--eval-data %s: has prompts to answer, no text to score; `retort eval` answers them", v->eval_data.items[r->n_eval]);
        RT_TRY(rt_train_set_open(v->eval_data.items[r->n_eval], &o, r->ctx->log, &r->eval_set[r->n_eval], err));
    }
out:
    return st;
}

static void describe_sets(const struct rt_train_run *r)
{
    double all = 0;
    for (int i = 0; i < r->n_sets; i++)
        all += r->weight[i] * (double)rt_train_set_info(r->set[i])->tokens;
    for (int i = 0; i < r->n_sets; i++) {
        const struct rt_train_info *info = rt_train_set_info(r->set[i]);
        rt_info(r->ctx->log, "data %s: %ld sequences, %ld tokens, longest %ld, weight %g (%.1f %% of an epoch's tokens)%s%s", info->path, (long)info->sequences,
                (long)info->tokens, (long)info->longest, r->weight[i], 100 * r->weight[i] * (double)info->tokens / all,
                info->identity != NULL ? ", rows of " : ", text", info->identity != NULL ? info->identity->teacher_name : "");
    }
}

enum rt_status rt_train_contents(const struct rt_train_run *r, struct rt_json *v, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *of;
    RT_TRY(rt_json_set_object(v, "content_sha256", &of, err));
    for (int i = 0; i < r->n_sets + r->n_eval; i++) {
        const bool eval = i >= r->n_sets;
        const struct rt_train_info *info = rt_train_set_info(rt_train_set_at(r, i));
        char key[32], text[4200];
        snprintf(key, sizeof key, "%s %d", eval ? "eval-data" : "data", (eval ? i - r->n_sets : i) + 1);
        snprintf(text, sizeof text, "%s %s", info->content_sha256, info->path);
        RT_TRY(rt_json_set_string(of, key, text, err));
    }
out:
    return st;
}

struct rt_train_set *rt_train_set_at(const struct rt_train_run *r, int i)
{
    return i < r->n_sets ? r->set[i] : r->eval_set[i - r->n_sets];
}

int64_t rt_train_longest(const struct rt_train_run *r)
{
    int64_t n = 1;
    for (int i = 0; i < r->n_sets + r->n_eval; i++) {
        const struct rt_train_info *info = rt_train_set_info(rt_train_set_at(r, i));
        n = info->longest > n ? info->longest : n;
    }
    return n;
}

/* ---- the losses against what the data hold ---- */

static void warn_tail(const struct rt_train_run *r, const struct rt_train_info *info, int lse)
{
    if (info->shards == NULL || lse < 0)
        return;
    const double mass = info->shards->mass[lse], least = info->shards->mass_min[lse], T = r->o.teacher_T;
    if (r->o.w.tail == RT_TAIL_RENORM && mass < mass_renorm)
        rt_warn(r->ctx->log, "%s: at T = %g the stored %d ids hold %.3f of the teacher's mass (least sequence %.3f); --tail renorm treats them as all of it "
                "and leaves the student free on the other %.3f: --tail bucket keeps the exact mass", info->path, T, info->top_k, mass, least, 1 - mass);
    if (r->o.w.tail == RT_TAIL_BUCKET && mass < mass_bucket)
        rt_warn(r->ctx->log, "%s: at T = %g the stored %d ids hold %.3f of the teacher's mass (least sequence %.3f); the other %.3f are one bucket, whose "
                "inside is not taught: %smore ids a row (logits --cache topk=K)", info->path, T, info->top_k, mass, least, 1 - mass,
                info->identity->origin.mode[0] == '\0' ? "a lower --kd-temperature or " : "");
}

/* Rows of another tokenizer are sums of probabilities at T = 1, and a sum cannot be tempered. Their residual is a part of what the teacher said: it is not
 * spread as the listed ids are (a row inside a token often lists one), so leaving it out is another lesson. Strict rows leave out by design. */
static enum rt_status check_retargeted(const struct rt_train_run *r, const struct rt_train_info *info, struct rt_err *err)
{
    const struct rt_row_identity *id = info->identity;
    if (id->origin.mode[0] == '\0' || (strcmp(id->tokenizer_sha256, id->origin.tokenizer_sha256) == 0 && strcmp(id->template_sha256, id->origin.template_sha256) == 0))
        return RT_OK; /* the teacher's own rows */
    if (r->o.w.T != 1 || r->o.teacher_T != 1)
        return rt_fail(err, RT_REFUSED, "%s: its rows are retargeted (%s), and hold at T = 1 alone: adding up what several teacher tokens give one student token "
                       "and changing the temperature do not commute; take --kd-temperature 1 instead of %g (and no other --teacher-temperature)", info->path,
                       id->origin.mode, r->o.w.T != 1 ? r->o.w.T : r->o.teacher_T);
    if (r->o.w.tail == RT_TAIL_RENORM && strcmp(id->origin.mode, "exact") == 0)
        return rt_fail(err, RT_REFUSED, "%s: its rows are retargeted (exact), and --tail renorm would drop their residual, which is a part of what the teacher said: a row "
                       "that lists one token would teach nothing, the others that what is not listed is free; take --tail bucket, which is the default", info->path);
    if (r->o.w.tail == RT_TAIL_RENORM)
        rt_warn(r->ctx->log, "%s: its rows are retargeted (%s), over shared tokens alone: with --tail renorm a row that lists one token teaches nothing, and the student is "
                "free on tokens that no row lists; --tail bucket (the default) did better wherever it was measured", info->path, id->origin.mode);
    return RT_OK;
}

/* Does another of the sets hold what set `info` lacks: rows, or likelihoods of spans? */
static bool others_have(const struct rt_train_run *r, bool spans)
{
    for (int i = 0; i < r->n_sets; i++) {
        const struct rt_train_info *info = rt_train_set_info(r->set[i]);
        if (spans ? info->identity != NULL && rt_row_identity_spans(info->identity) : info->top_k > 0)
            return true;
    }
    return false;
}

/* A set without what the teacher said, in a mix with sets that have it, is trained on by cross-entropy; alone it is refused. */
static enum rt_status check_bare(const struct rt_train_run *r, const struct rt_train_info *info, struct rt_err *err)
{
    const bool spans = !(r->o.w.kl > 0), text = info->kind == RT_TRAIN_LINES;
    const char *option = spans ? "--w-alm" : "--w-kl", *lacks = spans ? "likelihoods of spans" : "teacher rows";
    const double w = spans ? r->o.w.alm : r->o.w.kl;
    if (others_have(r, spans) && r->o.w.ce > 0) {
        rt_info(r->ctx->log, "%s: has no %s: its targets take the cross-entropy alone, with --w-ce %g", info->path, lacks, r->o.w.ce);
        return RT_OK;
    }
    if (others_have(r, spans))
        return rt_fail(err, RT_REFUSED, "%s: has no %s, and --w-ce is 0: nothing would be learnt from it", info->path, lacks);
    if (spans)
        return rt_fail(err, RT_REFUSED, "%s: holds no likelihoods of spans, and --w-alm is %g: `retort retarget --mode alm` makes them", info->path, w);
    return text ? rt_fail(err, RT_REFUSED, "%s: is text without teacher rows, and %s is %g: `retort logits` makes shards of it, or %s 0 trains on the text",
                          info->path, option, w, option)
                : rt_fail(err, RT_REFUSED, "%s: holds states but no rows, and %s is %g: `retort logits --cache topk=K` stores them", info->path, option, w);
}

/* Refuses a set whose rows cannot give the KL that is asked for. */
static enum rt_status check_rows(const struct rt_train_run *r, int i, struct rt_err *err)
{
    const struct rt_train_info *info = rt_train_set_info(r->set[i]);
    const int lse = rt_train_set_lse(r->set[i], r->o.teacher_T);
    const bool spans = info->identity != NULL && rt_row_identity_spans(info->identity);
    char stored[128];
    if (!(r->o.w.kl > 0))
        return r->o.w.alm > 0 && !spans ? check_bare(r, info, err) : RT_OK;
    if (spans)
        return rt_fail(err, RT_REFUSED, "%s: holds likelihoods of spans, no distributions, and --w-kl is %g: --w-alm trains on them, or `retort retarget --mode exact` "
                       "makes rows", info->path, r->o.w.kl);
    if (r->o.w.alm > 0)
        return rt_fail(err, RT_REFUSED, "%s: holds no likelihoods of spans, and --w-alm is %g: `retort retarget --mode alm` makes them", info->path, r->o.w.alm);
    if (info->top_k == 0)
        return check_bare(r, info, err);
    if (r->v->top_k > info->top_k)
        return rt_fail(err, RT_REFUSED, "%s: stores the %d likeliest ids of a row, --top-k asks for %ld: --top-k %d (or 0, which takes all), or `retort logits --cache "
                       "topk=%ld` stores more", info->path, info->top_k, (long)r->v->top_k, info->top_k, (long)r->v->top_k);
    const enum rt_status st = check_retargeted(r, info, err);
    if (st != RT_OK)
        return st;
    if (lse < 0 && r->o.w.tail == RT_TAIL_BUCKET) {
        rt_row_identity_temperatures(info->identity, stored);
        return rt_fail(err, RT_REFUSED, "%s: the log-sum-exp at T = %g is not stored (stored: %s), so the mass of the ids that are not stored cannot be known: "
                       "take one of these, --tail renorm, or `retort logits --lse %g`", info->path, r->o.teacher_T, stored, r->o.teacher_T);
    }
    warn_tail(r, info, lse);
    return RT_OK;
}

static enum rt_status check_features(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_row_identity *id = NULL;
    int column;
    if (!(r->v->w_feature > 0))
        return RT_OK;
    for (int i = 0; i < r->n_sets && id == NULL; i++) {
        const struct rt_train_info *info = rt_train_set_info(r->set[i]);
        id = info->identity != NULL && info->identity->n_features > 0 ? info->identity : NULL;
    }
    if (id == NULL)
        RT_FAIL(err, REFUSED, "--w-feature %g: the data hold no hidden states; `retort logits --features` stores them", r->v->w_feature);
    const int teacher_layers = r->v->teacher_layers > 0 ? (int)r->v->teacher_layers : id->teacher_layers;
    RT_TRY(rt_feature_map_parse(r->v->layer_map, id, r->student.c.layers, teacher_layers, &r->o.map, err));
    for (int i = 0; i < r->n_sets; i++) {
        const struct rt_train_info *info = rt_train_set_info(r->set[i]);
        bool any = false;
        for (int p = 0; p < r->o.map.n; p++) {
            RT_TRY(rt_feature_column(&r->o.map.pair[p], info->identity, info->path, &column, err));
            any |= column >= 0;
            if (column < 0)
                rt_warn(r->ctx->log, "%s: has no states of layer %d: it takes no part in the feature loss", info->path, r->o.map.pair[p].teacher);
        }
        if (!any && !(r->o.w.ce > 0) && !(r->o.w.kl > 0) && !(r->o.w.alm > 0))
            RT_FAIL(err, REFUSED, "%s: has none of the states that are trained on, and --w-ce, --w-kl and --w-alm are 0: nothing would be learnt from it; "
                    "--w-ce above 0 trains on its text", info->path);
    }
    for (int p = 0; p < r->o.map.n; p++)
        rt_info(r->ctx->log, "feature loss: teacher layer %d -> student layer %d, %d numbers (-1: after the final norm)", r->o.map.pair[p].teacher,
                r->o.map.pair[p].student, r->o.map.pair[p].dim);
out:
    return st;
}

/* The student's boundary ids, where spans are trained on. */
static enum rt_status make_boundary(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (!(r->o.w.alm > 0))
        return RT_OK;
    RT_TRY(rt_alloc((size_t)r->student.c.vocab_size, 1, "boundary ids", &r->boundary, err));
    if (r->student.model.tok != NULL)
        rt_boundary_ids(r->student.model.tok, r->student.c.vocab_size, r->boundary);
    r->o.boundary = r->boundary;
out:
    return st;
}

static enum rt_status check_losses(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_train_values *v = r->v;
    if (!(v->w_ce > 0) && !(v->w_kl > 0) && !(v->w_feature > 0) && !(v->w_alm > 0))
        RT_FAIL(err, USAGE, "--w-ce, --w-kl, --w-feature and --w-alm are all 0: nothing would be learnt");
    r->o.w = (struct rt_loss_weights){.ce = v->w_ce, .kl = v->w_kl, .feature = v->w_feature, .alm = v->w_alm, .tau = v->alm_tau, .T = v->kd_temperature,
                                      .tail = strcmp(v->tail, "renorm") == 0 ? RT_TAIL_RENORM : RT_TAIL_BUCKET,
                                      .cosine = strcmp(v->feature_loss, "cosine") == 0};
    r->o.ce_rest = strcmp(v->ce, "rest") == 0 && v->w_kl > 0;
    r->o.teacher_T = v->teacher_temperature > 0 ? v->teacher_temperature : v->kd_temperature;
    r->o.use_k = (int)v->top_k;
    for (int i = 0; i < r->n_sets + r->n_eval; i++) {
        const struct rt_train_info *info = rt_train_set_info(rt_train_set_at(r, i));
        r->o.k = info->top_k > r->o.k ? info->top_k : r->o.k;
        if (i < r->n_sets)
            RT_TRY(check_rows(r, i, err));
    }
    RT_TRY(check_features(r, err));
    RT_TRY(make_boundary(r, err));
    if (r->o.k > 0 && !(v->w_kl > 0))
        rt_info(r->ctx->log, "--w-kl 0: the teacher's rows are measured, not trained on");
out:
    return st;
}

/* ---- steps ---- */

static void hash_batch(struct rt_sha256 *h, const struct rt_train_run *r, const struct rt_order_item *item, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint8_t key[RT_KEY_BYTES];
        uint32_t occurrence;
        int64_t line;
        rt_train_set_key(r->set[item[i].set], item[i].seq, key, &occurrence, &line);
        rt_sha256_update(h, key, sizeof key);
        rt_sha256_update_u32(h, occurrence);
    }
}

/* The number of sequences that each set gives is whole: of a small set with a low weight it may be none. */
static enum rt_status check_given(const struct rt_train_run *r, const int64_t *given, double epochs, struct rt_err *err)
{
    const struct rt_train_info *first = rt_train_set_info(r->set[0]);
    if (r->total_steps == 0)
        return rt_fail(err, RT_USAGE, "--data: with these weights no set gives a sequence to the run (%s: %g of %ld, rounded down, an epoch): "
                       "higher weights, or more --epochs", first->path, r->weight[0], (long)first->sequences);
    for (int i = 0; i < r->n_sets; i++)
        if (given[i] == 0)
            rt_warn(r->ctx->log, "%s: the run takes no sequence of it: weight %g, %ld sequences, %.3g epochs", rt_train_set_info(r->set[i])->path, r->weight[i],
                    (long)rt_train_set_info(r->set[i])->sequences, epochs);
    return RT_OK;
}

/* Walks the order: how many steps the run has, how many tokens, what each set gives, and a hash of what it will see. */
static enum rt_status count_steps(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_train_values *v = r->v;
    struct rt_order order = {0};
    struct rt_sha256 h;
    const struct rt_order_item *item;
    int64_t n, *given = NULL;
    double squares = 0;
    r->o.epochs = v->epochs == 0 && v->steps == 0 && v->tokens == 0 ? 1 : v->epochs;
    r->o.batch_tokens = v->batch_tokens;
    r->o.seed = (uint64_t)v->common.seed;
    rt_sha256_init(&h);
    RT_TRY(rt_alloc((size_t)r->n_sets, sizeof *given, "counts of the data", &given, err));
    RT_TRY(rt_order_open(&order, r->set, r->weight, r->n_sets, r->o.seed, r->o.epochs, err));
    while ((v->steps == 0 || r->total_steps < v->steps) && (v->tokens == 0 || r->total_tokens < v->tokens)) {
        RT_TRY(rt_order_next(&order, r->o.batch_tokens, &item, &n, err));
        if (n == 0)
            break;
        hash_batch(&h, r, item, n);
        for (int64_t i = 0; i < n; i++) {
            const int64_t len = rt_train_set_length(r->set[item[i].set], item[i].seq);
            given[item[i].set]++;
            r->total_tokens += len;
            squares += (double)len * (double)len;
        }
        r->total_steps++;
    }
    RT_TRY(check_given(r, given, rt_order_epoch(&order), err));
    r->document_length = squares / (double)r->total_tokens;
    rt_sha256_final_hex(&h, r->order_sha256);
    rt_schedule_from_name(v->schedule, &r->schedule.kind);
    r->schedule.lr = v->lr;
    r->schedule.min_ratio = v->min_lr;
    r->schedule.total = r->total_steps;
    r->schedule.warmup = v->warmup < 1 ? (int64_t)ceil(v->warmup * (double)r->total_steps) : (int64_t)v->warmup;
out:
    rt_free(given);
    rt_order_close(&order);
    return st;
}

/* ---- the plan ---- */

/* What each level would take, the one that was taken in brackets. */
static void log_recompute(const struct rt_train_run *r)
{
    static const char *const what[] = {"nothing is computed again", "norms are computed again", "norms, gate and up are computed again",
                                       "layers are computed again"};
    const int level = r->o.recompute, less = r->o.recompute_less;
    char text[256] = "", mixed[96] = "", bytes[32];
    size_t at = 0;
    for (int i = 0; i < 4; i++)
        at += (size_t)snprintf(text + at, sizeof text - at, i == level ? "%s[%d: %s]" : "%s%d: %s", i > 0 ? ", " : "", i,
                               rt_human_bytes(bytes, rt_student_activation_bytes(&r->student.c, r->o.micro_tokens, rt_student_recompute(i),
                                                                                 rt_device_act_size(&r->device))));
    if (less > 0)
        snprintf(mixed, sizeof mixed, "; %d of %d layers at level %d: %s in all", less, r->student.c.layers, level - 1,
                 rt_human_bytes(bytes, r->memory.activations));
    rt_info(r->ctx->log, "activations by --recompute: %s; %s in backward%s", text, what[level], mixed);
}

/* Sequences are never cut: batches that were asked to be smaller than the longest one are as large as that. */
static void warn_batches(const struct rt_train_run *r)
{
    const struct rt_train_values *v = r->v;
    int64_t longest = 0;
    for (int i = 0; i < r->n_sets; i++)
        longest = rt_train_set_info(r->set[i])->longest > longest ? rt_train_set_info(r->set[i])->longest : longest;
    if (v->batch_tokens < longest)
        rt_warn(r->ctx->log, "--batch-tokens %ld: the longest sequence has %ld tokens, and a step takes whole ones: up to so many", (long)v->batch_tokens,
                (long)longest);
    if (v->micro_tokens > 0 && v->micro_tokens < r->o.micro_tokens)
        rt_warn(r->ctx->log, "--micro-tokens %ld: the longest sequence has %ld tokens, so micro-batches have as many", (long)v->micro_tokens,
                (long)r->o.micro_tokens);
}

static void log_plan(const struct rt_train_run *r)
{
    const struct rt_trainer_memory *m = &r->memory;
    char a[32], b[32], c[32], d[32], e[32], f[32], g[32], h[32];
    rt_info(r->ctx->log, "plan: %ld steps, %s tokens, global batches of %ld tokens in micro-batches of %ld, order %.12s", (long)r->total_steps,
            rt_human_count(a, (double)r->total_tokens), (long)r->o.batch_tokens, (long)r->o.micro_tokens, r->order_sha256);
    rt_info(r->ctx->log, "memory: %s parameters, %s gradients, %s moments, %s activations, %s losses, %s projectors, %s operations, %s batch and data",
            rt_human_bytes(a, m->weights), rt_human_bytes(b, m->grads), rt_human_bytes(c, m->moments), rt_human_bytes(d, m->activations),
            rt_human_bytes(e, m->losses), rt_human_bytes(f, m->projectors), rt_human_bytes(g, m->operations + m->recorded + m->measured), rt_human_bytes(h, m->host));
    log_recompute(r);
    rt_info(r->ctx->log, "loss: (%g CE%s + %g T^2 KL(teacher T=%g || student T=%g), tail %s, + %g F) / training rows of the global batch; reported kl holds T^2 = %g",
            r->o.w.ce, r->o.ce_rest ? " of targets without a row" : "", r->o.w.kl, r->o.teacher_T, r->o.w.T, r->v->tail, r->o.w.feature, r->o.w.T * r->o.w.T);
    if (r->o.w.alm > 0)
        rt_info(r->ctx->log, "loss of spans: + %g A / the same number of rows, tau %g", r->o.w.alm, r->o.w.tau);
}

enum rt_status rt_train_prepare(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_train_values *v = r->v;
    const struct rt_student_source source = {v->student, v->init_config, v->tokenizer, v->template_name};
    int n_ops, machines;
    enum rt_op ops[RT_OP_COUNT];
    const enum rt_op *train = rt_student_train_ops(&n_ops);
    memcpy(ops, train, (size_t)n_ops * sizeof *ops);
    if (v->w_alm > 0)
        ops[n_ops++] = RT_OP_head_likelihood;
    RT_TRY(rt_loaded_student_open(&r->student, &source, r->ctx->log, err));
    RT_TRY(open_sets(r, err));
    describe_sets(r);
    RT_TRY(check_losses(r, err));
    RT_TRY(count_steps(r, err));
    r->o.adamw = (struct rt_adamw){v->beta1, v->beta2, v->eps, v->weight_decay, v->clip, true, strcmp(v->moments, "bf16") == 0, (uint64_t)v->common.seed, strcmp(v->master, "none") == 0};
    r->o.max_spike = v->max_grad_spike;
    RT_TRY(rt_train_join(r, err));
    r->o.comm = r->comm;
    r->o.ranks = r->rank.size;
    const struct rt_dev_options device = {.index = r->rank.local_rank, .comm = r->comm};
    RT_TRY(rt_command_device_with(r->ctx, &v->common, ops, n_ops, &device, &r->device, err));
    /* On the host a sum is work of the same cores. Between GPUs of one machine it takes less time than what it costs the products beside it. */
    RT_TRY(rt_train_machines(r, &machines, err));
    r->o.overlap = r->device.be->own_memory;
    r->o.early = r->o.overlap && machines > 1;
    r->o.bucket = r->o.overlap ? RT_TRAINER_BUCKET : 0;
    RT_TRY(rt_train_plan_memory(r, err));
    warn_batches(r);
    log_plan(r);
out:
    return st;
}

enum rt_status rt_train_print_plan(const struct rt_train_run *r, struct rt_err *err)
{
    const struct rt_trainer_memory *m = &r->memory;
    int64_t sequences = 0;
    char a[32];
    (void)err;
    if (r->rank.rank > 0)
        return RT_OK;
    for (int i = 0; i < r->n_sets; i++)
        sequences += rt_train_set_info(r->set[i])->sequences;
    const double flops = (double)r->total_tokens * rt_student_flops_per_token(&r->student.c, &r->student.p, r->document_length);
    if (r->v->common.json)
        printf("{\"steps\":%ld,\"tokens\":%ld,\"sequences\":%ld,\"parameters\":%ld,\"micro_tokens\":%ld,\"recompute\":%d,\"recompute_less\":%d,\"memory\":{\"parameters\":%zu,\"gradients\":%zu,"
               "\"moments\":%zu,\"activations\":%zu,\"losses\":%zu,\"projectors\":%zu,\"batch\":%zu,\"total\":%zu},\"ranks\":%d,\"flops\":%.6g,\"order_sha256\":\"%s\"}\n",
               (long)r->total_steps, (long)r->total_tokens, (long)sequences, (long)r->student.p.count, (long)r->o.micro_tokens, r->o.recompute, r->o.recompute_less, m->weights, m->grads,
               m->moments, m->activations, m->losses, m->projectors, m->host, rt_train_memory_planned(r), r->rank.size, flops, r->order_sha256);
    else
        printf("steps         %ld\ntokens        %ld of %ld sequences\nparameters    %ld\nranks         %d\nmicro-batch   %ld tokens\nmemory        %s a rank\n"
               "operations    %.3g; %.2f hours at 50 GFLOP/s, %.3f at 300 TFLOP/s\n", (long)r->total_steps, (long)r->total_tokens, (long)sequences,
               (long)r->student.p.count, r->rank.size, (long)r->o.micro_tokens, rt_human_bytes(a, rt_train_memory_planned(r)), flops, flops / 5e10 / 3600, flops / 3e14 / 3600);
    return RT_OK;
}
