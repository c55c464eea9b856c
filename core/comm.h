/* Shared by collective.c and meeting.c; not for others. */
#ifndef RT_CORE_COMM_H
#define RT_CORE_COMM_H

#include <stdbool.h>

#include "core/collective.h"
#include "core/net.h"

enum { MAGIC = 0x736d7472, ABORT_TEXT = 400 };
enum comm_op { OP_ABORT = 100, OP_REDUCE = 1, OP_GATHER, OP_SUM, OP_BROADCAST, OP_TRANSFER };

/* In front of every message. seq counts the messages from one rank to another. */
struct header {
    uint32_t magic, op;
    uint64_t seq, bytes;
};

/* One peer's part of a collective. */
struct leg {
    struct rt_comm *c;
    int rank;
    struct header out, in, want;
};

struct rt_comm {
    int rank, size;
    double timeout;
    bool broken;     /* an exchange failed: nothing more is tried */
    int *fd;         /* [size], -1: itself */
    bool *torn;      /* [size] a message to it was cut off */
    uint64_t *sent, *received; /* [size] messages */
    struct leg *leg;           /* [size] */
    struct rt_net_io *io;      /* [size] */
};

#endif
