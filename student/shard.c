/* How several ranks share a block of parameters (student/params.h). */
#include "core/collective.h"
#include "student/params.h"

/* Where buckets may begin: at layers, and behind them. Descending, i from 0. */
static int64_t border(const struct rt_params *p, int layers, int i)
{
    return i == 0 ? p->final_norm : p->layer[layers - i].norm1;
}

static int count_layers(const struct rt_params *p)
{
    int last = -1;
    for (int i = 0; i < p->n; i++)
        last = p->at[i].layer > last ? p->at[i].layer : last;
    return last + 1;
}

/* start [n + 1] from the end of the block down: as many layers as make a bucket. */
static void cut(const struct rt_params *p, int64_t step, int64_t least, struct rt_param_shard *s)
{
    int64_t down[RT_PARAM_BUCKETS + 1];
    const int layers = least > 0 ? count_layers(p) : -1;
    int n = 0;
    down[n] = p->elements;
    for (int i = 0; i <= layers && n < RT_PARAM_BUCKETS - 1; i++) {
        const int64_t at = (border(p, layers, i) + step - 1) / step * step;
        if (at > 0 && down[n] - at >= least)
            down[++n] = at;
    }
    down[++n] = 0;
    s->n_buckets = n;
    for (int i = 0; i <= n; i++)
        s->start[i] = down[n - i];
}

struct rt_param_shard rt_param_shard_of(const struct rt_params *p, int rank, int size, int64_t bucket)
{
    struct rt_param_shard s = {.rank = rank, .size = size};
    const int64_t fewest = p->elements / (RT_PARAM_BUCKETS / 2); /* so that there is room for all */
    cut(p, 64 * (int64_t)size, bucket > 0 && bucket < fewest ? fewest : bucket, &s);
    for (int b = 0; b < s.n_buckets; b++)
        s.n += rt_param_part(&s, rank, b).n;
    return s;
}

struct rt_param_shard rt_param_shard(const struct rt_params *p, struct rt_comm *comm, int64_t bucket)
{
    struct rt_param_shard s = rt_param_shard_of(p, rt_comm_rank(comm), rt_comm_size(comm), comm != NULL ? bucket : 0);
    s.comm = comm;
    return s;
}

struct rt_param_part rt_param_part(const struct rt_param_shard *s, int r, int b)
{
    struct rt_param_part part;
    rt_comm_shard(s->start[b + 1] - s->start[b], r, s->size, &part.first, &part.n);
    part.first += s->start[b];
    part.at = s->start[b] / s->size;
    return part;
}
