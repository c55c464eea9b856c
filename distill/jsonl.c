#include "distill/jsonl.h"

enum rt_status rt_jsonl_open(const char *path, struct rt_jsonl *out, struct rt_err *err)
{
    *out = (struct rt_jsonl){0};
    return rt_lines_open(path, &out->lines, err);
}

void rt_jsonl_close(struct rt_jsonl *f)
{
    rt_lines_close(&f->lines);
    rt_json_free(f->value);
    *f = (struct rt_jsonl){0};
}

enum rt_status rt_jsonl_next(struct rt_jsonl *f, const struct rt_json **v, struct rt_err *err)
{
    struct rt_err bad = {0};
    bool end = false;
    rt_json_free(f->value);
    f->value = NULL;
    const enum rt_status st = rt_lines_next_json(&f->lines, &f->value, &end, &bad);
    f->torn = st == RT_FORMAT && f->lines.torn;
    *v = st == RT_OK && !end ? f->value : NULL;
    return st == RT_OK || f->torn ? RT_OK : rt_fail(err, st, "%s", bad.msg);
}
