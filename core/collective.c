/* Collectives over a meeting's connections (core/meeting.c makes them). */
#include "core/collective.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/comm.h"
#include "core/mem.h"

enum { PIECE = 1 << 18 }; /* elements of one peer that are summed at once */

int rt_comm_rank(const struct rt_comm *c)
{
    return c == NULL ? 0 : c->rank;
}

int rt_comm_size(const struct rt_comm *c)
{
    return c == NULL ? 1 : c->size;
}

double rt_comm_timeout(const struct rt_comm *c)
{
    return c == NULL ? 0 : c->timeout;
}

void rt_comm_shard(int64_t n, int rank, int size, int64_t *first, int64_t *count)
{
    const int64_t each = ((n + size - 1) / size + 63) / 64 * 64;
    *first = rank * each < n ? rank * each : n;
    *count = n - *first < each ? n - *first : each;
}

/* ---- messages ---- */

static const char *op_name(uint32_t op)
{
    static const char *const names[] = {"", "a sum of gradients", "a gathering", "a sum", "a broadcast", "a transfer"};
    return op < sizeof names / sizeof names[0] ? names[op] : "something unknown";
}

static enum rt_status read_abort(struct rt_comm *c, int rank, const struct header *h, struct rt_err *err)
{
    char text[ABORT_TEXT + 1] = "";
    if (h->bytes > ABORT_TEXT || rt_net_recv(c->fd[rank], text, (size_t)h->bytes, rt_net_deadline(5), NULL) != RT_OK)
        return rt_fail(err, RT_IO, "it ended");
    return rt_fail(err, RT_IO, "it failed: %s", text);
}

static enum rt_status check_header(void *self, struct rt_net_io *io, struct rt_err *err)
{
    const struct leg *leg = self;
    const struct header *h = &leg->in, *want = &leg->want;
    (void)io;
    if (h->magic == want->magic && h->op == OP_ABORT)
        return read_abort(leg->c, leg->rank, h, err);
    if (h->magic != want->magic || h->op != want->op || h->seq != want->seq || h->bytes != want->bytes)
        return rt_fail(err, RT_IO, "it is out of step: %s (number %llu, %llu bytes), expected %s (number %llu, %llu bytes)", op_name(h->op),
                       (unsigned long long)h->seq, (unsigned long long)h->bytes, op_name(want->op), (unsigned long long)want->seq,
                       (unsigned long long)want->bytes);
    return RT_OK;
}

/* What `rank` is sent and what is expected of it; a part of no bytes is no message. */
static void set_leg(struct rt_comm *c, int rank, uint32_t op, const void *send, size_t n_send, void *recv, size_t n_recv)
{
    struct leg *leg = &c->leg[rank];
    struct rt_net_io *io = &c->io[rank];
    *leg = (struct leg){.c = c, .rank = rank};
    *io = (struct rt_net_io){.fd = c->fd[rank], .check = check_header, .self = leg};
    if (n_send > 0) {
        leg->out = (struct header){MAGIC, op, c->sent[rank]++, n_send};
        io->send[0] = (struct rt_net_part){&leg->out, sizeof leg->out};
        io->send[1] = (struct rt_net_part){(void *)(uintptr_t)send, n_send};
    }
    if (n_recv > 0) {
        leg->want = (struct header){MAGIC, op, c->received[rank]++, n_recv};
        io->recv[0] = (struct rt_net_part){&leg->in, sizeof leg->in};
        io->recv[1] = (struct rt_net_part){recv, n_recv};
    }
}

static void clear_legs(struct rt_comm *c)
{
    for (int r = 0; r < c->size; r++)
        set_leg(c, r, 0, NULL, 0, NULL, 0);
}

/* Which ranks are waited for: "1, 3". */
static void pending(const struct rt_comm *c, char out[96])
{
    size_t at = 0;
    out[0] = '\0';
    for (int r = 0; r < c->size && at + 12 < 96; r++) {
        const struct rt_net_io *io = &c->io[r];
        if (io->received < io->recv[0].bytes + io->recv[1].bytes || io->sent < io->send[0].bytes + io->send[1].bytes)
            at += (size_t)snprintf(out + at, 96 - at, "%s%d", at > 0 ? ", " : "", r);
    }
}

static enum rt_status run_legs(struct rt_comm *c, uint32_t op, struct rt_err *err)
{
    struct rt_err why = {0};
    char silent[96];
    int at;
    if (c->broken)
        return rt_fail(err, RT_IO, "the other ranks are out of reach");
    const enum rt_status st = rt_net_exchange(c->io, c->size, c->timeout, &at, &why);
    if (st == RT_OK)
        return RT_OK;
    c->broken = true;
    for (int r = 0; r < c->size; r++) /* words in the middle of a message would be taken for its bytes */
        c->torn[r] = c->io[r].sent > 0 && c->io[r].sent < c->io[r].send[0].bytes + c->io[r].send[1].bytes;
    if (at >= 0)
        return rt_fail(err, st, "rank %d of %d is lost during %s: %s", at, c->size, op_name(op), why.msg);
    pending(c, silent);
    return rt_fail(err, st, "waiting for rank %s of %d during %s: %s", silent, c->size, op_name(op), why.msg);
}

void rt_comm_abort(struct rt_comm *c, const char *why)
{
    const size_t n = strlen(why);
    if (c == NULL)
        return;
    for (int r = 0; r < c->size; r++) {
        struct header h = {MAGIC, OP_ABORT, 0, n < ABORT_TEXT ? n : ABORT_TEXT};
        struct rt_net_io io = {.fd = c->fd[r], .send = {{&h, sizeof h}, {(void *)(uintptr_t)why, (size_t)h.bytes}}};
        int at;
        if (r != c->rank && !c->torn[r])
            rt_net_exchange(&io, 1, 1, &at, NULL);
        c->torn[r] = true; /* nothing more is sent */
    }
    c->broken = true;
}

enum rt_status rt_comm_check(struct rt_comm *c, struct rt_err *err)
{
    if (c == NULL)
        return RT_OK;
    if (c->broken)
        return rt_fail(err, RT_IO, "the other ranks are out of reach");
    for (int r = 0; r < c->size; r++) {
        struct rt_err why = {0};
        struct header h;
        size_t n;
        if (r == c->rank)
            continue;
        enum rt_status st = rt_net_peek(c->fd[r], &h, sizeof h, &n, &why);
        if (st == RT_OK && n == sizeof h && h.magic == MAGIC && h.op == OP_ABORT) {
            st = rt_net_recv(c->fd[r], &h, sizeof h, rt_net_deadline(5), &why);
            st = st == RT_OK ? read_abort(c, r, &h, &why) : st;
        }
        if (st == RT_OK)
            continue;
        c->broken = true;
        return rt_fail(err, RT_IO, "rank %d of %d is lost: %s", r, c->size, why.msg);
    }
    return RT_OK;
}

/* ---- bytes ---- */

enum rt_status rt_comm_broadcast(struct rt_comm *c, void *data, size_t bytes, int root, struct rt_err *err)
{
    if (c == NULL)
        return RT_OK;
    clear_legs(c);
    if (c->rank == root)
        for (int r = 0; r < c->size; r++)
            set_leg(c, r, OP_BROADCAST, data, r != root ? bytes : 0, NULL, 0);
    else
        set_leg(c, root, OP_BROADCAST, NULL, 0, data, bytes);
    return run_legs(c, OP_BROADCAST, err);
}

enum rt_status rt_comm_gather(struct rt_comm *c, const void *mine, void *all, size_t bytes, struct rt_err *err)
{
    if (bytes > 0)
        memcpy((char *)all + (size_t)rt_comm_rank(c) * bytes, mine, bytes);
    if (c == NULL)
        return RT_OK;
    clear_legs(c);
    for (int r = 0; r < c->size; r++)
        if (r != c->rank)
            set_leg(c, r, OP_GATHER, mine, bytes, (char *)all + (size_t)r * bytes, bytes);
    return run_legs(c, OP_GATHER, err);
}

enum rt_status rt_comm_send(struct rt_comm *c, int to, const void *data, size_t bytes, struct rt_err *err)
{
    clear_legs(c);
    set_leg(c, to, OP_TRANSFER, data, bytes, NULL, 0);
    return run_legs(c, OP_TRANSFER, err);
}

enum rt_status rt_comm_recv(struct rt_comm *c, int from, void *data, size_t bytes, struct rt_err *err)
{
    clear_legs(c);
    set_leg(c, from, OP_TRANSFER, NULL, 0, data, bytes);
    return run_legs(c, OP_TRANSFER, err);
}

enum rt_status rt_comm_sum(struct rt_comm *c, double *x, int n, struct rt_err *err)
{
    enum rt_status st;
    double *all = NULL;
    if (c == NULL)
        return RT_OK;
    if (n > RT_COMM_SUM_MAX)
        return rt_fail(err, RT_USAGE, "a sum of %d numbers, at most %d", n, RT_COMM_SUM_MAX);
    RT_TRY(rt_alloc((size_t)c->size * (size_t)n, sizeof *all, "a sum over ranks", &all, err));
    RT_TRY(rt_comm_gather(c, x, all, (size_t)n * sizeof *x, err));
    for (int i = 0; i < n; i++) {
        double sum = 0;
        for (int r = 0; r < c->size; r++)
            sum += all[r * n + i];
        x[i] = sum;
    }
out:
    rt_free(all);
    return st;
}

enum rt_status rt_comm_roll_call(struct rt_comm *c, double seconds, struct rt_err *err)
{
    double here = 1;
    if (c == NULL)
        return RT_OK;
    const double usual = c->timeout;
    c->timeout = seconds < usual ? seconds : usual;
    const enum rt_status st = rt_comm_sum(c, &here, 1, err);
    c->timeout = usual;
    return st;
}

/* ---- arrays ---- */

/* acc [n] += x, or = x. */
static void accumulate(double *acc, const void *x, enum rt_dtype dtype, int64_t n, bool first)
{
    for (int64_t i = 0; i < n; i++) {
        const double v = dtype == RT_F64   ? ((const double *)x)[i]
                         : dtype == RT_F32 ? (double)((const float *)x)[i]
                                           : (double)rt_bf16_to_f32(((const uint16_t *)x)[i]);
        acc[i] = first ? v : acc[i] + v;
    }
}

static void round_to(void *x, enum rt_dtype dtype, const double *acc, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        if (dtype == RT_F64)
            ((double *)x)[i] = acc[i];
        else if (dtype == RT_F32)
            ((float *)x)[i] = (float)acc[i];
        else
            ((uint16_t *)x)[i] = rt_f32_to_bf16((float)acc[i]);
    }
}

static enum rt_status check_dtype(enum rt_dtype dtype, struct rt_err *err)
{
    return dtype == RT_F32 || dtype == RT_F64 || dtype == RT_BF16 ? RT_OK
                                                                  : rt_fail(err, RT_UNSUPPORTED, "no sums over ranks of %s", rt_dtype_name(dtype));
}

static int64_t piece_of(int64_t count, int64_t done)
{
    const int64_t left = count > done ? count - done : 0;
    return left < PIECE ? left : PIECE;
}

enum rt_status rt_comm_reduce_scatter(struct rt_comm *c, void *x, int64_t n, enum rt_dtype dtype, struct rt_err *err)
{
    enum rt_status st;
    const size_t size = rt_dtype_size(dtype);
    int64_t first, count, own_first, own, longest;
    char *in = NULL;
    double *acc = NULL;
    if (c == NULL)
        return RT_OK;
    RT_TRY(check_dtype(dtype, err));
    rt_comm_shard(n, c->rank, c->size, &own_first, &own);
    rt_comm_shard(n, 0, c->size, &first, &longest);
    RT_TRY(rt_alloc((size_t)piece_of(own, 0) * (size_t)c->size, size, "a sum over ranks", &in, err));
    RT_TRY(rt_alloc((size_t)piece_of(own, 0), sizeof *acc, "a sum over ranks", &acc, err));
    for (int64_t done = 0; done < longest; done += PIECE) {
        const int64_t here = piece_of(own, done);
        char *mine = (char *)x + (size_t)(own_first + done) * size;
        clear_legs(c);
        for (int r = 0; r < c->size; r++) {
            rt_comm_shard(n, r, c->size, &first, &count);
            if (r != c->rank)
                set_leg(c, r, OP_REDUCE, (char *)x + (size_t)(first + done) * size, (size_t)piece_of(count, done) * size,
                        in + (size_t)(r * here) * size, (size_t)here * size);
        }
        RT_TRY(run_legs(c, OP_REDUCE, err));
        for (int r = 0; r < c->size; r++)
            accumulate(acc, r == c->rank ? mine : in + (size_t)(r * here) * size, dtype, here, r == 0);
        round_to(mine, dtype, acc, here);
    }
out:
    rt_free(in);
    rt_free(acc);
    return st;
}

enum rt_status rt_comm_all_gather(struct rt_comm *c, void *x, int64_t n, enum rt_dtype dtype, struct rt_err *err)
{
    const size_t size = rt_dtype_size(dtype);
    int64_t first, count, own_first, own;
    if (c == NULL)
        return RT_OK;
    rt_comm_shard(n, c->rank, c->size, &own_first, &own);
    clear_legs(c);
    for (int r = 0; r < c->size; r++) {
        rt_comm_shard(n, r, c->size, &first, &count);
        if (r != c->rank)
            set_leg(c, r, OP_GATHER, (char *)x + (size_t)own_first * size, (size_t)own * size, (char *)x + (size_t)first * size,
                    (size_t)count * size);
    }
    return run_legs(c, OP_GATHER, err);
}

enum rt_status rt_comm_all_reduce(struct rt_comm *c, void *x, int64_t n, enum rt_dtype dtype, struct rt_err *err)
{
    enum rt_status st;
    RT_TRY(rt_comm_reduce_scatter(c, x, n, dtype, err));
    RT_TRY(rt_comm_all_gather(c, x, n, dtype, err));
out:
    return st;
}
