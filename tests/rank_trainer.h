/* Ranks as threads of one process, each with a communicator, a device and a trainer of its own, over one small student and the same data. */
#ifndef RT_TESTS_RANK_TRAINER_H
#define RT_TESTS_RANK_TRAINER_H

#include "tests/train_fixture.h"

enum { RANK_TRAINERS = 4, RANK_STEPS = 100 };

struct rank_run {
    const struct rt_backend *be;
    struct tf_data *data;
    int size, config, steps;
    int64_t bucket;
    bool overlap, early, states, record;
    double clip, lr;       /* lr 0: 1e-2 */
    const char *from, *to; /* checkpoints: directories to begin from and to leave behind; NULL: none */
    /* what came out, on every rank alike */
    double loss[RANK_STEPS], norm[RANK_STEPS];
    int64_t recorded[RANK_TRAINERS]; /* micro-steps of each rank that were a recording */
    float *block;          /* [elements] parameters at the end, freed by the caller */
    int64_t elements;
};
/* Data of a small student's shape with its teacher's rows, by malloc. */
struct tf_data *rank_data(int config);
/* Fails the test where a rank fails, or ranks come to different results. */
void rank_run(struct rank_run *r);
/* The run r with recorded micro-steps and without: every rank replays some, and the bits are the same. */
void rank_recorded(const struct rank_run *r);

/* Runs fn(self, rank, communicator) in `size` threads that have met; the first error is returned. timeout: of the communicators. */
typedef enum rt_status (*rank_fn)(void *self, int rank, struct rt_comm *comm, struct rt_err *err);
enum rt_status rank_threads(int size, double timeout, rank_fn fn, void *self, struct rt_err err[RANK_TRAINERS], enum rt_status st[RANK_TRAINERS]);

#endif
