#include "distill/loaded_student.h"

#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "core/sha256.h"
#include "distill/run_record.h"

/* The directory of a file, "." where its name has none. */
static void dir_of(const char *file, char out[4096])
{
    snprintf(out, 4096, "%s", file);
    char *slash = strrchr(out, '/');
    if (rt_path_is_dir(file))
        return;
    if (slash == NULL)
        snprintf(out, 4096, ".");
    else
        *(slash == out ? slash + 1 : slash) = '\0';
}

enum rt_status rt_loaded_student_open(struct rt_loaded_student *l, const struct rt_student_source *source, struct rt_log *log,
                                      struct rt_err *err)
{
    enum rt_status st;
    char dir[4096];
    *l = (struct rt_loaded_student){0};
    if ((source->student == NULL) == (source->init_config == NULL))
        RT_FAIL(err, USAGE, "give either --student (a model directory or a run) or --init-config (a config.json for a new student)");
    if (source->student != NULL) {
        RT_TRY(rt_record_student(source->student, l->path, sizeof l->path, err));
        if (!rt_path_is_dir(l->path))
            RT_FAIL(err, IO, "%s: no such directory", l->path);
        RT_TRY(rt_student_config_load(l->path, &l->c, err));
        RT_TRY(rt_tensors_open(l->path, &l->tensors, err));
        RT_TRY(rt_params_check_model(&l->c, l->tensors, true, log, err));
        snprintf(dir, sizeof dir, "%s", l->path);
    } else {
        RT_TRY(rt_student_config_load(source->init_config, &l->c, err));
        dir_of(source->init_config, dir);
    }
    RT_TRY(rt_params_create(&l->c, &l->p, err));
    RT_TRY(rt_model_dir_open(source->tokenizer != NULL ? source->tokenizer : dir, source->template_name, log, &l->model, err));
    int64_t n_ids;
    RT_TRY(rt_model_dir_n_ids(&l->model, l->c.vocab_size, &n_ids, err));
out:
    if (st != RT_OK)
        rt_loaded_student_close(l);
    return st;
}

enum rt_status rt_loaded_student_create(struct rt_loaded_student *l, const struct rt_device *d, int64_t max_length, uint64_t seed,
                                        struct rt_err *err)
{
    enum rt_status st;
    l->d = d;
    RT_TRY(rt_device_arena(d, rt_student_weight_bytes(&l->c, &l->p, max_length, rt_device_act_size(d)), "weights", &l->weights, err));
    RT_TRY(rt_student_create(d, &l->c, &l->p, max_length, &l->weights, &l->s, err));
    RT_TRY(l->tensors != NULL ? rt_student_load(l->s, l->tensors, err) : rt_student_init(l->s, seed, err));
    rt_tensors_free(l->tensors);
    l->tensors = NULL;
out:
    return st;
}

void rt_loaded_student_close(struct rt_loaded_student *l)
{
    rt_tensors_free(l->tensors);
    rt_student_free(l->s);
    if (l->d != NULL)
        rt_device_arena_free(l->d, &l->weights);
    rt_params_free(&l->p);
    rt_student_config_free(&l->c);
    rt_model_dir_close(&l->model);
    *l = (struct rt_loaded_student){0};
}

static enum rt_status add_bytes(void *ctx, const void *data, uint64_t bytes, struct rt_err *err)
{
    (void)err;
    rt_sha256_update(ctx, data, bytes);
    return RT_OK;
}

enum rt_status rt_loaded_student_hash(const struct rt_loaded_student *l, char out[65], struct rt_err *err)
{
    struct rt_sha256 h;
    uint8_t digest[32];
    rt_sha256_init(&h);
    for (int i = 0; i < l->p.n; i++)
        rt_sha256_update(&h, l->p.at[i].name, strlen(l->p.at[i].name) + 1);
    const enum rt_status st = rt_params_put(&l->p, l->d, rt_param_block(l->d, rt_student_block(l->s)), RT_F32, add_bytes, &h, err);
    rt_sha256_final(&h, digest);
    rt_hex(out, digest, sizeof digest);
    return st;
}
