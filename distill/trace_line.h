/* One trace as a line of traces.jsonl. */
#ifndef RT_DISTILL_TRACE_LINE_H
#define RT_DISTILL_TRACE_LINE_H

#include <stdbool.h>
#include <stdint.h>

#include "distill/generate.h"
#include "distill/verify.h"
#include "formats/json.h"

struct rt_trace_format {
    struct rt_tokenizer *tok;       /* NULL: ids only */
    const struct rt_template *tmpl; /* NULL: none */
    enum rt_thinking thinking;
    enum rt_verify_mode verify;
    double temperature, top_p;
    int64_t top_k, seed, max_tokens;
    struct rt_buf text;         /* scratch, as the next two */
    struct rt_rendered rendered;
    struct rt_encoding encoding;
};
void rt_trace_format_free(struct rt_trace_format *f); /* releases the scratch */

/* Appends the line, without newline, for sample g of the prompt line `prompt`, whose number among the prompts is index:
 *   {"id": "7-0" (the prompt's "id" or its line, and the sample), "prompt"|"messages"|"text"|"input_ids"+"loss_mask": ..., "completion": text,
 *    "answer", "finish_reason": "stop"|"length", "index", "line", "sample", "tokens": {"prompt","completion","exact"}, "logprob": mean, nats,
 *    "verdict": text (with verify, where there is an answer), "sampling": {"temperature","top_p","top_k","seed","max_tokens"}, other members}
 * "messages" end with the completion as assistant message, and "text" with the completion: there is no "completion" beside them. exact:
 * reading the line as a dataset gives the ids that were sampled *verified: there is a verdict. */
enum rt_status rt_trace_line(struct rt_trace_format *f, const struct rt_json *prompt, int64_t index, const struct rt_generated *g, struct rt_buf *out,
                             enum rt_verdict *verdict, bool *verified, struct rt_err *err);

#endif
