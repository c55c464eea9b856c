/* The batch scheduler of generation: many sequences, few slots, over an engine's callbacks.
 *
 * A slot is one sequence's place in the engine's cache. Each step feeds up to `budget` entries: first one new token of each
 * running sequence, then prompts in chunks, both in the order in which sequences were added. The scheduler samples (or has the
 * engine draw), appends, ends sequences and gives their slots to waiting ones. With a step whose rows depend on their own slot
 * alone, a sequence's result depends on (seed, stream, its own prompt) and never on slots, budget, threads or its neighbours.
 *
 * An engine that draws by itself may run ahead: the next step is handed over before the last one's tokens are known, and what is
 * done about these (texts, checks, sequences that join) happens meanwhile. A sequence that turns out to have stopped has then been fed
 * one token too many, which is thrown away.
 *
 * Where slots share memory that cannot hold them all at full length (room), the sequence added last gives up its place when the
 * others need it, and is fed again from its beginning, with what it has said so far, once there is room.
 */
#ifndef RT_CORE_BATCH_H
#define RT_CORE_BATCH_H

#include <stdbool.h>
#include <stdint.h>

#include "core/pool.h"
#include "core/sampler.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Token `token` goes into `slot` at position `position` (0-based). An entry at position p finds exactly the tokens 0 .. p-1 in
 * its slot: what an earlier sequence left at p and after it is void. To `submit`, token -1 - r stands for what row r of the step before drew. */
struct rt_batch_entry {
    int32_t slot, token;
    int64_t position;
    int32_t row; /* of the logits that the step returns for this entry; -1: none wanted */
};

/* Where a row's random number is drawn (core/sampler.h). */
struct rt_batch_draw {
    uint64_t stream;
    int64_t position;
};
struct rt_batch_law {
    struct rt_sample_params sample;
    uint64_t seed;
    int64_t n_ids;
};

struct rt_batch_step {
    void *ctx;
    /* Feeds n entries, sorted by slot, then ascending by position without gaps (so one slot may have a run of several: a
     * prompt chunk, causal within itself). *logits = [n_rows][row_stride >= n_ids] float32 on the host, owned by the engine
     * and valid until the next step; rows are numbered in entry order. */
    enum rt_status (*step)(void *ctx, const struct rt_batch_entry *entries, int n, int n_rows, const float **logits,
                           int64_t *row_stride, struct rt_err *err);
    /* Slot dst gets the first n_tokens of slot src. NULL: each sample of a prompt feeds the prompt again. */
    enum rt_status (*copy_slot)(void *ctx, int src, int dst, int64_t n_tokens, struct rt_err *err);
    /* Both or neither, instead of step: submit feeds and draws, draws[row] saying where; arguments are read before it returns. The law is the
     * same for a whole run (an engine may refuse top_k: UNSUPPORTED). collect waits for the oldest step not yet collected: ids and logprobs of its rows, in order; id -1 - j says that logit j was
     * NaN or infinite. At most 1 + ahead steps are submitted and not collected. */
    enum rt_status (*submit)(void *ctx, const struct rt_batch_entry *entries, int n, int n_rows, const struct rt_batch_draw *draws,
                             const struct rt_batch_law *law, struct rt_err *err);
    enum rt_status (*collect)(void *ctx, int32_t *ids, float *logprobs, struct rt_err *err);
    int ahead; /* 0 or 1 */
    /* Both or neither (every slot holds max_len tokens): memory for `tokens` tokens in the slot is set aside, or nothing is and the answer is false; `spare` such
     * pieces as a slot grows by must be left. One slot alone can always hold max_len. drop gives back what lies behind the first `keep` tokens.
     * copy_slot is called with a dst that holds nothing but room for one token. */
    bool (*room)(void *ctx, int slot, int64_t tokens, int spare);
    void (*drop)(void *ctx, int slot, int64_t keep);
};

enum rt_finish { RT_FINISH_STOP, RT_FINISH_LENGTH };

struct rt_batch_result {
    int64_t index;    /* as rt_batch_add counted */
    int sample;       /* of n_samples */
    void *user;       /* of the request */
    const int32_t *prompt, *ids; /* valid during on_finish */
    const float *logprobs;       /* [n], of ids at T = 1, nats */
    int64_t n_prompt, n;         /* ids ends with the stop id where finish is STOP */
    enum rt_finish finish;
};

struct rt_batch_stats {
    int64_t added, finished, running;  /* sequences */
    int64_t prompt_tokens, new_tokens; /* fed (without copied ones, with those fed again); sampled */
    int64_t steps, parked;             /* parked: how often a sequence gave up its place */
};

struct rt_batch_options {
    int slots;            /* >= 1 */
    int budget;           /* entries of one step, >= 1 */
    int64_t max_len;      /* tokens that a slot holds: prompt and new ones together */
    int64_t n_ids;        /* ids that exist: prompts and samples are below */
    uint64_t seed;
    struct rt_sample_params sample;
    struct rt_pool *pool; /* NULL, or samples the rows of a step in parallel, where the engine does not draw */
    /* Called when a sequence ends, in the caller's thread, as soon as it is known: the order depends on the batch, the index
     * does not. May call rt_batch_add. An error ends the run. */
    enum rt_status (*on_finish)(void *ctx, const struct rt_batch_result *r, struct rt_err *err);
    void (*progress)(void *ctx, const struct rt_batch_stats *stats); /* after each step, or NULL */
    bool (*stop)(void *ctx);  /* asked before each step, or NULL; true ends the run with INTERRUPTED */
    void *ctx;                /* of these three */
};

struct rt_batch_request {
    const int32_t *prompt; /* copied */
    int64_t n_prompt;      /* >= 1 */
    uint64_t stream;       /* sample i draws from stream + i: keep requests n_samples apart */
    int n_samples;         /* >= 1: sequences with this prompt, with consecutive indices */
    int64_t max_new;       /* tokens, >= 0; max_len limits too */
    const int32_t *stop_ids; /* copied */
    int n_stop;
    void *user;
};

struct rt_batch;

enum rt_status rt_batch_create(const struct rt_batch_options *options, const struct rt_batch_step *step, struct rt_batch **out,
                               struct rt_err *err);
void rt_batch_free(struct rt_batch *b); /* NULL is fine */

/* Queues n_samples sequences. *index, if not NULL, is that of the first: the number of those added before. A prompt that fills
 * a slot (n_prompt >= max_len) ends with LENGTH and no ids. USAGE for an id out of range or an empty prompt. */
enum rt_status rt_batch_add(struct rt_batch *b, const struct rt_batch_request *request, int64_t *index, struct rt_err *err);

/* Runs until all queued sequences have ended, stop() says so, or an error comes up. Sequences that had not ended are lost
 * then: added again to a new batch they give the same results. */
enum rt_status rt_batch_run(struct rt_batch *b, struct rt_err *err);
void rt_batch_stats(const struct rt_batch *b, struct rt_batch_stats *out);

#ifdef __cplusplus
}
#endif
#endif
