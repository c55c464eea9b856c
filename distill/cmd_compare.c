/* retort compare: finished runs side by side, paired and judged, in the terminal and as a page. */
#include <stdio.h>

#include "core/io.h"
#include "distill/command.h"
#include "distill/compare.h"
#include "distill/report.h"

struct values {
    struct rt_common common;
    const char *html;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"html", RT_OPT_STRING, V(html), NULL, 0, 0, NULL, "FILE", "where the page goes; an experiment has it in its directory, as report.html", false, false},
    {0},
};

static enum rt_status write_page(struct rt_context *ctx, const struct rt_comparison *c, const char *html, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char path[4096];
    struct rt_buf page = {0};
    if (html == NULL && !c->experiment)
        return RT_OK;
    if (html != NULL)
        snprintf(path, sizeof path, "%s", html);
    else
        RT_TRY(rt_path_join(path, sizeof path, c->title, "report.html", err));
    RT_TRY(rt_report_html(c, &page, err));
    RT_TRY(rt_publish_bytes(path, page.data, page.len, err));
    rt_info(ctx->log, "wrote %s", path);
out:
    rt_buf_free(&page);
    return st;
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    const struct values *v = values;
    struct rt_comparison *c = NULL;
    struct rt_buf text = {0};
    enum rt_status st;
    RT_TRY(rt_compare(pos->items, pos->n, ctx->log, &c, err));
    RT_TRY(write_page(ctx, c, v->html, err));
    if (v->common.json) {
        RT_TRY(rt_json_dump(c->report, 2, &text, err));
        RT_TRY(rt_buf_append(&text, "\n", 1, err));
    } else {
        RT_TRY(rt_compare_print(c, &text, err));
    }
    fwrite(text.data, 1, text.len, stdout);
out:
    rt_buf_free(&text);
    rt_comparison_free(c);
    return st;
}

const struct rt_command rt_cmd_compare = {
    .name = "compare",
    .synopsis = "RUN RUN ... | EXPERIMENT [--html FILE] [--json]",
    .summary = "compare finished runs: paired differences with intervals, a verdict, a report",
    .help = "Runs of one name (--arm, else --name of `train`) whose options agree but for the seed are one arm; others of that name are arms of their own,\n"
            "named by their paths. The first arm is what the others are held against. Differences are paired: the same sequences or problems in both\n"
            "arms, resampled together 2,000 times from a fixed seed; an arm's own intervals are those of `eval`. Arms may differ in losses and data. Where\n"
            "they differ in more (order, initialisation, tokens, learning rate or another option of the recipe) they are compared all the same, with\n"
            "warnings, and --json says \"controlled\": false. Where a run has several evaluations of one name (two files, temperatures, samplings; training's\n"
            "own and `eval`'s) each has a table.\n\n"
            "    retort compare experiment/\n"
            "    retort compare runs/hard runs/soft --html hard-soft.html",
    .options = options,
    .takes = RT_TAKES_JSON | RT_TAKES_DRY_RUN,
    .values_size = sizeof(struct values),
    .min_positionals = 1,
    .max_positionals = -1,
    .run = run,
};
