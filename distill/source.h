/* What a student is trained on or held against: sequences with targets, some of them with teacher rows and states.
 *
 * A set is one --data argument: a shard set, JSON lines (tokenised with the student's own tokenizer and template, held in
 * memory), or a row source in memory. Each hands out rt_rows; lines have n_rows 0 and no states. Decoded shard sequences are
 * kept while they fit into cache_bytes, so that a small set is decoded once. Several threads may read a set, each through a reader.
 *
 * A row is a training row where loss_mask[position + 1] is 1: row i predicts token i + 1. Teacher rows elsewhere are not used.
 */
#ifndef RT_DISTILL_SOURCE_H
#define RT_DISTILL_SOURCE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/log.h"
#include "distill/model_dir.h"
#include "formats/rows.h"
#include "formats/shard.h"

enum rt_train_kind { RT_TRAIN_SHARDS, RT_TRAIN_LINES, RT_TRAIN_MEMORY };

struct rt_train_set_options {
    const struct rt_model_dir *model; /* the student's; borrowed */
    int64_t vocab;                    /* rows of the student's head: every id must be below */
    int64_t max_length;               /* longest sequence in tokens that the student takes */
    bool drop_long;                   /* leave longer ones out; else they are REFUSED */
    bool features;                    /* states are kept in the cache too */
    size_t cache_bytes;
};

struct rt_train_info {
    enum rt_train_kind kind;
    const char *path;      /* "memory" for a source in memory */
    int64_t sequences, tokens, longest, left_out;
    int top_k, n_lse;      /* 0: no teacher rows */
    char sha256[65];       /* over key and occurrence of the sequences in order */
    char content_sha256[65]; /* the same and what is learnt of them: loss masks; of shards the identity and the checksum of every sequence; of a
                              * source in memory the keys alone */
    size_t held;           /* bytes of memory that it takes in any case: its index, and of lines all of them */
    size_t decoded;        /* bytes of its sequences where every one is kept (cache_bytes bounds it); 0 for lines and a source in memory */
    const struct rt_row_identity *identity; /* NULL for lines */
    const struct rt_shard_info *shards;     /* NULL unless shards */
};

struct rt_train_set;
/* path: a shard set's directory or shard, else JSON lines (a file, or a directory of traces). REFUSED: another tokenizer than the
 * student's (both hashes), ids beyond its vocabulary, a sequence over max_length. FORMAT: the files, no sequence at all. */
enum rt_status rt_train_set_open(const char *path, const struct rt_train_set_options *o, struct rt_log *log, struct rt_train_set **out,
                                 struct rt_err *err);
/* Sequences of a source with a count; borrows it. The same refusals. */
enum rt_status rt_train_set_memory(const struct rt_row_source *source, const struct rt_train_set_options *o, struct rt_train_set **out,
                                   struct rt_err *err);
void rt_train_set_free(struct rt_train_set *s); /* NULL is fine */
const struct rt_train_info *rt_train_set_info(const struct rt_train_set *s);

/* cache_bytes from now on, before anything was decoded or a reader opened. */
void rt_train_set_cache(struct rt_train_set *s, size_t cache_bytes);

/* Of sequence i in [0, sequences), without decoding it. */
int64_t rt_train_set_length(const struct rt_train_set *s, int64_t i);
void rt_train_set_key(const struct rt_train_set *s, int64_t i, uint8_t key[RT_KEY_BYTES], uint32_t *occurrence, int64_t *line);
/* *n = targets: masked-in tokens behind the first. Decodes the sequence the first time. */
enum rt_status rt_train_set_targets(struct rt_train_set *s, int64_t i, int64_t *n, struct rt_err *err);
/* As rt_train_set_targets where it is known without decoding, else -1. Callable from any thread. */
int64_t rt_train_set_known_targets(struct rt_train_set *s, int64_t i);
/* The sequence. Valid until the next call on this set. */
enum rt_status rt_train_set_get(struct rt_train_set *s, int64_t i, struct rt_rows *out, struct rt_err *err);

/* The same set for another thread: files and buffers of its own, cache and counts in common. s must outlive it. USAGE for a source in
 * memory, which serves one thread. */
struct rt_train_reader;
enum rt_status rt_train_reader_open(struct rt_train_set *s, struct rt_train_reader **out, struct rt_err *err);
void rt_train_reader_free(struct rt_train_reader *r); /* NULL is fine */
/* Valid until the next call on this reader. */
enum rt_status rt_train_reader_get(struct rt_train_reader *r, int64_t i, struct rt_rows *out, struct rt_err *err);

/* Index of temperature T among those stored, -1: not stored (or no rows). */
int rt_train_set_lse(const struct rt_train_set *s, double T);

#endif
