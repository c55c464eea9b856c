/* Generation: prompts -> the batch scheduler over an engine, teacher or student -> one call a finished sequence.
 *
 * Sample s of the prompt with key `line` draws from stream (line << 20) + s, position by position: what it says depends on (seed,
 * line, s, position) and on its own prompt, not on slots, order, or how many samples there are (on cuda: for one batch plan).
 * The samples of a prompt share its prefix: it is fed once where a sibling is in its slot still.
 *
 * A caller that checks answers:
 *     rt_dataset_open(path, ...)                           next() hands out rt_dataset_next_prompt's
 *     rt_generator_student(student, &engine, &g, err)      or rt_generator_teacher
 *     rt_generate(&g, &options, NULL, err)                    done() gets rt_generated; rt_generated_text, then rt_verify
 *     rt_generator_close(&g)
 */
#ifndef RT_DISTILL_GENERATE_H
#define RT_DISTILL_GENERATE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/batch.h"
#include "core/log.h"
#include "core/mem.h"
#include "distill/model_dir.h"
#include "student/decode.h"
#include "teacher/decode.h"

enum { RT_GENERATE_MAX_SAMPLES = 1 << 20, RT_GENERATE_MAX_STOP = 32 };

/* ---- the engine ---- */
struct rt_generator_options {
    int64_t memory;     /* host bytes to stay within; for a student: what the decoder may take */
    int64_t gpu_memory; /* teacher: bytes of a device with memory of its own, 0: what is free */
    int64_t max_len;    /* tokens of a sequence, prompt and new ones; cut to what the model can hold */
    int slots;          /* sequences at a time; 0: planned from memory, at most 64 where the weights stay in memory (a student on a GPU: 256), else 1024 */
    int64_t sequences;  /* how many there will be: no more slots than these; 0: unknown */
    bool w8a8;          /* teacher */
};

struct rt_generator {
    struct rt_batch_step step;
    int slots, budget;      /* as planned */
    int64_t max_len, vocab; /* of a slot; columns of the logits */
    struct rt_teacher_plan plan; /* teacher: what memory holds */
    struct rt_teacher *teacher;
    struct rt_teacher_decoder *teacher_decoder;
    struct rt_student_decoder *student_decoder;
};

/* Opens the checkpoint in dir for generation. device is borrowed. plan_only: slots, budget, max_len and plan are filled, nothing
 * is read but headers. Errors of the teacher; NOMEM where not even one slot fits. *out zeroed on failure. */
enum rt_status rt_generator_teacher(const char *dir, const struct rt_device *device, const struct rt_generator_options *o, bool plan_only,
                                    struct rt_generator *out, struct rt_err *err);
/* The student is borrowed. */
enum rt_status rt_generator_student(struct rt_student *s, const struct rt_generator_options *o, struct rt_generator *out,
                                    struct rt_err *err);
void rt_generator_close(struct rt_generator *g); /* a zeroed one is fine */

/* ---- the run ---- */
struct rt_generate_prompt {
    const uint32_t *ids;     /* [n], n >= 1; valid until next is called again */
    int64_t n, line;         /* line: key of the random stream, 0 <= line < 2^43; a line of the input, or any number of one's own */
    int first_sample, n_samples; /* samples first .. first + n - 1 of this prompt; the same line may come again with others */
    void *user;
};

struct rt_generated {
    int64_t line;
    int sample;
    void *user;
    const uint32_t *prompt, *ids; /* valid during the call; ids holds the stop id at its end where finish is STOP */
    const float *logprobs;        /* [n] of ids at T = 1, nats */
    int64_t n_prompt, n;
    double logprob;               /* mean of logprobs; 0 for n = 0 */
    enum rt_finish finish;
};

struct rt_generate_options {
    uint64_t seed;
    struct rt_sample_params sample;
    int64_t max_new;          /* tokens of a completion, stop id included; the slot's length limits too */
    int64_t n_ids;            /* ids that exist (rt_model_dir_n_ids) */
    const int32_t *stop_ids;  /* rt_generate_stop_ids */
    int n_stop;
    struct rt_pool *pool;     /* NULL, or samples the rows of a step in parallel */
    /* Asked for more whenever fewer than two rounds of slots wait: prompts are never all in memory. *end = true after the last; a
     * source that must hold back (see done) sets *wait = true instead and is asked again when a sequence has ended. */
    enum rt_status (*next)(void *self, struct rt_generate_prompt *out, bool *end, bool *wait, struct rt_err *err);
    /* A sequence has ended; in the order of ending. An error ends the run. */
    enum rt_status (*done)(void *self, const struct rt_generated *g, struct rt_err *err);
    void (*progress)(void *self, const struct rt_batch_stats *stats); /* after each step, or NULL */
    void *self;
    bool (*stop)(void *stop_self); /* or NULL; true ends the run with INTERRUPTED */
    void *stop_self;
};

/* Runs until the source is at its end and all sequences have ended. What had not ended when an error comes up is lost; asked for
 * again it gives the same text. stats may be NULL. */
enum rt_status rt_generate(const struct rt_generator *g, const struct rt_generate_options *o, struct rt_batch_stats *stats,
                           struct rt_err *err);

/* ---- text ---- */
/* The ids at which an assistant's turn ends: the template's end token, the tokenizer's EOS, and those of `eos` (a configuration's),
 * each once. */
int rt_generate_stop_ids(const struct rt_model_dir *m, const int32_t *eos, int n_eos, int32_t out[RT_GENERATE_MAX_STOP]);
/* = what the prompt forced ("<think>\n") and the completion without its stop id; special tokens as text. Bytes that are no UTF-8
 * (a character cut in half by the limit) become U+FFFD, *lossy says so (may be NULL). tmpl NULL: nothing is forced. */
enum rt_status rt_generated_text(const struct rt_generated *g, const struct rt_tokenizer *tok, const struct rt_template *tmpl,
                                 enum rt_thinking thinking, struct rt_buf *out, bool *lossy, struct rt_err *err);

#endif
