/* config.json of a dense student: Qwen2/2.5, Qwen3, Llama 2/3.x and what shares their model_type (SmolLM2).
 *
 * Read are both spellings of a key (rope_scaling | rope_parameters, torch_dtype | dtype). What the engine would compute
 * wrongly is refused with key, expected and found: an active sliding window, another activation than silu, dropout, rope
 * kinds other than default, linear, llama3 and yarn. The source text is kept as it is, so that a save changes only what
 * has changed and unknown keys survive.
 */
#ifndef RT_STUDENT_CONFIG_H
#define RT_STUDENT_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/dtype.h"
#include "core/mem.h"
#include "core/status.h"

enum rt_student_family { RT_STUDENT_QWEN2, RT_STUDENT_QWEN3, RT_STUDENT_LLAMA };

enum rt_rope_kind { RT_ROPE_DEFAULT, RT_ROPE_LINEAR, RT_ROPE_LLAMA3, RT_ROPE_YARN };

struct rt_student_rope {
    enum rt_rope_kind kind;
    double theta, factor;
    double low_freq_factor, high_freq_factor; /* llama3 */
    double original_max_position;             /* llama3, yarn */
    double beta_fast, beta_slow;              /* yarn */
    double attention_factor;                  /* multiplies cos and sin; 1 but for yarn */
    bool truncate;                            /* yarn: the ramp's ends are rounded to whole dimensions */
};

enum { RT_STUDENT_MAX_EOS = 16, RT_STUDENT_MAX_LAYERS = 1024 };

struct rt_student_config {
    enum rt_student_family family;
    int64_t vocab_size, hidden, intermediate, max_position;
    int layers, heads, kv_heads, head_dim; /* head_dim may differ from hidden/heads */
    double eps, initializer_range;
    bool tied;                              /* the head is the embedding matrix */
    bool qkv_bias, o_bias, mlp_bias, qk_norm;
    struct rt_student_rope rope;
    enum rt_dtype dtype;                    /* of the checkpoint: BF16, F16 or F32 */
    int32_t bos;                            /* -1: none */
    int32_t eos[RT_STUDENT_MAX_EOS];
    int n_eos;
    char *text;                             /* the source, owned, 0-terminated */
    size_t text_len;
};

/* path: a model directory (its config.json) or a JSON file. Errors: IO; FORMAT (key, expected, found); UNSUPPORTED, by name. */
enum rt_status rt_student_config_load(const char *path, struct rt_student_config *out, struct rt_err *err);
/* From bytes; source is for messages. */
enum rt_status rt_student_config_parse(const char *text, size_t len, const char *source, struct rt_student_config *out,
                                       struct rt_err *err);
void rt_student_config_free(struct rt_student_config *c); /* zeroed is fine */

const char *rt_student_family_name(enum rt_student_family f); /* "qwen2", "qwen3", "llama" */

/* Appends the source text with dtype (torch_dtype or dtype, whichever is there), and tie_word_embeddings where c->tied differs
 * from the text; every other byte is as it was. dtype: BF16, F16 or F32. */
enum rt_status rt_student_config_text(const struct rt_student_config *c, enum rt_dtype dtype, struct rt_buf *out, struct rt_err *err);

/* Appends text with the value of the member `key` of the outermost object replaced by `value` (JSON text), or with the member
 * added in front where it is absent. text must be one valid JSON object. FORMAT where it is not. */
enum rt_status rt_json_text_patch(const char *text, size_t len, const char *key, const char *value, struct rt_buf *out,
                                  struct rt_err *err);

/* cos, sin [n_pos, head_dim/2]: angle = position * frequency (both float32, as the published models compute it), scaled by the
 * attention factor. Frequencies: theta^(-2j/hd), changed by the rope kind (linear; llama3: Llama 3.1 model card; YaRN: Peng et
 * al. 2023, sections 3.2 and 3.4). */
void rt_student_rope_table(const struct rt_student_config *c, int64_t n_pos, float *cos_out, float *sin_out);

#endif
