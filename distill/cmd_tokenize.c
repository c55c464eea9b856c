/* retort tokenize: texts to ids and back, by lines. */
#include <stdio.h>
#include <stdlib.h>

#include "core/mem.h"
#include "distill/command.h"
#include "distill/lines.h"
#include "formats/tokenizer.h"

struct values {
    struct rt_common common;
    const char *tokenizer;
    bool decode;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"tokenizer", RT_OPT_STRING, V(tokenizer), NULL, 0, 0, NULL, "DIR", "model directory, or a tokenizer.json", true, false},
    {"decode", RT_OPT_FLAG, V(decode), NULL, 0, 0, NULL, NULL, "the way back: {\"ids\"} to {\"text\"}", false, false},
    {0},
};

struct job {
    struct rt_tokenizer *tok;
    struct rt_lines in;
    struct rt_encoding encoding;
    struct rt_buf out, text;
    uint32_t *ids;
    size_t cap;
};

static enum rt_status encode(struct job *j, const struct rt_json *v, struct rt_err *err)
{
    size_t n;
    enum rt_status st;
    const char *text = rt_json_as_string(rt_json_get(v, "text"), &n);
    if (text == NULL)
        RT_FAIL(err, FORMAT, "%s: expected {\"text\": \"...\"}", j->in.where);
    j->encoding.n = 0;
    st = rt_tokenizer_encode(j->tok, text, n, &j->encoding, err);
    if (st != RT_OK)
        rt_err_context(err, "%s", j->in.where);
    RT_TRY(st);
    RT_TRY(rt_buf_puts(&j->out, "{\"ids\":[", err));
    for (size_t i = 0; i < j->encoding.n; i++)
        RT_TRY(rt_buf_printf(&j->out, err, "%s%u", i > 0 ? "," : "", j->encoding.ids[i]));
    RT_TRY(rt_buf_puts(&j->out, "]}\n", err));
out:
    return st;
}

static enum rt_status decode(struct job *j, const struct rt_json *v, struct rt_err *err)
{
    const struct rt_json *list = rt_json_get(v, "ids");
    const size_t n = rt_json_len(list);
    struct rt_buf valid = {0};
    struct rt_json *answer = NULL;
    bool lossy = false;
    enum rt_status st;
    if (list == NULL || rt_json_typeof(list) != RT_JSON_ARRAY)
        RT_FAIL(err, FORMAT, "%s: expected {\"ids\": [...]}", j->in.where);
    if (n > j->cap) {
        rt_free(j->ids);
        j->ids = NULL;
        j->cap = 0;
        RT_TRY(rt_alloc(n, sizeof *j->ids, "ids", &j->ids, err));
        j->cap = n;
    }
    for (size_t i = 0; i < n; i++) {
        int64_t id;
        if (!rt_json_as_int(rt_json_at(list, i), &id) || id < 0 || id > UINT32_MAX)
            RT_FAIL(err, FORMAT, "%s: item %zu of \"ids\" is no id", j->in.where, i);
        j->ids[i] = (uint32_t)id;
    }
    j->text.len = 0;
    st = rt_tokenizer_decode(j->tok, j->ids, n, false, &j->text, err);
    if (st != RT_OK)
        rt_err_context(err, "%s", j->in.where);
    RT_TRY(st);
    RT_TRY(rt_buf_puts(&valid, "", err));
    RT_TRY(rt_put_utf8(j->text.data, j->text.len, &valid, &lossy, err));
    RT_TRY(rt_json_new_object(&answer, err));
    RT_TRY(rt_json_set_string_n(answer, "text", valid.data, valid.len, err));
    if (lossy)
        RT_TRY(rt_json_set_bool(answer, "lossy", true, err));
    RT_TRY(rt_json_dump(answer, 0, &j->out, err));
    RT_TRY(rt_buf_append(&j->out, "\n", 1, err));
out:
    rt_json_free(answer);
    rt_buf_free(&valid);
    return st;
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    const struct values *v = values;
    struct job j = {0};
    struct rt_json *line = NULL;
    bool end = false;
    enum rt_status st;
    (void)pos;
    RT_TRY(rt_tokenizer_load(v->tokenizer, &j.tok, err));
    RT_TRY(rt_lines_open(NULL, &j.in, err));
    for (;;) {
        if (ctx->stop != NULL && ctx->stop(ctx->stop_self))
            RT_FAIL(err, INTERRUPTED, "interrupted");
        RT_TRY(rt_lines_next_json(&j.in, &line, &end, err));
        if (end)
            break;
        j.out.len = 0;
        RT_TRY(v->decode ? decode(&j, line, err) : encode(&j, line, err));
        fwrite(j.out.data, 1, j.out.len, stdout);
        if (j.in.at == j.in.window.len) /* whoever asks line by line waits for the answer */
            fflush(stdout);
        if (ferror(stdout))
            RT_FAIL(err, IO, "cannot write to stdout");
        rt_json_free(line);
        line = NULL;
    }
out:
    rt_json_free(line);
    rt_lines_close(&j.in);
    rt_encoding_free(&j.encoding);
    rt_buf_free(&j.out);
    rt_buf_free(&j.text);
    rt_free(j.ids);
    rt_tokenizer_free(j.tok);
    return st;
}

const struct rt_command rt_cmd_tokenize = {
    .name = "tokenize",
    .synopsis = "--tokenizer DIR [--decode]",
    .summary = "texts to ids and back, JSON lines on stdin and stdout",
    .help = "A line {\"text\"} gives {\"ids\"}, nothing added (no BOS, no EOS); special tokens are found in the text. With --decode a line {\"ids\"} gives\n"
            "{\"text\"}; ids whose bytes are no UTF-8 give U+FFFD and \"lossy\": true. A bad line ends the run with its number and exit code 3.\n\n"
            "    echo '{\"text\": \"What is 2 + 2?\"}' | retort tokenize --tokenizer DeepSeek-R1",
    .options = options,
    .values_size = sizeof(struct values),
    .run = run,
};
