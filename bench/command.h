/* The command line of a measuring program: one table of options. */
#ifndef RT_BENCH_COMMAND_H
#define RT_BENCH_COMMAND_H

#include <stdio.h>

#include "core/options.h"

/* values and *pos (NULL: options alone) from the command line, checked (rt_options_parse, rt_options_check); where its flag --help, *help in values, was
 * given, prints the text instead of checking: nothing else is to be done. USAGE, NOMEM. *pos is the caller's to free. */
static inline enum rt_status bench_command(const struct rt_opt *options, int argc, char *const *argv, void *values, const bool *help,
                                           struct rt_positionals *pos, struct rt_err *err)
{
    const struct rt_opt *const tables[] = {options};
    struct rt_buf text = {0};
    enum rt_status st = rt_options_parse(tables, 1, argc - 1, argv + 1, values, pos, NULL, err);
    if (st != RT_OK || !*help)
        return st == RT_OK ? rt_options_check(tables, 1, values, err) : st;
    st = rt_options_help(tables, 1, &text, err);
    if (st == RT_OK)
        printf("%s", text.data);
    rt_buf_free(&text);
    return st;
}

#endif
