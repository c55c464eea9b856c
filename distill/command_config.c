/* --config FILE: options from a JSON object, written by hand or left by a run of the same command. */
#include <stdio.h>
#include <string.h>

#include "distill/command.h"

struct config {
    const struct rt_command *cmd;
    const struct rt_opt *tables[2];
    const char *path;
    const bool *seen;
    void *values;
    bool of_run; /* a run's config.json: it names options too that the command does not take */
};

/* A value as an option's text; numbers go into `text`. */
static enum rt_status text_of(const struct rt_json *value, struct rt_buf *text, const char **out, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    bool flag;
    text->len = 0;
    if ((*out = rt_json_as_string(value, NULL)) != NULL)
        goto out;
    if (rt_json_as_bool(value, &flag)) {
        *out = flag ? "true" : "false";
        goto out;
    }
    RT_TRY(rt_json_dump(value, 0, text, err));
    RT_TRY(rt_buf_append(text, "", 1, err)); /* the final 0 */
    *out = text->data;
out:
    return st;
}

static enum rt_status set_items(const struct config *c, const char *key, const struct rt_json *list, struct rt_buf *text, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    const char *s;
    for (size_t i = 0; i < rt_json_len(list); i++) {
        RT_TRY(text_of(rt_json_at(list, i), text, &s, err));
        RT_TRY(rt_options_set(c->tables, 2, key, s, c->path, c->values, err));
    }
out:
    return st;
}

/* Sets what the command line left alone; texts are kept in `keep`. */
static enum rt_status apply(const struct config *c, const struct rt_json *object, struct rt_json *keep, struct rt_err *err)
{
    enum rt_status st = RT_OK;
    struct rt_buf text = {0};
    const char *key, *s;
    const struct rt_json *value;
    char source[256];
    const int own = rt_command_own_options(c->cmd);
    snprintf(source, sizeof source, "%.250s: ", c->path);
    for (size_t i = 0; rt_json_member(object, i, &key, &value); i++) {
        int at = 0;
        const struct rt_opt *o = rt_options_find(c->tables, 2, key, strlen(key), &at);
        const bool taken = o == NULL || at < own || rt_command_takes(c->cmd, at - own);
        if (o != NULL && (c->seen[at] || (!taken && c->of_run)))
            continue;
        if (!taken)
            RT_TRY(rt_command_not_taken(c->cmd, at - own, source, err));
        if (o != NULL && o->type == RT_OPT_LIST && rt_json_typeof(value) == RT_JSON_ARRAY) {
            RT_TRY(set_items(c, key, value, &text, err));
            continue;
        }
        RT_TRY(text_of(value, &text, &s, err));
        RT_TRY(rt_json_set_string(keep, key, s, err));
        RT_TRY(rt_options_set(c->tables, 2, key, rt_json_as_string(rt_json_get(keep, key), NULL), c->path, c->values, err));
    }
out:
    rt_buf_free(&text);
    return st;
}

enum rt_status rt_command_apply_config(const struct rt_command *cmd, const char *path, const bool *seen, void *values, struct rt_json **keep,
                                       struct rt_err *err)
{
    enum rt_status st;
    struct rt_json *doc = NULL;
    struct config c = {cmd, {cmd->options, rt_common_options()}, path, seen, values, false};
    RT_TRY(rt_json_new_object(keep, err));
    RT_TRY(rt_json_load(path, 1 << 20, &doc, err));
    if (rt_json_typeof(doc) != RT_JSON_OBJECT)
        RT_FAIL(err, FORMAT, "%s: expected a JSON object of option names and values", path);
    const char *command = rt_json_as_string(rt_json_get(doc, "command"), NULL);
    const struct rt_json *options = rt_json_get(doc, "options"), *runtime = rt_json_get(doc, "runtime");
    c.of_run = command != NULL && options != NULL && rt_json_typeof(options) == RT_JSON_OBJECT;
    if (c.of_run && strcmp(command, cmd->name) != 0)
        RT_FAIL(err, USAGE, "%s: found the options of a run of `retort %.40s`, expected those of `retort %s`", path, command, cmd->name);
    RT_TRY(apply(&c, c.of_run ? options : doc, *keep, err));
    if (c.of_run && runtime != NULL && rt_json_typeof(runtime) == RT_JSON_OBJECT)
        RT_TRY(apply(&c, runtime, *keep, err));
out:
    rt_json_free(doc);
    return st;
}
