/* Answers: samples of each prompt that has one, verified; pass@1 and pass@k. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/sha256.h"
#include "distill/evaluate.h"
#include "distill/generate.h"
#include "distill/verify.h"
#include "formats/dataset.h"

struct problem {
    char *answer, *family; /* owned; family may be NULL */
    int64_t line, samples, correct, limit, tokens;
};

struct answers {
    struct rt_loaded_student *l;
    const struct rt_eval_sampling *o;
    struct rt_dataset *data;
    struct rt_buf problems, text; /* of struct problem */
    int64_t longest; /* tokens of a prompt that leave room for an answer */
    int64_t n, samples_done, tokens;
    struct rt_sha256 hash;
    struct rt_progress progress;
};

static struct problem *problem_at(struct answers *a, int64_t i)
{
    return (struct problem *)(void *)a->problems.data + i;
}

static enum rt_status copy_text(const char *s, char **out, struct rt_err *err)
{
    const size_t n = strlen(s);
    const enum rt_status st = rt_alloc(n + 1, 1, "an answer", out, err);
    if (st == RT_OK)
        memcpy(*out, s, n);
    return st;
}

/* Words rather than tokens: students of different tokenizers answer the same problems. */
static void hash_problem(struct rt_sha256 *h, const struct rt_prompt *p)
{
    if (p->text != NULL)
        rt_sha256_update(h, p->text, strlen(p->text) + 1);
    else
        rt_sha256_update(h, p->ids, (size_t)p->n * sizeof *p->ids);
    rt_sha256_update(h, p->answer, strlen(p->answer) + 1);
}

static enum rt_status next_problem(void *self, struct rt_generate_prompt *out, bool *end, bool *wait, struct rt_err *err)
{
    enum rt_status st;
    struct answers *a = self;
    struct rt_prompt p;
    struct problem q = {0};
    (void)wait;
    do {
        RT_TRY(rt_dataset_next_prompt(a->data, &p, end, err));
        if (*end)
            return RT_OK;
    } while (p.answer == NULL || p.n > a->longest);
    q.line = p.line;
    hash_problem(&a->hash, &p);
    RT_TRY(copy_text(p.answer, &q.answer, err));
    const char *family = rt_json_as_string(rt_json_get(p.json, "family"), NULL);
    if (family != NULL)
        RT_TRY(copy_text(family, &q.family, err));
    RT_TRY(rt_buf_append(&a->problems, &q, sizeof q, err));
    q.answer = q.family = NULL;
    *out = (struct rt_generate_prompt){.ids = p.ids, .n = p.n, .line = p.line, .n_samples = (int)a->o->samples,
                                       .user = (void *)(uintptr_t)a->n++};
out:
    rt_free(q.answer);
    rt_free(q.family);
    return st;
}

static enum rt_status check_sample(void *self, const struct rt_generated *g, struct rt_err *err)
{
    enum rt_status st;
    struct answers *a = self;
    struct problem *q = problem_at(a, (int64_t)(uintptr_t)g->user);
    const struct rt_model_dir *m = &a->l->model;
    a->text.len = 0;
    RT_TRY(rt_generated_text(g, m->tok, m->tmpl, RT_THINKING_AUTO, &a->text, NULL, err));
    const enum rt_verdict v = rt_verify(a->o->exact ? RT_VERIFY_EXACT : RT_VERIFY_BOXED, a->text.data != NULL ? a->text.data : "", a->text.len,
                                        q->answer, strlen(q->answer), NULL, NULL);
    q->samples++;
    q->correct += v == RT_VERDICT_CORRECT;
    q->limit += g->finish == RT_FINISH_LENGTH;
    q->tokens += g->n;
    a->tokens += g->n;
    rt_progress_update(&a->progress, ++a->samples_done, NULL);
out:
    return st;
}

enum rt_status rt_eval_parse_k(const char *text, struct rt_eval_sampling *o, struct rt_err *err)
{
    o->n_k = 0;
    for (const char *p = text; p != NULL && *p != '\0';) {
        char *end;
        const long long k = strtoll(p, &end, 10);
        if (end == p || (*end != '\0' && *end != ',') || k < 1 || k > o->samples)
            return rt_fail(err, RT_USAGE, "--pass-k %s: expected numbers from 1 to %lld (--samples) with commas between them", text, (long long)o->samples);
        if (o->n_k == RT_EVAL_MAX_K)
            return rt_fail(err, RT_USAGE, "--pass-k %s: more than %d numbers", text, RT_EVAL_MAX_K);
        o->k[o->n_k++] = k;
        p = *end == ',' ? end + 1 : end;
    }
    return RT_OK;
}

static enum rt_status summarise(struct answers *a, struct rt_buf *rows, struct rt_eval_answers *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_json *line = NULL;
    out->problems = a->n;
    for (int i = 0; i < a->o->n_k; i++)
        out->k[out->n_k++] = a->o->k[i];
    for (int64_t k = 1; k <= a->o->samples && a->o->n_k == 0 && out->n_k < RT_EVAL_MAX_K; k *= 2)
        out->k[out->n_k++] = k;
    for (int64_t i = 0; i < a->n; i++) {
        const struct problem *q = problem_at(a, i);
        out->samples += q->samples;
        out->limit += q->limit;
        out->tokens += q->tokens;
        rt_ratio_add(&out->pass1, (double)q->correct, (double)q->samples);
        for (int j = 0; j < out->n_k; j++)
            rt_ratio_add(&out->passk[j], rt_stats_pass_at_k(q->samples, q->correct, out->k[j]), 1);
        if (rows == NULL)
            continue;
        rt_json_free(line);
        line = NULL;
        RT_TRY(rt_json_new_object(&line, err));
        RT_TRY(rt_json_set_string(line, "kind", "problem", err));
        RT_TRY(rt_json_set_int(line, "line", q->line, err));
        RT_TRY(q->family != NULL ? rt_json_set_string(line, "family", q->family, err) : rt_json_set_null(line, "family", err));
        RT_TRY(rt_json_set_int(line, "samples", q->samples, err));
        RT_TRY(rt_json_set_int(line, "correct", q->correct, err));
        RT_TRY(rt_json_set_int(line, "limit", q->limit, err));
        RT_TRY(rt_json_set_int(line, "tokens", q->tokens, err));
        RT_TRY(rt_json_dump(line, 0, rows, err));
        RT_TRY(rt_buf_append(rows, "\n", 1, err));
    }
out:
    rt_json_free(line);
    return st;
}

enum rt_status rt_eval_measure_prompts(struct rt_dataset *data, int64_t most, struct rt_eval_prompts *out, struct rt_buf *lengths, struct rt_err *err)
{
    enum rt_status st;
    struct rt_prompt p;
    int64_t shortest = INT64_MAX;
    bool end;
    *out = (struct rt_eval_prompts){0};
    for (;;) {
        RT_TRY(rt_dataset_next_prompt(data, &p, &end, err));
        if (end)
            break;
        if (p.answer == NULL)
            continue;
        shortest = p.n < shortest ? p.n : shortest;
        if (p.n > most) {
            out->dropped++;
            continue;
        }
        out->longest = p.n > out->longest ? p.n : out->longest;
        out->problems++;
        if (lengths != NULL)
            RT_TRY(rt_buf_append(lengths, &p.n, sizeof p.n, err));
    }
    if (out->problems == 0 && out->dropped == 0)
        RT_FAIL(err, USAGE, "%s: no line with an \"answer\" to check", rt_dataset_path(data));
    if (out->problems == 0)
        RT_FAIL(err, USAGE,
                "%s: all %ld prompts are too long for the student: the shortest has %ld tokens, expected at most %ld; shorter prompts, or a student of more "
                "positions", rt_dataset_path(data), (long)out->dropped, (long)shortest, (long)most);
    RT_TRY(rt_dataset_rewind(data, err));
out:
    return st;
}

/* What the decoder may take now: half of a host's memory; of a device's own what weights and operations leave. */
static enum rt_status decoder_memory(const struct rt_loaded_student *l, const struct rt_eval_sampling *o, int64_t *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_dev_memory m;
    *out = o->memory / 2;
    if (!l->d->be->own_memory)
        goto out;
    RT_TRY(l->d->be->memory(l->d->dev, &m, err));
    *out = o->memory - (int64_t)l->weights.size;
    if (*out > (int64_t)(m.free / 10 * 9)) /* a tenth for what operations take for themselves */
        *out = (int64_t)(m.free / 10 * 9);
out:
    return st;
}

enum rt_status rt_eval_answers(struct rt_loaded_student *l, const char *path, const struct rt_eval_sampling *o, struct rt_log *log,
                               bool (*stop)(void *), void *stop_self, struct rt_buf *rows, struct rt_eval_answers *out, struct rt_err *err)
{
    enum rt_status st;
    struct answers a = {.l = l, .o = o};
    struct rt_generator g = {0};
    int32_t stop_ids[RT_GENERATE_MAX_STOP];
    struct rt_eval_prompts prompts;
    int64_t n_ids, memory;
    *out = (struct rt_eval_answers){0};
    rt_sha256_init(&a.hash);
    if (l->model.tok == NULL)
        RT_FAIL(err, UNSUPPORTED, "%s: answers need a tokenizer, the student has none; --tokenizer DIR names one", path);
    RT_TRY(rt_model_dir_n_ids(&l->model, l->c.vocab_size, &n_ids, err));
    const struct rt_dataset_options d = {.tok = l->model.tok, .tmpl = l->model.tmpl};
    const int64_t most = rt_student_max_length(l->s);
    a.longest = most - 1;
    RT_TRY(rt_dataset_open(path, &d, &a.data, err));
    RT_TRY(rt_eval_measure_prompts(a.data, a.longest, &prompts, NULL, err));
    if (prompts.dropped > 0)
        rt_warn(log, "%s: %ld of %ld problems have prompts of more than %ld tokens and are left out: pass@k is over the others", path, (long)prompts.dropped,
                (long)(prompts.problems + prompts.dropped), (long)a.longest);
    RT_TRY(decoder_memory(l, o, &memory, err));
    const struct rt_generator_options go = {.memory = memory, .sequences = prompts.problems * o->samples,
                                            .max_len = prompts.longest + o->max_tokens < most ? prompts.longest + o->max_tokens : most};
    RT_TRY(rt_generator_student(l->s, &go, &g, err));
    rt_progress_begin(&a.progress, log, "answering", "samples", prompts.problems * o->samples);
    const double start = rt_now();
    const struct rt_generate_options options = {
        .seed = o->seed, .sample = {o->temperature, 0, o->top_p}, .max_new = o->max_tokens, .n_ids = n_ids, .stop_ids = stop_ids,
        .n_stop = rt_generate_stop_ids(&l->model, l->c.eos, l->c.n_eos, stop_ids), .next = next_problem, .done = check_sample, .self = &a,
        .stop = stop, .stop_self = stop_self};
    RT_TRY(rt_generate(&g, &options, NULL, err));
    rt_progress_end(&a.progress);
    rt_info(log, "%s: %ld samples with %ld tokens, %.0f tokens/s in %d slots", path, (long)a.samples_done, (long)a.tokens,
            (double)a.tokens / (rt_now() - start + 1e-9), g.slots);
    out->dropped = prompts.dropped;
    RT_TRY(summarise(&a, rows, out, err));
    rt_sha256_final_hex(&a.hash, out->sha256);
out:
    for (int64_t i = 0; i < a.n; i++) {
        rt_free(problem_at(&a, i)->answer);
        rt_free(problem_at(&a, i)->family);
    }
    rt_generator_close(&g);
    rt_dataset_close(a.data);
    rt_buf_free(&a.problems);
    rt_buf_free(&a.text);
    return st;
}

enum rt_status rt_eval_answers_json(const struct rt_eval_answers *e, const struct rt_eval_sampling *o, struct rt_json *line, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *passk, *passk_ci;
    double mean, lo, hi;
    char key[24];
    rt_ratio_share(&e->pass1, e->pass1.sn, &mean, &lo, &hi);
    RT_TRY(rt_json_set_int(line, "n_problems", e->problems, err));
    RT_TRY(rt_json_set_int(line, "n_dropped", e->dropped, err));
    RT_TRY(rt_json_set_int(line, "samples", o->samples, err));
    RT_TRY(rt_json_set_double(line, "temperature", o->temperature, err));
    RT_TRY(rt_json_set_double(line, "top_p", o->top_p, err));
    RT_TRY(rt_json_set_int(line, "max_tokens", o->max_tokens, err));
    RT_TRY(rt_json_set_string(line, "verify", o->exact ? "exact" : "boxed", err));
    RT_TRY(rt_json_set_string(line, "problems_sha256", e->sha256, err));
    RT_TRY(rt_json_set_double(line, "pass1", mean, err));
    RT_TRY(rt_eval_set_interval(line, "pass1_ci", lo, hi, err));
    RT_TRY(rt_json_set_object(line, "passk", &passk, err));
    RT_TRY(rt_json_set_object(line, "passk_ci", &passk_ci, err));
    for (int i = 0; i < e->n_k; i++) {
        snprintf(key, sizeof key, "%ld", (long)e->k[i]);
        rt_ratio_share(&e->passk[i], (double)e->samples / (double)e->k[i], &mean, &lo, &hi);
        RT_TRY(rt_json_set_double(passk, key, mean, err));
        RT_TRY(rt_eval_set_interval(passk_ci, key, lo, hi, err));
    }
    RT_TRY(rt_json_set_double(line, "limit_share", (double)e->limit / (double)e->samples, err));
    RT_TRY(rt_json_set_double(line, "mean_tokens", (double)e->tokens / (double)e->samples, err));
out:
    return st;
}
