/* retort inspect: what a path is. */
#include <stdio.h>

#include "distill/command.h"
#include "distill/inspect.h"

struct values {
    struct rt_common common;
    const char *tokenizer;
    bool tensors, verify;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"tokenizer", RT_OPT_STRING, V(tokenizer), NULL, 0, 0, NULL, "DIR", "model directory whose tokenizer and template count the tokens of a dataset", false, false},
    {"tensors", RT_OPT_FLAG, V(tensors), NULL, 0, 0, NULL, NULL, "list every tensor of a model", false, false},
    {"verify", RT_OPT_FLAG, V(verify), NULL, 0, 0, NULL, NULL, "read shards and checkpoints whole and check every checksum", false, false},
    {0},
};

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    const struct values *v = values;
    const struct rt_inspect_options o = {.tokenizer = v->tokenizer, .tensors = v->tensors, .verify = v->verify};
    struct rt_json *obj = NULL;
    struct rt_buf text = {0};
    enum rt_status st;
    (void)ctx;
    RT_TRY(rt_json_new_object(&obj, err));
    RT_TRY(rt_inspect(pos->items[0], &o, obj, err));
    if (v->common.json) {
        RT_TRY(rt_json_dump(obj, 2, &text, err));
        RT_TRY(rt_buf_append(&text, "\n", 1, err));
    } else {
        RT_TRY(rt_inspect_print(obj, &text, err));
    }
    fwrite(text.data, 1, text.len, stdout);
out:
    rt_buf_free(&text);
    rt_json_free(obj);
    return st;
}

const struct rt_command rt_cmd_inspect = {
    .name = "inspect",
    .synopsis = "PATH [--tokenizer DIR] [--tensors] [--verify] [--json]",
    .summary = "say what a model, tokenizer, shard set, dataset, run, experiment or checkpoint is",
    .help = "PATH is recognised by what it holds, never by its name. Of a model: parameters (all, and those that a token meets), bytes by type, layers,\n"
            "context, tokenizer, template. Of shards: who made them, mass of the stored ids at each temperature, bytes a token, expert load. Of a\n"
            "dataset: forms of its lines, and with --tokenizer its tokens. Of a run: its state and last numbers.\n\n"
            "    retort inspect DeepSeek-R1/ --json\n"
            "    retort inspect traces/accepted.jsonl --tokenizer Qwen2.5-7B/",
    .options = options,
    .takes = RT_TAKES_JSON,
    .values_size = sizeof(struct values),
    .min_positionals = 1,
    .max_positionals = 1,
    .run = run,
};
