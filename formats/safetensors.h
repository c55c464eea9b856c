/* Safetensors: an index of the tensors of a model on disk, and a writer.
 *
 * File: u64 header length N, N bytes of JSON {name: {"dtype","shape","data_offsets":[b,e]}, "__metadata__": {..}}, then the
 * data; offsets count from byte 8 + N. A model is a directory (model.safetensors.index.json and its shards, or one
 * model.safetensors) or one file. Opening reads headers only, and checks them wholly against the files: header <= 100 MB
 * and starting with '{', names unique and <= 512 bytes, at most RT_MAX_TENSORS tensors, products of dimensions without
 * overflow, data that cover the file without hole or overlap, every name of the index in the shard that it names, shards
 * plain names inside the directory. After that every tensor's (file, offset, bytes) lies inside its file.
 *
 * Tensors are row-major, ne[0] outermost. An index is immutable after open: any number of threads may use it.
 */
#ifndef RT_FORMATS_SAFETENSORS_H
#define RT_FORMATS_SAFETENSORS_H

#include <stdint.h>

#include "core/dtype.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_MAX_NDIM = 8, RT_MAX_TENSORS = 1 << 20, RT_MAX_TENSOR_NAME = 512 };

struct rt_tensor {
    const char *name;
    enum rt_dtype dtype;
    int ndim;                /* 0: a scalar, one element */
    int64_t ne[RT_MAX_NDIM]; /* 1 beyond ndim */
    int file;                /* index for rt_tensors_file, rt_tensors_fd */
    uint64_t offset;         /* from the start of the file */
    uint64_t bytes;
};

struct rt_tensors;

/* path: directory or file. FORMAT, IO, UNSUPPORTED (an element type that core/dtype.h lacks). Keeps its files open. */
enum rt_status rt_tensors_open(const char *path, struct rt_tensors **out, struct rt_err *err);
void rt_tensors_free(struct rt_tensors *t); /* NULL is fine */

/* Tensors in file order: by shard (in order of name), then offset. */
int64_t rt_tensors_count(const struct rt_tensors *t);
const struct rt_tensor *rt_tensors_at(const struct rt_tensors *t, int64_t i);
const struct rt_tensor *rt_tensors_find(const struct rt_tensors *t, const char *name); /* NULL where absent */
uint64_t rt_tensors_total_bytes(const struct rt_tensors *t);
const char *rt_tensors_path(const struct rt_tensors *t);
/* For a loader that streams: pread(fd, dst, bytes, offset) from any thread. */
int rt_tensors_n_files(const struct rt_tensors *t);
const char *rt_tensors_file(const struct rt_tensors *t, int file); /* path */
int rt_tensors_fd(const struct rt_tensors *t, int file);
/* Identity, 64 hexadecimal digits: SHA-256 of config.json (if any) followed by the index, or by the header where there is
 * no index. For one file: of its header. */
const char *rt_tensors_sha256(const struct rt_tensors *t);

/* One tensor that must be there. dtypes: OR of RT_DT(...), 0: any. ndim -1: any; dims[i] -1: any (dims NULL: any).
 * FORMAT where absent (names the nearest name), SHAPE where dtype or shape differ: expected and found. */
#define RT_DT(t) (1u << (unsigned)(t))
enum rt_status rt_tensors_get(const struct rt_tensors *t, const char *name, unsigned dtypes, int ndim, const int64_t *dims,
                              const struct rt_tensor **out, struct rt_err *err);

/* dst [tensor->bytes] = the tensor as stored. */
enum rt_status rt_tensors_read(const struct rt_tensors *t, const struct rt_tensor *tensor, void *dst, struct rt_err *err);
/* dst [n] = bytes first .. first+n of the tensor; USAGE where they are outside. */
enum rt_status rt_tensors_read_range(const struct rt_tensors *t, const struct rt_tensor *tensor, uint64_t first, uint64_t n,
                                     void *dst, struct rt_err *err);
/* dst [elements] = (float) elements first .. first+n; F32, F16, BF16, E4M3, F64, else UNSUPPORTED. */
enum rt_status rt_tensors_read_f32(const struct rt_tensors *t, const struct rt_tensor *tensor, int64_t first, int64_t n,
                                   float *dst, struct rt_err *err);
int64_t rt_tensor_elements(const struct rt_tensor *tensor);
/* "BF16 [2, 3]" into buf, returned. */
const char *rt_tensor_describe(const struct rt_tensor *tensor, char buf[160]);

/* Writing: tensors are declared first, then their bytes follow in order of declaration, in pieces of any size. Files get
 * "__metadata__": {"format": "pt"} and a header padded with spaces to 8 bytes, and appear whole or not at all. */
struct rt_tensor_decl {
    const char *name;
    enum rt_dtype dtype;
    int ndim;
    int64_t ne[RT_MAX_NDIM];
};
struct rt_tensor_writer;
/* One file. decl and names are copied. USAGE: duplicate or over-long names, bad dimensions. */
enum rt_status rt_tensor_writer_file(const char *path, const struct rt_tensor_decl *decl, int64_t n,
                                     struct rt_tensor_writer **out, struct rt_err *err);
/* A model directory (made if absent): model.safetensors, or where that would exceed max_shard_bytes,
 * model-0000i-of-0000n.safetensors and model.safetensors.index.json (published last) with metadata.total_size. A tensor is
 * never split. 0: no limit. */
enum rt_status rt_tensor_writer_model(const char *dir, const struct rt_tensor_decl *decl, int64_t n, uint64_t max_shard_bytes,
                                      struct rt_tensor_writer **out, struct rt_err *err);
enum rt_status rt_tensor_writer_put(struct rt_tensor_writer *w, const void *data, uint64_t bytes, struct rt_err *err);
/* Publishes; USAGE where bytes are missing. */
enum rt_status rt_tensor_writer_finish(struct rt_tensor_writer *w, struct rt_err *err);
/* After finish of a single file: its size and SHA-256 (sha holds 65). */
void rt_tensor_writer_result(const struct rt_tensor_writer *w, uint64_t *bytes, char *sha);
void rt_tensor_writer_free(struct rt_tensor_writer *w); /* NULL is fine; unfinished files are removed */

#ifdef __cplusplus
}
#endif
#endif
