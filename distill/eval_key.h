/* What an evaluation measured: two lines of eval.jsonl (distill/run_record.h) with one key hold one number, at two steps or twice. */
#ifndef RT_DISTILL_EVAL_KEY_H
#define RT_DISTILL_EVAL_KEY_H

#include <stdbool.h>

#include "formats/json.h"

enum { RT_KEY_SAMPLES, RT_KEY_TEMPERATURE, RT_KEY_TOP_P, RT_KEY_MAX_TOKENS, RT_KEY_EXACT, RT_KEY_SAMPLING };
struct rt_eval_key {
    char name[128], by[16], data[4096]; /* "": not there */
    char sequences[65], problems[65];   /* hashes of what was scored and of what was asked, where that is known */
    double T;                           /* of the KL. NaN: none */
    double sampling[RT_KEY_SAMPLING];   /* of answers. NaN: none, or not known */
};

/* A member of a line; NaN where it is missing or no number. */
double rt_eval_number(const struct rt_json *line, const char *key);
/* From a line; members that are missing or of another type are left open. Longer texts are cut. */
void rt_eval_key_read(const struct rt_json *line, struct rt_eval_key *out);
/* Everything the same, what is open in both included. */
bool rt_eval_key_same(const struct rt_eval_key *a, const struct rt_eval_key *b);
/* The same, whoever measured. */
bool rt_eval_key_same_but_by(const struct rt_eval_key *a, const struct rt_eval_key *b);
/* The same sequences and problems, as far as hashes are there; else the same path. */
bool rt_eval_key_same_data(const struct rt_eval_key *a, const struct rt_eval_key *b);
/* Nothing that both know of the answers' sampling differs, nor the problems; nor the KL's temperature. */
bool rt_eval_key_same_answers(const struct rt_eval_key *a, const struct rt_eval_key *b);
bool rt_eval_key_same_kl(const struct rt_eval_key *a, const struct rt_eval_key *b);

#endif
