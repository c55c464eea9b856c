/* What happens to text between added tokens before BPE: it is cut into words.
 *
 * Known: a Sequence of Split (Regex or String; the behaviours Isolated, Removed, Contiguous, MergedWithPrevious,
 * MergedWithNext; invert), Digits (individual_digits), and at its end ByteLevel (add_prefix_space false; use_regex). Each
 * step sees the pieces that the one before left, each as a text of its own.
 */
#ifndef RT_FORMATS_PRETOKENIZER_H
#define RT_FORMATS_PRETOKENIZER_H

#include <stddef.h>

#include "core/status.h"
#include "formats/json.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_piece {
    size_t begin, end; /* bytes of the text */
};
/* Growing; a zeroed struct is empty. */
struct rt_pieces {
    struct rt_piece *at;
    size_t n, cap;
};
void rt_pieces_free(struct rt_pieces *p); /* releases and zeroes *p */

struct rt_pretokenizer;
/* json: the member "pre_tokenizer" of a tokenizer.json. UNSUPPORTED names what is not known. */
enum rt_status rt_pretokenizer_create(const struct rt_json *json, struct rt_pretokenizer **out, struct rt_err *err);
void rt_pretokenizer_free(struct rt_pretokenizer *p); /* NULL is fine */
/* Words of the valid UTF-8 text, in order, none empty. *words is owned by p and valid until the next call; one caller at a
 * time. UNSUPPORTED: a pattern that cannot be matched in bounded effort. */
enum rt_status rt_pretokenizer_split(struct rt_pretokenizer *p, const char *text, size_t len, const struct rt_pieces **words,
                                     struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
