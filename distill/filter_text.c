#include "distill/filter_text.h"

#include <stdlib.h>
#include <string.h>

#include "core/sha256.h"
#include "distill/lines.h"
#include "formats/unicode.h"
#include "formats/utf8.h"

enum { LONG_WORD = 32, PIECE = 8, CJK_FROM = 0x2E80, SHORT_TEXT_MOST = 1024 };

/* ---- words ---- */

static bool is_blank(unsigned char c)
{
    return c <= ' ';
}

static char lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c + 32) : c;
}

static bool counts(unsigned char c, bool folded)
{
    return !folded || c >= 0x80 || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/* The next word from *i on: its bytes are s[*i - len .. *i). 0 at the end. Bytes that are no UTF-8 are words' bytes as well. */
static size_t next_word(const char *s, size_t n, size_t *i, bool folded)
{
    while (*i < n && (is_blank((unsigned char)s[*i]) || !counts((unsigned char)s[*i], folded)))
        ++*i;
    const size_t from = *i;
    while (*i < n && *i - from <= LONG_WORD && !is_blank((unsigned char)s[*i]) && counts((unsigned char)s[*i], folded)) {
        size_t k = 1;
        if ((unsigned char)s[*i] >= 0x80) {
            const size_t len = rt_utf8_char(s + *i, n - *i);
            if (len > 0 && rt_utf8_next(s + *i, n - *i, &k) >= CJK_FROM) {
                if (*i == from)
                    *i += k;
                break;
            }
        }
        *i += k;
    }
    if (*i - from > LONG_WORD)
        *i = from + PIECE;
    return *i - from;
}

static uint64_t hash_word(const char *s, size_t n)
{
    uint64_t h = 0xcbf29ce484222325;
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)lower(s[i])) * 0x100000001b3;
    return h ^ h >> 29;
}

enum rt_status rt_word_grams(const char *s, size_t n, int k, bool folded, struct rt_buf *out, size_t *words, struct rt_err *err)
{
    const uint64_t base = 0x9e3779b97f4a7c15;
    uint64_t window[64], top = 1, h = 0;
    enum rt_status st = RT_OK;
    RT_ASSERT(k >= 1 && k <= 64);
    for (int i = 1; i < k; i++)
        top *= base;
    *words = 0;
    size_t i = 0, len;
    while ((len = next_word(s, n, &i, folded)) > 0) {
        uint64_t *slot = &window[*words % (size_t)k];
        if (*words >= (size_t)k)
            h -= *slot * top;
        *slot = hash_word(s + i - len, len);
        h = h * base + *slot;
        if (++*words >= (size_t)k)
            RT_TRY(rt_buf_append(out, &h, sizeof h, err));
    }
out:
    return st;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return (x > y) - (x < y);
}

static void sort_grams(struct rt_buf *b)
{
    if (b->len > 0)
        qsort(b->data, b->len / sizeof(uint64_t), sizeof(uint64_t), by_value);
}

enum rt_status rt_most_repeated(const char *s, size_t n, struct rt_buf *scratch, size_t *times, struct rt_err *err)
{
    size_t words, run = 0;
    *times = 0;
    scratch->len = 0;
    const enum rt_status st = rt_word_grams(s, n, RT_LOOP_WORDS, false, scratch, &words, err);
    if (st != RT_OK)
        return st;
    sort_grams(scratch);
    for (size_t i = 0; i < scratch->len; i += sizeof(uint64_t)) {
        run = i > 0 && memcmp(scratch->data + i, scratch->data + i - sizeof(uint64_t), sizeof(uint64_t)) == 0 ? run + 1 : 1;
        *times = run > *times ? run : *times;
    }
    return RT_OK;
}

/* ---- scripts ---- */

enum script { LATIN, CYRILLIC, HEBREW, ARABIC, INDIC, THAI, HAN, HANGUL, N_SCRIPTS, NO_SCRIPT };

static enum script script_of(uint32_t c)
{
    static const struct {
        uint32_t first, last;
        enum script script;
    } ranges[] = {
        {'A', 'Z', LATIN}, {'a', 'z', LATIN}, {0xC0, 0x24F, LATIN}, {0x400, 0x52F, CYRILLIC}, {0x590, 0x5FF, HEBREW}, {0x600, 0x6FF, ARABIC},
        {0x750, 0x77F, ARABIC}, {0x900, 0xDFF, INDIC}, {0xE00, 0xE7F, THAI}, {0x1100, 0x11FF, HANGUL}, {0x1E00, 0x1EFF, LATIN}, {0x3040, 0x30FF, HAN},
        {0x3400, 0x4DBF, HAN}, {0x4E00, 0x9FFF, HAN}, {0xAC00, 0xD7AF, HANGUL}, {0xF900, 0xFAFF, HAN}, {0x20000, 0x3FFFF, HAN},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (c >= ranges[i].first && c <= ranges[i].last)
            return ranges[i].script;
    return NO_SCRIPT;
}

static size_t count_scripts(const char *s, size_t n, size_t count[N_SCRIPTS])
{
    size_t total = 0, k;
    memset(count, 0, N_SCRIPTS * sizeof *count);
    for (size_t i = 0; i < n; i += k) {
        k = 1;
        if (s[i] == '\\') {
            while (i + k < n && script_of((unsigned char)s[i + k]) == LATIN && (unsigned char)s[i + k] < 0x80)
                k++;
            continue;
        }
        const enum script x = rt_utf8_char(s + i, n - i) > 0 ? script_of(rt_utf8_next(s + i, n - i, &k)) : NO_SCRIPT;
        if (x != NO_SCRIPT) {
            count[x]++;
            total++;
        }
    }
    return total;
}

bool rt_foreign_script(const char *prompt, size_t n_prompt, const char *completion, size_t n, int *percent)
{
    size_t p[N_SCRIPTS], c[N_SCRIPTS];
    const size_t of_prompt = count_scripts(prompt, n_prompt, p), of_completion = count_scripts(completion, n, c);
    int d = 0;
    *percent = 0;
    for (int i = 1; i < N_SCRIPTS; i++)
        if (p[i] > p[d])
            d = i;
    if (of_prompt < 5 || of_completion < 20 || 10 * p[d] < 7 * of_prompt) /* too little to tell, or mixed from the start */
        return false;
    *percent = (int)(100 * (d == LATIN ? of_completion - c[LATIN] : c[d]) / of_completion);
    return d == LATIN ? 10 * (of_completion - c[LATIN]) > of_completion : 10 * c[d] < 3 * of_completion;
}

/* ---- duplicates ---- */

enum rt_status rt_fold_text(const char *s, size_t n, struct rt_buf *out, struct rt_err *err)
{
    const size_t begin = out->len;
    const enum rt_status st = rt_buf_reserve(out, n + 1, err);
    if (st != RT_OK)
        return st;
    for (size_t i = 0; i < n; i++) {
        if (!is_blank((unsigned char)s[i]))
            out->data[out->len++] = lower(s[i]);
        else if (out->len > begin && out->data[out->len - 1] != ' ')
            out->data[out->len++] = ' ';
    }
    if (out->len > begin && out->data[out->len - 1] == ' ')
        out->len--;
    return RT_OK;
}

static bool insert(struct rt_seen *s, const uint64_t key[2])
{
    size_t i = (size_t)key[0] & (s->cap - 1);
    while (s->keys[i][0] != 0 || s->keys[i][1] != 0) {
        if (s->keys[i][0] == key[0] && s->keys[i][1] == key[1])
            return false;
        i = (i + 1) & (s->cap - 1);
    }
    s->keys[i][0] = key[0];
    s->keys[i][1] = key[1];
    s->n++;
    return true;
}

static enum rt_status grow(struct rt_seen *s, struct rt_err *err)
{
    struct rt_seen more = {.cap = s->cap > 0 ? 2 * s->cap : 1024};
    const enum rt_status st = rt_alloc(more.cap, sizeof *more.keys, "texts seen before", &more.keys, err);
    if (st != RT_OK)
        return st;
    for (size_t i = 0; i < s->cap; i++)
        if (s->keys[i][0] != 0 || s->keys[i][1] != 0)
            insert(&more, s->keys[i]);
    rt_free(s->keys);
    *s = more;
    return RT_OK;
}

enum rt_status rt_seen_add(struct rt_seen *s, const char *a, size_t n, const char *b, size_t m, struct rt_buf *scratch, bool *was, struct rt_err *err)
{
    uint8_t digest[32];
    uint64_t key[2];
    enum rt_status st = RT_OK;
    scratch->len = 0;
    RT_TRY(rt_fold_text(a, n, scratch, err));
    RT_TRY(rt_buf_append(scratch, "", 1, err));
    RT_TRY(rt_fold_text(b, m, scratch, err));
    rt_sha256(scratch->data, scratch->len, digest);
    memcpy(key, digest, sizeof key);
    key[1] |= 1; /* 0, 0 is an empty place */
    if (2 * (s->n + 1) > s->cap)
        RT_TRY(grow(s, err));
    *was = !insert(s, key);
out:
    return st;
}

void rt_seen_free(struct rt_seen *s)
{
    rt_free(s->keys);
    *s = (struct rt_seen){0};
}

/* ---- contamination ---- */

/* The text of a prompt, wherever such lines have it. */
static const char *prompt_text(const struct rt_json *v, size_t *n)
{
    static const char *const keys[] = {"prompt", "question", "problem", "input", "text"};
    const char *s = NULL;
    for (size_t i = 0; i < sizeof keys / sizeof *keys && s == NULL; i++)
        s = rt_json_as_string(rt_json_get(v, keys[i]), n);
    const struct rt_json *m = rt_json_get(v, "messages");
    for (size_t i = 0; s == NULL && i < rt_json_len(m); i++) {
        const char *role = rt_json_as_string(rt_json_get(rt_json_at(m, i), "role"), NULL);
        if (role != NULL && strcmp(role, "user") == 0)
            s = rt_json_as_string(rt_json_get(rt_json_at(m, i), "content"), n);
    }
    return s;
}

enum rt_status rt_against_load(const char *path, struct rt_against *out, struct rt_err *err)
{
    struct rt_lines in = {0};
    struct rt_json *v = NULL;
    bool end = false;
    enum rt_status st;
    RT_TRY(rt_lines_open(path, &in, err));
    for (;;) {
        size_t n, words;
        RT_TRY(rt_lines_next_json(&in, &v, &end, err));
        if (end)
            break;
        const char *s = prompt_text(v, &n);
        if (s == NULL)
            RT_FAIL(err, FORMAT, "%s: expected \"prompt\", \"messages\", \"question\", \"problem\", \"input\" or \"text\"", in.where);
        RT_TRY(rt_word_grams(s, n, RT_PHRASE_WORDS, true, &out->grams, &words, err));
        if (words > 0 && words < RT_PHRASE_WORDS) {
            RT_TRY(rt_fold_text(s, n, &out->texts, err));
            RT_TRY(rt_buf_append(&out->texts, "", 1, err));
        }
        rt_json_free(v);
        v = NULL;
    }
    sort_grams(&out->grams);
out:
    rt_json_free(v);
    rt_lines_close(&in);
    return st;
}

void rt_against_free(struct rt_against *a)
{
    rt_buf_free(&a->grams);
    rt_buf_free(&a->texts);
}

static bool digit(char c)
{
    return c >= '0' && c <= '9';
}

/* The same numbers in the same order: "25 times 3" and "26 times 3" are two problems. */
static bool same_numbers(const char *a, size_t n, const char *b, size_t m)
{
    size_t i = 0, j = 0;
    for (;;) {
        while (i < n && !digit(a[i]))
            i++;
        while (j < m && !digit(b[j]))
            j++;
        if (i == n || j == m)
            return i == n && j == m;
        while (i < n && j < m && digit(a[i]) && a[i] == b[j])
            i++, j++;
        if ((i < n && digit(a[i])) || (j < m && digit(b[j])))
            return false;
    }
}

static size_t common(const char *a, size_t n, const char *b, size_t m)
{
    uint16_t row[SHORT_TEXT_MOST + 1] = {0};
    for (size_t i = 0; i < n; i++) {
        uint16_t corner = 0;
        for (size_t j = 0; j < m; j++) {
            const uint16_t above = row[j + 1];
            row[j + 1] = a[i] == b[j] ? (uint16_t)(corner + 1) : above > row[j] ? above : row[j];
            corner = above;
        }
    }
    return row[m];
}

/* 2 LCS / (n + m) >= 0.95. Lengths and letters alone rule most pairs out. */
static bool similar(const char *a, size_t n, const char *b, size_t m)
{
    int32_t letters[256] = {0};
    const size_t sum = n + m;
    size_t at_most = 0;
    if (n == m && memcmp(a, b, n) == 0)
        return true;
    if (n > SHORT_TEXT_MOST || m > SHORT_TEXT_MOST || 40 * (n < m ? n : m) < 19 * sum)
        return false;
    for (size_t i = 0; i < n; i++)
        letters[(unsigned char)a[i]]++;
    for (size_t j = 0; j < m; j++)
        at_most += letters[(unsigned char)b[j]]-- > 0;
    return 40 * at_most >= 19 * sum && same_numbers(a, n, b, m) && 40 * common(a, n, b, m) >= 19 * sum;
}

enum rt_status rt_against_check(const struct rt_against *a, const char *prompt, size_t n, struct rt_buf *scratch, const char **hit, struct rt_err *err)
{
    size_t words;
    enum rt_status st;
    *hit = NULL;
    scratch->len = 0;
    RT_TRY(rt_word_grams(prompt, n, RT_PHRASE_WORDS, true, scratch, &words, err));
    for (size_t i = 0; *hit == NULL && a->grams.len > 0 && i < scratch->len; i += sizeof(uint64_t))
        if (bsearch(scratch->data + i, a->grams.data, a->grams.len / sizeof(uint64_t), sizeof(uint64_t), by_value) != NULL)
            *hit = "13 words in a row";
    if (words == 0 || words >= RT_PHRASE_WORDS)
        goto out;
    scratch->len = 0;
    RT_TRY(rt_fold_text(prompt, n, scratch, err));
    for (size_t i = 0; *hit == NULL && i < a->texts.len;) {
        const size_t m = strnlen(a->texts.data + i, a->texts.len - i);
        if (similar(scratch->data, scratch->len, a->texts.data + i, m))
            *hit = "95 % similar";
        i += m + 1;
    }
out:
    return st;
}
