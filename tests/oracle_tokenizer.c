/* Tokenizers: every text of a file of cases has the expected ids, and they decode to the expected text. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "formats/json.h"
#include "formats/tokenizer.h"
#include "tests/oracle.h"

static bool one(struct rt_tokenizer *tok, const struct rt_json *j, const char *name, struct rt_encoding *e, struct rt_buf *text, bool *ids_good,
                bool *text_good)
{
    struct rt_err err = {0};
    size_t len, want_len;
    const char *in = rt_json_as_string(rt_json_get(j, "text"), &len);
    const struct rt_json *ids = rt_json_get(rt_json_get(j, "ids"), name);
    const char *want = rt_json_as_string(rt_json_get(rt_json_get(j, "decoded"), name), &want_len);
    if (in == NULL || ids == NULL)
        return false;
    e->n = 0;
    text->len = 0;
    *ids_good = rt_tokenizer_encode(tok, in, len, e, &err) == RT_OK && e->n == rt_json_len(ids);
    for (size_t i = 0; *ids_good && i < e->n; i++) {
        int64_t id;
        *ids_good = rt_json_as_int(rt_json_at(ids, i), &id) && id == (int64_t)e->ids[i];
    }
    *text_good = want == NULL || (rt_tokenizer_decode(tok, e->ids, e->n, false, text, &err) == RT_OK && text->len == want_len &&
                                  memcmp(text->data, want, want_len) == 0);
    return true;
}

void oracle_tokenizer(struct oracle *o, const char *name, const char *dir, const char *cases)
{
    struct rt_tokenizer *tok = NULL;
    struct rt_err err = {0};
    struct rt_buf file = {0}, text = {0};
    struct rt_encoding e = {0};
    int64_t n = 0, ids_good = 0, text_good = 0;
    if (rt_tokenizer_load(dir, &tok, &err) != RT_OK || rt_file_read_all(cases, (size_t)256 << 20, &file, &err) != RT_OK) {
        oracle_fail(o, "tokenizer", err.msg);
        rt_tokenizer_free(tok);
        return;
    }
    for (char *at = file.data, *end; at < file.data + file.len; at = end + 1) {
        struct rt_json *j = NULL;
        bool a, b;
        end = memchr(at, '\n', (size_t)(file.data + file.len - at));
        end = end != NULL ? end : file.data + file.len;
        if (end == at || rt_json_parse(at, (size_t)(end - at), cases, &j, &err) != RT_OK)
            continue;
        if (one(tok, j, name, &e, &text, &a, &b)) {
            n++;
            ids_good += a;
            text_good += b;
        }
        rt_json_free(j);
    }
    if (n == 0) {
        oracle_fail(o, "tokenizer", "no case of this name in the file");
    } else {
        oracle_check(o, "ids", (double)ids_good / (double)n, 1, true);
        oracle_check(o, "decoded", (double)text_good / (double)n, 1, true);
    }
    rt_tokenizer_free(tok);
    rt_encoding_free(&e);
    rt_buf_free(&file);
    rt_buf_free(&text);
}
