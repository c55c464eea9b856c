#include "distill/eval_key.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static void text(const struct rt_json *line, const char *key, char *out, size_t cap)
{
    const char *s = rt_json_as_string(rt_json_get(line, key), NULL);
    snprintf(out, cap, "%s", s != NULL ? s : "");
}

double rt_eval_number(const struct rt_json *line, const char *key)
{
    double v;
    return rt_json_as_double(rt_json_get(line, key), &v) ? v : NAN;
}

void rt_eval_key_read(const struct rt_json *line, struct rt_eval_key *out)
{
    static const char *const sampling[] = {"samples", "temperature", "top_p", "max_tokens"};
    char verify[16];
    text(line, "name", out->name, sizeof out->name);
    text(line, "by", out->by, sizeof out->by);
    text(line, "data", out->data, sizeof out->data);
    text(line, "data_sha256", out->sequences, sizeof out->sequences);
    text(line, "problems_sha256", out->problems, sizeof out->problems);
    text(line, "verify", verify, sizeof verify);
    out->T = rt_eval_number(line, "kd_temperature");
    for (int i = 0; i < RT_KEY_EXACT; i++)
        out->sampling[i] = rt_eval_number(line, sampling[i]);
    out->sampling[RT_KEY_EXACT] = verify[0] != '\0' ? strcmp(verify, "exact") == 0 : NAN;
}

static bool equal(double a, double b)
{
    return a == b || (isnan(a) && isnan(b));
}

static bool known_apart(const char *a, const char *b)
{
    return a[0] != '\0' && b[0] != '\0' && strcmp(a, b) != 0;
}

bool rt_eval_key_same_data(const struct rt_eval_key *a, const struct rt_eval_key *b)
{
    if (known_apart(a->sequences, b->sequences) || known_apart(a->problems, b->problems))
        return false;
    const bool hashed = (a->sequences[0] != '\0' && b->sequences[0] != '\0') || (a->problems[0] != '\0' && b->problems[0] != '\0');
    return hashed || !known_apart(a->data, b->data);
}

bool rt_eval_key_same(const struct rt_eval_key *a, const struct rt_eval_key *b)
{
    return strcmp(a->by, b->by) == 0 && rt_eval_key_same_but_by(a, b);
}

bool rt_eval_key_same_but_by(const struct rt_eval_key *a, const struct rt_eval_key *b)
{
    bool same = strcmp(a->name, b->name) == 0 && rt_eval_key_same_data(a, b) && equal(a->T, b->T);
    for (int i = 0; i < RT_KEY_SAMPLING; i++)
        same = same && equal(a->sampling[i], b->sampling[i]);
    return same;
}

bool rt_eval_key_same_answers(const struct rt_eval_key *a, const struct rt_eval_key *b)
{
    bool same = !known_apart(a->problems, b->problems);
    for (int i = 0; i < RT_KEY_SAMPLING; i++)
        same = same && !(a->sampling[i] != b->sampling[i] && !isnan(a->sampling[i]) && !isnan(b->sampling[i]));
    return same;
}

bool rt_eval_key_same_kl(const struct rt_eval_key *a, const struct rt_eval_key *b)
{
    return a->T == b->T || isnan(a->T) || isnan(b->T);
}
