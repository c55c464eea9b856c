/* Scoring speed of a teacher beside the same multiplications by plain OpenBLAS.
 *
 *     bench_teacher_score --teacher DIR [options]          --help lists them
 *
 * Ours is rt_teacher_score as `retort logits` calls it: weights come from the files (or the page cache) in the types that they are
 * stored in, window by window; rows go nowhere, or with --out into real shards. The plain side multiplies float32 weights that lie in
 * memory already, at the shapes of the same forward, experts at their mean number of rows; it does no norm, softmax, routing or top-k.
 */
#include "bench/bench.h"
#include "bench/command.h"
#include "core/io.h"
#include "formats/shard.h"
#include "teacher/score.h"

struct values {
    const char *teacher, *out;
    int64_t sequences, length, pairs, threads, memory, top_k;
    bool w8a8, json, list, help, no_plain;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"teacher", RT_OPT_STRING, V(teacher), NULL, 0, 0, NULL, "DIR", "checkpoint", true, false},
    {"sequences", RT_OPT_INT, V(sequences), "4", 1, 1e6, NULL, "N", "sequences of a window", false, false},
    {"length", RT_OPT_INT, V(length), "512", 2, 1e6, NULL, "N", "tokens of a sequence", false, false},
    {"pairs", RT_OPT_INT, V(pairs), "7", 1, BENCH_PAIRS, NULL, "N", "pairs of timings", false, false},
    {"threads", RT_OPT_INT, V(threads), "2", 0, 1024, NULL, "N", "threads of both sides, 0 takes all", false, false},
    {"memory", RT_OPT_BYTES, V(memory), "4G", 0, 0, NULL, "8G", "memory of the teacher", false, false},
    {"top-k", RT_OPT_INT, V(top_k), "64", 0, 65536, NULL, "N", "entries of a row", false, false},
    {"out", RT_OPT_STRING, V(out), NULL, 0, 0, NULL, "DIR", "write shards there, one set a run", false, false},
    {"w8a8", RT_OPT_FLAG, V(w8a8), NULL, 0, 0, NULL, NULL, "FP8 activations", false, false},
    {"alone", RT_OPT_FLAG, V(no_plain), NULL, 0, 0, NULL, NULL, "ours only, for a profiler", false, false},
    {"list", RT_OPT_FLAG, V(list), NULL, 0, 0, NULL, NULL, "also print the speed of each plain product", false, false},
    {"json", RT_OPT_FLAG, V(json), NULL, 0, 0, NULL, NULL, "one JSON object a case", false, false},
    {"help", RT_OPT_FLAG, V(help), NULL, 0, 0, NULL, NULL, "this text", false, false},
    {0},
};

struct run {
    struct values v;
    struct rt_device d;
    struct rt_teacher *t;
    struct rt_score_options so;
    struct rt_rows *seq;
    uint32_t *ids;
    uint8_t *mask;
    int runs;
};

static void products(const struct rt_teacher_config *c, const struct run *r, struct bench_list *l)
{
    const int64_t n = r->v.sequences * r->v.length, H = c->hidden, dq = c->dn + c->dr;
    for (int i = 0; i < c->layers; i++) {
        if (c->q_lora > 0)
            bench_add(l, "q_a", BENCH_NT, n, c->q_lora, H, 1, true);
        bench_add(l, "q_b", BENCH_NT, n, c->heads * dq, c->q_lora > 0 ? c->q_lora : H, 1, true);
        bench_add(l, "kv_a", BENCH_NT, n, c->kv_lora + c->dr, H, 1, true);
        bench_add(l, "kv_b", BENCH_NT, n, (int64_t)c->heads * (c->dn + c->dv), c->kv_lora, 1, true);
        bench_add_causal(l, "attention", r->v.length, dq, c->dv, r->v.sequences * c->heads, false);
        bench_add(l, "o", BENCH_NT, n, H, (int64_t)c->heads * c->dv, 1, true);
        if (i < c->dense_first) {
            bench_add(l, "gate", BENCH_NT, n, c->inter, H, 1, true);
            bench_add(l, "up", BENCH_NT, n, c->inter, H, 1, true);
            bench_add(l, "down", BENCH_NT, n, H, c->inter, 1, true);
            continue;
        }
        bench_add(l, "router", BENCH_NT, n, c->experts, H, 1, true);
        const int64_t shared = (int64_t)c->shared * c->moe_inter, rows = rt_max64(1, n * c->top_k / c->experts);
        if (shared > 0) {
            bench_add(l, "shared gate", BENCH_NT, n, shared, H, 1, true);
            bench_add(l, "shared up", BENCH_NT, n, shared, H, 1, true);
            bench_add(l, "shared down", BENCH_NT, n, H, shared, 1, true);
        }
        bench_add(l, "expert gate", BENCH_NT, rows, c->moe_inter, H, c->experts, true);
        bench_add(l, "expert up", BENCH_NT, rows, c->moe_inter, H, c->experts, true);
        bench_add(l, "expert down", BENCH_NT, rows, H, c->moe_inter, c->experts, true);
    }
    if (r->v.top_k > 0)
        for (int64_t at = 0, rows = n - r->v.sequences; at < rows; at += 1024) /* logits of a whole window would not fit memory */
            bench_add(l, "head", BENCH_NT, rt_min64(1024, rows - at), r->so.n_ids, H, 1, true);
}

static enum rt_status score(void *self, struct rt_err *err)
{
    struct run *r = self;
    struct rt_shard_sink *shards = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    char dir[4096];
    enum rt_status st;
    if (r->v.out != NULL) {
        const struct rt_teacher_config *c = rt_teacher_config(r->t);
        struct rt_row_identity id = {.vocab_size = c->vocab_size, .n_ids = r->so.n_ids, .top_k = r->so.top_k, .n_lse = 1};
        id.lse_temperature[0] = 1;
        snprintf(id.teacher_sha256, sizeof id.teacher_sha256, "%s", rt_teacher_sha256(r->t));
        snprintf(id.mode, sizeof id.mode, "%s/f32/cpu", r->v.w8a8 ? "w8a8" : "w8a16");
        if (snprintf(dir, sizeof dir, "%s/%d", r->v.out, r->runs++) >= (int)sizeof dir)
            RT_FAIL(err, USAGE, "--out: too long a path");
        RT_TRY(rt_mkdirs(dir, err));
        RT_TRY(rt_shard_sink_open(dir, &id, NULL, &shards, &sink, &resume, err));
    }
    RT_TRY(rt_teacher_score(r->t, &r->so, r->seq, r->v.sequences, 0, shards != NULL ? &sink : NULL, err));
    if (shards != NULL)
        RT_TRY(sink.finish(sink.self, err));
out:
    rt_shard_sink_free(shards);
    return st;
}

static enum rt_status prepare(struct run *r, struct rt_err *err)
{
    const struct values *v = &r->v;
    const int64_t n = v->sequences * v->length;
    enum rt_status st;
    RT_TRY(rt_device_open(&rt_backend_cpu, &(struct rt_dev_options){.threads = (int)v->threads}, &r->d, err));
    r->so = (struct rt_score_options){.top_k = (int)v->top_k, .n_lse = 1, .lse_temperature = {1}};
    const struct rt_teacher_options o = {.dir = v->teacher, .device = &r->d, .w8a8 = v->w8a8, .memory = v->memory, .max_length = v->length,
                                         .window = n, .data_tokens = n, .token_bytes = rt_score_token_bytes(&r->so)};
    RT_TRY(rt_teacher_open(&o, &r->t, err));
    r->so.n_ids = rt_teacher_config(r->t)->vocab_size;
    r->so.top_k = (int)rt_min64(r->so.top_k, r->so.n_ids);
    RT_TRY(rt_alloc((size_t)v->sequences, sizeof *r->seq, "sequences", &r->seq, err));
    RT_TRY(rt_alloc((size_t)n, sizeof *r->ids, "ids", &r->ids, err));
    RT_TRY(rt_alloc((size_t)n, 1, "mask", &r->mask, err));
    memset(r->mask, 1, (size_t)n);
    for (int64_t i = 0; i < n; i++)
        r->ids[i] = (uint32_t)(rt_rng_u64(1, 2, (uint64_t)i) % (uint64_t)r->so.n_ids);
    for (int64_t s = 0; s < v->sequences; s++) {
        r->seq[s] = (struct rt_rows){.n_tokens = v->length, .ids = r->ids + s * v->length, .loss_mask = r->mask, .source_line = s + 1};
        rt_rows_key(r->seq[s].ids, v->length, r->seq[s].key);
    }
out:
    return st;
}

int main(int argc, char **argv)
{
    struct run r = {.runs = 0};
    struct bench_list l = {.n = 0};
    struct bench_result result = {.pairs = 0};
    struct rt_err err = {0};
    char what[512];
    enum rt_status st = bench_command(options, argc, argv, &r.v, &r.v.help, NULL, &err);
    if (st == RT_OK && r.v.help)
        return 0;
    if (st == RT_OK)
        st = prepare(&r, &err);
    if (st != RT_OK)
        bench_fatal("bench_teacher_score", &err);
    if (r.v.no_plain) {
        for (int64_t i = 0; i < r.v.pairs && st == RT_OK; i++) {
            const double t0 = rt_now();
            st = score(&r, &err);
            printf("%.3f s\n", rt_now() - t0);
        }
        if (st != RT_OK)
            bench_fatal("bench_teacher_score", &err);
        return 0;
    }
    products(rt_teacher_config(r.t), &r, &l);
    st = bench_calibrate(&l, rt_max64(1, r.v.threads > 0 ? r.v.threads : rt_cpu_count()), (size_t)512 << 20, &err);
    if (st == RT_OK)
        st = bench_pairs(&l, (int)r.v.pairs, score, &r, &result, &err);
    if (st != RT_OK)
        bench_fatal("bench_teacher_score", &err);
    snprintf(what, sizeof what, "scoring, %s, %ld x %ld tokens, top %ld%s", r.v.teacher, (long)r.v.sequences, (long)r.v.length, (long)r.v.top_k,
             r.v.w8a8 ? ", w8a8" : "");
    bench_report(r.v.json, argc, argv, what, &l, &result, (double)(r.v.sequences * r.v.length));
    if (r.v.list)
        bench_print_list(&l);
    bench_list_free(&l);
    rt_teacher_close(r.t);
    rt_device_close(&r.d);
    void *const host[] = {r.seq, r.ids, r.mask};
    for (int i = 0; i < 3; i++)
        rt_free(host[i]);
    return 0;
}
