/* Input lines (JSONL) -> samples of ids, or prompts of a sampler.
 *
 *   {"prompt","completion"}   the prompt is a user message rendered by the template, the completion the assistant's with its
 *                             end token; targets: the completion
 *   {"messages"}              targets: the last assistant turn, kept whole; a message may carry "loss": false (or true)
 *   {"text"}                  BOS if the tokenizer adds it, no EOS; everything is a target
 *   {"input_ids"}             as they are, with an optional "loss_mask"; needs no tokenizer
 * With "finish_reason": "length" (also in "sampling") the end token behind the last turn is no target: the completion was cut off.
 * A line that has several of them is read as the first of input_ids, messages, prompt, text. A message: "role" (system, user,
 * assistant), "content", and as may be "reasoning_content" and "loss". "answer" is what to check against. Other members are
 * kept (json). Lines of white space are skipped; a line is at most 16 MiB.
 */
#ifndef RT_FORMATS_DATASET_H
#define RT_FORMATS_DATASET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"
#include "formats/json.h"
#include "formats/template.h"
#include "formats/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_LINE_MAX = 16 << 20 };

enum rt_overlong { RT_OVERLONG_DROP, RT_OVERLONG_SPLIT };

struct rt_dataset_options {
    struct rt_tokenizer *tok;       /* NULL: only input_ids lines are read. Borrowed */
    const struct rt_template *tmpl; /* NULL: prompt and messages lines are refused. Borrowed */
    int64_t n_ids;                  /* ids must be below; 0: the tokenizer's (one of the two is needed) */
    int64_t max_length;             /* tokens of a sample; 0: no limit */
    enum rt_overlong overlong;      /* split: parts of max_length tokens, the last one shorter; parts with no target are left out */
    enum rt_thinking thinking;      /* for prompts: see template.h */
};

struct rt_dataset_counts {
    int64_t lines;     /* read, blank ones not counted */
    int64_t samples;   /* handed out */
    int64_t tokens, targets; /* in samples handed out; targets leave out position 0, which nothing predicts */
    int64_t dropped;   /* lines over max_length */
    int64_t split;     /* lines that gave several samples */
    int64_t untargeted;/* samples or parts left out: fewer than two tokens, or no target */
    int64_t not_nfc;   /* lines whose text is not in NFC */
};

/* One sample. Everything is owned by the reader and valid until its next call. */
struct rt_sample {
    const uint32_t *ids;       /* [n] */
    const uint8_t *loss_mask;  /* [n] 1: a target; [0] is never used */
    int64_t n, n_targets;      /* n_targets leaves out position 0 */
    bool has_completion;       /* the line tells targets from context (prompt, messages, loss_mask) */
    int64_t completion_start;  /* index of the first target; 0 for text */
    int64_t line;              /* 1-based */
    int part, n_parts;         /* 0 of 1 unless split */
    const char *prompt;        /* text of "prompt", or of the last user message; NULL without one */
    const char *completion;    /* text of "completion", or of the last assistant message (content); NULL without one */
    const char *answer;        /* "answer": a string as it is, another value as JSON; NULL without one */
    bool not_nfc;              /* the line's text is not in NFC: a tokenizer that normalises gives ids of other bytes */
    const struct rt_json *json;/* the whole line */
};

/* A prompt: what a sampler starts from. Owned as above. */
struct rt_prompt {
    const uint32_t *ids;
    int64_t n;
    const char *text;   /* the user's words: "prompt", the last user message, or "text"; NULL for input_ids */
    const char *answer;
    int64_t line;
    bool not_nfc;
    const struct rt_json *json;
};

struct rt_dataset;

/* path: a file, or a directory that holds accepted.jsonl or traces.jsonl (the first of the two). FORMAT: an empty file.
 * USAGE: neither n_ids nor a tokenizer, a max_length of 1 or negative. */
enum rt_status rt_dataset_open(const char *path, const struct rt_dataset_options *opt, struct rt_dataset **out,
                               struct rt_err *err);
void rt_dataset_close(struct rt_dataset *d); /* NULL is fine */
const char *rt_dataset_path(const struct rt_dataset *d); /* of the file that is read */

/* The next sample; *end = true (and *out untouched) after the last. FORMAT "FILE:LINE: ..." for a line that is no JSON object,
 * no known form, wrong types, an id that is too large, a loss_mask of another length, a line over 16 MiB, a file
 * without lines; UNSUPPORTED for a form that needs a tokenizer or template that is not there, and for tools. */
enum rt_status rt_dataset_next(struct rt_dataset *d, struct rt_sample *out, bool *end, struct rt_err *err);
/* The next prompt, from the same lines: a completion, and a last message that is the assistant's, are left out. Over
 * max_length: dropped and counted, whatever `overlong` says. */
enum rt_status rt_dataset_next_prompt(struct rt_dataset *d, struct rt_prompt *out, bool *end, struct rt_err *err);
enum rt_status rt_dataset_rewind(struct rt_dataset *d, struct rt_err *err); /* counts start again */
struct rt_dataset_counts rt_dataset_counts(const struct rt_dataset *d);

/* Copies into the object `to` the members of `line` that are none of the forms' own (prompt, completion, messages, text,
 * input_ids, loss_mask, answer), none that speak of an earlier completion (reasoning_content, verdict, filter), and that `to` does not
 * hold yet: pass-through. */
enum rt_status rt_dataset_copy_extra(const struct rt_json *line, struct rt_json *to, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
