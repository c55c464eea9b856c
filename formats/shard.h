/* Row shards: a set on disk as sink and source of row blocks (formats/rows.h). Byte layout: formats/FORMATS.md.
 *
 * A set is a directory: identity.json, rows-*.msgpack (shards) and a manifest of JSON lines, one a shard. What is not in the
 * manifest does not exist. Shards are cut by input order and row count: the sequence that brings a shard to rows_per_shard
 * or more rows is its last (rt_shard_sink_cut ends one earlier). So a restart that puts the same blocks from the resume point on yields the same bytes.
 *
 * With parts, machine I of N writes its own manifest and its own file names; copying all into one directory merges them.
 */
#ifndef RT_FORMATS_SHARD_H
#define RT_FORMATS_SHARD_H

#include <stdbool.h>
#include <stdint.h>

#include "core/log.h"
#include "core/status.h"
#include "formats/json.h"
#include "formats/rows.h"
#include "formats/safetensors.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_SHARD_ROWS = 65536, RT_SHARD_LEVEL = 1 };

struct rt_shard_options {
    int64_t rows_per_shard; /* 0: RT_SHARD_ROWS */
    int level;              /* zlib level 1..9; 0: RT_SHARD_LEVEL */
    int part, n_parts;      /* 0 <= part < n_parts; n_parts 0: one part */
};

struct rt_shard_resume {
    int64_t sequences;   /* already published or held by this part: skip as many */
    int64_t rows;
    int64_t source_line; /* of the last one of them; 0: none */
    bool finished;       /* finish was called: nothing is left to do, put is REFUSED */
};

/* Opens dir (made if absent) for writing and locks it. REFUSED where it holds rows of another identity or layout, both
 * values shown, or where another process writes it. *sink borrows *out. */
struct rt_shard_sink;
enum rt_status rt_shard_sink_open(const char *dir, const struct rt_row_identity *id, const struct rt_shard_options *opt,
                                  struct rt_shard_sink **out, struct rt_row_sink *sink, struct rt_shard_resume *resume,
                                  struct rt_err *err);
/* Makes what was put so far survive a crash: sequences of the shard that is being written count as put when the set is opened
 * again (resume.sequences), and the shard goes on behind them. They are synced, and DIR/NAME.hold says where they end. */
enum rt_status rt_shard_sink_hold(struct rt_shard_sink *s, struct rt_err *err);
/* Releases and unlocks; what was put since the last published shard and the last hold is dropped unless the sink was finished. NULL is
 * fine. */
void rt_shard_sink_free(struct rt_shard_sink *s);
/* A retargeted set's report on the sequences of a shard, JSON text of at most 32 KiB: goes into the header of the shard that the
 * next put opens. Copied. */
enum rt_status rt_shard_sink_report(struct rt_shard_sink *s, const char *json, size_t len, struct rt_err *err);
/* put and put_all check and compress blocks by the pool's threads from now on, and write them in order: the set is the same, byte for byte. The pool
 * is borrowed until it is replaced (NULL: the calling thread alone, as at first) or the sink is freed. */
struct rt_pool;
void rt_shard_sink_threads(struct rt_shard_sink *s, struct rt_pool *pool);
/* Bytes that packing holds at most with so many threads, sequences of up to `longest` tokens, their text left out. */
uint64_t rt_shard_sink_pack_bytes(const struct rt_row_identity *id, int64_t longest, int threads);
/* Publishes the shard that is being written, where it has a sequence: the next put opens another. For writers that have a reason of their own to end
 * a shard below rows_per_shard; so that a restart yields the same bytes, the reason must lie in the sequences alone. */
enum rt_status rt_shard_sink_cut(struct rt_shard_sink *s, struct rt_err *err);
/* Bytes published by this sink so far (all shards of the part). */
uint64_t rt_shard_sink_bytes(const struct rt_shard_sink *s);

/* Dense sets (top_k 0, a whole final state a token): the head of the teacher's checkpoint [vocab, dim], as it is stored, once as DIR/head.safetensors,
 * tensor "lm_head.weight". logits of row i = head * final state of token i. FORMAT where the model has none, SHAPE where it is not BF16, F16 or F32. */
enum rt_status rt_shard_keep_head(const char *dir, const struct rt_tensors *model, struct rt_err *err);

/* What the index knows of a sequence without decoding it. */
struct rt_seq_info {
    uint8_t key[RT_KEY_BYTES];
    uint32_t occurrence;
    int shard;                /* index for rt_shard_set_file */
    int64_t ordinal;          /* within its part */
    int64_t source_line;
    int64_t n_tokens, n_rows;
    float mass[RT_MAX_LSE];   /* mean over rows of sum_j exp(logit_j/T - lse_T), for each T of the identity */
    float nll;                /* mean over rows of -next_logprob, nats */
    uint64_t offset, bytes;   /* of its blocks in the shard */
    uint32_t crc;             /* zlib crc32 of these bytes */
};

/* put in two halves: packing (checks, statistics, compression: nearly all of its time) by several threads, writing by one. The set is the
 * same, byte for byte. */
struct rt_shard_packed {
    struct rt_buf bytes; /* owned */
    struct rt_seq_info info;
};
/* rows as the sequence that will be put behind `ahead` others from now on; *out is filled anew. Callable from several threads at once while nobody
 * puts. FORMAT as put. */
enum rt_status rt_shard_sink_pack(const struct rt_shard_sink *s, const struct rt_rows *rows, int64_t ahead, struct rt_shard_packed *out,
                                  struct rt_err *err);
/* USAGE where other sequences were put in between. */
enum rt_status rt_shard_sink_put_packed(struct rt_shard_sink *s, const struct rt_shard_packed *p, struct rt_err *err);

struct rt_shard_info {
    int64_t shards, sequences, tokens, rows;
    uint64_t bytes;
    int n_parts, parts_present;
    bool finished;                /* every part is there and was finished */
    char missing[160];            /* "": none is; else which parts are missing or unfinished: "part 2 of 8 is missing, part 5 is unfinished" */
    double mass[RT_MAX_LSE];      /* row-weighted means of the above */
    double mass_min[RT_MAX_LSE];  /* smallest sequence mean */
    double nll;
};

/* path: a set's directory, or one shard file. Reads manifests, headers and indexes; checks sizes, checksums of header and
 * index, and that all shards have one identity. FORMAT, IO, REFUSED. */
struct rt_shard_set;
enum rt_status rt_shard_set_open(const char *path, struct rt_shard_set **out, struct rt_err *err);
/* The same set for another thread: files and buffers of its own, the index of s, which must outlive it. */
enum rt_status rt_shard_set_again(const struct rt_shard_set *s, struct rt_shard_set **out, struct rt_err *err);
void rt_shard_set_free(struct rt_shard_set *s); /* NULL is fine */
const struct rt_row_identity *rt_shard_set_identity(const struct rt_shard_set *s);
const struct rt_shard_info *rt_shard_set_info(const struct rt_shard_set *s);
const struct rt_seq_info *rt_shard_set_seq(const struct rt_shard_set *s, int64_t i); /* i in [0, sequences) */
const char *rt_shard_set_file(const struct rt_shard_set *s, int shard);             /* path */
/* The report in a shard's header: JSON text, "" where there is none. Terminated. */
const char *rt_shard_set_report(const struct rt_shard_set *s, int shard);
/* Reads and decodes sequence i; checksums first, then every rule of rt_rows_check. *out is valid until the next get. A set
 * serves one thread; rt_shard_set_again for another. */
enum rt_status rt_shard_set_get(struct rt_shard_set *s, int64_t i, struct rt_rows *out, struct rt_err *err);
/* The set as a source; borrows s. */
struct rt_row_source rt_shard_set_source(struct rt_shard_set *s);
/* Every shard against the manifest's SHA-256, and every sequence decoded. The first fault is the error. log may be NULL. */
enum rt_status rt_shard_set_verify(struct rt_shard_set *s, struct rt_log *log, struct rt_err *err);

/* REFUSED where have and want differ in anything but teacher_name: names the field and both values. */
enum rt_status rt_row_identity_match(const struct rt_row_identity *have, const struct rt_row_identity *want, const char *where,
                                     struct rt_err *err);
/* Members of an identity as JSON (identity.json, inspect), added to object v; and the way back. */
enum rt_status rt_row_identity_to_json(const struct rt_row_identity *id, struct rt_json *v, struct rt_err *err);
enum rt_status rt_row_identity_from_json(const struct rt_json *v, struct rt_row_identity *id, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
