/* Fuzz targets: tokenizers, templates, input lines, answers. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/jsonl.h"
#include "distill/verify.h"
#include "formats/dataset.h"
#include "tests/fuzz.h"

#define TOKENIZERS "tests/data/tokenizers/"

/* ---- tokenizers and text ---- */
static const char *const tokenizer_words[] = {"\"id\": 4294967295", "\"id\": 1048575", "\"content\": \"\"", "\"Regex\": \"(a+)+$\"", "\"type\": \"Split\"",
                                              "\"type\": \"ByteLevel\"", "\"type\": \"NFC\"", "\"NFKC\"", "\"Sequence\"", "\"Digits\"", "\\\\p{L}", "\\\\s+(?!\\\\S)", "{0,65535}",
                                              "(?i:", "[^", "\xc4\xa0", "\"lstrip\": true", "\"special\": true", "\"normalized\": false",
                                              "\"ignore_merges\": true", "\"vocab\": {}", "\"merges\": []", "[\"a\", \"b\"]", "\"a b\"", NULL};

static void tokenizer_begin(struct fuzz_seeds *s)
{
    fuzz_dir("fuzz-tokenizer");
    fuzz_seed_file(s, TOKENIZERS "deepseek/tokenizer.json");
    fuzz_seed_file(s, TOKENIZERS "qwen/tokenizer.json");
    fuzz_seed_file(s, TOKENIZERS "llama3/tokenizer.json");
    fuzz_seed_file(s, TOKENIZERS "smollm2/tokenizer.json");
}

/* Ids decode to the text that they came from, unless the tokenizer normalises or strips. */
static enum rt_status there_and_back(struct rt_tokenizer *tok, const char *text, size_t n, bool exact, struct rt_err *err)
{
    struct rt_encoding e = {0};
    struct rt_buf back = {0};
    enum rt_status st;
    RT_TRY(rt_tokenizer_encode(tok, text, n, &e, err));
    RT_TRY(rt_tokenizer_decode(tok, e.ids, e.n, false, &back, err));
    if (exact && (back.len != n || (n > 0 && memcmp(back.data, text, n) != 0)))
        fuzz_fail("decoded to another text");
    if (e.n > 0 && e.byte_end[e.n - 1] != back.len)
        fuzz_fail("%zu bytes, the last token ends at %u", back.len, e.byte_end[e.n - 1]);
out:
    rt_buf_free(&back);
    rt_encoding_free(&e);
    return st;
}

static enum rt_status tokenizer_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    static const char text[] = "The quick 12345 br\xc3\xb6wn <|im_end|> e\xcc\x81 fox's\n\n\tint main(void) { return 0; }   \xe4\xb8\xad\xe6\x96\x87 "
                               "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!";
    struct rt_tokenizer *tok = NULL;
    enum rt_status st;
    fuzz_put(fuzz_at("tokenizer.json"), data, n);
    RT_TRY(rt_tokenizer_load(fuzz_place(), &tok, err));
    RT_TRY(there_and_back(tok, text, sizeof text - 1, false, err));
out:
    rt_tokenizer_free(tok);
    return st;
}

static struct rt_tokenizer *the_tok;
static struct rt_template *the_tmpl;

static void load_text_side(const char *dir)
{
    struct rt_err err = {0};
    fuzz_must(rt_tokenizer_load(dir, &the_tok, &err), &err);
    fuzz_must(rt_template_load(dir, NULL, the_tok, &the_tmpl, &err), &err);
}

static void free_text_side(void)
{
    rt_template_free(the_tmpl);
    rt_tokenizer_free(the_tok);
    the_tmpl = NULL;
    the_tok = NULL;
}

static const char *const text_words[] = {"<|im_start|>", "<|im_end|>", "<think>", "</think>", "e\xcc\x81", "\xef\xbf\xbf", "\xf0\x9f\x98\x80", "    ", "\r\n", "\xc2\xa0",
                                         "\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8", "12345678", "'s", "\xc0\x80", "\xed\xa0\x80", "\xff", NULL};

static void encode_begin(struct fuzz_seeds *s)
{
    static const char text[] = "The <|im_start|>quick 12345 br\xc3\xb6wn e\xcc\x81 fox's\n\n\tint main(void) { return 0; } \xe4\xb8\xad\xe6\x96\x87";
    fuzz_seed(s, text, sizeof text - 1);
    load_text_side(TOKENIZERS "deepseek"); /* no normalizer: the text comes back */
}

static enum rt_status encode_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    return there_and_back(the_tok, (const char *)data, n, true, err);
}

static const char *const template_words[] = {"<|im_start|>", "<|im_end|>", "<think>\\n", "enable_thinking", "strftime_now", "reasoning_content", "{%- if",
                                             "{{ bos_token }}", "<|start_header_id|>", "Cutting Knowledge Date", "date_string", "system", "You are", "\xff", NULL};

static const char *const kinds[] = {TOKENIZERS "deepseek", TOKENIZERS "qwen", TOKENIZERS "llama3", TOKENIZERS "smollm2"};
enum { KINDS = 4 };
static struct rt_tokenizer *tok_of_kind[KINDS];

static void template_begin(struct fuzz_seeds *s)
{
    struct rt_err err = {0};
    for (int i = 0; i < KINDS; i++) {
        char path[256];
        struct rt_json *v = NULL;
        size_t n;
        fuzz_must(rt_tokenizer_load(kinds[i], &tok_of_kind[i], &err), &err);
        snprintf(path, sizeof path, "%s/tokenizer_config.json", kinds[i]);
        fuzz_must(rt_json_load(path, 1 << 20, &v, &err), &err);
        const char *text = rt_json_as_string(rt_json_get(v, "chat_template"), &n);
        if (text != NULL)
            fuzz_seed(s, text, n);
        rt_json_free(v);
    }
}

static void template_end(void)
{
    for (int i = 0; i < KINDS; i++) {
        rt_tokenizer_free(tok_of_kind[i]);
        tok_of_kind[i] = NULL;
    }
}

static enum rt_status render(const uint8_t *data, size_t n, struct rt_tokenizer *tok, struct rt_err *err)
{
    static const struct rt_message m[] = {
        {"system", "be short", NULL, 8, 0, -1}, {"user", "17+5?", NULL, 5, 0, -1}, {"assistant", "<think>a</think>22", NULL, 18, 0, -1}};
    struct rt_template *t = NULL;
    struct rt_rendered r = {0};
    enum rt_status st;
    RT_TRY(rt_template_from_text((const char *)data, n, "input", tok, &t, err));
    RT_TRY(rt_template_render(t, m, 3, "input", &r, err));
    RT_TRY(rt_template_prompt(t, m, 2, RT_THINKING_ON, "input", &r, err));
    RT_TRY(rt_template_completion(t, m, 2, "<think>\nx</think>22", 19, "input", &r, err));
out:
    rt_rendered_free(&r);
    rt_template_free(t);
    return st;
}

/* With the first tokenizer that has the family's special tokens. */
static enum rt_status template_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    enum rt_status st = RT_UNSUPPORTED;
    for (int i = 0; i < KINDS && st == RT_UNSUPPORTED; i++) {
        rt_err_clear(err);
        st = render(data, n, tok_of_kind[i], err);
    }
    return st;
}

static const char *const dataset_words[] = {"\"prompt\": ", "\"completion\": ", "\"messages\": [", "\"role\": \"tool\"", "\"role\": \"assistant\"", "\"content\": null",
                                            "\"input_ids\": [4294967296]", "\"loss_mask\": [2]", "\"text\": \"\"", "\n", "\"loss\": false", "\"answer\": {}",
                                            "\"reasoning_content\": \"", "<|im_end|>", "<think>", "\\u0000", "\\ud83d", NULL};

static void dataset_begin(struct fuzz_seeds *s)
{
    static const char lines[] =
        "{\"prompt\": \"1+1?\", \"completion\": \"<think>\\n1+1</think>2\", \"answer\": 2}\n"
        "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \"content\": \"ho\", \"reasoning_content\": \"h\"}]}\n"
        "{\"text\": \"some text that is longer than twenty tokens of this small vocabulary will hold, so it is cut\"}\n"
        "{\"input_ids\": [1, 2, 3, 4], \"loss_mask\": [0, 0, 1, 1], \"other\": {\"a\": [1, 2.5, null]}}\n";
    fuzz_seed(s, lines, sizeof lines - 1);
    fuzz_dir("fuzz-dataset");
    load_text_side(TOKENIZERS "qwen");
}

/* Each sample keeps its promises: ids that exist, a mask for each, no more than max_length. */
static enum rt_status read_samples(struct rt_dataset *d, int64_t n_ids, int64_t most, struct rt_err *err)
{
    struct rt_sample x;
    bool end = false;
    enum rt_status st;
    for (;;) {
        RT_TRY(rt_dataset_next(d, &x, &end, err));
        if (end)
            break;
        int64_t targets = 0;
        for (int64_t i = 0; i < x.n; i++) {
            if (x.ids[i] >= n_ids)
                fuzz_fail("id %u of %ld", x.ids[i], (long)n_ids);
            targets += i > 0 && x.loss_mask[i] == 1;
        }
        if (x.n < 2 || x.n > most || targets != x.n_targets || targets == 0)
            fuzz_fail("%ld tokens, %ld targets, %ld of them counted", (long)x.n, (long)targets, (long)x.n_targets);
    }
out:
    return st;
}

static enum rt_status dataset_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    const struct rt_dataset_options o = {.tok = the_tok, .tmpl = the_tmpl, .max_length = 20, .overlong = n % 2 == 0 ? RT_OVERLONG_SPLIT : RT_OVERLONG_DROP};
    struct rt_dataset *d = NULL;
    struct rt_prompt p;
    bool end = false;
    enum rt_status st;
    fuzz_put(fuzz_at("lines.jsonl"), data, n);
    RT_TRY(rt_dataset_open(fuzz_at("lines.jsonl"), &o, &d, err));
    st = read_samples(d, rt_tokenizer_n_ids(the_tok), 20, err);
    RT_TRY(rt_dataset_rewind(d, NULL));
    while (!end && rt_dataset_next_prompt(d, &p, &end, NULL) == RT_OK)
        ;
    st = err->status;
out:
    rt_dataset_close(d);
    return st;
}

static enum rt_status jsonl_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    struct rt_jsonl f = {0};
    const struct rt_json *v;
    enum rt_status st;
    fuzz_put(fuzz_at("lines.jsonl"), data, n);
    RT_TRY(rt_jsonl_open(fuzz_at("lines.jsonl"), &f, err));
    do
        RT_TRY(rt_jsonl_next(&f, &v, err));
    while (v != NULL);
out:
    rt_jsonl_close(&f);
    return st;
}

/* ---- answers ---- */
static const char *const answer_words[] = {"\\boxed{", "\\fbox{", "\\frac{", "\\frac12", "\\dfrac", "\\sqrt{", "\\text{", "}", "{", "\\{", "\\}", "(", ")", "[", "]", ",", "^{", "\\pi",
                                           "50\\%", "1e400", "-", ".", "</think>", "\\left(", "\\right)", "\\cdot", "1/0", "\\infty", "\\pm", "=", "x", NULL};

static void verify_begin(struct fuzz_seeds *s)
{
    static const char *const texts[] = {"0.5\n<think>maybe \\boxed{3}</think>So \\boxed{\\frac12}.", "\\{1, 2, 3\\}\n\\boxed{\\left\\{3,\\,2, 1\\right\\}}",
                                        "(1,-2]\nthe box \\boxed{(1, -2]}", "\\frac{\\sqrt{3}}{2}\n\\fbox{\\sqrt 3/2}", "12{,}000\n\\boxed{12,000\\text{ km}}"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        fuzz_seed(s, texts[i], strlen(texts[i]));
}

/* First line: the reference answer; the rest: a completion. */
static enum rt_status verify_run(const uint8_t *data, size_t n, struct rt_err *err)
{
    const char *text = (const char *)data, *nl = memchr(text, '\n', n), *found;
    const size_t gold = nl != NULL ? (size_t)(nl - text) : n, from = nl != NULL ? gold + 1 : n;
    size_t len;
    (void)err;
    const enum rt_verdict v = rt_verify(RT_VERIFY_BOXED, text + from, n - from, text, gold, &found, &len);
    if (found != NULL && (found < text + from || found + len > text + n))
        fuzz_fail("found lies outside");
    if (v != RT_VERDICT_UNPARSED && found == NULL)
        fuzz_fail("%s without a box", rt_verdict_name(v));
    if (rt_verify_answers(text, gold, text, gold) == RT_VERDICT_WRONG)
        fuzz_fail("an answer differs from itself");
    rt_verify(RT_VERIFY_EXACT, text + from, n - from, text, gold, &found, &len);
    return RT_OK;
}

const struct fuzz_target fuzz_tokenizer = {"tokenizer", 1000, tokenizer_words, FUZZ_IDS, tokenizer_begin, NULL, tokenizer_run, NULL};
const struct fuzz_target fuzz_encode = {"encode", 3000, text_words, 0, encode_begin, NULL, encode_run, free_text_side};
const struct fuzz_target fuzz_template = {"template", 2000, template_words, 0, template_begin, NULL, template_run, template_end};
const struct fuzz_target fuzz_dataset = {"dataset", 2000, dataset_words, FUZZ_READER, dataset_begin, NULL, dataset_run, free_text_side};
const struct fuzz_target fuzz_jsonl = {"jsonl", 2000, dataset_words, FUZZ_READER, dataset_begin, NULL, jsonl_run, free_text_side};
const struct fuzz_target fuzz_verify = {"verify", 5000, answer_words, 0, verify_begin, NULL, verify_run, NULL};
