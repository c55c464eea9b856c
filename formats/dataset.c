#include "formats/dataset.h"

#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "formats/dataset_internal.h"

enum { CHUNK = 1 << 20 };

enum rt_status rt_dataset_open(const char *path, const struct rt_dataset_options *opt, struct rt_dataset **out, struct rt_err *err)
{
    static const char *const names[] = {"accepted.jsonl", "traces.jsonl"};
    enum rt_status st = RT_OK;
    struct rt_dataset *d = NULL;
    RT_TRY(rt_alloc(1, sizeof *d, "dataset", &d, err));
    d->fd = -1;
    d->opt = *opt;
    if (d->opt.n_ids == 0 && opt->tok != NULL)
        d->opt.n_ids = rt_tokenizer_n_ids(opt->tok);
    if (d->opt.n_ids <= 0 || d->opt.n_ids > UINT32_MAX)
        RT_FAIL(err, USAGE, "%s: the number of ids is not known: a tokenizer or a model is needed", path);
    if (opt->max_length < 0 || opt->max_length == 1)
        RT_FAIL(err, USAGE, "a greatest length of %lld tokens: expected 0 (no limit) or at least 2", (long long)opt->max_length);
    if (rt_path_is_dir(path)) {
        size_t i = 0;
        do {
            if (i == sizeof names / sizeof names[0])
                RT_FAIL(err, FORMAT, "%s holds neither accepted.jsonl nor traces.jsonl: give a file of JSON lines, or a directory of traces",
                        path);
            RT_TRY(rt_path_join(d->path, sizeof d->path, path, names[i++], err));
        } while (!rt_path_exists(d->path));
    } else {
        if (strlen(path) >= sizeof d->path)
            RT_FAIL(err, USAGE, "a path of %zu bytes is too long", strlen(path));
        strcpy(d->path, path);
    }
    RT_TRY(rt_file_open(d->path, &d->fd, &d->size, err));
    if (d->size == 0)
        RT_FAIL(err, FORMAT, "%s is empty: expected a JSON object on each line", d->path);
    *out = d;
    d = NULL;
out:
    rt_dataset_close(d);
    return st;
}

void rt_dataset_close(struct rt_dataset *d)
{
    if (d == NULL)
        return;
    rt_file_close(d->fd);
    rt_buf_free(&d->window);
    rt_buf_free(&d->answer);
    rt_json_free(d->json);
    rt_rendered_free(&d->rendered);
    rt_free(d->message);
    rt_free(d);
}

const char *rt_dataset_path(const struct rt_dataset *d)
{
    return d->path;
}

struct rt_dataset_counts rt_dataset_counts(const struct rt_dataset *d)
{
    return d->counts;
}

enum rt_status rt_dataset_rewind(struct rt_dataset *d, struct rt_err *err)
{
    (void)err;
    d->read = 0;
    d->window.len = d->at = 0;
    d->line = 0;
    d->whole.n_parts = d->next = 0;
    memset(&d->counts, 0, sizeof d->counts);
    return RT_OK;
}

/* Reads on until the window holds a whole line; *line is inside the window, without its newline. */
static enum rt_status read_line(struct rt_dataset *d, const char **line, size_t *len, bool *end, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    size_t seen = 0;
    *end = false;
    for (;;) {
        const size_t have = d->window.len - d->at;
        const char *s = d->window.data != NULL ? d->window.data + d->at : "";
        const char *newline = have > seen ? memchr(s + seen, '\n', have - seen) : NULL;
        const bool all = d->read == d->size;
        *len = newline != NULL ? (size_t)(newline - s) : have;
        if (*len > RT_LINE_MAX)
            RT_FAIL(err, FORMAT, "%s:%lld: a line of more than %d MiB", d->path, (long long)d->line + 1, RT_LINE_MAX >> 20);
        if (newline != NULL || all) {
            *end = newline == NULL && have == 0;
            *line = s;
            d->at += newline != NULL ? *len + 1 : have;
            d->line += !*end;
            return RT_OK;
        }
        seen = have;
        if (d->at > 0) {
            memmove(d->window.data, d->window.data + d->at, have);
            d->window.len = have;
            d->at = 0;
        }
        const size_t n = d->size - d->read < CHUNK ? (size_t)(d->size - d->read) : CHUNK;
        RT_TRY(rt_buf_reserve(&d->window, n, err));
        RT_TRY(rt_file_pread(d->fd, d->path, d->window.data + d->window.len, n, d->read, err));
        d->window.len += n;
        d->read += n;
    }
out:
    return st;
}

static bool is_blank(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (s[i] != ' ' && s[i] != '\t' && s[i] != '\r')
            return false;
    return true;
}

/* The next line that is not blank, parsed into d->json. */
static enum rt_status next_json(struct rt_dataset *d, bool *end, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *line = NULL;
    size_t len = 0;
    rt_json_free(d->json);
    d->json = NULL;
    do
        RT_TRY(read_line(d, &line, &len, end, err));
    while (!*end && is_blank(line, len));
    if (*end) {
        if (d->counts.lines == 0)
            RT_FAIL(err, FORMAT, "%s has no lines: expected a JSON object on each", d->path);
        goto out;
    }
    snprintf(d->where, sizeof d->where, "%s:%lld", d->path, (long long)d->line);
    RT_TRY(rt_json_parse(line, len, d->where, &d->json, err));
    if (rt_json_typeof(d->json) != RT_JSON_OBJECT)
        RT_FAIL(err, FORMAT, "%s: expected a JSON object", d->where);
    d->counts.lines++;
out:
    return st;
}

/* Counts targets behind position 0 of the part and finds the first. */
static void measure(struct rt_sample *s)
{
    s->n_targets = 0;
    s->completion_start = s->has_completion ? s->n : 0;
    for (int64_t i = s->n - 1; i >= 0; i--)
        if (s->loss_mask[i]) {
            s->n_targets += i > 0;
            if (s->has_completion)
                s->completion_start = i;
        }
}

/* The next part of the line that has a target; false where none is left. */
static bool next_part(struct rt_dataset *d, struct rt_sample *out)
{
    while (d->next < d->whole.n_parts) {
        struct rt_sample s = d->whole;
        const int64_t begin = s.n_parts > 1 ? d->next * d->opt.max_length : 0;
        if (s.n_parts > 1 && s.n - begin > d->opt.max_length)
            s.n = d->opt.max_length;
        else
            s.n -= begin;
        s.ids += begin;
        s.loss_mask += begin;
        s.part = d->next++;
        measure(&s);
        if (s.n >= 2 && s.n_targets > 0) {
            *out = s;
            return true;
        }
        d->counts.untargeted++;
    }
    return false;
}

enum rt_status rt_dataset_next(struct rt_dataset *d, struct rt_sample *out, bool *end, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    *end = false;
    while (!next_part(d, out)) {
        d->whole.n_parts = d->next = 0;
        RT_TRY(next_json(d, end, err));
        if (*end)
            goto out;
        RT_TRY(rt_dataset_sample(d, err));
        d->counts.not_nfc += d->whole.not_nfc;
        d->whole.n_parts = 1;
        if (d->opt.max_length > 0 && d->whole.n > d->opt.max_length) {
            if (d->opt.overlong == RT_OVERLONG_DROP) {
                d->counts.dropped++;
                d->whole.n_parts = 0;
            } else {
                d->counts.split++;
                d->whole.n_parts = (int)((d->whole.n + d->opt.max_length - 1) / d->opt.max_length);
            }
        }
    }
    d->counts.samples++;
    d->counts.tokens += out->n;
    d->counts.targets += out->n_targets;
out:
    return st;
}

enum rt_status rt_dataset_next_prompt(struct rt_dataset *d, struct rt_prompt *out, bool *end, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    d->whole.n_parts = d->next = 0;
    for (;;) {
        struct rt_prompt p;
        RT_TRY(next_json(d, end, err));
        if (*end)
            goto out;
        RT_TRY(rt_dataset_prompt(d, &p, err));
        d->counts.not_nfc += p.not_nfc;
        if (d->opt.max_length == 0 || p.n <= d->opt.max_length) {
            *out = p;
            break;
        }
        d->counts.dropped++;
    }
    d->counts.samples++;
    d->counts.tokens += out->n;
out:
    return st;
}

enum rt_status rt_dataset_copy_extra(const struct rt_json *line, struct rt_json *to, struct rt_err *err)
{
    static const char *const own[] = {"prompt", "completion", "messages", "text", "input_ids", "loss_mask", "answer",
                                      "reasoning_content", "verdict", "filter"}; /* the last three: of an earlier completion */
    const char *key;
    const struct rt_json *value;
    for (size_t i = 0; rt_json_member(line, i, &key, &value); i++) {
        bool skip = rt_json_get(to, key) != NULL;
        for (size_t k = 0; k < sizeof own / sizeof own[0]; k++)
            skip |= strcmp(key, own[k]) == 0;
        if (skip)
            continue;
        const enum rt_status st = rt_json_set_copy(to, key, value, err);
        if (st != RT_OK)
            return st;
    }
    return RT_OK;
}
