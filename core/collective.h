/* Several processes that compute one thing together: how they meet, and what they do in step.
 *
 * Every rank holds a connection to every other (core/net.h). A collective is called by all ranks with the same sizes in the same order; each message
 * carries what it belongs to, and ranks that have come out of step find out at the next one. Sums run over ranks in rank order and in
 * float64 and are rounded once: the same ranks give the same bytes. What a rank lacks is waited for at most `timeout` seconds; a rank that ends
 * ends the others with an error that names it, and its own words where it could still send them (rt_comm_abort). Nothing is encrypted: the network
 * between the ranks is the user's own.
 *
 * Meeting: rank 0 listens on host:port. Each other rank connects and says hello (version, rank, size, identity of the run); rank 0 refuses what does
 * not belong, and hands the others' addresses to all; then every pair is connected. All messages of the meeting have one fixed size.
 *
 * A communicator serves one thread. It may be handed to a backend when a device is opened (struct rt_dev_options): host backends run these very
 * collectives on device memory; a backend with memory of its own may build its own transport over them (rt_comm_broadcast carries an id of
 * 128 bytes as well as anything) under the contract of the table's entries.
 */
#ifndef RT_CORE_COLLECTIVE_H
#define RT_CORE_COLLECTIVE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/dtype.h"
#include "core/rank.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_COMM_IDENTITY = 64, RT_COMM_SUM_MAX = 64 };

struct rt_comm;
struct rt_comm_options {
    struct rt_rank rank;
    const char *host;    /* of rank 0; not used by rank 0 itself */
    int port;
    const char *identity; /* what all ranks must agree on, at most RT_COMM_IDENTITY bytes: a hash */
    double join_timeout;  /* seconds until every rank is there */
    double timeout;       /* seconds in which nothing moves during a collective */
    bool (*stop)(void *self); /* asked several times a second while the ranks meet; NULL: nobody asks */
    void *stop_self;
};
/* Blocks until all ranks are connected. IO: a rank did not come or was lost (which), or the meeting place cannot be reached; REFUSED: the port is taken,
 * or this rank does not belong to the run that meets there (what differs); INTERRUPTED: stop said so. A rank alone needs no communicator: size 1 is
 * USAGE. */
enum rt_status rt_comm_open(const struct rt_comm_options *o, struct rt_comm **out, struct rt_err *err);
void rt_comm_free(struct rt_comm *c); /* NULL is fine */
/* 0 and 1 for NULL. */
int rt_comm_rank(const struct rt_comm *c);
int rt_comm_size(const struct rt_comm *c);
/* Tells the others, as far as that goes without waiting, why this rank ends: their next collective fails with these words. NULL is fine. */
void rt_comm_abort(struct rt_comm *c, const char *why);
/* For who waits for the others by other means than these collectives (a GPU's): IO where one of them closed its connection or said why it ends, or
 * where an exchange failed before. Waits for nothing, and takes nothing that a collective would. NULL is fine. */
enum rt_status rt_comm_check(struct rt_comm *c, struct rt_err *err);
/* After such a wait was too long: IO, naming the ranks that do not answer within `seconds`; RT_OK where all do. */
enum rt_status rt_comm_roll_call(struct rt_comm *c, double seconds, struct rt_err *err);
/* Of the options; 0 for NULL. */
double rt_comm_timeout(const struct rt_comm *c);

/* The part of n elements that a rank owns: [*first, *first + *count), runs of equal length, a multiple of 64, the last ones shorter or empty. */
void rt_comm_shard(int64_t n, int rank, int size, int64_t *first, int64_t *count);

/* In place on x [n] of dtype F32, F64 or BF16, host memory. c NULL: one rank, nothing to do. */
/* This rank's shard of x = sum over ranks; the rest of x is unspecified. */
enum rt_status rt_comm_reduce_scatter(struct rt_comm *c, void *x, int64_t n, enum rt_dtype dtype, struct rt_err *err);
/* Every rank's shard of x to all. */
enum rt_status rt_comm_all_gather(struct rt_comm *c, void *x, int64_t n, enum rt_dtype dtype, struct rt_err *err);
enum rt_status rt_comm_all_reduce(struct rt_comm *c, void *x, int64_t n, enum rt_dtype dtype, struct rt_err *err);
/* x [n <= RT_COMM_SUM_MAX] = sum over ranks: counts, losses, norms. */
enum rt_status rt_comm_sum(struct rt_comm *c, double *x, int n, struct rt_err *err);
/* Bytes of rank root to all; of every rank to all (all [size * bytes], in rank order). */
enum rt_status rt_comm_broadcast(struct rt_comm *c, void *data, size_t bytes, int root, struct rt_err *err);
enum rt_status rt_comm_gather(struct rt_comm *c, const void *mine, void *all, size_t bytes, struct rt_err *err);
/* One rank to one other; the rest is not involved. */
enum rt_status rt_comm_send(struct rt_comm *c, int to, const void *data, size_t bytes, struct rt_err *err);
enum rt_status rt_comm_recv(struct rt_comm *c, int from, void *data, size_t bytes, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
