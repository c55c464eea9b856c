/* Hidden states that leave a scoring pass: whole in BF16, or through a seeded orthogonal projection in e4m3. Internal to scoring. */
#ifndef RT_TEACHER_FEATURES_H
#define RT_TEACHER_FEATURES_H

#include "formats/rows.h"
#include "teacher/score.h"

struct rt_features {
    struct rt_teacher *t;
    const struct rt_score_options *o;
    void *data[RT_MAX_FEATURES];             /* [host] [window tokens, dim] */
    float *scale[RT_MAX_FEATURES];           /* [host] [window tokens] */
    void *matrix[RT_MAX_FEATURES];           /* device [dim, H]: projection */
    struct rt_weight *weight[RT_MAX_FEATURES];
    void *projected;                         /* device [rows, dim] float32 */
};

/* Buffers for n tokens. USAGE where a layer or a dimension does not exist. */
enum rt_status rt_features_init(struct rt_features *f, struct rt_teacher *t, const struct rt_score_options *o, int64_t n, struct rt_err *err);
void rt_features_free(struct rt_features *f);
/* Stores the states x [n, H] act of `layer` where a feature asks for them. e4m3: scale = amax/448 of the row, code = rne(y/scale). */
enum rt_status rt_features_take(struct rt_features *f, int layer, const void *x, int64_t n, struct rt_err *err);
/* Points the block's feature members at the tokens from `first` on. */
void rt_features_attach(const struct rt_features *f, int64_t first, struct rt_rows *rows);

/* out [dim, H] float32: orthonormal rows, a function of (seed, layer, dim, H) alone: Gram-Schmidt, twice, over normal draws. */
enum rt_status rt_projection_matrix(uint64_t seed, int layer, int64_t dim, int64_t H, float *out, struct rt_err *err);

#endif
