/* `make oracle`: runs every check that applies to each model directory and tokenizer given. */
#include "tests/oracle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/io.h"
#include "formats/json.h"

int rt_oracle_main(int argc, char **argv);

static void line(struct oracle *o, const char *verdict, const char *check, const char *value, const char *bound)
{
    if (!o->quiet)
        printf("%s %s %s %s %s %s\n", verdict, o->name, o->backend, check, value, bound);
}

void oracle_check(struct oracle *o, const char *check, double value, double bound, bool at_least)
{
    char v[32], b[32];
    const bool good = at_least ? value >= bound : value <= bound;
    snprintf(v, sizeof v, "%.3g", value);
    snprintf(b, sizeof b, "%s%.3g", at_least ? ">=" : "", bound);
    line(o, good ? "PASS" : "FAIL", check, v, b);
    o->passed += good;
    o->failed += !good;
}

void oracle_skip(struct oracle *o, const char *check, const char *why)
{
    line(o, "SKIP", check, "-", why);
    o->skipped++;
}

void oracle_fail(struct oracle *o, const char *check, const char *why)
{
    line(o, "FAIL", check, "-", why);
    o->failed++;
}

double oracle_row_error(const float *a, const float *b, int64_t cols)
{
    double num = 0, den = 0;
    for (int64_t i = 0; i < cols; i++) {
        const double d = (double)a[i] - b[i];
        num += d * d;
        den += (double)b[i] * b[i];
    }
    if (!isfinite(num))
        return INFINITY;
    return den > 0 ? sqrt(num / den) : sqrt(num);
}

void oracle_tensor(struct oracle *o, const char *check, const float *a, const float *b, int64_t rows, int64_t cols, double bound)
{
    char name[160];
    double worst = 0;
    for (int64_t i = 0; i < rows; i++)
        worst = fmax(worst, oracle_row_error(a + i * cols, b + i * cols, cols));
    oracle_check(o, check, oracle_row_error(a, b, rows * cols), bound, false);
    snprintf(name, sizeof name, "%s/worst_row", check);
    oracle_check(o, name, worst, 10 * bound, false);
}

float *oracle_expected(const struct rt_tensors *t, const char *name, int64_t *n)
{
    const struct rt_tensor *e = rt_tensors_find(t, name);
    if (e == NULL)
        return NULL;
    *n = rt_tensor_elements(e);
    float *out = malloc((size_t)(*n + 1) * sizeof *out);
    struct rt_err err = {0};
    if (out != NULL && rt_tensors_read_f32(t, e, 0, *n, out, &err) != RT_OK) {
        free(out);
        return NULL;
    }
    return out;
}

int64_t *oracle_expected_ints(const struct rt_tensors *t, const char *name, int64_t *n)
{
    const struct rt_tensor *e = rt_tensors_find(t, name);
    struct rt_err err = {0};
    if (e == NULL || (e->dtype != RT_I64 && e->dtype != RT_I32))
        return NULL;
    *n = rt_tensor_elements(e);
    int64_t *out = malloc((size_t)(*n + 1) * sizeof *out);
    if (out == NULL || rt_tensors_read(t, e, out, &err) != RT_OK) {
        free(out);
        return NULL;
    }
    if (e->dtype == RT_I32)
        for (int64_t i = *n - 1; i >= 0; i--) {
            int32_t v;
            memcpy(&v, (const char *)out + i * 4, 4);
            out[i] = v;
        }
    return out;
}

void oracle_upload(const struct rt_device *d, void *dst, const float *src, int64_t n)
{
    struct rt_err err = {0};
    void *tmp;
    if (d->be->alloc(d->dev, (size_t)n * sizeof(float), &tmp, &err) != RT_OK)
        return;
    rt_device_upload(d, tmp, src, (size_t)n * sizeof(float), &err);
    RT_OP(d, convert, &err, .src = tmp, .dst = dst, .n = n);
    rt_device_sync(d, &err);
    d->be->free(d->dev, tmp);
}

void oracle_download(const struct rt_device *d, float *dst, const void *src, int64_t n)
{
    struct rt_err err = {0};
    void *tmp;
    if (d->be->alloc(d->dev, (size_t)n * sizeof(float), &tmp, &err) != RT_OK)
        return;
    RT_OP(d, convert, &err, .src = src, .dst = tmp, .n = n, .to_f32 = true);
    rt_device_download(d, dst, tmp, (size_t)n * sizeof(float), &err);
    d->be->free(d->dev, tmp);
}

/* Teacher or student, by what config.json names. */
static void run_case(struct oracle *o, const struct rt_device *d, const char *dir, const struct rt_tensors *expected)
{
    char path[4096];
    struct rt_json *j = NULL;
    struct rt_err err = {0};
    const char *type = "";
    if (rt_path_join(path, sizeof path, dir, "config.json", &err) != RT_OK || rt_json_load(path, 1 << 20, &j, &err) != RT_OK ||
        rt_json_string(j, "model_type", &type, &err) != RT_OK)
        oracle_fail(o, "config", err.msg);
    else if (strncmp(type, "deepseek", 8) == 0 || strncmp(type, "kimi", 4) == 0 || strcmp(type, "moonlight") == 0)
        oracle_teacher(o, d, dir, expected);
    else
        oracle_student(o, d, dir, expected);
    rt_json_free(j);
}

void oracle_case(struct oracle *o, const char *dir, const char *backends)
{
    char list[256], path[4200], *save = NULL;
    struct rt_err err = {0};
    struct rt_tensors *expected = NULL;
    const size_t n = strlen(dir);
    char trimmed[4096];
    snprintf(trimmed, sizeof trimmed, "%.*s", (int)(n > 1 && dir[n - 1] == '/' ? n - 1 : n), dir);
    o->name = strrchr(trimmed, '/') != NULL ? strrchr(trimmed, '/') + 1 : trimmed;
    o->backend = "-";
    snprintf(path, sizeof path, "%s/expected.safetensors", trimmed);
    if (rt_tensors_open(path, &expected, &err) != RT_OK) {
        oracle_fail(o, "expected", err.msg);
        return;
    }
    snprintf(list, sizeof list, "%s", backends);
    for (char *name = strtok_r(list, " ,", &save); name != NULL; name = strtok_r(NULL, " ,", &save)) {
        const struct rt_backend *be;
        struct rt_device d = {0};
        o->backend = name;
        rt_err_clear(&err);
        if (rt_backend_select(name, NULL, 0, &be, &err) != RT_OK) {
            if (err.status == RT_DEVICE)
                oracle_skip(o, "device", err.msg);
            else
                oracle_fail(o, "device", err.msg);
            continue;
        }
        if (rt_device_open(be, &(const struct rt_dev_options){0}, &d, &err) != RT_OK)
            oracle_fail(o, "device", err.msg);
        else
            run_case(o, &d, trimmed, expected);
        rt_device_close(&d);
    }
    rt_tensors_free(expected);
}

static void tokenizers(struct oracle *o, const char *list, const char *cases)
{
    char copy[8192], *save = NULL;
    snprintf(copy, sizeof copy, "%s", list);
    for (char *item = strtok_r(copy, " ", &save); item != NULL; item = strtok_r(NULL, " ", &save)) {
        char *eq = strchr(item, '=');
        o->name = item;
        o->backend = "-";
        if (eq == NULL) {
            oracle_fail(o, "tokenizer", "expected NAME=DIR");
            continue;
        }
        *eq = '\0';
        if (cases[0] == '\0')
            oracle_skip(o, "tokenizer", "no TOKENIZER_CASES given");
        else
            oracle_tokenizer(o, item, eq + 1, cases);
    }
}

int rt_oracle_main(int argc, char **argv)
{
    const char *dirs = "", *backends = "ref cpu", *toks = "", *cases = "";
    struct oracle o = {0};
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--cases") == 0)
            dirs = argv[i + 1];
        else if (strcmp(argv[i], "--backends") == 0)
            backends = argv[i + 1];
        else if (strcmp(argv[i], "--tokenizers") == 0)
            toks = argv[i + 1];
        else if (strcmp(argv[i], "--tokenizer-cases") == 0)
            cases = argv[i + 1];
    }
    if (dirs[0] == '\0' && toks[0] == '\0') {
        fprintf(stderr, "usage: make oracle CASES=\"DIR ...\" [TOKENIZERS=\"NAME=DIR ...\" TOKENIZER_CASES=FILE] [BACKENDS=\"ref cpu cuda\"]\n");
        return 2;
    }
    char *copy = strdup(dirs), *save = NULL;
    for (char *dir = strtok_r(copy, " ", &save); dir != NULL; dir = strtok_r(NULL, " ", &save))
        oracle_case(&o, dir, backends);
    free(copy);
    tokenizers(&o, toks, cases);
    printf("%d passed, %d failed, %d skipped\n", o.passed, o.failed, o.skipped);
    return o.failed > 0;
}
