/* Inside the tokenizer: its parts, shared by the loader and the encoder. */
#ifndef RT_FORMATS_TOKENIZER_INTERNAL_H
#define RT_FORMATS_TOKENIZER_INTERNAL_H

#include "formats/bpe.h"
#include "formats/pretokenizer.h"
#include "formats/tokenizer.h"

struct rt_added {
    const char *text; /* what is searched for: the content, normalised for the second finder */
    uint32_t len, id;
    bool single_word, lstrip, rstrip;
};

/* Added tokens by content, ascending bytewise. */
struct rt_finder {
    struct rt_added *token;
    uint32_t n;
    uint32_t first[257]; /* first[b]: the first one that begins with a byte >= b */
};
struct rt_found {
    const struct rt_added *token; /* NULL: text between tokens */
    size_t begin, end;
};
/* Sorts f->token[0 .. n). FORMAT where two have the same text. */
enum rt_status rt_finder_build(struct rt_finder *f, struct rt_err *err);
/* The next stretch of text[*at .. len): a token with the white space that it takes along, or what lies before one; *at moves
 * behind it. `next` keeps a token that was found behind a stretch. False at the end. */
struct rt_search {
    const struct rt_finder *finder;
    const char *text;
    size_t len, done, from; /* everything before done was handed out; the search goes on at from */
    struct rt_found next;
    bool pending;
};
bool rt_search_next(struct rt_search *s, struct rt_found *out);

struct rt_tokenizer {
    char path[4096];
    char sha256[65];
    struct rt_vocab vocab;
    struct rt_bpe *bpe;
    struct rt_pretokenizer *pre;
    struct rt_finder raw, normalized; /* before and after normalising */
    struct rt_buf added_text;         /* bytes of both finders */
    bool nfc, add_bos;
    int64_t bos, eos, pad;
    struct rt_buf scratch;            /* a normalised section */
};

#endif
