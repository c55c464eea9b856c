/* The kernel behind skinny.h, as its operations call it. */
#ifndef RT_CORE_CUDA_SKINNY_PRODUCT_H
#define RT_CORE_CUDA_SKINNY_PRODUCT_H

#include "core/cuda/cuda.h"

enum { RT_SKINNY_MOST = 64 }; /* rows of a group: what one block takes */

/* The rows of one expert, or some of them: rows row0 .. row0 + rows of the operand, against its gate, up and down. */
struct rt_skinny_group {
    const uint8_t *w[3];
    const float *scale[3];
    int32_t row0, rows;
};

enum rt_skinny_output { RT_SKINNY_BF16, RT_SKINNY_F32, RT_SKINNY_PARTS, RT_SKINNY_SWIGLU };

struct rt_skinny_product {
    const struct rt_skinny_group *groups;   /* device table; NULL: `one`, cut into blocks of 64 rows */
    struct rt_skinny_group one;
    int first, second;            /* which of a group's weights fill the two halves of a tile */
    const void *x;
    const float *x_scale;         /* [K/128][x_scale_ld] */
    int64_t ldx, x_scale_ld;      /* elements */
    const int32_t *perm;          /* row r of the operand is row perm[r] / k of x; NULL: r */
    int32_t *inverse;             /* inverse[perm[r]] = r, or NULL */
    int k;
    int64_t N, K;                 /* rows and columns of each weight */
    int n_groups;
    int tiles, splits, split_chunks; /* set by the calls below, as is groups_first */
    bool groups_first;            /* blocks of one tile lie side by side: the weight is read once */
    enum rt_skinny_output out;
    void *y;
    int64_t ldy, parts_rows;      /* parts: float [splits][parts_rows][ldy] */
    const void *bias;
    bool bias_f32, accumulate;
};

/* All groups of a table with the weights of each; `one` and what the calls set are ignored. w8: weights are E4M3. rows: the
 * most of a group. */
enum rt_status rt_skinny_grouped(struct rt_queue *q, struct rt_skinny_product *p, bool w8, int rows, struct rt_err *err);
/* One weight, or a gate and an up, and any rows of one operand: `one` with row0 0 and all rows, no table. */
enum rt_status rt_skinny_single(struct rt_queue *q, const struct rt_skinny_product *p, bool w8, struct rt_err *err);

#endif
