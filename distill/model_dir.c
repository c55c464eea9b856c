#include "distill/model_dir.h"

#include <stdio.h>

#include "core/io.h"

enum rt_status rt_model_dir_open(const char *path, const char *template_name, struct rt_log *log, struct rt_model_dir *out,
                                 struct rt_err *err)
{
    char file[4096];
    struct rt_err tmpl_err = {0};
    enum rt_status st;
    *out = (struct rt_model_dir){0};
    if (!rt_path_exists(path))
        RT_FAIL(err, IO, "%s: no such directory", path);
    snprintf(out->path, sizeof out->path, "%s", path);
    RT_TRY(rt_path_join(file, sizeof file, path, "tokenizer.json", err));
    if (!rt_path_exists(file)) {
        if (template_name != NULL)
            RT_FAIL(err, USAGE, "--template %s: %s has no tokenizer.json", template_name, path);
        return RT_OK;
    }
    RT_TRY(rt_tokenizer_load(path, &out->tok, err));
    st = rt_template_load(path, template_name, out->tok, &out->tmpl, &tmpl_err);
    if (st == RT_UNSUPPORTED && template_name == NULL) {
        rt_warn(log, "warning: %s", tmpl_err.msg);
        st = RT_OK;
    } else if (st != RT_OK) {
        rt_fail(err, st, "%s", tmpl_err.msg);
    }
out:
    if (st != RT_OK)
        rt_model_dir_close(out);
    return st;
}

void rt_model_dir_close(struct rt_model_dir *m)
{
    rt_template_free(m->tmpl);
    rt_tokenizer_free(m->tok);
    *m = (struct rt_model_dir){0};
}

enum rt_status rt_model_dir_keep(const struct rt_model_dir *m, const char *dir, struct rt_err *err)
{
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"};
    enum rt_status st = RT_OK;
    struct rt_buf b = {0};
    char from[4096], to[4096];
    if (m->tok == NULL)
        return RT_OK;
    RT_TRY(rt_mkdirs(dir, err));
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        RT_TRY(rt_path_join(from, sizeof from, m->path, names[i], err));
        RT_TRY(rt_path_join(to, sizeof to, dir, names[i], err));
        if (!rt_path_exists(from) || rt_path_exists(to))
            continue;
        b.len = 0;
        RT_TRY(rt_file_read_all(from, 64 << 20, &b, err));
        RT_TRY(rt_publish_bytes(to, b.data, b.len, err));
    }
out:
    rt_buf_free(&b);
    return st;
}

enum rt_status rt_model_dir_n_ids(const struct rt_model_dir *m, int64_t vocab_size, int64_t *n_ids, struct rt_err *err)
{
    *n_ids = m->tok != NULL ? (int64_t)rt_tokenizer_n_ids(m->tok) : vocab_size;
    if (*n_ids > vocab_size)
        return rt_fail(err, RT_FORMAT, "%s: tokenizer.json has ids up to %ld, the model's vocabulary has %ld rows", m->path,
                       (long)*n_ids - 1, (long)vocab_size);
    return RT_OK;
}
