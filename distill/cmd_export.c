/* retort export: the student of a run as a Hugging Face directory, converted. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/command.h"
#include "distill/inspect.h"
#include "distill/loaded_student.h"
#include "student/save.h"

struct values {
    struct rt_common common;
    const char *out, *dtype, *tokenizer;
    int64_t shard_bytes;
};

#define V(field) offsetof(struct values, field)
static const struct rt_opt options[] = {
    {"out", RT_OPT_STRING, V(out), NULL, 0, 0, NULL, "DIR", "where the model goes", true, true},
    {"dtype", RT_OPT_CHOICE, V(dtype), "auto", 0, 0, "auto|bf16|f16|f32", NULL, "element type; auto: as it is stored (a run's model: bf16 mostly; its checkpoints: what training kept, f32 mostly)", false, false},
    {"tokenizer", RT_OPT_STRING, V(tokenizer), NULL, 0, 0, NULL, "DIR", "directory whose tokenizer files are copied; default: the model's, or that of the checkpoint's run", false, false},
    {"shard-size", RT_OPT_BYTES, V(shard_bytes), "5G", 0, 9e18, NULL, "5G", "largest file of weights; 0: one file", false, false},
    {0},
};

/* What else a path may be is said by name, before its files are held against a student's. */
static enum rt_status check_kind(const char *path, struct rt_err *err)
{
    enum rt_kind kind;
    const enum rt_status st = rt_kind_of(path, &kind, err);
    if (st != RT_OK || kind == RT_KIND_RUN || kind == RT_KIND_STUDENT || kind == RT_KIND_CHECKPOINT || kind == RT_KIND_TENSORS)
        return st; /* tensors: the missing config.json will be named */
    return rt_fail(err, RT_FORMAT, "%s: found kind '%s', expected a run of `retort train`, one of its checkpoints, or a student's model directory", path,
                   rt_kind_name(kind));
}

static enum rt_dtype dtype_of(const char *name, enum rt_dtype stored)
{
    return strcmp(name, "bf16") == 0 ? RT_BF16 : strcmp(name, "f16") == 0 ? RT_F16 : strcmp(name, "f32") == 0 ? RT_F32 : stored;
}

/* What the model directory will not hold, or holds in name only. */
static void warn(const struct rt_context *ctx, const struct rt_loaded_student *l, enum rt_dtype dtype)
{
    if (l->model.tok == NULL)
        rt_warn(ctx->log, "%s: no tokenizer is there, and none is written: --tokenizer DIR says where it is", l->model.path);
    if (rt_dtype_size(dtype) > rt_dtype_size(l->c.dtype))
        rt_warn(ctx->log, "%s holds %s: %s of it has no bit more; where training kept more, the run's checkpoints (RUN/ckpt-N) have it", l->path,
                rt_dtype_name(l->c.dtype), rt_dtype_name(dtype));
}

static enum rt_status report(const struct values *v, const struct rt_loaded_student *l, enum rt_dtype dtype, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *o = NULL;
    const int64_t bytes = l->p.count * (int64_t)rt_dtype_size(dtype);
    if (!v->common.json) {
        if (v->common.dry_run)
            printf("%s -> %s: %ld parameters, %s, %.1f MB\n", l->path, v->out, (long)l->p.count, rt_dtype_name(dtype), (double)bytes / 1e6);
        else
            printf("%s\n", v->out);
        return RT_OK;
    }
    RT_TRY(rt_json_new_object(&o, err));
    RT_TRY(rt_json_set_string(o, "from", l->path, err));
    RT_TRY(rt_json_set_string(o, "out", v->out, err));
    RT_TRY(rt_json_set_int(o, "parameters", l->p.count, err));
    RT_TRY(rt_json_set_string(o, "dtype", rt_dtype_name(dtype), err));
    RT_TRY(rt_json_set_int(o, "bytes", bytes, err));
    RT_TRY(l->model.tok != NULL ? rt_json_set_string(o, "tokenizer", l->model.path, err) : rt_json_set_null(o, "tokenizer", err));
    RT_TRY(rt_command_print_json(o, err));
out:
    rt_json_free(o);
    return st;
}

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    enum rt_status st;
    const struct values *v = values;
    struct rt_loaded_student l = {0};
    struct rt_device d = {0};
    const struct rt_student_source source = {pos->items[0], NULL, v->tokenizer, NULL};
    const struct rt_dev_options o = {.threads = (int)v->common.threads};
    char path[4096];
    RT_TRY(check_kind(pos->items[0], err));
    RT_TRY(rt_loaded_student_open(&l, &source, ctx->log, err));
    RT_TRY(rt_path_join(path, sizeof path, v->out, "config.json", err));
    if (rt_path_exists(path))
        RT_FAIL(err, REFUSED, "%s: holds a model already; choose another --out", v->out);
    const enum rt_dtype dtype = dtype_of(v->dtype, l.c.dtype);
    warn(ctx, &l, dtype);
    if (!v->common.dry_run) {
        /* nothing is computed: float32 in host memory keeps every bit of a half */
        RT_TRY(rt_device_open(&rt_backend_cpu, &o, &d, err));
        RT_TRY(rt_loaded_student_create(&l, &d, 1, 0, err));
        const struct rt_student_save save = {.source = l.model.path, .dtype = dtype, .max_shard_bytes = (uint64_t)v->shard_bytes};
        RT_TRY(rt_student_save(l.s, &save, v->out, err));
        rt_info(ctx->log, "%s: %ld parameters as %s", v->out, (long)l.p.count, rt_dtype_name(dtype));
    }
    RT_TRY(report(v, &l, dtype, err));
out:
    rt_loaded_student_close(&l);
    rt_device_close(&d);
    return st;
}

const struct rt_command rt_cmd_export = {
    .name = "export",
    .synopsis = "RUN|CHECKPOINT --out DIR [OPTIONS]",
    .summary = "the student of a run as a Hugging Face directory",
    .help = "Projectors and optimiser moments stay behind. Of a checkpoint (RUN/ckpt-N) the student's files are held\n"
            "against their hashes first, and the tokenizer is that of the run. A run's model is rounded to --dtype of `train`; what training kept is in the checkpoints,\n"
            "in float32 unless it ran without masters (`train --master none`).\n\n"
            "    retort export runs/soft --out student --dtype bf16",
    .options = options,
    .takes = RT_TAKES_THREADS | RT_TAKES_JSON | RT_TAKES_DRY_RUN,
    .values_size = sizeof(struct values),
    .min_positionals = 1,
    .max_positionals = 1,
    .run = run,
};
