/* The batch scheduler's own: what its two files share (batch.h; batch.c: requests and steps; batch_places.c: who has which slot).
 *
 * Requests form a list; each holds the next sample to start. Slots hold running sequences. A request leaves the list when its
 * last sample has started and is freed when its last sample has ended.
 *
 * Steps that were submitted are flights: at most two, collected in order. A slot's `drawn` tokens are known, those `under_way` are not.
 * What a flight brings for a sequence that is no longer in its slot (its turn differs) is thrown away.
 */
#ifndef RT_CORE_BATCH_INTERNAL_H
#define RT_CORE_BATCH_INTERNAL_H

#include "core/batch.h"
#include "core/mem.h"

struct request {
    struct request *next;
    int32_t *prompt, *stop_ids;
    int64_t n_prompt, max_new, first_index;
    uint64_t stream;
    int n_samples, started, ended, n_stop;
    void *user;
};

/* The prompt that a slot holds stays there when its sequence has ended, for a sibling to copy. */
struct slot {
    bool busy;
    struct request *of;
    int sample;
    int64_t turn;     /* counts the sequences that had this slot */
    int64_t prompt;   /* whose prompt it holds: 1 + first_index, 0: none */
    int64_t held;     /* tokens in the engine's cache, those of submitted steps among them */
    int64_t drawn;    /* sampled tokens that are known */
    int under_way;    /* how many more were asked for */
    int quota;        /* entries in this step */
    int row;          /* of the last submitted step that fed it, -1: none */
    struct rt_buf ids, logprobs; /* int32_t and float, [drawn] */
};

/* A sequence that gave up its slot. */
struct parked {
    struct parked *next;
    struct request *of;
    int sample;
    int64_t drawn;
    struct rt_buf ids, logprobs;
};

/* One row to sample in a step. */
struct draw {
    int slot;
    int64_t turn;
    int32_t id;
    float logprob;
    enum rt_status st;
    struct rt_err err;
};

enum { FLIGHTS = 2 };
struct flight {
    int n_rows;
    struct draw *draws; /* [o.slots] */
};

struct rt_batch {
    struct rt_batch_options o;
    struct rt_batch_step step;
    struct slot *slots;             /* [o.slots] */
    int *order;                     /* [o.slots] busy slots by index of their sequence */
    struct rt_batch_entry *entries; /* [o.budget] */
    struct flight flight[FLIGHTS];  /* the next to collect is number `collected` % FLIGHTS */
    int64_t submitted, collected;
    struct rt_batch_draw *places;   /* [o.slots] */
    int32_t *ids;                   /* [o.slots] */
    float *logprobs;                /* [o.slots] */
    struct rt_sampler **samplers;   /* [threads] */
    int threads, n_busy;
    struct parked *parked;          /* by index */
    struct request *head, **tail;   /* those with samples not yet started */
    struct request *detached;       /* all samples started, some running */
    struct rt_batch_stats stats;
    const float *logits;
    int64_t stride;
};

static inline int64_t rt_batch_index_of(const struct slot *s)
{
    return s->of->first_index + s->sample;
}

/* Frees one that left its list, and one that nobody waits for; NULL is fine. */
void rt_batch_request_free(struct request *r);
void rt_batch_parked_free(struct parked *p);

/* Reports one ended sequence, and lets go of its request after the last. s NULL: it said nothing. */
enum rt_status rt_batch_finish(struct rt_batch *b, struct request *r, int sample, const struct slot *s, enum rt_finish why, struct rt_err *err);
/* Takes the sequence out of its slot, which keeps its first `keep` tokens. */
void rt_batch_leave(struct rt_batch *b, int slot, int64_t keep);
/* Memory for `tokens` tokens in a slot, if need be that of prompts without a sequence. */
bool rt_batch_room(struct rt_batch *b, int slot, int64_t tokens, int spare);
/* The youngest sequence gives up its slot. */
enum rt_status rt_batch_park(struct rt_batch *b, struct rt_err *err);
/* Fills free slots, first with parked sequences, then from the queue; sequences without room for a token end here. */
enum rt_status rt_batch_admit(struct rt_batch *b, struct rt_err *err);

#endif
