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
    struct rt_buf messages;     /* owned: of struct rt_message */
    struct rt_rendered rendered;/* owned: scratch */
};
void rt_prompt_read_free(struct rt_prompt_read *p); /* zeroed is fine */

/* text [len]: what ids [n_ids] decode to, special tokens as text; must outlive p's use. *ok false where the template does not explain them. */
enum rt_status rt_prompt_read(const struct rt_model_dir *model, const char *text, size_t len, const uint32_t *ids, size_t n_ids,
                              struct rt_prompt_read *p, bool *ok, struct rt_err *err);

#endif
