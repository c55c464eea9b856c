/* Tokenizers: small ones of each kind against the ids of Hugging Face tokenizers, BPE against the definition, damaged files. */
#include "tests/suite.h"

#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "core/rng.h"
#include "formats/bpe.h"
#include "formats/json.h"
#include "formats/pattern.h"
#include "formats/pretokenizer.h"
#include "formats/tokenizer.h"
#include "formats/unicode.h"

#define DATA "tests/data/tokenizers/"

static void check_case(struct rt_tokenizer *t, const struct rt_json *c)
{
    struct rt_err err = {0};
    struct rt_encoding e = {0};
    struct rt_buf back = {0};
    size_t len, dlen;
    const char *text = rt_json_as_string(rt_json_get(c, "text"), &len);
    const char *decoded = rt_json_as_string(rt_json_get(c, "decoded"), &dlen);
    const struct rt_json *ids = rt_json_get(c, "ids");
    assert_ok(rt_tokenizer_encode(t, text, len, &e, &err));
    if (e.n != rt_json_len(ids))
        fail_msg("'%s': %zu ids, expected %zu", text, e.n, rt_json_len(ids));
    for (size_t i = 0; i < e.n; i++) {
        int64_t id = -1;
        rt_json_as_int(rt_json_at(ids, i), &id);
        if (id != e.ids[i])
            fail_msg("'%s': id %zu is %u, expected %d", text, i, e.ids[i], (int)id);
    }
    assert_ok(rt_tokenizer_decode(t, e.ids, e.n, false, &back, &err));
    assert_int_equal(back.len, dlen);
    if (dlen > 0)
        assert_memory_equal(back.data, decoded, dlen);
    for (size_t i = 0; i < e.n; i++) {
        const char *bytes;
        size_t n;
        const uint32_t begin = i > 0 ? e.byte_end[i - 1] : 0;
        assert_true(rt_tokenizer_bytes(t, e.ids[i], &bytes, &n));
        assert_int_equal(e.byte_end[i], begin + n);
        assert_memory_equal(bytes, back.data + begin, n);
    }
    rt_encoding_free(&e);
    rt_buf_free(&back);
}

static void check_kind(const char *kind, int at_least)
{
    struct rt_err err = {0};
    struct rt_tokenizer *t;
    struct rt_buf all = {0};
    char path[256];
    int n = 0;
    snprintf(path, sizeof path, DATA "%s", kind);
    assert_ok(rt_tokenizer_load(test_data(path), &t, &err));
    snprintf(path, sizeof path, DATA "%s/cases.jsonl", kind);
    assert_ok(rt_file_read_all(test_data(path), 1 << 20, &all, &err));
    for (char *s = all.data, *end; (end = strchr(s, '\n')) != NULL; s = end + 1, n++) {
        struct rt_json *c;
        assert_ok(rt_json_parse(s, (size_t)(end - s), path, &c, &err));
        check_case(t, c);
        rt_json_free(c);
    }
    assert_true(n >= at_least);
    rt_buf_free(&all);
    rt_tokenizer_free(t);
}

/* The numbers of cases are those that were generated: a shorter file means that the test lost some. */
static void cases_deepseek(void **state)
{
    (void)state;
    check_kind("deepseek", 56);
}
static void cases_qwen(void **state)
{
    (void)state;
    check_kind("qwen", 56);
}
static void cases_llama3(void **state)
{
    (void)state;
    check_kind("llama3", 58);
}
static void cases_smollm2(void **state)
{
    (void)state;
    check_kind("smollm2", 56);
}

static void named_tokens(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tokenizer *t;
    uint32_t id;
    assert_ok(rt_tokenizer_load(test_data(DATA "deepseek"), &t, &err));
    assert_true(rt_tokenizer_find(t, "<｜begin▁of▁sentence｜>", strlen("<｜begin▁of▁sentence｜>"), &id));
    assert_int_equal(rt_tokenizer_bos(t), id);
    assert_true(rt_tokenizer_add_bos(t));
    assert_true(rt_tokenizer_is_special(t, id));
    assert_true(rt_tokenizer_find(t, "<｜User｜>", strlen("<｜User｜>"), &id));
    assert_true(rt_tokenizer_is_added(t, id));
    assert_false(rt_tokenizer_is_special(t, id));
    assert_int_equal(rt_tokenizer_eos(t), rt_tokenizer_pad(t));
    assert_false(rt_tokenizer_normalizes(t));
    assert_int_equal(strlen(rt_tokenizer_sha256(t)), 64);
    rt_tokenizer_free(t);

    /* no add_bos_token in its configuration: the post-processor says it */
    assert_ok(rt_tokenizer_load(test_data(DATA "llama3"), &t, &err));
    assert_true(rt_tokenizer_add_bos(t));
    assert_true(rt_tokenizer_bos(t) >= 0);
    assert_int_equal(rt_tokenizer_pad(t), -1);
    rt_tokenizer_free(t);

    assert_ok(rt_tokenizer_load(test_data(DATA "qwen"), &t, &err));
    assert_false(rt_tokenizer_add_bos(t));
    assert_int_equal(rt_tokenizer_bos(t), -1);
    assert_true(rt_tokenizer_normalizes(t));
    rt_tokenizer_free(t);

    /* the file alone: no configuration */
    assert_ok(rt_tokenizer_load(test_data(DATA "qwen/tokenizer.json"), &t, &err));
    assert_int_equal(rt_tokenizer_eos(t), -1);
    rt_tokenizer_free(t);
}

static void odd_bytes(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tokenizer *t;
    struct rt_encoding e = {0};
    struct rt_buf out = {0};
    uint32_t id, ends[2];
    assert_ok(rt_tokenizer_load(test_data(DATA "qwen"), &t, &err));
    assert_status(rt_tokenizer_encode(t, "abc\xff", 4, &e, &err), FORMAT);
    assert_status(rt_tokenizer_encode(t, "ab\xc3", 3, &e, &err), FORMAT);
    assert_int_equal(rt_tokenizer_encode(t, "ab\xed\xa0\x80", 5, &e, &err), RT_FORMAT); /* a surrogate */
    assert_non_null(strstr(err.msg, "byte 2"));
    rt_err_clear(&err);
    assert_int_equal(e.n, 0);
    assert_true(rt_tokenizer_find(t, "\xff", 1, &id));
    assert_ok(rt_tokenizer_decode(t, (uint32_t[]){id, id}, 2, false, &out, &err));
    assert_int_equal(out.len, 2);
    assert_memory_equal(out.data, "\xff\xff", 2);
    assert_status(rt_tokenizer_decode(t, (uint32_t[]){id, rt_tokenizer_n_ids(t)}, 2, false, &out, &err), FORMAT);
    assert_int_equal(out.len, 2);
    assert_ok(rt_tokenizer_byte_ends(t, (uint32_t[]){id, id}, 2, ends, &err));
    assert_int_equal(ends[1], 2);
    assert_true(rt_tokenizer_find(t, "<|im_end|>", 10, &id));
    out.len = 0;
    assert_ok(rt_tokenizer_decode(t, &id, 1, true, &out, &err));
    assert_int_equal(out.len, 0);
    rt_buf_free(&out);
    rt_encoding_free(&e);
    rt_tokenizer_free(t);
}

/* A megabyte without a cut: work that grew with the square of a word would not end here. */
static void long_words(void **state)
{
    (void)state;
    enum { N = 1 << 20 };
    static const char fill[] = {'a', ' ', '\n', '.'};
    struct rt_err err = {0};
    struct rt_tokenizer *t;
    struct rt_encoding e = {0};
    struct rt_buf out = {0};
    char *text;
    assert_ok(rt_tokenizer_load(test_data(DATA "deepseek"), &t, &err));
    assert_ok(rt_alloc(N, 1, "text", &text, &err));
    for (size_t i = 0; i < sizeof fill; i++) {
        memset(text, fill[i], N);
        e.n = out.len = 0;
        assert_ok(rt_tokenizer_encode(t, text, N, &e, &err));
        assert_ok(rt_tokenizer_decode(t, e.ids, e.n, false, &out, &err));
        assert_int_equal(out.len, N);
        assert_memory_equal(out.data, text, N);
    }
    rt_free(text);
    rt_buf_free(&out);
    rt_encoding_free(&e);
    rt_tokenizer_free(t);
}

enum { MERGES = 300 };
struct pair {
    uint32_t left, right;
};

/* The definition: merge the pair of lowest rank, the leftmost of equals, until there is none. */
static size_t slow_bpe(const struct pair *merge, size_t n_merges, uint32_t *ids, size_t n)
{
    for (size_t rank = 0; rank < n_merges;) {
        size_t i = 0;
        while (i + 1 < n && (ids[i] != merge[rank].left || ids[i + 1] != merge[rank].right))
            i++;
        if (i + 1 >= n) {
            rank++;
            continue;
        }
        ids[i] = 256 + (uint32_t)rank;
        memmove(ids + i + 1, ids + i + 2, (n - i - 2) * sizeof *ids);
        n--;
        rank = 0;
    }
    return n;
}

static void bpe_definition(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_vocab v;
    struct rt_bpe *b;
    struct pair merge[MERGES];
    uint64_t r = 0;
    size_t n = 0;
    assert_ok(rt_vocab_init(&v, 256 + MERGES, 256 + MERGES, &err));
    for (uint32_t c = 0; c < 256; c++)
        assert_ok(rt_vocab_put(&v, c, &(const char){(char)c}, 1, RT_TOKEN_BPE, &err));
    while (n < MERGES) { /* random merges over three letters whose result is new */
        char bytes[64];
        uint32_t id, part[2];
        size_t len = 0;
        for (int k = 0; k < 2; k++) {
            const uint64_t x = rt_rng_u64(1, 0, r++);
            part[k] = n > 3 && x % 3 ? 256 + (uint32_t)(x / 3 % n) : 'a' + (uint32_t)(x / 3 % 3);
            const struct rt_token *t = &v.token[part[k]];
            if (len + t->len <= sizeof bytes)
                memcpy(bytes + len, v.pool.data + t->off, t->len);
            len += t->len;
        }
        if (len > sizeof bytes || rt_vocab_find(&v, bytes, len, &id))
            continue;
        assert_ok(rt_vocab_put(&v, 256 + (uint32_t)n, bytes, len, RT_TOKEN_BPE, &err));
        merge[n++] = (struct pair){part[0], part[1]};
    }
    assert_ok(rt_bpe_create(&v, MERGES, false, &b, &err));
    for (size_t i = 0; i < MERGES; i++)
        rt_bpe_merge(b, merge[i].left, merge[i].right, (uint32_t)i, 256 + (uint32_t)i);
    for (int round = 0; round < 400; round++) {
        char word[48];
        uint32_t slow[48], fast[48];
        size_t len = 1 + rt_rng_u64(2, 0, r++) % sizeof word, made;
        for (size_t i = 0; i < len; i++) {
            word[i] = (char)('a' + rt_rng_u64(3, 0, r++) % 3);
            slow[i] = (uint8_t)word[i];
        }
        const size_t expected = slow_bpe(merge, MERGES, slow, len);
        for (int twice = 0; twice < 2; twice++) { /* the second time from the cache, where it fits */
            assert_ok(rt_bpe_encode(b, word, len, fast, &made, &err));
            assert_int_equal(made, expected);
            assert_memory_equal(fast, slow, made * sizeof *fast);
        }
    }
    rt_bpe_free(b);
    rt_vocab_free(&v);
}

/* The examples of Hugging Face's documentation of SplitDelimiterBehavior. */
static void split_behaviours(void **state)
{
    (void)state;
    static const struct {
        const char *behaviour, *pieces;
    } known[] = {
        {"Removed", "the|final|countdown"},
        {"Isolated", "the|-|final|-|-|countdown"},
        {"MergedWithPrevious", "the-|final-|-|countdown"},
        {"MergedWithNext", "the|-final|-|-countdown"},
        {"Contiguous", "the|-|final|--|countdown"},
    };
    const char *text = "the-final--countdown";
    struct rt_err err = {0};
    for (size_t k = 0; k < sizeof known / sizeof known[0]; k++) {
        struct rt_json *j;
        struct rt_pretokenizer *p;
        const struct rt_pieces *words;
        struct rt_buf spec = {0}, got = {0};
        assert_ok(rt_buf_printf(&spec, &err, "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"String\":\"-\"},"
                                "\"behavior\":\"%s\"},{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}]}",
                                known[k].behaviour));
        assert_ok(rt_json_parse(spec.data, spec.len, "test", &j, &err));
        assert_ok(rt_pretokenizer_create(j, &p, &err));
        assert_ok(rt_pretokenizer_split(p, text, strlen(text), &words, &err));
        for (size_t i = 0; i < words->n; i++)
            assert_ok(rt_buf_printf(&got, &err, "%s%.*s", i ? "|" : "", (int)(words->at[i].end - words->at[i].begin),
                                    text + words->at[i].begin));
        assert_string_equal(got.data, known[k].pieces);
        rt_pretokenizer_free(p);
        rt_json_free(j);
        rt_buf_free(&spec);
        rt_buf_free(&got);
    }
}

/* First match of a pattern in a text, as "begin-end"; "" without one. */
static void check_match(const char *pattern, const char *text, const char *expected)
{
    struct rt_err err = {0};
    struct rt_buf pcre = {0};
    struct rt_pattern *p;
    bool found;
    size_t begin, end;
    char got[64] = "";
    assert_ok(rt_pattern_translate(pattern, strlen(pattern), &pcre, &err));
    assert_ok(rt_pattern_create(pcre.data, pcre.len, &p, &err));
    assert_ok(rt_pattern_find(p, text, strlen(text), 0, &found, &begin, &end, &err));
    if (found)
        snprintf(got, sizeof got, "%zu-%zu", begin, end);
    if (strcmp(got, expected) != 0)
        fail_msg("'%s' in '%s': %s, expected %s", pattern, text, got, expected);
    rt_pattern_free(p);
    rt_buf_free(&pcre);
}

static void patterns(void **state)
{
    (void)state;
    static const char *const refused[] = {"\\w+", "a$", "^a", "\\bx", "[a[bc]]", "\\h", "a{,3}", "a{2}+", "(?<n>a)", "(*UTF)a", "[a",
                                          "\\", "\\p{L", "(?i)a", "[^a&&[b]]", "\\R", "\\G", "(?R)", "[[:alpha:]]"};
    struct rt_err err = {0};
    struct rt_buf out = {0};
    check_match("\\s", "\xe1\xa0\x8e", ""); /* U+180E is no white space, though PCRE2's own \s has it */
    check_match("\\s", "a\xc2\x85", "1-3");
    check_match("[^\\s]", " \xe1\xa0\x8e", "1-4");
    check_match("\\S", "\xe3\x80\x80x", "3-4");
    check_match("(?i:'s)", "'S", "0-2");
    check_match("(?i:'s)", "'\xc5\xbf", "0-3"); /* the long s */
    check_match("[\\p{L}&&[^\\p{Han}]]+", "\xe4\xb8\xad" "ab\xe4\xb8\xad", "3-5");
    check_match("[\\p{L}&&[x-z]]", "axb", "1-2");
    check_match("\\u4e2d", "a\xe4\xb8\xad", "1-4");
    check_match("\\v", "\n\v", "1-2");
    check_match("\\d", "a\xd9\xa3", "1-3");
    check_match("\\p{N}{1,3}", "x12345", "1-4");
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        out.len = 0;
        if (rt_pattern_translate(refused[i], strlen(refused[i]), &out, &err) != RT_UNSUPPORTED)
            fail_msg("'%s' was not refused", refused[i]);
        rt_err_clear(&err);
    }
    rt_buf_free(&out);
}

/* Written without fsync, which takes longer than the tests. */
static void put_file(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

/* A tokenizer of the 256 bytes with parts replaced: members of the file, and texts put into its lists. */
struct parts {
    const char *normalizer, *split, *decoder, *model, *vocab, *merges, *added, *ignore;
};

static const char *write_parts(const struct parts *p)
{
    struct rt_err err = {0};
    struct rt_buf b = {0};
    const char *path = test_tmp("tokenizer.json");
    int next = 0x100;
    assert_ok(rt_buf_printf(&b, &err, "{\"added_tokens\":[%s],\"normalizer\":%s,", p->added ? p->added : "", p->normalizer ? p->normalizer : "null"));
    assert_ok(rt_buf_printf(&b, &err, "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[%s%s{\"type\":\"ByteLevel\","
                            "\"add_prefix_space\":false,\"use_regex\":false}]},\"decoder\":%s,", p->split ? p->split : "", p->split ? "," : "",
                            p->decoder ? p->decoder : "{\"type\":\"ByteLevel\"}"));
    assert_ok(rt_buf_printf(&b, &err, "\"model\":{%s\"merges\":[%s],\"vocab\":{", p->model ? p->model : "\"type\":\"BPE\",", p->merges ? p->merges : ""));
    for (int c = 0; c < 256; c++) {
        const bool printable = (c >= '!' && c <= '~') || (c >= 0xa1 && c <= 0xac) || c >= 0xae;
        const int u = printable ? c : next++;
        char key[16];
        snprintf(key, sizeof key, "\\u%04x", u);
        if (p->ignore == NULL || strcmp(p->ignore, key) != 0)
            assert_ok(rt_buf_printf(&b, &err, "%s\"%s\":%d", c ? "," : "", key, c));
    }
    assert_ok(rt_buf_printf(&b, &err, "%s}}}", p->vocab ? p->vocab : ""));
    put_file(path, b.data, b.len);
    rt_buf_free(&b);
    return path;
}

static void check_refused(struct parts p, enum rt_status status, const char *word)
{
    struct rt_err err = {0};
    struct rt_tokenizer *t = NULL;
    const enum rt_status st = rt_tokenizer_load(write_parts(&p), &t, &err);
    if (st != status || strstr(err.msg, word) == NULL || strstr(err.msg, "tokenizer.json") == NULL)
        fail_msg("status %d, expected %d, '%s': %s", st, status, word, err.msg);
}

#define SPLIT(p) "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" p "\"},\"behavior\":\"Isolated\"}"

static void damaged_files(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tokenizer *t;
    char longer[1200];
    assert_ok(rt_tokenizer_load(write_parts(&(struct parts){.vocab = ",\"ab\":256", .merges = "\"a b\""}), &t, &err));
    assert_int_equal(rt_tokenizer_n_ids(t), 257);
    rt_tokenizer_free(t);
    check_refused((struct parts){.ignore = "\\u0041"}, RT_FORMAT, "0x41");
    check_refused((struct parts){.model = "\"type\":\"Unigram\","}, RT_UNSUPPORTED, "Unigram");
    check_refused((struct parts){.model = "\"dropout\":0.1,"}, RT_UNSUPPORTED, "dropout");
    check_refused((struct parts){.model = "\"end_of_word_suffix\":\"</w>\","}, RT_UNSUPPORTED, "</w>");
    check_refused((struct parts){.normalizer = "{\"type\":\"Lowercase\"}"}, RT_UNSUPPORTED, "Lowercase");
    check_refused((struct parts){.decoder = "{\"type\":\"Metaspace\"}"}, RT_UNSUPPORTED, "Metaspace");
    check_refused((struct parts){.decoder = "null"}, RT_UNSUPPORTED, "decoder");
    check_refused((struct parts){.split = "{\"type\":\"Whitespace\"}"}, RT_UNSUPPORTED, "Whitespace");
    check_refused((struct parts){.split = SPLIT("\\\\w+")}, RT_UNSUPPORTED, "\\w+");
    check_refused((struct parts){.split = SPLIT("(a")}, RT_UNSUPPORTED, "(a");
    check_refused((struct parts){.split = "{\"type\":\"ByteLevel\",\"add_prefix_space\":false}"}, RT_UNSUPPORTED, "after ByteLevel");
    check_refused((struct parts){.vocab = ",\"ab\":255"}, RT_FORMAT, "255");
    check_refused((struct parts){.vocab = ",\"ab\":4294967295"}, RT_FORMAT, "'ab'");
    check_refused((struct parts){.vocab = ",\"ab\":1048576"}, RT_FORMAT, "'ab'");
    check_refused((struct parts){.vocab = ",\"ab\":-1"}, RT_FORMAT, "'ab'");
    check_refused((struct parts){.vocab = ",\"ab\":256.5"}, RT_FORMAT, "'ab'");
    check_refused((struct parts){.vocab = ",\"a\":256"}, RT_FORMAT, "a");
    check_refused((struct parts){.vocab = ",\"\":256"}, RT_FORMAT, "empty");
    check_refused((struct parts){.merges = "\"a b\""}, RT_FORMAT, "merge 0");
    check_refused((struct parts){.vocab = ",\"ab\":256", .merges = "\"a bc\""}, RT_FORMAT, "bc");
    check_refused((struct parts){.vocab = ",\"ab\":256", .merges = "\"ab\""}, RT_FORMAT, "merge 0");
    check_refused((struct parts){.vocab = ",\"ab\":256", .merges = "[\"a\",\"b\",\"c\"]"}, RT_FORMAT, "merge 0");
    check_refused((struct parts){.added = "{\"id\":5,\"content\":\"<x>\"}"}, RT_FORMAT, "<x>");
    check_refused((struct parts){.added = "{\"id\":300,\"content\":\"<x>\"},{\"id\":300,\"content\":\"<y>\"}"}, RT_FORMAT, "<y>");
    check_refused((struct parts){.added = "{\"id\":300,\"content\":\"<x>\"},{\"id\":301,\"content\":\"<x>\"}"}, RT_FORMAT, "301");
    check_refused((struct parts){.added = "{\"id\":300,\"content\":\"A\"}"}, RT_FORMAT, "vocabulary");
    check_refused((struct parts){.added = "{\"id\":300}"}, RT_FORMAT, "content");
    snprintf(longer, sizeof longer, ",\"%0*d\":256", 1025, 0);
    check_refused((struct parts){.vocab = longer}, RT_FORMAT, "1024");
    snprintf(longer, sizeof longer, "{\"id\":300,\"content\":\"%0*d\"}", 1025, 0);
    check_refused((struct parts){.added = longer}, RT_FORMAT, "1024");
}

static void endless_pattern(void **state)
{
    (void)state;
    const char *text = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaacb";
    struct rt_err err = {0};
    struct rt_tokenizer *t;
    struct rt_encoding e = {0};
    assert_ok(rt_tokenizer_load(write_parts(&(struct parts){.split = SPLIT("(?:a+)+b")}), &t, &err));
    const enum rt_status st = rt_tokenizer_encode(t, text, strlen(text), &e, &err);
    assert_int_equal(st, RT_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "(?:a+)+b"));
    assert_int_equal(e.n, 0);
    rt_encoding_free(&e);
    rt_tokenizer_free(t);
}

/* Cut and altered files: an error or a tokenizer, never a crash (the sanitizers see the rest). */
static void cut_files(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_tokenizer *t;
    struct rt_buf all = {0};
    const char *path = test_tmp("cut.json");
    assert_ok(rt_file_read_all(test_data(DATA "qwen/tokenizer.json"), 1 << 20, &all, &err));
    for (size_t n = 0; n < all.len; n += 211) { /* a prime: all kinds of places */
        put_file(path, all.data, n);
        if (rt_tokenizer_load(path, &t, &err) != RT_FORMAT)
            fail_msg("%zu bytes of %zu: %s", n, all.len, err.msg);
        rt_err_clear(&err);
    }
    for (size_t i = 0; i < 200; i++) {
        const size_t at = rt_rng_u64(5, 0, i) % all.len;
        const char was = all.data[at];
        struct rt_encoding e = {0};
        all.data[at] = "\"{}[]:,0a\\"[rt_rng_u64(5, 1, i) % 10];
        put_file(path, all.data, all.len);
        if (rt_tokenizer_load(path, &t, &err) == RT_OK) {
            if (rt_tokenizer_encode(t, "some <think> text 12", 20, &e, &err) != RT_OK)
                assert_true(err.msg[0] != '\0');
            rt_encoding_free(&e);
            rt_tokenizer_free(t);
        }
        rt_err_clear(&err);
        all.data[at] = was;
    }
    rt_buf_free(&all);
}

static void normal_forms(void **state)
{
    (void)state;
    struct rt_err err = {0};
    struct rt_buf out = {0};
    bool yes;
    assert_ok(rt_nfc("e\xcc\x81", 3, &out, &err));
    assert_int_equal(out.len, 2);
    assert_memory_equal(out.data, "\xc3\xa9", 2);
    assert_ok(rt_is_nfc("e\xcc\x81", 3, &yes, &err));
    assert_false(yes);
    assert_ok(rt_is_nfc("\xc3\xa9 abc", 6, &yes, &err));
    assert_true(yes);
    assert_ok(rt_is_nfc("x\xcc\x81", 3, &yes, &err)); /* has no composed form */
    assert_true(yes);
    rt_buf_free(&out);
}

static const struct CMUnitTest tests[] = {
    cmocka_unit_test(cases_deepseek), cmocka_unit_test(cases_qwen), cmocka_unit_test(cases_llama3), cmocka_unit_test(cases_smollm2),
    cmocka_unit_test(named_tokens), cmocka_unit_test(odd_bytes), cmocka_unit_test(long_words), cmocka_unit_test(bpe_definition),
    cmocka_unit_test(split_behaviours), cmocka_unit_test(patterns), cmocka_unit_test(damaged_files), cmocka_unit_test(endless_pattern),
    cmocka_unit_test(cut_files), cmocka_unit_test(normal_forms),
};
RT_SUITE(tokenizer, tests)
