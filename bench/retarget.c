/* Rows a second and core of `retort retarget`: rows of 64 entries over real texts, from shards to shards.
 *
 *     bench_retarget TEACHER STUDENT DIR FILE.jsonl ...  [--rows N] [--k K] [--threads N]
 *
 * TEACHER, STUDENT: model directories (a tokenizer.json is enough). FILE: lines with "text", or "prompt" and "completion" (the completion is taken).
 * DIR: an empty directory for two sets of shards. Entries are drawn from the teacher's vocabulary, the realised token among the first four; logits
 * fall as those of a language model do. The first two lines time the parts of one sequence alone, the last one the whole command.
 */
#include <math.h>

#include "bench/bench.h"

#include "distill/jsonl.h"
#include "distill/retarget_run.h"

struct bench {
    struct rt_model_dir teacher, student;
    struct rt_buf ids, first; /* u32 of all texts; int64 where each begins */
    int64_t rows, k, threads;
    const char *dir;
    /* one sequence */
    struct rt_buf mask, text, ends, position, top_ids, top_logits, lse, logprob, rank;
};

static enum rt_status add_text(struct bench *b, const char *text, size_t len, struct rt_err *err)
{
    enum rt_status st;
    struct rt_encoding e = {0};
    const int64_t at = (int64_t)(b->ids.len / sizeof(uint32_t));
    RT_TRY(rt_tokenizer_encode(b->teacher.tok, text, len, &e, err));
    if (e.n < 8)
        goto out;
    RT_TRY(rt_buf_append(&b->first, &at, sizeof at, err));
    RT_TRY(rt_buf_append(&b->ids, e.ids, e.n * sizeof *e.ids, err));
out:
    rt_encoding_free(&e);
    return st;
}

static enum rt_status read_texts(struct bench *b, const char *file, struct rt_err *err)
{
    enum rt_status st;
    struct rt_jsonl f = {0};
    const struct rt_json *v;
    RT_TRY(rt_jsonl_open(file, &f, err));
    for (;;) {
        size_t n = 0;
        RT_TRY(rt_jsonl_next(&f, &v, err));
        if (v == NULL)
            break;
        const char *text = rt_json_as_string(rt_json_get(v, "text"), &n);
        if (text == NULL)
            text = rt_json_as_string(rt_json_get(v, "completion"), &n);
        if (text != NULL)
            RT_TRY(add_text(b, text, n, err));
    }
out:
    rt_jsonl_close(&f);
    return st;
}

static struct rt_row_identity identity(const struct bench *b)
{
    struct rt_row_identity id = {.n_lse = 1, .lse_temperature = {1}, .top_k = (int)b->k, .n_ids = rt_tokenizer_n_ids(b->teacher.tok)};
    id.vocab_size = id.n_ids;
    snprintf(id.teacher_sha256, sizeof id.teacher_sha256, "bench");
    snprintf(id.mode, sizeof id.mode, "bench");
    snprintf(id.tokenizer_sha256, sizeof id.tokenizer_sha256, "%s", rt_tokenizer_sha256(b->teacher.tok));
    return id;
}

/* logit j of a row: 6 nats over the first ten entries, then slowly on */
static float logit_of(int64_t j, uint64_t noise)
{
    return 20.0f - 2.6f * logf((float)(j + 1)) - 0.001f * (float)j - (float)(noise % 1000) * 1e-7f;
}

static void make_row(const struct bench *b, uint64_t seed, uint32_t next, uint32_t *ids, float *logits, float *lse, float *logprob, uint32_t *rank)
{
    const uint32_t n_ids = rt_tokenizer_n_ids(b->teacher.tok), at = (uint32_t)(seed % 4);
    const char *bytes;
    size_t len;
    double sum = 0;
    uint64_t x = seed;
    for (int64_t j = 0; j < b->k; j++) {
        uint32_t id = next;
        bool again = j != at;
        while (again) { /* one that exists and is not there yet */
            x = x * 6364136223846793005u + 1442695040888963407u;
            id = (uint32_t)((x >> 33) % n_ids);
            again = id == next || !rt_tokenizer_bytes(b->teacher.tok, id, &bytes, &len) || len == 0;
            for (int64_t l = 0; l < j && !again; l++)
                again = ids[l] == id;
        }
        ids[j] = id;
        logits[j] = logit_of(j, seed);
        sum += exp((double)logits[j] - 20);
    }
    *lse = (float)(20 + log(sum * 1.01));
    *logprob = logits[at] - *lse;
    *rank = at;
}

/* The rows of text i (whole, everything a target), into b's buffers. */
static enum rt_status make_rows(struct bench *b, int64_t i, struct rt_rows *r, struct rt_err *err)
{
    enum rt_status st;
    const int64_t *first = (const int64_t *)(const void *)b->first.data, count = (int64_t)(b->first.len / sizeof *first);
    const int64_t total = (int64_t)(b->ids.len / sizeof(uint32_t)), n = (i % count + 1 < count ? first[i % count + 1] : total) - first[i % count];
    const uint32_t *ids = (const uint32_t *)(const void *)b->ids.data + first[i % count];
    struct rt_buf *const all[] = {&b->mask, &b->text, &b->ends, &b->position, &b->top_ids, &b->top_logits, &b->lse, &b->logprob, &b->rank};
    const size_t width[] = {1, 1, 4, 4, 4 * (size_t)b->k, 4 * (size_t)b->k, 4, 4, 4};
    for (size_t c = 0; c < sizeof all / sizeof all[0]; c++) {
        all[c]->len = 0;
        RT_TRY(rt_buf_reserve(all[c], (size_t)n * width[c] + 64, err));
    }
    RT_TRY(rt_tokenizer_decode(b->teacher.tok, ids, (size_t)n, false, &b->text, err));
    RT_TRY(rt_tokenizer_byte_ends(b->teacher.tok, ids, (size_t)n, (uint32_t *)(void *)b->ends.data, err));
    memset(b->mask.data, 1, (size_t)n);
    *r = (struct rt_rows){.source_line = i + 1, .occurrence = (uint32_t)(i / count), .n_tokens = n, .ids = ids, .loss_mask = (const uint8_t *)b->mask.data,
                          .text = b->text.data, .text_len = (int64_t)b->text.len, .byte_end = (const void *)b->ends.data, .n_rows = n - 1, .k = (int)b->k,
                          .n_lse = 1, .position = (const void *)b->position.data, .topk_ids = (const void *)b->top_ids.data,
                          .topk_logits = (const void *)b->top_logits.data, .lse = (const void *)b->lse.data, .next_id = ids + 1,
                          .next_logprob = (const void *)b->logprob.data, .next_rank = (const void *)b->rank.data};
    rt_rows_key(ids, n, r->key);
    for (int64_t row = 0; row + 1 < n; row++) {
        ((uint32_t *)(void *)b->position.data)[row] = (uint32_t)row;
        make_row(b, (uint64_t)(i * 7919 + row) * 0x9e3779b97f4a7c15u >> 7, ids[row + 1], (uint32_t *)(void *)b->top_ids.data + row * b->k,
                 (float *)(void *)b->top_logits.data + row * b->k, (float *)(void *)b->lse.data + row, (float *)(void *)b->logprob.data + row,
                 (uint32_t *)(void *)b->rank.data + row);
    }
out:
    return st;
}

static enum rt_status write_source(struct bench *b, const char *dir, int64_t *rows, struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_sink *shards = NULL;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct rt_rows r;
    const struct rt_row_identity id = identity(b);
    RT_TRY(rt_shard_sink_open(dir, &id, &(struct rt_shard_options){0}, &shards, &sink, &resume, err));
    for (int64_t i = 0; *rows < b->rows; i++, *rows += r.n_rows) {
        RT_TRY(make_rows(b, i, &r, err));
        RT_TRY(sink.put(sink.self, &r, err));
    }
    RT_TRY(sink.finish(sink.self, err));
out:
    rt_shard_sink_free(shards);
    return st;
}

struct timer {
    double wall, cpu;
};
static void lap(struct timer *t, double *wall, double *cpu)
{
    const double w = rt_now(), c = bench_cpu_now();
    if (wall != NULL)
        *wall += w - t->wall;
    if (cpu != NULL)
        *cpu += c - t->cpu;
    *t = (struct timer){w, c};
}

/* Text and rows of the set's sequences in this thread, each timed by itself. */
static enum rt_status time_parts(struct bench *b, const char *dir, const struct rt_vocab_map *map, struct rt_err *err)
{
    enum rt_status st;
    struct rt_shard_set *set = NULL;
    struct rt_retarget_text text = {0};
    struct rt_retarget_out out = {0};
    struct rt_retarget_counts counts = {0};
    struct rt_buf place = {0};
    const struct rt_retarget_pair pair = {&b->teacher, &b->student, map};
    struct timer t;
    double encode = 0, align = 0;
    int64_t teacher = 0, student = 0;
    enum rt_reject reject;
    RT_TRY(rt_shard_set_open(dir, &set, err));
    for (int64_t i = 0; i < rt_shard_set_info(set)->sequences; i++) {
        struct rt_rows r, made;
        RT_TRY(rt_shard_set_get(set, i, &r, err));
        lap(&t, NULL, NULL);
        RT_TRY(rt_retarget_text_make(&pair, &r, &text, &reject, err));
        lap(&t, NULL, &encode);
        if (reject != RT_REJECT_NONE)
            continue;
        RT_TRY(rt_buf_reserve(&place, (size_t)text.student.n * sizeof(struct rt_place), err));
        rt_align(&text.teacher, &text.student, (struct rt_place *)(void *)place.data);
        const struct rt_retarget_in in = {.map = map, .id = rt_shard_set_identity(set), .rows = &r, .teacher = text.teacher, .student = text.student,
                                          .place = (const struct rt_place *)(const void *)place.data, .text = text.text.data,
                                          .text_len = (int64_t)text.text.len, .byte_end = text.enc.byte_end};
        RT_TRY(rt_retarget_rows(&in, RT_RETARGET_EXACT, &out, &made, &counts, err));
        lap(&t, NULL, &align);
        teacher += r.n_rows;
        student += made.n_rows;
    }
    printf("  text       %9.0f teacher rows a second and core (the student's tokens of it)\n  rows       %9.0f (%ld rows made of %ld)\n", (double)teacher / encode,
           (double)teacher / align, (long)student, (long)teacher);
out:
    rt_buf_free(&place);
    rt_retarget_text_free(&text);
    rt_retarget_out_free(&out);
    rt_shard_set_free(set);
    return st;
}

static enum rt_status time_run(struct bench *b, const char *from, const char *to, struct rt_err *err)
{
    enum rt_status st;
    struct rt_pool *pool = NULL;
    struct rt_retarget_run *run = NULL;
    struct rt_retarget_counts counts = {0};
    struct timer t;
    double wall = 0, cpu = 0, open = 0;
    RT_TRY(rt_pool_create((int)b->threads, &pool, err));
    const struct rt_retarget_options o = {.shards = from, .out = to, .teacher = &b->teacher, .student = &b->student, .pool = pool,
                                          .student_vocab = rt_tokenizer_n_ids(b->student.tok)};
    lap(&t, NULL, NULL);
    RT_TRY(rt_retarget_run_open(&o, &run, err));
    lap(&t, &open, NULL);
    RT_TRY(rt_retarget_counts_init(&counts, rt_tokenizer_n_ids(b->student.tok), err));
    RT_TRY(rt_retarget_run_all(run, &counts, err));
    lap(&t, &wall, &cpu);
    const double rate = (double)counts.teacher_rows / cpu;
    printf("  whole      %9.0f, from shards to shards (%.0f a second of wall time with %ld threads; %.1f s for the map of the vocabularies)\n"
           "  50M teacher tokens: %.1f core-minutes\n", rate, (double)counts.teacher_rows / wall, (long)b->threads, open, 50e6 / rate / 60);
out:
    rt_retarget_run_close(run);
    rt_retarget_counts_free(&counts);
    rt_pool_free(pool);
    return st;
}

static enum rt_status all(struct bench *b, char **files, int n, struct rt_err *err)
{
    enum rt_status st;
    struct rt_vocab_map map = {0};
    char from[4096], to[4096], machine[256], commit[64];
    int64_t rows = 0;
    for (int i = 0; i < n; i++)
        RT_TRY(read_texts(b, files[i], err));
    if (b->first.len == 0)
        RT_FAIL(err, FORMAT, "%s: no text", files[0]);
    snprintf(from, sizeof from, "%.4000s/source", b->dir);
    snprintf(to, sizeof to, "%.4000s/made", b->dir);
    RT_TRY(write_source(b, from, &rows, err));
    bench_machine(machine, sizeof machine);
    bench_line_of("git describe --always --dirty 2>/dev/null", commit, sizeof commit);
    printf("retarget %s -> %s, %ld rows of %ld entries\n  commit %s; %s\n", b->teacher.path, b->student.path, (long)rows, (long)b->k, commit, machine);
    RT_TRY(rt_vocab_map_create(&b->teacher, &b->student, &map, err));
    RT_TRY(time_parts(b, from, &map, err));
    RT_TRY(time_run(b, from, to, err));
out:
    rt_vocab_map_free(&map);
    return st;
}

int main(int argc, char **argv)
{
    struct bench b = {.rows = 100000, .k = 64, .threads = 1};
    struct rt_err err = {0};
    char **file = argv + 4;
    int n = 0;
    if (argc < 5) {
        fprintf(stderr, "usage: %s TEACHER STUDENT DIR FILE.jsonl ... [--rows N] [--k K] [--threads N]\n", argv[0]);
        return 2;
    }
    b.dir = argv[3];
    while (4 + n < argc && strncmp(file[n], "--", 2) != 0)
        n++;
    for (int i = 4 + n; i + 1 < argc; i += 2) {
        int64_t *const to = strcmp(argv[i], "--rows") == 0 ? &b.rows : strcmp(argv[i], "--k") == 0 ? &b.k : &b.threads;
        *to = strtoll(argv[i + 1], NULL, 10);
    }
    enum rt_status st = rt_model_dir_open(argv[1], NULL, NULL, &b.teacher, &err);
    if (st == RT_OK)
        st = rt_model_dir_open(argv[2], NULL, NULL, &b.student, &err);
    b.teacher.tmpl = NULL; /* plain texts */
    if (st == RT_OK && (b.teacher.tok == NULL || b.student.tok == NULL || b.k < 4 || b.k > 4096 || b.threads < 1))
        st = rt_fail(&err, RT_USAGE, "both models need a tokenizer.json; --k goes from 4 to 4096");
    if (st == RT_OK)
        st = all(&b, file, n, &err);
    if (st != RT_OK)
        bench_fatal("bench_retarget", &err);
    return 0;
}
