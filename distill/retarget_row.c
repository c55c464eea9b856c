#include "distill/retarget_row.h"

#include <math.h>
#include <string.h>

static uint32_t slots_of(int k)
{
    uint32_t n = 8;
    while (n < 2 * (uint32_t)k)
        n *= 2;
    return n;
}

size_t rt_row_work_bytes(int k)
{
    return (size_t)k * (sizeof(double) + 3 * sizeof(uint32_t)) + (size_t)slots_of(k) * sizeof(uint32_t);
}

void rt_row_work_init(struct rt_row_work *w, int k, void *memory)
{
    char *at = memory;
    *w = (struct rt_row_work){.k = k, .slots = slots_of(k)};
    w->sum = (double *)(void *)at;
    at += (size_t)k * sizeof *w->sum;
    w->id = (uint32_t *)(void *)at;
    at += (size_t)k * sizeof *w->id;
    w->logit = (float *)(void *)at;
    at += (size_t)k * sizeof *w->logit;
    w->count = (int32_t *)(void *)at;
    at += (size_t)k * sizeof *w->count;
    w->slot = (uint32_t *)(void *)at;
}

void rt_row_begin(struct rt_row_work *w)
{
    memset(w->slot, 0, w->slots * sizeof *w->slot);
    w->n = 0;
    w->kept = 0;
}

void rt_row_add(struct rt_row_work *w, uint32_t id, float logit, double p)
{
    if (id == RT_NO_ID)
        return;
    uint32_t at = (id * 2654435761u) & (w->slots - 1);
    while (w->slot[at] != 0 && w->id[w->slot[at] - 1] != id)
        at = (at + 1) & (w->slots - 1);
    w->kept += p;
    if (w->slot[at] == 0) {
        RT_ASSERT(w->n < w->k);
        w->id[w->n] = id;
        w->logit[w->n] = logit;
        w->count[w->n] = 1;
        w->slot[at] = (uint32_t)++w->n;
        return;
    }
    const uint32_t e = w->slot[at] - 1;
    if (w->count[e]++ == 1)
        w->sum[e] = 1;
    w->sum[e] += exp((double)logit - (double)w->logit[e]);
}

/* Entries are nearly in order already: only those that grew move up. */
void rt_row_close(struct rt_row_work *w)
{
    for (int i = 0; i < w->n; i++)
        if (w->count[i] > 1)
            w->logit[i] = (float)((double)w->logit[i] + log(w->sum[i]));
    for (int i = 1; i < w->n; i++) {
        const float z = w->logit[i];
        const uint32_t id = w->id[i];
        const int32_t count = w->count[i];
        int j = i;
        for (; j > 0 && (w->logit[j - 1] < z || (w->logit[j - 1] == z && w->id[j - 1] > id)); j--) {
            w->logit[j] = w->logit[j - 1];
            w->id[j] = w->id[j - 1];
            w->count[j] = w->count[j - 1];
        }
        w->logit[j] = z;
        w->id[j] = id;
        w->count[j] = count;
    }
}

int rt_row_find(const struct rt_row_work *w, uint32_t id)
{
    for (int i = 0; i < w->n; i++)
        if (w->id[i] == id)
            return i;
    return -1;
}
