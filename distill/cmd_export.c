/* retort export: the student of a run as a Hugging Face directory, converted. */
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/command.h"
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
    {"dtype", RT_OPT_CHOICE, V(dtype), "auto", 0, 0, "auto|bf16|f16|f32", NULL, "element type; auto: as it is in the run", false, false},
    {"tokenizer", RT_OPT_STRING, V(tokenizer), NULL, 0, 0, NULL, "DIR", "directory whose tokenizer files are copied; default: the model's", false, false},
    {"shard-size", RT_OPT_BYTES, V(shard_bytes), "5G", 0, 9e18, NULL, "5G", "largest file of weights; 0: one file", false, false},
    {0},
};

static enum rt_status run(struct rt_context *ctx, const void *values, const struct rt_positionals *pos, struct rt_err *err)
{
    enum rt_status st;
    const struct values *v = values;
    struct rt_loaded_student l = {0};
    struct rt_device d = {0};
    const struct rt_student_source source = {pos->items[0], NULL, v->tokenizer, NULL};
    const struct rt_dev_options o = {.threads = (int)v->common.threads};
    char path[4096];
    RT_TRY(rt_loaded_student_open(&l, &source, ctx->log, err));
    RT_TRY(rt_path_join(path, sizeof path, v->out, "config.json", err));
    if (rt_path_exists(path))
        RT_FAIL(err, REFUSED, "%s: holds a model already; choose another --out", v->out);
    enum rt_dtype dtype = l.c.dtype;
    dtype = strcmp(v->dtype, "bf16") == 0 ? RT_BF16 : strcmp(v->dtype, "f16") == 0 ? RT_F16 : strcmp(v->dtype, "f32") == 0 ? RT_F32 : dtype;
    if (v->common.dry_run) {
        printf("%s -> %s: %ld parameters, %s, %.1f MB\n", l.path, v->out, (long)l.p.count, rt_dtype_name(dtype),
               (double)l.p.count * (double)rt_dtype_size(dtype) / 1e6);
        goto out;
    }
    /* nothing is computed: float32 in host memory keeps every bit of a half */
    RT_TRY(rt_device_open(&rt_backend_cpu, &o, &d, err));
    RT_TRY(rt_loaded_student_create(&l, &d, 1, 0, err));
    const struct rt_student_save save = {.source = l.model.path, .dtype = dtype, .max_shard_bytes = (uint64_t)v->shard_bytes};
    RT_TRY(rt_student_save(l.s, &save, v->out, err));
    printf("%s\n", v->out);
    rt_info(ctx->log, "%s: %ld parameters as %s", v->out, (long)l.p.count, rt_dtype_name(dtype));
out:
    rt_loaded_student_close(&l);
    rt_device_close(&d);
    return st;
}

const struct rt_command rt_cmd_export = {
    .name = "export",
    .synopsis = "RUN|CHECKPOINT --out DIR [OPTIONS]",
    .summary = "the student of a run as a Hugging Face directory",
    .help = "Projectors and optimiser moments stay behind. A checkpoint directory (RUN/ckpt-N) may be given too, with --tokenizer.\n\n"
            "    retort export runs/soft --out student --dtype bf16",
    .options = options,
    .values_size = sizeof(struct values),
    .min_positionals = 1,
    .max_positionals = 1,
    .run = run,
};
