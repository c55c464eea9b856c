/* Rows: what the teacher says about a sequence, and the interface between teacher and student.
 *
 * A sequence of n_tokens tokens has n_tokens-1 predictions: row at position i is the distribution of token i+1 given tokens
 * 0..i. A block holds the rows of one sequence (all of them, or those whose next token is masked in). The teacher writes
 * blocks to a sink, the trainer reads them from a source; a shard set on disk is one implementation of each, a queue in
 * memory another.
 *
 * Logits are raw (not normalised) float32. log p_T(id) = logit/T - lse_T, with lse_T = log sum_v exp(logit_v / T) over the
 * n_ids ids that exist. The tail mass at T is 1 - sum_j exp(logit_j/T - lse_T): exact at every stored T, unknown at others.
 */
#ifndef RT_FORMATS_ROWS_H
#define RT_FORMATS_ROWS_H

#include <stdbool.h>
#include <stdint.h>

#include "core/dtype.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_MAX_LSE = 8, RT_MAX_FEATURES = 8, RT_KEY_BYTES = 16 };

/* No id: an empty entry of a row. Rows of a retargeted set may have fewer than k entries; behind the last one ids are RT_NO_ID and
 * logits -INFINITY, which is no mass at any temperature. */
#define RT_NO_ID UINT32_MAX

/* One hidden state a token. layer 0: embeddings, l: output of layer l-1 (before the final norm), RT_LAYER_FINAL: after it. */
enum { RT_LAYER_FINAL = -1 };
struct rt_feature_spec {
    int layer;
    int dim;            /* hidden_size, or the projection's */
    enum rt_dtype dtype;/* RT_BF16: whole states. RT_E4M3 with scales: a projection of them */
    bool projected;     /* through the seeded orthogonal matrix (seed in the identity) */
};

/* What rows were before they were rewritten for another tokenizer: the teacher's own side. */
struct rt_row_origin {
    char mode[16]; /* "exact", "strict", "alm"; "": rows are as the teacher made them, and the rest is 0 */
    char tokenizer_sha256[65], template_sha256[65];
    int64_t vocab_size, n_ids;
    bool completion_only;
};

/* Who made the rows. A reader that needs another identity refuses, with both values. Strings are owned by the holder. */
struct rt_row_identity {
    char teacher_sha256[65];   /* of config.json and the index (or the file's header where there is none) */
    char tokenizer_sha256[65]; /* of tokenizer.json; "" without one */
    char template_sha256[65];  /* of the chat template text; "" without one */
    char teacher_name[128];    /* the directory's name: for people */
    char mode[48];             /* "w8a16/f32/cpu": numerics (w8a16, w8a8, w8a8-ue8m0) / compute dtype / backend family */
    int64_t vocab_size;        /* rows of the head */
    int teacher_layers;        /* num_hidden_layers: what feature layers count in */
    int64_t n_ids;             /* ids that exist: 1 + largest id of tokenizer.json, or vocab_size */
    int top_k;
    int n_lse;
    double lse_temperature[RT_MAX_LSE]; /* ascending; holds 1 */
    bool completion_only;      /* only rows whose next token is masked in are stored */
    int64_t max_length;        /* longer sequences were dropped or split; 0: no limit */
    uint64_t projection_seed;
    int n_features;
    struct rt_feature_spec feature[RT_MAX_FEATURES];
    bool boundary;             /* teacher rows: boundary_logp is stored. Spans (origin.mode "alm"): they count the boundary behind them */
    struct rt_row_origin origin; /* of a retargeted set: tokenizer, template, vocab_size and n_ids above are the student's then */
};

/* Rows of one sequence. All arrays belong to whoever hands the block out and are valid until the next call on that source
 * (or, for a sink, during put). Row-major. */
struct rt_rows {
    uint8_t key[RT_KEY_BYTES];   /* first 16 bytes of SHA-256 over the token ids as u32 little-endian */
    uint32_t occurrence;         /* 0 for the first sequence with this key in the input, 1 for the next, ... */
    int64_t source_line;         /* 1-based line of the input, 0 if unknown */
    int64_t n_tokens;
    const uint32_t *ids;         /* [n_tokens] */
    const uint8_t *loss_mask;    /* [n_tokens] 1: this token is a target (its row is position-1); loss_mask[0] is never used */
    const char *text;            /* NULL without a tokenizer; else the bytes that the tokens decode to */
    int64_t text_len;
    const uint32_t *byte_end;    /* [n_tokens] end of each token's bytes in text; NULL without a tokenizer */

    int64_t n_rows;
    int k, n_lse;                /* as in the identity; k may be smaller than asked where n_ids is */
    const uint32_t *position;    /* [n_rows] ascending, < n_tokens-1 */
    const uint32_t *topk_ids;    /* [n_rows, k] by descending logit, then ascending id */
    const float *topk_logits;    /* [n_rows, k] */
    const float *lse;            /* [n_rows, n_lse] */
    const uint32_t *next_id;     /* [n_rows] = ids[position+1] */
    const float *next_logprob;   /* [n_rows] at T=1 */
    const float *boundary_logp;  /* [n_rows] log of the mass at T=1 of the ids of distill/spans.h; NULL unless the identity has boundary and no spans */
    /* Sets of spans, else NULL. A span is a run of targets whose bytes both tokenizers end together; its log-probability stands at its last row. */
    const uint32_t *span;        /* [n_rows] rows of the span that ends here, all directly before one another; 0: none ends here */
    const float *span_logp;      /* [n_rows] the teacher's log-probability of the span (and of the boundary behind it); 0 where none ends */
    const uint32_t *next_rank;   /* [n_rows] ids with a greater logit, or an equal one and a smaller id */

    int n_features;
    const void *feature[RT_MAX_FEATURES];        /* [n_tokens, dim] of the identity's dtype */
    const float *feature_scale[RT_MAX_FEATURES]; /* [n_tokens] for E4M3, else NULL: value = code * scale */
    const uint8_t *feature_mask; /* [n_tokens] 1: the token has a state, 0: no teacher token ends there (all zero). NULL: every token has one */
};

/* Entries of row i that are not empty. */
static inline int rt_row_entries(const struct rt_rows *r, int64_t i)
{
    int n = r->k;
    while (n > 0 && r->topk_ids[i * r->k + n - 1] == RT_NO_ID)
        n--;
    return n;
}

/* Rows of spans in place of distributions: origin.mode is "alm". They have no entries (k 0). */
bool rt_row_identity_spans(const struct rt_row_identity *id);
/* Entries of a row, the ids that exist at most. */
int rt_row_identity_k(const struct rt_row_identity *id);
/* Its temperatures, as people read them: "1, 2". */
void rt_row_identity_temperatures(const struct rt_row_identity *id, char out[128]);
/* Fills key from ids. */
void rt_rows_key(const uint32_t *ids, int64_t n, uint8_t key[RT_KEY_BYTES]);
/* FORMAT where a block breaks a rule above (order of ids, ranges, positions, finite numbers, n_ids); `where` is for messages. */
enum rt_status rt_rows_check(const struct rt_rows *rows, const struct rt_row_identity *id, const char *where, struct rt_err *err);

/* Takes blocks in input order. put copies what it needs. finish publishes the last bytes; without it nothing unfinished shows.
 * put_all (NULL where a sink has none) is put of rows [n] one after the other, for sinks that can work on several at a time. */
struct rt_row_sink {
    void *self;
    enum rt_status (*put)(void *self, const struct rt_rows *rows, struct rt_err *err);
    enum rt_status (*finish)(void *self, struct rt_err *err);
    enum rt_status (*put_all)(void *self, const struct rt_rows *rows, int64_t n, struct rt_err *err);
};

/* Hands blocks out. get(i) for i in [0, count): any order; the block is valid until the next get on the same source.
 * A stream has count -1 and hands out i = 0, 1, 2, ... until *end. */
struct rt_row_source {
    void *self;
    int64_t count;
    const struct rt_row_identity *identity;
    enum rt_status (*get)(void *self, int64_t i, struct rt_rows *out, bool *end, struct rt_err *err);
};

#ifdef __cplusplus
}
#endif
#endif
