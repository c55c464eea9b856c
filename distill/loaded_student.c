#include "distill/loaded_student.h"

#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "core/sha256.h"
#include "distill/run_record.h"
#include "formats/checkpoint.h"

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

/* Of CKPT/../config.json: where the run had its tokenizer from. "": it does not say, or that is gone. */
static enum rt_status run_tokenizer(const char *config, char out[4096], struct rt_err *err)
{
    static const char *const keys[] = {"tokenizer", "student", "init-config"};
    enum rt_status st;
    struct rt_json *v = NULL;
    out[0] = '\0';
    RT_TRY(rt_json_load(config, 1 << 20, &v, err));
    const struct rt_json *options = rt_json_get(v, "options");
    for (int i = 0; i < 3 && out[0] == '\0'; i++) {
        const char *path = rt_json_as_string(rt_json_get(options, keys[i]), NULL);
        if (path == NULL || path[0] == '\0' || !rt_path_exists(path))
            continue;
        if (i != 1)
            dir_of(path, out);
        if ((i == 1 && rt_record_student(path, out, 4096, NULL) != RT_OK) || !rt_path_has(out, "tokenizer.json"))
            out[0] = '\0';
    }
out:
    rt_json_free(v);
    return st;
}

/* A checkpoint has no tokenizer of its own: it has that of its run, as the finished model holds it or as the run began. dir stays
 * where neither is there. */
static enum rt_status checkpoint_text_dir(const char *checkpoint, char dir[4096], struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char path[4096], found[4096];
    if (rt_path_has(checkpoint, "tokenizer.json"))
        goto out;
    RT_TRY(rt_path_join(found, sizeof found, checkpoint, "../" RT_MODEL_DIR, err));
    if (!rt_path_has(found, "tokenizer.json")) {
        RT_TRY(rt_path_join(path, sizeof path, checkpoint, "../config.json", err));
        if (!rt_path_exists(path))
            goto out;
        RT_TRY(run_tokenizer(path, found, err));
    }
    if (found[0] != '\0')
        snprintf(dir, 4096, "%s", found);
out:
    return st;
}

/* The student's directory: *l's path, configuration and tensors; dir is where its tokenizer lies. */
static enum rt_status open_student(struct rt_loaded_student *l, const char *student, struct rt_log *log, char dir[4096], struct rt_err *err)
{
    enum rt_status st;
    static const char *const read[] = {"model.safetensors", "config.json", NULL}; /* of a checkpoint; its moments are larger than these */
    char manifest[4096];
    int64_t step;
    RT_TRY(rt_record_student(student, l->path, sizeof l->path, err));
    if (!rt_path_is_dir(l->path))
        RT_FAIL(err, IO, "%s: no such directory", l->path);
    snprintf(dir, 4096, "%s", l->path);
    RT_TRY(rt_path_join(manifest, sizeof manifest, l->path, "MANIFEST", err));
    if (rt_path_exists(manifest)) {
        RT_TRY(rt_ckpt_verify_files(l->path, read, &step, err));
        RT_TRY(checkpoint_text_dir(l->path, dir, err));
    }
    RT_TRY(rt_student_config_load(l->path, &l->c, err));
    RT_TRY(rt_tensors_open(l->path, &l->tensors, err));
    RT_TRY(rt_params_check_model(&l->c, l->tensors, true, log, err));
out:
    return st;
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
        RT_TRY(open_student(l, source->student, log, dir, err));
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
    rt_sha256_init(&h);
    for (int i = 0; i < l->p.n; i++)
        rt_sha256_update(&h, l->p.at[i].name, strlen(l->p.at[i].name) + 1);
    const enum rt_status st = rt_params_put(&l->p, l->d, rt_param_block(l->d, rt_student_block(l->s)), RT_F32, add_bytes, &h, err);
    rt_sha256_final_hex(&h, out);
    return st;
}
