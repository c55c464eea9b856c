/* What the files of `retort logits` share: the job, its plan, its run over the windows. */
#ifndef RT_DISTILL_LOGITS_H
#define RT_DISTILL_LOGITS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "distill/command.h"
#include "distill/corpus.h"
#include "distill/expert_load.h"
#include "formats/shard.h"
#include "teacher/score.h"

struct rt_logits_values {
    struct rt_common common;
    const char *teacher, *data, *out, *cache, *lse, *features, *numerics, *overlong, *rows, *part, *template_name, *save_state;
    int64_t max_length, window, rows_per_shard, readers;
    bool boundary;
};

/* What the machine does at most, as far as it is known: measured before work starts. 0: not measured. */
struct rt_logits_rates {
    double flops;          /* operations a second of one product on one device */
    double read;           /* bytes a second out of the checkpoint's files, */
    int readers;           /* by so many threads: the fewest that come near the greatest rate; 0: not measured */
    char flops_name[64], read_name[128]; /* how each was found */
};

struct rt_logits_plan {
    struct rt_teacher_plan teacher; /* of one device */
    struct rt_logits_rates rates;
    int64_t windows, passes;        /* passes over the weights: windows shared by the devices */
    double fill;                    /* mean share of a window that holds tokens */
    double flops;
    uint64_t bytes_read, shard_bytes, published, state_bytes; /* state_bytes: on disk, of the windows under way */
    int at_once;                    /* devices that compute at the same time: the cores bound those that are the host */
    double seconds_flops, seconds_read; /* 0: rate unknown */
};

/* A window on its way: filled by the main thread, scored by a lane, put by the writer. */
struct rt_logits_window {
    struct rt_corpus_window w;
    int64_t number, skip;           /* sequences of it that are put already */
    int64_t *load;                  /* [layers, experts]; NULL: no experts */
    char dir[4096];                 /* where its state is kept */
    struct rt_scored *scored;       /* its rows; NULL but between scoring and putting */
    bool queued;                    /* the writer's; under the job's lock */
};

/* A device with the windows that it works on: one that it scores, and where the job overlaps, one whose rows are written meanwhile. */
struct rt_logits_lane {
    struct rt_logits_job *j;
    struct rt_device device;
    struct rt_teacher *teacher;
    struct rt_logits_window slot[2], *at; /* at: the one of this round */
    int index;
    int64_t tokens;                 /* under way */
    int done, saved;                /* layers behind the states; behind the state on disk at the start */
    pthread_t thread;               /* where there are several lanes */
    enum rt_status st;
    struct rt_err err;
};

/* The thread that puts windows' rows, in the order in which they come: distill/logits_put.c. */
struct rt_logits_writer {
    pthread_t thread;
    bool started, closing;
    struct rt_pool *pool;           /* packs */
    struct rt_logits_window **queue; /* [2 * lanes] */
    int n;
    int64_t tokens;                 /* that were put, */
    double busy, waited;            /* seconds that took; and for which devices had nothing to do but to wait for it */
    enum rt_status st;              /* the first error: nothing is put any more */
    struct rt_err err;
};

struct rt_logits_job {
    struct rt_context *ctx;
    const struct rt_logits_values *v;
    struct rt_model_dir model;
    struct rt_corpus *corpus;
    struct rt_corpus_survey survey;
    struct rt_teacher_config config;
    struct rt_teacher_options to;
    struct rt_score_options so;     /* what all windows share */
    struct rt_logits_plan plan;
    struct rt_row_identity id;
    struct rt_shard_sink *shards;
    struct rt_row_sink sink;
    struct rt_shard_resume resume;
    struct rt_expert_load load;
    struct rt_progress progress;
    uint8_t *boundary;              /* [n_ids] NULL: not asked for */
    float *projection[RT_MAX_FEATURES];
    int part, n_parts;
    double save_every;              /* seconds; INFINITY: on a stop alone */
    bool keep;                      /* states of windows are kept on disk */
    bool overlap;                   /* a window's rows are put while the next one is scored; needs memory for two windows' rows */
    int put_threads;                /* that pack rows */
    char plan_file[4096];

    struct rt_logits_lane *lane;    /* [lanes] */
    int lanes;
    struct rt_logits_writer writer;
    pthread_mutex_t lock;           /* of the writer's queue and error, the log, the progress, and what follows */
    pthread_cond_t changed;
    int turn;                       /* the lane whose rows may be handed to the writer */
    bool failed;                    /* a lane ended with an error: the others stop */
    int64_t tokens_done;            /* of windows behind the ones under way */
};

/* distill/logits_options.c: the options as numbers. USAGE. */
enum rt_status rt_logits_options(struct rt_logits_job *j, struct rt_err *err);
/* distill/logits_parts.c: the file beside the shards that holds a part's arguments and plan. */
void rt_logits_plan_name(int part, int n_parts, char out[64]);
/* REFUSED where the parts whose files are in dir were not cut from one input: the one with sha256, or where that is NULL the first part's. */
enum rt_status rt_logits_parts_agree(const char *dir, int n_parts, const char *sha256, struct rt_err *err);
/* distill/logits_rate.c: measures, in about a second, a product on the device in the types that the numerics use (fp8: w8a8), and reading the
 * checkpoint's files past the page cache by 1, 2, 4 .. `readers` threads (exact: by that many alone; else the best count is used). What cannot be measured stays 0. */
void rt_logits_measure(const struct rt_device *d, bool fp8, const char *teacher, int readers, bool exact, struct rt_logits_rates *out);
/* distill/logits_plan.c: fills j->to and j->plan for the lanes' first device; REFUSED where the disk does not hold what will be written,
 * NOMEM where memory does not, with the numbers. */
enum rt_status rt_logits_make_plan(struct rt_logits_job *j, struct rt_err *err);
void rt_logits_log_plan(struct rt_logits_job *j);
/* The plan on stdout, for --dry-run. */
void rt_logits_print_plan(const struct rt_logits_job *j);
/* distill/logits_put.c. A window's rows, then its counts, are made to last before its state is dropped; so whatever happens, a window is whole in the set or
 * can be scored again from its state. After an error of the writer lanes are asked to stop. */
enum rt_status rt_logits_put_start(struct rt_logits_job *j, struct rt_err *err);
/* Hands a scored window over, in turn; returns at once where the job overlaps, else when it is put (or could not be, with the writer's error). */
enum rt_status rt_logits_put_push(struct rt_logits_job *j, struct rt_logits_window *w, struct rt_err *err);
/* Waits until w is put; with the writer's error. */
enum rt_status rt_logits_put_wait(struct rt_logits_job *j, struct rt_logits_window *w, struct rt_err *err);
/* Waits until everything that was handed over is put, and ends the thread; with its error. Nothing where it was not started. */
enum rt_status rt_logits_put_end(struct rt_logits_job *j, struct rt_err *err);
/* distill/logits_run.c: opens a device a lane (--gpus); scores every window that is not there yet. */
enum rt_status rt_logits_open_devices(struct rt_logits_job *j, struct rt_err *err);
/* USAGE where the first lane's head operation does not take what the options ask for: it is the last of a window, and would say so after all layers. */
enum rt_status rt_logits_check_head(const struct rt_logits_job *j, struct rt_err *err);
enum rt_status rt_logits_open_teachers(struct rt_logits_job *j, struct rt_err *err);
enum rt_status rt_logits_score(struct rt_logits_job *j, struct rt_err *err);
void rt_logits_close(struct rt_logits_job *j); /* lanes, teachers, devices */

#endif
