/* The teacher's ids of rows as they travel to a device: `bits` each, so many as the vocabulary needs, and read where they are used.
 *
 * A row of k ids begins at a word of 32 bits: id j lies from bit j * bits on, low bits first, and may go on in the next word. All ones is an empty entry.
 * With 32 bits (`bits` 0 says so too) it is an array of int32_t, -1 where empty.
 */
#ifndef RT_TOP_IDS_H
#define RT_TOP_IDS_H

#include "core/backend.h"

#ifdef __CUDACC__
#define RT_TOP_IDS_FN __host__ __device__ static inline
#else
#define RT_TOP_IDS_FN static inline
#endif

/* The fewest bits that tell V ids and an empty entry apart. 1 <= V <= INT32_MAX */
RT_TOP_IDS_FN int rt_top_ids_bits(int64_t V)
{
    int bits = 1;
    while (((int64_t)1 << bits) <= V)
        bits++;
    return bits;
}

/* Words of a row. */
RT_TOP_IDS_FN int64_t rt_top_ids_words(int k, int bits)
{
    return ((int64_t)k * (bits > 0 ? bits : 32) + 31) / 32;
}

/* Id j of row i of `rows`, k ids each; < 0: empty. */
RT_TOP_IDS_FN int32_t rt_top_ids_get(const void *rows, int k, int bits, int64_t i, int j)
{
    const uint32_t *row = (const uint32_t *)rows + i * rt_top_ids_words(k, bits);
    const uint32_t size = bits > 0 ? (uint32_t)bits : 32, at = (uint32_t)j * size, shift = at % 32, none = 0xffffffffu >> (32 - size);
    uint32_t id = row[at / 32] >> shift;
    if (shift + size > 32)
        id |= row[at / 32 + 1] << (32 - shift);
    id &= none;
    return id == none ? -1 : (int32_t)id;
}

/* Entry j of row i of a loss's arguments. */
RT_TOP_IDS_FN int32_t rt_head_loss_id(const struct rt_head_loss_args *a, int64_t i, int j)
{
    return rt_top_ids_get(a->top_ids, a->k, a->id_bits, i, j);
}

/* Writes row i of `rows`, k ids each: begin, k times add (id < 0: empty; else below 2^bits - 1), end. */
struct rt_top_ids_row {
    uint32_t *to;
    uint64_t word; /* its `have` lowest bits are not written yet */
    int bits, have;
};
RT_TOP_IDS_FN void rt_top_ids_begin(struct rt_top_ids_row *w, uint32_t *rows, int k, int bits, int64_t i)
{
    w->to = rows + i * rt_top_ids_words(k, bits);
    w->word = 0;
    w->bits = bits > 0 ? bits : 32;
    w->have = 0;
}
RT_TOP_IDS_FN void rt_top_ids_add(struct rt_top_ids_row *w, int32_t id)
{
    w->word |= ((uint64_t)(uint32_t)(id < 0 ? -1 : id) & (0xffffffffu >> (32 - w->bits))) << w->have;
    w->have += w->bits;
    if (w->have >= 32) {
        *w->to++ = (uint32_t)w->word;
        w->word >>= 32;
        w->have -= 32;
    }
}
RT_TOP_IDS_FN void rt_top_ids_end(struct rt_top_ids_row *w)
{
    if (w->have > 0)
        *w->to = (uint32_t)w->word;
}

#endif
