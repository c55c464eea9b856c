/* TCP between cooperating processes: connections with deadlines, and exchanges with many peers at once that never block on one of them.
 *
 * Sockets are non-blocking; every wait is a poll with an end. What comes in goes into memory of the caller of a size that the caller chose:
 * no length is ever taken from the network. Signals do not end a wait; who asks to stop does.
 */
#ifndef RT_CORE_NET_H
#define RT_CORE_NET_H

#include <stdbool.h>
#include <stddef.h>

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RT_NET_HOST = 64 }; /* room for a numeric address */

/* How long a wait may last: until a moment of rt_now, whatever moves meanwhile, or until somebody asks to stop, who is listened to several times a
 * second: INTERRUPTED. */
struct rt_net_wait {
    double until;
    bool (*stop)(void *self); /* NULL: nobody asks */
    void *stop_self;
};
/* One that begins now and may last `seconds`. */
struct rt_net_wait rt_net_deadline(double seconds);

/* Listens on every address of this machine; port 0: any free one. *bound (may be NULL) = the port. IO; REFUSED where the port is taken. */
enum rt_status rt_net_listen(int port, int *fd, int *bound, struct rt_err *err);
/* Waits until one of n sockets (-1: left out) has something to take: a connection, bytes, or an end. ready [n]: which; none where the time is over. */
enum rt_status rt_net_ready(const int *fd, int n, struct rt_net_wait wait, bool *ready, struct rt_err *err);
/* The next connection that is there already, with the peer's numeric address; *fd -1: none is. Waits for nothing. */
enum rt_status rt_net_accept(int listener, int *fd, char host[RT_NET_HOST], struct rt_err *err);
/* Tries until somebody listens there or the time is over. IO, with the last reason. */
enum rt_status rt_net_connect(const char *host, int port, struct rt_net_wait wait, int *fd, struct rt_err *err);
void rt_net_close(int fd); /* -1 is fine */

/* What one peer is sent and what comes from it: two parts each, one behind the other. */
struct rt_net_part {
    void *data; /* sent parts are only read */
    size_t bytes;
};
struct rt_net_io {
    int fd;
    struct rt_net_part send[2], recv[2];
    /* Called when recv[0] is complete (NULL: nothing to check); may change recv[1]. An error ends the exchange. */
    enum rt_status (*check)(void *self, struct rt_net_io *io, struct rt_err *err);
    void *self;
    size_t sent, received; /* begin with 0 */
};
/* Until every part of all n is through. timeout: seconds in which nothing at all may move. *at = the peer that an error is about (-1: none, nothing
 * moved for too long). IO: a peer closed the connection, failed, or nothing moved. */
enum rt_status rt_net_exchange(struct rt_net_io *io, int n, double timeout, int *at, struct rt_err *err);
/* All bytes to or of one peer before the time is over. */
enum rt_status rt_net_send(int fd, const void *data, size_t bytes, struct rt_net_wait wait, struct rt_err *err);
enum rt_status rt_net_recv(int fd, void *data, size_t bytes, struct rt_net_wait wait, struct rt_err *err);
/* Takes what has come in already of `bytes`, *done of which were taken before. Waits for nothing. IO: the peer closed the connection, or it failed. */
enum rt_status rt_net_recv_some(int fd, void *data, size_t bytes, size_t *done, struct rt_err *err);
/* Copies what has come in already, at most `bytes`, and leaves it there; *n = how much. IO: the peer closed the connection, or it failed. */
enum rt_status rt_net_peek(int fd, void *data, size_t bytes, size_t *n, struct rt_err *err);

#ifdef __cplusplus
}
#endif
#endif
