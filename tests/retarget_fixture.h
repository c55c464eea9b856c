/* Toy tokenizers and toy teachers for the suites of retargeting. */
#ifndef RT_TESTS_RETARGET_FIXTURE_H
#define RT_TESTS_RETARGET_FIXTURE_H

#include "distill/retarget.h"
#include "distill/retarget_text.h"
#include "tests/suite.h"

#define DEEPSEEK "tests/data/tokenizers/deepseek"
#define QWEN "tests/data/tokenizers/qwen"
#define LLAMA "tests/data/tokenizers/llama3"
#define SMOLLM "tests/data/tokenizers/smollm2"

/* A directory of test_tmp with a byte-level tokenizer of 256 bytes, these merges ("left right", in order of rank) and the
 * special token <end>; no template. nfc: it normalises. */
const char *rf_tokenizer(const char *name, const char *const *merges, int n_merges, bool nfc);
struct rt_model_dir rf_model(const char *dir);

/* logit of token w behind token `prev` at position i of a sequence, when `next` is what comes */
typedef double rf_logit(const void *ctx, int64_t i, uint32_t prev, uint32_t w, uint32_t next);
/* In [-1.5, 1.5], and 5 more for the next token. */
double rf_hash_logit(const void *ctx, int64_t i, uint32_t prev, uint32_t w, uint32_t next);

struct rf_rows {
    struct rt_rows rows;
    struct rt_row_identity id;
    struct rt_buf bytes;
};
/* Rows of a toy teacher over all tokens that exist, of every prediction whose next token is masked in; top k, T = 1 and 2. */
struct rf_rows rf_rows(const struct rt_model_dir *teacher, const uint32_t *ids, const uint8_t *mask, int64_t n, int k, rf_logit *logit, const void *ctx);
void rf_rows_free(struct rf_rows *r);
/* The rows of {"prompt", "completion"} rendered by the teacher's template; completion NULL: of {"text"}, prompt being the text. */
struct rf_rows rf_render(const struct rt_model_dir *teacher, const char *prompt, const char *completion, int k);

/* One sequence through text, alignment and rows, with everything it needs. */
struct rf_made {
    struct rt_vocab_map map;
    struct rt_retarget_text text;
    struct rt_place *place;
    struct rt_retarget_out out;
    struct rt_rows rows;
    struct rt_row_identity id;
    struct rt_retarget_counts counts;
    enum rt_reject reject;
};
/* Rows (where nothing was rejected) hold every rule of rt_rows_check. */
struct rf_made rf_make(struct rt_model_dir *teacher, struct rt_model_dir *student, const struct rf_rows *r, enum rt_retarget_mode mode);
void rf_made_free(struct rf_made *m);
/* The row of student token i, -1: none. */
int64_t rf_row_of(const struct rf_made *m, int64_t i);
/* Probability of id in a row; 0 where it is not listed. */
double rf_prob(const struct rf_made *m, int64_t row, uint32_t id);
/* Student token i as text. Static storage, a ring of 8. */
const char *rf_token(const struct rf_made *m, int64_t i);
/* First student token from `from` on whose text this is; fails without one. */
int64_t rf_find(const struct rf_made *m, const char *text, int64_t from);

/* Bytes of the student's targets, the end of the turn left out, and how many targets there are. */
int64_t rf_targets_of(const struct rf_made *m, char *out, size_t cap);
/* Both sides of a sequence. */
struct rf_both {
    struct rt_model_dir t, s;
    struct rf_rows r;
    struct rf_made m;
};
/* Frees what is in it. */
void rf_done(struct rf_both *b);

#endif
