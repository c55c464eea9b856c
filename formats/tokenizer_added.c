/* Added tokens in a text: leftmost, then longest. */
#include <stdlib.h>
#include <string.h>

#include "formats/tokenizer_internal.h"
#include "formats/unicode.h"

static int compare(const void *pa, const void *pb)
{
    const struct rt_added *a = pa, *b = pb;
    const int c = memcmp(a->text, b->text, a->len < b->len ? a->len : b->len);
    return c != 0 ? c : (a->len > b->len) - (a->len < b->len);
}

enum rt_status rt_finder_build(struct rt_finder *f, struct rt_err *err)
{
    if (f->n > 0)
        qsort(f->token, f->n, sizeof *f->token, compare);
    for (uint32_t i = 1; i < f->n; i++)
        if (compare(&f->token[i - 1], &f->token[i]) == 0)
            return rt_fail(err, RT_FORMAT, "the added tokens %u and %u are the same text", f->token[i - 1].id, f->token[i].id);
    uint32_t i = 0;
    for (int b = 0; b <= 256; b++) {
        while (i < f->n && (uint8_t)f->token[i].text[0] < b)
            i++;
        f->first[b] = i;
    }
    return RT_OK;
}

/* The longest token that begins at text[0], NULL if none does. The candidates share a growing prefix with the text. */
static const struct rt_added *longest_at(const struct rt_finder *f, const char *text, size_t len)
{
    const struct rt_added *best = NULL;
    uint32_t lo = f->first[(uint8_t)text[0]], hi = f->first[(uint8_t)text[0] + 1];
    for (size_t depth = 1; lo < hi; depth++) {
        if (f->token[lo].len == depth)
            best = &f->token[lo++];
        if (depth == len)
            break;
        const uint8_t c = (uint8_t)text[depth];
        uint32_t a = lo, b = hi;
        while (a < b) { /* the first with a byte >= c here */
            const uint32_t mid = a + (b - a) / 2;
            if ((uint8_t)f->token[mid].text[depth] < c)
                a = mid + 1;
            else
                b = mid;
        }
        lo = a;
        b = hi;
        while (a < b) {
            const uint32_t mid = a + (b - a) / 2;
            if ((uint8_t)f->token[mid].text[depth] <= c)
                a = mid + 1;
            else
                b = mid;
        }
        hi = a;
    }
    return best;
}

static bool between_words(const char *text, size_t len, size_t begin, size_t end)
{
    size_t n;
    return (begin == 0 || !rt_is_word(rt_utf8_last(text, begin, &n))) &&
           (end == len || !rt_is_word(rt_utf8_next(text + end, len - end, &n)));
}

/* Finds the next token at or behind s->from, with what it strips. */
static bool find(struct rt_search *s)
{
    const struct rt_finder *f = s->finder;
    for (size_t i = s->from; i < s->len && f->n > 0; i++) {
        const uint8_t c = (uint8_t)s->text[i];
        if (f->first[c] == f->first[c + 1])
            continue;
        const struct rt_added *t = longest_at(f, s->text + i, s->len - i);
        if (t == NULL)
            continue;
        size_t begin = i, end = i + t->len, n;
        s->from = end;
        if (t->single_word && !between_words(s->text, s->len, begin, end)) {
            i = end - 1;
            continue;
        }
        while (t->lstrip && begin > s->done && rt_is_space(rt_utf8_last(s->text, begin, &n)))
            begin -= n;
        while (t->rstrip && end < s->len && rt_is_space(rt_utf8_next(s->text + end, s->len - end, &n)))
            end += n;
        s->next = (struct rt_found){t, begin, end};
        return true;
    }
    s->from = s->len;
    return false;
}

bool rt_search_next(struct rt_search *s, struct rt_found *out)
{
    if (!s->pending && s->done < s->len) {
        if (find(s)) {
            s->pending = true;
        } else {
            *out = (struct rt_found){NULL, s->done, s->len};
            s->done = s->len;
            return true;
        }
    }
    if (!s->pending)
        return false;
    if (s->next.begin > s->done) {
        *out = (struct rt_found){NULL, s->done, s->next.begin};
        s->done = s->next.begin;
        return true;
    }
    *out = s->next;
    if (s->next.end > s->done)
        s->done = s->next.end;
    s->pending = false;
    return true;
}
