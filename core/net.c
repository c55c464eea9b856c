#include "core/net.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "core/log.h"
#include "core/mem.h"

static const double slice_seconds = 0.1; /* between two questions whether to stop */

struct rt_net_wait rt_net_deadline(double seconds)
{
    return (struct rt_net_wait){.until = rt_now() + seconds};
}

void rt_net_close(int fd)
{
    if (fd >= 0)
        close(fd);
}

static int milliseconds(double deadline)
{
    const double left = (deadline - rt_now()) * 1000;
    return left <= 0 ? 0 : left > 1e6 ? 1000000 : (int)left + 1;
}

static bool stop_asked(const struct rt_net_wait *w)
{
    return w->stop != NULL && w->stop(w->stop_self);
}

/* poll; *ready 0: the time is over. */
static enum rt_status wait_for(struct pollfd *p, int n, const struct rt_net_wait *w, int *ready, struct rt_err *err)
{
    for (;;) {
        const double slice = rt_now() + slice_seconds;
        if (stop_asked(w))
            return rt_fail(err, RT_INTERRUPTED, "interrupted");
        *ready = poll(p, (nfds_t)n, milliseconds(w->stop != NULL && slice < w->until ? slice : w->until));
        if (*ready < 0 && errno != EINTR)
            return rt_fail_errno(err, "waiting for other ranks");
        if (*ready > 0)
            return RT_OK;
        *ready = 0;
        if (rt_now() >= w->until)
            return RT_OK;
    }
}

/* No wait for more to send, and a peer whose machine is gone is noticed within two minutes. */
static enum rt_status prepare(int fd, struct rt_err *err)
{
    const int on = 1, idle = 30, interval = 10, count = 6;
    const unsigned unacknowledged = 120000;
    const int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
        return rt_fail_errno(err, "a socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unacknowledged, sizeof unacknowledged);
    return RT_OK;
}

/* ---- connections ---- */

enum rt_status rt_net_listen(int port, int *out, int *bound, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const int on = 1, off = 0;
    struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port), .sin6_addr = in6addr_any};
    struct sockaddr_in a4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct sockaddr_storage got;
    socklen_t len = sizeof got;
    int fd = socket(AF_INET6, SOCK_STREAM, 0);
    const bool six = fd >= 0;
    if (!six)
        fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0)
        return rt_fail_errno(err, "a socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (six)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, six ? (struct sockaddr *)&a6 : (struct sockaddr *)&a4, six ? sizeof a6 : sizeof a4) != 0) {
        if (errno == EADDRINUSE)
            RT_FAIL(err, REFUSED, "port %d of this machine is taken; another one is chosen with MASTER_PORT", port);
        RT_TRY(rt_fail_errno(err, "port %d", port));
    }
    if (listen(fd, 128) != 0 || getsockname(fd, (struct sockaddr *)&got, &len) != 0)
        RT_TRY(rt_fail_errno(err, "port %d", port));
    RT_TRY(prepare(fd, err));
    if (bound != NULL)
        *bound = ntohs(got.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&got)->sin6_port : ((struct sockaddr_in *)&got)->sin_port);
    *out = fd;
    fd = -1;
out:
    rt_net_close(fd);
    return st;
}

enum rt_status rt_net_ready(const int *fd, int n, struct rt_net_wait wait, bool *ready, struct rt_err *err)
{
    enum rt_status st;
    struct pollfd *p = NULL;
    int some;
    RT_TRY(rt_alloc((size_t)n, sizeof *p, "waiting for connections", &p, err));
    for (int i = 0; i < n; i++)
        p[i] = (struct pollfd){.fd = fd[i], .events = POLLIN};
    RT_TRY(wait_for(p, n, &wait, &some, err));
    for (int i = 0; i < n; i++)
        ready[i] = some > 0 && p[i].revents != 0;
out:
    rt_free(p);
    return st;
}

enum rt_status rt_net_accept(int listener, int *out, char host[RT_NET_HOST], struct rt_err *err)
{
    struct sockaddr_storage peer;
    socklen_t len = sizeof peer;
    *out = -1;
    const int fd = accept(listener, (struct sockaddr *)&peer, &len);
    if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS))
        return rt_fail_errno(err, "taking a connection");
    if (fd < 0) /* it is gone already */
        return RT_OK;
    const enum rt_status st = prepare(fd, err);
    if (st != RT_OK) {
        close(fd);
        return st;
    }
    if (getnameinfo((struct sockaddr *)&peer, len, host, RT_NET_HOST, NULL, 0, NI_NUMERICHOST) != 0)
        host[0] = '\0';
    *out = fd;
    return RT_OK;
}

/* One try at one address; false leaves the reason in errno. */
static bool try_address(const struct addrinfo *a, const struct rt_net_wait *wait, int *out)
{
    int why = 0;
    socklen_t len = sizeof why;
    struct rt_err ignored = {0};
    const int fd = socket(a->ai_family, SOCK_STREAM, 0);
    if (fd < 0 || prepare(fd, &ignored) != RT_OK)
        goto fail;
    if (connect(fd, a->ai_addr, a->ai_addrlen) != 0 && errno != EINPROGRESS)
        goto fail;
    struct pollfd p = {.fd = fd, .events = POLLOUT};
    int n;
    if (wait_for(&p, 1, wait, &n, &ignored) != RT_OK || n == 0) {
        errno = ETIMEDOUT;
        goto fail;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &why, &len) != 0)
        goto fail;
    if (why == 0) {
        *out = fd;
        return true;
    }
    errno = why;
fail:
    why = errno;
    rt_net_close(fd);
    errno = why;
    return false;
}

enum rt_status rt_net_connect(const char *host, int port, struct rt_net_wait wait, int *fd, struct rt_err *err)
{
    const struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    char service[16];
    const char *why = "no time";
    snprintf(service, sizeof service, "%d", port);
    do {
        struct addrinfo *list = NULL;
        const int code = getaddrinfo(host, service, &hints, &list);
        bool done = false;
        if (code != 0)
            why = gai_strerror(code);
        for (const struct addrinfo *a = list; a != NULL && !done; a = a->ai_next) {
            done = try_address(a, &wait, fd);
            if (!done)
                why = strerror(errno);
        }
        if (list != NULL)
            freeaddrinfo(list);
        if (done)
            return RT_OK;
        if (stop_asked(&wait))
            return rt_fail(err, RT_INTERRUPTED, "interrupted");
        nanosleep(&(const struct timespec){.tv_nsec = 50000000}, NULL); /* it may not listen yet */
    } while (rt_now() < wait.until);
    return rt_fail(err, RT_IO, "no connection to %s port %d: %s", host, port, why);
}

/* ---- bytes ---- */

static size_t whole(const struct rt_net_part part[2])
{
    return part[0].bytes + part[1].bytes;
}

/* Where byte `done` of two parts is, and how many follow it in its part. */
static void *at_byte(const struct rt_net_part part[2], size_t done, size_t *left)
{
    const int i = done >= part[0].bytes;
    const size_t in = done - (i == 1 ? part[0].bytes : 0);
    *left = part[i].bytes - in;
    return (char *)part[i].data + in;
}

static bool would_block(void)
{
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

static enum rt_status send_some(struct rt_net_io *io, bool *moved, struct rt_err *err)
{
    size_t left;
    while (io->sent < whole(io->send)) {
        const void *from = at_byte(io->send, io->sent, &left);
        const ssize_t n = send(io->fd, from, left, MSG_NOSIGNAL);
        if (n < 0 && would_block())
            return RT_OK;
        if (n < 0 && (errno == EPIPE || errno == ECONNRESET))
            return rt_fail(err, RT_IO, "it closed the connection");
        if (n < 0)
            return rt_fail_errno(err, "sending");
        io->sent += (size_t)n;
        *moved = true;
    }
    return RT_OK;
}

static enum rt_status recv_some(struct rt_net_io *io, bool *moved, struct rt_err *err)
{
    size_t left;
    while (io->received < whole(io->recv)) {
        void *to = at_byte(io->recv, io->received, &left);
        const ssize_t n = recv(io->fd, to, left, 0);
        if (n < 0 && would_block())
            return RT_OK;
        if (n == 0 || (n < 0 && errno == ECONNRESET))
            return rt_fail(err, RT_IO, "it closed the connection");
        if (n < 0)
            return rt_fail_errno(err, "receiving");
        io->received += (size_t)n;
        *moved = true;
        if (io->check != NULL && io->received == io->recv[0].bytes) {
            const enum rt_status st = io->check(io->self, io, err);
            if (st != RT_OK)
                return st;
        }
    }
    return RT_OK;
}

/* What has come is read before anything is said about a failed send: a peer that ends may have said why. */
static enum rt_status step(struct rt_net_io *io, const struct pollfd *p, bool *moved, struct rt_err *err)
{
    struct rt_err unsent = {0};
    const enum rt_status sent = (p->revents & (POLLOUT | POLLERR | POLLHUP)) != 0 ? send_some(io, moved, &unsent) : RT_OK;
    enum rt_status st = RT_OK;
    if ((p->revents & (POLLIN | POLLERR | POLLHUP)) != 0)
        st = recv_some(io, moved, err);
    return st != RT_OK || sent == RT_OK ? st : rt_fail(err, sent, "%s", unsent.msg);
}

static bool is_done(const struct rt_net_io *io)
{
    return io->sent == whole(io->send) && io->received == whole(io->recv);
}

/* idle > 0: whatever moves renews the wait for as many seconds; 0: nothing does. */
static enum rt_status exchange(struct rt_net_io *io, int n, struct rt_net_wait wait, double idle, int *at, struct rt_err *err)
{
    enum rt_status st;
    struct pollfd *p = NULL;
    *at = -1;
    RT_TRY(rt_alloc((size_t)n, sizeof *p, "an exchange", &p, err));
    for (;;) {
        int open = 0, ready;
        bool moved = false;
        for (int i = 0; i < n; i++) {
            const bool out = io[i].sent < whole(io[i].send), in = io[i].received < whole(io[i].recv);
            p[i] = (struct pollfd){.fd = out || in ? io[i].fd : -1, .events = (short)((out ? POLLOUT : 0) | (in ? POLLIN : 0))};
            open += !is_done(&io[i]);
        }
        if (open == 0)
            break;
        RT_TRY(wait_for(p, n, &wait, &ready, err));
        for (int i = 0; i < n && ready > 0; i++) {
            if (p[i].revents == 0)
                continue;
            *at = i;
            RT_TRY(step(&io[i], &p[i], &moved, err));
            *at = -1;
        }
        if (moved && idle > 0)
            wait.until = rt_now() + idle;
        else if (rt_now() >= wait.until && idle > 0)
            RT_FAIL(err, IO, "nothing moved for %g seconds", idle);
        else if (rt_now() >= wait.until && !is_done(io)) /* one peer */
            RT_FAIL(err, IO, "only %zu of %zu bytes moved in time", io->sent + io->received, whole(io->send) + whole(io->recv));
    }
out:
    rt_free(p);
    return st;
}

enum rt_status rt_net_exchange(struct rt_net_io *io, int n, double timeout, int *at, struct rt_err *err)
{
    return exchange(io, n, rt_net_deadline(timeout), timeout, at, err);
}

enum rt_status rt_net_send(int fd, const void *data, size_t bytes, struct rt_net_wait wait, struct rt_err *err)
{
    struct rt_net_io io = {.fd = fd, .send = {{(void *)(uintptr_t)data, bytes}}};
    int at;
    return exchange(&io, 1, wait, 0, &at, err);
}

enum rt_status rt_net_recv(int fd, void *data, size_t bytes, struct rt_net_wait wait, struct rt_err *err)
{
    struct rt_net_io io = {.fd = fd, .recv = {{data, bytes}}};
    int at;
    return exchange(&io, 1, wait, 0, &at, err);
}

enum rt_status rt_net_recv_some(int fd, void *data, size_t bytes, size_t *done, struct rt_err *err)
{
    struct rt_net_io io = {.fd = fd, .recv = {{data, bytes}}, .received = *done};
    bool moved;
    const enum rt_status st = recv_some(&io, &moved, err);
    *done = io.received;
    return st;
}

enum rt_status rt_net_peek(int fd, void *data, size_t bytes, size_t *n, struct rt_err *err)
{
    ssize_t got;
    *n = 0;
    do
        got = recv(fd, data, bytes, MSG_PEEK | MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    if (got == 0)
        return rt_fail(err, RT_IO, "it closed the connection");
    if (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
        return rt_fail_errno(err, "its connection");
    *n = got > 0 ? (size_t)got : 0;
    return RT_OK;
}
