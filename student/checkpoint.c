#include "core/collective.h"
#include "core/io.h"
#include "student/internal.h"
#include "student/save.h"

enum { PATH_CAP = 4096 };

static enum rt_status put_ckpt(void *w, const void *data, uint64_t bytes, struct rt_err *err)
{
    return rt_ckpt_put(w, data, bytes, err);
}

enum rt_dtype rt_adamw_file_dtype(const struct rt_device *d, const struct rt_adamw_state *state)
{
    return d->be->act == RT_F64 || (state != NULL && state->low != NULL) ? RT_F32 : d->be->act;
}

/* Parameters and moments, with the type that each has in its file. */
struct blocks {
    struct rt_param_block at[3];
    enum rt_dtype file[3];
    int n;
};

static struct blocks blocks_of(const struct rt_device *d, const void *block, const struct rt_adamw_state *state)
{
    struct blocks b = {.at = {rt_param_block(d, block)}, .file = {rt_adamw_file_dtype(d, state)}, .n = 1};
    if (state == NULL)
        return b;
    b.n = 3;
    b.at[0] = rt_adamw_master(state, d, block);
    b.at[1] = (struct rt_param_block){.data = state->m, .dtype = state->moment, .shard = state->shard};
    b.at[2] = (struct rt_param_block){.data = state->v, .dtype = state->moment, .shard = state->shard};
    b.file[1] = b.file[2] = state->moment == RT_F64 ? RT_F32 : state->moment;
    return b;
}

enum rt_status rt_adamw_checkpoint(const struct rt_params *p, const struct rt_device *d, const void *block, const struct rt_adamw_state *state,
                                   const char *const files[3], struct rt_ckpt_writer *w, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_tensor_decl *decl = NULL;
    const struct blocks b = blocks_of(d, block, state);
    for (int i = 0; i < b.n; i++) {
        rt_free(decl);
        decl = NULL;
        if (w == NULL && b.at[i].shard.comm == NULL) /* rank 0 has all of it */
            continue;
        RT_TRY(rt_params_decl(p, b.file[i], &decl, err));
        if (w != NULL)
            RT_TRY(rt_ckpt_tensors(w, files[i], decl, p->n, err));
        RT_TRY(rt_params_put(p, d, b.at[i], b.file[i], put_ckpt, w, err));
    }
out:
    rt_free(decl);
    return st;
}

enum rt_status rt_adamw_restore(const struct rt_params *p, const struct rt_device *d, void *block, const struct rt_adamw_state *state,
                                const char *const files[3], const char *dir, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_tensors *t = NULL;
    const struct blocks b = blocks_of(d, block, state);
    char path[PATH_CAP];
    for (int i = 0; i < b.n; i++) {
        RT_TRY(rt_path_join(path, sizeof path, dir, files[i], err));
        RT_TRY(rt_tensors_open(path, &t, err));
        RT_TRY(rt_params_load(p, d, b.at[i], t, err));
        rt_tensors_free(t);
        t = NULL;
        for (int k = 0; b.at[i].shard.comm != NULL && i == 0 && k < b.at[i].shard.n_buckets; k++) {
            const int64_t *start = b.at[i].shard.start;
            RT_TRY(d->be->all_gather(d->dev, d->q, (char *)block + (size_t)start[k] * rt_device_act_size(d), start[k + 1] - start[k], err));
        }
    }
out:
    rt_tensors_free(t);
    return st;
}

static const char *const block_files[] = {"model.safetensors", "adam_m.safetensors", "adam_v.safetensors"};

enum rt_status rt_student_checkpoint(const struct rt_student *s, const struct rt_optimizer *opt, struct rt_ckpt_writer *w,
                                     struct rt_err *err)
{
    return rt_adamw_checkpoint(s->p, s->d, s->block, opt == NULL ? NULL : &opt->state, block_files, w, err);
}

enum rt_status rt_student_restore(struct rt_student *s, struct rt_optimizer *opt, const char *dir, int64_t step, struct rt_err *err)
{
    const enum rt_status st = rt_adamw_restore(s->p, s->d, s->block, opt == NULL ? NULL : &opt->state, block_files, dir, err);
    if (st == RT_OK && opt != NULL)
        opt->step = step;
    return st;
}
