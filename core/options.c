#include "core/options.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_OPTIONS = 128,
    MAX_WORD = 64, /* longest name that is compared for a suggestion */
    HELP_COLUMN = 30,
    HELP_WIDTH = 100,
};

static void *field(const struct rt_opt *o, void *values)
{
    return (char *)values + o->offset;
}

static const void *field_const(const struct rt_opt *o, const void *values)
{
    return (const char *)values + o->offset;
}

const struct rt_opt *rt_options_find(const struct rt_opt *const *tables, int n_tables, const char *name, size_t len, int *index)
{
    int at = 0;
    for (int t = 0; t < n_tables; t++) {
        for (const struct rt_opt *o = tables[t]; o->name != NULL; o++, at++) {
            if (strlen(o->name) == len && memcmp(o->name, name, len) == 0) {
                if (index != NULL)
                    *index = at;
                return o;
            }
        }
    }
    return NULL;
}

/* Edit distance in which a swap of two neighbours is one edit. Both words have at most MAX_WORD letters. */
static int distance(const char *a, size_t na, const char *b, size_t nb)
{
    int row[3][MAX_WORD + 1];
    for (size_t j = 0; j <= nb; j++)
        row[0][j] = (int)j;
    for (size_t i = 1; i <= na; i++) {
        int *const now = row[i % 3];
        const int *const up = row[(i + 2) % 3], *const up2 = row[(i + 1) % 3];
        now[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            int d = up[j - 1] + (a[i - 1] != b[j - 1]);
            if (up[j] + 1 < d)
                d = up[j] + 1;
            if (now[j - 1] + 1 < d)
                d = now[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && up2[j - 2] + 1 < d)
                d = up2[j - 2] + 1;
            now[j] = d;
        }
    }
    return row[na % 3][nb];
}

const char *rt_nearest(const char *word, const char *const *candidates, int n)
{
    const size_t len = strlen(word);
    const char *best = NULL;
    int best_d = 0;
    for (int i = 0; i < n; i++) {
        const size_t m = strlen(candidates[i]);
        if (len == 0 || len > MAX_WORD || m > MAX_WORD)
            continue;
        int d = distance(word, len, candidates[i], m);
        if (len >= 3 && m > len && memcmp(word, candidates[i], len) == 0)
            d = 1; /* the beginning of the right word */
        if (d <= (int)(len + 2) / 3 && (best == NULL || d < best_d)) {
            best = candidates[i];
            best_d = d;
        }
    }
    return best;
}

static enum rt_status unknown(const struct rt_opt *const *tables, int n_tables, const char *name, size_t len, const char *source,
                              struct rt_err *err)
{
    const char *known[MAX_OPTIONS];
    char word[MAX_WORD + 1];
    int n = 0;
    for (int t = 0; t < n_tables; t++)
        for (const struct rt_opt *o = tables[t]; o->name != NULL && n < MAX_OPTIONS; o++)
            known[n++] = o->name;
    snprintf(word, sizeof word, "%.*s", (int)(len < MAX_WORD ? len : MAX_WORD), name);
    const char *near = rt_nearest(word, known, n);
    if (near != NULL)
        return rt_fail(err, RT_USAGE, "%sunknown option '--%s'; did you mean '--%s'?", source, word, near);
    return rt_fail(err, RT_USAGE, "%sunknown option '--%s'; --help lists the options", source, word);
}

/* The power of `base` that a suffix stands for: k, M, G, T for 1, 2, 3, 4; 0 for none; -1 where it is none of these. For
 * base 1024 small letters and a final B or iB are accepted too. */
static int suffix_power(const char *s, bool bytes)
{
    static const char big[] = "KMGT", small[] = "kmgt";
    int power = 0;
    if (*s == '\0')
        return 0;
    for (int i = 0; i < 4; i++) {
        if (*s == big[i] || (*s == small[i] && (bytes || i == 0))) {
            power = i + 1;
            s++;
            break;
        }
    }
    if (bytes && power > 0 && *s == 'i' && s[1] == 'B')
        s++;
    if (bytes && *s == 'B')
        s++;
    return *s == '\0' && (power > 0 || bytes) ? power : -1;
}

/* A whole number with an optional suffix; "1.5M" is fine where the result is whole. */
static bool parse_whole(const char *text, bool bytes, int64_t *out)
{
    const int64_t base = bytes ? 1024 : 1000;
    char *end;
    errno = 0;
    int64_t v = strtoll(text, &end, 10);
    const bool fraction = *end == '.' || *end == 'e';
    double d = 0;
    if (fraction) {
        d = strtod(text, &end);
        if (end == text || !isfinite(d))
            return false;
    } else if (end == text || errno != 0) {
        return false;
    }
    int power = suffix_power(end, bytes);
    if (power < 0 || text[0] == ' ')
        return false;
    for (; power > 0; power--) {
        d *= (double)base;
        if (!fraction && __builtin_mul_overflow(v, base, &v))
            return false;
    }
    if (fraction) {
        if (fabs(d) > 0x1p53 || d != floor(d))
            return false;
        v = (int64_t)d;
    }
    *out = v;
    return true;
}

static const char *kind_of(const struct rt_opt *o)
{
    switch (o->type) {
    case RT_OPT_INT: return "a whole number";
    case RT_OPT_BYTES: return "a number of bytes, as in 512M or 8G";
    default: return "a number";
    }
}

static bool has_range(const struct rt_opt *o)
{
    return (o->type == RT_OPT_INT || o->type == RT_OPT_FLOAT || o->type == RT_OPT_BYTES) && (o->min != 0 || o->max != 0);
}

static enum rt_status bad_number(const struct rt_opt *o, const char *text, const char *source, struct rt_err *err)
{
    if (has_range(o))
        return rt_fail(err, RT_USAGE, "%soption --%s: '%.80s' is not %s from %.15g to %.15g", source, o->name, text, kind_of(o),
                       o->min, o->max);
    return rt_fail(err, RT_USAGE, "%soption --%s: '%.80s' is not %s", source, o->name, text, kind_of(o));
}

static enum rt_status set_number(const struct rt_opt *o, const char *text, const char *source, void *values, struct rt_err *err)
{
    if (o->type == RT_OPT_FLOAT) {
        char *end;
        const double v = strtod(text, &end);
        if (end == text || *end != '\0' || !isfinite(v) || (has_range(o) && (v < o->min || v > o->max)))
            return bad_number(o, text, source, err);
        memcpy(field(o, values), &v, sizeof v);
        return RT_OK;
    }
    int64_t v;
    if (!parse_whole(text, o->type == RT_OPT_BYTES, &v) || (o->type == RT_OPT_BYTES && v < 0) ||
        (has_range(o) && ((double)v < o->min || (double)v > o->max)))
        return bad_number(o, text, source, err);
    memcpy(field(o, values), &v, sizeof v);
    return RT_OK;
}

static enum rt_status set_flag(const struct rt_opt *o, const char *text, const char *source, void *values, struct rt_err *err)
{
    static const char *const words[] = {"true", "yes", "1", "false", "no", "0"};
    for (int i = 0; i < 6; i++) {
        if (strcmp(text, words[i]) == 0) {
            *(bool *)field(o, values) = i < 3;
            return RT_OK;
        }
    }
    return rt_fail(err, RT_USAGE, "%soption --%s is a switch: '%.80s' is neither yes nor no; write --%s or --no-%s", source, o->name,
                   text, o->name, o->name);
}

static enum rt_status set_choice(const struct rt_opt *o, const char *text, const char *source, void *values, struct rt_err *err)
{
    const size_t len = strlen(text);
    bool known = len == 0;
    for (const char *c = o->choices; !known && c != NULL;) {
        const size_t n = strcspn(c, "|");
        known = n == len && memcmp(c, text, n) == 0;
        c = c[n] == '|' ? c + n + 1 : NULL;
    }
    if (!known)
        return rt_fail(err, RT_USAGE, "%soption --%s: '%.80s' is not one of %s", source, o->name, text, o->choices);
    *(const char **)field(o, values) = len == 0 ? NULL : text;
    return RT_OK;
}

static enum rt_status add_item(const struct rt_opt *o, const char *text, size_t len, void *values, struct rt_err *err)
{
    struct rt_str_list *list = field(o, values);
    const char **items = realloc(list->items, ((size_t)list->n + 1) * sizeof *items);
    if (items != NULL) {
        list->items = items;
        items[list->n] = strndup(text, len);
    }
    if (items == NULL || items[list->n] == NULL)
        return rt_fail(err, RT_NOMEM, "out of memory: the values of option --%s", o->name);
    list->n++;
    return RT_OK;
}

static enum rt_status set_list(const struct rt_opt *o, const char *text, void *values, struct rt_err *err)
{
    while (*text != '\0') {
        const size_t n = strcspn(text, "\n");
        const enum rt_status st = add_item(o, text, n, values, err);
        if (st != RT_OK)
            return st;
        text += n + (text[n] == '\n');
    }
    return RT_OK;
}

/* source: "" or "config.json: ". */
static enum rt_status set(const struct rt_opt *o, const char *text, const char *source, void *values, struct rt_err *err)
{
    /* nothing is a value only where there is no default: readers of others count on a text */
    if (text[0] == '\0' && o->def != NULL && (o->type == RT_OPT_CHOICE || o->type == RT_OPT_STRING))
        return rt_fail(err, RT_USAGE, "%soption --%s: expected %s, found nothing; without the option it is %s", source, o->name,
                       o->type == RT_OPT_CHOICE ? o->choices : o->arg, o->def);
    switch (o->type) {
    case RT_OPT_FLAG: return set_flag(o, text, source, values, err);
    case RT_OPT_INT:
    case RT_OPT_FLOAT:
    case RT_OPT_BYTES: return set_number(o, text, source, values, err);
    case RT_OPT_CHOICE: return set_choice(o, text, source, values, err);
    case RT_OPT_STRING: *(const char **)field(o, values) = text[0] == '\0' ? NULL : text; return RT_OK;
    case RT_OPT_LIST: return set_list(o, text, values, err);
    }
    return rt_fail(err, RT_INTERNAL, "option --%s has an unknown type", o->name);
}

enum rt_status rt_options_set(const struct rt_opt *const *tables, int n_tables, const char *name, const char *text,
                              const char *source, void *values, struct rt_err *err)
{
    char head[256];
    snprintf(head, sizeof head, "%.250s: ", source);
    const struct rt_opt *o = rt_options_find(tables, n_tables, name, strlen(name), NULL);
    return o == NULL ? unknown(tables, n_tables, name, strlen(name), head, err) : set(o, text, head, values, err);
}

static enum rt_status set_defaults(const struct rt_opt *const *tables, int n_tables, void *values, struct rt_err *err)
{
    int n = 0;
    for (int t = 0; t < n_tables; t++) {
        for (const struct rt_opt *o = tables[t]; o->name != NULL; o++) {
            RT_ASSERT(++n <= MAX_OPTIONS);
            RT_ASSERT(o->type != RT_OPT_LIST || o->def == NULL);
            const enum rt_status st = o->def == NULL ? RT_OK : set(o, o->def, "default of ", values, err);
            if (st != RT_OK)
                return st;
        }
    }
    return RT_OK;
}

/* What stands for the value in messages and help. */
static const char *arg_of(const struct rt_opt *o)
{
    return o->arg != NULL ? o->arg : o->type == RT_OPT_CHOICE ? o->choices : "VALUE";
}

/* One option at argv[*i], without its dashes; *i moves past a value of its own. */
static enum rt_status parse_one(const struct rt_opt *const *tables, int n_tables, int argc, char *const *argv, int *i,
                                void *values, bool *seen, struct rt_err *err)
{
    const char *name = argv[*i] + 2, *text = NULL;
    const size_t len = strcspn(name, "=");
    int index = 0;
    const struct rt_opt *o = rt_options_find(tables, n_tables, name, len, &index);
    if (name[len] == '=')
        text = name + len + 1;
    if (o == NULL && len > 3 && memcmp(name, "no-", 3) == 0) {
        o = rt_options_find(tables, n_tables, name + 3, len - 3, &index);
        if (o != NULL && (o->type != RT_OPT_FLAG || text != NULL))
            return rt_fail(err, RT_USAGE, "option --no-%s: %s", o->name,
                           text != NULL ? "it takes no value" : "only a switch can be turned off by 'no-'");
        text = "no";
    }
    if (o == NULL)
        return unknown(tables, n_tables, name, len, "", err);
    if (text == NULL && o->type == RT_OPT_FLAG)
        text = "yes";
    if (text == NULL) {
        if (*i + 1 >= argc || strncmp(argv[*i + 1], "--", 2) == 0)
            return rt_fail(err, RT_USAGE, "option --%s needs a value: --%s %s", o->name, o->name, arg_of(o));
        text = argv[++*i];
    }
    if (seen != NULL)
        seen[index] = true;
    return o->type == RT_OPT_LIST ? add_item(o, text, strlen(text), values, err) : set(o, text, "", values, err);
}

enum rt_status rt_options_parse(const struct rt_opt *const *tables, int n_tables, int argc, char *const *argv, void *values,
                                struct rt_positionals *pos, bool seen[128], struct rt_err *err)
{
    enum rt_status st;
    bool options = true;
    if (pos != NULL)
        *pos = (struct rt_positionals){0};
    if (seen != NULL)
        memset(seen, 0, MAX_OPTIONS * sizeof *seen);
    RT_TRY(set_defaults(tables, n_tables, values, err));
    if (pos != NULL && (pos->items = calloc((size_t)argc + 1, sizeof *pos->items)) == NULL)
        RT_FAIL(err, NOMEM, "out of memory: %d arguments", argc);
    for (int i = 0; i < argc; i++) {
        const bool is_option = options && argv[i][0] == '-' && argv[i][1] != '\0';
        if (!is_option && pos == NULL)
            RT_FAIL(err, USAGE, "'%.80s': expected options alone; --help lists them", argv[i]);
        if (!is_option)
            pos->items[pos->n++] = argv[i];
        else if (strcmp(argv[i], "--") == 0)
            options = false;
        else if (argv[i][1] != '-')
            RT_FAIL(err, USAGE, "unknown option '%.80s': options are whole words after two dashes; --help lists them", argv[i]);
        else
            RT_TRY(parse_one(tables, n_tables, argc, argv, &i, values, seen, err));
    }
out:
    return st;
}

enum rt_status rt_options_check(const struct rt_opt *const *tables, int n_tables, const void *values, struct rt_err *err)
{
    for (int t = 0; t < n_tables; t++) {
        for (const struct rt_opt *o = tables[t]; o->name != NULL; o++) {
            const void *f = field_const(o, values);
            bool given = true;
            switch (o->type) {
            case RT_OPT_FLAG: break;
            case RT_OPT_FLOAT: given = *(const double *)f != 0; break;
            case RT_OPT_INT:
            case RT_OPT_BYTES: given = *(const int64_t *)f != 0; break;
            case RT_OPT_STRING:
            case RT_OPT_CHOICE: given = *(const char *const *)f != NULL; break;
            case RT_OPT_LIST: given = ((const struct rt_str_list *)f)->n > 0; break;
            }
            if (o->required && !given)
                return rt_fail(err, RT_USAGE, "option --%s is required: %s", o->name, o->help);
        }
    }
    return RT_OK;
}

void rt_options_free(const struct rt_opt *const *tables, int n_tables, void *values, struct rt_positionals *pos)
{
    for (int t = 0; t < n_tables; t++) {
        for (const struct rt_opt *o = tables[t]; o->name != NULL; o++) {
            if (o->type != RT_OPT_LIST)
                continue;
            struct rt_str_list *list = field(o, values);
            for (int i = 0; i < list->n; i++)
                free((void *)(uintptr_t)list->items[i]);
            free(list->items);
            *list = (struct rt_str_list){0};
        }
    }
    if (pos != NULL) {
        free(pos->items);
        *pos = (struct rt_positionals){0};
    }
}

enum rt_status rt_options_value(const struct rt_opt *o, const void *values, struct rt_buf *out, struct rt_err *err)
{
    const void *f = field_const(o, values);
    switch (o->type) {
    case RT_OPT_FLAG: return rt_buf_puts(out, *(const bool *)f ? "true" : "false", err);
    case RT_OPT_INT:
    case RT_OPT_BYTES: return rt_buf_printf(out, err, "%" PRId64, *(const int64_t *)f);
    case RT_OPT_FLOAT: {
        const double v = *(const double *)f;
        char text[40];
        for (int digits = 15; digits <= 17; digits++) {
            snprintf(text, sizeof text, "%.*g", digits, v);
            if (strtod(text, NULL) == v)
                break;
        }
        return rt_buf_puts(out, text, err);
    }
    case RT_OPT_STRING:
    case RT_OPT_CHOICE: {
        const char *s = *(const char *const *)f;
        return rt_buf_puts(out, s == NULL ? "" : s, err);
    }
    case RT_OPT_LIST: {
        const struct rt_str_list *list = f;
        enum rt_status st = rt_buf_puts(out, "", err);
        for (int i = 0; i < list->n && st == RT_OK; i++)
            st = rt_buf_printf(out, err, "%s%s", i > 0 ? "\n" : "", list->items[i]);
        return st;
    }
    }
    return rt_fail(err, RT_INTERNAL, "option --%s has an unknown type", o->name);
}

/* Appends text word by word from *column on, each new line indented to HELP_COLUMN. */
static enum rt_status wrap(const char *text, int *column, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    while (*text != '\0' && st == RT_OK) {
        const int n = (int)strcspn(text, " ");
        const bool first = *column == HELP_COLUMN;
        if (!first && *column + 1 + n > HELP_WIDTH) {
            st = rt_buf_printf(out, err, "\n%*s%.*s", HELP_COLUMN, "", n, text);
            *column = HELP_COLUMN + n;
        } else {
            st = rt_buf_printf(out, err, "%s%.*s", first ? "" : " ", n, text);
            *column += !first + n;
        }
        text += n;
        text += strspn(text, " ");
    }
    return st;
}

/* " (1 to 8, default 4)", " (required)" and the like; "" where there is nothing to say. */
static enum rt_status remarks(const struct rt_opt *o, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    const char *gap = " (";
    RT_TRY(rt_buf_puts(out, "", err));
    if (has_range(o)) {
        RT_TRY(rt_buf_printf(out, err, "%s%.15g to %.15g", gap, o->min, o->max));
        gap = ", ";
    }
    if (o->required) {
        RT_TRY(rt_buf_printf(out, err, "%srequired", gap));
        gap = ", ";
    }
    if (o->type == RT_OPT_LIST) {
        RT_TRY(rt_buf_printf(out, err, "%smay be repeated", gap));
        gap = ", ";
    }
    if (o->type == RT_OPT_FLAG && o->def != NULL && strcmp(o->def, "true") == 0) {
        RT_TRY(rt_buf_printf(out, err, "%son by default, --no-%s turns it off", gap, o->name));
        gap = ", ";
    } else if (o->type != RT_OPT_FLAG && o->def != NULL) {
        RT_TRY(rt_buf_printf(out, err, "%sdefault %s", gap, o->def));
        gap = ", ";
    }
    if (gap[0] == ',')
        RT_TRY(rt_buf_puts(out, ")", err));
out:
    return st;
}

static enum rt_status help_of(const struct rt_opt *o, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_buf tail = {0};
    const char *arg = o->type == RT_OPT_FLAG ? "" : arg_of(o);
    const size_t start = out->len;
    RT_TRY(rt_buf_printf(out, err, "  --%s%s%s", o->name, arg[0] != '\0' ? " " : "", arg));
    if (out->len - start + 1 > HELP_COLUMN)
        RT_TRY(rt_buf_printf(out, err, "\n%*s", HELP_COLUMN, ""));
    else
        RT_TRY(rt_buf_printf(out, err, "%*s", HELP_COLUMN - (int)(out->len - start), ""));
    int column = HELP_COLUMN;
    RT_TRY(wrap(o->help != NULL ? o->help : "", &column, out, err));
    RT_TRY(remarks(o, &tail, err));
    RT_TRY(wrap(tail.data + strspn(tail.data, " "), &column, out, err));
    if (o->arg != NULL && o->type == RT_OPT_CHOICE && strcmp(o->arg, o->choices) != 0) {
        RT_TRY(wrap("One of ", &column, out, err));
        RT_TRY(wrap(o->choices, &column, out, err));
    }
    RT_TRY(rt_buf_puts(out, "\n", err));
out:
    rt_buf_free(&tail);
    return st;
}

enum rt_status rt_options_help(const struct rt_opt *const *tables, int n_tables, struct rt_buf *out, struct rt_err *err)
{
    for (int t = 0; t < n_tables; t++) {
        for (const struct rt_opt *o = tables[t]; o->name != NULL; o++) {
            const enum rt_status st = help_of(o, out, err);
            if (st != RT_OK)
                return st;
        }
    }
    return RT_OK;
}
