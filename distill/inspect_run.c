#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "distill/eval_key.h"
#include "distill/inspect.h"
#include "distill/jsonl.h"
#include "distill/run_record.h"
#include "formats/checkpoint.h"
#include "formats/safetensors.h"

enum { PATH_CAP = 4096 };
static const size_t max_record = (size_t)64 << 20;

/* Copies the members of `from` that exist, in the order of keys. */
static enum rt_status copy_members(const struct rt_json *from, const char *const *keys, size_t n, struct rt_json *to, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    for (size_t i = 0; i < n; i++) {
        const struct rt_json *v = rt_json_get(from, keys[i]);
        if (v != NULL)
            RT_TRY(rt_json_set_copy(to, keys[i], v, err));
    }
out:
    return st;
}

/* The last line of a file of JSON lines, copied as obj[key]; *lines counts them. Nothing where there is no such file. */
static enum rt_status last_line(const char *dir, const char *name, const char *key, int64_t *lines, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    char path[PATH_CAP];
    struct rt_jsonl f = {0};
    struct rt_json *keep = NULL;
    const struct rt_json *v;
    *lines = 0;
    RT_TRY(rt_path_join(path, sizeof path, dir, name, err));
    if (!rt_path_exists(path))
        return RT_OK;
    RT_TRY(rt_jsonl_open(path, &f, err));
    for (;;) {
        RT_TRY(rt_jsonl_next(&f, &v, err));
        if (v == NULL)
            break;
        rt_json_free(keep);
        keep = f.value; /* taken over from the reader */
        f.value = NULL;
        ++*lines;
    }
    if (keep != NULL)
        RT_TRY(rt_json_set_copy(obj, key, keep, err));
out:
    rt_json_free(keep);
    rt_jsonl_close(&f);
    return st;
}

/* The last evaluation of each kind: name, data, temperatures. */
static enum rt_status evaluations(const char *dir, struct rt_json *obj, struct rt_err *err)
{
    static const char *const keys[] = {"name", "step", "data", "by", "n_sequences", "ce", "kd_temperature", "kl", "agreement", "accuracy",
                                       "n_problems", "samples", "temperature", "pass1"};
    enum { MOST = 64 };
    enum rt_status st;
    char path[PATH_CAP];
    struct rt_jsonl f = {0};
    struct rt_json *last[MOST] = {0}, *list, *o;
    const struct rt_json *v;
    int n = 0;
    RT_TRY(rt_path_join(path, sizeof path, dir, RT_EVAL_FILE, err));
    if (!rt_path_exists(path))
        return RT_OK;
    RT_TRY(rt_jsonl_open(path, &f, err));
    for (;;) {
        RT_TRY(rt_jsonl_next(&f, &v, err));
        const char *name;
        struct rt_eval_key key, other;
        int i = 0;
        if (v == NULL)
            break;
        RT_TRY(rt_json_string(v, "name", &name, err));
        rt_eval_key_read(v, &key);
        for (; i < n; i++) {
            rt_eval_key_read(last[i], &other);
            if (rt_eval_key_same(&key, &other))
                break;
        }
        if (i == MOST)
            continue;
        rt_json_free(last[i]);
        last[i] = f.value;
        f.value = NULL;
        n = i == n ? n + 1 : n;
    }
    RT_TRY(rt_json_set_array(obj, "last_evaluations", &list, err));
    for (int i = 0; i < n; i++) {
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(copy_members(last[i], keys, sizeof keys / sizeof keys[0], o, err));
    }
out:
    for (int i = 0; i < n; i++)
        rt_json_free(last[i]);
    rt_jsonl_close(&f);
    return st;
}

static enum rt_status checkpoints(const char *dir, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    char **names = NULL;
    size_t n = 0;
    struct rt_json *list;
    RT_TRY(rt_list_dir(dir, &names, &n, err));
    RT_TRY(rt_json_set_array(obj, "checkpoints", &list, err));
    for (size_t i = 0; i < n; i++)
        if (strncmp(names[i], "ckpt-", 5) == 0)
            RT_TRY(rt_json_set_string(list, NULL, names[i], err));
out:
    rt_names_free(names, n);
    return st;
}

/* Held by a process? Reading does not take the lock for longer than the question. */
static bool is_running(const char *dir)
{
    int fd = -1;
    struct rt_err ignored = {0};
    if (!rt_path_has(dir, ".lock"))
        return false;
    const enum rt_status st = rt_lock_dir(dir, &fd, &ignored);
    if (st == RT_OK)
        rt_file_close(fd);
    return st == RT_REFUSED;
}

static const char *state_of(bool finished, bool running)
{
    return finished ? "finished" : running ? "running" : "unfinished: the same command with the same --out goes on";
}

enum rt_status rt_inspect_traces(const char *path, int64_t lines, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *last = NULL;
    int64_t n, step;
    RT_TRY(rt_json_new_object(&last, err));
    RT_TRY(last_line(path, "metrics.jsonl", "line", &n, last, err)); /* written when all of them are there */
    const struct rt_json *line = rt_json_get(last, "line");
    const bool finished = line != NULL && rt_json_as_int(rt_json_get(line, "step"), &step) && step == lines;
    RT_TRY(rt_json_set_string(obj, "state", state_of(finished, !finished && is_running(path)), err));
    if (line != NULL)
        RT_TRY(rt_json_set_copy(obj, "last_run", line, err));
out:
    rt_json_free(last);
    return st;
}

enum rt_status rt_inspect_run(const char *path, struct rt_json *obj, struct rt_err *err)
{
    static const char *const keys[] = {"name", "arm", "seed", "steps", "planned_steps", "tokens", "targets", "skipped_steps", "seconds",
                                       "tokens_per_second", "peak_memory", "flops", "device", "parameters", "weights", "kd_temperature",
                                       "teacher_temperature", "tail", "init", "data", "final", "model"};
    enum rt_status st;
    struct rt_json *run = NULL;
    bool finished = false;
    int64_t lines;
    RT_TRY(rt_record_run(path, &run, err));
    if (run != NULL)
        RT_TRY(rt_json_bool_or(run, "finished", false, &finished, err));
    const bool running = !finished && is_running(path);
    RT_TRY(rt_json_set_string(obj, "state", state_of(finished, running), err));
    if (run != NULL)
        RT_TRY(copy_members(run, keys, sizeof keys / sizeof keys[0], obj, err));
    RT_TRY(last_line(path, "metrics.jsonl", "last_step", &lines, obj, err));
    RT_TRY(evaluations(path, obj, err));
    RT_TRY(checkpoints(path, obj, err));
out:
    rt_json_free(run);
    return st;
}

enum rt_status rt_inspect_experiment(const char *path, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    char file[PATH_CAP];
    struct rt_json *e = NULL, *list, *o;
    bool finished;
    RT_TRY(rt_path_join(file, sizeof file, path, RT_EXPERIMENT_FILE, err));
    RT_TRY(rt_json_load(file, max_record, &e, err));
    RT_TRY(rt_json_bool_or(e, "finished", false, &finished, err));
    RT_TRY(rt_json_set_bool(obj, "finished", finished, err));
    const struct rt_json *arms = rt_json_get(e, "arms"), *eval = rt_json_get(e, "eval_data");
    if (rt_json_typeof(arms != NULL ? arms : e) != RT_JSON_ARRAY)
        RT_FAIL(err, FORMAT, "%s: expected a member \"arms\", a list", file);
    RT_TRY(rt_json_set_array(obj, "arms", &list, err));
    for (size_t i = 0; i < rt_json_len(arms); i++) {
        const struct rt_json *arm = rt_json_at(arms, i), *runs = rt_json_get(arm, "runs");
        const char *name, *description;
        int64_t done = 0;
        RT_TRY(rt_json_string(arm, "name", &name, err));
        RT_TRY(rt_json_string_or(arm, "description", "", &description, err));
        for (size_t r = 0; r < rt_json_len(runs); r++) {
            bool yes = false;
            done += rt_json_as_bool(rt_json_get(rt_json_at(runs, r), "finished"), &yes) && yes;
        }
        RT_TRY(rt_json_set_object(list, NULL, &o, err));
        RT_TRY(rt_json_set_string(o, "arm", name, err));
        RT_TRY(rt_json_set_int(o, "runs", (int64_t)rt_json_len(runs), err));
        RT_TRY(rt_json_set_int(o, "finished", done, err));
        RT_TRY(rt_json_set_string(o, "description", description, err));
    }
    if (eval != NULL)
        RT_TRY(rt_json_set_copy(obj, "eval_data", eval, err));
out:
    rt_json_free(e);
    return st;
}

enum rt_status rt_inspect_checkpoint(const char *path, const struct rt_inspect_options *o, struct rt_json *obj, struct rt_err *err)
{
    enum rt_status st;
    char file[PATH_CAP];
    struct rt_buf text = {0};
    struct rt_json *m = NULL, *list, *f;
    int64_t step, bytes, total = 0;
    const char *name;
    RT_TRY(rt_path_join(file, sizeof file, path, "MANIFEST", err));
    RT_TRY(rt_file_read_all(file, (size_t)1 << 20, &text, err));
    const char *nl = memchr(text.data, '\n', text.len);
    RT_TRY(rt_json_parse(text.data, nl != NULL ? (size_t)(nl - text.data) : text.len, file, &m, err));
    RT_TRY(rt_json_int(m, "step", 0, INT64_MAX, &step, err));
    const struct rt_json *files = rt_json_get(m, "files");
    RT_TRY(rt_json_set_int(obj, "step", step, err));
    RT_TRY(rt_json_set_array(obj, "files", &list, err));
    for (size_t i = 0; i < rt_json_len(files); i++) {
        RT_TRY(rt_json_string(rt_json_at(files, i), "name", &name, err));
        RT_TRY(rt_json_int(rt_json_at(files, i), "bytes", 0, INT64_MAX / 4096, &bytes, err));
        RT_TRY(rt_json_set_object(list, NULL, &f, err));
        RT_TRY(rt_json_set_string(f, "name", name, err));
        RT_TRY(rt_json_set_int(f, "bytes", bytes, err));
        total += bytes;
    }
    RT_TRY(rt_json_set_int(obj, "bytes", total, err));
    if (o->verify) {
        RT_TRY(rt_ckpt_verify(path, &step, err));
        RT_TRY(rt_json_set_bool(obj, "verified", true, err));
    }
out:
    rt_json_free(m);
    rt_buf_free(&text);
    return st;
}
