/* Options of a command: one table gives parsing, ranges, defaults, units and --help.
 *
 * A command declares a const table and a struct of values; rt_options_parse fills the struct. Order of precedence: command
 * line, then --config FILE (a JSON object whose keys are option names, read by the caller and fed to rt_options_set), then
 * the default. An unknown option is answered with the nearest known name.
 */
#ifndef RT_CORE_OPTIONS_H
#define RT_CORE_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum rt_opt_type {
    RT_OPT_FLAG,   /* bool: --name, --no-name */
    RT_OPT_INT,    /* int64_t in [min, max]; accepts k, M, G (powers of 1000) */
    RT_OPT_FLOAT,  /* double in [min, max] */
    RT_OPT_STRING, /* const char * */
    RT_OPT_CHOICE, /* const char *, one of "a|b|c" in choices */
    RT_OPT_BYTES,  /* int64_t; accepts K, M, G, T (powers of 1024), as in 8G */
    RT_OPT_LIST,   /* struct rt_str_list: repeated option, order kept; has no default */
};

struct rt_str_list {
    const char **items; /* array and texts are freed by rt_options_free */
    int n;
};

struct rt_opt {
    const char *name;        /* without the dashes */
    enum rt_opt_type type;
    size_t offset;           /* into the values struct: offsetof */
    const char *def;         /* default as text, NULL: none (0, NULL, false) */
    double min, max;         /* numbers; both 0: no range */
    const char *choices;     /* CHOICE */
    const char *arg;         /* what --help shows: "FILE", "N", "8G" */
    const char *help;        /* one sentence, unit included */
    bool required;
    bool runtime;            /* does not change results (threads, memory, log): not compared on resume */
};

struct rt_positionals {
    const char **items;
    int n;
};

/* Spellings: --name VALUE, --name=VALUE, --flag, --no-flag, --flag=yes|no; "--" ends the options; "-" is a positional.
 *
 * Fills values (zeroed by the caller) from argv[0 .. argc): defaults first. n_opts tables are chained: tables[i] ends with a
 * NULL name. USAGE errors name the option, the value, what is accepted. *pos gets the other arguments, in order; NULL: there
 * may be none. *seen, if not NULL, is bit per option of the chained tables (up to 128): given on the command line. On an error
 * values and *pos may be freed by rt_options_free all the same. */
enum rt_status rt_options_parse(const struct rt_opt *const *tables, int n_tables, int argc, char *const *argv, void *values,
                                struct rt_positionals *pos, bool seen[128], struct rt_err *err);
/* The option of the name of `len` bytes; NULL: there is none. *index (may be NULL) counts over the chained tables, as seen does. */
const struct rt_opt *rt_options_find(const struct rt_opt *const *tables, int n_tables, const char *name, size_t len, int *index);
/* Sets one option from text; source ("config.json") is for messages. The text must outlive values. A flag takes true, false,
 * yes, no, 1, 0; a string or choice is unset by ""; a list gets one item more for each line of the text. */
enum rt_status rt_options_set(const struct rt_opt *const *tables, int n_tables, const char *name, const char *text,
                              const char *source, void *values, struct rt_err *err);
/* Checks `required` ones (strings, choices, lists: set; numbers: not 0); call after --config was applied. */
enum rt_status rt_options_check(const struct rt_opt *const *tables, int n_tables, const void *values, struct rt_err *err);
void rt_options_free(const struct rt_opt *const *tables, int n_tables, void *values, struct rt_positionals *pos);

/* Appends the help text of the tables: name, argument, help, range, default; wrapped at 100 columns. */
enum rt_status rt_options_help(const struct rt_opt *const *tables, int n_tables, struct rt_buf *out, struct rt_err *err);
/* Appends the resolved value of option o as text that rt_options_set takes back ("" for an unset string; the items
 * of a list on lines of their own). */
enum rt_status rt_options_value(const struct rt_opt *o, const void *values, struct rt_buf *out, struct rt_err *err);
/* The candidate nearest to word by edit distance, NULL if none is near. */
const char *rt_nearest(const char *word, const char *const *candidates, int n);

#ifdef __cplusplus
}
#endif
#endif
