#include "distill/retarget_report.h"

#include <string.h>

#include "formats/unicode.h"

struct name {
    const char *key, *text;
};
static const struct name reject_names[RT_REJECT_COUNT] = {
#define RT_REJECT_NAME(name, key, text) {key, text},
    RT_REJECT_LIST(RT_REJECT_NAME)
#undef RT_REJECT_NAME
};
static const struct name mask_names[RT_MASK_COUNT] = {
#define RT_MASK_NAME(name, key, text) {key, text},
    RT_MASK_LIST(RT_MASK_NAME)
#undef RT_MASK_NAME
};
static const struct name kind_names[RT_PLACE_KINDS] = {
    {"none", "no teacher token there"},
    {"whole", "one teacher token"},
    {"head", "beginning of a teacher token"},
    {"inside", "inside a teacher token"},
    {"crossing", "over the end of a teacher token"},
};

/* Counts that are one number each. */
#define RT_COUNT_LIST(X) \
    X(sequences) X(kept) X(earlier_turns) X(teacher_tokens) X(teacher_rows) X(targets) X(boundary) X(bounded) X(digits) X(digits_whole) X(digits_rows) X(spans) \
    X(states) X(states_paired)

enum rt_status rt_retarget_counts_init(struct rt_retarget_counts *c, uint32_t n_ids, struct rt_err *err)
{
    *c = (struct rt_retarget_counts){.n_ids = n_ids};
    return rt_alloc(n_ids, sizeof *c->crossing, "counts of crossing tokens", &c->crossing, err);
}

void rt_retarget_counts_free(struct rt_retarget_counts *c)
{
    rt_free(c->crossing);
    *c = (struct rt_retarget_counts){0};
}

void rt_retarget_counts_clear(struct rt_retarget_counts *c)
{
    uint32_t *crossing = c->crossing;
    if (crossing != NULL)
        memset(crossing, 0, c->n_ids * sizeof *crossing);
    *c = (struct rt_retarget_counts){.crossing = crossing, .n_ids = c->n_ids};
}

void rt_retarget_counts_add(struct rt_retarget_counts *c, const struct rt_retarget_counts *more)
{
#define RT_COUNT_ADD(x) c->x += more->x;
    RT_COUNT_LIST(RT_COUNT_ADD)
#undef RT_COUNT_ADD
    for (int i = 0; i < RT_REJECT_COUNT; i++)
        c->rejected[i] += more->rejected[i];
    for (int i = 0; i < RT_MASK_COUNT; i++)
        c->masked[i] += more->masked[i];
    for (int i = 0; i < RT_PLACE_KINDS; i++) {
        c->kind[i] += more->kind[i];
        c->rows[i] += more->rows[i];
        c->mass[i] += more->mass[i];
        c->residual[i] += more->residual[i];
    }
    c->evidence += more->evidence;
    for (uint32_t i = 0; c->crossing != NULL && more->crossing != NULL && i < c->n_ids && i < more->n_ids; i++)
        c->crossing[i] += more->crossing[i];
}

/* The commonest crossing tokens, by descending count, then ascending id. */
static int top_crossing(const struct rt_retarget_counts *c, uint32_t out[RT_TOP_CROSSING])
{
    int n = 0;
    for (uint32_t id = 0; c->crossing != NULL && id < c->n_ids; id++) {
        int at = n;
        if (c->crossing[id] == 0 || (n == RT_TOP_CROSSING && c->crossing[id] <= c->crossing[out[n - 1]]))
            continue;
        while (at > 0 && c->crossing[out[at - 1]] < c->crossing[id])
            at--;
        n += n < RT_TOP_CROSSING;
        memmove(&out[at + 1], &out[at], (size_t)(n - 1 - at) * sizeof *out);
        out[at] = id;
    }
    return n;
}

/* A token's bytes as text that JSON and terminals take: what is no printable ASCII or part of UTF-8 beyond it, as \xNN. */
static enum rt_status token_text(const struct rt_tokenizer *tok, uint32_t id, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *bytes = "";
    size_t n = 0;
    rt_tokenizer_bytes(tok, id, &bytes, &n);
    const bool valid = rt_utf8_prefix(bytes, n) == n;
    out->len = 0;
    for (size_t i = 0; i < n && i < 64; i++) {
        const uint8_t b = (uint8_t)bytes[i];
        if (b >= 0x80 ? valid : b >= 0x20 && b != 0x7f)
            RT_TRY(rt_buf_append(out, bytes + i, 1, err));
        else
            RT_TRY(rt_buf_printf(out, err, "\\x%02x", b));
    }
    RT_TRY(rt_buf_puts(out, "", err));
out:
    return st;
}

static enum rt_status crossing_json(const struct rt_retarget_counts *c, const struct rt_tokenizer *student, struct rt_json *v, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *list, *o;
    struct rt_buf text = {0};
    uint32_t top[RT_TOP_CROSSING + 1];
    const int n = top_crossing(c, top);
    RT_TRY(rt_json_set_array(v, "crossing_tokens", &list, err));
    for (int i = 0; i < n; i++) {
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_int(o, "id", top[i], err));
        if (student != NULL) {
            RT_TRY(token_text(student, top[i], &text, err));
            RT_TRY(rt_json_set_string_n(o, "text", text.data, rt_utf8_prefix(text.data, text.len), err));
        }
        RT_TRY(rt_json_set_int(o, "count", c->crossing[top[i]], err));
    }
out:
    rt_buf_free(&text);
    return st;
}

enum rt_status rt_retarget_report_json(const struct rt_retarget_counts *c, const struct rt_tokenizer *student, struct rt_json *v, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *o, *k;
#define RT_COUNT_SET(x) RT_TRY(rt_json_set_int(v, #x, c->x, err));
    RT_COUNT_LIST(RT_COUNT_SET)
#undef RT_COUNT_SET
    RT_TRY(rt_json_set_double(v, "evidence", c->evidence, err));
    RT_TRY(rt_json_set_object(v, "rejected", &o, err));
    for (int i = 0; i < RT_REJECT_COUNT; i++)
        RT_TRY(rt_json_set_int(o, reject_names[i].key, c->rejected[i], err));
    RT_TRY(rt_json_set_object(v, "masked", &o, err));
    for (int i = 0; i < RT_MASK_COUNT; i++)
        RT_TRY(rt_json_set_int(o, mask_names[i].key, c->masked[i], err));
    RT_TRY(rt_json_set_object(v, "cases", &o, err));
    for (int i = 0; i < RT_PLACE_KINDS; i++) {
        RT_TRY(rt_json_set_object(o, kind_names[i].key, &k, err));
        RT_TRY(rt_json_set_int(k, "targets", c->kind[i], err));
        RT_TRY(rt_json_set_int(k, "rows", c->rows[i], err));
        RT_TRY(rt_json_set_double(k, "mass", c->mass[i], err));
        RT_TRY(rt_json_set_double(k, "residual", c->residual[i], err));
    }
    RT_TRY(crossing_json(c, student, v, err));
out:
    return st;
}

static enum rt_status read_crossing(const struct rt_json *list, struct rt_retarget_counts *c, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (size_t i = 0; c->crossing != NULL && i < rt_json_len(list); i++) {
        int64_t id, n;
        RT_TRY(rt_json_int(rt_json_at(list, i), "id", 0, (int64_t)c->n_ids - 1, &id, err));
        RT_TRY(rt_json_int(rt_json_at(list, i), "count", 0, UINT32_MAX, &n, err));
        c->crossing[id] += (uint32_t)n;
    }
out:
    return st;
}

enum rt_status rt_retarget_report_read(const struct rt_json *v, struct rt_retarget_counts *c, struct rt_err *err)
{
    enum rt_status st;
    int64_t n;
    double d;
#define RT_COUNT_GET(x) \
    RT_TRY(rt_json_int_or(v, #x, 0, INT64_MAX / 2, 0, &n, err)); \
    c->x += n;
    RT_COUNT_LIST(RT_COUNT_GET)
#undef RT_COUNT_GET
    RT_TRY(rt_json_double(v, "evidence", &d, err));
    c->evidence += d;
    for (int i = 0; i < RT_REJECT_COUNT; i++) {
        RT_TRY(rt_json_int_or(rt_json_get(v, "rejected"), reject_names[i].key, 0, INT64_MAX / 2, 0, &n, err));
        c->rejected[i] += n;
    }
    for (int i = 0; i < RT_MASK_COUNT; i++) {
        RT_TRY(rt_json_int_or(rt_json_get(v, "masked"), mask_names[i].key, 0, INT64_MAX / 2, 0, &n, err));
        c->masked[i] += n;
    }
    for (int i = 0; i < RT_PLACE_KINDS; i++) {
        const struct rt_json *k = rt_json_get(rt_json_get(v, "cases"), kind_names[i].key);
        RT_TRY(rt_json_int(k, "targets", 0, INT64_MAX / 2, &n, err));
        c->kind[i] += n;
        RT_TRY(rt_json_int(k, "rows", 0, INT64_MAX / 2, &n, err));
        c->rows[i] += n;
        RT_TRY(rt_json_double(k, "mass", &d, err));
        c->mass[i] += d;
        RT_TRY(rt_json_double(k, "residual", &d, err));
        c->residual[i] += d;
    }
    RT_TRY(read_crossing(rt_json_get(v, "crossing_tokens"), c, err));
out:
    return st;
}

static double share(double part, double whole)
{
    return whole > 0 ? 100 * part / whole : 0;
}

static enum rt_status print_crossing(const struct rt_retarget_counts *c, const struct rt_tokenizer *student, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf text = {0};
    uint32_t top[RT_TOP_CROSSING + 1];
    const int n = top_crossing(c, top), shown = n < 8 ? n : 8;
    if (n == 0)
        return RT_OK;
    RT_TRY(rt_buf_puts(out, "commonest crossing tokens ", err));
    for (int i = 0; i < shown; i++) {
        RT_TRY(token_text(student, top[i], &text, err));
        RT_TRY(rt_buf_printf(out, err, "%s'%s' %u", i > 0 ? ", " : "", text.data, c->crossing[top[i]]));
    }
    RT_TRY(rt_buf_puts(out, "\n", err));
out:
    rt_buf_free(&text);
    return st;
}

enum rt_status rt_retarget_report_print(const struct rt_retarget_counts *c, const struct rt_tokenizer *student, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    int64_t rows = 0;
    const double targets = (double)c->targets;
    RT_TRY(rt_buf_printf(out, err, "sequences  %ld of %ld%s\n", (long)c->kept, (long)c->sequences, c->kept < c->sequences ? ", left out:" : ""));
    for (int i = 0; i < RT_REJECT_COUNT; i++)
        if (c->rejected[i] > 0)
            RT_TRY(rt_buf_printf(out, err, "           %8ld  %s\n", (long)c->rejected[i], reject_names[i].text));
    if (c->earlier_turns > 0)
        RT_TRY(rt_buf_printf(out, err, "           %8ld  with earlier turns that are no longer targets\n", (long)c->earlier_turns));
    RT_TRY(rt_buf_printf(out, err, "targets    %ld of the teacher, %ld of the student, %.1f %% begin where a teacher token does\n", (long)c->teacher_tokens,
                         (long)c->targets, share((double)c->boundary, targets)));
    RT_TRY(rt_buf_puts(out, "case                                 targets             rows   mass kept   residual\n", err));
    for (int i = RT_PLACE_WHOLE; i < RT_PLACE_KINDS + 1; i++) {
        const int k = i % RT_PLACE_KINDS; /* "none" last */
        const double n = c->rows[k] > 0 ? (double)c->rows[k] : 1;
        rows += c->rows[k];
        RT_TRY(rt_buf_printf(out, err, "%-32s %10ld %5.1f %% %10ld", kind_names[k].text, (long)c->kind[k], share((double)c->kind[k], targets), (long)c->rows[k]));
        if (c->rows[k] > 0 && c->spans == 0)
            RT_TRY(rt_buf_printf(out, err, "   %9.5f  %9.5f", c->mass[k] / n, c->residual[k] / n));
        RT_TRY(rt_buf_puts(out, "\n", err));
    }
    RT_TRY(rt_buf_printf(out, err, "rows       %ld, of %.1f %% of the targets; the others are labels alone:\n", (long)rows, share((double)rows, targets)));
    for (int i = 0; i < RT_MASK_COUNT; i++)
        if (c->masked[i] > 0)
            RT_TRY(rt_buf_printf(out, err, "           %8ld %5.1f %%  %s\n", (long)c->masked[i], share((double)c->masked[i], targets), mask_names[i].text));
    if (c->spans > 0)
        RT_TRY(rt_buf_printf(out, err, "spans      %ld, of %.2f tokens on average\n", (long)c->spans, (double)rows / (double)c->spans));
    else if (c->rows[RT_PLACE_INSIDE] > 0)
        RT_TRY(rt_buf_printf(out, err, "inside     the teacher gave %.4f on average to what agrees with the bytes said; in %ld rows the residual is an upper bound\n",
                             c->evidence / (double)c->rows[RT_PLACE_INSIDE], (long)c->bounded));
    if (c->digits > 0)
        RT_TRY(rt_buf_printf(out, err, "digits     %ld tokens, %.1f %% of the targets; %.1f %% one to one, %.1f %% with a row\n", (long)c->digits, share((double)c->digits, targets),
                             share((double)c->digits_whole, (double)c->digits), share((double)c->digits_rows, (double)c->digits)));
    if (c->states > 0)
        RT_TRY(rt_buf_printf(out, err, "states     %ld of %ld tokens end where a teacher token does\n", (long)c->states_paired, (long)c->states));
    RT_TRY(print_crossing(c, student, out, err));
out:
    return st;
}
