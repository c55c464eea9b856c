/* Scoring with a teacher whose weights are streamed, layer by layer: the rate of a whole model from the layers of a part of it.
 *
 *     bench_make_teacher --geometry v3 --layers 5 --dense-first 3 --out DIR
 *     bench_teacher_stream --teacher DIR [options]          --help lists them
 *
 * The same rt_teacher_score that `retort logits` runs, on any backend. Each layer is timed from the state before it to the state after
 * it; the rate of the model is tokens / (dense layers + mixture layers + embeddings + head), with as many layers as --model-dense and
 * --model-moe say (DeepSeek-V3: 3 and 58), a layer of each kind counting as their mean here: with the model's own three dense layers what the first
 * layer waits for counts once, as in the model. The first window reads the files; where --memory holds the checkpoint, the later ones stream it from
 * there. The share that waits is the time for which the device had no work but to wait for weights.
 */
#include <math.h>

#include "bench/bench.h"
#include "bench/command.h"
#include "bench/profile.h"
#include "teacher/score.h"

enum { MAX_LIST = 16, MAX_LAYERS = 256 };

struct values {
    const char *teacher, *device, *lengths, *windows;
    int64_t memory, gpu_memory, top_k, threads, model_dense, model_moe, repeats, chunk, features;
    bool w8a16, stream, profile, help;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"teacher", RT_OPT_STRING, V(teacher), NULL, 0, 0, NULL, "DIR", "checkpoint", true, false},
    {"device", RT_OPT_STRING, V(device), "auto", 0, 0, NULL, "NAME", "backend", false, false},
    {"lengths", RT_OPT_STRING, V(lengths), "4096,2048,8192", 0, 0, NULL, "N,N", "tokens of a sequence; the first is run with every window, others with the middle one", false, false},
    {"windows", RT_OPT_STRING, V(windows), "32768,131072,262144", 0, 0, NULL, "N,N", "tokens of a window, ascending", false, false},
    {"memory", RT_OPT_BYTES, V(memory), "16G", 0, 0, NULL, "80G", "host memory", false, false},
    {"gpu-memory", RT_OPT_BYTES, V(gpu_memory), "0", 0, 0, NULL, "40G", "GPU memory, 0: what is free", false, false},
    {"top-k", RT_OPT_INT, V(top_k), "64", 0, 65536, NULL, "N", "entries of a row", false, false},
    {"threads", RT_OPT_INT, V(threads), "0", 0, 1024, NULL, "N", "threads of a cpu backend", false, false},
    {"model-dense", RT_OPT_INT, V(model_dense), "3", 0, 1e4, NULL, "N", "dense layers of the whole model", false, false},
    {"model-moe", RT_OPT_INT, V(model_moe), "58", 0, 1e4, NULL, "N", "mixture layers of the whole model", false, false},
    {"repeats", RT_OPT_INT, V(repeats), "2", 1, 100, NULL, "N", "runs of each case, the best is shown", false, false},
    {"chunk", RT_OPT_INT, V(chunk), "0", 0, 1 << 20, NULL, "N", "tokens that attention takes at a time, 0: as planned", false, false},
    {"w8a16", RT_OPT_FLAG, V(w8a16), NULL, 0, 0, NULL, NULL, "plain activations; else FP8 ones", false, false},
    {"stream", RT_OPT_FLAG, V(stream), NULL, 0, 0, NULL, NULL, "no weight stays on the device, as in a model that is far larger than it", false, false},
    {"features", RT_OPT_INT, V(features), "0", 0, 1e5, NULL, "DIM", "then what it costs to store states of two layers, projected to so many dimensions", false, false},
    {"profile", RT_OPT_FLAG, V(profile), NULL, 0, 0, NULL, NULL, "then the time of each operation, in one more run of each case", false, false},
    {"help", RT_OPT_FLAG, V(help), NULL, 0, 0, NULL, NULL, "this text", false, false},
    {0},
};

struct run {
    struct values v;
    struct rt_device d;
    struct rt_backend timed;
    struct rt_teacher *t;
    struct rt_score_options so;
    struct rt_rows *seq;
    uint32_t *ids;
    uint8_t *mask;
    float *projection[2];
    double at[MAX_LAYERS + 2]; /* when state l was there; [layers + 1]: the normalised one */
    int layers;
};

static int parse_list(const char *text, int64_t *out)
{
    int n = 0;
    for (char *end; n < MAX_LIST && *text != '\0'; text = *end == ',' ? end + 1 : end) {
        out[n] = strtoll(text, &end, 10);
        if (end == text || out[n] < 2 || (*end != ',' && *end != '\0'))
            return 0;
        n++;
    }
    return n;
}

static void tap(void *self, int layer, __attribute__((unused)) const void *x, __attribute__((unused)) int64_t n)
{
    struct run *r = self;
    r->at[layer == RT_LAYER_FINAL ? r->layers + 1 : layer] = rt_now();
}

struct figures {
    double embed, dense, moe, head, wait, total, read;
};

static enum rt_status measure(struct run *r, int64_t length, int64_t window, struct figures *f, struct rt_err *err)
{
    const struct rt_teacher_config *c = rt_teacher_config(r->t);
    const int64_t n_seqs = window / length;
    enum rt_status st;
    for (int64_t s = 0; s < n_seqs; s++) {
        r->seq[s] = (struct rt_rows){.n_tokens = length, .ids = r->ids + s * length, .loss_mask = r->mask, .source_line = s + 1};
        rt_rows_key(r->seq[s].ids, length, r->seq[s].key);
    }
    const double waited = rt_weights_waited(r->t->w), t0 = rt_now();
    const uint64_t read = rt_weights_bytes_read(r->t->w);
    RT_TRY(rt_teacher_score(r->t, &r->so, r->seq, n_seqs, 0, NULL, err));
    const double t1 = rt_now();
    *f = (struct figures){.embed = r->at[0] - t0, .head = t1 - r->at[c->layers], .total = t1 - t0, .wait = rt_weights_waited(r->t->w) - waited,
                          .read = (double)(rt_weights_bytes_read(r->t->w) - read)};
    for (int l = 0; l < c->layers; l++)
        *(l < c->dense_first ? &f->dense : &f->moe) += r->at[l + 1] - r->at[l];
    f->dense /= c->dense_first > 0 ? c->dense_first : 1;
    f->moe /= c->layers > c->dense_first ? c->layers - c->dense_first : 1;
out:
    return st;
}

static void print_case(const struct run *r, int64_t length, int64_t window, const struct figures *f)
{
    const double n = (double)(window / length * length);
    const double whole = (double)r->v.model_dense * f->dense + (double)r->v.model_moe * f->moe + f->head + f->embed;
    printf("  %6ld  %8ld  %8.1f  %8.1f  %8.1f  %8.1f  %6.2f%%  %7.2f  %9.0f\n", (long)length, (long)window, f->embed * 1e3, f->dense * 1e3, f->moe * 1e3,
           f->head * 1e3, 100 * f->wait / f->total, f->read / f->total * 1e-9, n / whole);
    fflush(stdout);
}

/* Two runs with features and without in turns; the better of each. */
static enum rt_status with_features(struct run *r, int64_t length, int64_t window, struct rt_err *err)
{
    const struct rt_teacher_config *c = rt_teacher_config(r->t);
    const int64_t n = window / length * length, dim = rt_min64(r->v.features, c->hidden);
    double best[2] = {INFINITY, INFINITY};
    struct figures f;
    enum rt_status st = RT_OK;
    for (int i = 0; i < 2; i++) {
        r->so.feature[i] = (struct rt_feature_spec){.layer = c->layers - i, .dim = dim, .dtype = RT_E4M3, .projected = true};
        if (r->projection[i] == NULL) {
            RT_TRY(rt_alloc((size_t)(dim * c->hidden), sizeof(float), "projection", &r->projection[i], err));
            RT_TRY(rt_projection_matrix(0, c->layers - i, dim, c->hidden, r->projection[i], err));
        }
        r->so.projection[i] = r->projection[i];
    }
    for (int k = 0; k < 2 * r->v.repeats + 2; k++) { /* the first of each is not counted */
        r->so.n_features = k % 2 == 0 ? 2 : 0;
        RT_TRY(measure(r, length, window, &f, err));
        if (k >= 2)
            best[k % 2] = fmin(best[k % 2], f.total);
    }
    printf("    states of two layers in %ld dimensions: %.1f ms instead of %.1f, %.3f us a token; its %ld bytes cross in %.3f at 55 GB/s\n", (long)dim,
           best[0] * 1e3, best[1] * 1e3, (best[0] - best[1]) * 1e6 / (double)n, (long)(2 * (dim + 4)), (double)(2 * (dim + 4)) / 55e3);
out:
    r->so.n_features = 0;
    return st;
}

static enum rt_status run_cases(struct run *r, const int64_t *length, int n_lengths, const int64_t *window, int n_windows, struct rt_err *err)
{
    struct figures f, best = {0};
    enum rt_status st;
    printf("  length    window  embed ms  dense ms    moe ms   head ms  waiting  read GB/s  tokens/s of the model\n");
    RT_TRY(measure(r, length[0], window[0], &f, err));
    print_case(r, length[0], window[0], &f);
    printf("  the first window, from the files\n");
    for (int i = 0; i < n_lengths; i++)
        for (int w = 0; w < n_windows; w++) {
            if (i > 0 && w != n_windows / 2)
                continue;
            for (int k = 0; k < r->v.repeats; k++) {
                RT_TRY(measure(r, length[i], window[w], &f, err));
                if (k == 0 || f.moe < best.moe)
                    best = f;
            }
            print_case(r, length[i], window[w], &best);
            if (r->v.features > 0)
                RT_TRY(with_features(r, length[i], window[w], err));
            if (r->v.profile) {
                profile_start();
                RT_TRY(measure(r, length[i], window[w], &f, err));
                profile_print(&r->d, "    operations", f.total);
            }
        }
out:
    return st;
}

static enum rt_status prepare(struct run *r, int64_t length, int64_t window, struct rt_err *err)
{
    const struct values *v = &r->v;
    const struct rt_backend *be;
    char a[32], b[32], c[32], e[32];
    int n_ops;
    enum rt_status st;
    const enum rt_op *ops = rt_teacher_score_ops(&n_ops);
    RT_TRY(rt_backend_select(v->device, ops, n_ops, &be, err));
    if (v->profile) {
        r->timed = profile_wrap(be);
        be = &r->timed;
    }
    RT_TRY(rt_device_open(be, &(struct rt_dev_options){.threads = (int)v->threads}, &r->d, err));
    r->so = (struct rt_score_options){.top_k = (int)v->top_k, .n_lse = 1, .lse_temperature = {1}, .tap = tap, .tap_self = r};
    const struct rt_teacher_options o = {.dir = v->teacher, .device = &r->d, .w8a8 = !v->w8a16, .memory = v->memory, .gpu_memory = v->gpu_memory,
                                         .chunk = v->chunk, .gpu_ring = v->stream ? INT64_MAX : 0,
                                         .max_length = length, .window = window, .data_tokens = window, .token_bytes = rt_score_token_bytes(&r->so)};
    RT_TRY(rt_teacher_open(&o, &r->t, err));
    const struct rt_teacher_plan *p = rt_teacher_plan(r->t);
    r->layers = rt_teacher_config(r->t)->layers;
    if (r->layers > MAX_LAYERS)
        RT_FAIL(err, USAGE, "more than %d layers", MAX_LAYERS);
    printf("scoring, %s, %s, %s\n", v->teacher, be->name, be->describe(r->d.dev));
    printf("  window %ld, chunk %ld; GPU: states %s, scratch %s, weights %s (ring %s)\n", (long)p->window, (long)p->chunk, rt_human_bytes(a, p->gpu_state),
           rt_human_bytes(b, p->gpu_scratch), rt_human_bytes(c, p->gpu_weight_budget), rt_human_bytes(e, p->gpu_ring));
    r->so.n_ids = rt_teacher_config(r->t)->vocab_size;
    r->so.top_k = (int)rt_min64(r->so.top_k, r->so.n_ids);
    RT_TRY(rt_alloc((size_t)window, sizeof *r->seq, "sequences", &r->seq, err));
    RT_TRY(rt_alloc((size_t)window, sizeof *r->ids, "ids", &r->ids, err));
    RT_TRY(rt_alloc((size_t)window, 1, "mask", &r->mask, err));
    memset(r->mask, 1, (size_t)window);
    for (int64_t i = 0; i < window; i++)
        r->ids[i] = (uint32_t)(rt_rng_u64(1, 2, (uint64_t)i) % (uint64_t)r->so.n_ids);
out:
    return st;
}

int main(int argc, char **argv)
{
    struct run r = {.layers = 0};
    struct rt_err err = {0};
    int64_t length[MAX_LIST], window[MAX_LIST], longest = 0, widest = 0;
    enum rt_status st = bench_command(options, argc, argv, &r.v, &r.v.help, NULL, &err);
    if (st == RT_OK && r.v.help)
        return 0;
    if (st != RT_OK)
        bench_fatal("bench_teacher_stream", &err);
    const int n_lengths = parse_list(r.v.lengths, length), n_windows = parse_list(r.v.windows, window);
    if (n_lengths == 0 || n_windows == 0) {
        st = rt_fail(&err, RT_USAGE, "--lengths and --windows are lists of numbers: 2048,4096");
        bench_fatal("bench_teacher_stream", &err);
    }
    for (int i = 0; i < n_lengths; i++)
        longest = length[i] > longest ? length[i] : longest;
    for (int i = 0; i < n_windows; i++)
        widest = window[i] > widest ? window[i] : widest;
    st = prepare(&r, longest, widest, &err);
    if (st == RT_OK)
        st = run_cases(&r, length, n_lengths, window, n_windows, &err);
    if (st != RT_OK)
        bench_fatal("bench_teacher_stream", &err);
    rt_teacher_close(r.t);
    rt_device_close(&r.d);
    rt_free(r.seq);
    rt_free(r.ids);
    rt_free(r.mask);
    for (int i = 0; i < 2; i++)
        rt_free(r.projection[i]);
    return 0;
}
