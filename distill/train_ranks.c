/* A run of several ranks: how they meet and what they agree on. Rank 0 alone writes to RUN; every rank reads it. */
#include <string.h>
#include <unistd.h>

#include "core/collective.h"
#include "core/sha256.h"
#include "distill/train_run.h"

/* What ranks of one run have in common: the options that change results, the sequences in their order and what they hold, how many ranks there are. */
static enum rt_status identity(const struct rt_train_run *r, char hex[65], struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *config = NULL;
    struct rt_buf text = {0};
    struct rt_sha256 h;
    RT_TRY(rt_command_config(&rt_cmd_train, r->v, &config, err));
    RT_TRY(rt_train_contents(r, config, err));
    RT_TRY(rt_json_dump(rt_json_get(config, "options"), 0, &text, err));
    RT_TRY(rt_json_dump(rt_json_get(config, "content_sha256"), 0, &text, err));
    rt_sha256_init(&h);
    rt_sha256_update(&h, text.data, text.len);
    rt_sha256_update(&h, r->order_sha256, sizeof r->order_sha256);
    rt_sha256_final_hex(&h, hex);
out:
    rt_json_free(config);
    rt_buf_free(&text);
    return st;
}

enum rt_status rt_train_join(struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    char host[RT_RANK_HOST], hex[65];
    int port;
    if (r->rank.size == 1)
        return RT_OK;
    if (r->v->common.dry_run) {
        rt_info(r->ctx->log, "%d ranks: each takes its share of every global batch and of the optimiser's states; the plan is that of rank %d", r->rank.size,
                r->rank.rank);
        return RT_OK;
    }
    RT_TRY(rt_rank_meeting(&r->rank, host, &port, err));
    RT_TRY(identity(r, hex, err));
    rt_info(r->ctx->log, "rank %d of %d: meeting at %s port %d", r->rank.rank, r->rank.size, host, port);
    const struct rt_comm_options o = {.rank = r->rank, .host = host, .port = port, .identity = hex, .join_timeout = (double)r->v->rank_timeout,
                                      .timeout = (double)r->v->rank_timeout, .stop = r->ctx->stop, .stop_self = r->ctx->stop_self};
    st = rt_comm_open(&o, &r->comm, err);
    if (st == RT_INTERRUPTED) {
        rt_err_clear(err);
        RT_FAIL(err, INTERRUPTED, "interrupted while the ranks met: the run is as it was, the same command goes on");
    }
    RT_TRY(st);
    rt_info(r->ctx->log, "%d ranks: each takes its share of every global batch and of the optimiser's states", r->rank.size);
out:
    return st;
}

struct room {
    int64_t limit, micro;
    bool shared; /* memory of the machine that was not allotted: its ranks share it */
    char machine[128];
};

enum rt_status rt_train_agree_room(const struct rt_train_run *r, int64_t *limit, int64_t *micro, struct rt_err *err)
{
    enum rt_status st;
    const int n = rt_comm_size(r->comm);
    struct room own = {.limit = *limit, .micro = *micro, .shared = r->v->common.memory == 0 && !r->device.be->own_memory}, *all = NULL;
    gethostname(own.machine, sizeof own.machine - 1);
    RT_TRY(rt_alloc((size_t)n, sizeof own, "what ranks have room for", &all, err));
    RT_TRY(rt_comm_gather(r->comm, &own, all, sizeof own, err));
    for (int i = 0; i < n; i++) {
        int64_t beside = 0;
        for (int k = 0; k < n; k++)
            beside += strncmp(all[i].machine, all[k].machine, sizeof all[i].machine) == 0;
        const int64_t room = all[i].shared ? all[i].limit / beside : all[i].limit;
        *limit = room < *limit ? room : *limit;
    }
    *micro = all[0].micro;
out:
    rt_free(all);
    return st;
}

enum rt_status rt_train_machines(const struct rt_train_run *r, int *machines, struct rt_err *err)
{
    enum rt_status st;
    enum { NAME = 128 };
    const int n = rt_comm_size(r->comm);
    char own[NAME] = "", *all = NULL;
    gethostname(own, sizeof own - 1);
    RT_TRY(rt_alloc((size_t)n, NAME, "names of machines", &all, err));
    RT_TRY(rt_comm_gather(r->comm, own, all, NAME, err));
    *machines = 0;
    for (int i = 0; i < n; i++) {
        int k = 0;
        while (k < i && memcmp(all + (size_t)i * NAME, all + (size_t)k * NAME, NAME) != 0)
            k++;
        *machines += k == i;
    }
out:
    rt_free(all);
    return st;
}

enum rt_status rt_train_same_start(const struct rt_train_run *r, struct rt_err *err)
{
    enum rt_status st;
    char *all = NULL;
    const size_t n = sizeof r->init_sha256;
    RT_TRY(rt_alloc((size_t)rt_comm_size(r->comm), n, "hashes of ranks", &all, err));
    RT_TRY(rt_comm_gather(r->comm, r->init_sha256, all, n, err));
    for (int i = 1; i < rt_comm_size(r->comm); i++)
        if (memcmp(all, all + (size_t)i * n, n) != 0)
            RT_FAIL(err, REFUSED, "rank %d begins with other parameters (SHA-256 %.12s..) than rank 0 (%.12s..): the same student on every machine", i,
                    all + (size_t)i * n, all);
out:
    rt_free(all);
    return st;
}

enum rt_status rt_train_from_first(const struct rt_train_run *r, void *data, size_t bytes, struct rt_err *err)
{
    return rt_comm_broadcast(r->comm, data, bytes, 0, err);
}

enum rt_status rt_train_stop_asked(const struct rt_train_run *r, bool *yes, struct rt_err *err)
{
    double asked = r->ctx->stop != NULL && r->ctx->stop(r->ctx->stop_self);
    const enum rt_status st = rt_comm_sum(r->comm, &asked, 1, err);
    *yes = st == RT_OK && asked > 0;
    return st;
}

void rt_train_give_up(struct rt_train_run *r, enum rt_status st, const struct rt_err *err)
{
    /* an interrupt is agreed on: all of them end by it */
    if (st != RT_OK && st != RT_INTERRUPTED)
        rt_comm_abort(r->comm, err != NULL && err->msg[0] != '\0' ? err->msg : rt_status_text(st));
}
