/* Byte-level BPE: a table of tokens, ranked merges, and the ids of one word.
 *
 * A word starts as its single bytes; the pair of neighbours with the lowest rank (the leftmost of equals) is merged until no
 * pair has a rank. A heap of pairs makes that O(n log n). Short words are remembered.
 */
#ifndef RT_FORMATS_BPE_H
#define RT_FORMATS_BPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    RT_TOKEN_USED = 1,    /* the id exists */
    RT_TOKEN_BPE = 2,     /* an ordinary token: BPE makes it */
    RT_TOKEN_ADDED = 4,
    RT_TOKEN_SPECIAL = 8,
};
enum { RT_WORD_MAX = 16 << 20 }; /* bytes of a word between two cuts of the pre-tokenizer */

struct rt_token {
    uint32_t off; /* of its bytes in the pool */
    uint16_t len;
    uint8_t flags;
};

/* id -> bytes, and bytes -> id of the RT_TOKEN_BPE tokens. */
struct rt_vocab {
    struct rt_token *token; /* [n_ids] */
    uint32_t n_ids;
    struct rt_buf pool;
    uint32_t *slot;         /* ids + 1 by hash of their bytes; 0: free */
    size_t mask;
};
/* Room for ids below n_ids, of which n_bpe are RT_TOKEN_BPE. */
enum rt_status rt_vocab_init(struct rt_vocab *v, uint32_t n_ids, size_t n_bpe, struct rt_err *err);
void rt_vocab_free(struct rt_vocab *v);
/* id < n_ids, len <= UINT16_MAX. An id that is in use, or (BPE) bytes that have an id, are FORMAT. */
enum rt_status rt_vocab_put(struct rt_vocab *v, uint32_t id, const char *bytes, size_t len, uint8_t flags, struct rt_err *err);
bool rt_vocab_find(const struct rt_vocab *v, const char *bytes, size_t len, uint32_t *id);

struct rt_bpe;
/* v must outlive the result, hold all 256 single bytes, and not change. ignore_merges: a word that is a token is that token,
 * whatever the merges say. */
enum rt_status rt_bpe_create(const struct rt_vocab *v, size_t n_merges, bool ignore_merges, struct rt_bpe **out, struct rt_err *err);
void rt_bpe_free(struct rt_bpe *b);
/* left right -> made at this rank; a later merge of the same pair replaces the earlier one. At most n_merges calls. */
void rt_bpe_merge(struct rt_bpe *b, uint32_t left, uint32_t right, uint32_t rank, uint32_t made);
/* ids[0 .. *n) of the word, at most len of them. FORMAT over RT_WORD_MAX bytes; NOMEM. */
enum rt_status rt_bpe_encode(struct rt_bpe *b, const char *word, size_t len, uint32_t *ids, size_t *n, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
