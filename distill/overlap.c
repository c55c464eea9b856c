#include "distill/overlap.h"

#include <string.h>

#include "formats/unicode.h"

enum rt_status rt_overlap_open(struct rt_overlap *o, struct rt_tokenizer *teacher, struct rt_tokenizer *student, struct rt_err *err)
{
    *o = (struct rt_overlap){.teacher = teacher, .student = student};
    return rt_alloc(rt_tokenizer_n_ids(student), sizeof *o->crossing, "crossing tokens", &o->crossing, err);
}

void rt_overlap_close(struct rt_overlap *o)
{
    rt_free(o->crossing);
    rt_encoding_free(&o->t);
    rt_encoding_free(&o->s);
    rt_buf_free(&o->place);
    *o = (struct rt_overlap){0};
}

void rt_overlap_clear(struct rt_overlap *o)
{
    o->c = (struct rt_overlap_counts){0};
    memset(o->crossing, 0, rt_tokenizer_n_ids(o->student) * sizeof *o->crossing);
}

/* All bytes of token id are in set. */
static bool made_of(const struct rt_tokenizer *tok, uint32_t id, const char *set)
{
    const char *bytes;
    size_t n;
    if (!rt_tokenizer_bytes(tok, id, &bytes, &n) || n == 0 || rt_tokenizer_is_added(tok, id))
        return false;
    for (size_t i = 0; i < n; i++)
        if (bytes[i] == '\0' || strchr(set, bytes[i]) == NULL)
            return false;
    return true;
}

static void count(struct rt_overlap *o, const struct rt_place *place)
{
    struct rt_overlap_counts *c = &o->c;
    int64_t teacher = 0, student = 0; /* tokens since the last end in common */
    size_t j = 0;
    for (size_t i = 0; i < o->s.n; i++) {
        const uint32_t id = o->s.ids[i];
        const struct rt_place *p = &place[i];
        const bool digits = made_of(o->student, id, "0123456789"), blank = made_of(o->student, id, " \t\n\r");
        c->kind[p->kind]++;
        c->boundary += p->teacher >= 0 && p->offset == 0;
        c->blank += blank;
        c->blank_exact += blank && p->kind != RT_PLACE_NONE && p->kind != RT_PLACE_CROSSING;
        c->digits += digits;
        c->digits_whole += digits && p->kind == RT_PLACE_WHOLE;
        o->crossing[id] += p->kind == RT_PLACE_CROSSING;
        for (student++; j < o->t.n && o->t.byte_end[j] <= o->s.byte_end[i]; j++)
            teacher++;
        c->longest = student > c->longest ? student : c->longest;
        c->longest = teacher > c->longest ? teacher : c->longest;
        if (p->ends)
            teacher = student = 0;
    }
}

enum rt_status rt_overlap_add(struct rt_overlap *o, const char *text, size_t len, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_overlap_counts *c = &o->c;
    bool nfc = false;
    if (len > 0 && rt_utf8_prefix(text, len) == len)
        RT_TRY(rt_is_nfc(text, len, &nfc, err));
    o->t.n = o->s.n = 0;
    if (nfc) {
        RT_TRY(rt_tokenizer_encode(o->teacher, text, len, &o->t, err));
        RT_TRY(rt_tokenizer_encode(o->student, text, len, &o->s, err));
    }
    if (o->t.n == 0 || o->s.n == 0 || o->t.byte_end[o->t.n - 1] != len || o->s.byte_end[o->s.n - 1] != len) {
        c->left_out++;
        goto out;
    }
    RT_TRY(rt_buf_reserve(&o->place, o->s.n * sizeof(struct rt_place), err));
    struct rt_place *place = (struct rt_place *)(void *)o->place.data;
    const struct rt_side t = {.ids = o->t.ids, .end = o->t.byte_end, .n = (int64_t)o->t.n}, s = {.ids = o->s.ids, .end = o->s.byte_end, .n = (int64_t)o->s.n};
    rt_align(&t, &s, place);
    c->texts++;
    c->bytes += (int64_t)len;
    c->teacher += t.n;
    c->student += s.n;
    count(o, place);
out:
    return st;
}

int64_t rt_overlap_exact(const struct rt_overlap_counts *c)
{
    return c->kind[RT_PLACE_WHOLE] + c->kind[RT_PLACE_HEAD] + c->kind[RT_PLACE_INSIDE];
}

int rt_overlap_top(const struct rt_overlap *o, uint32_t ids[RT_OVERLAP_TOP])
{
    int n = 0;
    for (uint32_t id = 0; id < rt_tokenizer_n_ids(o->student); id++) {
        int at = n;
        if (o->crossing[id] == 0 || (n == RT_OVERLAP_TOP && o->crossing[id] <= o->crossing[ids[n - 1]]))
            continue;
        while (at > 0 && o->crossing[ids[at - 1]] < o->crossing[id])
            at--;
        n += n < RT_OVERLAP_TOP;
        memmove(&ids[at + 1], &ids[at], (size_t)(n - 1 - at) * sizeof *ids);
        ids[at] = id;
    }
    return n;
}
