/* How ranks meet (core/collective.h). */
#include <stdio.h>
#include <string.h>

#include "core/comm.h"
#include "core/log.h"
#include "core/mem.h"

enum { VERSION = 1, PORT_MAX = 65535, STRANGERS = 64 }; /* STRANGERS: silent connections that leave room for the ranks */
static const char magic[8] = "RETORT\1\n";
static const double hello_seconds = 5; /* for a connection to say who it is */

/* Fixed sizes, little-endian. */
struct hello {
    char magic[8];
    uint32_t version, rank, size, port; /* port: where the rank listens for those above it */
    char identity[RT_COMM_IDENTITY];
    char zero[40];
};
struct answer {
    char magic[8];
    uint32_t version, refused;
    char text[240];
};
struct place {
    char host[RT_NET_HOST]; /* "": the one where rank 0 is */
    uint32_t port, zero;
};
_Static_assert(sizeof(struct hello) == 128 && sizeof(struct answer) == 256 && sizeof(struct place) == 72, "messages of the meeting");

static void make_hello(const struct rt_comm_options *o, int port, struct hello *h)
{
    *h = (struct hello){.version = VERSION, .rank = (uint32_t)o->rank.rank, .size = (uint32_t)o->rank.size, .port = (uint32_t)port};
    memcpy(h->magic, magic, sizeof h->magic);
    memcpy(h->identity, o->identity, strlen(o->identity)); /* rt_comm_open checks the length */
}

/* Why a hello that came in does not belong here; false: it does. */
static bool is_foreign(const struct rt_comm *c, const struct rt_comm_options *o, const struct hello *h, int least, char text[240])
{
    struct hello own;
    make_hello(o, 0, &own);
    text[0] = '\0';
    if (h->version != VERSION)
        snprintf(text, 240, "rank %u speaks version %u of the protocol, rank %d version %d: take the same program everywhere", h->rank, h->version, c->rank,
                 VERSION);
    else if (h->size != (uint32_t)c->size)
        snprintf(text, 240, "rank %u counts %u ranks, rank %d %d", h->rank, h->size, c->rank, c->size);
    else if (memcmp(h->identity, own.identity, sizeof own.identity) != 0)
        snprintf(text, 240, "rank %u is of another run than rank %d: identity %.16s.., expected %.16s..; all ranks take the same options and data", h->rank,
                 c->rank, h->identity, own.identity);
    else if (h->rank < (uint32_t)least || h->rank >= (uint32_t)c->size || c->fd[h->rank] >= 0)
        snprintf(text, 240, "a second rank %u: each process needs a rank of its own", h->rank);
    else if (h->port > PORT_MAX)
        snprintf(text, 240, "rank %u listens on port %u", h->rank, h->port);
    return text[0] != '\0';
}

static void send_answer(int fd, const char *refusal)
{
    struct answer a = {.version = VERSION, .refused = refusal != NULL};
    memcpy(a.magic, magic, sizeof a.magic);
    if (refusal != NULL)
        snprintf(a.text, sizeof a.text, "%s", refusal);
    rt_net_send(fd, &a, sizeof a, rt_net_deadline(hello_seconds), NULL);
}

static void missing(const struct rt_comm *c, int least, char out[96])
{
    size_t at = 0;
    out[0] = '\0';
    for (int r = least; r < c->size && at + 12 < 96; r++)
        if (c->fd[r] < 0)
            at += (size_t)snprintf(out + at, 96 - at, "%s%d", at > 0 ? ", " : "", r);
}

/* A connection that has not said yet who it is. */
struct guest {
    int fd;
    double until; /* when it is sent away */
    size_t have;  /* bytes of hello */
    struct hello hello;
    char host[RT_NET_HOST];
};

/* All of them are listened to at once: none waits behind a silent one. */
struct door {
    int n, room;
    struct guest *guest; /* [room] */
    int *fd;             /* [room + 1], of the listener and the guests */
    bool *ready;         /* [room + 1] */
};

static enum rt_status open_door(struct door *d, int room, struct rt_err *err)
{
    enum rt_status st;
    *d = (struct door){.room = room};
    RT_TRY(rt_alloc((size_t)room, sizeof *d->guest, "connections of ranks", &d->guest, err));
    RT_TRY(rt_alloc((size_t)room + 1, sizeof *d->fd, "connections of ranks", &d->fd, err));
    RT_TRY(rt_alloc((size_t)room + 1, sizeof *d->ready, "connections of ranks", &d->ready, err));
out:
    return st;
}

static void close_door(struct door *d)
{
    for (int i = 0; i < d->n; i++)
        rt_net_close(d->guest[i].fd);
    rt_free(d->guest);
    rt_free(d->fd);
    rt_free(d->ready);
}

/* Waits for what comes, a connection or a word; a connection gets its time to say who it is. */
static enum rt_status wait_at(struct door *d, int listener, struct rt_net_wait deadline, struct rt_err *err)
{
    enum rt_status st;
    struct rt_net_wait wait = deadline;
    d->fd[0] = d->n < d->room ? listener : -1;
    for (int i = 0; i < d->n; i++) {
        d->fd[i + 1] = d->guest[i].fd;
        if (d->guest[i].until < wait.until)
            wait.until = d->guest[i].until;
    }
    RT_TRY(rt_net_ready(d->fd, d->n + 1, wait, d->ready, err));
    if (!d->ready[0])
        goto out;
    struct guest g = {.until = rt_net_deadline(hello_seconds).until};
    RT_TRY(rt_net_accept(listener, &g.fd, g.host, err));
    d->ready[d->n + 1] = false;
    if (g.fd >= 0)
        d->guest[d->n++] = g;
out:
    return st;
}

/* A guest that has said all: true where it is a rank that was waited for. */
static bool greet(struct rt_comm *c, const struct rt_comm_options *o, const struct guest *g, int least, struct place *place, char text[240])
{
    const struct hello *h = &g->hello;
    const bool known = memcmp(h->magic, magic, sizeof magic) == 0;
    if (!known || is_foreign(c, o, h, least, text)) {
        if (known && place != NULL)
            send_answer(g->fd, text);
        return false;
    }
    c->fd[h->rank] = g->fd;
    if (place == NULL)
        return true;
    const bool local = strncmp(g->host, "127.", 4) == 0 || strcmp(g->host, "::1") == 0 || strncmp(g->host, "::ffff:127.", 11) == 0;
    snprintf(place[h->rank].host, sizeof place[h->rank].host, "%s", local ? "" : g->host);
    place[h->rank].port = h->port;
    return true;
}

/* Takes the ranks from `least` on as they come; strangers are sent away and change nothing. place [size]: where each listens (NULL: not asked). */
static enum rt_status admit(struct rt_comm *c, const struct rt_comm_options *o, int listener, int least, struct rt_net_wait deadline,
                            struct place *place, struct rt_err *err)
{
    enum rt_status st;
    struct door d;
    char text[240] = "", names[96];
    RT_TRY(open_door(&d, c->size + STRANGERS, err));
    for (int n = least; n < c->size;) {
        RT_TRY(wait_at(&d, listener, deadline, err));
        if (rt_now() >= deadline.until) {
            missing(c, least, names);
            RT_FAIL(err, IO, "rank %s of %d did not come within %g seconds%s%s", names, c->size, o->join_timeout,
                    text[0] != '\0' ? "; sent away was: " : "", text);
        }
        for (int i = d.n - 1; i >= 0; i--) {
            struct guest *g = &d.guest[i];
            const bool open = !d.ready[i + 1] || rt_net_recv_some(g->fd, &g->hello, sizeof g->hello, &g->have, NULL) == RT_OK;
            if (open && g->have < sizeof g->hello && rt_now() < g->until)
                continue;
            if (g->have == sizeof g->hello && greet(c, o, g, least, place, text))
                n++;
            else
                rt_net_close(g->fd);
            *g = d.guest[--d.n];
        }
    }
out:
    close_door(&d);
    return st;
}

/* st with the rank whose connection failed; an interrupt is nobody's loss. */
static enum rt_status lost(int rank, enum rt_status st, const struct rt_err *why, struct rt_err *err)
{
    if (st == RT_OK)
        return st;
    return st == RT_INTERRUPTED ? rt_fail(err, st, "%s", why->msg) : rt_fail(err, st, "rank %d is lost during the meeting: %s", rank, why->msg);
}

static enum rt_status host_meeting(struct rt_comm *c, const struct rt_comm_options *o, struct rt_net_wait deadline, struct rt_err *err)
{
    enum rt_status st;
    struct place *place = NULL;
    int listener = -1;
    RT_TRY(rt_alloc((size_t)c->size, sizeof *place, "addresses of ranks", &place, err));
    RT_TRY(rt_net_listen(o->port, &listener, NULL, err));
    RT_TRY(admit(c, o, listener, 1, deadline, place, err));
    for (int r = 1; r < c->size; r++) {
        struct rt_err why = {0};
        send_answer(c->fd[r], NULL);
        deadline.until = rt_net_deadline(o->timeout).until;
        RT_TRY(lost(r, rt_net_send(c->fd[r], place, (size_t)c->size * sizeof *place, deadline, &why), &why, err));
    }
out:
    rt_net_close(listener);
    rt_free(place);
    return st;
}

/* What rank 0 says to this rank's hello. */
static enum rt_status be_answered(const struct rt_comm_options *o, int fd, struct rt_net_wait deadline, struct rt_err *err)
{
    struct answer a;
    struct rt_err why = {0};
    const enum rt_status st = rt_net_recv(fd, &a, sizeof a, deadline, &why);
    if (st == RT_INTERRUPTED)
        return rt_fail(err, st, "%s", why.msg);
    if (st != RT_OK)
        return rt_fail(err, st, "%s port %d: no answer of rank 0: %s", o->host, o->port, why.msg);
    a.text[sizeof a.text - 1] = '\0';
    if (memcmp(a.magic, magic, sizeof magic) != 0)
        return rt_fail(err, RT_REFUSED, "%s port %d: what answers there is no rank 0 of this program; another port is chosen with MASTER_PORT", o->host, o->port);
    return a.refused != 0 ? rt_fail(err, RT_REFUSED, "rank 0 refused this one: %s", a.text) : RT_OK;
}

static enum rt_status join_meeting(struct rt_comm *c, const struct rt_comm_options *o, struct rt_net_wait deadline, struct rt_err *err)
{
    enum rt_status st;
    struct place *place = NULL;
    struct hello h;
    struct rt_err why = {0};
    int listener = -1, port;
    RT_TRY(rt_alloc((size_t)c->size, sizeof *place, "addresses of ranks", &place, err));
    RT_TRY(rt_net_listen(0, &listener, &port, err));
    RT_TRY(rt_net_connect(o->host, o->port, deadline, &c->fd[0], err));
    make_hello(o, port, &h);
    RT_TRY(lost(0, rt_net_send(c->fd[0], &h, sizeof h, deadline, &why), &why, err));
    RT_TRY(be_answered(o, c->fd[0], deadline, err));
    RT_TRY(lost(0, rt_net_recv(c->fd[0], place, (size_t)c->size * sizeof *place, deadline, &why), &why, err));
    for (int r = 1; r < c->rank; r++) {
        place[r].host[RT_NET_HOST - 1] = '\0';
        if (place[r].port == 0 || place[r].port > PORT_MAX)
            RT_FAIL(err, IO, "rank 0 says that rank %d listens on port %u", r, place[r].port);
        const char *host = place[r].host[0] != '\0' ? place[r].host : o->host;
        RT_TRY(lost(r, rt_net_connect(host, (int)place[r].port, deadline, &c->fd[r], &why), &why, err));
        RT_TRY(lost(r, rt_net_send(c->fd[r], &h, sizeof h, deadline, &why), &why, err));
    }
    RT_TRY(admit(c, o, listener, c->rank + 1, deadline, NULL, err));
out:
    rt_net_close(listener);
    rt_free(place);
    return st;
}

static enum rt_status allocate(struct rt_comm *c, struct rt_err *err)
{
    enum rt_status st;
    const size_t n = (size_t)c->size;
    RT_TRY(rt_alloc(n, sizeof *c->fd, "connections of ranks", &c->fd, err));
    for (int r = 0; r < c->size; r++)
        c->fd[r] = -1;
    RT_TRY(rt_alloc(n, sizeof *c->torn, "connections of ranks", &c->torn, err));
    RT_TRY(rt_alloc(n, sizeof *c->sent, "connections of ranks", &c->sent, err));
    RT_TRY(rt_alloc(n, sizeof *c->received, "connections of ranks", &c->received, err));
    RT_TRY(rt_alloc(n, sizeof *c->leg, "connections of ranks", &c->leg, err));
    RT_TRY(rt_alloc(n, sizeof *c->io, "connections of ranks", &c->io, err));
out:
    return st;
}

enum rt_status rt_comm_open(const struct rt_comm_options *o, struct rt_comm **out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_comm *c = NULL;
    struct rt_net_wait deadline = rt_net_deadline(o->join_timeout);
    double nothing = 0;
    if (o->rank.size < 2 || o->rank.rank < 0 || o->rank.rank >= o->rank.size || strlen(o->identity) > RT_COMM_IDENTITY || !(o->timeout > 0))
        return rt_fail(err, RT_USAGE, "rank %d of %d has nobody to meet", o->rank.rank, o->rank.size);
    RT_TRY(rt_alloc(1, sizeof *c, "a communicator", &c, err));
    c->rank = o->rank.rank;
    c->size = o->rank.size;
    c->timeout = o->timeout;
    deadline.stop = o->stop;
    deadline.stop_self = o->stop_self;
    RT_TRY(allocate(c, err));
    RT_TRY(c->rank == 0 ? host_meeting(c, o, deadline, err) : join_meeting(c, o, deadline, err));
    RT_TRY(rt_comm_sum(c, &nothing, 1, err));
    *out = c;
    c = NULL;
out:
    rt_comm_free(c);
    return st;
}

void rt_comm_free(struct rt_comm *c)
{
    if (c == NULL)
        return;
    for (int r = 0; c->fd != NULL && r < c->size; r++)
        rt_net_close(c->fd[r]);
    rt_free(c->fd);
    rt_free(c->torn);
    rt_free(c->sent);
    rt_free(c->received);
    rt_free(c->leg);
    rt_free(c->io);
    rt_free(c);
}
