/* A set of row shards -> a set in another tokenizer's vocabulary.
 *
 * Sequences go through in windows, in input order: workers read and copy, one thread encodes (tokenizers serve one caller), workers
 * make rows, one thread writes. The bytes do not depend on threads. Memory is a window and one shard of the output (distill/retarget_plan.h),
 * because a shard's header holds the report on what was read for it. A restart goes on behind the last shard: the reports of those that are there say how
 * many sequences of the input they used up.
 */
#ifndef RT_DISTILL_RETARGET_RUN_H
#define RT_DISTILL_RETARGET_RUN_H

#include "core/log.h"
#include "core/pool.h"
#include "distill/retarget.h"
#include "distill/retarget_plan.h"
#include "distill/retarget_text.h"
#include "formats/shard.h"

struct rt_retarget_options {
    const char *shards, *out;
    struct rt_model_dir *teacher, *student; /* opened, both with a tokenizer */
    int64_t student_vocab;                  /* rows of the student's head */
    enum rt_retarget_mode mode;
    double gamma;                           /* of alm */
    int64_t rows_per_shard;                 /* 0: as rt_retarget_plan takes them */
    int64_t memory;                         /* bytes to stay within; 0: no bound */
    struct rt_pool *pool;
    struct rt_log *log;
    bool (*stop)(void *self);
    void *stop_self;
};

struct rt_retarget_run;
/* Opens the input, and checks that it can be retargeted: REFUSED where the teacher's tokenizer or template is another than the
 * shards', where they hold no logits, or are retargeted already. UNSUPPORTED: conversations, and a model without a template. NOMEM where memory is too small. Makes the map of the vocabularies. */
enum rt_status rt_retarget_run_open(const struct rt_retarget_options *o, struct rt_retarget_run **out, struct rt_err *err);
void rt_retarget_run_close(struct rt_retarget_run *r); /* NULL is fine */
const struct rt_shard_info *rt_retarget_run_input(const struct rt_retarget_run *r);
const struct rt_retarget_plan *rt_retarget_run_plan(const struct rt_retarget_run *r);
const struct rt_row_identity *rt_retarget_run_identity(const struct rt_retarget_run *r); /* of the output */
/* SHA-256 over key, occurrence and checksum of the input's sequences: what a resume must find again. */
void rt_retarget_run_sha256(const struct rt_retarget_run *r, char out[65]);
/* Everything; *counts (initialised) = the report on the whole set, resumed shards included. INTERRUPTED with what is published kept.
 * FORMAT: not one sequence could be retargeted. */
enum rt_status rt_retarget_run_all(struct rt_retarget_run *r, struct rt_retarget_counts *counts, struct rt_err *err);

/* += the reports of all shards of a set. FORMAT where it is not a retargeted one. */
enum rt_status rt_retarget_set_counts(const struct rt_shard_set *set, struct rt_retarget_counts *counts, struct rt_err *err);

#endif
