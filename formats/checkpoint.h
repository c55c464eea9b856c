/* Training checkpoints: DIR/ckpt-STEP/ with named files and a MANIFEST (JSON: name, bytes, SHA-256 of each), written last.
 *
 * A checkpoint is built in DIR/.ckpt-STEP.tmp/ and published by one rename: it is there whole or not at all. The loader
 * checks the size and hash of every file before use; where one is bad it says so and falls back to the one before.
 */
#ifndef RT_FORMATS_CHECKPOINT_H
#define RT_FORMATS_CHECKPOINT_H

#include <stdint.h>

#include "core/log.h"
#include "core/status.h"
#include "formats/json.h"
#include "formats/safetensors.h"

#ifdef __cplusplus
extern "C" {
#endif

struct rt_ckpt_writer;
/* Starts checkpoint `step` in dir; leftovers of an interrupted one are removed. */
enum rt_status rt_ckpt_begin(const char *dir, int64_t step, struct rt_ckpt_writer **out, struct rt_err *err);
/* A file of tensors (NAME.safetensors says the caller). Put the bytes, in order of declaration, with rt_ckpt_put; the next
 * call that adds a file, or commit, closes it. */
enum rt_status rt_ckpt_tensors(struct rt_ckpt_writer *w, const char *name, const struct rt_tensor_decl *decl, int64_t n,
                               struct rt_err *err);
enum rt_status rt_ckpt_put(struct rt_ckpt_writer *w, const void *data, uint64_t bytes, struct rt_err *err);
/* A file of bytes, a file of JSON. */
enum rt_status rt_ckpt_bytes(struct rt_ckpt_writer *w, const char *name, const void *data, size_t n, struct rt_err *err);
enum rt_status rt_ckpt_json(struct rt_ckpt_writer *w, const char *name, const struct rt_json *v, struct rt_err *err);
/* MANIFEST, fsync, rename; then removes the oldest beyond `keep` (2 at least), and those of later steps, which a resume has
 * given up. Replaces a checkpoint of the same step. */
enum rt_status rt_ckpt_commit(struct rt_ckpt_writer *w, int keep, struct rt_err *err);
void rt_ckpt_writer_free(struct rt_ckpt_writer *w); /* NULL is fine; not committed: removed */

struct rt_ckpt {
    int64_t step;    /* -1: there is none */
    char path[4096]; /* of its directory */
};
/* The newest checkpoint of dir that verifies. Each one passed over is a warning in log that names the bad file. OK with
 * step -1 where dir holds none; FORMAT where it holds some and all are bad. */
enum rt_status rt_ckpt_latest(const char *dir, struct rt_log *log, struct rt_ckpt *out, struct rt_err *err);
/* One checkpoint directory: MANIFEST there and whole, every file of the stated size and hash, no file missing. */
enum rt_status rt_ckpt_verify(const char *path, int64_t *step, struct rt_err *err);
/* The same of the files named alone, for a reader that needs no others: names ends with NULL; one that MANIFEST has not got is FORMAT. */
enum rt_status rt_ckpt_verify_files(const char *path, const char *const *names, int64_t *step, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
