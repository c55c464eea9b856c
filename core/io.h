/* Files: whole reads and writes, and publishing a file so that it is either absent or complete.
 *
 * Files are read with pread into owned buffers and never mapped: a vanished file must be an error, not a signal. EINTR and
 * short transfers are handled here and nowhere else.
 */
#ifndef RT_CORE_IO_H
#define RT_CORE_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/mem.h"
#include "core/sha256.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Opens for reading; *size = bytes of the regular file. Errors IO (names path). Close with rt_file_close. */
enum rt_status rt_file_open(const char *path, int *fd, uint64_t *size, struct rt_err *err);
void rt_file_close(int fd); /* fd < 0 is fine */
/* Exactly n bytes at off; a short file is FORMAT with offset, expected and found. path is for messages. */
enum rt_status rt_file_pread(int fd, const char *path, void *dst, size_t n, uint64_t off, struct rt_err *err);
/* Hashes the first n bytes, as rt_sha256_update does. Errors of rt_file_pread. */
enum rt_status rt_file_hash(int fd, const char *path, uint64_t n, struct rt_sha256 *sha, struct rt_err *err);
/* Appends the whole file to *out and a terminating 0 (not counted). Refuses more than max bytes with FORMAT. */
enum rt_status rt_file_read_all(const char *path, size_t max, struct rt_buf *out, struct rt_err *err);

/* Publish: bytes go to "PATH.tmp"; commit does fsync, rename to PATH, fsync of the directory; abort removes it. */
struct rt_publish {
    int fd; /* -1: not open */
    uint64_t written;
    char path[4096], tmp[4096 + 8];
};
enum rt_status rt_publish_open(struct rt_publish *p, const char *path, struct rt_err *err);
/* Goes on behind the first `bytes` bytes of a "PATH.tmp" that an earlier process left; what follows them is cut off. */
enum rt_status rt_publish_reopen(struct rt_publish *p, const char *path, uint64_t bytes, struct rt_err *err);
enum rt_status rt_publish_write(struct rt_publish *p, const void *data, size_t n, struct rt_err *err);
enum rt_status rt_publish_commit(struct rt_publish *p, struct rt_err *err);
void rt_publish_abort(struct rt_publish *p); /* after commit or on a zeroed struct with fd -1: does nothing */
enum rt_status rt_publish_bytes(const char *path, const void *data, size_t n, struct rt_err *err);

/* Appends one whole record to a file (created if absent) and fsyncs it: a crash leaves at most one torn last line. A record
 * that ends a line first cuts off such a torn line; a record that could not be written whole is cut off again. */
enum rt_status rt_file_append_sync(const char *path, const void *data, size_t n, struct rt_err *err);
enum rt_status rt_fsync_dir(const char *path, struct rt_err *err);

enum rt_status rt_mkdirs(const char *path, struct rt_err *err); /* like mkdir -p */
bool rt_path_exists(const char *path);
bool rt_path_is_dir(const char *path);
bool rt_path_has(const char *dir, const char *name); /* DIR/NAME exists */
/* out = dir "/" name; USAGE if it does not fit. */
enum rt_status rt_path_join(char *out, size_t cap, const char *dir, const char *name, struct rt_err *err);
/* Free bytes of the file system that holds path (or its nearest existing parent). */
enum rt_status rt_disk_free(const char *path, uint64_t *bytes, struct rt_err *err);
/* Exclusive lock on DIR/.lock for the life of *fd; REFUSED where another process holds it. */
enum rt_status rt_lock_dir(const char *dir, int *fd, struct rt_err *err);
/* Names in dir ("." and ".." left out), sorted bytewise; free with rt_names_free. */
enum rt_status rt_list_dir(const char *dir, char ***names, size_t *n, struct rt_err *err);
void rt_names_free(char **names, size_t n);

#ifdef __cplusplus
}
#endif
#endif
