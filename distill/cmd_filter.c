/* retort filter: verifies and filters traces. */
#include <stdio.h>

#include "distill/command.h"
#include "distill/filter.h"

struct values {
    struct rt_common common;
    const char *data, *out, *verify, *drop, *against, *tokenizer;
    int64_t min_tokens, max_tokens;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"data", RT_OPT_STRING, V(data), NULL, 0, 0, NULL, "FILE|DIR", "JSON lines, or a directory that holds traces.jsonl", true, false},
    {"out", RT_OPT_STRING, V(out), NULL, 0, 0, NULL, "DIR", "where accepted.jsonl and rejected.jsonl go; replaced at the end", true, true},
    {"verify", RT_OPT_CHOICE, V(verify), "boxed", 0, 0, RT_VERIFY_CHOICES, NULL, "compare the last \\boxed{} behind the thought with \"answer\", or all that stands behind it", false, false},
    {"drop", RT_OPT_STRING, V(drop), "all", 0, 0, NULL, "REASON,...", "reasons to reject for: all, none, or some of " RT_FILTER_NAMES, false, false},
    {"against", RT_OPT_STRING, V(against), NULL, 0, 0, NULL, "FILE", "JSON lines with prompts of an evaluation: traces of the same prompts are contaminated", false, false},
    {"tokenizer", RT_OPT_STRING, V(tokenizer), NULL, 0, 0, NULL, "DIR", "count lengths in tokens of this model; without it in characters", false, false},
    {"min-tokens", RT_OPT_INT, V(min_tokens), "0", 0, 1e9, NULL, "N", "reject shorter completions (tokens, or characters without --tokenizer)", false, false},
    {"max-tokens", RT_OPT_INT, V(max_tokens), "0", 0, 1e9, NULL, "N", "reject longer completions (likewise); 0: no bound", false, false},
    {0},
};

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    const struct values *v = values;
    struct rt_tokenizer *tok = NULL;
    struct rt_filter_counts counts;
    struct rt_json *answer = NULL;
    enum rt_status st;
    (void)pos;
    struct rt_filter_options o = {.data = v->data, .out = v->out, .verify = rt_verify_mode_of(v->verify), .min_length = v->min_tokens, .max_length = v->max_tokens,
                                  .against = v->against, .log = ctx->log, .dry_run = v->common.dry_run, .stop = ctx->stop, .stop_self = ctx->stop_self};
    RT_TRY(rt_filter_parse_drop(v->drop, &o.drop, err));
    RT_TRY(rt_filter_check(&o, v->drop, err));
    if (v->max_tokens > 0 && v->max_tokens < v->min_tokens)
        RT_FAIL(err, USAGE, "--min-tokens %ld is more than --max-tokens %ld", (long)v->min_tokens, (long)v->max_tokens);
    if (v->tokenizer != NULL)
        RT_TRY(rt_tokenizer_load(v->tokenizer, &tok, err));
    o.tok = tok;
    RT_TRY(rt_filter_run(&o, &counts, err));
    rt_filter_report(&counts, &o);
    if (v->common.json) {
        RT_TRY(rt_json_new_object(&answer, err));
        RT_TRY(rt_filter_counts_json(&counts, answer, err));
        RT_TRY(rt_command_print_json(answer, err));
    }
out:
    rt_json_free(answer);
    rt_tokenizer_free(tok);
    return st;
}

const struct rt_command rt_cmd_filter = {
    .name = "filter",
    .synopsis = "--data FILE|DIR --out DIR [OPTIONS]",
    .summary = "verify and filter traces, ours or anyone's",
    .help = "Reads {\"prompt\",\"completion\"} and {\"messages\"} (the thought between think tags or in \"reasoning_content\"). Each line goes to\n"
            "OUT/accepted.jsonl or OUT/rejected.jsonl with a \"filter\" member; its reason is the first check that it fails, in this order:\n"
            "  unfinished    finish_reason is there and is no end (stop, eos, end_turn, stop_sequence); no text; a thought without end\n"
            "  format        not one <think> at the start and one </think> behind it, nor reasoning_content without tags\n"
            "  length        outside --min-tokens .. --max-tokens, where given\n"
            "  language      letters of another script than the prompt's\n"
            "  repetition    32 words in a row that occur 8 times or more\n"
            "  wrong         the conclusion differs from \"answer\"\n"
            "  unparsed      no conclusion found, or none that can be compared: worth another judge\n"
            "  duplicate     prompt and completion are those of an earlier accepted line\n"
            "  contaminated  13 words in a row of a prompt in --against, or 95 % of a shorter one, in the prompt (without one, in the text)\n"
            "A reason named in --drop must be one that can be found: wrong and unparsed need --verify, length a bound, contaminated --against.\n"
            "Lines without \"answer\" are not verified. With --dry-run only the counts are made.\n\n"
            "    retort filter --data traces/ --out clean/ --verify boxed --against eval.jsonl --tokenizer DeepSeek-R1 --max-tokens 16384",
    .options = options,
    .takes = RT_TAKES_JSON | RT_TAKES_DRY_RUN,
    .values_size = sizeof(struct values),
    .run = run,
};
