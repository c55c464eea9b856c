/* Checks against reference cases: model directories with expected.safetensors, tokenizers with expected ids.
 * Each line: PASS|FAIL|SKIP case backend check value bound. */
#ifndef RT_TESTS_ORACLE_H
#define RT_TESTS_ORACLE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/backend.h"
#include "formats/safetensors.h"

struct oracle {
    int passed, failed, skipped;
    bool quiet;           /* tests of the tests count without printing */
    const char *name;     /* of the case */
    const char *backend;
};

/* value <= bound, or with at_least value >= bound. NaN fails. */
void oracle_check(struct oracle *o, const char *check, double value, double bound, bool at_least);
void oracle_skip(struct oracle *o, const char *check, const char *why);
/* A fault that keeps a case from running: one failed check. */
void oracle_fail(struct oracle *o, const char *check, const char *why);
/* Relative error of the tensor |a-b|2/|b|2 as `check`, and of its worst row as `check/worst_row`, which may be ten times larger: a row
 * with a small norm carries the rounding of its neighbours. */
void oracle_tensor(struct oracle *o, const char *check, const float *a, const float *b, int64_t rows, int64_t cols, double bound);
double oracle_row_error(const float *a, const float *b, int64_t cols);
/* The tensor as float32, NULL where absent. free() it. */
float *oracle_expected(const struct rt_tensors *t, const char *name, int64_t *n);
int64_t *oracle_expected_ints(const struct rt_tensors *t, const char *name, int64_t *n);

/* Elements of act <-> float32. */
void oracle_upload(const struct rt_device *d, void *dst, const float *src, int64_t n);
void oracle_download(const struct rt_device *d, float *dst, const void *src, int64_t n);

void oracle_teacher(struct oracle *o, const struct rt_device *d, const char *dir, const struct rt_tensors *expected);
/* Where act is BF16. ids [n] */
void oracle_teacher_bf16(struct oracle *o, const struct rt_device *d, const char *dir, const struct rt_tensors *expected, const uint32_t *ids, int64_t n);
void oracle_student(struct oracle *o, const struct rt_device *d, const char *dir, const struct rt_tensors *expected);
void oracle_tokenizer(struct oracle *o, const char *name, const char *dir, const char *cases);
/* dir against every backend of the list. */
void oracle_case(struct oracle *o, const char *dir, const char *backends);

#endif
