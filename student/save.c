#include "student/save.h"

#include <stdlib.h>
#include <string.h>

#include "core/collective.h"
#include "core/io.h"
#include "student/internal.h"

enum { PATH_CAP = 4096 };
static const size_t max_copy_bytes = (size_t)256 << 20;

/* What a tokenizer may consist of, and what generation reads. */
static const char *const companions[] = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
};

static bool same_dir(const char *a, const char *b)
{
    char *x = realpath(a, NULL), *y = realpath(b, NULL);
    const bool same = x != NULL && y != NULL && strcmp(x, y) == 0;
    free(x);
    free(y);
    return same;
}

static enum rt_status copy_companions(const char *source, const char *dir, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf bytes = {0};
    char from[PATH_CAP], to[PATH_CAP];
    if (source == NULL || same_dir(source, dir))
        return RT_OK;
    for (size_t i = 0; i < sizeof companions / sizeof companions[0]; i++) {
        RT_TRY(rt_path_join(from, sizeof from, source, companions[i], err));
        if (!rt_path_exists(from))
            continue;
        RT_TRY(rt_path_join(to, sizeof to, dir, companions[i], err));
        bytes.len = 0;
        RT_TRY(rt_file_read_all(from, max_copy_bytes, &bytes, err));
        RT_TRY(rt_publish_bytes(to, bytes.data, bytes.len, err));
    }
out:
    rt_buf_free(&bytes);
    return st;
}

static enum rt_status put_writer(void *w, const void *data, uint64_t bytes, struct rt_err *err)
{
    return rt_tensor_writer_put(w, data, bytes, err);
}

enum rt_status rt_student_save(const struct rt_student *s, const struct rt_student_save *o, const char *dir, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf text = {0};
    struct rt_tensor_decl *decl = NULL;
    struct rt_tensor_writer *w = NULL;
    char path[PATH_CAP];
    const struct rt_param_block block = o->state != NULL ? rt_adamw_master(o->state, s->d, s->block) : rt_param_block(s->d, s->block);
    if (o->state != NULL && rt_comm_rank(o->state->shard.comm) > 0) /* rank 0 may lack a part */
        return block.shard.comm != NULL ? rt_params_put(s->p, s->d, block, o->dtype, NULL, NULL, err) : RT_OK;
    RT_TRY(rt_student_config_text(s->c, o->dtype, &text, err));
    RT_TRY(rt_params_decl(s->p, o->dtype, &decl, err));
    RT_TRY(rt_tensor_writer_model(dir, decl, s->p->n, o->max_shard_bytes, &w, err));
    RT_TRY(rt_path_join(path, sizeof path, dir, "config.json", err));
    RT_TRY(rt_publish_bytes(path, text.data, text.len, err));
    RT_TRY(copy_companions(o->source, dir, err));
    RT_TRY(rt_params_put(s->p, s->d, block, o->dtype, put_writer, w, err));
    RT_TRY(rt_tensor_writer_finish(w, err));
out:
    rt_tensor_writer_free(w);
    rt_free(decl);
    rt_buf_free(&text);
    return st;
}
