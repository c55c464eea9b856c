/* Evaluation of a student: losses against text and against a teacher's rows, and answers to prompts that can be checked.
 * Intervals are those of distill/stats.h, clustered by sequence and by problem.
 */
#ifndef RT_DISTILL_EVALUATE_H
#define RT_DISTILL_EVALUATE_H

#include <stdio.h>

#include "core/log.h"
#include "distill/losses.h"
#include "distill/loaded_student.h"
#include "distill/stats.h"
#include "formats/dataset.h"
#include "formats/json.h"

/* What the losses run with; of a trainer, or made by rt_eval_room. */
struct rt_eval_room {
    struct rt_student *s;
    struct rt_arena *acts;
    struct rt_losses *losses;
    struct rt_micro *micro;
};
/* Room of its own for sequences up to micro_tokens. */
struct rt_eval_own {
    struct rt_arena acts, scratch;
    struct rt_losses losses;
    struct rt_micro micro;
};
enum rt_status rt_eval_own_create(struct rt_eval_own *e, struct rt_student *s, int64_t micro_tokens, int k, double T, struct rt_err *err);
void rt_eval_own_free(struct rt_eval_own *e, const struct rt_device *d);
size_t rt_eval_own_bytes(const struct rt_student_config *c, int64_t micro_tokens, int k, size_t act_size);

struct rt_eval_losses {
    int64_t n_sequences;
    struct rt_loss_sums sums;
    struct rt_ratio ce, accuracy, kl, agreement;
};
/* CE on every training row of the set, KL (bucket, with T^2) on those with teacher rows, sequences in order. rows: NULL, or lines of
 * run_record.h's "sequence" kind are appended. T not stored: no KL. stop may be NULL; INTERRUPTED. */
enum rt_status rt_eval_losses(const struct rt_eval_room *room, struct rt_train_set *set, double T, struct rt_buf *rows,
                              bool (*stop)(void *), void *stop_self, struct rt_eval_losses *out, struct rt_err *err);
/* key = [lo, hi], or null where there is none. */
enum rt_status rt_eval_set_interval(struct rt_json *line, const char *key, double lo, double hi, struct rt_err *err);
/* The members of eval.jsonl that these give. */
enum rt_status rt_eval_losses_json(const struct rt_eval_losses *e, double T, struct rt_json *line, struct rt_err *err);

/* ---- answers ---- */
enum { RT_EVAL_MAX_K = 16 };
struct rt_eval_sampling {
    int64_t samples, max_tokens;
    int64_t k[RT_EVAL_MAX_K]; /* of pass@k, each at most samples */
    int n_k;                  /* 0: k = 1, 2, 4, .. <= samples */
    double temperature, top_p;
    uint64_t seed;
    int64_t memory;  /* bytes there are, of which the decoder takes half; on a device with its own what the weights leave, no more than is free */
    bool exact;      /* compare the text itself instead of what is boxed */
};
struct rt_eval_answers {
    int64_t problems, samples, limit, tokens; /* samples: all of them; limit: that hit max_tokens */
    int64_t dropped;                          /* problems whose prompt leaves no room for an answer, not among those */
    struct rt_ratio pass1, passk[RT_EVAL_MAX_K];
    int n_k;
    int64_t k[RT_EVAL_MAX_K];
    char sha256[65]; /* over the problems: prompts as they are written, and answers */
};
/* "1,8,64" into o; NULL: none. USAGE unless they are whole numbers from 1 to o->samples, 16 at most. */
enum rt_status rt_eval_parse_k(const char *text, struct rt_eval_sampling *o, struct rt_err *err);
/* Of the lines with an "answer": how many have a prompt of at most `most` tokens, and how many the longest of those has; how many are longer. */
struct rt_eval_prompts {
    int64_t problems, longest, dropped;
};
/* USAGE where no problem is left; rewinds. lengths: NULL, or int64_t of each problem's prompt are appended. */
enum rt_status rt_eval_measure_prompts(struct rt_dataset *data, int64_t most, struct rt_eval_prompts *out, struct rt_buf *lengths, struct rt_err *err);
/* Generates for each prompt line of path that has an "answer", and checks. Prompts that the student cannot hold are left out, with a warning.
 * USAGE: no such line, or none that the student can hold. */
enum rt_status rt_eval_answers(struct rt_loaded_student *l, const char *path, const struct rt_eval_sampling *o, struct rt_log *log,
                               bool (*stop)(void *), void *stop_self, struct rt_buf *rows, struct rt_eval_answers *out, struct rt_err *err);
enum rt_status rt_eval_answers_json(const struct rt_eval_answers *e, const struct rt_eval_sampling *o, struct rt_json *line, struct rt_err *err);

/* What a data argument holds: text to score (completions, text, shards), answers to check, or both; from its first line. */
enum rt_status rt_eval_kind(const char *path, const struct rt_model_dir *model, bool *losses, bool *answers, struct rt_err *err);
/* Name of evaluation data in records: of a directory its own, of a file without .jsonl, .json or .msgpack. */
void rt_eval_name(const char *path, char out[128]);

#endif
