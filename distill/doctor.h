/* Pre-flight checks: what would make a distillation silently wrong, or stop it after hours. For `doctor`.
 *
 * A check ends as PASS, WARN (goes on, but know this) or FAIL (must be mended first); a file that cannot be read is a FAIL of its check,
 * not an error of the command. Checks that need something that was not given are left out.
 */
#ifndef RT_DISTILL_DOCTOR_H
#define RT_DISTILL_DOCTOR_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "core/log.h"
#include "core/mem.h"
#include "distill/model_dir.h"
#include "formats/json.h"
#include "formats/shard.h"
#include "student/params.h"
#include "teacher/config.h"

enum rt_check_level { RT_CHECK_PASS, RT_CHECK_WARN, RT_CHECK_FAIL };
struct rt_check {
    enum rt_check_level level;
    char name[40];
    char detail[560];
};
struct rt_checks {
    struct rt_check *at; /* [n] */
    int n, cap;
    int count[3];        /* by level */
};
/* Appends a check. NOMEM. */
enum rt_status rt_check_add(struct rt_checks *c, struct rt_err *err, enum rt_check_level level, const char *name, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));
void rt_checks_free(struct rt_checks *c);
const char *rt_check_level_name(enum rt_check_level l); /* "PASS", "WARN", "FAIL" */

struct rt_doctor {
    const char *teacher, *student, *data, *shards, *out; /* NULL: not given */
    int64_t max_length, batch_tokens, memory, lines;     /* lines: of data that are checked one by one, 0: all */
    int64_t room;                                        /* of a GPU, for what a student's training has to hold; 0: memory */
    int top_k, threads;
    int gpus;                                            /* ranks that a student will be trained by; 0 is 1 */
    bool forward;                                        /* models that fit into memory score some text */
    int64_t rescore;                                     /* rows of shards that the teacher computes again; 0: some, where it fits into memory */
    struct rt_log *log;
    struct rt_device device;
    struct rt_checks checks;

    /* opened by the checks; what could not be is absent */
    bool have_teacher, have_student;
    struct rt_teacher_config tc;
    struct rt_student_config sc;
    struct rt_params sp;
    struct rt_model_dir tm, sm;
    char student_dir[4096];                              /* of student: itself, or the model of a run; "" where it has none */
    struct rt_shard_set *set;
    char teacher_sha256[65];
    uint64_t teacher_bytes;
    int64_t tokens, longest, sequences;                  /* of data, 0: unknown */
};

/* Runs what the given paths allow, cheapest first. Errors: NOMEM, INTERNAL; findings are in checks. device is open. */
enum rt_status rt_doctor_run(struct rt_doctor *d, struct rt_err *err);
void rt_doctor_close(struct rt_doctor *d); /* device stays the caller's */

/* doctor_model.c: configuration, weights, vocabulary, template and its canaries; then what two models have in common. */
enum rt_status rt_doctor_models(struct rt_doctor *d, struct rt_err *err);
/* doctor_data.c: lines, lengths, targets, end tokens, BOS, NFC. */
enum rt_status rt_doctor_data(struct rt_doctor *d, struct rt_err *err);
/* doctor_crossing.c: two tokenizers: how much of the data's targets would have rows after `retarget`. */
enum rt_status rt_doctor_crossing(struct rt_doctor *d, struct rt_err *err);
/* doctor_shards.c: integrity, identity, temperatures, mass, lengths, shift and mask canaries. */
enum rt_status rt_doctor_shards(struct rt_doctor *d, struct rt_err *err);
/* doctor_forward.c: do the models predict the next token rather than another? */
enum rt_status rt_doctor_forward(struct rt_doctor *d, struct rt_err *err);
/* doctor_rescore.c: rows of the shards computed again by their teacher on this device, against what is stored. */
enum rt_status rt_doctor_rescore(struct rt_doctor *d, struct rt_err *err);
/* doctor_cost.c: memory, disk, operations. */
enum rt_status rt_doctor_costs(struct rt_doctor *d, struct rt_err *err);

/* Log-probability at T=1 of `id` in row r of a sparse block of n_ids ids. Where it is not among the stored ones: *most is that of the
 * least stored id, *about what an id of the tail has on average. */
void rt_row_logprob(const struct rt_rows *rows, int64_t r, int lse_one, int64_t n_ids, uint32_t id, double *most, double *about);
struct rt_shift_sums {
    double next;           /* sums of log-probabilities: of the next token, */
    double current, after; /* at most of the token itself and of the one after next, */
    double current_about, after_about; /* and about; the same where they are known */
    int64_t rows;
};
/* Adds rows whose token, next token and the one after differ. */
void rt_shift_add(struct rt_shift_sums *s, const struct rt_rows *rows, int lse_one, int64_t n_ids);
/* The check of such sums. PASS: the next token is surely the likeliest of the three. FAIL: another is, and the model knows the text (it is
 * a nat above chance), or a sum is not finite. WARN: it cannot be told. */
enum rt_status rt_shift_check(struct rt_doctor *d, const char *name, const struct rt_shift_sums *s, int64_t vocab, struct rt_err *err);

#endif
