#include "distill/retarget_plan.h"

#include <stdio.h>
#include <unistd.h>

#include "core/io.h"
#include "core/log.h"

#define MIB ((int64_t)1 << 20)
enum { SHARD_ROWS_LEAST = 1024, SEQUENCE_BYTES = 2048, INDEX_BYTES = 320 };
static const int64_t shard_most = 256 * MIB, window_most = 32 * MIB, least = MIB;

/* A token's id, mask, end and, for each column of states, the numbers, scale and mask. */
static int64_t token_bytes(const struct rt_row_identity *id)
{
    int64_t bytes = 9;
    for (int f = 0; f < id->n_features; f++)
        bytes += id->feature[f].dim * (int64_t)rt_dtype_size(id->feature[f].dtype) + 5;
    return bytes;
}

static int64_t row_bytes(const struct rt_row_identity *id)
{
    return 8 * (int64_t)id->top_k + 4 * id->n_lse + 28;
}

int64_t rt_retarget_seq_bytes(const struct rt_row_identity *id, int64_t n_tokens, int64_t text_len, int64_t n_rows)
{
    return SEQUENCE_BYTES + n_tokens * token_bytes(id) + text_len + n_rows * row_bytes(id);
}

/* Resident bytes of the process; 0 where the system does not say. */
static int64_t resident_bytes(void)
{
    long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (f == NULL)
        return 0;
    if (fscanf(f, "%*s %ld", &pages) != 1)
        pages = 0;
    fclose(f);
    return (int64_t)pages * sysconf(_SC_PAGESIZE);
}

static int64_t largest_of(const struct rt_shard_set *in)
{
    int64_t most = 0;
    for (int64_t i = 0; i < rt_shard_set_info(in)->sequences; i++) {
        const struct rt_seq_info *q = rt_shard_set_seq(in, i);
        const int64_t bytes = rt_retarget_seq_bytes(rt_shard_set_identity(in), q->n_tokens, 8 * q->n_tokens, q->n_rows); /* of text: about 4 bytes a token */
        most = bytes > most ? bytes : most;
    }
    return most;
}

/* A set that was begun keeps its layout. */
static enum rt_status begun(const char *dir, int64_t *rows, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *v = NULL;
    char path[4096];
    RT_TRY(rt_path_join(path, sizeof path, dir, "identity.json", err));
    if (!rt_path_exists(path))
        goto out;
    RT_TRY(rt_json_load(path, 1 << 20, &v, err));
    RT_TRY(rt_json_int(v, "rows_per_shard", 1, INT64_MAX / (1 << 24), rows, err));
out:
    rt_json_free(v);
    return st;
}

/* A row with the states of two tokens beside it: what a shard is measured by. */
static int64_t wide_row(const struct rt_row_identity *id)
{
    return row_bytes(id) + 2 * token_bytes(id);
}

/* Rows fill a shard before bytes do, unless prompts and texts outweigh them. */
static int64_t shard_bytes(const struct rt_row_identity *id, int64_t rows)
{
    const int64_t all = rows * wide_row(id), twice = 2 * all < shard_most ? 2 * all : shard_most;
    return all > twice ? all : twice > least ? twice : least;
}

static enum rt_status refuse(const struct rt_retarget_plan *p, const struct rt_row_identity *made, int64_t memory, int64_t index, int64_t rest, struct rt_err *err)
{
    char a[32], b[32], c[32], d[32], e[32], f[32], hint[96] = "";
    const int64_t room = memory - (p->needed - p->shard_bytes);
    const int64_t rows = room / (2 * wide_row(made));
    if (rows >= 1 && rows < p->rows_per_shard && room >= least)
        snprintf(hint, sizeof hint, ", or --rows-per-shard %ld", (long)rows);
    return rt_fail(err, RT_NOMEM, "--memory %s: at least %s are needed: %s for the tokenizers, the map of their vocabularies and the input's index, %s for the keys of "
                   "sequences, %s for a shard of %ld rows, %s for a window of the input (its largest sequence takes %s); give more memory%s",
                   rt_human_bytes(a, (uint64_t)memory), rt_human_bytes(b, (uint64_t)p->needed), rt_human_bytes(c, (uint64_t)p->resident),
                   rt_human_bytes(d, (uint64_t)index), rt_human_bytes(e, (uint64_t)p->shard_bytes), (long)p->rows_per_shard, rt_human_bytes(f, (uint64_t)rest),
                   rt_human_bytes((char[32]){0}, (uint64_t)p->largest), hint);
}

enum rt_status rt_retarget_plan(const struct rt_shard_set *in, const struct rt_row_identity *made, const char *dir, int64_t rows_per_shard, int64_t memory,
                                int threads, struct rt_retarget_plan *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_retarget_plan p = {.rows_per_shard = rows_per_shard, .resident = resident_bytes(), .largest = largest_of(in)};
    const int64_t index = rt_shard_set_info(in)->sequences * INDEX_BYTES, each = 2 * threads * p.largest;
    if (p.rows_per_shard == 0)
        RT_TRY(begun(dir, &p.rows_per_shard, err));
    if (p.rows_per_shard == 0) {
        const int64_t fit = (memory / 4 < shard_most ? memory / 4 : shard_most) / wide_row(made);
        p.rows_per_shard = fit < SHARD_ROWS_LEAST ? SHARD_ROWS_LEAST : fit < RT_SHARD_ROWS ? fit : RT_SHARD_ROWS;
    }
    p.shard_bytes = shard_bytes(made, p.rows_per_shard);
    const int64_t fixed = p.resident + index + p.shard_bytes, smallest = p.largest > least ? p.largest : least;
    p.window_bytes = (memory - fixed - each) / 4 < window_most ? (memory - fixed - each) / 4 : window_most;
    if (p.window_bytes < smallest)
        p.window_bytes = smallest;
    p.needed = fixed + each + 4 * p.window_bytes;
    if (p.needed > memory)
        RT_TRY(refuse(&p, made, memory, index, each + 4 * p.window_bytes, err));
    *out = p;
out:
    return st;
}
