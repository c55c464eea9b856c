/* Measured choices of algorithms for products, kept in a file so that a run that is resumed multiplies as it did before. Host code alone: core/cuda/lt.c
 * measures, this keeps.
 *
 * The file is text, written whole (temporary, fsync, rename) whenever a choice is added, before its product's result is used:
 *
 *     retort products 1
 *     gpu NVIDIA H200, 132 multiprocessors
 *     library 130100 workspace 67108864
 *     product M N K lda ldb ldd batch a_stride b_stride d_stride align_a align_b align_d flags  rank first_us best_us  algo0 .. algo7
 *     ...
 *     sha256 HEX                       of all bytes above this line
 *
 * Numbers are decimal, times in nanoseconds, words of the algorithm (the library's own 64 bytes, or lt.c's name for a product of ours) hexadecimal. A
 * file of another GPU, library or workspace is left aside, with a note: its choices mean nothing here. A damaged one is an error: without it the run
 * could not go on with the same bytes. Every algorithm is checked before it is used (lt.c).
 */
#ifndef RT_CORE_CUDA_TUNE_H
#define RT_CORE_CUDA_TUNE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What an algorithm depends on; compared as bytes, so made from zeroed memory. Without padding: 104 bytes. */
struct rt_product_key {
    int64_t M, N, K, lda, ldb, ldd, batch, a_stride, b_stride, d_stride;
    int32_t align_a, align_b, align_d, flags;
};
enum { RT_ALGO_WORDS = 8 };
struct rt_product_choice {
    struct rt_product_key key;
    uint64_t algo[RT_ALGO_WORDS];
    int32_t rank;              /* its place among the candidates; 0: the library's first choice */
    int64_t first_ns, best_ns; /* times of the library's first choice and of this one */
};

struct rt_tune;
/* path NULL: in memory alone. The file need not exist. gpu, library, workspace: whose choices these are. note [cap]: "" or a sentence for the log.
 * Errors: FORMAT damaged, IO. */
enum rt_status rt_tune_open(const char *path, const char *gpu, uint64_t library, uint64_t workspace, struct rt_tune **out, char *note, int cap,
                            struct rt_err *err);
void rt_tune_close(struct rt_tune *t); /* NULL is fine */
const char *rt_tune_path(const struct rt_tune *t); /* for messages */

/* NULL: not measured yet. Valid until the next add. */
const struct rt_product_choice *rt_tune_find(const struct rt_tune *t, const struct rt_product_key *key);
/* The one whose key is this but for more tokens, N or (in_k) K; of several the one with the fewest. NULL: none. */
const struct rt_product_choice *rt_tune_find_wider(const struct rt_tune *t, const struct rt_product_key *key, bool in_k);
/* Keeps a choice whose key is new, and writes the file. */
enum rt_status rt_tune_add(struct rt_tune *t, const struct rt_product_choice *c, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
