#include "core/pages.h"

#include "core/mem.h"

enum rt_status rt_pages_create(int slots, int cols, int32_t len, int32_t total, struct rt_pages *out, struct rt_err *err)
{
    enum rt_status st;
    *out = (struct rt_pages){.slots = slots, .cols = cols, .len = len, .total = total};
    RT_TRY(rt_alloc((size_t)slots * (size_t)cols, sizeof *out->table, "a table of pages", &out->table, err));
    RT_TRY(rt_alloc((size_t)slots, sizeof *out->used, "a table of pages", &out->used, err));
    RT_TRY(rt_alloc((size_t)slots, sizeof *out->changed, "a table of pages", &out->changed, err));
    RT_TRY(rt_alloc((size_t)total, sizeof *out->owners, "a table of pages", &out->owners, err));
    RT_TRY(rt_alloc((size_t)total, sizeof *out->heap, "a table of pages", &out->heap, err));
    for (int32_t i = 0; i < total; i++)
        out->heap[i] = total - 1 - i; /* the lowest first */
    out->n_free = total;
out:
    if (st != RT_OK)
        rt_pages_free(out);
    return st;
}

void rt_pages_free(struct rt_pages *p)
{
    rt_free(p->table);
    rt_free(p->used);
    rt_free(p->changed);
    rt_free(p->owners);
    rt_free(p->heap);
    *p = (struct rt_pages){0};
}

static int32_t columns(const struct rt_pages *p, int64_t tokens)
{
    return (int32_t)((tokens + p->len - 1) / p->len);
}

static void put(struct rt_pages *p, int slot, int32_t page)
{
    p->owners[page]++;
    p->table[(int64_t)slot * p->cols + p->used[slot]++] = page;
    p->changed[slot] = true;
}

bool rt_pages_room(struct rt_pages *p, int slot, int64_t tokens, int spare)
{
    const int32_t want = columns(p, tokens), more = want - p->used[slot];
    int64_t others = 0;
    if (more <= 0)
        return true;
    for (int s = 0; s < p->slots && spare > 0; s++)
        others += s != slot && p->used[s] > 0 ? p->cols - p->used[s] : 0;
    if (want > p->cols || more + (spare < others ? spare : others) > p->n_free)
        return false;
    while (p->used[slot] < want)
        put(p, slot, p->heap[--p->n_free]);
    return true;
}

void rt_pages_drop(struct rt_pages *p, int slot, int64_t keep)
{
    const int32_t stay = columns(p, keep);
    while (p->used[slot] > stay) {
        const int32_t page = p->table[(int64_t)slot * p->cols + --p->used[slot]];
        if (--p->owners[page] == 0)
            p->heap[p->n_free++] = page;
    }
}

bool rt_pages_share(struct rt_pages *p, int src, int dst, int64_t tokens, int32_t *from, int32_t *to, int64_t *rows)
{
    const int32_t whole = (int32_t)(tokens / p->len);
    const int32_t *row = p->table + (int64_t)src * p->cols;
    *rows = tokens % p->len;
    *from = *to = 0;
    rt_pages_drop(p, dst, 0);
    if (*rows > 0 && p->n_free == 0)
        return false;
    for (int32_t i = 0; i < whole; i++)
        put(p, dst, row[i]);
    if (*rows > 0) {
        *from = row[whole];
        *to = p->heap[--p->n_free];
        put(p, dst, *to);
    }
    return true;
}
