/* A window under way, on disk: what a restart needs to go on behind a complete layer. Internal to scoring.
 *
 * DIR/state       hidden states [n, hidden] act after `layer` layers, then the tokens routed to each expert so far [layers, experts] i64
 * DIR/feature-i   the states of feature i [n, dim], then its scales [n] f32 where it has any; written once
 *
 * Both are files of formats/state_file.h whose header names the same identity: a SHA-256 over the window's number and plan, the sequences,
 * the checkpoint, numerics, backend and features. A file of another identity, or one that does not verify, is not used.
 */
#ifndef RT_TEACHER_SCORE_STATE_H
#define RT_TEACHER_SCORE_STATE_H

#include "teacher/features.h"
#include "teacher/score.h"

struct rt_score_state {
    struct rt_teacher *t;
    const struct rt_score_options *o;
    struct rt_features *f;
    int64_t n;              /* tokens of the window */
    char identity[65];
    int saved;              /* layers behind the state on disk; 0: there is none */
    double since, cost;     /* when the work began that is not saved; how long the last save took, seconds */
};

/* keep.dir NULL: everything below does nothing. */
enum rt_status rt_score_state_init(struct rt_score_state *s, struct rt_teacher *t, const struct rt_score_options *o, struct rt_features *f,
                                   const struct rt_rows *seqs, int64_t n_seqs, int64_t n, struct rt_err *err);
/* *layers = how many layers the hidden states have behind them now: 0 where nothing could be used (said through keep.note). NOMEM and
 * DEVICE are errors, and leave the files. */
enum rt_status rt_score_state_load(struct rt_score_state *s, int *layers, struct rt_err *err);
/* Is it time to save after a layer? */
bool rt_score_state_due(const struct rt_score_state *s);
enum rt_status rt_score_state_save(struct rt_score_state *s, int layers, struct rt_err *err);

#endif
