#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/inspect.h"
#include "distill/run_record.h"

enum { PATH_CAP = 4096 };
static const size_t max_config = (size_t)1 << 20;

const char *rt_kind_name(enum rt_kind k)
{
    static const char *const names[RT_KIND_COUNT] = {"teacher", "student", "tensors", "tokenizer", "shards", "dataset", "run",
                                                     "experiment", "checkpoint"};
    return names[k];
}

static bool ends(const char *s, const char *suffix)
{
    const size_t n = strlen(s), m = strlen(suffix);
    return n >= m && strcmp(s + n - m, suffix) == 0;
}

static bool teacher_type(const char *model_type)
{
    return strncmp(model_type, "deepseek", 8) == 0 || strncmp(model_type, "kimi", 4) == 0;
}

/* A config.json: of a model ("model_type"), of a run ("command"), or of traces ("command": "traces"). False: none of these. */
static enum rt_status config_kind(const char *path, bool *found, enum rt_kind *out, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *j = NULL;
    *found = false;
    RT_TRY(rt_json_load(path, max_config, &j, err));
    const char *type = rt_json_as_string(rt_json_get(j, "model_type"), NULL);
    const char *command = rt_json_as_string(rt_json_get(j, "command"), NULL);
    *found = type != NULL || command != NULL;
    *out = type == NULL ? (command != NULL && strcmp(command, "traces") == 0 ? RT_KIND_DATASET : RT_KIND_RUN) : teacher_type(type) ? RT_KIND_TEACHER : RT_KIND_STUDENT;
out:
    rt_json_free(j);
    return st;
}

static enum rt_status dir_kind(const char *dir, enum rt_kind *out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    char path[PATH_CAP], **names = NULL;
    size_t n = 0;
    bool found = false, tensors = false, shards = false;
    static const struct {
        const char *name;
        enum rt_kind kind;
    } sign[] = {{RT_EXPERIMENT_FILE, RT_KIND_EXPERIMENT}, {RT_RUN_FILE, RT_KIND_RUN}, {"MANIFEST", RT_KIND_CHECKPOINT},
                {"identity.json", RT_KIND_SHARDS}};
    for (size_t i = 0; i < sizeof sign / sizeof sign[0]; i++)
        if (rt_path_has(dir, sign[i].name)) {
            *out = sign[i].kind;
            return RT_OK;
        }
    if (rt_path_has(dir, "config.json")) {
        RT_TRY(rt_path_join(path, sizeof path, dir, "config.json", err));
        RT_TRY(config_kind(path, &found, out, err));
        if (found)
            goto out;
    }
    RT_TRY(rt_list_dir(dir, &names, &n, err));
    for (size_t i = 0; i < n; i++) {
        tensors |= strcmp(names[i], "model.safetensors") == 0 || strcmp(names[i], "model.safetensors.index.json") == 0;
        shards |= strncmp(names[i], "manifest", 8) == 0 && ends(names[i], ".jsonl");
    }
    if (shards)
        *out = RT_KIND_SHARDS;
    else if (tensors)
        *out = RT_KIND_TENSORS;
    else if (rt_path_has(dir, "accepted.jsonl") || rt_path_has(dir, "traces.jsonl"))
        *out = RT_KIND_DATASET;
    else if (rt_path_has(dir, "tokenizer.json"))
        *out = RT_KIND_TOKENIZER;
    else
        RT_FAIL(err, FORMAT, "%s: nothing that is known: looked for config.json with model_type (a model), tokenizer.json, model.safetensors, identity.json or "
                "manifest*.jsonl (shards), accepted.jsonl or traces.jsonl (a dataset), run.json, experiment.json, MANIFEST (a checkpoint)", dir);
out:
    rt_names_free(names, n);
    return st;
}

/* A whole JSON document rather than lines of them? */
static enum rt_status document_kind(const char *path, bool *found, enum rt_kind *out, struct rt_err *err)
{
    struct rt_json *j = NULL;
    *found = false;
    enum rt_status st = rt_json_load(path, (size_t)64 << 20, &j, NULL);
    if (st == RT_NOMEM)
        return rt_fail(err, RT_NOMEM, "%s: out of memory", path);
    if (st != RT_OK)
        return RT_OK;
    if (rt_json_as_string(rt_json_get(j, "model_type"), NULL) != NULL)
        RT_TRY(config_kind(path, found, out, err));
    else if (rt_json_get(j, "model") != NULL && rt_json_get(j, "added_tokens") != NULL) {
        *found = true;
        *out = RT_KIND_TOKENIZER;
    }
out:
    rt_json_free(j);
    return st;
}

static enum rt_status file_kind(const char *path, enum rt_kind *out, struct rt_err *err)
{
    enum rt_status st;
    int fd = -1;
    uint64_t size;
    unsigned char head[16] = {0};
    bool found = false;
    RT_TRY(rt_file_open(path, &fd, &size, err));
    if (size == 0)
        RT_FAIL(err, FORMAT, "%s: an empty file", path);
    const size_t n = size < sizeof head ? (size_t)size : sizeof head;
    RT_TRY(rt_file_pread(fd, path, head, n, 0, err));
    size_t at = 0;
    while (at < n && (head[at] == ' ' || head[at] == '\n' || head[at] == '\r' || head[at] == '\t'))
        at++;
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | head[i];
    if (n > 9 && head[8] == '{' && length <= size - 8) {
        *out = RT_KIND_TENSORS;
    } else if (head[0] >> 4 == 8 || head[0] == 0xde) {
        *out = RT_KIND_SHARDS;
    } else if (at < n && head[at] == '{') {
        *out = RT_KIND_DATASET;
        if (size <= (uint64_t)64 << 20) {
            enum rt_kind k = RT_KIND_DATASET;
            RT_TRY(document_kind(path, &found, &k, err));
            *out = found ? k : RT_KIND_DATASET;
        }
    } else {
        RT_FAIL(err, FORMAT, "%s: nothing that is known: looked for safetensors, a row shard (msgpack), JSON lines, a tokenizer.json or a model's config.json", path);
    }
out:
    rt_file_close(fd);
    return st;
}

enum rt_status rt_kind_of(const char *path, enum rt_kind *out, struct rt_err *err)
{
    if (!rt_path_exists(path))
        return rt_fail(err, RT_IO, "%s: no such file or directory", path);
    return rt_path_is_dir(path) ? dir_kind(path, out, err) : file_kind(path, out, err);
}

enum rt_status rt_inspect(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    enum rt_kind kind;
    RT_TRY(rt_kind_of(path, &kind, err));
    RT_TRY(rt_json_set_string(obj, "kind", rt_kind_name(kind), err));
    RT_TRY(rt_json_set_string(obj, "path", path, err));
    switch (kind) {
    case RT_KIND_TEACHER: return rt_inspect_teacher(path, o, obj, err);
    case RT_KIND_STUDENT: return rt_inspect_student(path, o, obj, err);
    case RT_KIND_TENSORS: return rt_inspect_tensors(path, o, obj, err);
    case RT_KIND_TOKENIZER: return rt_inspect_tokenizer(path, obj, err);
    case RT_KIND_SHARDS: return rt_inspect_shards(path, o, obj, err);
    case RT_KIND_DATASET: return rt_inspect_dataset(path, o, obj, err);
    case RT_KIND_RUN: return rt_inspect_run(path, obj, err);
    case RT_KIND_EXPERIMENT: return rt_inspect_experiment(path, obj, err);
    case RT_KIND_CHECKPOINT: return rt_inspect_checkpoint(path, o, obj, err);
    case RT_KIND_COUNT: break;
    }
out:
    return st;
}
