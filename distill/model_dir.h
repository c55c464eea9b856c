/* The text side of a model directory: its tokenizer and chat template, and what identifies both. */
#ifndef RT_DISTILL_MODEL_DIR_H
#define RT_DISTILL_MODEL_DIR_H

#include <stdint.h>

#include "core/log.h"
#include "core/status.h"
#include "formats/template.h"
#include "formats/tokenizer.h"

struct rt_model_dir {
    char path[4096];
    struct rt_tokenizer *tok;  /* NULL where the directory has no tokenizer.json: only input_ids lines are read then */
    struct rt_template *tmpl;  /* NULL where there is none, or none that is recognised (a warning says so) */
};

/* template_name: NULL, or a family that overrides the directory's own template (then an unusable one is an error). */
enum rt_status rt_model_dir_open(const char *path, const char *template_name, struct rt_log *log, struct rt_model_dir *out,
                                 struct rt_err *err);
void rt_model_dir_close(struct rt_model_dir *m); /* a zeroed one is fine */
/* Copies what a tokenizer and a chat template are read from (tokenizer.json, tokenizer_config.json, chat_template.*) from m's directory
 * into dir, made if absent, except what is there already: so that rows carry what their ids stand for. Nothing without a tokenizer. */
enum rt_status rt_model_dir_keep(const struct rt_model_dir *m, const char *dir, struct rt_err *err);
/* Ids that exist: below 1 + the largest id of tokenizer.json, or vocab_size where there is no tokenizer. FORMAT where the tokenizer has
 * more ids than the model has rows. */
enum rt_status rt_model_dir_n_ids(const struct rt_model_dir *m, int64_t vocab_size, int64_t *n_ids, struct rt_err *err);
/* Tokens that a sequence may have: --max-length where that is less than the model's maximum; 0: it was not given. */
static inline int64_t rt_length_limit(int64_t max_length, int64_t max_position)
{
    return max_length > 0 && max_length < max_position ? max_length : max_position;
}

#endif
