#include "core/io.h"
#include "student/internal.h"
#include "student/save.h"

enum { PATH_CAP = 4096 };

static enum rt_status put_ckpt(void *w, const void *data, uint64_t bytes, struct rt_err *err)
{
    return rt_ckpt_put(w, data, bytes, err);
}

static const char *const block_files[] = {"model.safetensors", "adam_m.safetensors", "adam_v.safetensors"};

enum rt_status rt_student_checkpoint(const struct rt_student *s, const struct rt_optimizer *opt, struct rt_ckpt_writer *w,
                                     struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_tensor_decl *decl = NULL;
    const enum rt_dtype dtype = s->d->be->act == RT_F64 ? RT_F32 : s->d->be->act;
    const void *const blocks[] = {s->block, opt == NULL ? NULL : opt->m, opt == NULL ? NULL : opt->v};
    RT_TRY(rt_params_decl(s->p, dtype, &decl, err));
    for (int i = 0; i < (opt == NULL ? 1 : 3); i++) {
        RT_TRY(rt_ckpt_tensors(w, block_files[i], decl, s->p->n, err));
        RT_TRY(rt_params_put(s->p, s->d, blocks[i], dtype, put_ckpt, w, err));
    }
out:
    rt_free(decl);
    return st;
}

enum rt_status rt_student_restore(struct rt_student *s, struct rt_optimizer *opt, const char *dir, int64_t step, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_tensors *t = NULL;
    void *const blocks[] = {s->block, opt == NULL ? NULL : opt->m, opt == NULL ? NULL : opt->v};
    char path[PATH_CAP];
    for (int i = 0; i < (opt == NULL ? 1 : 3); i++) {
        RT_TRY(rt_path_join(path, sizeof path, dir, block_files[i], err));
        RT_TRY(rt_tensors_open(path, &t, err));
        RT_TRY(rt_params_load(s->p, s->d, blocks[i], t, err));
        rt_tensors_free(t);
        t = NULL;
    }
    if (opt != NULL)
        opt->step = step;
out:
    rt_tensors_free(t);
    return st;
}
