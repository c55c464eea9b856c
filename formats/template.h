/* Chat templates: messages -> text with special tokens -> ids and a loss mask.
 *
 * The template is not interpreted: its text (chat_template.jinja, chat_template.json or tokenizer_config.json of a model
 * directory) is recognised by what stands in it, never by the model's name, as one of the families below, and the parts that
 * differ within a family (default system prompt, date line, forced <think>) are read from it. Anything else is UNSUPPORTED.
 *
 *   deepseek_v3    BOS, system, <User>..<Assistant>..EOS
 *   deepseek_r1    the same; thoughts of earlier turns are cut; generation starts with "<think>\n" where the template says so
 *   deepseek_v3_1  generation starts with "<think>" (thinking) or "</think>"; thoughts of earlier turns are cut
 *   chatml         <|im_start|>role\ncontent<|im_end|>\n, default system prompt where the template has one (Qwen2.5, SmolLM2)
 *   qwen3          ChatML; thoughts of earlier turns are cut, an answer without one gets an empty one
 *   llama3         <|start_header_id|>role<|end_header_id|>\n\ncontent<|eot_id|>; with the date lines of 3.1 and later, at the
 *                  date that the template holds as its default
 *   none           BOS where the tokenizer adds it, contents one after the other, EOS after an answer
 *
 * Whatever the family, the last assistant turn is kept whole, and its "reasoning_content" is put between <think> and </think>.
 */
#ifndef RT_FORMATS_TEMPLATE_H
#define RT_FORMATS_TEMPLATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"
#include "formats/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_template;

/* dir: a model directory. name: NULL recognises the directory's own template; else a family, whatever the directory has:
 * deepseek_v3|deepseek_r1|deepseek_v3_1|chatml|qwen2_5|smollm2|qwen3|llama3|llama3_1|none.
 * *out = NULL (and RT_OK) where name is NULL and the directory has no template. tok must outlive the template.
 * UNSUPPORTED: not recognised (says which families there are), or tok lacks one of the family's special tokens.
 * USAGE: an unknown name. FORMAT, IO: the files. */
enum rt_status rt_template_load(const char *dir, const char *name, struct rt_tokenizer *tok, struct rt_template **out,
                                struct rt_err *err);
/* The same from a template's text; label is for messages. */
enum rt_status rt_template_from_text(const char *text, size_t len, const char *label, struct rt_tokenizer *tok,
                                     struct rt_template **out, struct rt_err *err);
void rt_template_free(struct rt_template *t); /* NULL is fine */

const char *rt_template_name(const struct rt_template *t);   /* the family */
const char *rt_template_sha256(const struct rt_template *t); /* of the template's text (given by name: of the name) */
/* The token that ends an assistant turn: a sampler stops at it. UINT32_MAX: none (family none, no EOS in the configuration). */
uint32_t rt_template_end_id(const struct rt_template *t);
const char *rt_template_names(void);                         /* "deepseek_v3|...", for usage texts */

/* Whether a prompt opens a thought, in the families that can do both (deepseek_v3_1, qwen3): AUTO is what the template does
 * when it is not told. The other families ignore it. */
enum rt_thinking { RT_THINKING_AUTO, RT_THINKING_ON, RT_THINKING_OFF };
/* Whether prompts can be as asked: AUTO always; ON and OFF in those families, and where the template forces a thought ON alone. */
bool rt_template_can(const struct rt_template *t, enum rt_thinking thinking);
/* What the prompt puts between the opening of the assistant's turn and the completion: "<think>\n" for deepseek_r1, "" for
 * most. A trace is whole only with it, and rt_template_completion takes it with it or without. */
const char *rt_template_forced(const struct rt_template *t, enum rt_thinking thinking);

struct rt_message {
    const char *role, *content, *reasoning; /* reasoning: NULL or "reasoning_content" */
    size_t content_len, reasoning_len;
    int loss; /* -1 not said, 0, 1 */
};

/* A rendered conversation. A zeroed struct is empty; reuse it, then rt_rendered_free. */
struct rt_rendered {
    struct rt_buf text;    /* what the template prints, special tokens as text */
    struct rt_encoding enc;
    uint8_t *loss_mask;    /* [enc.n] */
    size_t mask_cap;
    size_t n_targets;
    size_t target_start;   /* index of the first target; enc.n without one */
};
void rt_rendered_free(struct rt_rendered *r);

/* All messages. Targets: the last message, if it is the assistant's, unless its loss is 0; other assistant messages whose loss
 * is 1; in each the content (with its thought) and the end token, not the header nor an empty thought that the template puts
 * there. ids are those of the whole text, as Hugging Face encodes it. Errors: FORMAT (a role that the family does not
 * know, no messages), UNSUPPORTED (tool turns). `where` is for messages ("FILE:LINE"). = *r */
enum rt_status rt_template_render(const struct rt_template *t, const struct rt_message *m, size_t n, const char *where,
                                  struct rt_rendered *r, struct rt_err *err);
/* The prompt of a sampler: messages and the opening of an assistant turn. No targets. = *r */
enum rt_status rt_template_prompt(const struct rt_template *t, const struct rt_message *m, size_t n, enum rt_thinking thinking,
                                  const char *where, struct rt_rendered *r, struct rt_err *err);
/* rt_template_prompt, then the completion and the end token as targets: the ids of the prompt followed by those of the
 * completion, encoded apart, so that training sees what a sampler saw. r->text is the text of both.
 * A completion may begin with what the prompt forces: it is not doubled. Rules:
 * - where the prompt ends with "<think>\n" (deepseek_r1, the thinking-only qwen3), a completion that begins with "<think>"
 *   loses that tag and one newline after it;
 * - deepseek_v3_1: a completion that begins with <think> or </think> loses it, and its prompt ends with it; one that holds
 *   </think> further on has a thinking prompt; any other has the template's default;
 * - qwen3: a completion that begins with an empty thought ("<think>\n\n</think>\n\n") has it in the prompt;
 * - otherwise the completion is taken as it is. An end token at its end is not doubled. */
enum rt_status rt_template_completion(const struct rt_template *t, const struct rt_message *m, size_t n, const char *completion,
                                      size_t completion_len, const char *where, struct rt_rendered *r, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
