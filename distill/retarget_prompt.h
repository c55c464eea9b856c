/* A rendered prompt read back: the messages that a template made it of.
 *
 * Shards hold what the teacher saw, not the lines that it was made of. The prompt's text is cut at the template's own marks, and the
 * messages are believed only if the template renders them to the same ids.
 */
#ifndef RT_DISTILL_RETARGET_PROMPT_H
#define RT_DISTILL_RETARGET_PROMPT_H

#include "core/mem.h"
#include "distill/model_dir.h"

struct rt_prompt_read {
    const struct rt_message *m; /* [n] contents point into the text that was read. A system message that the template adds by itself is left out */
    size_t n;
    const char *forced;         /* what stands between the opening of the assistant's turn and the completion: "<think>\n" or nothing */
    size_t forced_len;
    bool bare;                  /* nothing is forced where the template forces a thought on a sampler: an answer without one, out of a conversation */
    struct rt_buf messages;     /* owned: of struct rt_message */
    struct rt_rendered rendered;/* owned: scratch */
};
void rt_prompt_read_free(struct rt_prompt_read *p); /* zeroed is fine */
/* Renders p's messages and this answer behind them, as a conversation. p is as it was. What rt_template_render says, NOMEM. */
enum rt_status rt_prompt_read_answer(struct rt_prompt_read *p, const struct rt_template *tmpl, const char *answer, size_t len, const char *where,
                                     struct rt_rendered *out, struct rt_err *err);

/* text [len]: what ids [n_ids] decode to, special tokens as text; must outlive p's use. *ok false where the template does not explain them. */
enum rt_status rt_prompt_read(const struct rt_model_dir *model, const char *text, size_t len, const uint32_t *ids, size_t n_ids,
                              struct rt_prompt_read *p, bool *ok, struct rt_err *err);

#endif
