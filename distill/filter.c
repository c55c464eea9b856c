#include "distill/filter.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "core/io.h"
#include "core/mem.h"
#include "distill/filter_text.h"
#include "distill/lines.h"

static const char *const reason_name[] = {"unfinished", "format", "length", "language", "repetition", "wrong", "unparsed", "duplicate", "contaminated",
                                          "accepted"};

const char *rt_filter_reason_name(enum rt_filter_reason r)
{
    return reason_name[r];
}

enum rt_status rt_filter_parse_drop(const char *list, unsigned *drop, struct rt_err *err)
{
    const unsigned all = (1u << RT_REJECT_COUNT) - 1;
    *drop = all;
    if (list == NULL || strcmp(list, "all") == 0)
        return RT_OK;
    *drop = 0;
    if (strcmp(list, "none") == 0)
        return RT_OK;
    for (const char *p = list;;) {
        const size_t n = strcspn(p, ",");
        int r = 0;
        while (r < RT_REJECT_COUNT && !(strlen(reason_name[r]) == n && memcmp(reason_name[r], p, n) == 0))
            r++;
        if (r == RT_REJECT_COUNT)
            return rt_fail(err, RT_USAGE, "--drop: '%.*s' is no reason; expected all, none, or some of " RT_FILTER_NAMES, (int)(n < 60 ? n : 60), p);
        *drop |= 1u << r;
        if (p[n] == '\0')
            return RT_OK;
        p += n + 1;
    }
}

enum rt_status rt_filter_check(const struct rt_filter_options *o, const char *list, struct rt_err *err)
{
    const struct {
        enum rt_filter_reason reason;
        bool given;
        const char *options;
    } needs[] = {
        {RT_REJECT_LENGTH, o->min_length > 0 || o->max_length > 0, "--min-tokens or --max-tokens (retort filter has them)"},
        {RT_REJECT_WRONG, o->verify != RT_VERIFY_NONE, "--verify boxed or exact"},
        {RT_REJECT_UNPARSED, o->verify != RT_VERIFY_NONE, "--verify boxed or exact"},
        {RT_REJECT_CONTAMINATED, o->against != NULL, "--against FILE (retort filter has it)"},
    };
    const bool named = list != NULL && strcmp(list, "all") != 0;
    for (size_t i = 0; i < sizeof needs / sizeof *needs; i++) {
        const bool asked = o->drop >> needs[i].reason & 1, verdict = needs[i].reason == RT_REJECT_WRONG || needs[i].reason == RT_REJECT_UNPARSED;
        if (named && asked && !needs[i].given)
            return rt_fail(err, RT_USAGE, "--drop %s finds nothing without %s", reason_name[needs[i].reason], needs[i].options);
        if (!asked && needs[i].given && !verdict) /* a verdict is noted even so */
            return rt_fail(err, RT_USAGE, "%s is given, but --drop %s does not name the reason %s: nothing would be rejected for it",
                           needs[i].reason == RT_REJECT_LENGTH ? "a length" : "--against", list, reason_name[needs[i].reason]);
    }
    return RT_OK;
}

/* ---- one line ---- */

struct piece {
    const char *s;
    size_t n;
};

/* Texts point into the line or into the filter's buffers. */
struct trace {
    struct piece prompt, reasoning, content, whole, answer; /* whole: thought and content; reasoning.s NULL: none apart */
    const char *finish;
};

struct filter {
    const struct rt_filter_options *o;
    struct rt_filter_counts counts;
    struct rt_lines in;
    struct rt_publish accepted, rejected;
    struct rt_seen seen;
    struct rt_against against;
    struct rt_encoding encoding;
    struct rt_buf prompt, whole, answer, scratch, line, last_prompt;
    const char *last_hit; /* of last_prompt */
    bool have_last;
};

struct outcome {
    enum rt_filter_reason reason;
    char detail[160];
    bool verified;
    enum rt_verdict verdict;
    struct piece found;
};

static struct piece text_of(const struct rt_json *v)
{
    struct piece p = {0};
    p.s = rt_json_as_string(v, &p.n);
    return p;
}

static enum rt_status read_messages(struct filter *f, const struct rt_json *list, struct trace *t, struct rt_err *err)
{
    const size_t n = rt_json_len(list);
    enum rt_status st = RT_OK;
    const struct rt_json *last = rt_json_at(list, n - 1);
    const char *role = n > 0 ? rt_json_as_string(rt_json_get(last, "role"), NULL) : NULL;
    if (role == NULL || strcmp(role, "assistant") != 0)
        RT_FAIL(err, FORMAT, "%s: the last of \"messages\" is not the assistant's: there is no trace in it", f->in.where);
    t->content = text_of(rt_json_get(last, "content"));
    t->reasoning = text_of(rt_json_get(last, "reasoning_content"));
    if (t->content.s == NULL)
        RT_FAIL(err, FORMAT, "%s: the \"content\" of the last message is no text", f->in.where);
    for (size_t i = 0; i + 1 < n; i++) {
        const struct piece p = text_of(rt_json_get(rt_json_at(list, i), "content"));
        const char *r = rt_json_as_string(rt_json_get(rt_json_at(list, i), "role"), NULL);
        if (p.s == NULL || r == NULL)
            RT_FAIL(err, FORMAT, "%s: message %zu has no \"role\" or no text as \"content\"", f->in.where, i);
        if (strcmp(r, "system") != 0) {
            RT_TRY(rt_buf_append(&f->prompt, p.s, p.n, err));
            RT_TRY(rt_buf_append(&f->prompt, "\n", 1, err));
        }
    }
    t->prompt = (struct piece){f->prompt.data, f->prompt.len};
out:
    return st;
}

static enum rt_status read_trace(struct filter *f, const struct rt_json *v, struct trace *t, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const struct rt_json *messages = rt_json_get(v, "messages"), *answer = rt_json_get(v, "answer");
    *t = (struct trace){0};
    f->prompt.len = f->whole.len = f->answer.len = 0;
    if (messages != NULL) {
        RT_TRY(read_messages(f, messages, t, err));
    } else {
        t->prompt = text_of(rt_json_get(v, "prompt"));
        if (t->prompt.s == NULL && rt_json_get(v, "prompt") != NULL)
            RT_FAIL(err, FORMAT, "%s: \"prompt\" is no text: conversations are read from \"messages\"", f->in.where);
        t->content = text_of(rt_json_get(v, "completion"));
        t->reasoning = text_of(rt_json_get(v, "reasoning_content"));
        if (t->content.s == NULL && t->prompt.s == NULL)
            t->content = text_of(rt_json_get(v, "text"));
        if (t->content.s == NULL)
            RT_FAIL(err, FORMAT, "%s: expected \"prompt\" and \"completion\", or \"messages\" that end with the assistant's", f->in.where);
    }
    if (t->reasoning.n == 0)
        t->reasoning.s = NULL;
    if (t->prompt.s == NULL)
        t->prompt.s = "";
    t->whole = t->content;
    if (t->reasoning.s != NULL) {
        RT_TRY(rt_buf_append(&f->whole, t->reasoning.s, t->reasoning.n, err));
        RT_TRY(rt_buf_append(&f->whole, "\n", 1, err));
        RT_TRY(rt_buf_append(&f->whole, t->content.s, t->content.n, err));
        t->whole = (struct piece){f->whole.data, f->whole.len};
    }
    if (answer != NULL && rt_json_typeof(answer) != RT_JSON_NULL) {
        t->answer = text_of(answer);
        if (t->answer.s == NULL) {
            RT_TRY(rt_json_dump(answer, 0, &f->answer, err));
            t->answer = (struct piece){f->answer.data, f->answer.len};
        }
    }
    t->finish = rt_json_as_string(rt_json_get(v, "finish_reason"), NULL);
    if (t->finish == NULL)
        t->finish = rt_json_as_string(rt_json_get(rt_json_get(v, "sampling"), "finish_reason"), NULL);
out:
    return st;
}

/* ---- the checks; each says whether the line fails ---- */

static size_t count(struct piece p, const char *what, size_t *first)
{
    const size_t k = strlen(what);
    size_t n = 0;
    *first = p.n;
    for (const char *s = p.s; (s = memmem(s, (size_t)(p.s + p.n - s), what, k)) != NULL; s += k)
        if (n++ == 0)
            *first = (size_t)(s - p.s);
    return n;
}

static size_t blanks(struct piece p)
{
    size_t i = 0;
    while (i < p.n && (unsigned char)p.s[i] <= ' ')
        i++;
    return i;
}

static bool unfinished(const struct trace *t, struct outcome *o)
{
    static const char *const ends[] = {"stop", "eos", "end_turn", "stop_sequence"};
    size_t open_at, close_at;
    bool ended = t->finish == NULL;
    for (size_t i = 0; !ended && i < sizeof ends / sizeof *ends; i++)
        ended = strcmp(t->finish, ends[i]) == 0;
    if (!ended)
        snprintf(o->detail, sizeof o->detail, "finish_reason %.40s", t->finish);
    else if (blanks(t->content) == t->content.n)
        snprintf(o->detail, sizeof o->detail, "no text");
    else if (count(t->content, "<think>", &open_at) > 0 && count(t->content, "</think>", &close_at) == 0)
        snprintf(o->detail, sizeof o->detail, "the thought has no end");
    else
        return false;
    return true;
}

static bool bad_format(const struct trace *t, struct outcome *o)
{
    size_t open_at, close_at;
    const size_t opened = count(t->content, "<think>", &open_at), closed = count(t->content, "</think>", &close_at), start = blanks(t->content);
    const bool apart = t->reasoning.s != NULL;
    if (apart ? opened == 0 && closed == 0 : closed == 1 && ((opened == 1 && open_at == start && close_at > open_at) || (opened == 0 && close_at == start)))
        return false;
    snprintf(o->detail, sizeof o->detail, "%zu <think>, %zu </think>%s", opened, closed, apart ? " beside reasoning_content" : opened == 1 && closed == 1 ? ", not around a first thought" : "");
    return true;
}

static enum rt_status bad_length(struct filter *f, const struct trace *t, bool *bad, struct outcome *o, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    int64_t n = 0;
    if (f->o->min_length == 0 && f->o->max_length == 0)
        return RT_OK;
    if (f->o->tok != NULL) {
        f->encoding.n = 0;
        st = rt_tokenizer_encode(f->o->tok, t->whole.s, t->whole.n, &f->encoding, err);
        if (st != RT_OK)
            rt_err_context(err, "%s", f->in.where);
        RT_TRY(st);
        n = (int64_t)f->encoding.n;
    } else {
        for (size_t i = 0; i < t->whole.n; i++)
            n += ((unsigned char)t->whole.s[i] & 0xC0) != 0x80;
    }
    *bad = n < f->o->min_length || (f->o->max_length > 0 && n > f->o->max_length);
    if (*bad)
        snprintf(o->detail, sizeof o->detail, "%lld %s", (long long)n, f->o->tok != NULL ? "tokens" : "characters");
out:
    return st;
}

static bool bad_language(const struct trace *t, struct outcome *o)
{
    int percent;
    if (!rt_foreign_script(t->prompt.s, t->prompt.n, t->whole.s, t->whole.n, &percent))
        return false;
    snprintf(o->detail, sizeof o->detail, "%d %% of the letters", percent);
    return true;
}

static enum rt_status contaminated(struct filter *f, const struct trace *t, bool *bad, struct outcome *o, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (f->o->against == NULL)
        return RT_OK;
    const struct piece p = t->prompt.n > 0 ? t->prompt : t->whole;
    /* samples of one prompt stand behind each other */
    if (!f->have_last || f->last_prompt.len != p.n || memcmp(f->last_prompt.data, p.s, p.n) != 0) {
        RT_TRY(rt_against_check(&f->against, p.s, p.n, &f->scratch, &f->last_hit, err));
        f->last_prompt.len = 0;
        RT_TRY(rt_buf_append(&f->last_prompt, p.s, p.n, err));
        f->have_last = true;
    }
    *bad = f->last_hit != NULL;
    if (*bad)
        snprintf(o->detail, sizeof o->detail, "%s", f->last_hit);
out:
    return st;
}

static void verify(struct filter *f, const struct trace *t, struct outcome *o)
{
    if (f->o->verify == RT_VERIFY_NONE)
        return;
    o->verified = t->answer.s != NULL;
    if (!o->verified) {
        f->counts.unverified++;
        return;
    }
    o->verdict = rt_verify(f->o->verify, t->content.s, t->content.n, t->answer.s, t->answer.n, &o->found.s, &o->found.n);
    f->counts.verdict[o->verdict]++;
}

/* The first check that fails, among those asked for. */
static enum rt_status judge(struct filter *f, const struct trace *t, struct outcome *o, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    size_t times;
    *o = (struct outcome){.reason = RT_REJECT_COUNT};
    for (int r = 0; r < RT_REJECT_COUNT; r++) {
        const bool asked = f->o->drop >> r & 1;
        bool bad = false;
        if (r == RT_REJECT_WRONG)
            verify(f, t, o); /* the verdict is noted whether or not it counts */
        if (!asked)
            continue;
        switch ((enum rt_filter_reason)r) {
        case RT_REJECT_UNFINISHED: bad = unfinished(t, o); break;
        case RT_REJECT_FORMAT: bad = bad_format(t, o); break;
        case RT_REJECT_LENGTH: RT_TRY(bad_length(f, t, &bad, o, err)); break;
        case RT_REJECT_LANGUAGE: bad = bad_language(t, o); break;
        case RT_REJECT_REPETITION:
            RT_TRY(rt_most_repeated(t->whole.s, t->whole.n, &f->scratch, &times, err));
            bad = times >= RT_LOOP_TIMES;
            if (bad)
                snprintf(o->detail, sizeof o->detail, "%d words %zu times", RT_LOOP_WORDS, times);
            break;
        case RT_REJECT_WRONG: bad = o->verified && o->verdict == RT_VERDICT_WRONG; break;
        case RT_REJECT_UNPARSED: bad = o->verified && o->verdict == RT_VERDICT_UNPARSED; break;
        case RT_REJECT_DUPLICATE:
            RT_TRY(rt_seen_add(&f->seen, t->prompt.s, t->prompt.n, t->whole.s, t->whole.n, &f->scratch, &bad, err));
            break;
        case RT_REJECT_CONTAMINATED: RT_TRY(contaminated(f, t, &bad, o, err)); break;
        case RT_REJECT_COUNT: break;
        }
        if (bad) {
            o->reason = (enum rt_filter_reason)r;
            break;
        }
    }
out:
    return st;
}

/* ---- the run ---- */

static enum rt_status write_line(struct filter *f, struct rt_json *v, const struct outcome *o, struct rt_err *err)
{
    struct rt_json *m;
    enum rt_status st;
    const bool rejected = o->reason != RT_REJECT_COUNT;
    RT_TRY(rt_json_set_object(v, "filter", &m, err));
    RT_TRY(rejected ? rt_json_set_string(m, "reason", reason_name[o->reason], err) : rt_json_set_null(m, "reason", err));
    if (o->detail[0] != '\0')
        RT_TRY(rt_json_set_string(m, "detail", o->detail, err));
    RT_TRY(o->verified ? rt_json_set_string(m, "verdict", rt_verdict_name(o->verdict), err) : rt_json_set_null(m, "verdict", err));
    if (o->verified && o->found.s != NULL)
        RT_TRY(rt_json_set_string_n(m, "found", o->found.s, o->found.n, err));
    f->line.len = 0;
    RT_TRY(rt_json_dump(v, 0, &f->line, err));
    RT_TRY(rt_buf_append(&f->line, "\n", 1, err));
    RT_TRY(rt_publish_write(rejected ? &f->rejected : &f->accepted, f->line.data, f->line.len, err));
out:
    return st;
}

static bool same_file(const char *a, const char *b)
{
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

static enum rt_status open_files(struct filter *f, struct rt_err *err)
{
    static const char *const names[] = {"traces.jsonl", "accepted.jsonl"};
    const struct rt_filter_options *o = f->o;
    char path[4096], out[4096];
    enum rt_status st;
    snprintf(path, sizeof path, "%s", o->data);
    if (strlen(o->data) >= sizeof path)
        RT_FAIL(err, USAGE, "--data: a path of %zu bytes is too long", strlen(o->data));
    if (rt_path_is_dir(o->data)) {
        int i = 0;
        do {
            if (i == 2)
                RT_FAIL(err, FORMAT, "%s holds neither traces.jsonl nor accepted.jsonl: give a file of JSON lines, or a directory of traces", o->data);
            RT_TRY(rt_path_join(path, sizeof path, o->data, names[i++], err));
        } while (!rt_path_exists(path));
    }
    RT_TRY(rt_lines_open(path, &f->in, err));
    if (o->dry_run)
        goto out;
    RT_TRY(rt_mkdirs(o->out, err));
    const struct {
        const char *name;
        struct rt_publish *p;
    } outs[] = {{"accepted.jsonl", &f->accepted}, {"rejected.jsonl", &f->rejected}};
    for (int i = 0; i < 2; i++) {
        RT_TRY(rt_path_join(out, sizeof out, o->out, outs[i].name, err));
        if (same_file(out, path))
            RT_FAIL(err, REFUSED, "%s is what is read: choose another --out", out);
        RT_TRY(rt_publish_open(outs[i].p, out, err));
    }
out:
    return st;
}

static enum rt_status pass(struct filter *f, struct rt_err *err)
{
    struct rt_json *v = NULL;
    struct rt_progress progress;
    struct trace t;
    struct outcome o;
    bool end = false;
    enum rt_status st;
    rt_progress_begin(&progress, f->o->log, "filtering", "lines", 0);
    for (;;) {
        if (f->o->stop != NULL && f->o->stop(f->o->stop_self))
            RT_FAIL(err, INTERRUPTED, "interrupted: nothing was published");
        RT_TRY(rt_lines_next_json(&f->in, &v, &end, err));
        if (end)
            break;
        RT_TRY(read_trace(f, v, &t, err));
        RT_TRY(judge(f, &t, &o, err));
        if (!f->o->dry_run)
            RT_TRY(write_line(f, v, &o, err));
        f->counts.by_reason[o.reason]++;
        rt_progress_update(&progress, ++f->counts.lines, NULL);
        rt_json_free(v);
        v = NULL;
    }
    if (f->counts.lines == 0)
        RT_FAIL(err, FORMAT, "%s has no lines: expected a JSON object on each", f->in.path);
    rt_progress_end(&progress);
out:
    rt_json_free(v);
    return st;
}

enum rt_status rt_filter_run(const struct rt_filter_options *o, struct rt_filter_counts *counts, struct rt_err *err)
{
    struct filter f = {.o = o, .accepted = {.fd = -1}, .rejected = {.fd = -1}};
    enum rt_status st;
    if (o->against != NULL)
        RT_TRY(rt_against_load(o->against, &f.against, err));
    RT_TRY(open_files(&f, err));
    RT_TRY(pass(&f, err));
    /* accepted.jsonl last: where it is new, both are */
    if (!o->dry_run)
        RT_TRY(rt_publish_commit(&f.rejected, err));
    if (!o->dry_run)
        RT_TRY(rt_publish_commit(&f.accepted, err));
    *counts = f.counts;
out:
    rt_publish_abort(&f.accepted);
    rt_publish_abort(&f.rejected);
    rt_lines_close(&f.in);
    rt_seen_free(&f.seen);
    rt_against_free(&f.against);
    rt_encoding_free(&f.encoding);
    struct rt_buf *const bufs[] = {&f.prompt, &f.whole, &f.answer, &f.scratch, &f.line, &f.last_prompt};
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++)
        rt_buf_free(bufs[i]);
    return st;
}

void rt_filter_report(const struct rt_filter_counts *c, const struct rt_filter_options *o)
{
    const double all = c->lines > 0 ? (double)c->lines : 1;
    for (int r = RT_REJECT_COUNT; r >= 0; r--)
        if (r == RT_REJECT_COUNT || c->by_reason[r] > 0)
            rt_info(o->log, "%-13s %8lld  %5.1f%%", reason_name[r], (long long)c->by_reason[r], 100 * (double)c->by_reason[r] / all);
    if (c->unverified > 0)
        rt_warn(o->log, "%lld lines have no \"answer\" and were not verified", (long long)c->unverified);
    if (c->by_reason[RT_REJECT_COUNT] == 0 && c->by_reason[RT_REJECT_FORMAT] == c->lines)
        rt_warn(o->log, "no line has one pair of think tags; for text without thought, leave format out: --drop unfinished,wrong,unparsed,...");
}

enum rt_status rt_filter_counts_json(const struct rt_filter_counts *c, struct rt_json *to, struct rt_err *err)
{
    struct rt_json *m;
    enum rt_status st;
    RT_TRY(rt_json_set_int(to, "lines", c->lines, err));
    RT_TRY(rt_json_set_int(to, "accepted", c->by_reason[RT_REJECT_COUNT], err));
    RT_TRY(rt_json_set_object(to, "rejected", &m, err));
    for (int r = 0; r < RT_REJECT_COUNT; r++)
        RT_TRY(rt_json_set_int(m, reason_name[r], c->by_reason[r], err));
    RT_TRY(rt_json_set_object(to, "verdicts", &m, err));
    for (int i = 0; i < 3; i++)
        RT_TRY(rt_json_set_int(m, rt_verdict_name((enum rt_verdict)i), c->verdict[i], err));
    RT_TRY(rt_json_set_int(to, "unverified", c->unverified, err));
out:
    return st;
}
