#include "distill/report.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "distill/report_parts.h"

/* The palette is Okabe and Ito's, told apart by colour-blind readers, with darker and lighter steps for the two backgrounds. */
static const char style[] =
    ":root{color-scheme:light dark;--bg:#fff;--fg:#1c1e21;--soft:#5b626b;--rule:#dfe3e8;--panel:#f6f7f9;--warn:#fff6df;--warnrule:#c98a00;--good:#eef6f1;--goodrule:#00795a;"
    "--c0:#0072b2;--c1:#c75000;--c2:#00795a;--c3:#a8478a;--c4:#8a6d00;--c5:#2b8fc4;--c6:#4d4d4d;--c7:#7b3fb5}\n"
    "@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e8ea;--soft:#a2abb5;--rule:#333a41;--panel:#1d2226;--warn:#33290f;--warnrule:#e6a817;--good:#142a23;--goodrule:#2fbf93;"
    "--c0:#56b4e9;--c1:#f28e3c;--c2:#2fbf93;--c3:#e08fc4;--c4:#e6cf3f;--c5:#8fc7f0;--c6:#b8bec4;--c7:#b592e8}}\n"
    "*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}\n"
    "main{max-width:1080px;margin:0 auto;padding:2.2rem 1.2rem 4rem}h1{font-size:1.75rem;line-height:1.2;margin:0 0 .3rem;overflow-wrap:anywhere}h2{font-size:1.25rem;margin:2.6rem 0 .7rem;padding-top:.9rem;border-top:1px solid var(--rule)}"
    "h3{font-size:1rem;margin:1.5rem 0 .5rem}p{margin:.5rem 0;max-width:76ch}.sub{color:var(--soft)}code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em;overflow-wrap:anywhere}\n"
    ".box{border-left:4px solid var(--goodrule);background:var(--good);padding:.7rem 1rem;margin:1.1rem 0;border-radius:0 6px 6px 0}.box.warn{border-color:var(--warnrule);background:var(--warn)}"
    ".box h2{border:0;margin:0 0 .3rem;padding:0;font-size:1.05rem}.box ul{margin:0;padding-left:1.15rem}.box li{margin:.25rem 0;max-width:88ch;overflow-wrap:anywhere}\n"
    ".scroll{overflow-x:auto;margin:.6rem 0}table{border-collapse:collapse;font-size:.9rem;min-width:100%;font-variant-numeric:tabular-nums}"
    "th,td{padding:.38rem .75rem;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;white-space:nowrap}th{font-weight:600}thead th{color:var(--soft);border-bottom-width:2px;vertical-align:bottom}"
    "th.n,td.n{text-align:right}td.wrap{white-space:normal;min-width:11rem}tbody th{font-weight:600}.ci{color:var(--soft);font-size:.86em}caption{text-align:left;color:var(--soft);padding:.2rem 0}\n"
    ".legend{display:flex;flex-wrap:wrap;gap:.35rem 1.3rem;padding:0;margin:.8rem 0;list-style:none;font-size:.92rem}.legend li{display:flex;align-items:center;gap:.45rem}.legend svg{width:38px;height:14px;flex:none}\n"
    ".figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1.1rem}figure{margin:0;background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:.8rem .8rem .5rem;min-width:0}"
    "figcaption{font-size:.92rem;font-weight:600;margin-bottom:.35rem}figcaption span{font-weight:400;color:var(--soft)}figure svg{display:block;width:100%;height:auto}\n"
    "svg text{font:11.5px system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif;fill:var(--soft)}svg text.name,svg text.value{fill:var(--fg);font-size:12px}svg .grid{stroke:var(--rule)}svg .axis{stroke:var(--soft)}"
    ".line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.band{fill:var(--c);opacity:.16}.bar{fill:var(--c)}.mark{fill:var(--c);stroke:var(--panel);stroke-width:1}.whisker{fill:none;stroke:var(--fg);stroke-width:1.5}\n"
    ".s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}.s5{--c:var(--c5)}.s6{--c:var(--c6)}.s7{--c:var(--c7)}"
    ".line.s1{stroke-dasharray:7 4}.line.s2{stroke-dasharray:2 4}.line.s3{stroke-dasharray:10 4 2 4}.line.s4{stroke-dasharray:14 4}.line.s5{stroke-dasharray:4 3 1 3}.line.s6{stroke-dasharray:3 3}.line.s7{stroke-dasharray:12 3 3 3 3 3}\n"
    "details{margin:.7rem 0}summary{cursor:pointer;color:var(--soft)}footer{margin-top:3rem;color:var(--soft);font-size:.88rem}\n"
    "@media(max-width:560px){main{padding:1.3rem .8rem 3rem}h1{font-size:1.4rem}th,td{padding:.34rem .5rem}}@media print{figure{break-inside:avoid}.scroll{overflow:visible}}\n";

static enum rt_status head(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    const char *title = c->experiment ? c->title : "runs";
    RT_TRY(rt_buf_puts(out, "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n<title>Comparison of ", err));
    RT_TRY(rt_html_text(out, title, err));
    RT_TRY(rt_buf_printf(out, err, "</title>\n<style>\n%s</style>\n</head>\n<body>\n<main>\n<h1>Comparison of ", style));
    RT_TRY(rt_html_text(out, title, err));
    RT_TRY(rt_buf_printf(out, err, "</h1>\n<p class=\"sub\">%d arm%s, %d run%s, %d evaluation set%s", c->n_arms, c->n_arms == 1 ? "" : "s", c->n_runs,
                         c->n_runs == 1 ? "" : "s", c->n_evals, c->n_evals == 1 ? "" : "s"));
    if (c->n_arms > 1) {
        RT_TRY(rt_buf_puts(out, "; every arm is held against <strong>", err));
        RT_TRY(rt_html_text(out, c->arm[0].name, err));
        RT_TRY(rt_buf_puts(out, "</strong>", err));
    }
    RT_TRY(rt_buf_puts(out, ".</p>\n", err));
out:
    return st;
}

/* A sentence; its claim, which ends where the numbers begin, is set bold. */
static enum rt_status sentence(const char *text, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char claim[512];
    const char *at = strstr(text, ": ");
    while (at != NULL && !(at[2] >= '0' && at[2] <= '9'))
        at = strstr(at + 2, ": ");
    if (at != NULL && (size_t)(at - text) < sizeof claim) {
        snprintf(claim, sizeof claim, "%.*s", (int)(at - text), text);
        RT_TRY(rt_buf_puts(out, "<strong>", err));
        RT_TRY(rt_html_text(out, claim, err));
        RT_TRY(rt_buf_puts(out, "</strong>", err));
        text = at;
    }
    RT_TRY(rt_html_text(out, text, err));
out:
    return st;
}

static enum rt_status sentences(const struct rt_json *list, const char *title, const char *box, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    if (rt_json_len(list) == 0)
        return RT_OK;
    RT_TRY(rt_buf_printf(out, err, "<section class=\"%s\"><h2>%s</h2><ul>\n", box, title));
    for (size_t i = 0; i < rt_json_len(list); i++) {
        RT_TRY(rt_buf_puts(out, "<li>", err));
        RT_TRY(sentence(rt_json_as_string(rt_json_at(list, i), NULL), out, err));
        RT_TRY(rt_buf_puts(out, "</li>\n", err));
    }
    RT_TRY(rt_buf_puts(out, "</ul></section>\n", err));
out:
    return st;
}

static enum rt_status legend(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_buf_puts(out, "<ul class=\"legend\" aria-label=\"Arms\">\n", err));
    for (int a = 0; a < c->n_arms; a++) {
        RT_TRY(rt_buf_printf(out, err, "<li><svg viewBox=\"0 0 38 14\" aria-hidden=\"true\"><path class=\"line s%d\" d=\"M2 7H36\"/></svg><span><strong>", a % RT_SVG_SERIES));
        RT_TRY(rt_html_text(out, c->arm[a].name, err));
        RT_TRY(rt_buf_puts(out, "</strong>", err));
        if (c->arm[a].description != NULL) {
            RT_TRY(rt_buf_puts(out, " ", err));
            RT_TRY(rt_html_text(out, c->arm[a].description, err));
        }
        RT_TRY(rt_buf_puts(out, "</span></li>\n", err));
    }
    RT_TRY(rt_buf_puts(out, "</ul>\n", err));
out:
    return st;
}

static enum rt_status differs(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    const struct rt_json *list = rt_json_get(c->report, "differs");
    RT_TRY(rt_buf_puts(out, "<h2>What differs between the arms</h2>\n", err));
    if (rt_json_len(list) == 0) {
        RT_TRY(rt_buf_puts(out, "<p>Nothing: their resolved options are the same, but for the seed and where the run is.</p>\n", err));
        goto out;
    }
    RT_TRY(rt_buf_puts(out, "<div class=\"scroll\"><table><thead><tr><th scope=\"col\">option</th>", err));
    for (int a = 0; a < c->n_arms; a++) {
        RT_TRY(rt_buf_puts(out, "<th scope=\"col\">", err));
        RT_TRY(rt_html_text(out, c->arm[a].name, err));
        RT_TRY(rt_buf_puts(out, "</th>", err));
    }
    RT_TRY(rt_buf_puts(out, "</tr></thead><tbody>\n", err));
    for (size_t i = 0; i < rt_json_len(list); i++) {
        const struct rt_json *values = rt_json_get(rt_json_at(list, i), "values");
        RT_TRY(rt_buf_puts(out, "<tr><th scope=\"row\"><code>--", err));
        RT_TRY(rt_html_text(out, rt_json_as_string(rt_json_get(rt_json_at(list, i), "option"), NULL), err));
        RT_TRY(rt_buf_puts(out, "</code></th>", err));
        for (size_t a = 0; a < rt_json_len(values); a++) {
            const char *v = rt_json_as_string(rt_json_at(values, a), NULL);
            RT_TRY(rt_buf_puts(out, "<td><code>", err));
            RT_TRY(rt_html_text(out, v[0] != '\0' ? v : "-", err));
            RT_TRY(rt_buf_puts(out, "</code></td>", err));
        }
        RT_TRY(rt_buf_puts(out, "</tr>\n", err));
    }
    RT_TRY(rt_buf_puts(out, "</tbody></table></div>\n<p class=\"sub\">Everything else that the commands resolved to is the same, but for the seed and where the run is.</p>\n", err));
out:
    return st;
}

static enum rt_status notes(struct rt_buf *out, struct rt_err *err)
{
    return rt_buf_puts(out,
        "<h2>How to read this</h2>\n<ul>\n"
        "<li>Losses are means in nats: cross-entropy over targets, KL over the rows for which the teacher's distribution is stored. KL holds the factor T², so that "
        "temperatures are on one scale.</li>\n"
        "<li>Intervals are 95 %, over whole sequences (losses, agreement, accuracy) or whole problems (pass@1), because tokens of one sequence, and samples of one problem, "
        "are not independent. A loss has a normal interval, a share Wilson's, as <code>retort eval</code> prints them.</li>\n"
        "<li>Differences are paired: both arms on the same sequences or problems, all seeds together, by a percentile bootstrap of 2,000 draws from a fixed seed. They are called told apart only where the interval leaves out 0 and every "
        "seed has the same sign. Each interval stands alone: of twenty, one may miss by chance.</li>\n"
        "<li>The intervals hold the spread over evaluation data. The spread between trainings is what the seeds show, not part of an interval.</li>\n</ul>\n", err);
}

enum rt_status rt_report_html(const struct rt_comparison *c, struct rt_buf *out, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(head(c, out, err));
    RT_TRY(sentences(rt_json_get(c->report, "verdict"), "Verdict", "box", out, err));
    RT_TRY(sentences(rt_json_get(c->report, "warnings"), "Warnings", "box warn", out, err));
    RT_TRY(legend(c, out, err));
    RT_TRY(rt_report_results(c, out, err));
    RT_TRY(rt_report_differences(c, out, err));
    RT_TRY(rt_report_curves(c, out, err));
    RT_TRY(rt_report_costs(c, out, err));
    RT_TRY(rt_report_seeds(c, out, err));
    RT_TRY(differs(c, out, err));
    RT_TRY(notes(out, err));
    RT_TRY(rt_buf_puts(out, "<footer>Written by retort compare.</footer>\n</main>\n</body>\n</html>\n", err));
out:
    return st;
}
