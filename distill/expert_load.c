#include "distill/expert_load.h"

#include <stdio.h>
#include <string.h>

#include "core/io.h"
#include "core/mem.h"
#include "formats/json.h"

static enum rt_status read_counts(struct rt_expert_load *l, struct rt_err *err)
{
    struct rt_json *j = NULL;
    enum rt_status st;
    RT_TRY(rt_json_load(l->path, 256 << 20, &j, err));
    const struct rt_json *layers = rt_json_get(j, "layers");
    RT_TRY(rt_json_int(j, "windows", 0, INT64_MAX, &l->windows, err));
    if (rt_json_len(layers) != (size_t)l->layers)
        RT_FAIL(err, FORMAT, "%s: %zu layers, expected %d", l->path, rt_json_len(layers), l->layers);
    for (int i = 0; i < l->layers; i++) {
        const struct rt_json *row = rt_json_at(layers, (size_t)i);
        if (rt_json_len(row) != (size_t)l->experts)
            RT_FAIL(err, FORMAT, "%s: layer %d has %zu experts, expected %d", l->path, i, rt_json_len(row), l->experts);
        for (int e = 0; e < l->experts; e++)
            if (!rt_json_as_int(rt_json_at(row, (size_t)e), &l->total[(int64_t)i * l->experts + e]))
                RT_FAIL(err, FORMAT, "%s: layer %d expert %d: expected a count", l->path, i, e);
    }
out:
    rt_json_free(j);
    return st;
}

enum rt_status rt_expert_load_open(struct rt_expert_load *l, const char *dir, int part, int n_parts, int layers, int experts, struct rt_err *err)
{
    char name[64];
    enum rt_status st = RT_OK;
    *l = (struct rt_expert_load){.layers = layers, .experts = experts};
    if (experts == 0)
        return RT_OK;
    const size_t n = (size_t)layers * (size_t)experts;
    snprintf(name, sizeof name, n_parts > 1 ? "expert_load-%d-of-%d.json" : "expert_load.json", part, n_parts);
    RT_TRY(rt_path_join(l->path, sizeof l->path, dir, name, err));
    RT_TRY(rt_alloc(n, sizeof *l->total, "expert load", &l->total, err));
    RT_TRY(rt_alloc(n, sizeof *l->window, "expert load", &l->window, err));
    if (rt_path_exists(l->path))
        RT_TRY(read_counts(l, err));
out:
    return st;
}

void rt_expert_load_close(struct rt_expert_load *l)
{
    rt_free(l->total);
    rt_free(l->window);
    l->total = l->window = NULL;
}

void rt_expert_load_window(struct rt_expert_load *l)
{
    if (l->window != NULL)
        memset(l->window, 0, (size_t)l->layers * (size_t)l->experts * sizeof *l->window);
}

enum rt_status rt_expert_load_save(struct rt_expert_load *l, int64_t index, struct rt_err *err)
{
    struct rt_json *j = NULL, *layers, *row;
    struct rt_buf text = {0};
    enum rt_status st = RT_OK;
    if (l->window == NULL || index < l->windows)
        return RT_OK;
    for (int64_t i = 0; i < (int64_t)l->layers * l->experts; i++)
        l->total[i] += l->window[i];
    l->windows = index + 1;
    RT_TRY(rt_json_new_object(&j, err));
    RT_TRY(rt_json_set_int(j, "windows", l->windows, err));
    RT_TRY(rt_json_set_array(j, "layers", &layers, err));
    for (int i = 0; i < l->layers; i++) {
        RT_TRY(rt_json_set_array(layers, NULL, &row, err));
        for (int e = 0; e < l->experts; e++)
            RT_TRY(rt_json_set_int(row, NULL, l->total[(int64_t)i * l->experts + e], err));
    }
    RT_TRY(rt_json_dump(j, 0, &text, err));
    RT_TRY(rt_publish_bytes(l->path, text.data, text.len, err));
out:
    rt_buf_free(&text);
    rt_json_free(j);
    return st;
}
