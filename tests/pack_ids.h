/* Rows of a teacher's ids as training packs them, for the tests of the losses. */
#ifndef RT_TESTS_PACK_IDS_H
#define RT_TESTS_PACK_IDS_H

#include <stdlib.h>

#include "core/top_ids.h"
#include "tests/suite.h"

/* n rows of k ids with as many bits as V needs; free() it. */
static inline uint32_t *pack_ids(const int32_t *ids, int64_t n, int k, int64_t V)
{
    const int bits = rt_top_ids_bits(V);
    uint32_t *out = malloc((size_t)(n * rt_top_ids_words(k, bits)) * sizeof *out + 1);
    assert_non_null(out);
    for (int64_t i = 0; i < n; i++) {
        struct rt_top_ids_row row;
        rt_top_ids_begin(&row, out, k, bits, i);
        for (int j = 0; j < k; j++)
            rt_top_ids_add(&row, ids[i * k + j]);
        rt_top_ids_end(&row);
    }
    return out;
}

#endif
