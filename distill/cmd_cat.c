/* retort cat: rows of shards as JSON lines. */
#include <math.h>
#include <stdio.h>

#include "core/dtype.h"
#include "core/mem.h"
#include "distill/command.h"
#include "formats/shard.h"

struct values {
    struct rt_common common;
    int64_t seq, limit;
    bool features;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"seq", RT_OPT_INT, V(seq), "-1", -1, 9e15, NULL, "N", "only sequence N, from 0; -1: all", false, false},
    {"limit", RT_OPT_INT, V(limit), "0", 0, 9e15, NULL, "N", "at most N rows; 0: all", false, false},
    {"features", RT_OPT_FLAG, V(features), NULL, 0, 0, NULL, NULL, "hidden states of each row's position too", false, false},
    {0},
};

enum { FLUSH = 1 << 18 };

static enum rt_status put_floats(struct rt_buf *b, const float *v, int64_t n, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (int64_t i = 0; i < n; i++)
        RT_TRY(rt_buf_printf(b, err, "%s%.9g", i > 0 ? "," : "", (double)v[i]));
out:
    return st;
}

/* The states at one position: {"20": [...], "final": [...]}. */
static enum rt_status put_features(struct rt_buf *b, const struct rt_rows *r, const struct rt_row_identity *id, int64_t position, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_buf_puts(b, ",\"features\":{", err));
    for (int f = 0; f < r->n_features; f++) {
        const struct rt_feature_spec *s = &id->feature[f];
        const size_t size = rt_dtype_size(s->dtype);
        const char *at = (const char *)r->feature[f] + (size_t)position * (size_t)s->dim * size;
        const float scale = r->feature_scale[f] != NULL ? r->feature_scale[f][position] : 1;
        if (s->layer == RT_LAYER_FINAL)
            RT_TRY(rt_buf_printf(b, err, "%s\"final\":[", f > 0 ? "," : ""));
        else
            RT_TRY(rt_buf_printf(b, err, "%s\"%d\":[", f > 0 ? "," : "", s->layer));
        for (int i = 0; i < s->dim; i++) {
            float v;
            if (!rt_to_f32(&v, at + (size_t)i * size, s->dtype, 1))
                RT_FAIL(err, INTERNAL, "features of type %s", rt_dtype_name(s->dtype));
            v *= scale;
            RT_TRY(rt_buf_printf(b, err, "%s%.9g", i > 0 ? "," : "", (double)v));
        }
        RT_TRY(rt_buf_puts(b, "]", err));
    }
    RT_TRY(rt_buf_puts(b, "}", err));
out:
    return st;
}

static enum rt_status put_row(struct rt_buf *b, const struct rt_rows *r, const struct rt_row_identity *id, int64_t seq, int64_t row, bool features,
                              struct rt_err *err)
{
    const uint32_t position = r->position[row];
    enum rt_status st;
    RT_TRY(rt_buf_printf(b, err, "{\"seq\":%lld,\"pos\":%u,\"token\":%u,\"next\":%u,\"next_logprob\":%.9g,\"next_rank\":%u,\"ids\":[", (long long)seq, position,
                         r->ids[position], r->next_id[row], (double)r->next_logprob[row], r->next_rank[row]));
    const int k = rt_row_entries(r, row);
    for (int i = 0; i < k; i++)
        RT_TRY(rt_buf_printf(b, err, "%s%u", i > 0 ? "," : "", r->topk_ids[row * r->k + i]));
    RT_TRY(rt_buf_puts(b, "],\"logits\":[", err));
    if (k > 0)
        RT_TRY(put_floats(b, r->topk_logits + row * r->k, k, err));
    RT_TRY(rt_buf_puts(b, "],\"lse\":{", err));
    for (int i = 0; i < r->n_lse; i++)
        RT_TRY(rt_buf_printf(b, err, "%s\"%g\":%.9g", i > 0 ? "," : "", id->lse_temperature[i], (double)r->lse[row * r->n_lse + i]));
    RT_TRY(rt_buf_puts(b, "}", err));
    if (r->boundary_logp != NULL && isfinite(r->boundary_logp[row]))
        RT_TRY(rt_buf_printf(b, err, ",\"boundary_logprob\":%.9g", (double)r->boundary_logp[row]));
    if (r->span != NULL && r->span[row] > 0)
        RT_TRY(rt_buf_printf(b, err, ",\"span\":%u,\"span_logprob\":%.9g", r->span[row], (double)r->span_logp[row]));
    if (features)
        RT_TRY(put_features(b, r, id, position, err));
    RT_TRY(rt_buf_puts(b, "}\n", err));
out:
    return st;
}

static enum rt_status flush(struct rt_buf *b, struct rt_err *err)
{
    if (b->len > 0 && fwrite(b->data, 1, b->len, stdout) != b->len)
        return rt_fail_errno(err, "cannot write to stdout");
    b->len = 0;
    return RT_OK;
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    const struct values *v = values;
    struct rt_shard_set *set = NULL;
    struct rt_buf out = {0};
    struct rt_rows rows;
    enum rt_status st;
    int64_t left = v->limit > 0 ? v->limit : INT64_MAX;
    RT_TRY(rt_shard_set_open(pos->items[0], &set, err));
    const struct rt_row_identity *id = rt_shard_set_identity(set);
    const int64_t n = rt_shard_set_info(set)->sequences;
    if (v->seq >= n)
        RT_FAIL(err, USAGE, "--seq %ld: %s holds sequences 0 to %ld", (long)v->seq, pos->items[0], (long)n - 1);
    if (v->features && id->n_features == 0)
        RT_FAIL(err, USAGE, "--features: %s holds no hidden states", pos->items[0]);
    for (int64_t i = v->seq >= 0 ? v->seq : 0; i < (v->seq >= 0 ? v->seq + 1 : n) && left > 0; i++) {
        if (ctx->stop != NULL && ctx->stop(ctx->stop_self))
            RT_FAIL(err, INTERRUPTED, "interrupted");
        RT_TRY(rt_shard_set_get(set, i, &rows, err));
        for (int64_t r = 0; r < rows.n_rows && left > 0; r++, left--) {
            RT_TRY(put_row(&out, &rows, id, i, r, v->features, err));
            if (out.len > FLUSH)
                RT_TRY(flush(&out, err));
        }
    }
    RT_TRY(flush(&out, err));
out:
    rt_buf_free(&out);
    rt_shard_set_free(set);
    return st;
}

const struct rt_command rt_cmd_cat = {
    .name = "cat",
    .synopsis = "DIR|SHARD [--seq N] [--limit N] [--features]",
    .summary = "rows of shards as JSON lines",
    .help = "A line a row: seq, pos, token (at pos), next (the token that followed), next_logprob (nats, T=1), next_rank (from 0), ids and raw logits of the\n"
            "greatest, and lse, the log-sum-exp at each stored temperature: log p = logit/T - lse. Where stored: boundary_logprob,\n"
            "or span (rows of the span that ends here) and span_logprob. Numbers read back as the same float32.\n\n"
            "    retort cat shards/ --seq 0 --limit 5",
    .options = options,
    .values_size = sizeof(struct values),
    .min_positionals = 1,
    .max_positionals = 1,
    .run = run,
};
