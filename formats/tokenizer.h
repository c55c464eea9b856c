/* Text <-> ids: byte-level BPE as a Hugging Face tokenizer.json describes it.
 *
 * Encoding: added tokens are found in the text (leftmost, then longest; the flags normalized, lstrip, rstrip and single_word
 * are honoured), what lies between them is normalised (nothing or NFC), cut into words by the pre-tokenizer, and each word
 * merged by rank. Nothing is added: no BOS, no EOS. Decoding is the concatenation of the tokens' bytes.
 *
 * Refused by name: model types other than BPE, vocabularies that lack one of the 256 bytes, normalizers and pre-tokenizers
 * that are not listed in pretokenizer.h. Limits: file 64 MiB, 1 Mi ids, 2 Mi merges, 1,024 bytes a token.
 *
 * A tokenizer holds scratch memory and a cache of words: one caller at a time for encode; everything else is read-only.
 */
#ifndef RT_FORMATS_TOKENIZER_H
#define RT_FORMATS_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_TOKEN_MAX_BYTES = 1024, RT_TOKENIZER_MAX_IDS = 1 << 20, RT_TOKENIZER_MAX_MERGES = 2 << 20 };

struct rt_tokenizer;

/* path: a model directory (tokenizer.json, and tokenizer_config.json where there is one), or a tokenizer.json.
 * Errors: IO; FORMAT (damaged, over a limit, duplicate or missing ids); UNSUPPORTED (another kind of tokenizer). */
enum rt_status rt_tokenizer_load(const char *path, struct rt_tokenizer **out, struct rt_err *err);
void rt_tokenizer_free(struct rt_tokenizer *t); /* NULL is fine */

/* 1 + the largest id of tokenizer.json. Ids below it may be unused. */
uint32_t rt_tokenizer_n_ids(const struct rt_tokenizer *t);
const char *rt_tokenizer_sha256(const struct rt_tokenizer *t); /* of tokenizer.json, 64 hexadecimal digits */
const char *rt_tokenizer_path(const struct rt_tokenizer *t);   /* of tokenizer.json, for messages */
bool rt_tokenizer_normalizes(const struct rt_tokenizer *t);    /* NFC: ids of other text decode to other bytes */

/* The bytes that id decodes to (an added token: its content), valid as long as t; false where no token has this id. */
bool rt_tokenizer_bytes(const struct rt_tokenizer *t, uint32_t id, const char **bytes, size_t *len);
/* The id whose bytes these are: an added token first, then the vocabulary. */
bool rt_tokenizer_find(const struct rt_tokenizer *t, const char *bytes, size_t len, uint32_t *id);
bool rt_tokenizer_is_added(const struct rt_tokenizer *t, uint32_t id);
bool rt_tokenizer_is_special(const struct rt_tokenizer *t, uint32_t id); /* "special": true */

/* From tokenizer_config.json; -1 where it names none (or there is no such file, or the name has no id). */
int64_t rt_tokenizer_bos(const struct rt_tokenizer *t);
int64_t rt_tokenizer_eos(const struct rt_tokenizer *t);
int64_t rt_tokenizer_pad(const struct rt_tokenizer *t);
/* Does raw text begin with BOS: "add_bos_token" where the configuration has it, else whether the post-processor of
 * tokenizer.json puts a special token in front. */
bool rt_tokenizer_add_bos(const struct rt_tokenizer *t);

/* Ids of a text, growing. A zeroed struct is empty. */
struct rt_encoding {
    uint32_t *ids;      /* [n] */
    uint32_t *byte_end; /* [n] end of each token's bytes in the decoded text, counted from the first id of the struct */
    size_t n, cap;
};
void rt_encoding_free(struct rt_encoding *e); /* releases and zeroes *e */
/* Appends the ids of text[0 .. len). FORMAT for invalid UTF-8 (with its offset) and for text over 1 GiB; UNSUPPORTED where a
 * pattern of the file cannot be matched in bounded effort (names it). After an error e is as it was. */
enum rt_status rt_tokenizer_encode(struct rt_tokenizer *t, const char *text, size_t len, struct rt_encoding *e,
                                   struct rt_err *err);
/* Appends the ids of one word of any bytes (at most RT_WORD_MAX of bpe.h), merged as they are: no added tokens, no normalising, no
 * pre-tokenizer. After an error e is as it was. */
enum rt_status rt_tokenizer_encode_word(struct rt_tokenizer *t, const char *bytes, size_t len, struct rt_encoding *e,
                                        struct rt_err *err);
/* Appends one id. FORMAT where no token has it. */
enum rt_status rt_encoding_push(struct rt_encoding *e, const struct rt_tokenizer *t, uint32_t id, struct rt_err *err);

/* Appends the bytes of the ids to *out: any bytes, not always UTF-8. skip_special leaves out tokens with "special": true.
 * FORMAT where no token has an id (names index and id). */
enum rt_status rt_tokenizer_decode(const struct rt_tokenizer *t, const uint32_t *ids, size_t n, bool skip_special,
                                   struct rt_buf *out, struct rt_err *err);
/* byte_end[i] (+= nothing, = end of token i's bytes from 0), byte_end has room for n. FORMAT as decode. */
enum rt_status rt_tokenizer_byte_ends(const struct rt_tokenizer *t, const uint32_t *ids, size_t n, uint32_t *byte_end,
                                      struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
