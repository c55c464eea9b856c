/* Hidden states that leave a scoring pass: whole in BF16, or through a seeded orthogonal projection in e4m3. Internal to scoring.
 *
 * They stay in memory until the window's rows are put, or leave for a file each as they are taken (spill) and are read back then. The
 * files are what a restart reads too: a feature that is there is not computed again. */
#ifndef RT_TEACHER_FEATURES_H
#define RT_TEACHER_FEATURES_H

#include "formats/rows.h"
#include "formats/state_file.h"
#include "teacher/score.h"

struct rt_features {
    struct rt_teacher *t;
    const struct rt_score_options *o;
    void *data[RT_MAX_FEATURES];             /* [host] [window tokens, dim]; lent by the teacher's way, as the next is */
    float *scale[RT_MAX_FEATURES];           /* [host] [window tokens] */
    int64_t n;                               /* tokens of the window */
    /* kept on disk: */
    const char *dir, *identity;              /* NULL: not kept */
    bool spill;                              /* data is [longest sequence, dim] then, and filled by rt_features_attach */
    void *piece;                             /* lent: rows on their way to a file */
    bool filed[RT_MAX_FEATURES];             /* whole in DIR/feature-i */
    struct rt_state_writer *writer;          /* of the feature that is being taken */
    struct rt_state_reader *reader[RT_MAX_FEATURES];
    int64_t read_to;                         /* tokens that the readers have behind them */
};

/* Buffers for n tokens, `longest` of them in the longest sequence. USAGE where a layer or a dimension does not exist. */
enum rt_status rt_features_init(struct rt_features *f, struct rt_teacher *t, const struct rt_score_options *o, int64_t n, int64_t longest,
                                struct rt_err *err);
/* Where the files go and what they belong to; both are borrowed. */
void rt_features_keep(struct rt_features *f, const char *dir, const char *identity);
void rt_features_free(struct rt_features *f);
/* Stores the states x [n, H] act of `layer` where a feature asks for them. e4m3: scale = amax/448 of the row, code = rne(y/scale). They are there
 * when the device's queue is; x may change behind the call, on that queue. */
enum rt_status rt_features_take(struct rt_features *f, int layer, const void *x, int64_t n, struct rt_err *err);
/* Files of the features of states up to `layers`, where there is none yet. */
enum rt_status rt_features_save(struct rt_features *f, int layers, struct rt_err *err);
/* Those features out of their files, checked to the last byte. FORMAT, REFUSED, IO where one cannot be used. */
enum rt_status rt_features_load(struct rt_features *f, int layers, struct rt_err *err);
/* Nothing was filed: the window starts again. */
void rt_features_forget(struct rt_features *f);
/* Points the block's feature members at the tokens from `first` on; sequences come in order. */
enum rt_status rt_features_attach(struct rt_features *f, int64_t first, struct rt_rows *rows, struct rt_err *err);

#endif
